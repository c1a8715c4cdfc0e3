"""What a track takes: parameters, memory, FLOPs, tokens and time. Needs no GPU; all is planned on tensors without data.

    python evals/plan.py small                                    # also with --width and --depth of evals/sibling.py
    python evals/plan.py medium --data.rows-per-step 16 --tokens-per-second 300000

Memory is that of GPUs with FP8, by their size; `nano`, or any track with --device cpu, is planned for a CPU. All other
words are those of train_gpt.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared import at_least
from sibling import own_parser, parse_own, scaled
from train_gpt import (
    FP8,
    GPT,
    NANO,
    ModelConfig,
    Optimizer,
    Options,
    Row,
    Runtime,
    Settings,
    Track,
    document_capacity,
    main,
    parse_command,
    rotary_tables,
    varlen_attention,
)

GPUS = (24, 40, 80, 141)  # GB
CUDA_ITSELF = 1_500_000_000  # bytes of it, of NCCL's buffers and of what no formula counts
H100 = 989e12  # FLOP/s of bfloat16 matrix products, dense
CPU = 50e9  # FLOP/s that `nano` gets out of two cores of an AMD EPYC with AVX-512


@dataclass(frozen=True)
class Memory:
    """Bytes of one process in a training step."""

    weights: int
    optimizer: int
    """State of Adam and NorMuon, with the lower halves of the weights."""
    gradients: int
    activations: int
    """What the backward pass of one row needs, each operation by itself: torch.compile keeps less."""
    cuda: int
    logits: int
    """Grows with the memory that there is, up to all of a row."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def plan_memory(track: Track, runtime: Runtime) -> Memory:
    """What a training step takes on a runtime, whose device nobody has to have. No tensor has data."""
    meta = replace(runtime, device=torch.device("meta"))
    model = meta_model(track, meta)
    params, sums = (
        dict(model.named_parameters()),
        [total for totals in model.gradient_sums.values() for total in totals],
    )
    with torch.device("meta"):
        state = Optimizer(params, track.optimizer, meta).state
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    longest = max(stage.tokens for stage in (*track.schedule.stages, track.schedule.extension))
    tokens = longest // track.data.rows_per_step
    each = track.model.training_vocab * (4 if runtime.fused else 24)
    return Memory(
        weights=size((*params.values(), *model.buffers())),
        optimizer=size(t for tensors in state.values() for t in tensors.values()),
        gradients=size(params.values()) + size(sums),
        activations=activation_memory(track, runtime, tokens),
        cuda=CUDA_ITSELF if runtime.device.type == "cuda" else 0,
        logits=runtime.loss_chunk(tokens, track.model.training_vocab) * each,
    )


def meta_model(track: Track, runtime: Runtime) -> GPT:
    """Shapes and dtypes of a model whose weights are nowhere."""
    with torch.device("meta"):
        return GPT(track.model, replace(runtime, device=torch.device("meta")))


def activation_memory(track: Track, runtime: Runtime, tokens: int) -> int:
    """Bytes that the forward pass of a row of `tokens` keeps, from two lengths: they grow linearly."""
    settings = track.at(track.schedule.total_steps - 1)
    kind = runtime.device.type == "cuda", runtime.dtype, runtime.fused, runtime.fp8
    short, long = (saved_for_backward(track.model, settings, n, *kind) for n in (4096, 8192))
    return short + (long - short) * (tokens - 4096) // 4096


@functools.cache
def saved_for_backward(
    model: ModelConfig,
    settings: Settings,
    tokens: int,
    cuda: bool,
    dtype: torch.dtype,
    fused: bool,
    fp8: tuple[str, ...],
) -> int:
    """Bytes of the tensors that the forward pass of a row keeps, besides weights: counted on tensors without data."""
    import torch.nn.attention.varlen
    from torch._subclasses.fake_tensor import FakeTensorMode

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        rotary_tables.cache_clear()
        stack.callback(rotary_tables.cache_clear)
        network = GPT(model, Runtime(torch.device("cpu"), dtype=dtype, fused=fused, fp8=fp8))
        if cuda:  # of which a CPU has no fake tensors: its attention keeps the same
            network.attention = varlen_attention
        inputs = torch.zeros(tokens, dtype=torch.int64)
        starts = torch.zeros(document_capacity(tokens), dtype=torch.int32)
        keys = torch.zeros(len(model.ngrams), tokens, dtype=torch.int64)
        sample = (inputs.new_zeros(model.sampled_vocab), inputs.new_zeros(())) if model.sampled_vocab else ()
        with counting() as saved:
            network(Row(inputs, inputs, starts, tokens, keys, keys, *sample), settings, torch.ones(1))
        for p in network.parameters():
            saved.pop(p.untyped_storage()._cdata, None)
        return sum(saved.values())


