"""A training step of `small`, stage by stage, and each kernel against its plain twin and against torch's own.

    python tests/benchmarks/step.py [--json FILE] [--only step|kernels] [options]
    python tests/benchmarks/step.py --device cpu --tokens 512 --rows 2 --repeats 3     # whether it works, not how fast

One process, synthetic rows with documents of log-normal length (median 400 tokens). ms/step is for 8 rows and the
optimizer, as one GPU trains `small`. Utilisation: the model's FLOPs (6 per matmul parameter and token, 12 per head
dim, key in the window and query) over the time, divided by the bf16 matmul rate measured in the same run. Variants are
timed in turn, A B A B; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # instead of this folder, whose profile.py would stand in for Python's own

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import GPT, SMALL, Optimizer, Options, Row, Runtime, Settings, Track, make_row  # noqa: E402


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call, the device's work included."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def compare(variants: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each variant, timed in turn after two calls of each that are not counted."""
    for work in variants.values():
        work()
        work()
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, work in variants.items():
            times[name].append(seconds(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(runtime: Runtime, repeats: int) -> float:
    """FLOP/s of a large matrix product in the dtype of the run."""
    n = 8192 if runtime.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for _ in range(2))
    return 2 * n**3 / compare({"": lambda: a @ b}, runtime.device, repeats)[""]


def synthetic_row(track: Track, tokens: int, max_doc_len: int, runtime: Runtime, seed: int) -> Row:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(np.log(400), 1.1, tokens).astype(np.int64) + 1, max_doc_len)
    starts = np.cumsum(lengths) - lengths
    starts = starts[starts < tokens]
    body = rng.integers(0, track.data.bos, tokens + 1)
    body[starts] = track.data.bos
    return make_row(body, starts, min(max_doc_len, tokens), track.model).to(runtime)


def loss_weights(settings: Settings, runtime: Runtime) -> list[torch.Tensor | None]:
    """What the model takes of them: the weights of the predictions, and that of the prefix or None."""
    prefix_weight = (settings.prefix_weight,) if settings.prefix_weight > 0 else None
    return [some and torch.tensor(some, device=runtime.device) for some in (settings.prediction_weights, prefix_weight)]


def row_flops(track: Track, row: Row, settings: Settings) -> float:
    """Of the forward and backward pass of one row, without what is computed twice."""
    c, T = track.model, len(row.inputs)
    matrices = 4 * c.width**2 * sum(layer.attention is not None for layer in c.layers)
    matrices += 2 * c.mlp_ratio * c.width**2 * c.num_layers + c.width * c.padded_vocab
    matrices += sum(c.network_width * (c.width + sum(o.width for o in n.outputs)) for n in c.networks if n.reads)
    starts = row.cu_seqlens.cpu().numpy()
    position = np.arange(T) - starts[np.searchsorted(starts, np.arange(T), side="right") - 1]
    attended = 0
    for i, layer in enumerate(c.layers):
        if layer.attention is not None:
            if i in c.dc_layers:
                attended += np.minimum(position + 1, c.dc_window).sum()
            window = settings.windows[layer.long]
            if layer.paired:  # 2T positions of half the heads
                pairs = np.concatenate((2 * position, 2 * position + 1))
                attended += (np.minimum(pairs, window) + 1).sum() / 2
            else:
                attended += (np.minimum(position, window) + 1).sum()
    return 6.0 * matrices * T + 12.0 * c.width * attended


