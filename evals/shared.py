"""What the commands of this folder share: train_gpt.py on Python's path, trained models, text of tokens, arguments."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import safetensors.torch
import torch

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:
    sys.path.append(str(REPO))
from train_gpt import (  # noqa: E402 - only now is it on the path
    GPT,
    Checkpoint,
    CheckpointError,
    Options,
    Runtime,
    Settings,
    SpeedrunError,
    Track,
    checkpoint_folders,
)


@dataclass(frozen=True)
class Trained:
    """A model with the track and the number of steps that it was trained for."""

    model: GPT
    track: Track
    step: int

    @property
    def settings(self) -> Settings:
        """Those of a validation after its last step."""
        return self.track.validation_at(min(self.step, self.track.schedule.total_steps))


def load_model(path: Path, runtime: Runtime) -> Trained:
    """What an export holds, or a checkpoint (its folder, or that of its run), whole on every rank.

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
    return Trained(model, track, step)


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
        elif key in values or item.default is dataclasses.MISSING:  # else it is younger than the export
            found[item.name] = as_tuple(values[key])
            simple = {float: (int, float)}.get(hint, hint)
            if simple in (int, bool, str, (int, float)) and not isinstance(found[item.name], simple):
                raise TypeError(f"{key} is {values[key]!r}")
    return kind(**found)


def as_tuple(value: object) -> object:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list) else value


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


# ---- the command line ----


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Of a command whose module says `doc`, with the model that it is about and where that runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of an export, of a checkpoint, or of a run's checkpoints")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32", "float64"), default="auto")
    return parser


def runtime_of(options: argparse.Namespace) -> Runtime:
    return Runtime.create(Options(device=options.device, dtype=options.dtype, compile=False))


def at_least(low: float, kind: type = int) -> Callable[[str], int | float]:
    """For argparse: a number of this kind, at least `low` and below 2^63."""

    def parse(word: str) -> int | float:
        with contextlib.suppress(ValueError):
            if low <= kind(word) < 1 << 63:  # which NaN is not
                return kind(word)
        raise argparse.ArgumentTypeError(f"found {word}, expected at least {low}")

    return parse
