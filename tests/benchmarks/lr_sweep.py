"""Does the best learning rate stay where it is when a track is scaled? Trains siblings of `nano`.

    python tests/benchmarks/lr_sweep.py [--widths 0.5 1 2] [--factors 0.25 0.5 1 2 4] [--seeds 2] [--jobs 2]

Every width is trained with all learning rates (those of Adam and of Muon) multiplied by each factor, on the shards that
are held out for tuning. Prints the losses and, per width, the factor at the bottom of a parabola through the best one
and its neighbours, in the logarithm of the factor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

REPO = Path(__file__).resolve().parents[2]
sys.path[0:1] = [str(REPO), str(REPO / "records")]  # instead of this folder, whose profile.py would hide Python's own
import train_gpt  # noqa: E402
from ablate import launch  # noqa: E402

COMMON = ("--data-dir", str(REPO / "data" / "nano_tuning"), "--data.val-tokens", "131072", "--sample-tokens", "0")


def loss_of(width: float, factor: float, seed: int, steps: int, jobs: int) -> float:
    """Final validation loss of one run. Raises RuntimeError where it fails, infinity where it diverges."""
    config = train_gpt.NANO.optimizer
    words = ["--width", str(width), "--schedule.scheduled-steps", str(steps), "--seed", str(seed)]
    words += ["--optimizer.adam-lr", str(config.adam_lr * factor), "--optimizer.muon-lr", str(config.muon_lr * factor)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            return launch("nano", [*COMMON, *words], Path(folder), jobs, "evals/sibling.py").final.val_loss
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            return math.inf


def bottom(factors: list[float], losses: list[float]) -> float | None:
    """Where the parabola through the least loss and its neighbours has its bottom; None where that is at an end."""
    best = min(range(len(losses)), key=losses.__getitem__)
    if best in (0, len(losses) - 1) or not math.isfinite(losses[best - 1] + losses[best + 1]):
        return None
    x, y = ([math.log2(f) for f in factors[best - 1 : best + 2]], losses[best - 1 : best + 2])
    slopes = [(y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])]
    middles = [(x[0] + x[1]) / 2, (x[1] + x[2]) / 2]
    return 2 ** (middles[0] - slopes[0] * (middles[1] - middles[0]) / (slopes[1] - slopes[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.5, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4], help="in rising order")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--steps", type=int, default=90, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    options = parser.parse_args()
    subprocess.run([sys.executable, str(REPO / "data" / "nano.py"), "--tuning"], check=True)
    tasks = [(w, f, s) for s in range(options.seeds) for w in options.widths for f in options.factors]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = pool.map(lambda task: loss_of(*task, options.steps, options.jobs), tasks)
        losses = dict(zip(tasks, tqdm(runs, total=len(tasks), unit="run"), strict=True))
    print(f"\n{options.steps} steps, mean of {options.seeds} seeds")
    print("| width | " + " | ".join(f"lr × {f:g}" for f in options.factors) + " | best at |")
    print("| --- " * (len(options.factors) + 2) + "|")
    for width in options.widths:
        means = [statistics.mean(losses[width, f, s] for s in range(options.seeds)) for f in options.factors]
        best = bottom(options.factors, means)
        where = f"× {best:.2f}" if best else "an end"
        print(f"| {width:g} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {where} |")


if __name__ == "__main__":
    main()
