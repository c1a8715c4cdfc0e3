"""Writes the shards of the `nano` track: the Python sources of the installed torch wheel, one token per byte.

    python data/nano.py [--out DIR]        # default: data/nano/ beside this script
    python data/nano.py --tuning           # data/nano_tuning/: to choose numbers without the data they are judged on

No network, no account: torch is needed for training anyway, and its sources are the same 45 MB of text for everybody.
Documents are the files `torch/**/*.py` of the wheel, sorted by path; each is the BOS token 256 followed by its bytes. A
twentieth of them is for validation, drawn by the hash of the path. With --tuning those are left out, and another
twentieth of them is taken out of training for validation instead.

torch is located but never imported, which would take seconds.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards import ShardError, exclusive, new_file, sha256_of, shard_header

BOS = 256  # bytes are 0..255
PARTS = 20  # of the documents; part 0 is for validation, part 1 for validation while tuning
VAL_SHARD, TRAIN_SHARD = "nano_val_000000.bin", "nano_train_000001.bin"
TUNING_VAL_SHARD, TUNING_TRAIN_SHARD = "tuning_val_000000.bin", "tuning_train_000001.bin"
SIDECAR = "nano.json"  # torch version, hashes and counts of the shards beside it

PINNED_TORCH = "2.13.0"
PINNED_SHA256 = {
    VAL_SHARD: "5041c48ac805fc457bbb5c745c79952d5b4d3e01c4a0de848e6bdf3e1052b3e7",
    TRAIN_SHARD: "2c47f1d9755de533572482b69c195d546ae20d02f1138511755ee669972f2582",
    TUNING_VAL_SHARD: "37717eb312ada7ae40e35b54dc14d0a5d52fc909ced93a007a85f5407db04393",
    TUNING_TRAIN_SHARD: "83d2ea80047b02659f8b4c07d46b6a74a67fcfa85b934169670ace7aacfcfb1d",
}


def torch_version() -> str:
    """Version of the installed torch without the local part (`+cpu`, `+cu130`): all builds have the same sources."""
    try:
        return importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise ShardError(
            f"torch is not installed for {sys.executable}, and its sources are the data of the nano track: "
            "pip install -r requirements.txt, or name another interpreter (PYTHON=… ./run.sh nano)"
        ) from None


def torch_folder() -> Path:
    """Folder of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ShardError("torch has metadata but no package folder: pip install --force-reinstall -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def source_names(folder: Path) -> list[str]:
    """Sorted posix paths, relative to the torch folder, of the Python files that belong to the wheel.

    The wheel's RECORD lists them, so that a file which somebody dropped into the folder does not change the track.
    Without a RECORD (conda, a distribution's package) everything in the folder counts. `version.py` differs from build
    to build and is left out.
    """
    record = importlib.metadata.distribution("torch").files
    if record:
        names = ["/".join(path.parts[1:]) for path in record if path.parts[0] == "torch" and path.suffix == ".py"]
    else:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    return sorted(name for name in names if name != "version.py")


def read_documents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, text) of every non-empty source file in order of its name.

    Line ends become \\n: the Windows wheel has \\r\\n, and no file of the others has any \\r.
    """
    for name in source_names(folder):
        try:
            text = (folder / name).read_bytes().replace(b"\r\n", b"\n")
        except FileNotFoundError:
            raise ShardError(
                f"{folder / name} belongs to the torch wheel but is gone: "
                f"pip install --force-reinstall --no-deps torch=={torch_version()}"
            ) from None
        if text:
            yield name, text


def part_of(name: str) -> int:
    """The part, of PARTS, of the document of this name (posix path relative to the torch folder)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % PARTS


def shard_of(name: str, tuning: bool) -> str | None:
    """The shard that the document of this name goes into; None: none of them."""
    if not tuning:
        return VAL_SHARD if part_of(name) == 0 else TRAIN_SHARD
    return {0: None, 1: TUNING_VAL_SHARD}.get(part_of(name), TUNING_TRAIN_SHARD)


def shard_bytes(documents: list[bytes]) -> bytes:
    """The complete shard file of these documents: header, then BOS and bytes of each."""
    lengths = np.array([len(text) for text in documents])
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    num_tokens = int(lengths.sum()) + len(documents)
    tokens = np.empty(num_tokens, dtype="<u2")
    is_bos = np.zeros(num_tokens, dtype=bool)
    is_bos[starts] = True
    tokens[is_bos] = BOS
    tokens[~is_bos] = np.frombuffer(b"".join(documents), dtype=np.uint8)
    return shard_header(num_tokens) + tokens.tobytes()


