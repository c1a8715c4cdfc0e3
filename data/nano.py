"""Writes the shards of the `nano` track: the Python sources of the installed torch wheel, one token per byte.

    python data/nano.py [--out DIR]        # default: data/nano/ beside this script

No network, no account: torch is needed for training anyway, and its sources are the same 45 MB of text for everybody.
Documents are the files `torch/**/*.py` of the wheel, sorted by path; each is the BOS token 256 followed by its bytes.

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
VAL_ONE_IN = 20  # documents
VAL_SHARD, TRAIN_SHARD = "nano_val_000000.bin", "nano_train_000001.bin"
SIDECAR = "nano.json"  # torch version, hashes and counts of the shards beside it

PINNED_TORCH = "2.13.0"
PINNED_SHA256 = {
    VAL_SHARD: "5041c48ac805fc457bbb5c745c79952d5b4d3e01c4a0de848e6bdf3e1052b3e7",
    TRAIN_SHARD: "2c47f1d9755de533572482b69c195d546ae20d02f1138511755ee669972f2582",
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


def in_validation(name: str) -> bool:
    """Whether the document of this name (posix path relative to the torch folder) is held out for validation."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % VAL_ONE_IN == 0


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


def verified_sidecar(out: Path, version: str) -> dict | None:
    """The sidecar if the shards beside it were made from this torch version and have the hashes it gives, else None."""
    try:
        sidecar = json.loads((out / SIDECAR).read_text())
        for name in (VAL_SHARD, TRAIN_SHARD):
            sha256 = sidecar["shards"][name]["sha256"]
            if version == PINNED_TORCH and sha256 != PINNED_SHA256[name]:
                return None
            if sha256_of(out / name) != sha256:
                return None
        return sidecar if sidecar["torch"] == version else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build(out: Path, version: str) -> dict:
    """Writes both shards and the sidecar into `out`; returns the sidecar."""
    folder = torch_folder()
    documents: dict[str, list[bytes]] = {VAL_SHARD: [], TRAIN_SHARD: []}
    for name, text in read_documents(folder):
        documents[VAL_SHARD if in_validation(name) else TRAIN_SHARD].append(text)
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
    default = Path(__file__).resolve().parent / "nano"
    parser.add_argument(
        "--out", type=Path, default=default, metavar="DIR", help="folder of the shards (default: %(default)s)"
    )
    out = parser.parse_args().out
    start = time.perf_counter()
    try:
        version = torch_version()
        sidecar, verb = verified_sidecar(out, version), "found"
        if sidecar is None:
            with exclusive(out):
                sidecar = verified_sidecar(out, version)  # another process may have written them meanwhile
                if sidecar is None:
                    sidecar, verb = build(out, version), "wrote"
    except (ShardError, OSError) as error:
        sys.exit(f"data/nano.py: error: {error}")
    val, train = (sidecar["shards"][name]["tokens"] for name in (VAL_SHARD, TRAIN_SHARD))
    seconds = time.perf_counter() - start
    print(f"nano data: {verb} {val:,} val and {train:,} train tokens of torch {version} in {out} ({seconds:.1f} s)")
    if version != PINNED_TORCH:
        print(
            f"notice: the nano track is defined by the sources of torch {PINNED_TORCH}; losses on those of "
            f"torch {version} are not comparable with its target or with other runs."
        )


if __name__ == "__main__":
    main()
