"""What the scripts of this folder share: the shard format, files that are whole or not there.

A shard is 256 little-endian int32 of header (magic, version, token count, zeros), then the tokens as uint16. Every
document starts with its BOS token. tokens.bin beside the shards has in the same format how the tokens are spelled.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # a call that finds everything should not wait for it
    import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_BOS, GPT2_VOCAB_SIZE = 50256, 50257
SHARD_TOKENS = 100_000_000  # of the public FineWeb shards
TEMPORARY_SUFFIX = ".tmp"
TOKEN_BYTES = "tokens.bin"

# Before huggingface_hub is imported, which would first ask the hub for a list of AI agents, for its User-Agent.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class ShardError(Exception):
    """Something the user can mend. The message says what was found, what was expected and what to do."""


@contextlib.contextmanager
def messages(script: str) -> Iterator[None]:
    """Ends the script with one message, and not with a traceback, where the body raises."""
    try:
        yield
    except (ShardError, OSError) as error:
        sys.exit(f"data/{script}: error: {error}")
    except KeyboardInterrupt:
        print(f"data/{script}: interrupted. Finished shards are kept: the same command goes on", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # at once: threads may be at work


# ---- the format ----


def shard_header(num_tokens: int) -> bytes:
    """The 1,024 bytes before the tokens. Raises ShardError where the count does not fit into an int32."""
    if num_tokens >= 2**31:
        raise ShardError(f"a shard of {num_tokens:,} tokens: its header holds at most {2**31 - 1:,}")
    return struct.pack("<3i", MAGIC, VERSION, num_tokens).ljust(HEADER_BYTES, b"\0")


def read_shard_header(path: Path) -> int:
    """Token count of a shard. Raises ShardError if magic, version or the file's length differ from the format."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    if len(header) < HEADER_BYTES:
        raise ShardError(f"{path} has {len(header)} bytes, fewer than the {HEADER_BYTES} of a shard's header")
    magic, version, num_tokens = struct.unpack_from("<3i", header)
    if (magic, version) != (MAGIC, VERSION):
        raise ShardError(f"{path} starts with magic {magic}, version {version}; expected {MAGIC}, {VERSION}")
    expected = HEADER_BYTES + 2 * num_tokens
    if num_tokens < 0 or size != expected:
        raise ShardError(f"{path} has {size:,} bytes, but its header of {num_tokens:,} tokens means {expected:,}")
    return num_tokens


def amount(text: str) -> int:
    """A positive count, as 1000000, 100M or 1.5G."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMG]?)", text.upper())
    count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else 0
    if count < 1 or count != int(count):
        raise argparse.ArgumentTypeError(f"{text} is not a positive count such as 1000000, 100M or 1.5G")
    return int(count)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, int]:
    """What a sidecar has of a file beside its SHA-256: while these are the same, nobody has to hash it again."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


# ---- files ----


