"""What the scripts of this folder share: the shard format, files that are whole or not there, processes, the hub.

A shard is 256 little-endian int32 of header (magic, version, token count, zeros), then the tokens as uint16. Every
document starts with its BOS token.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

if TYPE_CHECKING:  # a call that finds everything should not wait for it
    import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_BOS, GPT2_VOCAB_SIZE = 50256, 50257
SHARD_TOKENS = 100_000_000  # of the public FineWeb shards
MAX_SHARD_TOKENS = 2**31 - 1  # the header has an int32
TEMPORARY_SUFFIX = ".tmp"
HUB_WAITS = (1, 4, 16)  # seconds between attempts at a file of the hub, whose client tries by itself as well

T = TypeVar("T")

# Before huggingface_hub is imported, which would first ask the hub for a list of AI agents, for its User-Agent.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class ShardError(Exception):
    """Something the user can mend. The message says what was found, what was expected and what to do."""


class HubError(ShardError):
    """The Hugging Face hub does not give what is asked of it."""


@contextlib.contextmanager
def messages(script: str, ways_out: str = "") -> Iterator[None]:
    """Ends the script with one message, and not with a traceback, where the body raises. HubErrors have ways out."""
    try:
        yield
    except HubError as error:
        sys.exit(f"data/{script}: error: {error}\n{ways_out}")
    except (ShardError, OSError) as error:
        sys.exit(f"data/{script}: error: {error}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(
            f"data/{script}: error: a worker process has ended: killed, or out of memory? Finished shards are kept: "
            f"run the same command again, with fewer --workers if memory is short ({error})"
        )
    except KeyboardInterrupt:
        print(f"data/{script}: interrupted. Finished shards are kept: the same command goes on", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # at once: threads may be downloading


# ---- the format ----


def shard_header(num_tokens: int) -> bytes:
    """The 1,024 bytes before the tokens. Raises ShardError where the count does not fit into an int32."""
    if not 0 <= num_tokens <= MAX_SHARD_TOKENS:
        raise ShardError(f"a shard of {num_tokens:,} tokens: its header holds at most {MAX_SHARD_TOKENS:,}")
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


def is_whole(path: Path, num_tokens: int) -> bool:
    """Whether the shard is as long as it should be: it got its name only once it was complete and on disk."""
    try:
        return read_shard_header(path) == num_tokens
    except ShardError:
        return False


def amount(text: str) -> int:
    """A positive count, as 1000000, 100M or 1.5G."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMG]?)", text.upper())
    count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else 0
    if count < 1 or count != int(count):
        raise argparse.ArgumentTypeError(f"{text} is not a positive count such as 1000000, 100M or 1.5G")
    return int(count)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def write_json(path: Path, content: dict) -> None:
    """As `new_file`, whose errors it raises."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def write_shard(
    path: Path, parts: Iterable[np.ndarray], bos: int, most: int = MAX_SHARD_TOKENS
) -> dict[str, str | int]:
    """Writes these tokens, each part (n,) little-endian uint16, as one shard; returns its entry of a sidecar.

    Of the parts it takes at most `most` tokens. As `new_file`, whose errors it raises.
    """
    tokens = documents = 0
    with new_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for part in parts:
            part = part[: most - tokens]
            file.write(part.data)
            tokens += len(part)
            documents += int((part == bos).sum())
        file.seek(0)
        file.write(shard_header(tokens))
    return {"sha256": sha256_of(path), "tokens": tokens, "documents": documents, **fingerprint(path)}


def read_sidecar(path: Path, pattern: str, settings: dict) -> dict | None:
    """What stands beside the shards, less the first that is gone or damaged and those after it; None where nothing is.

    It has their "settings" and an entry of "shards" for each. Raises ShardError where it cannot be read, where it is of
    other settings, or where shards (of the glob pattern) have none.
    """
    folder, way = path.parent, "name another --out, or remove what is there"
    if not path.exists():
        if strangers := sorted(folder.glob(pattern)):
            raise ShardError(f"{folder} holds {strangers[0].name}, but no {path.name} that says what it is of: {way}")
        return None
    try:
        sidecar = json.loads(path.read_bytes())
        had, listed, _ = dict(sidecar["settings"]), dict(sidecar["shards"]), sidecar["vocab_size"]
        whole = {name: is_whole(folder / name, entry["tokens"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a record of this version of the script ({error!r}): {way}") from None
    changes = [key for key in had | settings if had.get(key, "") != settings.get(key, "")]
    if changes:
        named = [f"{key} is {had.get(key, 'not there')}, now {settings.get(key, 'not there')}" for key in changes[:5]]
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ShardError(
            f"{folder} holds shards made with other settings, and is left as it is: {'; '.join(named)}{more}. Repeat "
            f"them, {way}"
        )
    if not all(whole.values()):
        print(f"{folder / min(whole, key=whole.get)} is gone or damaged: writing it and those after it again")
    sidecar["shards"] = dict(itertools.takewhile(lambda shard: whole[shard[0]], listed.items()))
    return sidecar


def refuse_strangers(folder: Path, names: Iterable[str]) -> None:
    """Raises ShardError where the folder has other shards than these."""
    if strangers := sorted({path.name for path in folder.glob("*_*_*.bin")} - set(names)):
        raise ShardError(f"{folder} also holds {strangers[0]}, which a run would read as well: name another --out")


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


# ---- processes ----


class Call(NamedTuple):
    """A data set in the sense of torch: by its arguments it has what a function gives or raises for them."""

    function: Callable

    def __getitem__(self, arguments: tuple) -> object:
        try:
            return self.function(*arguments)
        except Exception as error:  # raised in the first process, as it is: torch would add a traceback to its message
            return error


def unchanged(result: T) -> T:
    return result


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(_number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the workers
    # Where that one is killed, torch's own worker would wait for ever to hand over its last result.
    threading.Thread(target=end_with_parent, daemon=True).start()


def map_in_order(function: Callable[..., T], tasks: Iterable[tuple], workers: int, ahead: int) -> Iterator[T]:
    """Yields function(*arguments) of each of `tasks` in order, made by worker processes; one works right here.

    To bound the memory, the results of at most `ahead` tasks per worker are not taken yet. Raises what the function
    raises; where a worker is killed, torch raises a RuntimeError in this process, for which `messages` has words.
    """
    calls = Call(function)
    if workers == 1:
        results = map(calls.__getitem__, tasks)
    else:
        from torch.utils.data import DataLoader

        how = {"batch_size": None, "collate_fn": unchanged, "worker_init_fn": start_worker}
        results = DataLoader(calls, sampler=tasks, num_workers=workers, prefetch_factor=ahead, **how)
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


# ---- the hub ----


def hub_call(what: str, call: Callable[[], T], waits: Iterable[float]) -> T:
    """Result of a call to the Hugging Face hub, made again after each of `waits` (seconds) where that can help.

    Raises HubError where the hub refuses or cannot be reached, ShardError where the disk refuses.
    """
    waits = iter(waits)
    while True:
        try:
            return call()
        except ShardError:
            raise
        except Exception as error:  # hub, HTTP client, TLS and Xet each have their own
            if isinstance(error, OSError) and error.errno:
                raise ShardError(f"{what} was not written: {error.strerror}. Mend that (free space, say)") from error
            status = getattr(getattr(error, "response", None), "status_code", None)
            wait = next(waits, None)
            if wait is None or (status is not None and 400 <= status < 500 and status not in (408, 429)):
                endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
                raise HubError(f"no {what} from {endpoint}: {error or type(error).__name__}") from error
            print(f"{what}: {error}\ntrying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
