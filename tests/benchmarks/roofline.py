"""What a training step should take on a GPU, kernel by kernel, from the FLOPs and bytes of each: no GPU needed.

    python tests/benchmarks/roofline.py small [--gpu H100] [--work FOLDER] [--top 30] [options of train_gpt.py]
    python tests/benchmarks/roofline.py small --trainer ../before/train_gpt.py     # of another version

The null device (tests/null_gpu) runs two steps of every stage, compiled for the GPU that is named, and traces each
launch. A kernel takes as long as its FLOPs or its bytes at the rates below, whichever is longer; bytes are those of its
operands, each moved once. Attention counts whole tiles of the documents that the rows have. A model and no measurement:
it knows no latencies, no bad layouts and no overlap. The first tables are of one stage, that which takes the most time
unless --stage says another, mean of an odd and an even step, all rows of a step on one GPU. With 8 GPUs each has an
eighth of the rows; its sums, updates and gathers come after the backward pass, as a timeline at 450 GB/s shows.

Rates are fractions of the data sheets': for an H100 800 TFLOP/s in bfloat16, 1,500 in FP8, 3.0 TB/s. Attention gets
half the rate of bfloat16, roughly what FlashAttention-2 reaches on Hopper (--attention-rate).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(REPO), str(REPO / "tests/null_gpu")]  # instead of this folder, which has a profile.py

import numpy as np  # noqa: E402
import run as null  # noqa: E402
import torch  # noqa: E402

from train_gpt import GPT, Loader, ModelConfig, Optimizer, Runtime, Settings, SpeedrunError, Track, parse_command  # noqa: E402


@dataclass(frozen=True)
class GPU:
    arch: int  # compute capability
    memory: int  # bytes
    bf16: float  # FLOP/s, dense, of the data sheet
    fp8: float
    bandwidth: float  # bytes/s

    def seconds(self, kernel: Kernel, attention_rate: float) -> float:
        peak = {"bf16": self.bf16, "fp8": self.fp8, "attention": self.bf16 * attention_rate}[kernel.rate]
        fraction = 1500 / 1979 if kernel.rate == "fp8" else 800 / 989
        return max(kernel.flops / (fraction * peak), kernel.bytes / (3.0 / 3.35 * self.bandwidth))


GPUS = {
    "H100": GPU(90, 85_029_158_912, 989e12, 1979e12, 3.35e12),
    "H200": GPU(90, 150_000_000_000, 989e12, 1979e12, 4.8e12),
    "A100": GPU(80, 85_000_000_000, 312e12, 312e12, 2.04e12),
    "4090": GPU(89, 25_700_000_000, 165e12, 330e12, 1.01e12),
    "5090": GPU(120, 34_000_000_000, 209e12, 419e12, 1.79e12),
}
LINK = 450e9  # bytes/s between GPUs
ATTENTION = {"flash_fwd_kernel": "forward", "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "backward"}
TYPE_BYTES = {"0": 4, "2": 2, "14": 2, "28": 1, "29": 1}  # cudaDataType: float, half, bfloat16, FP8 e4m3 and e5m2


@dataclass
class Kernel:
    """All launches of a kernel in some part of a step."""

    part: str
    name: str
    rate: str = "bf16"
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Reader:
    """Sorts the launches of one step of the trace into kernels."""

    model: ModelConfig
    attention: dict[str, float]  # FLOPs of a step, forward and backward
    kernels: dict[tuple[str, str], Kernel] = field(default_factory=dict)

    def read(self, lines: list[list[str]]) -> dict[tuple[str, str], Kernel]:
        phase, head, given = "rest", False, ["0"]
        for line in lines:
            if line[0] == "mark":
                verb, *words = line[1].split()
                given = words if verb == "launch" else given
                if verb == "begin" and words[0] in ("forward", "backward", "optimizer"):
                    phase, head = words[0], False
                elif verb == "end" and words[0] in ("forward", "backward"):
                    phase, head = "rest", False
                continue
            # The loss is computed, with its gradients, at the end of the forward pass; see `_head_loss_op`.
            head |= phase == "forward" and (self._of_head(line) or "cast_transposed" in line[1] or "loat8" in line[1])
            self._add(line, phase, head, given)
        for (_, name), kernel in self.kernels.items():
            if name in ATTENTION:
                kernel.flops, kernel.rate = self.attention[ATTENTION[name]], "attention"
        return self.kernels

    def _of_head(self, line: list[str]) -> bool:
        return line[0] == "gemm" and str(self.model.padded_vocab) in line[3].split(",")

    def _add(self, line: list[str], phase: str, head: bool, given: list[str]) -> None:
        kind, name, flops, moved, rate = line[0], line[1], 0.0, 0.0, "bf16"
        part = "head" if head else "optimizer" if phase == "optimizer" else f"elementwise, {phase}"
        if kind == "gemm":
            m, n, k = map(int, line[3].split(","))
            batch, types = int(line[4]), line[5].split(",")
            a, b, d = (TYPE_BYTES[t] for t in types)
            flops, moved = 2.0 * batch * m * n * k, batch * (m * k * a + n * k * b + m * n * d)
            rate = "fp8" if a == 1 else "bf16"
            name = f"matmul {line[3]}{f' x {batch}' if batch > 1 else ''}{' FP8' if rate == 'fp8' else ''}"
            part = part if head or phase == "optimizer" else self._part_of_product(m, n, k, batch)
        elif kind == "triton":
            moved = float(given[0])
            if name.startswith("_"):
                shapes = [list(map(int, re.findall(r"\d+", shape.partition("/")[0]))) for shape in given[1:]]
                if name == "_linear_relu_square":
                    flops, part = 2.0 * shapes[0][0] * shapes[0][1] * shapes[1][0], "MLP"
                    if given[1].endswith("/1"):
                        name, rate = f"{name} FP8", "fp8"
                elif name == "_symmetric":
                    n, r, c = shapes[0]
                    flops = 1.0 * n * r * r * c  # the tiles on and below the diagonal
        elif kind == "kernel":
            name = short_name(name)
            part = "attention" if "flash" in name else part
            moved = null.elementwise_bytes(line)
        elif kind in ("memcpy", "memset"):
            if name in ("HtoD", "DtoH") or "pageable" in name:
                return  # beside the kernels
            moved = int(line[2]) * (2 if kind == "memcpy" else 1)
        else:
            return
        part = "attention" if name.startswith("_composed_heads") else part
        kernel = self.kernels.setdefault((part, name), Kernel(part, name))
        kernel.launches += 1
        kernel.flops += flops
        kernel.bytes += moved
        kernel.rate = rate

    def _part_of_product(self, m: int, n: int, k: int, batch: int) -> str:
        c, sizes = self.model, {m, n, k}
        if batch > 1:
            return "attention"  # that of the composed heads
        if c.mlp_ratio * c.width in sizes:
            return "MLP"
        narrow = min(sizes) < c.width
        return "networks and gates" if narrow else "attention's projections"


def short_name(name: str) -> str:
    """Of a kernel of a library, from its mangled name."""
    words = re.findall(
        r"flash_\w+?_kernel(?=I|$)|FillFunctor\w|CUDAFunctor_add\w|MulFunctor|float8_copy|bfloat16_copy|clamp_scalar|"
        r"ConvertToFloat8\w{4}|sum_functor|index_put|sort|scan|reduce_kernel",
        name,
    )
    return " ".join(dict.fromkeys(words)) or name[:60]


def tiles_seen(lengths: np.ndarray, window: int, rows: int = 128, cols: int = 64) -> int:
    """Pairs of query and key in the tiles that attention visits in documents of these lengths, `window` tokens back."""
    total = 0
    for length in lengths.tolist():
        begin = np.arange(0, length, rows)
        first = np.maximum(begin - window, 0) // cols
        last = -(-np.minimum(begin + rows, length) // cols)
        total += int((last - first).sum()) * rows * cols
    return total


def attention_flops(track: Track, settings: Settings, rows: list) -> dict[str, float]:
    """Of all rows of a step: two products forward, five backward."""
    c, pairs = track.model, 0
    for row in rows:
        lengths = np.diff(row.cu_seqlens.numpy())
        for layer in c.layers:
            if layer.attention is not None:
                group = 2 if layer.paired else 1
                pairs += tiles_seen(group * lengths[lengths > 0], settings.windows[layer.long]) * c.num_heads // group
    return {"forward": 4.0 * pairs * c.head_dim, "backward": 10.0 * pairs * c.head_dim}


def steps_of(track: Track) -> list[tuple[int, int]]:
    """First step of each stage of the shortened run, and how many steps the stage has in the whole one."""
    return [(2 * i, len(steps)) for i, (_, steps) in enumerate(track.schedule.parts())]


def shortened(track: Track) -> list[str]:
    """Options: every stage with two steps, an even and an odd one, no validation between."""
    steps = str(2 * len(track.schedule.stages))
    words = ["--schedule.scheduled-steps", steps, "--schedule.extension-steps", "2", "--val-every", "0"]
    return [*words, "--sample-tokens", "0"]


def two_steps(case: null.Case, track: Track, first: int, rows: dict[int, list]) -> list[list[Kernel]]:
    """Kernels of an even and of an odd step."""
    traced, found = null.timed(case.trace(0)), []
    for step in (first, first + 1):
        reader = Reader(track.model, attention_flops(track, track.at(step), rows[step]))
        found.append(list(reader.read(traced[f"step {step}"]).values()))
    return found


def mean(steps: list[list[Kernel]]) -> list[Kernel]:
    """Kernels of the mean step."""
    total: dict[tuple[str, str], Kernel] = {}
    for kernel in (kernel for step in steps for kernel in step):
        found = total.setdefault((kernel.part, kernel.name), Kernel(kernel.part, kernel.name, kernel.rate))
        found.launches += kernel.launches / len(steps)
        found.flops += kernel.flops / len(steps)
        found.bytes += kernel.bytes / len(steps)
    return list(total.values())


@dataclass
class Parameter:
    """What one of 8 GPUs does about a parameter after the backward pass. Seconds."""

    name: str
    sum: float  # of gradients over the GPUs
    update: float
    gather: float  # of weights


def parameters(track: Track, step: int, update: float) -> list[Parameter]:
    """In the optimizer's order. `update`: seconds that the updates of the step take on one GPU."""
    settings, found = track.at(step), []
    runtime = Runtime(torch.device("meta"), dtype=torch.bfloat16)
    with torch.device("meta"):
        params = dict(GPT(track.model, runtime).named_parameters())
        optimizer = Optimizer(params, track.optimizer, runtime)
    updates = optimizer._updates(settings)
    whole = sum(params[name].numel() for name in updates)
    for name in updates:
        p, sharded = params[name], optimizer.rules[name].sharded
        size = p.numel() * p.element_size()
        rows = settings.stage.tokens * len(track.model.ngrams)  # of n-grams touched at most; only these travel
        summed = min(size, rows * track.model.width * p.element_size()) if name == "ngram_embed" else size
        once = 7 / 8 / LINK  # ring or switch: each GPU sends 7/8 of it
        took = update * p.numel() / whole / (8 if sharded else 1)
        found.append(Parameter(name, summed * once * (1 if sharded else 2), took, size * once * sharded))
    return found