@contextlib.contextmanager
def counting() -> Iterator[dict[int, int]]:
    """Bytes of each memory block that operations keep for their backward passes in this context."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


# ---- arithmetic ----


def parameter_counts(track: Track) -> tuple[int, int, int]:
    """Parameters: all, those of matrices (the banks, and of networks), those of embeddings and head."""
    params = dict(meta_model(track, Runtime(torch.device("meta"))).named_parameters())
    count = lambda *parts: sum(p.numel() for name, p in params.items() if any(part in name for part in parts))
    return count(""), count("bank", ".w"), count("embed", "head")


def flops_per_token(track: Track, settings: Settings) -> float:
    """Of forward and backward pass: 6 per weight of a matrix, 12 per key and dim that a full window lets it see."""
    c = track.model
    matrices = parameter_counts(track)[1] + c.width * c.training_vocab
    keys = sum(settings.windows[layer.long] + 1 for layer in c.layers if layer.attention is not None)
    keys += c.dc_window * len({*c.dc_layers} & {*c.attention_layers})
    return 6.0 * matrices + 12.0 * c.width * keys


# ---- what is printed ----


def plan(track: Track, options: Options, utilization: float = 0.4, tokens_per_second: float | None = None) -> str:
    """Parameters, steps, memory per process, the GPUs it fits and time of a track, in lines.

    utilization: share of an H100's FLOP/s. tokens_per_second: of each process, instead of it.
    """
    steps = [track.at(step) for step in range(track.schedule.total_steps)]
    tokens = sum(settings.stage.tokens for settings in steps)
    by_stage = {settings.windows: settings for settings in steps}
    each = {windows: flops_per_token(track, settings) for windows, settings in by_stage.items()}
    flops = sum(settings.stage.tokens * each[settings.windows] for settings in steps)
    total, matrices, embeddings = parameter_counts(track)
    if options.device == "cpu" or (options.device == "auto" and track.name == NANO.name):
        worlds, found, fits = [1], {"": [plan_memory(track, cpu_runtime(options))]}, []
        rate, how = CPU, f"{CPU / 1e9:.0f} GFLOP/s (nano on two cores of an AMD EPYC)"
    else:
        worlds = [world for world in (1, 2, 4, 8) if track.data.rows_per_step % world == 0]
        memories = lambda size: [plan_memory(track, gpu_runtime(options, world, size)) for world in worlds]
        found = {f" with {size} GB": memories(size) for size in GPUS}
        options_of = lambda size: ", ".join(
            f"W = {world}: {options_that_fit(track, options, world, size)}" for world in worlds
        )
        fits = ["", *(f"{size:3} GB  {options_of(size)}" for size in GPUS)]
        rate, how = utilization * H100, f"{utilization:.0%} of {H100 / 1e12:.0f} TFLOP/s (H100) per process"
    if tokens_per_second:
        rate, how = tokens_per_second * flops / tokens, f"{tokens_per_second:,.0f} tokens/s per process"
    parts = f"{matrices:,} of them in matrices and {embeddings:,} in embeddings and head"
    lines = [f"{track.name}: {total:,} parameters, {parts}"]
    lines += [f"{len(steps):,} steps, {tokens:,} tokens, {flops:.3g} model FLOPs", "", *table(worlds, found), *fits, ""]
    for world in worlds:
        lines.append(f"W = {world}: {datetime.timedelta(seconds=round(flops / (rate * world)))} at {how}")
    return "\n".join(lines)


def table(worlds: list[int], found: dict[str, list[Memory]]) -> list[str]:
    """Lines of megabytes (10^6) by part and number of processes; logits and all of them for each place of `found`."""
    line = lambda name, sizes: f"{name:32}" + "".join(f"{size / 1e6:10,.1f}" for size in sizes)
    lines = [f"{'MB per process':32}" + "".join(f"{f'W = {world}':>10}" for world in worlds)]
    for part in ("weights", "optimizer", "gradients", "activations", "cuda"):
        sizes = [getattr(memory, part) for memory in next(iter(found.values()))]
        lines += [line("CUDA, NCCL" if part == "cuda" else part, sizes)] if any(sizes) else []
    for where, memories in found.items():
        lines.append(line(f"logits{where}", [memory.logits for memory in memories]))
        lines.append(line(f"all{where}", [memory.total for memory in memories]))
    return lines


def cpu_runtime(options: Options) -> Runtime:
    """As Runtime.create makes it on a CPU; what it takes for the best dtype is that of this one."""
    return Runtime.create(replace(options, device="cpu", compile=False))


def gpu_runtime(options: Options, world_size: int, gigabytes: float) -> Runtime:
    """As Runtime.create makes it on GPUs that have FP8 and so much memory."""
    return Runtime(
        device=torch.device("cuda"),
        world_size=world_size,
        dtype=torch.bfloat16,
        compile=True,
        fused=options.kernels != "plain",
        fp8=FP8 if options.fp8 is None else options.fp8,
        max_loss_chunk=options.loss_chunk,
        logits_memory=int(gigabytes * 1e9) // 8,
    )


def options_that_fit(track: Track, options: Options, world_size: int, gigabytes: int) -> str:
    """The options with which a step fits into the memory of such a GPU: the first that does of a few."""
    for factor in (1, 2, 4, 8, 16):
        rows = track.data.rows_per_step * factor
        some = replace(track, data=replace(track.data, rows_per_step=rows))
        stages = (*track.schedule.stages, track.schedule.extension)
        if factor > 1 and any(stage.tokens % rows or stage.tokens // rows < 1024 for stage in stages):
            break
        for chunk in (options.loss_chunk, 4096):
            runtime = gpu_runtime(replace(options, loss_chunk=chunk), world_size, gigabytes)
            if plan_memory(some, runtime).total <= gigabytes * 1e9:
                words = [f"--data.rows-per-step {rows}"] if factor > 1 else []
                words += [f"--loss-chunk {chunk}"] if chunk != options.loss_chunk else []
                return " ".join(words) or "fits"
    return "too large"


def print_plan(argv: list[str]) -> None:
    """The command. Raises SpeedrunError for a track or numbers that cannot be."""
    parser = own_parser(__doc__)
    parser.add_argument("--utilization", type=at_least(0.001, float), default=0.4, help="share of an H100's FLOP/s")
    parser.add_argument("--tokens-per-second", type=at_least(1, float), help="instead of it: those of a process")
    known, rest = parse_own(argv, parser)
    track, options = parse_command(rest, change=lambda track: scaled(track, known.width, known.depth))
    print(plan(track, options, known.utilization, known.tokens_per_second))


if __name__ == "__main__":
    main(print_plan)
