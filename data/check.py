"""Validates token shards and describes their documents; exits with 1 where one is damaged.

    python data/check.py data/fineweb10B/*.bin
    python data/check.py my/*.bin --vocab-size 32000 --bos 1

Damage is what no training should begin with: a wrong magic, version or length, a token outside the vocabulary, no BOS
at all, a stretch of zeros as a file system leaves it after a crash, or another SHA-256 than the sidecar beside it has.
The rest is printed to be judged: how long the documents are, how many of them stood before in the same or an earlier
file, how many of validation are in training too.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import GPT2_BOS, GPT2_VOCAB_SIZE, HEADER_BYTES, TOKEN_BYTES, ShardError, read_json, read_shard_header

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
    found = (read_json(candidate) for candidate in path.parent.glob("*.json"))
    return next((sidecar for sidecar in found if path.name in sidecar.get("shards", ())), {})


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


def print_table(reports: list[Report]) -> None:
    width = max(len(str(report.path)) for report in reports)
    head = "".join(f"{f'{100 * q:g}%':>8}" for q in QUANTILES)
    print(f"{'':{width}} {'':13} {'':11} {'BOS per':>8} {'seen':>7}   tokens per document, quantiles")
    print(f"{'shard':{width}} {'tokens':>13} {'documents':>11} {'1,000':>8} {'before':>7}{head} {'max':>10}")
    seen: set[int] = set()  # hashes of the documents so far
    for report in reports:
        documents, before = len(report.lengths), len(seen)
        seen.update(report.hashes)
        repeated = 1 - (len(seen) - before) / documents
        lengths = "".join(f"{round(length):8,}" for length in np.quantile(report.lengths, QUANTILES))
        print(
            f"{report.path!s:{width}} {report.num_tokens:13,} {documents:11,} "
            f"{1000 * documents / report.num_tokens:8.3f} {repeated:7.2%}{lengths} {report.lengths.max():10,}"
        )
    validation = [h for report in reports if "_val_" in report.path.name for h in report.hashes]
    training = {h for report in reports if "_train_" in report.path.name for h in report.hashes}
    if validation and training:
        both = sum(h in training for h in validation)
        print(f"{both:,} of {len(validation):,} validation documents stand in these training shards as well")


def print_histogram(lengths: np.ndarray) -> None:
    """How many documents have from 1, 2, 4, ... tokens on."""
    counts = np.bincount(np.log2(lengths).astype(int))
    print("\ndocuments of so many tokens or more, up to the next line")
    for octave, count in enumerate(counts):
        print(f"{2**octave:11,} {count:11,} {'█' * round(60 * count / counts.max())}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description="Validates token shards and describes their documents.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="shards")
    by_default = "(default: what the sidecar says; without one GPT-2's)"
    parser.add_argument("--vocab-size", type=int, metavar="V", help=f"of the tokens {by_default}")
    parser.add_argument("--bos", type=int, metavar="TOKEN", help=f"that starts a document {by_default}")
    arguments = parser.parse_args()
    reports, damaged = [], 0
    for path in tqdm(arguments.files, unit="shard", leave=False, disable=None):
        sidecar = sidecar_of(path)
        bos = sidecar.get("bos", GPT2_BOS) if arguments.bos is None else arguments.bos
        vocab_size = arguments.vocab_size or sidecar.get("vocab_size", GPT2_VOCAB_SIZE)
        sha256 = sidecar["shards"][path.name]["sha256"] if sidecar else None
        try:
            if path.name == TOKEN_BYTES:  # no documents
                read_shard_header(path)
            else:
                reports.append(inspect(path, bos, vocab_size, sha256))
        except (ShardError, OSError) as error:
            tqdm.write(f"damaged: {error}", file=sys.stderr)
            damaged += 1
    if reports:
        print_table(reports)
        print_histogram(np.concatenate([report.lengths for report in reports]))
    if damaged:
        of = f"{damaged} of {len(arguments.files)} shards"
        sys.exit(f"data/check.py: error: {of} are damaged, as said above: delete them and fetch or make them again")


if __name__ == "__main__":
    main()
