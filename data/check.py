"""Validates token shards and describes their documents; exits with 1 where one is damaged.

    python data/check.py data/fineweb10B/*.bin [--plot lengths.png]
    python data/check.py my/*.bin --vocab-size 32000 --bos 1

Damage is what no training should begin with: a wrong magic, version or length, a token outside the vocabulary, no BOS
at all, or a stretch of zeros as a file system leaves it after a crash. The rest is printed to be judged: how long the
documents are, how many of them stood before in the same or an earlier file, how many of validation are in training too.
"""

import argparse
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import GPT2_BOS, GPT2_VOCAB_SIZE, HEADER_BYTES, ShardError, read_shard_header

BYTE_BOS = 256
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
CHUNK = 1 << 20  # tokens: small enough to stay in cache while it is searched
ZEROS = 2048  # tokens: a page of zeros. "!" is token 0 of GPT-2, but a row of them has tokens of its own


@dataclass(frozen=True)
class Report:
    """What one shard holds. `lengths` (documents,) int64 in tokens; the piece before the first BOS is left out."""

    path: Path
    num_tokens: int
    lengths: np.ndarray
    hashes: list[int] = field(repr=False)
    """64 bits of each document, comparable within this process."""


def inspect(path: Path, vocab_size: int | None = None, bos: int | None = None) -> Report:
    """Reads one shard. Raises ShardError if it is damaged.

    Without `vocab_size` and `bos` a shard that begins with token 256 and has none above is one of bytes, any other one
    of GPT-2 tokens.
    """
    num_tokens = read_shard_header(path)
    content = path.read_bytes()
    tokens = np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES)
    if bos is None or vocab_size is None:
        of_bytes = num_tokens > 0 and tokens[0] == BYTE_BOS and tokens.max() == BYTE_BOS
        default_bos, default_size = (BYTE_BOS, BYTE_BOS + 1) if of_bytes else (GPT2_BOS, GPT2_VOCAB_SIZE)
        bos, vocab_size = default_bos if bos is None else bos, default_size if vocab_size is None else vocab_size

    found = []
    for begin in range(0, num_tokens, CHUNK):
        chunk = tokens[begin : begin + CHUNK]
        if chunk.max() >= vocab_size:
            at = int(np.argmax(chunk >= vocab_size))
            raise ShardError(
                f"{path} has token {chunk[at]} at position {begin + at:,}, outside the vocabulary of {vocab_size:,}"
            )
        zeros = np.flatnonzero(tokens[begin : begin + CHUNK + ZEROS] == 0)
        torn = np.flatnonzero(zeros[ZEROS - 1 :] - zeros[: 1 - ZEROS] == ZEROS - 1)
        if len(torn):
            at = begin + int(zeros[torn[0]])
            raise ShardError(f"{path} has {ZEROS:,} zeros in a row at position {at:,}, as a crash leaves them")
        found.append(np.flatnonzero(chunk == bos) + begin)
    bounds = np.concatenate([*found, [num_tokens]])
    if len(bounds) == 1:
        raise ShardError(f"{path} has no BOS token {bos} among its {num_tokens:,} tokens, so no document starts in it")

    view = memoryview(content)
    edges = (HEADER_BYTES + 2 * bounds).tolist()
    return Report(path, num_tokens, np.diff(bounds), [hash(view[a:b]) for a, b in pairwise(edges)])


def duplicates(reports: list[Report]) -> dict[Path, int]:
    """By shard: how many of its documents stand in it, or in a shard before it, already."""
    seen: set[int] = set()
    repeated = {}
    for report in reports:
        before = len(seen)
        seen.update(report.hashes)
        repeated[report.path] = len(report.hashes) - (len(seen) - before)
    return repeated


def leaked(reports: list[Report]) -> tuple[int, int]:
    """(validation documents that stand in a training shard as well, validation documents), by the files' names."""
    validation = [h for report in reports if "_val_" in report.path.name for h in report.hashes]
    training = {h for report in reports if "_train_" in report.path.name for h in report.hashes}
    return sum(h in training for h in validation), len(validation)


def print_table(reports: list[Report]) -> None:
    width = max(len(str(report.path)) for report in reports)
    head = "".join(f"{f'{100 * q:g}%':>8}" for q in QUANTILES)
    print(f"{'':{width}} {'':13} {'':11} {'BOS per':>8} {'seen':>7}   tokens per document, quantiles")
    print(f"{'shard':{width}} {'tokens':>13} {'documents':>11} {'1,000':>8} {'before':>7}{head} {'max':>10}")
    repeated = duplicates(reports)
    for report in reports:
        documents = len(report.lengths)
        per_thousand, seen = 1000 * documents / report.num_tokens, repeated[report.path] / documents
        lengths = "".join(f"{round(length):8,}" for length in np.quantile(report.lengths, QUANTILES))
        print(
            f"{report.path!s:{width}} {report.num_tokens:13,} {documents:11,} {per_thousand:8.3f} {seen:7.2%}"
            f"{lengths} {report.lengths.max():10,}"
        )
    both, validation = leaked(reports)
    if validation and any("_train_" in report.path.name for report in reports):
        print(f"{both:,} of {validation:,} validation documents stand in these training shards as well")


def histogram(lengths: np.ndarray, bins_per_octave: int) -> tuple[np.ndarray, np.ndarray]:
    """(bins,) documents and (bins + 1,) edges of their lengths in tokens, from powers of two on."""
    low, high = np.floor(np.log2(lengths.min())), np.floor(np.log2(lengths.max())) + 1
    edges = 2 ** np.linspace(low, high, int(high - low) * bins_per_octave + 1)
    return np.histogram(lengths, bins=edges)[0], edges


def print_histogram(lengths: np.ndarray) -> None:
    counts, edges = histogram(lengths, bins_per_octave=1)
    print("\ndocuments of so many tokens or more, up to the next line")
    for count, edge in zip(counts, edges, strict=False):
        print(f"{round(edge):11,} {count:11,} {'█' * round(60 * count / counts.max())}".rstrip())


def plot_histogram(lengths: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts, edges = histogram(lengths, bins_per_octave=2)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.stairs(counts, edges, fill=True)
    median = np.median(lengths)
    axes.axvline(median, color="black", linestyle="--", label=f"median {median:,.0f}, mean {lengths.mean():,.0f}")
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Validates token shards and describes their documents.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="shards")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="of the tokens (default: GPT-2's, or bytes)")
    parser.add_argument("--bos", type=int, metavar="TOKEN", help="that starts a document (default: likewise)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the documents' lengths into this file")
    arguments = parser.parse_args()
    reports, damaged = [], 0
    for path in tqdm(arguments.files, unit="shard", leave=False, disable=None):
        try:
            reports.append(inspect(path, arguments.vocab_size, arguments.bos))
        except (ShardError, OSError) as error:
            tqdm.write(f"damaged: {error}", file=sys.stderr)
            damaged += 1
    if reports:
        print_table(reports)
        lengths = np.concatenate([report.lengths for report in reports])
        print_histogram(lengths)
        if arguments.plot:
            try:
                plot_histogram(lengths, arguments.plot)
            except (OSError, ValueError) as error:  # ValueError: a name that ends in no picture format
                sys.exit(f"data/check.py: error: {arguments.plot} cannot be drawn: {error}")
    if damaged:
        of = f"{damaged} of {len(arguments.files)} shards"
        sys.exit(f"data/check.py: error: {of} are damaged, as said above: delete them and fetch or make them again")


if __name__ == "__main__":
    main()
