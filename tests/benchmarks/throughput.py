"""Throughput of the two things that a run waits for: training steps of `nano` on this CPU, and the loader of `small`.

    python tests/benchmarks/throughput.py [nano|loader|both] [--threads N]
    python tests/benchmarks/throughput.py neighbour [--rows-at-once 1 --threads 2]

nano: ms/step, tokens/s and the model's FLOP/s per stage, medians, beside those of a large matrix product. loader:
seconds to the first batch and tokens/s at the batch of `small`'s last stage, on one core, from freshly written shards
of 100M tokens with FineWeb-like document lengths. neighbour: a tenth of a run of `nano` alone and beside a process that
keeps a core busy, in turn, and the ratio of the medians; with the options, as torch's own threads share a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path[0:1] = [str(REPO), str(REPO / "evals")]  # instead of this folder, whose profile.py would hide Python's own
import train_gpt  # noqa: E402
from plan import flops_per_token  # noqa: E402


def median_seconds(work: Callable[[int], object], times: range) -> float:
    seconds = []
    for i in times:
        began = time.perf_counter()
        work(i)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def time_nano(steps_per_stage: int = 20) -> None:
    """Print the median step of each stage of `nano`, and of one validation pass."""
    track, runtime = train_gpt.NANO, train_gpt.Runtime.create(train_gpt.Options(device="cpu"))
    print(f"nano, {train_gpt.cpu_name()}, {runtime.threads} threads, {runtime.dtype}")
    weighted, matrix = 0.0, torch.rand(2048, 2048, dtype=runtime.dtype)
    peak = 2 * 2048**3 / median_seconds(lambda _: matrix @ matrix, range(9))  # before rows have a thread each
    trainer = train_gpt.Trainer(track, runtime, REPO / "data" / "nano", seed=0)
    trainer.warm_up(track.schedule.total_steps)
    print(f"  matrix product: {peak / 1e9:.0f} GFLOP/s")
    for stage, steps in track.schedule.parts():
        median, tokens = median_seconds(trainer.train_step, steps[:steps_per_stage]), stage.tokens
        flops = tokens * flops_per_token(track, track.at(steps.start)) / median
        weighted += median * len(steps)
        print(
            f"  stage from step {steps.start:5d}: {1000 * median:7.1f} ms/step {tokens / median:10,.0f} tokens/s "
            f"{flops / 1e9:6.1f} GFLOP/s ({flops / peak:.0%})"
        )
    print(f"  whole schedule at these medians: {weighted:.1f} s")
    began = time.perf_counter()
    trainer.validate(track.validation_at(track.schedule.total_steps))
    print(f"  validation: {time.perf_counter() - began:.1f} s for {track.data.val_tokens:,} tokens")


def time_neighbour(rows_at_once: int, turns: int = 7, steps: int = 14) -> None:
    """Print the seconds of so many steps of `nano`, alone and beside one busy process."""
    track, runtime = train_gpt.NANO, train_gpt.Runtime.create(train_gpt.Options(device="cpu"))
    track = replace(track, data=replace(track.data, rows_at_once=rows_at_once))
    trainer = train_gpt.Trainer(track, runtime, REPO / "data" / "nano", seed=0)
    begin, load = track.schedule.total_steps // 2 & ~1, os.getloadavg()[0]
    train = lambda: [trainer.train_step(begin + step) for step in range(steps)]
    train()
    quiet, busy = [], []
    for _ in range(turns):
        quiet.append(median_seconds(lambda _: train(), range(1)))
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            time.sleep(0.2)
            busy.append(median_seconds(lambda _: train(), range(1)))
            neighbour.kill()
    alone, beside = statistics.median(quiet), statistics.median(busy)
    print(f"nano, {steps} steps, {rows_at_once} rows at once, {runtime.threads} threads, load {load:.1f} before:")
    print(f"  alone {alone:.2f} s, beside a busy process {beside:.2f} s: {beside / alone:.2f} times")


def write_shard(path: Path, tokens: int, rng: np.random.Generator) -> None:
    """A shard of random GPT-2 tokens in documents of log-normal length, median 400."""
    header = np.zeros(train_gpt.HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, tokens
    body = rng.integers(0, 50256, tokens, dtype=np.uint16)
    starts = np.cumsum(rng.lognormal(np.log(400), 1.0, tokens // 400).astype(np.int64) + 1)
    body[0], body[starts[starts < tokens]] = 50256, 50256
    with open(path, "wb") as file:
        header.tofile(file)
        body.tofile(file)


def time_loader(num_shards: int = 5, shard_tokens: int = 100_000_000) -> None:
    """Print the time to the first batch and the sustained rate, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    small = train_gpt.SMALL
    last = small.schedule.stages[-1]
    track = replace(small, schedule=replace(small.schedule, stages=(last,), scheduled_steps=100_000))
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(num_shards):
            write_shard(Path(folder) / f"fineweb_train_{i + 1:06d}.bin", shard_tokens, rng)
        began = time.perf_counter()
        loader = train_gpt.Loader(track, Path(folder), train_gpt.Runtime(torch.device("cpu")))
        loader.next(0)
        first = time.perf_counter() - began
        steps = 1
        try:
            while True:
                loader.next(steps)
                steps += 1
        except train_gpt.SpeedrunError:  # the shards have run out
            seconds = time.perf_counter() - began
    rate = steps * last.tokens / seconds
    print(f"loader, one core: first batch after {first:.3f} s, then {rate / 1e6:.0f}M tokens/s ({steps} steps)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["nano", "loader", "both", "neighbour"], default="both")
    parser.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    parser.add_argument("--rows-at-once", type=int, default=train_gpt.NANO.data.rows_at_once, help="of neighbour")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "neighbour":
        time_neighbour(arguments.rows_at_once)
    if arguments.what in ("nano", "both"):
        time_nano()
    if arguments.what in ("loader", "both"):
        time_loader()


if __name__ == "__main__":
    main()
