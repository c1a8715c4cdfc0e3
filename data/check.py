"""Validates token shards and describes their documents; exits with 1 where one is damaged.

    python data/check.py data/fineweb10B/*.bin [--plot lengths.png]
    python data/check.py my/*.bin --vocab-size 32000 --bos 1

Damage is what no training should begin with: a wrong magic, version or length, a token outside the vocabulary, no BOS
at all, a stretch of zeros as a file system leaves it after a crash, or another SHA-256 than the sidecar beside it has.
The rest is printed to be judged: how long the documents are, how many of them stood before in the same or an earlier
file, how many of validation are in training too.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections import defaultdict
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


def sidecar_of(path: Path) -> dict:
    """What the script that wrote this shard said about it in a file beside it; {} where there is none."""
    for candidate in path.parent.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            sidecar = json.loads(candidate.read_bytes())
            if "tokens" in sidecar["shards"][path.name]:
                return sidecar
    return {}


def guess(paths: list[Path]) -> tuple[int, int]:
    """BOS and vocabulary size of the shards of one folder: of bytes where 256 is commoner in them than all above it."""
    starts = above = 0
    for path in paths:
        with contextlib.suppress(OSError):
            tokens = np.fromfile(path, "<u2", CHUNK, offset=HEADER_BYTES)
            starts, above = starts + np.count_nonzero(tokens == BYTE_BOS), above + np.count_nonzero(tokens > BYTE_BOS)
    return (BYTE_BOS, BYTE_BOS + 1) if starts > above else (GPT2_BOS, GPT2_VOCAB_SIZE)


def inspect(path: Path, bos: int, vocab_size: int, sha256: str | None) -> Report:
    """Reads one shard. Raises ShardError if it is damaged."""
    num_tokens = read_shard_header(path)
    content = path.read_bytes()
    tokens = np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES)

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
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ShardError(f"{path} differs from its sidecar: it has SHA-256 {found}, expected {sha256}")

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
    by_default = "(default: the sidecar's; without one GPT-2's or that of bytes, by what the shards of a folder hold)"
    parser.add_argument("--vocab-size", type=int, metavar="V", help=f"of the tokens {by_default}")
    parser.add_argument("--bos", type=int, metavar="TOKEN", help="that starts a document (default: likewise)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the documents' lengths into this file")
    arguments = parser.parse_args()
    folders = defaultdict(list)
    for path in arguments.files:
        folders[path.parent].append(path)
    guesses = {folder: guess(paths) for folder, paths in folders.items()}
    reports, damaged = [], 0
    for path in tqdm(arguments.files, unit="shard", leave=False, disable=None):
        try:
            sidecar, (bos, vocab_size) = sidecar_of(path), guesses[path.parent]
            bos = sidecar.get("bos", bos) if arguments.bos is None else arguments.bos
            vocab_size = sidecar.get("vocab_size", vocab_size) if arguments.vocab_size is None else arguments.vocab_size
            sha256 = sidecar["shards"][path.name].get("sha256") if sidecar else None
            reports.append(inspect(path, bos, vocab_size, sha256))
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
