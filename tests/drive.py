"""What test_distributed.py runs in every process: train tracks to their ends and write down what this rank has.

torchrun ... tests/drive.py DATA_DIR OUT_DIR RUN.pt...        each a (track, dtype, whether it is compiled, by Dynamo
and AOTAutograd alone); makes OUT_DIR/RUN-RANK.pt
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from train_gpt import Options, Runtime, Track, Trainer


def drive(track: Track, runtime: Runtime, data_dir: Path) -> dict:
    """Losses of all steps and of the final validation (over all ranks), and the state of this rank at the end and,
    under untied_head and untied_embed, right after the untie step."""
    trainer = Trainer(track, runtime, data_dir, seed=1)
    losses, untied = [], {}
    for step in range(track.schedule.total_steps):
        losses.append(runtime.sum(trainer.train_step(step).double()).item())
        if track.at(step).unties:
            state = trainer.state()["optimizer"]
            untied = {f"untied_{name}": state[name] for name in ("head", "embed")}
    losses.append(trainer.validate(track.validation_at(track.schedule.total_steps)))
    state = trainer.state()
    return {"losses": losses, **state, "optimizer": state["optimizer"] | untied}


def main(data_dir: str, out: str, *runs: str) -> None:
    runtime = Runtime.create(Options(device="cpu"))
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for run in map(Path, runs):
        track, dtype, compiled = torch.load(run, weights_only=False)
        result = drive(track, replace(runtime, dtype=dtype, compile=compiled), Path(data_dir))
        torch.save(result, Path(out) / f"{run.stem}-{runtime.rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