def timeline(some: list[Parameter]) -> tuple[list[tuple[str, float, float, float]], float]:
    """When, in seconds after the backward pass, each sum, update and gather ends, and the last of all.

    The link does one thing at a time: all sums, then each gather whose update is done; the optimizer's step enqueues
    them in this order. Updates run beside it, one by one.
    """
    link = updates = 0.0
    summed, found = [], []
    for each in some:
        link += each.sum
        summed.append(link)
    for each, ready in zip(some, summed, strict=True):
        updates = max(updates, ready) + each.update
        link = max(link, updates) + each.gather
        found.append((each.name, ready, updates, link))
    return found, max(link, updates)


def summary(kernels: list[Kernel], gpu: GPU, rate: float, rows: int, top: int) -> Iterator[str]:
    """Tables of a step: its parts, its longest kernels."""
    seconds = {id(kernel): gpu.seconds(kernel, rate) for kernel in kernels}
    whole = sum(seconds.values())
    parts: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        parts[kernel.part].append(kernel)
    line = "{:28} {:>9} {:>10} {:>9} {:>9} {:>6}".format
    yield line("part", "launches", "TFLOP", "GB", "ms", "share")
    time_of = lambda some: sum(seconds[id(kernel)] for kernel in some)
    numbers = lambda some: [sum(getattr(k, what) for k in some) for what in ("launches", "flops", "bytes")]
    for name, some in sorted(parts.items(), key=lambda item: -time_of(item[1])):
        launches, flops, moved = numbers(some)
        ms = 1000 * time_of(some)
        yield line(
            name,
            f"{launches:,.0f}",
            f"{flops / 1e12:,.2f}",
            f"{moved / 1e9:,.1f}",
            f"{ms:.2f}",
            f"{ms / 10 / whole:.0f}%",
        )
    yield ""
    yield line("kernel", "launches", "TFLOP", "GB", "ms", "limit")
    for kernel in sorted(kernels, key=lambda kernel: -seconds[id(kernel)])[:top]:
        limit = "FLOPs" if seconds[id(kernel)] > gpu.seconds(replace(kernel, flops=0.0), rate) else "bytes"
        name = kernel.name if len(kernel.name) <= 60 else kernel.name[:59] + "…"
        cells = f"{kernel.flops / 1e12:,.2f}", f"{kernel.bytes / 1e9:,.2f}", f"{1000 * seconds[id(kernel)]:.2f}", limit
        yield "{:62}{:>8} {:>9} {:>9} {:>9} {:>6}".format(name, f"{kernel.launches:,.0f}", *cells)
    model = [kernel for kernel in kernels if kernel.part != "optimizer"]
    light = [kernel for kernel in model if not kernel.flops]
    yield ""
    yield (
        f"per row, forward and backward: {sum(k.launches for k in model) / rows:,.0f} launches, "
        f"{sum(k.bytes for k in light) / rows / 1e9:.1f} GB in kernels without matrix products"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=("small", "medium", "xl"))
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--stage", type=int, metavar="N", help="of the first table, counted from 1")
    parser.add_argument("--attention-rate", type=float, default=0.5, metavar="X", help="times that of bfloat16")
    parser.add_argument("--top", type=int, default=30, metavar="N", help="kernels of the second table")
    parser.add_argument("--trainer", type=Path, default=null.TRAINER, help="another train_gpt.py of this layout")
    parser.add_argument("--work", type=Path, help="folder for the trace and compiled kernels; default: a temporary one")
    options, more = parser.parse_known_args()
    if lack := null.missing():
        sys.exit(f"the null device needs {lack}")
    track, _ = parse_command([options.track, *more])
    short, _ = parse_command([options.track, *more, *shortened(track)])
    gpu = GPUS[options.gpu]
    os.environ["NULLCUDA_MEMORY"] = str(gpu.memory)
    with tempfile.TemporaryDirectory(prefix="roofline.") as temporary:
        work = (options.work or Path(temporary)).resolve()
        null.CASES["roofline"] = gpu.arch, 1, [options.track, *more, *shortened(track)]
        case = null.Case("roofline", work, f"roofline_{gpu.arch}").run(options.trainer.resolve())
        if case.codes != [0]:
            sys.exit("\n".join(case.problems()))
        loader = Loader(short, work / "data", Runtime(torch.device("cpu")))
        rows = {step: loader.next(step) for step in range(short.schedule.total_steps)}
        stages = [(two_steps(case, short, first, rows), steps) for first, steps in steps_of(track)]
        peak = max(case.results(0)["peak"].values())
    report(track, stages, gpu, options, peak)


