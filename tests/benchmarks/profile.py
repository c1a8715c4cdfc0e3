"""One step of `small` under torch's profiler: the kernels that take the time, and a trace for ui.perfetto.dev.

python tests/benchmarks/profile.py [--step 1200] [--rows 2] [--trace trace.json]
python tests/benchmarks/profile.py --device cpu --tokens 256 --rows 1               # whether it works
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # instead of this folder: torch, too, imports Python's own module of the name `profile`

from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from tests.benchmarks.step import loss_weights, synthetic_row  # noqa: E402
from train_gpt import GPT, SMALL, Optimizer, Options, Runtime  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Profiles one step of `small`.")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--step", type=int, default=1201, help="of the schedule; odd ones update all parameters")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="tokens of a row (default: those of the step)")
    parser.add_argument("--top", type=int, default=30, help="lines of the table")
    parser.add_argument("--trace", type=Path, metavar="FILE")
    args = parser.parse_args()
    runtime = Runtime.create(Options(device=args.device))
    print(runtime.describe())
    cuda = runtime.device.type == "cuda"
    model, settings = GPT(SMALL.model, runtime), SMALL.at(args.step)
    optimizer = Optimizer(dict(model.named_parameters()), SMALL.optimizer, runtime)
    tokens = args.tokens or settings.stage.tokens // SMALL.data.rows_per_step
    rows = [synthetic_row(SMALL, tokens, settings.stage.max_doc_len, runtime, seed) for seed in range(args.rows)]
    weights = loss_weights(settings, runtime)

    def step() -> None:
        weights8 = model.in_fp8()
        for row in rows:
            with record_function("forward"):
                loss = model(row, settings, *weights, weights8)[0] / SMALL.data.rows_per_step
            with record_function("backward"):
                loss.backward()
        with record_function("optimizer"):
            model.hand_over_gradients()
            optimizer.step(settings)
        runtime.synchronize()

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiled:
        step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=args.top, max_name_column_width=80))
    if args.trace:
        profiled.export_chrome_trace(str(args.trace))
        print(f"trace: {args.trace}")


if __name__ == "__main__":
    main()
