"""Writes the shards of the `nano` track: Python sources of sympy and networkx, one token per byte.

    python data/nano.py [--out DIR]        # default: data/nano/ beside this script
    python data/nano.py --tuning           # data/nano_tuning/: to choose numbers without the data they are judged on

No network, no account: torch itself needs both packages, and their wheels hold the same bytes on every platform,
whatever the torch. A twentieth of the files, drawn by the hash of their paths, is for validation; a file that holds
half of the lines of one of those is left out of training. Files are cut at line ends into pieces of at most 8,192
bytes; each piece is a document: the BOS token 256, then its bytes. Pieces stand in the order of a hash, so that any
prefix of a shard is a fair sample. With --tuning the validation files are left out, and another twentieth takes their
place. Every call makes the shards anew, in less than a second, and writes those that are not as they should be.
"""

import argparse
import hashlib
import importlib.metadata
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import shards
from shards import ShardError

PACKAGES = {"sympy": "1.14.0", "networkx": "3.6.1"}  # whose sources define the track
PINS = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())  # as pip takes them
BOS = 256  # bytes are 0..255
PIECE_BYTES = 8192
PARTS = 20  # of the files; part 0 is for validation, part 1 for validation while tuning
COMMON_LINE = 20  # bytes: shorter lines, such as `else:`, say nothing about where a file comes from
VAL_SHARD, TRAIN_SHARD = "nano_val_000000.bin", "nano_train_000001.bin"
TUNING_VAL_SHARD, TUNING_TRAIN_SHARD = "tuning_val_000000.bin", "tuning_train_000001.bin"
SIDECAR = "nano.json"  # versions, hashes and counts of the shards beside it

PINNED_SHA256 = {
    VAL_SHARD: "168d8b3ea491e132eeba5ec9666737a4f29754d6220f0154293d2b40d1687881",
    TRAIN_SHARD: "39582df2d139334973de00cdc201ac3b43764de71907e603734b74ad3cc5ba57",
    TUNING_VAL_SHARD: "1b2140cbebf1f57cde0a4df1037c37a5f001d343e6d4e6c6454d0bfe59ef7695",
    TUNING_TRAIN_SHARD: "ad5e14ffcef548da6cd515d0ffd717e534398c0168a490c6a48a873d1a3e3dfb",
}


def package(name: str) -> importlib.metadata.Distribution:
    """An installed package, which is never imported. Raises ShardError where it is not installed."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise ShardError(
            f"{name} is not installed for {sys.executable}, and its sources are data of the nano track: "
            "pip install -r requirements.txt, or name another interpreter (PYTHON=… ./run.sh nano)"
        ) from None


def installed_versions() -> dict[str, str]:
    return {name: package(name).version for name in PACKAGES}


def read_sources() -> dict[str, bytes]:
    """Text of all Python files of both packages, by posix path relative to site-packages."""
    sources = {}
    for name in PACKAGES:
        site = Path(package(name).locate_file(""))
        sources |= {path.relative_to(site).as_posix(): path.read_bytes() for path in (site / name).rglob("*.py")}
    return sources


def part_of(name: str) -> int:
    """The part, of PARTS, of the file of this name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % PARTS


def distinct_lines(text: bytes) -> set[bytes]:
    """The stripped lines that say something about where a text comes from."""
    stripped = (line.strip() for line in text.split(b"\n"))
    return {line for line in stripped if len(line) >= COMMON_LINE}


def near_copies(validation: dict[str, bytes], others: dict[str, bytes]) -> list[str]:
    """Names of `others` that hold half or more of the distinct lines of some validation file."""
    distinct = {name: distinct_lines(text) for name, text in validation.items()}
    holders = defaultdict(list)  # the validation files that a line stands in
    for name, lines in distinct.items():
        for line in lines:
            holders[line].append(name)
    copies = []
    for name, text in others.items():
        shared = Counter(holder for line in distinct_lines(text) for holder in holders.get(line, ()))
        if any(2 * count >= len(distinct[holder]) for holder, count in shared.items()):
            copies.append(name)
    return copies


def pieces(text: bytes) -> Iterator[bytes]:
    """The text in order, cut at line ends into the longest pieces of at most PIECE_BYTES; a longer line is cut."""
    while text:
        end = len(text)
        if end > PIECE_BYTES:
            end = text.rfind(b"\n", 0, PIECE_BYTES) + 1 or PIECE_BYTES
        yield text[:end]
        text = text[end:]


