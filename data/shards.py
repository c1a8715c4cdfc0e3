"""What the scripts of this folder share: the shard format, files that are whole or not there, processes, the hub.

A shard is 256 little-endian int32 of header (magic, version, token count, zeros), then the tokens as uint16. Every
document starts with its BOS token.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

if TYPE_CHECKING:  # a call that finds everything should not wait for it
    import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_BOS, GPT2_VOCAB_SIZE = 50256, 50257
SHARD_TOKENS = 100_000_000  # of the public FineWeb shards
MAX_SHARD_TOKENS = 2**31 - 1  # the header has an int32
TEMPORARY_SUFFIX = ".tmp"
HUB_WAITS = (1, 4, 16)  # seconds between attempts at a file of the hub, whose client tries by itself as well

T = TypeVar("T")


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


def work(connection: Connection) -> None:
    """Life of a worker: answers each (function, arguments), until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the workers
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments = connection.recv()
            try:
                answer = function(*arguments), None
            except Exception as error:
                answer = None, error
            del arguments  # they, and the answer, can be large
            connection.send(answer)
            del answer


def map_in_order(
    function: Callable[..., T], tasks: Iterable[tuple[int, tuple]], workers: int, most: int
) -> Iterator[T]:
    """Yields function(*arguments) of each (size, arguments) in order, made by worker processes; one works right here.

    To bound the memory, tasks whose results are not taken yet have at most `most` size together, or are one. Raises
    what the function raises, and ShardError where a worker is killed. To be closed (contextlib.closing) by its user.
    """
    if workers == 1:
        yield from (function(*arguments) for _, arguments in tasks)
        return
    # A thread and a pipe for each process, as ProcessPoolExecutor waits forever for the rest of a result whose sender
    # was killed. Spawned everywhere: a fork would copy the threads' locks of this process, but not the threads.
    context, pool = multiprocessing.get_context("spawn"), ThreadPoolExecutor(workers)
    idle, processes = queue.SimpleQueue(), []
    pending, in_flight = deque(), 0

    def call(arguments: tuple) -> T:
        connection = idle.get()
        try:
            connection.send((function, arguments))
            result, error = connection.recv()
        except (EOFError, OSError):
            raise ShardError(
                "a worker process has ended: killed, or out of memory? Finished shards are kept: run the same command "
                "again, with fewer --workers if memory is short"
            ) from None
        finally:
            idle.put(connection)
        if error:
            raise error
        return result

    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a starting process inherits
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs,), daemon=True))
            processes[-1].start()
            theirs.close()  # so that the pipe ends with the worker
            idle.put(ours)
        signal.signal(signal.SIGINT, handler)
        for size, arguments in tasks:
            while pending and in_flight + size > most:
                done, future = pending.popleft()
                yield future.result()
                in_flight -= done
            pending.append((size, pool.submit(call, arguments)))
            in_flight += size
        while pending:
            yield pending.popleft()[1].result()
    finally:
        for process in processes:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


# ---- the hub ----


def hub_call(what: str, call: Callable[[], T], waits: Iterable[float]) -> T:
    """Result of a call to the Hugging Face hub, made again after each of `waits` (seconds) where that can help.

    Raises HubError where the hub refuses or cannot be reached, ShardError where the disk refuses.
    """
    # Before its import, which `call` should do: else huggingface_hub would first ask the hub for a list of AI agents,
    # for its User-Agent.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
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
