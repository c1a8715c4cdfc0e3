"""Tokenizes documents into shards the way the public FineWeb shards were made: FineWeb itself, or your own text.

    python data/fineweb.py --out DIR                              # the 10BT sample from the Hugging Face hub
    python data/fineweb.py --out DIR --input FOLDER 'b/*.txt'     # *.jsonl, *.jsonl.gz, *.txt, *.parquet
    python data/fineweb.py --help                                 # tokenizer, limits, shard size, workers

Tokens are those of GPT-2 (tiktoken); each document starts with BOS. Shards have exactly 100M tokens, the last one what
is left; documents run on across their boundaries. Documents keep their order: files sorted by path, and what is inside
as it stands; empty ones are skipped.

The first shard is for validation. Of --input one document in ten is drawn for it, evenly from all there is: more of a
small text, so that there is a whole validation row, less of a large one, so that a shard holds them. Long documents are
cut at paragraphs (--max-document), each piece a document of its own. --shard-tokens or --shards: neither drawn nor cut,
as the FineWeb of the hub.

One process reads, the workers tokenize, and the first process writes their results in the order of reading: the shards
are the same bytes for every number of workers. PREFIX.json beside them has their hashes, and where in the source each
next shard begins. The same command goes on from there, with the same bytes, however the one before ended. HF_ENDPOINT
names a mirror of the hub, HF_TOKEN an account with a higher rate limit.
"""

import argparse
import contextlib
import errno
import functools
import glob
import gzip
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards import (
    HEADER_BYTES,
    SHARD_TOKENS,
    ShardError,
    amount,
    available_cores,
    exclusive,
    fingerprint,
    new_file,
    read_shard_header,
    require_space,
    sha256_of,
    shard_header,
)

REPOS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
SAMPLE_TOKENS = {"10BT": 10_000_000_000, "100BT": 100_000_000_000}  # nominal
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
ENDOFTEXT = "<|endoftext|>"
BYTES_BOS = 256  # bytes are 0..255
MAX_VOCAB_SIZE = 65_536  # tokens are uint16
PIECE_BYTES = 1 << 18  # read at once from a jsonl or txt file
MAX_PIECE_ROWS = 512  # read at once from a parquet file, less where rows are long
BATCH_BYTES = 1 << 20  # of text to a worker at once: a tenth of a second's work
BATCHES_PER_WORKER = 4  # in flight, so that no worker waits for another one's long document
BYTES_PER_TOKEN, COMPRESSION = 4, 4  # about: of text in GPT-2's tokens, and in *.gz and *.parquet
# Where a long text is cut: after its last blank line, else line, else space, else character, else byte (if no UTF-8).
PLACES = (rb".*\n[ \t\r]*\n(?=.)", rb".*\n(?=.)", rb".*[ \t](?=.)", rb".+(?=[^\x80-\xbf])", rb".+(?=.)")
PLACES = [re.compile(place, re.DOTALL) for place in PLACES]
# What a run takes: tokens of a validation row with its last target, and at most of training (a row of `nano` skips what
# does not fit of its last document: at most as much again as it holds).
TAKES = {"nano": (16_385, 120 * 2 * 2049), "small": (262_145, 565_000_000)}
RETRY_SECONDS = (1, 4, 16, 64)  # between attempts to reach the hub, whose client resumes a cut download by itself


# Tokenizers


class Tokenizer(NamedTuple):
    encode: Callable[[str], np.ndarray]  # text to tokens (n,) of any integer type, without BOS
    bos: int
    vocab_size: int


def load_tokenizer(name: str, bos_token: str | None = None) -> Tokenizer:
    """`bytes`, a Hugging Face tokenizers file (*.json), or any encoding that tiktoken knows, plugins included.

    Raises ShardError where it cannot be had, where its tokens do not fit into uint16, or where it has no such BOS.
    """
    if name == "bytes":
        if bos_token is not None:
            raise ShardError(f"--bos {bos_token}: the tokenizer `bytes` always has BOS {BYTES_BOS}: leave --bos out")
        return Tokenizer(lambda text: np.frombuffer(text.encode(), np.uint8), BYTES_BOS, BYTES_BOS + 1)
    token = bos_token or ENDOFTEXT
    encode, bos, vocab_size = (load_file if name.endswith(".json") else load_tiktoken)(name, token)
    if vocab_size > MAX_VOCAB_SIZE:
        raise ShardError(f"tokenizer {name} has {vocab_size:,} tokens, but shards hold at most {MAX_VOCAB_SIZE:,}")
    if bos is None:
        raise ShardError(f"tokenizer {name} has no token {token} to start documents with: name another with --bos")
    if bos in encode(token):
        raise ShardError(
            f"{token} is an ordinary token of {name}: text that contains it would look like a new document. Name a "
            "special token with --bos"
        )
    return Tokenizer(encode, bos, vocab_size)


