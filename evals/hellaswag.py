"""HellaSwag (arXiv:1905.07830): which of four endings goes on from a context?

python evals/hellaswag.py mine                                   # of ./run.sh nano --export mine
python evals/hellaswag.py mine --data items.jsonl --limit 1000
torchrun --nproc-per-node 8 evals/hellaswag.py checkpoints/20261121-120000-small-ab12cd
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared import Text, Trained, at_least, load_model, parser_of, runtime_of
from train_gpt import GPT, Row, Runtime, Settings, SpeedrunError, Track, main, make_row, softcapped


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
    for place, record in enumerate(hub_records() if source == "hellaswag" else jsonl_records(Path(source)), 1):
        try:
            context, endings, label = record["ctx"], record["endings"], int(record["label"])
            item = Item(text.encode(context), [text.encode(f" {ending}") for ending in endings], label)
            if not 0 <= label < len(endings) or not all(item.endings):
                raise ValueError(f"label {label} of {len(endings)} endings")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpeedrunError(f"{source}, item {place}: not one of HellaSwag ({error!r}).") from error
        items.append(item)
    if not items:
        raise SpeedrunError(f"{source}: no items.")
    return items


def jsonl_records(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SpeedrunError(
            f"{path}: no JSONL file to be read ({error}). Without --data it is the items of the hub."
        ) from error


def hub_records() -> list[dict]:
    """The 10,042 validation items of Rowan/hellaswag."""
    where = {"filename": "data/validation-00000-of-00001.parquet", "repo_id": "Rowan/hellaswag", "repo_type": "dataset"}
    try:
        import pyarrow.parquet
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

        path = try_to_load_from_cache(**where)
        if not isinstance(path, str):
            get_hf_file_metadata(hf_hub_url(**where))  # fails at once without a network; the next line tries for 25 s
            path = hf_hub_download(**where)
        return pyarrow.parquet.read_table(path).to_pylist()
    except ImportError as error:
        raise SpeedrunError(f"HellaSwag comes as a parquet file: {error}. pip install pyarrow") from error
    except Exception as error:  # the hub's own errors have no common base
        raise SpeedrunError(
            f"HellaSwag cannot be fetched from the hub ({error}). Fetch hellaswag_val.jsonl elsewhere; see --data."
        ) from error


@dataclass(frozen=True)
class Packed:
    """A row of contexts with their endings."""

    row: Row
    spans: list[tuple[int, int, int]]  # (number of the ending, its first and last + 1 position among the targets)


def pack(items: list[Item], track: Track, row_tokens: int) -> Iterator[Packed]:
    """Rows of `row_tokens` tokens (or of one ending that is longer); endings are numbered through all items.

    Every ending with its context is a document of its own after two empty ones. Those shut out what comes before: smear
    and key offset reach one token back across the start of a document, and the second of two lone BOS tokens sees
    nothing but the first, neither by smear (which reads embeddings before smearing) nor by attention (to itself alone).
    """
    bos, number, tokens, starts, spans = track.data.bos, 0, [], [], []
    for item in items:
        for ending in item.endings:
            document = [bos, bos, bos, *item.context, *ending]
            if tokens and len(tokens) + len(document) > row_tokens + 1:
                yield packed_row(tokens, starts, spans, track, row_tokens)
                tokens, starts, spans = [], [], []
            starts += [len(tokens), len(tokens) + 1, len(tokens) + 2]
            tokens += document
            spans.append((number, len(tokens) - len(ending) - 1, len(tokens) - 1))
            number += 1
    yield packed_row(tokens, starts, spans, track, row_tokens)


def packed_row(tokens: list[int], starts: list[int], spans: list, track: Track, row_tokens: int) -> Packed:
    """All rows have one length, so that a GPU sees one shape."""
    if len(tokens) <= row_tokens:
        starts = [*starts, len(tokens)]
        tokens = tokens + [track.data.bos] * (row_tokens + 1 - len(tokens))
    longest = int(np.diff([*starts, len(tokens) - 1]).max())
    return Packed(make_row(np.array(tokens), np.array(starts), longest, track.model), spans)


@torch.no_grad()
def token_losses(model: GPT, row: Row, settings: Settings) -> Tensor:
    """Cross-entropy of each target (T,), in nats."""
    x = model.stream(row, settings)
    chunk, losses = model.runtime.loss_chunk(len(x), model.config.padded_vocab), []
    for some, targets in zip(x.split(chunk), row.targets.split(chunk), strict=True):
        z = softcapped(some @ model.head)
        losses.append(z.logsumexp(1) - z.gather(1, targets[:, None])[:, 0])
    return torch.cat(losses)


def accuracy(trained: Trained, runtime: Runtime, items: list[Item], tokens: int = 8192) -> tuple[float, float]:
    """Share of items whose right ending has the least loss of all, and the least loss per token.

    All ranks call it, and share the rows of `tokens` tokens.
    """
    sums = torch.zeros(sum(len(item.endings) for item in items), dtype=torch.float64)
    rows = pack(items, trained.track, tokens)
    mine = [row for i, row in enumerate(rows) if i % runtime.world_size == runtime.rank]
    done = len(items) / len(sums)  # items per ending
    total = round(done * sum(len(packed.spans) for packed in mine))
    with tqdm(total=total, desc="hellaswag", unit="item", disable=runtime.rank > 0 or None) as bar:
        for packed in mine:
            losses = token_losses(trained.model, packed.row.to(runtime), trained.settings).double().cpu()
            for number, begin, end in packed.spans:
                sums[number] = losses[begin:end].sum()
            bar.update(done * len(packed.spans))
    sums = runtime.sum(sums.to(runtime.device)).cpu()
    lengths = torch.tensor([len(ending) for item in items for ending in item.endings])
    counts = [len(item.endings) for item in items]
    right = lambda scores: sum(int(s.argmin()) == i.label for s, i in zip(scores.split(counts), items, strict=True))
    return right(sums) / len(items), right(sums / lengths) / len(items)


def hellaswag(argv: list[str]) -> None:
    """Print the accuracy of a model. Raises SpeedrunError for a model or data that cannot be read."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", default="hellaswag", help="a JSONL file; default: the hub's Rowan/hellaswag")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many items")
    options = parser.parse_args(argv)
    runtime = runtime_of(options)
    trained = load_model(options.path, runtime)
    items = read_hellaswag(options.data, trained.track)[: options.limit]
    began = time.perf_counter()
    plain, normalized = accuracy(trained, runtime, items)
    speed = len(items) / (time.perf_counter() - began)
    if runtime.rank == 0:
        said = f"accuracy {plain:.4f}, length-normalized {normalized:.4f} ({speed:.1f} items/s)"
        print(f"hellaswag: {len(items)} items, {said}")


if __name__ == "__main__":
    main(hellaswag)