def documents(sources: dict[str, bytes]) -> list[bytes]:
    """All pieces of the sources, in the order of the hashes of their names and numbers."""
    found = {
        hashlib.sha256(f"{name}:{number}".encode()).digest(): piece
        for name, text in sources.items()
        for number, piece in enumerate(pieces(text))
    }
    return [piece for _, piece in sorted(found.items())]


def splits(tuning: bool) -> tuple[dict[str, dict[str, bytes]], list[str]]:
    """The sources by shard, validation first, and the names of those that are left out as near copies."""
    by_part = defaultdict(dict)
    for name, text in read_sources().items():
        by_part[part_of(name)][name] = text
    validation = by_part.pop(0, {})
    training = {name: text for part in by_part.values() for name, text in part.items()}
    left_out = sorted(near_copies(validation, training))
    training = {name: text for name, text in training.items() if name not in left_out}
    if not tuning:
        return {VAL_SHARD: validation, TRAIN_SHARD: training}, left_out
    held_out = {name: text for name, text in training.items() if part_of(name) == 1}
    rest = {name: text for name, text in training.items() if name not in held_out}
    return {TUNING_VAL_SHARD: held_out, TUNING_TRAIN_SHARD: rest}, left_out


def shard_bytes(texts: list[bytes]) -> bytes:
    """The complete shard file of these documents: header, then BOS and bytes of each."""
    bos = np.array([BOS], dtype="<u2")
    tokens = np.concatenate([part for text in texts for part in (bos, np.frombuffer(text, np.uint8))], dtype="<u2")
    return shards.shard_header(len(tokens)) + tokens.tobytes()


def build(out: Path, versions: dict[str, str], tuning: bool) -> tuple[dict, bool]:
    """Writes the shards and the sidecar that `out` lacks or has otherwise; returns the sidecar, and whether it wrote.

    Raises ShardError, before it writes anything, where the pinned versions do not give the pinned shards.
    """
    sources, left_out = splits(tuning)
    found = {name: documents(texts) for name, texts in sources.items()}
    contents = {name: shard_bytes(texts) for name, texts in found.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, sha256 in hashes.items():
        if versions == PACKAGES and sha256 != PINNED_SHA256[name]:
            raise ShardError(
                f"{name} made from {' and '.join(PACKAGES)} is not the pinned one: were the installed packages "
                f"modified?\n  SHA-256    {sha256}\n  expected   {PINNED_SHA256[name]}\n"
                f"Nothing was written. Restore the packages: pip install --force-reinstall --no-deps {PINS}"
            )
    shards.refuse_strangers(out, "tuning_" if tuning else "nano_")
    wrote, entries = [], {}
    for name, content in contents.items():
        wrote.append(shards.write(out / name, content))
        tokens, count = (len(content) - shards.HEADER_BYTES) // 2, len(found[name])
        entries[name] = {"sha256": hashes[name], "tokens": tokens, "documents": count}
        entries[name] |= shards.fingerprint(out / name)
    dataset = "nano_tuning" if tuning else "nano" if versions == PACKAGES else "nano of other versions"
    sidecar = {"dataset": dataset, "packages": versions, "left_out": left_out, "bos": BOS, "vocab_size": BOS + 1}
    sidecar["shards"] = entries
    wrote.append(shards.write_json(out / SIDECAR, sidecar))
    return sidecar, any(wrote)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes the shards of the nano track from the sources of two packages that torch needs."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default: nano or nano_tuning)")
    parser.add_argument("--tuning", action="store_true", help="leave the validation files out, hold out others")
    options = parser.parse_args()
    out = options.out or Path(__file__).resolve().parent / ("nano_tuning" if options.tuning else "nano")
    start = time.perf_counter()
    with shards.messages("nano.py"):
        versions = installed_versions()
        with shards.exclusive(out):
            sidecar, wrote = build(out, versions, options.tuning)
    val, train = (entry["tokens"] for entry in sidecar["shards"].values())
    described = " and ".join(f"{name} {version}" for name, version in versions.items())
    print(
        f"nano data: {'wrote' if wrote else 'found'} {val:,} val and {train:,} train tokens of {described} in {out} "
        f"({time.perf_counter() - start:.1f} s)"
    )
    if versions != PACKAGES:
        print(
            f"notice: the nano track is defined by the sources of {PINS}; losses on those of {described} are not "
            "comparable with its target or with other runs."
        )


if __name__ == "__main__":
    main()
