"""What is not part of the race: weights out, text, HellaSwag, the memory plan, small siblings of a track.

    python train_gpt.py sample CHECKPOINT [--prompt TEXT]           # a checkpoint or an export
    python train_gpt.py eval CHECKPOINT [--data hellaswag]
    python train_gpt.py TRACK --plan
    python train_gpt.py TRACK --scale width=0.5,depth=0.5
    python train_gpt.py TRACK --export FOLDER --eval hellaswag      # at the end of the run

`train_gpt.py` loads this file only for these commands and options.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import train_gpt
from train_gpt import (
    GPT,
    Cache,
    Checkpoint,
    CheckpointError,
    ModelConfig,
    Optimizer,
    Options,
    Row,
    Runtime,
    Settings,
    SpeedrunError,
    Track,
    checkpoint_folders,
    flatten,
    make_row,
    publish,
    softcapped,
)

# ----------------------------------------------------------------------------------------------------------------------
# Weights out and in
# ----------------------------------------------------------------------------------------------------------------------


def export(folder: Path, model: GPT, track: Track, step: int) -> None:
    """Write model.safetensors (weights by name, banks without padding) and config.json (the track) into a folder."""
    sizes = {name: len(p) for name, p in meta_model(track, Runtime(torch.device("meta"))).named_parameters() if p.dim()}
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    tensors = {name: (t[: sizes[name]] if t.dim() else t).contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "model.safetensors", folder / "config.json"
    parts = [path.with_name(path.name + ".part") for path in paths]
    safetensors.torch.save_file(tensors, parts[0])
    parts[1].write_text(json.dumps({"step": step, **flatten(track)}, indent=1))
    for part, path in zip(parts, paths, strict=True):
        publish(part, path)


def meta_model(track: Track, runtime: Runtime) -> GPT:
    """Shapes and dtypes of a model whose weights are nowhere."""
    with torch.device("meta"):
        return GPT(track.model, runtime)


def rebuild(kind: type, values: dict[str, object], prefix: str = "") -> object:
    """The inverse of `flatten` for a dataclass. Raises KeyError or TypeError where a value is missing or wrong."""
    hints, found = get_type_hints(kind), {}
    for item in dataclasses.fields(kind):
        key, hint = prefix + item.name, hints[item.name]
        inner = get_args(hint)[0] if get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint):
            found[item.name] = rebuild(hint, values, f"{key}.")
        elif dataclasses.is_dataclass(inner):
            count = len({k.removeprefix(f"{key}.").split(".")[0] for k in values if k.startswith(f"{key}.")})
            found[item.name] = tuple(rebuild(inner, values, f"{key}.{i}.") for i in range(count))
        else:
            found[item.name] = as_tuple(values[key])
            simple = {float: (int, float)}.get(hint, hint)
            if simple in (int, bool, str, (int, float)) and not isinstance(found[item.name], simple):
                raise TypeError(f"{key} is {values[key]!r}")
    return kind(**found)


def as_tuple(value: object) -> object:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list) else value


def load_model(path: Path, runtime: Runtime) -> tuple[GPT, Track, int]:
    """Model, track and step of an export or of a checkpoint (its folder, or that of its run), whole on every rank.

    Raises CheckpointError where it is neither, or damaged.
    """
    try:
        if (path / "config.json").exists():
            values = json.loads((path / "config.json").read_text())
            tensors = safetensors.torch.load_file(path / "model.safetensors").items()
            step = values["step"]
        else:
            checkpoint = Checkpoint((checkpoint_folders(path) or [path])[-1])
            values, step = checkpoint.progress.settings, checkpoint.progress.step
            tensors = ((n.removeprefix("weights."), t) for n, t in checkpoint.tensors() if n.startswith("weights."))
        track = rebuild(Track, values)
        model = GPT(track.model, replace(runtime, rank=0, world_size=1))
        params = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors:
                p = params.pop(name)
                whole = tensor[: len(p)] if p.dim() and tensor.dim() == p.dim() else tensor.view(p.shape)
                if whole.shape != p.shape:
                    raise ValueError(f"{name} has the shape {tuple(whole.shape)}, expected {tuple(p.shape)}")
                p.copy_(whole)
        if params:
            raise ValueError(f"{next(iter(params))} is missing")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: no model to be read ({error!r}).") from error
    return model, track, step


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


class Text:
    """Tokens of text and back: bytes for a byte vocabulary, else GPT-2's, which take tiktoken."""

    def __init__(self, vocab_size: int):
        self._gpt2 = None
        if vocab_size != 257:
            try:
                import tiktoken

                self._gpt2 = tiktoken.get_encoding("gpt2")
            except Exception as error:  # not installed, or no network to fetch the vocabulary
                raise SpeedrunError(f"text of GPT-2 tokens needs tiktoken and its vocabulary ({error}).") from error

    def encode(self, text: str) -> list[int]:
        return self._gpt2.encode_ordinary(text) if self._gpt2 else list(text.encode())

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text of tokens as they come; a character of several bytes comes with its last."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            data = self._gpt2.decode_single_token_bytes(token) if self._gpt2 else bytes([token])
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)