def time_steps(track: Track, options: argparse.Namespace, runtime: Runtime) -> list[dict]:
    """One result per stage and for the extension."""
    torch.manual_seed(0)
    model = GPT(track.model, runtime)
    model.prefix.copy_(torch.arange(len(model.prefix)) // 10)  # any: a prefix costs the same
    params = dict(model.named_parameters())
    optimizer = Optimizer(params, track.optimizer, runtime)
    rate = matmul_rate(runtime, options.repeats)
    print(f"matmul rate {rate / 1e12:.3g} TFLOP/s in {runtime.dtype}")
    print("   step  tokens/step  ms/row  optimizer ms  of step  ms/step   tokens/s  utilisation  peak GiB  warm-up s")
    results = []
    for start in (steps.start for _, steps in track.schedule.parts()):
        step = start + 1 - start % 2  # odd: Adam steps too
        settings = track.at(step)
        tokens = options.tokens or settings.stage.tokens // track.data.rows_per_step
        rows = [synthetic_row(track, tokens, settings.stage.max_doc_len, runtime, seed) for seed in range(options.rows)]
        weights = loss_weights(settings, runtime)

        def train(rows=rows, settings=settings, weights=weights) -> None:
            weights8 = model.in_fp8()
            for row in rows:
                (model(row, settings, *weights, weights8)[0] / track.data.rows_per_step).backward()
            model.hand_over_gradients()

        began = time.perf_counter()
        train()
        optimizer.step(settings)
        runtime.synchronize()
        warm_up = time.perf_counter() - began
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row_times, optimizer_times = [], []
        for _ in range(options.repeats):
            row_times.append(seconds(train, runtime.device) / len(rows))
            optimizer_times.append(seconds(lambda settings=settings: optimizer.step(settings), runtime.device))
        row_time, optimizer_time = statistics.median(row_times), statistics.median(optimizer_times)
        step_time = track.data.rows_per_step * row_time + optimizer_time
        flops = statistics.mean(row_flops(track, row, settings) for row in rows)
        memory = torch.cuda.max_memory_allocated() if runtime.device.type == "cuda" else 0
        result = {
            "step": start,
            "tokens": tokens * track.data.rows_per_step,
            "ms_row": 1000 * row_time,
            "ms_optimizer": 1000 * optimizer_time,
            "ms_step": 1000 * step_time,
            "tokens_per_second": tokens * track.data.rows_per_step / step_time,
            "flops_row": flops,
            "utilisation": flops * track.data.rows_per_step / step_time / rate,
            "matmul_flops_per_second": rate,
            "peak_bytes": memory,
            "warm_up_seconds": warm_up,
        }
        results.append(result)
        print(
            f"{start:7d} {result['tokens']:12,} {result['ms_row']:7.2f} {result['ms_optimizer']:13.2f} "
            f"{optimizer_time / step_time:8.1%} {result['ms_step']:8.1f} {result['tokens_per_second']:10,.0f} "
            f"{result['utilisation']:12.1%} {memory / 2**30:9.1f} {warm_up:10.1f}"
        )
    return results


def time_kernels(track: Track, options: argparse.Namespace, runtime: Runtime) -> list[dict]:
    """Each kernel, its plain twin (compiled where the run compiles), and torch's product alone."""
    device, dtype, fused = runtime.device, runtime.dtype, runtime.fused
    optional = (lambda f: torch.compile(f, dynamic=False, fullgraph=True)) if runtime.compile else lambda f: f
    random = lambda *shape, scale=1.0: torch.randn(shape, device=device, dtype=dtype) * scale
    d, hidden, V = track.model.width, track.model.mlp_ratio * track.model.width, track.model.padded_vocab
    T = options.tokens or track.schedule.stages[-1].tokens // track.data.rows_per_step
    results = []

    def report(name: str, variants: dict[str, Callable[[], object]]) -> None:
        median = compare(variants, device, options.repeats)
        ours, *others = median
        ratios = {other: median[other] / median[ours] for other in others}
        results.append({"kernel": name, "seconds": median, "speed-up": ratios})
        times = ", ".join(f"{variant} {1000 * value:.3f} ms" for variant, value in median.items())
        print(f"{name:45} {times}   " + ", ".join(f"{ratio:.2f}x {other}" for other, ratio in ratios.items()))

    layers, heads = len(track.model.attention_layers), track.model.qk_heads
    qk = 2 * track.model.num_heads // heads * layers, heads * track.model.head_dim, d
    for n, r, c in (qk, (2 * layers, d, d), (2 * track.model.num_layers, d, hidden), (4, hidden, d)):
        X, A = random(n, r, c), random(n, r, r)
        ours = {"kernel": lambda X=X: train_gpt.symmetric_product(X, fused=True)} if fused else {}
        report(f"X X^T ({n}, {r}, {c})", ours | {"torch": lambda X=X: X @ X.mT})
        ours = {"kernel": lambda A=A: torch.ops.speedrun.quadratic(A, 0.0, -2.0, 0.5)} if fused else {}
        report(f"bA + cA^2 ({n}, {r}, {r})", ours | {"torch": lambda A=A: torch.baddbmm(A, A, A, beta=-2.0, alpha=0.5)})
    G = random(22, hidden, d)
    ours = {"kernels": optional(lambda: train_gpt.polar_express(G, fused=True))} if fused else {}
    report("Polar Express of the MLP bank", ours | {"plain": optional(lambda: train_gpt.polar_express(G))})

    leaves = [x.requires_grad_() for x in (random(T, d), random(hidden, d, scale=d**-0.5), random(hidden, d))]
    grad = random(T, d)

    def mlp(fused: bool) -> Callable[[], object]:
        forward = optional(lambda h, fc, proj: train_gpt.relu_squared_mlp(h, fc, proj, fused))
        return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)

    report(f"MLP, forward and backward, {T} tokens", ({"kernel": mlp(True)} if fused else {}) | {"plain": mlp(False)})

    chunk = replace(runtime, max_loss_chunk=options.loss_chunk).loss_chunk(T, V)
    logits, targets, weights = random(chunk, V), torch.randint(0, V, (2, chunk), device=device), torch.ones(2)
    weights, out = weights.to(device), torch.empty_like(logits)
    ours = {"kernel": lambda: train_gpt.fused_cross_entropy(logits, targets, weights, out)} if fused else {}
    plain = optional(
        lambda *args: [x.to(dtype) if x.dim() == 2 else x for x in train_gpt.softcapped_cross_entropy(*args)]
    )
    report(f"loss and gradient of {chunk} x {V} logits", ours | {"plain": lambda: plain(logits, targets, weights)})

    x, head = random(T, d).requires_grad_(), random(d, V, scale=0.02).requires_grad_()
    targets = torch.randint(0, 9000, (2, T), device=device)  # some tokens, as rows of text have
    is_target = np.isin(np.arange(V), targets.cpu())
    sample = [part.to(device) for part in train_gpt.sample_vocab(is_target, 16384, seed=0, step=0, row=0)]

    def head_loss(fused: bool, fp8: bool, sample: Iterable[torch.Tensor] = ()) -> Callable[[], object]:
        head8 = train_gpt.fp8_and_transpose(head.detach(), train_gpt.FP8_HEAD, fused) if fp8 else (None, None)
        op = lambda: torch.ops.speedrun.head_loss(x, head, targets, weights, chunk, True, fused, *head8, *sample)[0]
        return lambda: torch.autograd.grad(op(), (x, head))

    variants = {"FP8": head_loss(fused, True)} if runtime.fp8 else {}
    variants[str(dtype).removeprefix("torch.")] = head_loss(fused, False)
    variants["a sample of 16,384"] = head_loss(fused, runtime.fp8, sample)
    report(f"head and loss, {T} tokens", variants)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Times training steps and kernels of `small`.")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--only", choices=("step", "kernels"))
    parser.add_argument("--rows", type=int, default=8, help="rows that are timed; a step is reckoned with 8")
    parser.add_argument("--tokens", type=int, help="tokens of a row (default: those of each stage)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--attention", default="auto", choices=("auto", "FA2", "FA3", "FA4"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "triton", "plain"))
    parser.add_argument("--fp8", nargs="*", choices=("head", "mlp", "attention"))
    parser.add_argument("--loss-chunk", type=int)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = ("device", "attention", "kernels", "fp8", "loss_chunk")
    compile = not options.no_compile and torch.cuda.is_available()
    runtime = Runtime.create(Options(**{name: getattr(options, name) for name in names}, compile=compile))
    print(runtime.describe())
    results: dict[str, object] = {
        "runtime": runtime.describe(),
        "options": {k: str(v) for k, v in vars(options).items()},
    }
    if options.only != "step":
        results["kernels"] = time_kernels(SMALL, options, runtime)
    if options.only != "kernels":
        results["steps"] = time_steps(SMALL, options, runtime)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
