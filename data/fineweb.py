"""Tokenizes documents into shards the way the public FineWeb shards were made: FineWeb itself, or your own text.

    python data/fineweb.py --out DIR --input FOLDER b.txt         # *.jsonl, *.jsonl.gz, *.txt, *.parquet
    python data/fineweb.py --out DIR --input hf://datasets/HuggingFaceFW/fineweb/sample/10BT --shard-tokens 100M
    python data/fineweb.py --help                                 # tokenizer, shard size, threads

The last but one is FineWeb itself, 30 GB of parquet files of the Hugging Face hub, which are read as they are needed
and not kept. HF_ENDPOINT names a mirror of the hub, HF_TOKEN an account with a higher rate limit.

Tokens are those of GPT-2 (pip install tiktoken; for parquet files pyarrow); each document starts with BOS. Shards have
exactly 100M tokens, the last one what is left; documents run on across their boundaries. Documents keep their order:
files sorted by path, and what is inside as it stands; empty ones are skipped.

The first shard is for validation: one document in ten is drawn for it, evenly from all there is: more of a small text,
so that there is a whole validation row, less of a large one, so that a shard holds them. Long documents are cut at
paragraphs (--max-document), each piece a document of its own. With --shard-tokens they are neither drawn nor cut, as
the FineWeb of the hub.

The first thread reads and writes, the others tokenize, and their results are written in the order of reading: the
shards are the same bytes for every number of threads. fineweb.json beside them has their hashes, and where in the input
each next shard begins. The same command goes on from there, with the same bytes, however the one before ended:
of the hub it reads the revision that the first call found. tokens.bin has the bytes of the tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import gzip
import json
import os
import re
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

import shards
from shards import SHARD_TOKENS, ShardError, amount

if TYPE_CHECKING:
    import tokenizers

HUB = "hf://datasets/"
HUB_BLOCK_BYTES = 1 << 24  # fetched at once
HUB_HELP = """Finished shards are kept: the same command goes on, a mirror of the hub is named by HF_ENDPOINT, and files
that `hf download` has fetched are read without network"""
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
BYTES_BOS = 256  # bytes are 0..255
MAX_VOCAB_SIZE = 65_536  # tokens are uint16
PIECE_BYTES = 1 << 18  # read at once from a txt file
PARQUET_ROWS = 64  # read at once: few, as rows can be long
BATCH_BYTES = 1 << 20  # of text to a thread at once: a tenth of a second's work
BATCHES_PER_THREAD = 4  # in flight, so that no thread waits for another one's long document
BYTES_PER_TOKEN, COMPRESSION = 4, 4  # about: of text in GPT-2's tokens, and in *.gz and *.parquet
# Where a long text is cut: after its last blank line, else line, else space, else character, else byte (if no UTF-8).
PLACES = (rb".*\n[ \t\r]*\n(?=.)", rb".*\n(?=.)", rb".*[ \t](?=.)", rb".+(?=[^\x80-\xbf])", rb".+(?=.)")
PLACES = [re.compile(place, re.DOTALL) for place in PLACES]
VAL_ROW = 262_145  # tokens of a validation row of `small` with its last target
VAL_ROW_OF_BYTES = 16_385  # of `nano`


@dataclass(frozen=True)
class Settings:
    """All that the shards depend on beside the input; a folder holds those of one."""

    text_field: str
    tokenizer: str
    tokenizer_sha256: str | None  # of a file
    bos: str
    shard_tokens: int
    max_document: int | None  # tokens, with BOS; None: documents are never cut
    one_in: int | None = None  # documents is for validation, as many as a shard holds; None: the first shard is

    @property
    def max_bytes(self) -> int | None:
        """At which a document is cut before its tokens are known."""
        per_token = 1 if self.tokenizer == "bytes" else BYTES_PER_TOKEN
        return self.max_document and (self.max_document - 1) * per_token


# ---- tokenizers ----


class Tokenizer(NamedTuple):
    encode: Callable[[str], np.ndarray]  # text to tokens (n,) of any integer type, without BOS
    bos: int
    spelled: list[bytes]  # each token of the vocabulary, as `shards.token_bytes` takes it


@functools.cache
def load_tokenizer(name: str, bos_token: str) -> Tokenizer:
    """`bytes`, a Hugging Face tokenizers file (*.json), or any encoding that tiktoken knows, plugins included.

    Raises ShardError where it cannot be had, where its tokens do not fit into uint16, or where it has no such BOS.
    """
    if name == "bytes":
        return Tokenizer(
            lambda text: np.frombuffer(text.encode(), np.uint8), BYTES_BOS, [bytes([i]) for i in range(256)] + [b""]
        )
    try:
        if name.endswith(".json"):
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(name)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True  # a document that contains <|endoftext|> must not be cut there
            encode = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
            bos, spelled = tokenizer.token_to_id(bos_token), spelled_by_file(tokenizer)
        else:
            import tiktoken

            encoding = tiktoken.get_encoding(name)
            # As encode_ordinary, but an array: a list of Python integers takes 15 times the memory.
            encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
            bos, spelled = None, [b""] * (encoding.max_token_value + 1)
            for text in encoding.token_byte_values():
                spelled[encoding.encode_single_token(text)] = text
            if bos_token in encoding.special_tokens_set:
                bos = encoding.encode_single_token(bos_token)
    except Exception as error:  # of the library, an HTTP client, TLS, proxy and disk, each its own
        raise ShardError(
            f"tokenizer {name} cannot be loaded: {error}\nWithout network: copy the folder TIKTOKEN_CACHE_DIR of a "
            "machine where tiktoken has used it, or name a Hugging Face tokenizer.json (--tokenizer FILE; that of the "
            "model gpt2 gives the same tokens), or `bytes`"
        ) from error
    if len(spelled) > MAX_VOCAB_SIZE:
        raise ShardError(f"tokenizer {name} has {len(spelled):,} tokens, but shards hold at most {MAX_VOCAB_SIZE:,}")
    if bos is None or bos in encode(bos_token):
        raise ShardError(
            f"{bos_token} is no special token of {name}, which no text can contain: name one to start documents, --bos"
        )
    spelled[bos] = b""
    return Tokenizer(encode, bos, spelled)


def spelled_by_file(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of each token of a Hugging Face tokenizer; none of special ones and of numbers that no token has."""
    state, added = json.loads(tokenizer.to_str()), tokenizer.get_added_tokens_decoder()
    in_byte_level = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]])
    vocab = tokenizer.get_vocab()
    spelled = [b""] * (1 + max(vocab.values(), default=0))
    for text, token in vocab.items():
        if token in added:
            spelled[token] = b"" if added[token].special else text.encode()
        elif in_byte_level:
            spelled[token] = shards.byte_level(text)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", text):
            spelled[token] = bytes.fromhex(byte[1])
        else:  # the first token of a text can lack the space that it begins with
            spelled[token] = tokenizer.decode([token, token]).removeprefix(tokenizer.decode([token])).encode()
    return spelled