@torch.no_grad()
def generate(
    model: GPT,
    settings: Settings,
    prompt: list[int],
    num_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    piece: int = 256,
) -> Iterator[int]:
    """Yield tokens drawn from the model after a prompt that begins with BOS, until it ends the document with BOS.

    A long prompt is read in pieces. Costs the same for every token, however long the text has become.
    """
    generator, cache = torch.Generator().manual_seed(seed), Cache()
    pending = torch.tensor(prompt, device=model.embed.device)
    for _ in range(num_tokens):
        for tokens in pending.split(piece):
            logits = model.decode(tokens, settings, cache)
        last = logits[-1, : model.config.vocab_size].double().cpu()
        if top_k is not None:
            last[last < last.topk(min(top_k, len(last))).values[-1]] = -math.inf
        token = int(last.argmax())
        if temperature > 0:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator))
        if token == prompt[0]:
            return
        yield token
        pending = torch.tensor([token], device=model.embed.device)


def text_sample(model: GPT, track: Track, step: int, num_tokens: int, seed: int) -> str:
    """What a model says from nothing. Raises SpeedrunError where its tokens cannot be read."""
    text = Text(track.model.vocab_size)
    return "".join(text.stream(generate(model, track.validation_at(step), [track.data.bos], num_tokens, seed)))


@dataclass(frozen=True)
class SampleOptions:
    """Continue a text with a trained model."""

    path: tyro.conf.Positional[Path]
    """Folder of an export, of a checkpoint, or of a run's checkpoints."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 200
    """At most so many; it ends earlier where the model ends the document."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw from the so many likeliest tokens only."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"


