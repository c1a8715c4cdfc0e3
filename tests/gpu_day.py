"""What only a GPU can say, in one command of less than nine minutes: numbers, times, memory. Any torch from 2.11 on.

    bash tests/gpu_day.sh [--out FOLDER] [--minutes 9] [--parts small sibling ...]
    python tests/gpu_day.py --device cpu --minutes 60       # whether it works, not how fast: everything tiny, no GPU
    python tests/gpu_day.py --write-losses                  # on a CPU: the losses that `sibling` is held against

Parts, the most telling first; each has a limit of time, and what the others leave over:

    small      40 steps of `small` on rehearsal shards: losses finite and falling, ms/step, memory
    sibling    60 steps of a sibling of `small`: every loss within BOUND of those in float32 on a CPU
    step       the step of every stage, and each kernel against torch (tests/benchmarks/step.py)
    tests      the tests marked `cuda`
    attention  each FlashAttention that is installed, forward and backward, at the shapes of `small`
    profile    a step, kernel by kernel, with a trace (tests/benchmarks/profile.py)

gpu_day.json and gpu_day.txt, a table, are written after every part; the parts' whole output lies beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(REPO), str(REPO / "tests"), str(REPO / "evals")]
LOSSES = Path(__file__).with_name("gpu_day_losses.json")
# Nats per token, of each of the 60 losses: ten times what bfloat16 takes on a CPU, 0.0080 (--write-losses).
BOUND = 0.08
LIMITS = {"small": 150, "sibling": 90, "step": 200, "tests": 200, "attention": 60, "profile": 60}  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of the results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.8, help="for all of it (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--write-losses", action="store_true")
    parser.add_argument("--inside", choices=("sibling", "attention"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_losses:
        losses = {dtype: sibling_losses("cpu", dtype, options.out) for dtype in ("float32", "bfloat16")}
        difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        print(f"bfloat16 differs by {difference:.4f} at most")
        LOSSES.write_text(json.dumps(losses["float32"]) + "\n")
    elif options.inside == "sibling":
        print(json.dumps(compare_losses(sibling_losses(options.device, "auto", options.out))))
    elif options.inside == "attention":
        print(json.dumps(time_attention()))
    else:
        sys.exit(Day(options).run())


class Day:
    """Runs the parts in processes of their own and keeps what they found."""

    def __init__(self, options: argparse.Namespace):
        self.out, self.device, self.parts = options.out.resolve(), options.device, options.parts
        self.end = time.monotonic() + 60 * options.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, dict] = {}

    def run(self) -> int:
        """All parts; 1 if one of them failed."""
        for name in self.parts:
            self.results[name] = self.part(name)
            (self.out / "gpu_day.json").write_text(json.dumps(self.results, indent=1) + "\n")
            row = lambda name, part: f"{name:10} {part['verdict']:8} {part['seconds']:6.1f} s  {part['said']}"
            lines = [row(*item) for item in self.results.items()]
            (self.out / "gpu_day.txt").write_text("\n".join(lines) + "\n")
            print(lines[-1], flush=True)
        return any(part["verdict"] != "passed" for part in self.results.values())

    def part(self, name: str) -> dict:
        began = time.monotonic()
        limit = min(LIMITS[name] if self.device == "cuda" else math.inf, self.end - began)
        if limit < 10:
            return {"verdict": "left out", "seconds": 0.0, "said": "no time was left"}
        (self.out / f"{name}.txt").unlink(missing_ok=True)
        try:
            numbers, said = getattr(self, name)(lambda *command: self.process(name, limit, *command))
            verdict = "passed"
        except subprocess.TimeoutExpired:
            verdict, numbers, said = "cut", {}, f"after {limit:.0f} s; see {name}.txt"
        except Exception as error:  # whatever went wrong, the next part may still tell something
            verdict, numbers, said = "FAILED", {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"verdict": verdict, "seconds": round(time.monotonic() - began, 1), "said": said, "found": numbers}

    def process(self, name: str, limit: float, *command: object) -> str:
        """Run a command of this Python and return its output, which is kept. Raises RuntimeError if it failed."""
        path = self.out / f"{name}.txt"  # of all commands of a part
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        with open(path, "a") as file:
            words = [sys.executable, *map(str, command)]
            done = subprocess.run(words, stdout=file, stderr=file, timeout=limit, env=environment, cwd=REPO)
        text = path.read_text(errors="replace")
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: " + " | ".join(text.splitlines()[-4:]))
        return text

    # Each returns what goes into the JSON, and a line for the table.

    def small(self, run: Callable[..., str]) -> tuple[dict, str]:
        shards, logs = self.out / "rehearsal", self.out / "logs"
        run("data/rehearsal.py", "--out", shards, "--tokens", "8M", "--val-tokens", "300k")
        script, size = "train_gpt.py", ["--data.val-tokens", 262_144]
        if self.device == "cpu":
            script, size = "evals/sibling.py", ["--width", "1/3", "--depth", "0.2", "--schedule.stages.0.tokens", 1024]
            size += ["--data.val-tokens", 4096, "--data.val-row-tokens", 4096]
        words = ["--data-dir", shards, "--log-dir", logs, "--device", self.device, *size]
        run(script, "small", *words, "--val-every", 0, "--sample-tokens", 0, "--max-steps", 40)
        newest = max(logs.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        events = [json.loads(line) for line in newest.read_text().splitlines()]
        losses = [event["train_loss"] for event in events if "train_loss" in event]
        if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0] - 0.5:
            raise ValueError(f"losses {losses} are not finite and falling")
        milliseconds = 1000 * events[-1]["train_time"] / events[-1]["step"]
        (peak,) = (line for line in newest.with_suffix(".txt").read_text().splitlines() if line.startswith("peak mem"))
        found = {"losses": losses, "ms_per_step": milliseconds, "peak": peak}
        return found, f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {milliseconds:.1f} ms/step, {peak}"

    def sibling(self, run: Callable[..., str]) -> tuple[dict, str]:
        found = json.loads(
            run(__file__, "--inside", "sibling", "--device", self.device, "--out", self.out).splitlines()[-1]
        )
        if not found["difference"] < BOUND:
            raise ValueError(f"a loss differs by {found['difference']:.4f} from float32 on a CPU, more than {BOUND}")
        return found, f"losses within {found['difference']:.4f} of float32 on a CPU (bound {BOUND})"

    def step(self, run: Callable[..., str]) -> tuple[dict, str]:
        path = self.out / "step.json"
        tiny = ["--device", "cpu", "--tokens", 64, "--rows", 1, "--repeats", 1] if self.device == "cpu" else []
        run("tests/benchmarks/step.py", "--json", path, "--repeats", 5, *tiny)
        found = json.loads(path.read_text())
        stages = ", ".join(f"{stage['ms_step']:.0f} ms ({stage['utilisation']:.0%})" for stage in found["steps"])
        return found, f"steps of 8 rows by stage: {stages}"

    def tests(self, run: Callable[..., str]) -> tuple[dict, str]:
        words = ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "cuda", "-q", "--durations", 5]
        last = run(*words, "tests/test_cuda.py", "tests/test_kernels.py").splitlines()[-1]
        return {"summary": last}, last

    def attention(self, run: Callable[..., str]) -> tuple[dict, str]:
        if self.device == "cpu":
            return {}, "nothing to time without a GPU"
        found = json.loads(run(__file__, "--inside", "attention").splitlines()[-1])
        return found, "; ".join(f"{name} {value}" for name, value in found.items())

    def profile(self, run: Callable[..., str]) -> tuple[dict, str]:
        tiny = ["--device", "cpu", "--tokens", 64, "--rows", 1] if self.device == "cpu" else []
        text = run("tests/benchmarks/profile.py", "--rows", 2, "--trace", self.out / "trace.json", *tiny)
        return {}, next(line for line in reversed(text.splitlines()) if line.startswith(("Self", "trace")))


# ---- in processes of their own ----


def sibling_losses(device: str, dtype: str, out: Path) -> list[float]:
    """60 training losses of a sibling of `small` with every technique, on bytes that are the same everywhere."""
    from conftest import text_like, write_shard, write_token_bytes

    from sibling import scaled
    from train_gpt import SMALL, Options, Runtime, Trainer

    folder = out / "sibling"
    write_shard(folder / "x_train_000001.bin", text_like(1_500_000, seed=1, longest=900))
    write_shard(folder / "x_val_000000.bin", text_like(5_000, seed=9, longest=900))
    write_token_bytes(folder)
    track = scaled(SMALL, Fraction(1, 3), Fraction(1, 2))
    shorter = lambda stage: replace(stage, tokens=stage.tokens // 64)
    stages, extension = tuple(map(shorter, SMALL.schedule.stages)), shorter(SMALL.schedule.extension)
    schedule = replace(track.schedule, stages=stages, extension=extension, scheduled_steps=57, extension_steps=3)
    data = replace(track.data, bos=256, val_tokens=4096, val_row_tokens=4096)
    track = replace(track, model=replace(track.model, vocab_size=257), schedule=schedule, data=data)
    trainer = Trainer(track, Runtime.create(Options(device=device, dtype=dtype)), folder, seed=0)
    trainer.find_prefixes()
    return [float(trainer.train_step(step).detach()) for step in range(60)]


def compare_losses(losses: list[float]) -> dict:
    expected = json.loads(LOSSES.read_text())
    return {"losses": losses, "difference": max(abs(a - b) for a, b in zip(losses, expected, strict=True))}


def attention_call(row, pairs: int, window: int) -> Callable[[], object]:
    """Forward and backward pass of a layer of `small`; pairs = 2 where its heads are paired."""
    import torch

    from train_gpt import SMALL, attention

    shape = (pairs * len(row.inputs), SMALL.model.num_heads // pairs, SMALL.model.head_dim)
    *inputs, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves, starts, longest = [x.requires_grad_() for x in inputs], pairs * row.cu_seqlens, pairs * row.max_seqlen
    return lambda: torch.autograd.grad(attention(*leaves, starts, longest, 0.1, window), leaves, grad)


def time_attention() -> dict[str, str]:
    """Milliseconds of forward and backward pass by backend, for a short and a long layer and for paired heads."""
    from tests.benchmarks.step import compare, synthetic_row
    from train_gpt import SMALL, Options, Runtime, SpeedrunError

    settings, found = SMALL.at(1200), {}
    for backend in ("FA2", "FA3", "FA4"):
        try:
            runtime = Runtime.create(Options(device="cuda", attention=backend))
        except SpeedrunError as error:
            found[backend] = str(error)[:150]
            continue
        row = synthetic_row(SMALL, settings.stage.tokens // 8, settings.stage.max_doc_len, runtime, seed=0)
        calls = {
            "short": attention_call(row, 1, settings.windows[0]),
            "long": attention_call(row, 1, settings.windows[1]),
            "paired": attention_call(row, 2, settings.windows[0]),
        }
        seconds = compare(calls, runtime.device, repeats=10)
        found[backend] = ", ".join(f"{name} {1000 * value:.3f} ms" for name, value in seconds.items())
    return found


if __name__ == "__main__":
    main()