def modified_files(folder: Path) -> list[str]:
    """Paths of the wheel's Python files which are gone or whose SHA-256 is not the one in the wheel's RECORD."""
    modified = []
    for path in importlib.metadata.distribution("torch").files or []:
        if path.parts[0] != "torch" or path.suffix != ".py" or path.hash is None:
            continue
        source = folder.joinpath(*path.parts[1:])
        digest = hashlib.new(path.hash.mode, source.read_bytes()).digest() if source.exists() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != path.hash.value:
            modified.append(path.as_posix())
    return modified


def check_pin(name: str, sha256: str, version: str, folder: Path) -> None:
    """Raises ShardError if this torch version has a pinned shard and `sha256` is not its hash."""
    if version != PINNED_TORCH or sha256 == PINNED_SHA256[name]:
        return
    modified = modified_files(folder)
    culprits = f"\n  modified   {', '.join(modified[:5])}{' …' if len(modified) > 5 else ''}" if modified else ""
    raise ShardError(
        f"{name} made from {folder} is not the pinned one of torch {version}: was the installed torch modified?\n"
        f"  SHA-256    {sha256}\n  expected   {PINNED_SHA256[name]}{culprits}\n"
        f"Nothing was written. Restore it: pip install --force-reinstall --no-deps torch=={version}"
    )


def verified_sidecar(out: Path, version: str, names: tuple[str, str]) -> dict | None:
    """The sidecar if the shards beside it were made from this torch version and have the hashes it gives, else None."""
    try:
        sidecar = json.loads((out / SIDECAR).read_text())
        for name in names:
            sha256 = sidecar["shards"][name]["sha256"]
            if version == PINNED_TORCH and sha256 != PINNED_SHA256[name]:
                return None
            if sha256_of(out / name) != sha256:
                return None
        return sidecar if sidecar["torch"] == version else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build(out: Path, version: str, names: tuple[str, str], tuning: bool) -> dict:
    """Writes both shards and the sidecar into `out`; returns the sidecar."""
    folder = torch_folder()
    documents: dict[str, list[bytes]] = {name: [] for name in names}
    for name, text in read_documents(folder):
        if shard := shard_of(name, tuning):
            documents[shard].append(text)
    sidecar: dict = {"torch": version, "shards": {}}
    contents = {}
    for name, texts in documents.items():
        if not texts:
            raise ShardError(f"{folder} has no Python files for {name}: pip install -r requirements.txt")
        contents[name] = shard_bytes(texts)
        sha256 = hashlib.sha256(contents[name]).hexdigest()
        check_pin(name, sha256, version, folder)
        tokens = len(texts) + sum(map(len, texts))
        sidecar["shards"][name] = {"sha256": sha256, "tokens": tokens, "documents": len(texts)}
    # The sidecar vouches for the shards, so it comes last; killed before that, the next call starts again.
    contents[SIDECAR] = (json.dumps(sidecar, indent=2) + "\n").encode()
    for name, content in contents.items():
        with new_file(out / name) as file:
            file.write(content)
    return sidecar


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes the shards of the nano track from the installed torch's sources."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default: nano or nano_tuning)")
    parser.add_argument("--tuning", action="store_true", help="leave the validation documents out, hold out others")
    options = parser.parse_args()
    names = (TUNING_VAL_SHARD, TUNING_TRAIN_SHARD) if options.tuning else (VAL_SHARD, TRAIN_SHARD)
    out = options.out or Path(__file__).resolve().parent / ("nano_tuning" if options.tuning else "nano")
    start = time.perf_counter()
    try:
        version = torch_version()
        sidecar, verb = verified_sidecar(out, version, names), "found"
        if sidecar is None:
            with exclusive(out):
                sidecar = verified_sidecar(out, version, names)  # another process may have written them meanwhile
                if sidecar is None:
                    sidecar, verb = build(out, version, names, options.tuning), "wrote"
    except (ShardError, OSError) as error:
        sys.exit(f"data/nano.py: error: {error}")
    val, train = (sidecar["shards"][name]["tokens"] for name in names)
    seconds = time.perf_counter() - start
    print(f"nano data: {verb} {val:,} val and {train:,} train tokens of torch {version} in {out} ({seconds:.1f} s)")
    if version != PINNED_TORCH:
        print(
            f"notice: the nano track is defined by the sources of torch {PINNED_TORCH}; losses on those of "
            f"torch {version} are not comparable with its target or with other runs."
        )


if __name__ == "__main__":
    main()