def load_tiktoken(name: str, bos_token: str) -> tuple[Callable[[str], np.ndarray], int | None, int]:
    """Encoder, BOS and vocabulary size of an encoding of tiktoken."""
    try:
        import tiktoken
    except ImportError:
        raise ShardError(f"tokenizer {name} needs tiktoken: pip install tiktoken") from None
    if name not in (names := tiktoken.list_encoding_names()):
        raise ShardError(f"no tokenizer {name}: expected bytes, a file *.json, or one of tiktoken's {', '.join(names)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # HTTP client, TLS, proxy and disk each have their own; the ways out are the same
        raise ShardError(
            f"tiktoken has no vocabulary of {name} yet and could not download it: {error}\nRun this once with network, "
            "copy the folder TIKTOKEN_CACHE_DIR of a machine where it was used, or name a Hugging Face tokenizer.json "
            "(--tokenizer FILE; that of the model gpt2 gives the same tokens)"
        ) from error
    try:
        bos = encoding.encode_single_token(bos_token)
    except KeyError:
        bos = None
    # As encode_ordinary, but an array: a list of Python integers takes 15 times the memory.
    encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    return encode, bos, encoding.max_token_value + 1


def load_file(name: str, bos_token: str) -> tuple[Callable[[str], np.ndarray], int | None, int]:
    """Encoder, BOS and vocabulary size of a Hugging Face tokenizers file."""
    try:
        import tokenizers
    except ImportError:
        raise ShardError(f"tokenizer {name} needs tokenizers: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(name)
    except Exception as error:  # the library raises plain Exceptions
        raise ShardError(f"{name} is not a file of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that contains <|endoftext|> must not be cut there

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    return encode, tokenizer.token_to_id(bos_token), 1 + max(tokenizer.get_vocab().values(), default=0)


# Reading, in the first process


class Position(NamedTuple):
    """Where a shard begins in the source. Any place to start reading from will do: `skip` does the rest."""

    file: int = 0  # of the record's list
    offset: int = 0  # jsonl: byte of the decompressed text; txt: byte; parquet: row
    number: int = 0  # of the lines of a jsonl, of the pieces of a txt before `offset`
    skip: int = 0  # tokens from there on that belong to the shards before
    split: str | None = None  # "val" or "train", which alone is read; None: all


class Rules(NamedTuple):
    """What a document is, and which ones are for validation."""

    text_field: str
    max_tokens: int | None  # of a document, without BOS; None: it is never cut
    max_bytes: int | None  # at which it is cut before its tokens are known
    one_in: int | None  # documents is for validation


class Piece(NamedTuple):
    """Some documents of one file."""

    path: str
    start: Position
    content: bytes | list  # jsonl: whole lines; parquet, txt: texts
    size: int  # bytes


def cut(text: bytes, max_bytes: int) -> Iterator[bytes]:
    """The text in order, in the longest pieces of at most `max_bytes` that end at the best of PLACES."""
    begin = 0
    while len(text) - begin > max_bytes:
        found = (place.match(text, begin, begin + max_bytes + 1) for place in PLACES)
        end = next(filter(None, found)).end()
        yield text[begin:end]
        begin = end
    yield text[begin:]


def read_text(path: str, start: Position, max_bytes: int) -> Iterator[Piece]:
    with open(path, "rb") as file:
        file.seek(start.offset)
        rest = b""
        while content := file.read(max(PIECE_BYTES, max_bytes)):
            *texts, rest = cut(rest + content, max_bytes)
            size = sum(map(len, texts))
            yield Piece(path, start, texts, size)
            start = start._replace(offset=start.offset + size, number=start.number + len(texts))
        yield Piece(path, start, [rest], len(rest))


def read_jsonl(path: str, start: Position) -> Iterator[Piece]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        file.seek(start.offset)
        while content := file.read(PIECE_BYTES):
            content += file.readline()
            yield Piece(path, start, content, len(content))
            number = start.number + content.count(b"\n")
            start = start._replace(offset=start.offset + len(content), number=number)


def read_parquet(path: str, start: Position, column: str) -> Iterator[Piece]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ShardError(f"{path} needs pyarrow: pip install pyarrow") from None
    with ParquetFile(path, buffer_size=1 << 20) as file:  # buffered: a column of a row group can be gigabytes
        if column not in file.schema_arrow.names:
            raise ShardError(
                f"{path} has no column {column}, but {', '.join(file.schema_arrow.names)}: name one with --text-field"
            )
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups)
        piece_rows = min(max(BATCH_BYTES * file.metadata.num_rows // max(num_bytes, 1), 1), MAX_PIECE_ROWS)
        row = group = 0  # the row group with the first row, which is numbered `row`
        while group < len(groups) and row + groups[group].num_rows <= start.offset:
            row, group = row + groups[group].num_rows, group + 1
        for batch in file.iter_batches(piece_rows, range(group, len(groups)), columns=[column]):
            batch = batch.slice(skipped := min(max(start.offset - row, 0), len(batch)))
            if len(batch):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError as error:
                    first = row + skipped + 1
                    raise ShardError(f"{path}, rows {first} to {row + skipped + len(batch)}: {error}") from error
                yield Piece(path, start._replace(offset=row + skipped), texts, batch.nbytes)
            row += skipped + len(batch)


def read_pieces(files: list[dict], fetch: Callable, start: Position, rules: Rules) -> Iterator[Piece]:
    """The source from `start` on. `fetch(file)` is a context that yields the path of a file.

    Raises ShardError naming the file which cannot be read.
    """
    start = start._replace(skip=0)
    for index in range(start.file, len(files)):
        try:
            with fetch(files[index]) as path:
                if path.endswith(".parquet"):
                    yield from read_parquet(path, start, rules.text_field)
                elif path.endswith(".txt"):
                    yield from read_text(path, start, rules.max_bytes or files[index]["size"] + 1)
                else:
                    yield from read_jsonl(path, start)
        except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are OSError and ValueError
            raise ShardError(f"{files[index]['name']} cannot be read: {error}") from error
        start = Position(index + 1, split=start.split)


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Groups pieces, also of several files, to about BATCH_BYTES."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += piece.size + 100  # so that even a million of empty files are some batches
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Tokenizing, in the workers


def work(connection: Connection, name: str, bos_token: str | None, rules: Rules) -> None:
    """Life of a worker: answers each batch with its tokens, or with the ShardError that they raise, in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    batches: queue.SimpleQueue[list[Piece]] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                batches.put(connection.recv())
        finally:  # the first process is gone, be it by SIGKILL
            os._exit(1)

    # A thread, so that the next batch is here before this one is done, and so that sending it never blocks.
    threading.Thread(target=receive, daemon=True).start()
    tokenizer = load_tokenizer(name, bos_token)
    while True:
        try:
            result = tokenize(batches.get(), tokenizer, rules)
        except ShardError as error:
            result = error
        connection.send(result)
        del result


def tokenize(pieces: list[Piece], tokenizer: Tokenizer, rules: Rules) -> np.ndarray:
    """Tokens (n,) uint16 of the documents of the pieces, each after its BOS. Raises ShardError naming file and line."""
    parts = [np.empty(0, dtype="<u2")]
    while pieces:
        split = pieces[0].start.split
        for where, first, text in documents(pieces.pop(0), rules.text_field):
            try:
                text = text.encode()
            except UnicodeEncodeError:  # JSON can escape half of a surrogate pair: U+FFFD, as tiktoken does
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            try:
                for number, part in enumerate(cut(text, rules.max_bytes or len(text)), first):
                    if split is None or (split == "val") == is_drawn(number, rules.one_in):
                        parts += encode(part, tokenizer, rules.max_tokens)
            except BaseException as error:  # a panic of the libraries' Rust code is no Exception
                raise ShardError(f"{where}: the tokenizer failed on this document: {error}") from None
    return np.concatenate(parts, dtype="<u2", casting="unsafe")


def encode(text: bytes, tokenizer: Tokenizer, max_tokens: int | None) -> list[np.ndarray]:
    """BOS and the tokens of a text, of parts of it where they are more than `max_tokens`."""
    tokens = tokenizer.encode(text.decode())
    if max_tokens is None or len(tokens) <= max_tokens:
        return [np.array([tokenizer.bos]), tokens]
    parts = cut(text, max(len(text) * max_tokens // len(tokens), 4))
    return [array for part in parts for array in encode(part, tokenizer, max_tokens)]


def is_drawn(number: int, one_in: int) -> bool:
    """Whether a document is for validation: of each run of `one_in` one, by a hash, lest it keep step with the source.

    Of the first run it is the first, so that of a few documents there is one.
    """
    run, place = divmod(number, one_in)
    return place == (zlib.crc32(b"%d" % run) - zlib.crc32(b"0")) % one_in


def documents(piece: Piece, text_field: str) -> Iterator[tuple[str, int, str]]:
    """Where it stands, its number, and the text, of each document which is not empty.

    Raises ShardError where one is not text.
    """
    path, start, content, _ = piece
    del piece  # what is done with is let go at once: a document can have half a gigabyte
    if path.endswith(".parquet"):
        for row, text in enumerate(content, start.offset):
            if checked(text, where := f"{path}, row {row + 1}"):
                yield where, start.file + row, text
    elif path.endswith(".txt"):
        for number, text in enumerate(content, start.file + start.number):
            try:
                if text:
                    yield path, number, text.decode()
            except UnicodeDecodeError as error:
                raise ShardError(f"{path} cannot be read as UTF-8: {error}") from None
    else:
        lines, line = content.split(b"\n")[::-1], start.number
        del content
        while lines:
            source, line = lines.pop(), line + 1
            if not source.strip():
                continue
            where = f"{path}, line {line}"
            try:
                source = source.decode()
                fields = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise ShardError(f"{where} is not JSON in UTF-8: {error}") from None
            if not isinstance(fields, dict) or text_field not in fields:
                found = f"the fields {', '.join(fields)}" if isinstance(fields, dict) else f"a {type(fields).__name__}"
                raise ShardError(f"{where}: expected an object with the field {text_field} (see --text-field): {found}")
            del source
            if text := checked(fields.pop(text_field), where):
                yield where, start.file + line - 1, text


def checked(text: object, where: str) -> str | None:
    if text is None or isinstance(text, str):  # none is as good as empty
        return text
    raise ShardError(f"{where}: expected a text, found a {type(text).__name__}: name another --text-field")


# Handing out the work, in the first process. Not by ProcessPoolExecutor: its threads wait forever for the rest of a
# result whose sender was killed, and so would Ctrl-C.


@contextlib.contextmanager
def start_workers(count: int, *settings) -> Iterator[list[Connection]]:
    """Connections to processes that tokenize. None of them is left afterwards, whatever happens."""
    context = multiprocessing.get_context("spawn")  # everywhere: forking a process that has threads (pyarrow) can hang
    connections, processes = [], []
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a starting process inherits
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, *settings), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()  # so that the connection ends with the worker
                connections.append(ours)
        finally:
            signal.signal(signal.SIGINT, handler)
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


class Job:
    """A batch in flight: sent, but its tokens not yet written."""

    def __init__(self, batch: list[Piece]):
        self.start, self.size = batch[0].start, sum(piece.size for piece in batch)
        self.result: np.ndarray | ShardError | None = None


def tokenize_all(batches: Iterator[list[Piece]], workers: list[Connection]) -> Iterator[tuple[Position, np.ndarray]]:
    """Start and tokens of each batch, in order. Of large documents, only one is in flight.

    Raises ShardError where a document is not text, and where a worker ends.
    """
    jobs: deque[Job] = deque()  # in order
    jobs_of: dict[Connection, deque[Job]] = {worker: deque() for worker in workers}
    batch = next(batches, None)
    try:
        while jobs or batch:
            worker = min(workers, key=lambda worker: len(jobs_of[worker]))
            if batch and len(jobs_of[worker]) < 2:  # one at work, one waiting
                job = Job(batch)
                in_flight = sum(other.size for other in jobs)
                if not jobs or in_flight + job.size <= BATCHES_PER_WORKER * len(workers) * BATCH_BYTES:
                    worker.send(batch)
                    jobs.append(job)
                    jobs_of[worker].append(job)
                    batch = next(batches, None)
                    continue
            if jobs[0].result is None:
                for ready in wait([worker for worker in workers if jobs_of[worker]]):
                    jobs_of[ready].popleft().result = ready.recv()
            else:
                job = jobs.popleft()
                if isinstance(job.result, ShardError):
                    raise job.result
                yield job.start, job.result
    except (OSError, EOFError):
        raise ShardError(
            "a worker process has ended: killed, or out of memory? Finished shards are kept: run the same command "
            "again, with fewer --workers if memory is short"
        ) from None


# Writing, in the first process


class TokenStream:
    """The tokens from a position of the source on."""

    def __init__(self, batches: Iterator[tuple[Position, np.ndarray]], skip: int):
        self._batches, self._start = batches, None
        self._tokens, self._used = np.empty(0, dtype="<u2"), 0
        for _ in self.take(skip):
            pass

    def __bool__(self) -> bool:
        """Whether there is another token. Reads on to find out."""
        while self._used == len(self._tokens):
            try:
                self._start, self._tokens = next(self._batches)
            except StopIteration:
                return False
            self._used = 0
        return True

    def take(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` tokens, or all that are left, array by array."""
        while count > 0 and self:
            part = self._tokens[self._used : self._used + count]
            self._used += len(part)
            count -= len(part)
            yield part

    @property
    def position(self) -> Position:
        """Of the next token."""
        return self._start._replace(skip=self._used)


def write_shards(out: Path, record: dict, stream: TokenStream, progress: Callable[[int], object]) -> None:
    """Writes what the record lacks, or its drawn validation shard, and each finished shard into the record."""
    shards, settings, limit = record["shards"], record["settings"], record["limit"]
    drawn = None if shards else settings["validation tokens"]
    while not is_complete(record) and stream:
        left = settings["shard tokens"] if limit is None else limit - total_of(record, "tokens")
        count = min(drawn or settings["shard tokens"], left)
        name = f"{record['prefix']}_{'train' if shards else 'val'}_{len(shards):06d}.bin"
        require_space(out, HEADER_BYTES + 2 * count)
        tokens = documents = 0
        with new_file(out / name) as file:
            file.write(shard_header(count))
            for part in stream.take(count):
                file.write(part)
                tokens += len(part)
                documents += int(np.count_nonzero(part == record["bos"]))
                progress(len(part))
            if tokens < count:  # the source has come to its end
                file.seek(0)
                file.write(shard_header(tokens))
        position = Position(split="train") if drawn else stream.position
        entry = {"sha256": sha256_of(out / name), "tokens": tokens, "documents": documents, **fingerprint(out / name)}
        shards[name] = entry | {"next": position._asdict()}
        record["exhausted"] = tokens < count and not drawn
        save(out, record)
        if drawn:
            return
    if not is_complete(record):
        record["exhausted"] = True
        save(out, record)


# The record: what is written, and where the source goes on


def total_of(record: dict, what: str) -> int:
    return sum(shard[what] for shard in record["shards"].values())


def is_complete(record: dict) -> bool:
    return record["exhausted"] or (record["limit"] is not None and total_of(record, "tokens") >= record["limit"])


def save(out: Path, record: dict) -> None:
    with new_file(out / f"{record['prefix']}.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def load_record(out: Path, prefix: str) -> dict | None:
    """The record in the folder, less the shards which are gone or damaged and those after them; None where none is.

    Raises ShardError where there are shards without a record, or where it cannot be read.
    """
    path = out / f"{prefix}.json"
    if not path.exists():
        if strangers := sorted(out.glob(f"{prefix}_*.bin")):
            raise ShardError(
                f"{out} holds {strangers[0].name}, but no {path.name} that says what it was made from: name another "
                "folder or --prefix, or remove the shards"
            )
        return None
    try:
        record = json.loads(path.read_bytes())
        recorded, record["shards"] = record["shards"], {}
        for name, shard in recorded.items():
            with contextlib.suppress(ShardError):
                if read_shard_header(out / name) == shard["tokens"]:
                    record["shards"][name] = shard
                    continue
            print(f"{out / name} is gone or damaged: writing it and those after it again")
            record["exhausted"] = False
            break
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        way = "name another --out or --prefix, or remove it and its shards"
        raise ShardError(f"{path} is not a record of this version of the script ({error!r}): {way}") from None


def refuse_changes(out: Path, record: dict, settings: dict, files: list[dict] | None, limit: int | None) -> None:
    """Raises ShardError where the folder holds the shards of other settings, files (None: as recorded) or limit.

    Only the limit may be raised, and only where no shard was cut short by it.
    """
    sizes = lambda files: {f"input {file['name']}": f"{file['size']:,} bytes" for file in files}
    old = record["settings"] | sizes(record["files"])
    now = settings | sizes(record["files"] if files is None else files)
    old_limit = record["limit"]
    raised = old_limit is not None and (limit is None or limit > old_limit)
    if not record["exhausted"] and not (raised and old_limit % settings["shard tokens"] == 0):
        old, now = old | {"limit": old_limit}, now | {"limit": limit}
    changes = [key for key in old | now if key not in old or key not in now or old[key] != now[key]]
    changes = [f"{key} is {old.get(key, 'not there')}, now {now.get(key, 'not there')}" for key in changes]
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ShardError(
            f"{out} holds shards made with other settings, and is left as it is: {'; '.join(changes[:5])}{more}. Name "
            "another --out or --prefix, or repeat the settings"
        )


# Sources


def find_files(patterns: list[str]) -> list[dict]:
    """Name (absolute path) and size of each file, sorted by name. Raises ShardError where a pattern has no match.

    Of a folder, all files with a known suffix in it and below it.
    """
    paths = set()
    for pattern in patterns:
        folder = os.path.isdir(pattern)
        wanted = os.path.join(glob.escape(pattern), "**") if folder else pattern
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(wanted, recursive=True)
        matches = [os.path.abspath(path) for path in matches if os.path.isfile(path)]
        matches = [path for path in matches if path.endswith(SUFFIXES) or not folder]
        if not matches:
            raise ShardError(f"--input {pattern} matches no file {', '.join(SUFFIXES)}")
        for path in matches:
            if not path.endswith(SUFFIXES):
                raise ShardError(f"{path}: --input takes {', '.join(SUFFIXES)}; name only those")
        paths.update(matches)
    return [{"name": path, "size": os.path.getsize(path)} for path in sorted(paths)]


def hub_call(what: str, call: Callable):
    """Result of a call to the hub, which is repeated where that can help. Raises ShardError where it does not."""
    for delay in (*RETRY_SECONDS, None):
        try:
            return call()
        except ShardError:
            raise
        except Exception as error:  # hub, HTTP client, TLS and disk each have their own
            status = getattr(getattr(error, "response", None), "status_code", None)
            refused = status is not None and 400 <= status < 500 and status not in (408, 429)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES)
            if delay is None or refused or full:
                endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
                raise ShardError(
                    f"no {what} from {endpoint}: {error}\nFinished shards are kept. Three ways out:\n"
                    "  1. run the same command again: it goes on from there\n"
                    "  2. use a mirror of the hub: HF_ENDPOINT=https://…\n"
                    "  3. tokenize files that you have: --input FOLDER --shard-tokens 100M"
                ) from error
            print(f"{what}: {error}\ntrying again in {delay} s", file=sys.stderr)
            time.sleep(delay)


def list_hub(repo: str, sample: str) -> tuple[str, list[dict]]:
    """Present revision of the dataset, and the files of its sample in that revision."""
    from huggingface_hub import HfApi  # here: its import would slow down every start that does not need it
    from huggingface_hub.hf_api import RepoFile

    api, folder = HfApi(), f"sample/{sample}"

    def listed() -> tuple[str, list[dict]]:
        revision = api.dataset_info(repo).sha
        tree = api.list_repo_tree(repo, folder, repo_type="dataset", revision=revision)
        files = [item for item in tree if isinstance(item, RepoFile) and item.path.endswith(".parquet")]
        return revision, [{"name": file.path, "size": file.size} for file in sorted(files, key=lambda file: file.path)]

    revision, files = hub_call(f"list of {repo}/{folder}", listed)
    if not files:
        raise ShardError(f"{repo} has no parquet files in {folder}, revision {revision}")
    return revision, files


@contextlib.contextmanager
def hub_file(staging: Path, repo: str, revision: str, file: dict) -> Iterator[str]:
    """Path of a file of the hub in the staging folder; it is gone once it was read to its end."""
    from huggingface_hub import hf_hub_download

    name, size = file["name"], file["size"]
    path = staging / name

    def download() -> None:
        for other in staging.rglob("*"):  # what killed downloads leave has new names every time, and is never resumed
            if other != path and other.suffix in (".incomplete", ".parquet"):
                other.unlink()
        if not path.exists():
            require_space(staging, size)
        hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=staging)

    hub_call(name, download)
    if path.stat().st_size != size:
        raise ShardError(f"{path} has {path.stat().st_size:,} bytes, but the hub's list says {size:,}: remove it")
    yield str(path)
    path.unlink()


# The run


def validation_rule(files: list[dict], tokenizer: str, limit: int | None) -> tuple[int, int]:
    """(n, most): one document in n of these files is for validation, and of them the first `most` tokens."""
    size = sum(file["size"] * (COMPRESSION if file["name"].endswith((".gz", ".parquet")) else 1) for file in files)
    tokens = min(size if tokenizer == "bytes" else size // BYTES_PER_TOKEN, limit or size)
    row, _ = TAKES["nano" if tokenizer == "bytes" else "small"]
    full_rows = 4 * tokens // (5 * row)  # with a quarter to spare: documents are long and short
    one_in = max(min(full_rows, 10), 2, -(-tokens // SHARD_TOKENS))
    return one_in, min(SHARD_TOKENS, max(limit // one_in, 1) if limit else SHARD_TOKENS)


def build(out: Path, arguments: argparse.Namespace, settings: dict, files: list[dict] | None) -> tuple[dict, int]:
    """Writes the shards that the folder lacks. Returns the record, and how many tokens were written."""
    record, limit = load_record(out, arguments.prefix), arguments.tokens
    staging = out / f".{arguments.prefix}.staging"  # for files of the hub
    if record is not None:
        refuse_changes(out, record, settings, files, limit)
        record["limit"] = limit
        if is_complete(record):
            shutil.rmtree(staging, ignore_errors=True)
            return record, 0
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.bos)
    if record is None:
        revision, listed = (None, files) if files is not None else list_hub(REPOS[arguments.source], arguments.sample)
        record = {"prefix": arguments.prefix, "settings": settings, "revision": revision, "files": listed}
        record |= {"dataset": settings["source"], "bos": tokenizer.bos, "vocab_size": tokenizer.vocab_size}
        record |= {"limit": limit, "exhausted": False, "shards": {}}
    before = total_of(record, "tokens")
    known = limit or (SAMPLE_TOKENS[arguments.sample] if files is None else 0)
    require_space(out, 2 * max(known - before, 0))
    save(out, record)

    fetch = lambda file: contextlib.nullcontext(file["name"])
    if files is None:
        fetch = functools.partial(hub_file, staging, REPOS[arguments.source], record["revision"])
    most, one_in = settings["max document"] and settings["max document"] - 1, settings["validation one in"]
    width = 1 if arguments.tokenizer == "bytes" else BYTES_PER_TOKEN
    rules = Rules(arguments.text_field, most, most and most * width, one_in)
    num_workers = min(arguments.workers, 1 + sum(file["size"] for file in record["files"]) // BATCH_BYTES)
    from tqdm import tqdm

    options = {"unit": "token", "unit_scale": True, "initial": before, "total": limit}
    with tqdm(desc=arguments.prefix, disable=None, **options) as bar:  # None: only on a terminal
        while not is_complete(record):
            shards = list(record["shards"].values())
            start = Position(**shards[-1]["next"]) if shards else Position(split=one_in and "val")
            with start_workers(num_workers, arguments.tokenizer, arguments.bos, rules) as workers:
                pieces = read_pieces(record["files"], fetch, start, rules)
                stream = TokenStream(tokenize_all(batched(pieces), workers), start.skip)
                write_shards(out, record, stream, bar.update)
    shutil.rmtree(staging, ignore_errors=True)
    if not record["shards"]:
        (out / f"{arguments.prefix}.json").unlink()
        few = ", or too few to draw one for validation" if one_in else ""
        raise ShardError(f"the input has no documents{few}: nothing was written")
    return record, total_of(record, "tokens") - before


def parse_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add("--input", nargs="+", metavar="PATH", help=f"your own files {', '.join(SUFFIXES)}, folders of them, patterns")
    add("--source", choices=REPOS, help="dataset of the hub (default: fineweb)")
    add("--sample", choices=SAMPLE_TOKENS, help="which sample of it (default: 10BT)")
    add("--text-field", default="text", metavar="NAME", help="field of jsonl, column of parquet (default: text)")
    kinds = "an encoding of tiktoken, `bytes`, or a Hugging Face tokenizers file *.json (default: %(default)s)"
    add("--tokenizer", default="gpt2", metavar="NAME|FILE", help=kinds)
    add("--bos", metavar="TOKEN", help=f"token before each document (default: {ENDOFTEXT})")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--tokens", type=amount, metavar="N", help="stop after N tokens (default: all there are)")
    limits.add_argument("--shards", type=amount, metavar="N", help="stop after N shards, the validation shard included")
    add("--shard-tokens", type=amount, metavar="N", help="tokens per shard, as FineWeb (default: 100M)")
    cut = "cut documents of more tokens, or of 4N bytes (default: of --input 8192, as bytes 2048; else none)"
    add("--max-document", type=amount, metavar="N", help=cut)
    add("--prefix", default="fineweb", help="of the file names (default: fineweb)")
    cores = available_cores()
    add("--workers", type=amount, default=cores, metavar="K", help="tokenizing processes (default here: %(default)s)")
    arguments = parser.parse_args()
    if arguments.input and (arguments.source or arguments.sample):
        parser.error("--input names your own files, --source and --sample those of the hub: leave one out")
    arguments.draws = bool(arguments.input) and not arguments.shard_tokens and not arguments.shards
    arguments.shard_tokens = arguments.shard_tokens or SHARD_TOKENS
    if arguments.draws and not arguments.max_document:
        arguments.max_document = 2048 if arguments.tokenizer == "bytes" else 8192
    if (arguments.max_document or 64) < 64:
        parser.error(f"--max-document {arguments.max_document}: expected at least 64")
    if arguments.shard_tokens >= 2**31:
        parser.error(f"--shard-tokens {arguments.shard_tokens:,}: a shard's header holds at most {2**31 - 1:,}")
    if not re.fullmatch(r"\w[\w.-]*", arguments.prefix) or re.search(r"_(train|val)_", arguments.prefix):
        parser.error(f"--prefix {arguments.prefix}: letters, digits and -_. only, and neither _train_ nor _val_")
    if arguments.shards:
        arguments.tokens = arguments.shards * arguments.shard_tokens
    if not arguments.input:
        arguments.source, arguments.sample = arguments.source or "fineweb", arguments.sample or "10BT"
    return arguments


def main() -> None:
    arguments = parse_command()
    start = time.perf_counter()
    try:
        name = arguments.tokenizer
        settings = {
            "source": f"{arguments.source}, sample {arguments.sample}" if arguments.source else "--input",
            "text field": arguments.text_field,
            "tokenizer": f"{Path(name).name}, SHA-256 {sha256_of(Path(name))}" if name.endswith(".json") else name,
            "bos": arguments.bos,
            "shard tokens": arguments.shard_tokens,
            "max document": arguments.max_document,
        }
        files = find_files(arguments.input) if arguments.input else None
        one_in, most = validation_rule(files, name, arguments.tokens) if arguments.draws else (None, None)
        settings |= {"validation one in": one_in, "validation tokens": most}
        with exclusive(arguments.out):
            record, written = build(arguments.out, arguments, settings, files)
    except (ShardError, OSError) as error:
        sys.exit(f"data/fineweb.py: error: {error}")
    except KeyboardInterrupt:
        print("data/fineweb.py: interrupted. Finished shards are kept: the same command goes on", file=sys.stderr)
        sys.exit(130)
    seconds = time.perf_counter() - start
    speed = f"{seconds:.1f} s, {written / seconds:,.0f} tokens/s" if written else f"{seconds:.1f} s"
    val, *train = (shard["tokens"] for shard in record["shards"].values())
    print(
        f"{arguments.prefix} data: {'wrote' if written else 'found'} {total_of(record, 'documents'):,} documents, "
        f"{val + sum(train):,} tokens in {1 + len(train)} shards in {arguments.out} ({speed}), {val:,} for validation"
        + (f": one document in {one_in}" if one_in else "")
    )
    track = "nano" if name == "bytes" else "small"
    row, enough = TAKES[track]
    if val < row or sum(train) < enough:
        print(
            f"notice: a run of {track} takes {row:,} validation tokens or more, here are {val:,}; and up to {enough:,} "
            f"train tokens, here are {sum(train):,}. Fewer steps take less: --schedule.scheduled-steps"
        )


if __name__ == "__main__":
    main()