def report(track: Track, stages: list[tuple[list[list[Kernel]], int]], gpu: GPU, options, peak: int) -> None:
    """Print all of it: the longest stage, then every stage for 1 and for 8 GPUs."""
    rate, num_rows = options.attention_rate, track.data.rows_per_step
    time_of = lambda kernels: sum(gpu.seconds(kernel, rate) for kernel in kernels)
    updates = lambda kernels: time_of(kernel for kernel in kernels if kernel.part == "optimizer")
    weight = [steps * time_of(mean(both)) for both, steps in stages]
    chosen = options.stage - 1 if options.stage else weight.index(max(weight))
    print(f"{track.name}, stage {chosen + 1} of {len(stages)}, {num_rows} rows on one {options.gpu}: a prediction\n")
    print("\n".join(summary(mean(stages[chosen][0]), gpu, rate, num_rows, options.top)))
    print(f"peak memory, in any stage: {peak:,} MiB\n")
    total = [0.0, 0.0]
    for i, ((both, steps), (_, numbers)) in enumerate(zip(stages, track.schedule.parts(), strict=True)):
        one, update, rest = time_of(mean(both)), updates(mean(both)), 0.0
        for odd, kernels in enumerate(both):
            some = parameters(track, numbers.start + (numbers.start + odd) % 2, updates(kernels))
            rows, end = timeline(some)
            rest += end / 2
            if odd and i == chosen:
                print("8 GPUs, odd step, largest parameters: ms after the backward pass when sum, update, gather end")
                for each, (name, *ends) in zip(some, rows, strict=True):
                    if each.sum > 1e-5:
                        print("  {:24}{:8.2f}{:8.2f}{:8.2f}".format(name, *(1000 * x for x in ends)))
                print()
        eight = (one - update) / 8 + rest
        total = [total[0] + steps * one, total[1] + steps * eight]
        print(
            f"stage {i + 1}: {steps:,} steps, {1000 * one:.1f} ms each on 1 GPU, {1000 * eight:.1f} on 8, of which "
            f"{1000 * rest:.1f} after the backward pass ({1000 * update / 8:.1f} of them updates)"
        )
    print(f"whole run: {total[0]:.0f} s on one {options.gpu}, {total[1]:.1f} s on eight if nothing else takes time")
    print(f"total {1000 * time_of(mean(stages[chosen][0])):.1f} ms")


if __name__ == "__main__":
    try:
        main()
    except SpeedrunError as error:
        sys.exit(f"error: {error}")
