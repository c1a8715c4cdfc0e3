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
are the same bytes for every number of workers. fineweb.json beside them has their hashes, and where in the source each
next shard begins. The same command goes on from there, with the same bytes, however the one before ended. Files of the
hub are read as they are needed and not kept; HF_ENDPOINT names a mirror of it, HF_TOKEN an account with a higher rate
limit.
"""

import argparse
import contextlib
import functools
import glob
import gzip
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

import shards
from shards import SHARD_TOKENS, HubError, ShardError, amount

HUB = "hf://datasets/"
HUB_BLOCK_BYTES = 1 << 24  # fetched at once
REPOS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
SAMPLE_TOKENS = {"10BT": 10_000_000_000, "100BT": 100_000_000_000}  # nominal
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
ENDOFTEXT = "<|endoftext|>"
BYTES_BOS = 256  # bytes are 0..255
MAX_VOCAB_SIZE = 65_536  # tokens are uint16
PIECE_BYTES = 1 << 18  # read at once from a txt file
PARQUET_ROWS = 64  # read at once: few, as rows can be long
BATCH_BYTES = 1 << 20  # of text to a worker at once: a tenth of a second's work
BATCHES_PER_WORKER = 4  # in flight, so that no worker waits for another one's long document
BYTES_PER_TOKEN, COMPRESSION = 4, 4  # about: of text in GPT-2's tokens, and in *.gz and *.parquet
# Where a long text is cut: after its last blank line, else line, else space, else character, else byte (if no UTF-8).
PLACES = (rb".*\n[ \t\r]*\n(?=.)", rb".*\n(?=.)", rb".*[ \t](?=.)", rb".+(?=[^\x80-\xbf])", rb".+(?=.)")
PLACES = [re.compile(place, re.DOTALL) for place in PLACES]
# What a run takes: tokens of a validation row with its last target, and at most of training (a row of `nano` skips what
# does not fit of its last document: at most as much again as it holds).
TAKES = {"nano": (16_385, 120 * 2 * 2049), "small": (262_145, 565_000_000)}
WAYS_OUT = """Finished shards are kept. Three ways out:
  1. run the same command again: it goes on from there
  2. use a mirror of the hub: HF_ENDPOINT=https://…
  3. tokenize files that you have: --input FOLDER --shard-tokens 100M"""


@dataclass(frozen=True)
class Settings:
    """All that the shards depend on beside the input; a folder holds those of one."""

    source: str  # "--input", or dataset and sample of the hub
    text_field: str
    tokenizer: str
    tokenizer_sha256: str | None  # of a file
    bos: str | None
    shard_tokens: int
    max_document: int | None  # tokens, with BOS; None: documents are never cut
    one_in: int | None = None  # documents is for validation; None: the first shard is
    val_tokens: int | None = None  # of them, at most

    @property
    def max_bytes(self) -> int | None:
        """At which a document is cut before its tokens are known."""
        per_token = 1 if self.tokenizer == "bytes" else BYTES_PER_TOKEN
        return self.max_document and (self.max_document - 1) * per_token


# ---- tokenizers ----


class Tokenizer(NamedTuple):
    encode: Callable[[str], np.ndarray]  # text to tokens (n,) of any integer type, without BOS
    bos: int
    vocab_size: int


@functools.cache
def load_tokenizer(name: str, bos_token: str | None = None) -> Tokenizer:
    """`bytes`, a Hugging Face tokenizers file (*.json), or any encoding that tiktoken knows, plugins included.

    Raises ShardError where it cannot be had, where its tokens do not fit into uint16, or where it has no such BOS.
    """
    if name == "bytes":
        if bos_token is not None:
            raise ShardError(f"--bos {bos_token}: the tokenizer `bytes` always has BOS {BYTES_BOS}: leave --bos out")
        return Tokenizer(lambda text: np.frombuffer(text.encode(), np.uint8), BYTES_BOS, BYTES_BOS + 1)
    token = bos_token or ENDOFTEXT
    try:
        encode, bos, vocab_size = (load_file if name.endswith(".json") else load_tiktoken)(name, token)
    except ImportError as error:
        library = error.name.partition(".")[0]
        raise ShardError(f"tokenizer {name} needs {library}: pip install {library}") from None
    except Exception as error:  # of the library, an HTTP client, TLS, proxy and disk, each its own
        raise ShardError(
            f"tokenizer {name} cannot be loaded: {error}\nWithout network: copy the folder TIKTOKEN_CACHE_DIR of a "
            "machine where tiktoken has used it, or name a Hugging Face tokenizer.json (--tokenizer FILE; that of the "
            "model gpt2 gives the same tokens), or `bytes`"
        ) from error
    if vocab_size > MAX_VOCAB_SIZE:
        raise ShardError(f"tokenizer {name} has {vocab_size:,} tokens, but shards hold at most {MAX_VOCAB_SIZE:,}")
    if bos is None or bos in encode(token):
        raise ShardError(
            f"{token} is no special token of {name}, which no text can contain: name one with --bos to start documents"
        )
    return Tokenizer(encode, bos, vocab_size)


def load_tiktoken(name: str, bos_token: str) -> tuple[Callable[[str], np.ndarray], int | None, int]:
    """Encoder, BOS and vocabulary size of an encoding of tiktoken."""
    import tiktoken

    encoding = tiktoken.get_encoding(name)
    bos = encoding.encode_single_token(bos_token) if bos_token in encoding.special_tokens_set else None
    # As encode_ordinary, but an array: a list of Python integers takes 15 times the memory.
    return functools.partial(encoding.encode_to_numpy, disallowed_special=()), bos, encoding.max_token_value + 1


def load_file(name: str, bos_token: str) -> tuple[Callable[[str], np.ndarray], int | None, int]:
    """Encoder, BOS and vocabulary size of a Hugging Face tokenizers file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that contains <|endoftext|> must not be cut there
    encode = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    return encode, tokenizer.token_to_id(bos_token), 1 + max(tokenizer.get_vocab().values(), default=0)