# ---- reading, in the first thread ----


class Place(NamedTuple):
    """Where a shard begins in the source. Any document to start reading from will do: `skip` does the rest."""

    file: int = 0  # of the record's list
    number: int = 0  # of the document in it: of the lines of a jsonl, rows of a parquet, pieces of a txt
    skip: int = 0  # tokens from there on that belong to the shards before


class Document(NamedTuple):
    place: Place
    name: str  # for messages
    text: bytes  # in UTF-8


def cut(text: bytes, max_bytes: int) -> Iterator[bytes]:
    """The text in order, in the longest pieces of at most `max_bytes` that end at the best of PLACES."""
    begin = 0
    while len(text) - begin > max_bytes:
        found = (place.match(text, begin, begin + max_bytes + 1) for place in PLACES)
        end = next(filter(None, found)).end()
        yield text[begin:end]
        begin = end
    yield text[begin:]


def read_text(file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """The pieces of a text file."""
    rest = b""
    while content := file.read(max(PIECE_BYTES, max_bytes)):
        *pieces, rest = cut(rest + content, max_bytes)
        yield from (piece.decode().encode() for piece in pieces)
    yield rest.decode().encode()


def read_lines(file: BinaryIO, field: str) -> Iterator[bytes]:
    """The text of each line of JSON; of a blank one b""."""
    for line in file:
        fields = json.loads(line.decode()) if line.strip() else {field: None}
        if not isinstance(fields, dict) or field not in fields:
            raise ValueError(f"expected an object with the field {field} (see --text-field), found {line[:80]}")
        text = utf8(fields[field])
        del line, fields  # which can have half a gigabyte
        yield text


def read_parquet(file: BinaryIO, column: str) -> Iterator[bytes]:
    """The text of each row."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, buffer_size=1 << 20) as rows:  # buffered: a column of a row group can be gigabytes
        if column not in (names := rows.schema_arrow.names):
            raise ValueError(f"no column {column}, but {', '.join(names)}: name one with --text-field")
        for batch in rows.iter_batches(PARQUET_ROWS, columns=[column]):
            yield from map(utf8, batch.column(0).to_pylist())


def utf8(text: object) -> bytes:
    """A text in UTF-8; b"" for None."""
    if not isinstance(text, str | None):
        raise ValueError(f"expected a text, found a {type(text).__name__}: name another --text-field")
    try:
        return (text or "").encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair: U+FFFD, as tiktoken does
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def opened(name: str) -> BinaryIO:
    """A file of the disk or of the hub."""
    if not name.startswith(HUB):
        return open(name, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(name, "rb", block_size=HUB_BLOCK_BYTES)


def read(files: list[dict], start: Place, settings: Settings) -> Iterator[Document]:
    """The documents of the source from `start` on. Raises ShardError naming the file, and what of it is wrong."""
    for index, file in enumerate(files[start.file :], start.file):
        name = file["name"]
        unit = {".txt": "piece", ".parquet": "row"}.get(Path(name).suffix, "line")
        number = -1  # of the document read last
        try:
            with opened(name) as raw, gzip.open(raw) if name.endswith(".gz") else raw as content:
                if unit == "piece":
                    texts = read_text(content, settings.max_bytes or file["size"] + 1)
                else:
                    texts = (read_parquet if unit == "row" else read_lines)(content, settings.text_field)
                for number, text in enumerate(texts):
                    if (index, number) >= start[:2]:
                        yield Document(Place(index, number), f"{name}, {unit} {number + 1}", text)
        except Exception as error:  # each library has its own
            help_ = f"\n{HUB_HELP}" if name.startswith(HUB) else ""
            raise ShardError(f"{name} cannot be read at its {unit} {number + 2}: {error}{help_}") from error


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents, also of several files, to about BATCH_BYTES."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 100  # so that even a million of empty files are some batches
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- tokenizing, in the others ----


def tokenize(documents: list[Document], settings: Settings, split: str | None) -> tuple[Place, np.ndarray]:
    """Place of these documents, and their tokens (n,) uint16, each after its BOS. Raises ShardError naming the one."""
    tokenizer, parts = load_tokenizer(settings.tokenizer, settings.bos), [np.empty(0, dtype="<u2")]
    for place, name, text in documents:
        try:
            for i, part in enumerate(cut(text, settings.max_bytes or len(text)), start=place.file + place.number):
                if part and (split is None or (split == "val") == is_drawn(i, settings.one_in)):
                    parts += encode(part, tokenizer, settings.max_document)
        except BaseException as error:  # a panic of the libraries' Rust code is no Exception
            raise ShardError(f"{name}: the tokenizer failed on this document: {error}") from None
    return documents[0].place, np.concatenate(parts)


def in_order(tasks: Iterable[tuple], threads: int) -> Iterator[tuple[Place, np.ndarray]]:
    """Yields tokenize(*task) of each task in order. Tokenizers work without Python's lock, so threads will do.

    To bound the memory, the results of at most BATCHES_PER_THREAD tasks per thread are not taken yet.
    """
    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for task in tasks:
            pending.append(pool.submit(tokenize, *task))
            del task  # which can have half a gigabyte
            if len(pending) == BATCHES_PER_THREAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def encode(text: bytes, tokenizer: Tokenizer, most: int | None) -> list[np.ndarray]:
    """BOS and the tokens of a text, of parts of it where they are more than `most`."""
    tokens = tokenizer.encode(text.decode())
    if most is None or 1 + len(tokens) <= most:
        return [np.array([tokenizer.bos], dtype="<u2"), tokens.astype("<u2")]
    parts = cut(text, max(len(text) * (most - 1) // len(tokens), 4))
    return [array for part in parts for array in encode(part, tokenizer, most)]


def is_drawn(number: int, one_in: int) -> bool:
    """Whether a document is for validation: of each run of `one_in` one, by a hash, lest it keep step with the source.

    Of the first run it is the first, so that of a few documents there is one.
    """
    run, place = divmod(number, one_in)
    return place == (zlib.crc32(b"%d" % run) - zlib.crc32(b"0")) % one_in


# ---- writing, in the first thread ----


class TokenStream:
    """The tokens from a place of the source on."""

    def __init__(self, batches: Iterator[tuple[Place, np.ndarray]], skip: int):
        self._batches, self._start, self._tokens, self._used = batches, None, (), 0
        for _ in self.take(skip):
            pass

    @property
    def place(self) -> Place | None:
        """Of the next token; None at the end. Reads on to find out."""
        while self._used == len(self._tokens):
            try:
                self._start, self._tokens = next(self._batches)
            except StopIteration:
                return None
            self._used = 0
        return self._start._replace(skip=self._used)

    def take(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` tokens, or all that are left, array by array."""
        while count > 0 and self.place:
            part = self._tokens[self._used : self._used + count]
            self._used += len(part)
            count -= len(part)
            yield part


def write_shards(path: Path, record: dict, settings: Settings, threads: int) -> None:
    """Writes what the record lacks, and the record, at `path`, after each shard. A drawn validation shard ends it."""
    written, split = record["shards"], None
    if settings.one_in:
        split = "train" if written else "val"
    *_, start = Place(), *(Place(*shard["next"]) for shard in written.values())
    tasks = ((batch, settings, split) for batch in batched(read(record["files"], start, settings)))
    with contextlib.closing(in_order(tasks, threads)) as batches:
        stream = TokenStream(batches, start.skip)
        while stream.place:
            path_of_shard = path.with_name(f"fineweb_{'train' if written else 'val'}_{len(written):06d}.bin")
            parts = stream.take(settings.shard_tokens)
            entry = shards.write_shard(path_of_shard, parts, record["bos"], settings.shard_tokens)
            written[path_of_shard.name] = entry | {"next": Place() if split == "val" else stream.place}
            shards.write_json(path, record)
            print(f"{path_of_shard}: {entry['tokens']:,} tokens", file=sys.stderr)
            if split == "val":
                return
    for shard in [*written.values()][-1:]:  # the end may come right after the validation shard
        shard["next"] = None
    shards.write_json(path, record)


def is_complete(record: dict) -> bool:
    """Whether there is all that the input has."""
    return any(shard["next"] is None for shard in record["shards"].values())


# ---- the run ----


def list_hub(name: str) -> list[dict]:
    """As `find_files`, of the hub; the name of each file has the revision that is found now."""
    try:
        from huggingface_hub import HfApi, HfFileSystem

        system = HfFileSystem()
        place = system.resolve_path(name)
        revision = HfApi().dataset_info(place.repo_id, revision=place.revision).sha
        found = system.find(f"{HUB}{place.repo_id}@{revision}/{place.path_in_repo}", detail=True)
    except Exception as error:  # hub, HTTP client and TLS each have their own
        raise ShardError(f"--input {name} cannot be listed: {error or type(error).__name__}\n{HUB_HELP}") from error
    return [{"name": f"hf://{path}", "size": found[path]["size"], "input": name} for path in found]


def find_files(names: list[str], known: Iterable[dict] = ()) -> list[dict]:
    """Name (absolute path) and size of each file, sorted by name; of a folder, all with a known suffix in and below it.

    Files of the hub are those `known` of this input, if any. Raises ShardError where there is none, or one of another
    suffix.
    """
    files = {}
    for name in names:
        if name.startswith(HUB):
            found = [file for file in known if file.get("input") == name] or list_hub(name)
        else:
            inside = glob.glob(f"{glob.escape(name)}/**", recursive=True) if os.path.isdir(name) else [name]
            paths = [os.path.abspath(path) for path in inside if os.path.isfile(path)]
            found = [{"name": path, "size": os.path.getsize(path)} for path in paths]
        found = {file["name"]: file for file in found if file["name"].endswith(SUFFIXES)}
        if not found:
            raise ShardError(f"--input {name}: expected a file {', '.join(SUFFIXES)}, or a folder with such files")
        files |= found
    return [files[name] for name in sorted(files)]


def validation_rule(files: list[dict], tokenizer: str) -> int:
    """n, where one document in n of these files is for validation."""
    size = sum(file["size"] * (COMPRESSION if file["name"].endswith((".gz", ".parquet")) else 1) for file in files)
    tokens = size if tokenizer == "bytes" else size // BYTES_PER_TOKEN
    full_rows = 4 * tokens // (5 * (VAL_ROW_OF_BYTES if tokenizer == "bytes" else VAL_ROW))  # a quarter to spare
    return max(min(full_rows, 10), 2, -(-tokens // SHARD_TOKENS))


def build(options: argparse.Namespace) -> tuple[dict, bool]:
    """Writes the shards that the folder lacks. Returns the record, and whether there were any."""
    path, drawn = options.out / "fineweb.json", not options.shard_tokens
    files = find_files(options.input, shards.read_json(path).get("files", ()))
    settings = Settings(
        text_field=options.text_field,
        tokenizer=options.tokenizer,
        tokenizer_sha256=shards.sha256_of(options.tokenizer) if options.tokenizer.endswith(".json") else None,
        bos=options.bos,
        shard_tokens=options.shard_tokens or SHARD_TOKENS,
        max_document=options.max_document or ((2048 if options.tokenizer == "bytes" else 8192) if drawn else None),
        one_in=validation_rule(files, options.tokenizer) if drawn else None,
    )
    described = asdict(settings) | {file["name"]: f"{file['size']:,} bytes" for file in files}
    record = shards.read_sidecar(path, described)
    complete, token_bytes = record is not None and is_complete(record), options.out / shards.TOKEN_BYTES
    if complete and token_bytes.exists():
        return record, False
    tokenizer = load_tokenizer(settings.tokenizer, settings.bos)
    shards.write(token_bytes, shards.token_bytes(tokenizer.spelled))
    if record is None:
        record = {"dataset": "--input", "settings": described, "files": files, "shards": {}}
        record |= {"bos": tokenizer.bos, "vocab_size": len(tokenizer.spelled)}
    shards.write_json(path, record)
    while not is_complete(record):
        write_shards(path, record, settings, options.workers)
        if not record["shards"]:
            path.unlink()
            token_bytes.unlink()
            raise ShardError("the input has no documents, or too few to draw one for validation: nothing was written")
    return record, not complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    what = f"files {', '.join(SUFFIXES)}, or folders of them, also of the hub: hf://datasets/…"
    add("--input", nargs="+", required=True, metavar="PATH", help=what)
    add("--text-field", default="text", metavar="NAME", help="field of jsonl, column of parquet (default: text)")
    kinds = "an encoding of tiktoken, `bytes`, or a Hugging Face tokenizers file *.json (default: %(default)s)"
    add("--tokenizer", default="gpt2", metavar="NAME|FILE", help=kinds)
    bos = "before each document (default: %(default)s; of bytes always 256)"
    add("--bos", default="<|endoftext|>", metavar="TOKEN", help=bos)
    add("--shard-tokens", type=amount, metavar="N", help="tokens per shard, as FineWeb (default: 100M)")
    cut = "cut documents of more tokens, or of 4N bytes (default: 8192, as bytes 2048; with --shard-tokens none)"
    add("--max-document", type=amount, metavar="N", help=cut)
    add("--workers", type=amount, default=os.cpu_count(), metavar="K", help="that tokenize (default here: %(default)s)")
    options, start = parser.parse_args(), time.perf_counter()
    if (options.max_document or 64) < 64:
        parser.error(f"--max-document {options.max_document}: expected at least 64")
    with shards.messages("fineweb.py"), shards.exclusive(options.out):
        record, wrote = build(options)
    val, *train = (shard["tokens"] for shard in record["shards"].values())
    documents, one_in = sum(shard["documents"] for shard in record["shards"].values()), record["settings"]["one_in"]
    print(
        f"fineweb data: {'wrote' if wrote else 'found'} {documents:,} documents, {val + sum(train):,} tokens in "
        f"{1 + len(train)} shards in {options.out} ({time.perf_counter() - start:.1f} s), {val:,} for validation"
        + (f": one document in {one_in}" if one_in else "")
    )


if __name__ == "__main__":
    main()
