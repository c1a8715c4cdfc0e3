"""What test_distributed.py runs in every process: train tracks to their ends and write down what this rank has.

torchrun ... tests/drive.py DATA_DIR OUT_DIR RUN.pt...        each a (track, dtype, whether it is compiled, by Dynamo
and AOTAutograd alone); makes OUT_DIR/RUN-RANK.pt, and OUT_DIR/exchange-RANK.pt, what `exchange` returns
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from conftest import tiny_track
from torch import Tensor, nn

from train_gpt import Optimizer, Options, Runtime, Settings, Track, Trainer


def drive(track: Track, runtime: Runtime, data_dir: Path) -> dict:
    """Losses of all steps and of the final validation (over all ranks), and the state of this rank at the end and,
    under untied_head and untied_embed, right after the untie step."""
    trainer = Trainer(track, runtime, data_dir, seed=1)
    trainer.find_prefixes()
    losses, untied = [], {}
    for step in range(track.schedule.total_steps):
        losses.append(runtime.sum(trainer.train_step(step).double()).item())
        if track.at(step).unties:
            state = trainer.state()["optimizer"]
            untied = {f"untied_{name}": state[name] for name in ("head", "embed")}
    losses.append(trainer.validate(track.validation_at(track.schedule.total_steps)))
    state = trainer.state()
    shared = {"touched": trainer.loader.touched, "prefix": trainer.model.prefix}
    return {"losses": losses, **state, **shared, "optimizer": state["optimizer"] | untied}


def sparse_gradients(world_size: int, step: int) -> Tensor:
    """A gradient of a table of 40 rows for each rank, (W, 40, 3): small integers, whose sums are exact in bfloat16.

    Every rank has rows 7 and 8 and some of its own; the last rank has none in step 16, and none has any in step 19.
    """
    rng = np.random.default_rng(step)
    some = rng.random((world_size, 40)) < 0.3
    some[:, 7:9] = True
    some[-1] &= step != 16
    some &= step != 19
    return torch.from_numpy(rng.integers(-9, 10, (world_size, 40, 3)) * some[..., None])


def exchange(runtime: Runtime) -> list[Tensor]:
    """This rank's piece of the summed gradient of a table, at each step of Adam in three pairs of steps."""
    sums = []

    class Noting(Optimizer):
        def _update(self, name: str, piece: Tensor, grad: Tensor, settings: Settings) -> None:
            sums.append(grad.clone())

    track = tiny_track()
    table = nn.Parameter(torch.zeros(40, 3, dtype=torch.bfloat16))
    optimizer = Noting({"ngram_embed": table}, track.optimizer, runtime)
    for step in range(14, 20):  # untied: there is no head
        gradients = sparse_gradients(runtime.world_size, step)
        touched = (gradients != 0).any(-1).numpy()
        touched[:, 20] = True  # a row may be read and have no gradient
        (table * gradients[runtime.rank]).sum().backward()
        optimizer.step(track.at(step), {"ngram_embed": None if step >= 18 else touched})
    return sums


def main(data_dir: str, out: str, *runs: str) -> None:
    runtime = Runtime.create(Options(device="cpu"))
    torch.save(exchange(runtime), Path(out) / f"exchange-{runtime.rank}.pt")
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for run in map(Path, runs):
        track, dtype, compiled = torch.load(run, weights_only=False)
        result = drive(track, replace(runtime, dtype=dtype, compile=compiled), Path(data_dir))
        torch.save(result, Path(out) / f"{run.stem}-{runtime.rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