def sample(argv: list[str]) -> None:
    """Print a text as it is drawn, and then its speed. Raises SpeedrunError for a model or options that do not work."""
    options = tyro.cli(SampleOptions, args=argv, prog="train_gpt.py sample")
    if options.temperature < 0 or options.tokens < 0 or (options.top_k is not None and options.top_k < 1):
        raise SpeedrunError("--temperature and --tokens must be at least 0, --top-k at least 1.")
    runtime = Runtime.create(Options(device=options.device, dtype=options.dtype, compile=False))
    model, track, step = load_model(options.path, runtime)
    settings = track.validation_at(min(step, track.schedule.total_steps))
    text = Text(track.model.vocab_size)
    prompt = [track.data.bos, *text.encode(options.prompt)]
    count, began = 0, time.perf_counter()

    def counted() -> Iterator[int]:
        nonlocal count
        for token in generate(
            model, settings, prompt, options.tokens, options.seed, options.temperature, options.top_k
        ):
            count += 1
            yield token

    print(options.prompt, end="", flush=True)
    for part in text.stream(counted()):
        print(part, end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# HellaSwag (arXiv:1905.07830): which of four endings goes on from a context?
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    context: list[int]  # tokens
    endings: list[list[int]]
    label: int  # index of the right ending


def read_hellaswag(source: str, track: Track) -> list[Item]:
    """The items of a JSONL file with "ctx", "endings" and "label", or, for "hellaswag", the validation set of the hub.

    Tokens as in llm.c: those of the context, and those of a space and the ending. Raises SpeedrunError.
    """
    items, text = [], Text(track.model.vocab_size)
    for number, record in enumerate(hub_records() if source == "hellaswag" else jsonl_records(Path(source)), 1):
        try:
            context, endings, label = record["ctx"], record["endings"], int(record["label"])
            item = Item(text.encode(context), [text.encode(f" {ending}") for ending in endings], label)
            if not 0 <= label < len(endings) or not all(item.endings):
                raise ValueError(f"label {label} of {len(endings)} endings")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpeedrunError(f"{source}, item {number}: not one of HellaSwag ({error!r}).") from error
        items.append(item)
    if not items:
        raise SpeedrunError(f"{source}: no items.")
    return items


def jsonl_records(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SpeedrunError(f"{path}: no JSONL file to be read ({error}). Or name none: --data hellaswag.") from error


def hub_records() -> list[dict]:
    """The 10,042 validation items of Rowan/hellaswag."""
    try:
        import pyarrow.parquet
        from huggingface_hub import hf_hub_download

        file = "data/validation-00000-of-00001.parquet"
        return pyarrow.parquet.read_table(hf_hub_download("Rowan/hellaswag", file, repo_type="dataset")).to_pylist()
    except ImportError as error:
        raise SpeedrunError(f"HellaSwag comes as a parquet file: {error}. pip install pyarrow") from error
    except Exception as error:  # the hub's own errors have no common base
        raise SpeedrunError(
            f"HellaSwag cannot be fetched from the hub ({error}). Fetch hellaswag_val.jsonl elsewhere and name it "
            "instead of `hellaswag`."
        ) from error


@dataclass(frozen=True)
class Packed:
    """A row of contexts with their endings."""

    row: Row
    spans: list[tuple[int, int, int]]  # (number of the ending, its first and last + 1 position among the targets)


def pack(items: list[Item], bos: int, row_tokens: int) -> Iterator[Packed]:
    """Rows of `row_tokens` tokens (or of one ending that is longer); endings are numbered through all items.

    Every ending with its context is a document of its own after two empty ones. Those shut out what comes before: smear
    and key offset reach one token back across the start of a document, and the second of two lone BOS tokens sees
    nothing but the first, neither by smear (which reads embeddings before smearing) nor by attention (to itself alone).
    """
    number, tokens, starts, spans = 0, [], [], []
    for item in items:
        for ending in item.endings:
            document = [bos, bos, bos, *item.context, *ending]
            if tokens and len(tokens) + len(document) > row_tokens + 1:
                yield finished(tokens, starts, spans, bos, row_tokens)
                tokens, starts, spans = [], [], []
            starts += [len(tokens), len(tokens) + 1, len(tokens) + 2]
            tokens += document
            spans.append((number, len(tokens) - len(ending) - 1, len(tokens) - 1))
            number += 1
    yield finished(tokens, starts, spans, bos, row_tokens)


def finished(tokens: list[int], starts: list[int], spans: list, bos: int, row_tokens: int) -> Packed:
    """All rows have one length, so that a GPU sees one shape."""
    if len(tokens) <= row_tokens:
        starts = [*starts, len(tokens)]
        tokens = tokens + [bos] * (row_tokens + 1 - len(tokens))
    longest = int(np.diff([*starts, len(tokens) - 1]).max())
    return Packed(make_row(np.array(tokens), np.array(starts), longest, pin=False), spans)


@torch.no_grad()
def token_losses(model: GPT, row: Row, settings: Settings) -> Tensor:
    """Cross-entropy of each target (T,), in nats."""
    tables = model._rotary_tables(settings, 0, len(row.inputs))
    x = model.hidden(row.inputs, row.cu_seqlens, row.max_seqlen, settings.windows, tables, settings.attn_scale)
    chunk, losses = model.runtime.loss_chunk(len(x), model.config.padded_vocab), []
    for some, targets in zip(x.split(chunk), row.targets.split(chunk), strict=True):
        z = softcapped(some @ model.head)
        losses.append(z.logsumexp(1) - z.gather(1, targets[:, None])[:, 0])
    return torch.cat(losses)


@dataclass(frozen=True)
class Accuracy:
    items: int
    plain: float
    """Share of items whose right ending has the least loss of all."""
    normalized: float
    """The same with losses per token."""
    seconds: float

    def __str__(self) -> str:
        speed = self.items / max(self.seconds, 1e-9)
        return (
            f"hellaswag: {self.items} items, accuracy {self.plain:.4f}, length-normalized {self.normalized:.4f} "
            f"({speed:.1f} items/s)"
        )


def hellaswag(model: GPT, track: Track, step: int, runtime: Runtime, items: list[Item], tokens: int = 8192) -> Accuracy:
    """Accuracy of a model after `step` training steps. All ranks call it, and share the rows of `tokens` tokens."""
    settings = track.validation_at(step)
    sums = torch.zeros(sum(len(item.endings) for item in items), dtype=torch.float64)
    began = time.perf_counter()
    mine = [row for i, row in enumerate(pack(items, track.data.bos, tokens)) if i % runtime.world_size == runtime.rank]
    done = len(items) / len(sums)  # items per ending
    total = round(done * sum(len(packed.spans) for packed in mine))
    with tqdm(total=total, desc="hellaswag", unit="item", disable=runtime.rank > 0 or None) as bar:
        for packed in mine:
            losses = token_losses(model, packed.row.to(runtime), settings).double().cpu()
            for number, begin, end in packed.spans:
                sums[number] = losses[begin:end].sum()
            runtime.alive()
            bar.update(done * len(packed.spans))
    sums = runtime.sum(sums.to(runtime.device)).cpu()
    lengths = torch.tensor([len(ending) for item in items for ending in item.endings])
    counts = [len(item.endings) for item in items]
    right = lambda scores: sum(int(s.argmin()) == i.label for s, i in zip(scores.split(counts), items, strict=True))
    seconds = time.perf_counter() - began
    return Accuracy(len(items), right(sums) / len(items), right(sums / lengths) / len(items), seconds)


@dataclass(frozen=True)
class EvalOptions:
    """Score a trained model."""

    path: tyro.conf.Positional[Path]
    """Folder of an export, of a checkpoint, or of a run's checkpoints."""
    data: str = "hellaswag"
    """hellaswag: the validation items of the hub's Rowan/hellaswag; else a JSONL file of such items."""
    limit: int | None = None
    """Only the first so many items."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"


def evaluate(argv: list[str]) -> None:
    """The command `eval`. Raises SpeedrunError for a model or data that cannot be read."""
    options = tyro.cli(EvalOptions, args=argv, prog="train_gpt.py eval")
    runtime = Runtime.create(Options(device=options.device, dtype=options.dtype, compile=False))
    model, track, step = load_model(options.path, runtime)
    items = read_hellaswag(options.data, track)[: options.limit]
    found = hellaswag(model, track, min(step, track.schedule.total_steps), runtime, items)
    if runtime.heartbeat is not None:
        runtime.heartbeat.stop()
    if runtime.rank == 0:
        print(found)


# ----------------------------------------------------------------------------------------------------------------------
# The plan: memory, FLOPs and time of a track, without a GPU
# ----------------------------------------------------------------------------------------------------------------------

GPUS = (24, 40, 80, 141)  # GB
OVERHEAD = 1.5e9  # bytes of CUDA itself, of NCCL's buffers and of what no formula counts
H100 = 989e12  # FLOP/s of bfloat16 matrix products, dense


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    optimizer: int
    """State of Adam and NorMuon, with the lower halves of the weights."""
    gradients: int
    activations: int
    """What the backward pass of one row needs, each operation by itself: torch.compile keeps less."""
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def plan_memory(track: Track, runtime: Runtime) -> Memory:
    """What a training step takes on a runtime, whose device nobody has to have. No tensor has data."""
    meta = replace(runtime, device=torch.device("meta"))
    params = dict(meta_model(track, meta).named_parameters())
    with torch.device("meta"):
        state = Optimizer(params, track.optimizer, meta).state
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    longest = max(stage.tokens for stage in (*track.schedule.stages, track.schedule.extension))
    tokens = longest // track.data.rows_per_step
    each = track.model.padded_vocab * (4 if runtime.fused else 24)
    return Memory(
        weights=size(params.values()),
        optimizer=size(t for tensors in state.values() for t in tensors.values()),
        gradients=size(params.values()),
        activations=activation_memory(track, runtime, tokens),
        logits=runtime.loss_chunk(tokens, track.model.padded_vocab) * each,
    )


def activation_memory(track: Track, runtime: Runtime, tokens: int) -> int:
    """Bytes that the forward pass of a row of `tokens` keeps, from two lengths: they grow linearly."""
    settings = track.at(track.schedule.scheduled_steps - 1)
    kind = runtime.device.type == "cuda", runtime.dtype, runtime.fused, runtime.fp8
    short, long = (saved_for_backward(track.model, settings, n, *kind) for n in (4096, 8192))
    return short + (long - short) * (tokens - 4096) // 4096


@functools.cache
def saved_for_backward(
    model: ModelConfig, settings: Settings, tokens: int, cuda: bool, dtype: torch.dtype, fused: bool, fp8: bool
) -> int:
    """Bytes of the tensors that the forward pass of a row keeps, besides weights: counted on tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with contextlib.ExitStack() as stack:
        if cuda:  # of which a CPU has no fake: what its attention keeps is the same
            stack.enter_context(patch.object(train_gpt, "attention", varlen_attention))
        stack.enter_context(FakeTensorMode())
        train_gpt.rotary_tables.cache_clear()
        stack.callback(train_gpt.rotary_tables.cache_clear)
        network = GPT(model, Runtime(torch.device("cpu"), dtype=dtype, fused=fused, fp8=fp8))
        inputs, starts = torch.zeros(tokens, dtype=torch.int64), torch.zeros(128 + tokens // 128, dtype=torch.int32)
        with counting() as saved:
            network(Row(inputs, inputs, starts, tokens), settings, torch.ones(1))
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


def varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, window):
    """train_gpt.attention on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(window, 0))


def flops_per_token(track: Track, settings: Settings) -> float:
    """Of forward and backward pass: 6 per weight of a matrix, 12 per key and dim that a full window lets it see."""
    c = track.model
    attention = [layer for layer in c.layers if layer.attention is not None]
    matrices = 4 * c.width**2 * len(attention) + 2 * c.mlp_ratio * c.width**2 * c.num_layers + c.width * c.padded_vocab
    keys = sum(settings.windows[layer.long] + 1 for layer in attention)
    return 6.0 * matrices + 12.0 * c.width * keys


def plan(track: Track, options: Options) -> str:
    """Parameters, memory per process by number of processes, the GPUs it fits, FLOPs, tokens and time of a track."""
    params = dict(meta_model(track, Runtime(torch.device("meta"))).named_parameters())
    count = lambda *names: sum(p.numel() for name, p in params.items() if name in names)
    matrices, embeddings = count("attn_bank", "mlp_bank"), count("embed", "head", "value_embeds", "embed2")
    steps = [track.at(step) for step in range(track.schedule.total_steps)]
    tokens = sum(settings.stage.tokens for settings in steps)
    by_stage = {settings.windows: flops_per_token(track, settings) for settings in steps}
    flops = sum(settings.stage.tokens * by_stage[settings.windows] for settings in steps)
    lines = [
        f"{track.name}: {sum(p.numel() for p in params.values()):,} parameters, {matrices:,} of them in matrices and "
        f"{embeddings:,} in embeddings and head",
        f"{len(steps):,} steps, {tokens:,} tokens, {flops:.3g} model FLOPs",
        "",
    ]
    worlds = [world for world in (1, 2, 4, 8) if track.data.rows_per_step % world == 0]
    found = [plan_memory(track, gpu_runtime(options, world, max(GPUS))) for world in worlds]
    lines.append(f"{'MiB per process':32}" + "".join(f"{f'W = {world}':>10}" for world in worlds))
    for field in dataclasses.fields(Memory):
        values = [getattr(memory, field.name) for memory in found]
        lines.append(f"{field.name:32}" + "".join(f"{value / 2**20:10,.1f}" for value in values))
    lines.append(f"{'all':32}" + "".join(f"{memory.total / 2**20:10,.1f}" for memory in found))
    lines.append("")
    for memory in GPUS:
        fits = ", ".join(f"W = {world}: {fit(track, options, world, memory)}" for world in worlds)
        lines.append(f"{memory:3} GB  {fits}")
    lines.append("")
    for world in worlds:
        if options.plan_tokens_per_second:
            rate, how = options.plan_tokens_per_second * world, f"{options.plan_tokens_per_second:,.0f} tokens/s"
            seconds = tokens / rate
        else:
            how = f"{options.plan_utilization:.0%} of {H100 / 1e12:.0f} TFLOP/s (H100)"
            seconds = flops / (options.plan_utilization * H100 * world)
        lines.append(f"W = {world}: {datetime.timedelta(seconds=round(seconds))} at {how} per process")
    return "\n".join(lines)


def gpu_runtime(options: Options, world_size: int, gigabytes: float) -> Runtime:
    """As Runtime.create makes it on GPUs that have FP8 and so much memory."""
    return Runtime(
        device=torch.device("cuda"),
        world_size=world_size,
        dtype=torch.bfloat16,
        fused=options.kernels != "plain",
        fp8=options.head != "plain",
        max_loss_chunk=options.loss_chunk,
        logits_memory=int(gigabytes * 1e9) // 8,
    )


def fit(track: Track, options: Options, world_size: int, gigabytes: int) -> str:
    """The options with which a step fits into the memory of such a GPU: the first that does of a few."""
    for factor in (1, 2, 4, 8, 16):
        rows = track.data.rows_per_step * factor
        some = replace(track, data=replace(track.data, rows_per_step=rows))
        stages = (*track.schedule.stages, track.schedule.extension)
        if any(stage.tokens % rows or stage.tokens // rows < 1024 for stage in stages):
            break
        for chunk in (options.loss_chunk, 4096):
            runtime = gpu_runtime(replace(options, loss_chunk=chunk), world_size, gigabytes)
            if plan_memory(some, runtime).total + OVERHEAD <= gigabytes * 1e9:
                words = [f"--data.rows-per-step {rows}"] if factor > 1 else []
                words += [f"--loss-chunk {chunk}"] if chunk != options.loss_chunk else []
                return " ".join(words) or "fits"
    return "too large"


# ----------------------------------------------------------------------------------------------------------------------
# Small siblings of a track
# ----------------------------------------------------------------------------------------------------------------------


def scaled(track: Track, text: str) -> Track:
    """The track with its width and depth multiplied, "width=0.5,depth=0.5", for experiments.

    Width: fewer heads, or narrower ones where that leaves an odd number to be paired. Matrices need no other learning
    rate, because NorMuon's update has a spectral norm that does not depend on their size; nor do embeddings, which are
    normed or added entry by entry. The logits are sums over the width of entries that Adam moves by the learning rate:
    that of the head falls as 1/width (its decay stays). The scores of attention are sums over the head's dims of normed
    queries and keys: their scale grows as those shrink. Depth: layers with a role keep their place in proportion.
    Learning rates stay.
    """
    factors = {"width": 1.0, "depth": 1.0}
    try:
        for part in text.split(","):
            name, value = part.split("=")
            if name not in factors or not 0 < float(value) <= 100:
                raise ValueError(part)
            factors[name] = float(value)
    except ValueError as error:
        raise SpeedrunError(f"--scale {text}: expected width=FACTOR,depth=FACTOR or one of them.") from error
    width, depth = factors["width"], factors["depth"]
    m, s = track.model, track.schedule
    heads, head_dim = m.num_heads * width, float(m.head_dim)
    if heads < 1 or heads % (2 if m.paired_layers else 1):
        heads, head_dim = m.num_heads, m.head_dim * width
    L = round(m.num_layers * depth)
    if head_dim % 4 or not head_dim or L < 1:
        raise SpeedrunError(
            f"--scale {text}: {m.num_heads} heads of {m.head_dim} dims and {m.num_layers} layers become {heads:g} of "
            f"{head_dim:g} and {L}; expected dims that are a multiple of 4, and a layer."
        )
    place = lambda layer: round(layer * (L - 1) / max(m.num_layers - 1, 1)) if layer < m.num_layers else layer
    places = lambda layers: tuple(dict.fromkeys(map(place, layers)))
    model = replace(
        m,
        num_layers=L,
        num_heads=int(heads),
        head_dim=int(head_dim),
        without_attention=places(m.without_attention),
        paired_layers=places(m.paired_layers),
        long_layers=places(m.long_layers),
        value_embeds=tuple({place(layer): (place(layer), table) for layer, table in m.value_embeds}.values()),
        skips=tuple(dict.fromkeys((place(a), place(b)) for a, b in m.skips if place(a) < place(b))),
        backout_layer=place(m.backout_layer),
    )
    actual = model.width / m.width
    rules = track.optimizer.rules
    slower = {
        name: replace(rule, lr_mul=tuple(lr / actual for lr in rule.lr_mul), wd_mul=rule.wd_mul * actual**2)
        for name, rule in (("head", rules.head), ("embed", rules.embed))
    }
    optimizer = replace(track.optimizer, rules=replace(rules, **slower))
    return replace(
        track,
        model=model,
        schedule=replace(s, attn_scale=s.attn_scale * m.head_dim / model.head_dim),
        optimizer=optimizer,
    )