# ---- reading, in the first process ----


class Place(NamedTuple):
    """Where a shard begins in the source. Any document to start reading from will do: `skip` does the rest."""

    file: int = 0  # of the record's list
    number: int = 0  # of the document in it: of the lines of a jsonl, rows of a parquet, pieces of a txt
    skip: int = 0  # tokens from there on that belong to the shards before
    split: str | None = None  # "val" or "train", which alone is read; None: all


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
            found = f"the fields {', '.join(fields)}" if isinstance(fields, dict) else f"a {type(fields).__name__}"
            raise ValueError(f"expected an object with the field {field} (see --text-field): {found}")
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
    """A file of this machine, or of the hub, which is read over the network as it is needed."""
    if not name.startswith(HUB):
        return (gzip.open if name.endswith(".gz") else open)(name, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(name, block_size=HUB_BLOCK_BYTES)


def read(files: list[dict], start: Place, settings: Settings) -> Iterator[Document]:
    """The documents of the source from `start` on. Raises ShardError naming the file, and what of it is wrong."""
    for index, (name, size) in enumerate((file["name"], file["size"]) for file in files):
        if index < start.file:
            continue
        unit = {".txt": "piece", ".parquet": "row"}.get(Path(name).suffix, "line")
        number = -1  # of the document read last
        try:
            with opened(name) as file:
                if unit == "piece":
                    texts = read_text(file, settings.max_bytes or size + 1)
                else:
                    texts = (read_parquet if unit == "row" else read_lines)(file, settings.text_field)
                for number, text in enumerate(texts):
                    if (index, number) >= start[:2]:
                        yield Document(Place(index, number), f"{name}, {unit} {number + 1}", text)
        except ImportError as error:
            library = error.name.partition(".")[0]
            raise ShardError(f"{name} needs {library}: pip install {library}") from None
        except Exception as error:  # each library has its own
            if "DataLoader worker" in str(error):  # torch says it of a killed one wherever this process is
                raise
            kind = HubError if name.startswith(HUB) else ShardError
            raise kind(f"{name} cannot be read at its {unit} {number + 2}: {error}") from error


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


# ---- tokenizing, in the workers ----


def tokenize(documents: list[Document], settings: Settings, split: str | None) -> tuple[Place, np.ndarray]:
    """Place of these documents, and their tokens (n,) uint16, each after its BOS. Raises ShardError naming the one."""
    tokenizer, parts = load_tokenizer(settings.tokenizer, settings.bos), [np.empty(0, dtype="<u2")]
    begin = documents[0].place._replace(split=split)
    documents.reverse()
    while documents:
        place, name, text = documents.pop()  # and not kept: it can have half a gigabyte
        try:
            for i, part in enumerate(cut(text, settings.max_bytes or len(text)), start=place.file + place.number):
                if part and (split is None or (split == "val") == is_drawn(i, settings.one_in)):
                    parts += encode(part, tokenizer, settings.max_document)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of the libraries' Rust code is no Exception
            raise ShardError(f"{name}: the tokenizer failed on this document: {error}") from None
        del text
    return begin, np.concatenate(parts)


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


# ---- writing, in the first process ----


class TokenStream:
    """The tokens from a place of the source on."""

    def __init__(self, batches: Iterator[tuple[Place, np.ndarray]], skip: int):
        self._batches, self._start = batches, None
        self._tokens, self._used = np.empty(0, dtype="<u2"), 0
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


def write_shards(path: Path, record: dict, settings: Settings, limit: float, stream: TokenStream) -> None:
    """Writes what the record lacks, or its drawn validation shard, and the record, at `path`, after each."""
    written = record["shards"]
    while stream.place and not is_complete(record, limit):
        drawn = settings.val_tokens if not written else None
        count = min(drawn or settings.shard_tokens, limit - total_of(record, "tokens"))
        name = f"fineweb_{'train' if written else 'val'}_{len(written):06d}.bin"
        entry = shards.write_shard(path.parent / name, stream.take(count), record["bos"])
        written[name] = entry | {"next": Place(split="train") if drawn else stream.place}
        shards.write_json(path, record)
        print(f"{path.parent / name}: {entry['tokens']:,} tokens", file=sys.stderr)
        if drawn:
            return
    for shard in [*written.values()][-1:]:  # the end may come right after the validation shard
        shard["next"] = stream.place
    shards.write_json(path, record)


def total_of(record: dict, what: str) -> int:
    return sum(shard[what] for shard in record["shards"].values())


def is_complete(record: dict, limit: float) -> bool:
    """Whether there are as many tokens as are asked for, or all that the source has."""
    return total_of(record, "tokens") >= limit or any(shard["next"] is None for shard in record["shards"].values())


# ---- sources ----


def find_files(patterns: list[str]) -> list[dict]:
    """Name (absolute path) and size of each file, sorted by name; of a folder, all with a known suffix in and below it.

    Raises ShardError where a pattern matches no file, or one of another suffix.
    """
    paths = set()
    for pattern in patterns:
        folder, wanted = os.path.isdir(pattern), glob.escape(pattern) if os.path.exists(pattern) else pattern
        matches = glob.glob(os.path.join(wanted, "**") if folder else wanted, recursive=True)
        matches = {os.path.abspath(path) for path in matches if os.path.isfile(path)}
        known = {path for path in matches if path.endswith(SUFFIXES)}
        if not known or (known != matches and not folder):
            found = min(matches - known, default="none")
            raise ShardError(f"--input {pattern}: expected files {', '.join(SUFFIXES)}, found {found}")
        paths |= known
    return [{"name": path, "size": os.path.getsize(path)} for path in sorted(paths)]


def list_hub(repo: str, sample: str) -> list[dict]:
    """Name, with the dataset's present revision, and size of each file of its sample."""

    def listed() -> list[dict]:
        from huggingface_hub import HfApi, HfFileSystem

        revision = HfApi().dataset_info(repo).sha
        found = HfFileSystem().glob(f"{HUB}{repo}@{revision}/sample/{sample}/*.parquet", detail=True)
        return [{"name": f"hf://{path}", "size": found[path]["size"]} for path in sorted(found)]

    if files := shards.hub_call(f"list of {repo}/sample/{sample}", listed, waits=()):
        return files
    raise HubError(f"{repo} has no parquet files in sample/{sample}")


# ---- the run ----


def validation_rule(files: list[dict], tokenizer: str, limit: int | None) -> tuple[int, int]:
    """(n, most): one document in n of these files is for validation, and of them the first `most` tokens."""
    size = sum(file["size"] * (COMPRESSION if file["name"].endswith((".gz", ".parquet")) else 1) for file in files)
    tokens = min(size if tokenizer == "bytes" else size // BYTES_PER_TOKEN, limit or size)
    row, _ = TAKES["nano" if tokenizer == "bytes" else "small"]
    full_rows = 4 * tokens // (5 * row)  # with a quarter to spare: documents are long and short
    one_in = max(min(full_rows, 10), 2, -(-tokens // SHARD_TOKENS))
    return one_in, min(SHARD_TOKENS, max(limit // one_in, 1) if limit else SHARD_TOKENS)


def build(options: argparse.Namespace, settings: Settings, files: list[dict] | None) -> tuple[dict, int]:
    """Writes the shards that the folder lacks. Returns the record, and how many tokens were written."""
    out, limit, path = options.out, options.tokens or math.inf, options.out / "fineweb.json"
    described = asdict(settings) | {file["name"]: f"{file['size']:,} bytes" for file in files or ()}
    record = shards.read_sidecar(path, "fineweb_*.bin", described)
    if record is not None:
        for shard in record["shards"].values():
            shard["next"] = shard["next"] and Place(*shard["next"])
        if is_complete(record, limit):
            return record, 0
        *_, last = {"tokens": settings.shard_tokens}, *record["shards"].values()
        if last["tokens"] < settings.shard_tokens and last["next"] != Place(split="train"):
            record["shards"].popitem()  # a lower limit had cut it short: it is written again
    tokenizer = load_tokenizer(settings.tokenizer, settings.bos)
    if record is None:
        files = files or list_hub(REPOS[options.source], options.sample)
        record = {"dataset": settings.source, "settings": described, "files": files}
        record |= {"bos": tokenizer.bos, "vocab_size": tokenizer.vocab_size, "shards": {}}
    before = total_of(record, "tokens")
    known = options.tokens or SAMPLE_TOKENS.get(options.sample, 0)
    shards.require_space(out, 2 * max(known - before, 0))
    shards.write_json(path, record)

    workers = min(options.workers, 1 + sum(file["size"] for file in record["files"]) // BATCH_BYTES)
    while not is_complete(record, limit):
        *_, start = Place(split=settings.one_in and "val"), *(shard["next"] for shard in record["shards"].values())
        tasks = ((batch, settings, start.split) for batch in batched(read(record["files"], start, settings)))
        with contextlib.closing(shards.map_in_order(tokenize, tasks, workers, BATCHES_PER_WORKER)) as tokens:
            write_shards(path, record, settings, limit, TokenStream(tokens, start.skip))
        if not record["shards"]:
            path.unlink()
            few = ", or too few to draw one for validation" if settings.one_in else ""
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
    cores = shards.available_cores()
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
    if arguments.shards:
        arguments.tokens = arguments.shards * arguments.shard_tokens
    if not arguments.input:
        arguments.source, arguments.sample = arguments.source or "fineweb", arguments.sample or "10BT"
    return arguments


def main() -> None:
    arguments = parse_command()
    start, name = time.perf_counter(), arguments.tokenizer
    with shards.messages("fineweb.py", WAYS_OUT):
        files = find_files(arguments.input) if arguments.input else None
        drawn = validation_rule(files, name, arguments.tokens) if arguments.draws else (None, None)
        settings = Settings(
            source=f"{arguments.source}, sample {arguments.sample}" if arguments.source else "--input",
            text_field=arguments.text_field,
            tokenizer=name,
            tokenizer_sha256=shards.sha256_of(Path(name)) if name.endswith(".json") else None,
            bos=arguments.bos,
            shard_tokens=arguments.shard_tokens,
            max_document=arguments.max_document,
            one_in=drawn[0],
            val_tokens=drawn[1],
        )
        with shards.exclusive(arguments.out):
            record, written = build(arguments, settings, files)
    seconds = time.perf_counter() - start
    speed = f"{seconds:.1f} s, {written / seconds:,.0f} tokens/s" if written else f"{seconds:.1f} s"
    val, *train = (shard["tokens"] for shard in record["shards"].values())
    print(
        f"fineweb data: {'wrote' if written else 'found'} {total_of(record, 'documents'):,} documents, "
        f"{val + sum(train):,} tokens in {1 + len(train)} shards in {arguments.out} ({speed}), {val:,} for validation"
        + (f": one document in {settings.one_in}" if settings.one_in else "")
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