def publish(temporary: Path, path: Path) -> None:
    """Gives a complete file of the same folder its final name, once its content is on disk."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # the name itself needs its folder on disk; Windows and some shares cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to be written, which has its name only once it is complete and on disk.

    Until then its name is `.NAME.tmp`, which no loader looks for; it is removed if the body raises. The folder must be
    held with `exclusive`. Raises ShardError where the disk refuses (full, quota, read-only).
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
        publish(temporary, path)
    except OSError as error:
        raise ShardError(
            f"{path} was not written: {error.strerror}. Finished files are kept: mend that (free space, say) and run "
            "the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} where there is no such file, or another one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: bytes) -> bool:
    """Sees that the file has this content, as `new_file`; returns whether it had to be written."""
    if path.exists() and path.read_bytes() == content:
        return False
    with new_file(path) as file:
        file.write(content)
    return True


def write_json(path: Path, content: dict) -> bool:
    """As `write`."""
    return write(path, (json.dumps(content, indent=1) + "\n").encode())


def write_shard(path: Path, parts: Iterable[np.ndarray], bos: int, most: int) -> dict[str, str | int]:
    """Writes these tokens, each part (n,) little-endian uint16, as one shard; returns its entry of a sidecar.

    Of the parts it takes at most `most` tokens. As `new_file`, whose errors it raises.
    """
    tokens = documents = 0
    with new_file(path) as file:
        file.write(shard_header(most))  # for now
        for part in parts:
            part = part[: most - tokens]
            file.write(part.data)
            tokens += len(part)
            documents += int((part == bos).sum())
        file.seek(0)
        file.write(shard_header(tokens))
    return {"sha256": sha256_of(path), "tokens": tokens, "documents": documents, **fingerprint(path)}


def token_bytes(spelled: list[bytes]) -> bytes:
    """Content of tokens.bin, by which train_gpt.py knows which tokens begin with which.

    It has the length of each token, then the bytes of all, each a uint16. `spelled` has the bytes of each token of the
    vocabulary, none of BOS and others that no text contains.
    """
    numbers = [*map(len, spelled), *b"".join(spelled)]
    return shard_header(len(numbers)) + struct.pack(f"<{len(numbers)}H", *numbers)


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in `byte_level`
BYTE_OF = {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
BYTE_OF |= {chr(byte): byte for byte in PRINTABLE}


def byte_level(token: str) -> bytes:
    """The bytes of a token as the vocabularies of GPT-2 and its kin print it, one character for each byte.

    None of one with other characters, which no text contains.
    """
    return bytes(BYTE_OF[character] for character in token) if BYTE_OF.keys() >= set(token) else b""


def refuse_strangers(folder: Path, mine: str | tuple[()]) -> None:
    """Raises ShardError where the folder has shards whose names do not start with `mine`."""
    if strangers := sorted(path.name for path in folder.glob("*_*_*.bin") if not path.name.startswith(mine)):
        raise ShardError(
            f"{folder} holds {strangers[0]}, which a run would read as well, and nothing beside it says what it is: "
            "name another --out, or remove what is there"
        )


def read_sidecar(path: Path, settings: dict) -> dict | None:
    """What stands beside the shards, less the first that is gone or damaged and those after it; None where nothing is.

    It has their "settings" and an entry of "shards" for each. Raises ShardError where it cannot be read, where it is of
    other settings, or where the folder has other shards as well.
    """
    folder, way = path.parent, "name another --out, or remove what is there"
    refuse_strangers(folder, f"{path.stem}_" if path.exists() else ())
    if not path.exists():
        return None
    try:
        sidecar = json.loads(path.read_bytes())
        had, listed, _ = dict(sidecar["settings"]), dict(sidecar["shards"]), sidecar["vocab_size"]
        sizes = {name: entry["tokens"] for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a record of this version of the script ({error!r}): {way}") from None
    changes = [
        f"{key} is {had.get(key, 'not there')}, now {settings.get(key, 'not there')}"
        for key in had | settings
        if had.get(key, "") != settings.get(key, "")
    ]
    if changes:
        raise ShardError(
            f"{folder} holds shards made with other settings, and is left as it is: {'; '.join(changes[:5])}. Repeat "
            f"them, {way}"
        )
    sidecar["shards"] = {}
    for name, tokens in sizes.items():  # a shard got its name only once it was complete: its length will do
        try:
            whole = read_shard_header(folder / name) == tokens
        except ShardError:
            whole = False
        if not whole:
            print(f"{folder / name} is gone or damaged: writing it and those after it again")
            break
        sidecar["shards"][name] = listed[name]
    return sidecar


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it against other writers, waiting for them; sweeps what killed ones left behind.

    The lock goes with the process, however that ends. Raises ShardError where the folder cannot be written to.
    """
    from filelock import FileLock, Timeout  # here, so that no call that only reads needs it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that writes into {folder}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise ShardError(f"cannot write into {folder}: {error.strerror}") from error
    try:
        for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises ShardError where the disk of `folder`, which need not exist yet, has fewer bytes free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ShardError(
            f"{folder} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: make room, or name a "
            "folder on another disk"
        )
