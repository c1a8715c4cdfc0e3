"""data/fineweb.py as a user starts it, against a writer of the same format that works in memory."""

import argparse
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tokenizers
from conftest import cpu, kill_before_rename, run_process, tiny_options, tiny_track
from hub_server import Fault, HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

import train_gpt
from data import fineweb
from data.fineweb import ShardError

SCRIPT = Path(fineweb.__file__).resolve()
ENCODING = "tiny_of_tests"
UNICODE = [
    "naïve Ω 语言模型 हिन्दी 🙂👩‍👩‍👧 e\u0301 \u2028 \x00 \x7f",
    "a text with <|endoftext|> in it",
    "   ",
    "\n\n\t x  y   \r\n",
    "#" * 5000,
    "x",
]


# A byte-level BPE of any size as a Hugging Face file, and the same tokens as an encoding that tiktoken finds by name.
# The benchmark uses these two as well.


def train_bpe(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, and <|endoftext|> after them, as in GPT-2."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def mergeable_ranks(file: Path) -> dict[bytes, int]:
    """The vocabulary of such a file the way tiktoken has it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in the file
    shifted = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(shifted)}
    vocab = json.loads(file.read_text("utf-8"))["model"]["vocab"]
    return {bytes(byte_of[char] for char in token): rank for token, rank in vocab.items()}


def install_encoding(ranks: dict[bytes, int], folder: Path) -> str:
    """Makes a plugin of tiktoken in `folder`, which belongs on PYTHONPATH; returns the name of its encoding."""
    (folder / "tiktoken_ext").mkdir()
    (folder / "tiktoken_ext" / f"{ENCODING}.py").write_text(f"""
from tiktoken_ext.openai_public import r50k_pat_str

RANKS = {ranks!r}
SPECIAL = {{"<|endoftext|>": {len(ranks)}}}

def construct():
    return {{"name": "{ENCODING}", "pat_str": r50k_pat_str, "mergeable_ranks": RANKS, "special_tokens": SPECIAL}}

ENCODING_CONSTRUCTORS = {{"{ENCODING}": construct}}
""")
    return ENCODING


class Vocabulary:
    """A tokenizer of a thousand merges: as a file, as a plugin in `folder`, and as an object."""

    def __init__(self, folder: Path, texts: list[str]):
        self.folder, self.file, self.bos = folder, folder / "tiny.json", 1256
        train_bpe(texts, self.bos).save(str(self.file))
        ranks = mergeable_ranks(self.file)
        install_encoding(ranks, folder)
        self.encoding = tiktoken.Encoding(
            "truth", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.bos}
        )


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Some megabytes of text: Python sources of torch, and what else a tokenizer may trip over."""
    folder = Path(train_gpt.torch.__file__).parent
    texts = [path.read_text("utf-8") for path in sorted((folder / "_inductor").rglob("*.py"))[::2]]
    rng = random.Random(0)
    pieces = [text[i : i + rng.randrange(1, 6000)] for text in texts for i in range(0, len(text), 3000)]
    texts = [*UNICODE, *pieces, "", *UNICODE]
    assert 2e6 < sum(map(len, texts)) < 12e6, "several batches, but seconds"
    return texts


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory, sources) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("vocabulary"), sources[:400])


def expected(
    texts: list[str], shard_tokens: int, encode: Callable = str.encode, bos: int = 256, limit: int | None = None
) -> dict[str, bytes]:
    """All shards: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens; each document after BOS."""
    tokens = [token for text in texts if text for token in (bos, *encode(text))][:limit]
    files = {}
    for i in range(0, len(tokens), shard_tokens):
        part = tokens[i : i + shard_tokens]
        name = f"fineweb_{'train' if i else 'val'}_{i // shard_tokens:06d}.bin"
        header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
        files[name] = header + struct.pack(f"<{len(part)}H", *part)
    return files


@pytest.fixture(scope="session")
def truth(sources, vocabulary) -> dict[str, bytes]:
    return expected(sources, 75_000, vocabulary.encoding.encode_ordinary, vocabulary.bos)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, sources) -> Path:
    """The sources in two jsonl files, one of them compressed."""
    folder = tmp_path_factory.mktemp("corpus")
    half = len(sources) // 3
    write_documents(folder / "a.jsonl", sources[:half])
    write_documents(folder / "b.jsonl.gz", sources[half:])
    return folder


def write_documents(path: Path, texts: list[str]) -> None:
    """One file of these documents, in the format that its name says; a *.txt takes one."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=50)
    elif path.suffix == ".txt":
        path.write_bytes(texts[0].encode())
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
            for i, text in enumerate(texts):
                file.write(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0).encode() + b"\n")


def command(out: Path, *options) -> list[str]:
    return [sys.executable, str(SCRIPT), "--out", str(out), "--workers", "1", *map(str, options)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def run(out: Path, *options, code: int = 0, env: dict | None = None, **more) -> str:
    """Output of the script, which must end with this exit code and without a traceback."""
    result = subprocess.run(
        command(out, *options), env=env or environment(), capture_output=True, text=True, timeout=300, **more
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("fineweb_*.bin")}


def assert_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Without pytest's attempt to print megabytes."""
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


# What is written


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_those_of_a_naive_writer(tmp_path, corpus, truth, vocabulary, sources, workers):
    """Catches a wrong order of batches, split, BOS, header, special tokens in text, and files read in a wrong order."""
    env = environment(PYTHONPATH=str(vocabulary.folder))
    options = ["--input", corpus / "b.jsonl.gz", corpus, corpus / "a.jsonl", "--tokenizer", ENCODING]
    output = run(tmp_path / "out", *options, "--shard-tokens", "75K", "--workers", workers, env=env)
    assert_same(shards(tmp_path / "out"), truth)
    num_tokens = sum((len(content) - 1024) // 2 for content in truth.values())
    num_documents = sum(1 for text in sources if text)
    assert f"wrote {num_documents:,} documents, {num_tokens:,} tokens in {len(truth)} shards" in output
    assert len(truth) > 8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [".lock", "fineweb.json", "tokens.bin", *truth]
    )


def test_formats_mix_and_fields_have_names(tmp_path):
    """Catches --text-field unused, null documents, blank lines and a last line without its end.

    JSON can also escape half of a surrogate pair, which is no text: U+FFFD takes its place, as tiktoken does it.
    """
    (tmp_path / "a.jsonl").write_text(
        '{"body": "a\\ud83db \\ud83d\\ude42"}\n'
        '{"body": "one", "text": "no"}\n\n{"body": ""}\r\n{"body": null}\n{"body": "two"}'
    )
    table = pyarrow.table(
        {"text": ["no", "no", "no"], "body": pyarrow.array(["three", None, "four"]).dictionary_encode()}
    )
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    large = pyarrow.table({"body": pyarrow.array(["five"], pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("six")
    options = ["--text-field", "body", "--tokenizer", "bytes", "--shard-tokens", "100M"]
    run(tmp_path / "out", "--input", *tmp_path.glob("*.*"), *options)
    texts = ["a\ufffdb 🙂", "one", "two", "three", "four", "five", "six"]
    assert_same(shards(tmp_path / "out"), expected(texts, 100_000_000))


def test_boundaries_of_documents_and_shards(tmp_path):
    """A document that ends with a shard, one of exactly a shard, and one longer than two: none moved or doubled.

    train_gpt must read them, also the shard without any BOS.
    """
    texts = ["v" * 99, "w" * 99, "x" * 250, "y" * 48, "z" * 10]
    write_documents(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    run(out, "--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--shard-tokens", "100")
    wanted = expected(texts, 100)
    assert_same(shards(out), wanted)
    assert [train_gpt.read_shard_header(path) for path in sorted(out.glob("*_train_*"))] == [100, 100, 100, 100, 11]

    track = tiny_track()
    texts = [f"document {i} " * (1 + i % 7) for i in range(400)]
    write_documents(tmp_path / "b.jsonl", [*texts, "x" * 20_000, *texts])
    out = tmp_path / "more"
    run(out, "--input", tmp_path / "b.jsonl", "--tokenizer", "bytes", "--shard-tokens", "6000")
    loader = train_gpt.Loader(track, out, cpu())
    row = loader.next(0)[0]
    tokens = np.array(tokens_of(shards(out), "train"))
    begin = int(np.flatnonzero(tokens == 256)[0])
    length = min(track.schedule.stages[0].max_doc_len, int(np.flatnonzero(tokens[begin + 1 :] == 256)[0]) + 1)
    assert row.inputs[:length].tolist() == tokens[begin : begin + length].tolist()
    assert (
        train_gpt.validation_tokens(track, out)[0].tolist()
        == tokens_of(shards(out), "val")[: track.data.val_tokens + 1]
    )
    for step in range(1, track.schedule.total_steps):
        loader.next(step)


def tokens_of(files: dict[str, bytes], split: str) -> list[int]:
    parts = [np.frombuffer(files[name][1024:], "<u2") for name in sorted(files) if f"_{split}_" in name]
    return np.concatenate(parts).tolist()


def test_a_tokenizers_file(tmp_path, vocabulary, sources):
    """Catches truncation of the file left on, BOS inside documents, and tokens of a post-processor."""
    texts = [*UNICODE, *sources[300:400]]
    plain = tokenizers.Tokenizer.from_file(str(vocabulary.file))
    spiked = tokenizers.Tokenizer.from_file(str(vocabulary.file))
    spiked.enable_truncation(10)
    spiked.enable_padding(length=50)
    spiked.post_processor = tokenizers.processors.TemplateProcessing(
        "$A <|endoftext|>", None, [("<|endoftext|>", 1256)]
    )
    spiked.save(str(tmp_path / "spiked.json"))
    write_documents(tmp_path / "a.jsonl", texts)
    options = ["--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "spiked.json", "--shard-tokens", "50K"]
    run(tmp_path / "out", *options)

    tokens = tokens_of(shards(tmp_path / "out"), "val") + tokens_of(shards(tmp_path / "out"), "train")
    starts = [i for i, token in enumerate(tokens) if token == vocabulary.bos]
    documents = [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert [plain.decode(document) for document in documents] == texts
    assert documents[3] == plain.encode(UNICODE[3]).ids


# Calls after the first


@pytest.fixture
def refusal(monkeypatch, capsys) -> Callable[..., str]:
    """The message with which the script refuses a command; in this process, which saves a start."""

    def run_here(out: Path, *options, code: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", command(out, *options)[1:])
        with pytest.raises(SystemExit) as exit:
            fineweb.main()
        if code == 2:
            assert exit.value.code == 2
            return capsys.readouterr().err
        assert str(exit.value.code).startswith("data/fineweb.py: error: "), "as sys.exit prints it, with exit code 1"
        return exit.value.code

    return run_here


def test_a_finished_folder_says_so(tmp_path):
    """Also without the tokenizer and the library that made it, and quickly: nothing is read or written."""
    write_documents(tmp_path / "a.jsonl", ["abc"] * 100)
    options = ["--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--shard-tokens", 150]
    assert "wrote 100 documents, 400 tokens in 3 shards" in run(tmp_path / "out", *options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    began = time.perf_counter()
    assert "found 100 documents, 400 tokens in 3 shards" in run(tmp_path / "out", *options, "--workers", 7)
    assert time.perf_counter() - began < 5
    assert {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"
    } == before


def test_changed_settings_are_refused(tmp_path, refusal):
    """The message says what differs, and nothing in the folder changes."""
    write_documents(tmp_path / "a.jsonl", ["abc"] * 100)
    out, options = tmp_path / "out", ["--input", tmp_path / "a.jsonl", "--tokenizer", "bytes"]
    run(out, *options, "--shard-tokens", 100)
    before = shards(out)

    def refused(*changed) -> str:
        output = refusal(out, *options, "--shard-tokens", 100, *changed)
        assert "made with other settings" in output
        assert_same(shards(out), before)
        return output

    assert "shard_tokens is 100, now 50" in refused("--shard-tokens", 50)
    assert "tokenizer is bytes, now gpt2" in refused("--tokenizer", "gpt2")
    assert "text_field is text, now id" in refused("--text-field", "id")
    assert "max_document is None, now 2048" in refused("--max-document", 2048)
    write_documents(tmp_path / "b.jsonl", ["abc"] * 100)
    assert "b.jsonl is not there, now 2," in refused("--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    write_documents(tmp_path / "a.jsonl", ["abc"] * 99)
    assert "a.jsonl is 2,590 bytes, now 2,564 bytes" in refused()

    (out / "fineweb.json").unlink()
    assert "nothing beside it says what it is" in refusal(out, *options)
    assert_same(shards(out), before)
    for old in (3, [{"name": "fineweb_val_000000.bin", "tokens": 100}]):
        (out / "fineweb.json").write_text(json.dumps({"shards": old}))
        message = refusal(out, *options)
        assert "is not a record of this version of the script" in message and "or remove what is there" in message
    assert_same(shards(out), before)


# Your own text: one command, without further options


def prose(num_bytes: int, seed: int) -> str:
    """Made-up words in sentences and paragraphs, about as long as English ones, with a few letters of two bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypé", k=rng.randrange(1, 11))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, 2001)]
    paragraphs, size = [], 0
    while size < num_bytes:
        sentences = [" ".join(rng.choices(words, weights, k=rng.randrange(3, 25))) for _ in range(rng.randrange(1, 8))]
        paragraphs.append(" ".join(sentence.capitalize() + "." for sentence in sentences) + "\n\n")
        size += len(paragraphs[-1].encode())
    return "".join(paragraphs)


def naive_cut(text: bytes, most: int) -> list[bytes]:
    """From the longest piece down, byte by byte: after a blank line, else a line, else a space, else a character."""
    rules = [
        lambda end: text[:end].endswith(b"\n") and text[: end - 1].rstrip(b" \t\r").endswith(b"\n"),
        lambda end: text[end - 1] in b"\n",
        lambda end: text[end - 1] in b" \t",
        lambda end: text[end] & 0xC0 != 0x80,
        lambda end: True,
    ]
    found = []
    while len(text) > most:
        end = next(end for rule in rules for end in range(most, 0, -1) if rule(end))
        found.append(text[:end])
        text = text[end:]
    return [*found, text]


def documents_of(files: dict[str, bytes], split: str, bos: int = 256) -> list[list[int]]:
    """Tokens of each document of a split, without BOS."""
    tokens = tokens_of(files, split)
    starts = [i for i, token in enumerate(tokens) if token == bos]
    assert starts[0] == 0
    return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def rows_of_nano(lengths: list[int]) -> int:
    """Rows of 2,049 tokens that documents fill: each gives at most 2,048 or what the row lacks; its rest is skipped."""
    rows = have = 0
    for length in lengths:
        have += min(length, 2048, 2049 - have)
        if have == 2049:
            rows, have = rows + 1, 0
    return rows


@pytest.fixture(scope="session")
def own_texts(tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """A megabyte of the same kind of text in each form: what --input names, and the texts in it."""
    folder = tmp_path_factory.mktemp("own")
    texts = {"txt": [prose(1_000_000, 0)], "folder": [prose(50_000, seed) for seed in range(20)]}
    texts["jsonl"] = [prose(200 + 113 * seed % 5000, seed) for seed in range(380)]
    write_documents(folder / "my.txt", texts["txt"])
    for i, text in enumerate(texts["folder"]):
        (folder / "texts" / f"part{i // 10}").mkdir(parents=True, exist_ok=True)
        write_documents(folder / "texts" / f"part{i // 10}" / f"{i:02d}.txt", [text])
    (folder / "texts" / "notes.md").write_text("a suffix that is not known")
    (folder / "texts" / ".hidden.txt").write_text("hidden")
    write_documents(folder / "my.jsonl", texts["jsonl"])
    names = {"txt": "my.txt", "folder": "texts", "jsonl": "my.jsonl"}
    return {form: (folder / name, texts[form]) for form, name in names.items()}


@pytest.mark.parametrize("form", ["txt", "folder", "jsonl"])
def test_a_megabyte_of_your_own_is_enough_for_nano(tmp_path, own_texts, form):
    """Catches: all of it in the validation shard, the first files alone there, pieces lost, doubled or out of order,
    and pieces so long that a row leaves most of them out."""
    path, texts = own_texts[form]
    output = run(tmp_path / "out", "--input", path, "--tokenizer", "bytes")
    assert "notice" not in output and "for validation: one document in 10\n" in output
    files = shards(tmp_path / "out")
    assert sorted(files) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    val, train = ([bytes(document) for document in documents_of(files, split)] for split in ("val", "train"))
    pieces = [piece for text in texts for piece in naive_cut(text.encode(), 2047)]
    places = {piece: i for i, piece in enumerate(pieces)}
    assert len(places) == len(pieces), "no two are the same"
    where = [places[piece] for piece in val]
    assert where == sorted(where) and sorted(val + train) == sorted(pieces)
    assert [places[piece] for piece in train] == sorted(places[piece] for piece in train)

    assert rows_of_nano([1 + len(piece) for piece in train]) >= 140
    val_tokens = sum(1 + len(piece) for piece in val)
    assert val_tokens >= 16_385 and 0.08 < val_tokens / sum(1 + len(piece) for piece in pieces) < 0.12
    shares = np.histogram(where, bins=10, range=(0, len(pieces)))[0] * 10 / len(pieces)
    assert shares.min() > 0.02 and shares.max() < 0.25, "every stretch of the text has its share"


def test_the_sidecar_says_what_the_shards_are(tmp_path, own_texts):
    """By it a run knows tokens and data: catches a hash of the header as it was before the end was known."""
    out = tmp_path / "out"
    run(out, "--input", own_texts["txt"][0], "--tokenizer", "bytes", "--shard-tokens", "400K")
    record = json.loads((out / "fineweb.json").read_text())
    assert (record["bos"], record["vocab_size"]) == (256, 257)
    assert list(record["shards"]) == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    for name, entry in record["shards"].items():
        content = (out / name).read_bytes()
        tokens = np.frombuffer(content[1024:], "<u2")
        del entry["next"]
        assert entry == {
            "sha256": hashlib.sha256(content).hexdigest(),
            "tokens": len(tokens),
            "documents": np.count_nonzero(tokens == 256),
            "size": len(content),
            "mtime_ns": (out / name).stat().st_mtime_ns,
        }


SMALL_SHARDS = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import fineweb
fineweb.SHARD_TOKENS = 20_000
if __name__ == "__main__":
    fineweb.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("kill_at", [4, 5])
def test_your_own_text_after_kills_and_with_more_workers(tmp_path, sources, kill_at):
    """SIGKILL right before a shard (4th new file of a call) or its entry of the record (5th) gets its name, again and
    again. Catches a restart that draws other documents, or reads on at a wrong byte, row or piece.
    """
    folder, texts = tmp_path / "in", sources[100:200]
    folder.mkdir()
    write_documents(folder / "a.txt", ["".join(texts[:30])])
    write_documents(folder / "b.jsonl.gz", texts[30:60])
    write_documents(folder / "c.parquet", texts[60:])
    script = tmp_path / "small_shards.py"

    def call(out: Path, workers: int, kill_at: int) -> int:
        script.write_text(kill_before_rename(kill_at) + SMALL_SHARDS)
        options = ["--input", folder, "--tokenizer", "bytes", "--workers", workers, "--out", out]
        return subprocess.run([sys.executable, script, *map(str, options)], capture_output=True).returncode

    assert call(tmp_path / "at once", 1, kill_at=0) == 0
    wanted = shards(tmp_path / "at once")
    assert len(wanted) > 5
    pieces = [p for text in ["".join(texts[:30]), *texts[30:]] for p in naive_cut(text.encode(), 2047)]
    found = [bytes(document) for split in ("val", "train") for document in documents_of(wanted, split)]
    assert sorted(found) == sorted(pieces) and len(wanted["fineweb_val_000000.bin"]) < 1024 + 2 * 20_000

    kills = 0
    while code := call(tmp_path / "out", 1 + kills % 3, kill_at):
        assert code == -signal.SIGKILL
        kills += 1
        assert shards(tmp_path / "out").items() <= wanted.items()
    assert kills > 3
    assert_same(shards(tmp_path / "out"), wanted)

    (tmp_path / "out/fineweb_val_000000.bin").unlink()
    assert call(tmp_path / "out", 2, kill_at=0) == 0
    assert_same(shards(tmp_path / "out"), wanted)


@settings(derandomize=True, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["\n", "\n\n", "\r\n", " ", "\t", "word", "é", "語", "🙂", "\n \t\n"]), max_size=60
    ),
    broken=st.binary(max_size=5),
    most=st.integers(4, 40),
)
def test_texts_are_cut_at_the_best_place_that_fits(pieces: list[str], broken: bytes, most: int):
    """Also bytes that are no UTF-8, which have to arrive where they are refused; catches an endless loop there."""
    text = "".join(pieces).encode() + broken * 3 + "".join(pieces).encode()
    assert list(fineweb.cut(text, most)) == naive_cut(text, most)


def test_a_long_text_is_read_a_bit_at_a_time(tmp_path, monkeypatch):
    """Catches a piece that depends on where a read ends."""
    text = prose(30_000, 0).encode()
    (tmp_path / "a.txt").write_bytes(text)
    for size in (1, 299, 1000, 100_000):
        monkeypatch.setattr(fineweb, "PIECE_BYTES", size)
        with open(tmp_path / "a.txt", "rb") as file:
            assert list(fineweb.read_text(file, 300)) == naive_cut(text, 300)


def test_documents_of_other_tokenizers_are_cut_by_tokens(tmp_path, vocabulary):
    """Text of 1 to 5 bytes a token: catches a limit in bytes alone, and a document cut where it did not have to be."""
    texts = [prose(20_000, 0), "語言模型" * 700, "=" * 9000 + prose(5000, 1), "short", "0123456789" * 500]
    write_documents(tmp_path / "a.jsonl", texts)
    options = ["--input", tmp_path / "a.jsonl", "--tokenizer", vocabulary.file, "--shard-tokens", "1M"]
    run(tmp_path / "out", *options, "--max-document", 500)
    documents = documents_of(shards(tmp_path / "out"), "val", vocabulary.bos)
    assert max(map(len, documents)) <= 499
    decoded = [vocabulary.encoding.decode(document) for document in documents]
    assert "".join(decoded) == "".join(texts)
    assert [vocabulary.encoding.encode_ordinary(text) for text in decoded] == documents
    assert "short" in decoded and len(documents) < 2 * sum(map(len, documents)) / 499, "no shorter than they have to be"


@pytest.mark.parametrize("one_in", [2, 3, 4, 5, 6, 7, 10, 22, 50])
def test_what_is_drawn_follows_no_rhythm(one_in: int):
    """Every tenth line would be of one language, say, where a file alternates between two or five."""
    drawn = np.array([fineweb.is_drawn(number, one_in) for number in range(4000 * one_in)])
    assert drawn[0] and (drawn.reshape(-1, one_in).sum(axis=1) == 1).all()
    for period in range(2, 13):
        counts, mean = np.bincount(np.flatnonzero(drawn) % period, minlength=period), 4000 / period
        assert abs(counts - mean).max() < 5.5 * mean**0.5, f"not as if by chance: period {period}"


@pytest.mark.parametrize(
    "size, tokenizer, wanted",
    [
        (1_000_000, "bytes", 10),  # a tenth
        (100_000, "bytes", 4),  # a row of 16,385 and a quarter more
        (1000, "bytes", 2),  # at most half
        (40_000_000, "gpt2", 10),
        (8_000_000, "gpt2", 6),  # a row of 262,145 and a quarter more
        (20_000_000_000, "bytes", 200),  # a shard
        (20_000_000_000, "gpt2", 50),
    ],
)
def test_how_much_is_for_validation(size, tokenizer, wanted):
    assert fineweb.validation_rule([{"name": "a.txt", "size": size}], tokenizer) == wanted


def test_too_little_text_is_said(tmp_path):
    """And not as an error of the writer."""
    write_documents(tmp_path / "a.jsonl", ["", "abc"])
    output = run(tmp_path / "out", "--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", code=1)
    assert "error: the input has no documents, or too few to draw one for validation" in output


# Ends of all kinds


def processes(tag: str) -> list[int]:
    """Those that were started with this environment variable, and are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            if tag.encode() in (folder / "environ").read_bytes().split(b"\0") and not zombie:
                found.append(int(folder.name))
    return found


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Ends what a failed test has left running."""
    yield
    for pid in processes(f"TAG={tmp_path}"):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> object:
    until = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return result


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@linux
@pytest.mark.usefixtures("no_leftovers")
def test_sigkill_and_restart(tmp_path, corpus, truth, vocabulary):
    """Catches half-written files under a final name, a restart at a wrong token."""
    env, out = environment(PYTHONPATH=str(vocabulary.folder), TAG=str(tmp_path)), tmp_path / "out"
    options = ["--input", corpus, "--tokenizer", ENCODING, "--shard-tokens", "75K", "--workers", 2]
    for number in (0, 1, 5):  # shards that are there
        process = subprocess.Popen(command(out, *options), env=env, stderr=subprocess.DEVNULL)
        wait_until(lambda: len([*out.glob("*.bin")]) >= number and out.exists())  # noqa: B023
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert shards(out).items() <= truth.items(), "half-written or wrong"
    run(out, *options, env=env)
    assert_same(shards(out), truth)
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet", ".txt"])
def test_every_format_and_its_restart(tmp_path, suffix):
    """Catches text changed by a reader (line ends, NUL), empty documents let in, a damaged shard kept, a restart that
    reads all again, or from a wrong byte or row."""
    rng = random.Random(1)
    texts = [f"document {i} {rng.random()} é " * rng.randrange(1, 400) for i in range(700)]
    for i in range(len(texts), 0, -9):
        texts.insert(i, ["", *UNICODE][i % (1 + len(UNICODE))])
    if suffix == ".txt":
        for i, text in enumerate(texts):
            write_documents(tmp_path / f"{i:03d}.txt", [text])
    else:
        write_documents(tmp_path / f"a{suffix}", texts[:750])
        write_documents(tmp_path / f"b{suffix}", texts[750:])
    options = ["--input", *tmp_path.glob(f"*{suffix}"), "--tokenizer", "bytes", "--shard-tokens", "700K"]
    out, wanted = tmp_path / "out", expected(texts, 700_000)
    run(out, *options)
    assert_same(shards(out), wanted)
    places = [shard["next"] for shard in json.loads((out / "fineweb.json").read_text())["shards"].values()]
    assert len(places) >= 5 and places.pop() is None
    assert all(skip < 2.5e6 for _, _, skip in places), "tokens made again"
    assert places[-1][:2] > places[2][:2] > [0, 0]
    damaged = out / "fineweb_train_000003.bin"
    if suffix == ".txt":
        damaged.write_bytes(wanted[damaged.name][:-2])
    else:
        damaged.unlink()
    assert f"{damaged} is gone or damaged" in run(out, *options)
    assert_same(shards(out), wanted)


def test_a_disk_that_fills_up(tmp_path):
    """RLIMIT_FSIZE stands in for it. Finished shards stay, what was begun goes, and the next call goes on."""
    texts = [f"document {i}" for i in range(1000)]
    write_documents(tmp_path / "a.jsonl", texts)
    out, options = tmp_path / "out", ["--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--shard-tokens", 4000]
    run(out, *options)
    for path in out.glob("*_train_*.bin"):
        path.unlink()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    output = run(out, *options, code=1, preexec_fn=limit)
    assert "fineweb_train_000001.bin was not written: File too large. Finished files are kept" in output
    assert_same(shards(out), expected(texts, 4000, limit=4000))
    assert not list(out.glob(".*.tmp"))
    run(out, *options)
    assert_same(shards(out), expected(texts, 4000))


def started(tmp_path: Path, corpus: Path, vocabulary: Vocabulary) -> tuple[subprocess.Popen, Path, str]:
    """A run in a session of its own that has written a shard and has many to go."""
    env = environment(PYTHONPATH=str(vocabulary.folder), TAG=str(tmp_path))
    many = [corpus / "a.jsonl"]
    for i in range(8):
        many.append(tmp_path / f"copy{i}.jsonl")
        shutil.copy(corpus / "a.jsonl", many[-1])
    out = tmp_path / "out"
    options = ["--input", *many, "--tokenizer", ENCODING, "--shard-tokens", "75K", "--workers", 2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(out, *options), env=env, start_new_session=True, **pipes)
    wait_until(lambda: (out / "fineweb_val_000000.bin").exists())
    return process, out, f"TAG={tmp_path}"


@linux
@pytest.mark.usefixtures("no_leftovers")
def test_ctrl_c_ends_all(tmp_path, corpus, vocabulary):
    """As from a terminal; catches threads that it waits for, or that answer with a traceback."""
    process, out, tag = started(tmp_path, corpus, vocabulary)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.endswith("data/fineweb.py: interrupted. Finished shards are kept: the same command goes on\n")
    assert "Traceback" not in stderr
    wait_until(lambda: not processes(tag), 10)
    assert 0 <= len(shards(out)) - len(json.loads((out / "fineweb.json").read_text())["shards"]) <= 1
    assert not list(out.glob(".*.tmp"))


@linux
@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_for_one_giant_document(tmp_path, vocabulary, suffix):
    """A few times the document, in all processes together; a list of Python integers would take nine times."""
    size = 100_000_000
    text = "def a_function(of, some, arguments):  # that goes on and on\n" * (size // 60)
    write_documents(tmp_path / f"a{suffix}", [text])
    env = environment(PYTHONPATH=str(vocabulary.folder), TAG=str(tmp_path))
    options = ["--input", tmp_path / f"a{suffix}", "--tokenizer", ENCODING, "--workers", 2]
    process = subprocess.Popen(command(tmp_path / "out", *options), env=env)
    peak = 0
    while process.poll() is None:
        total = 0
        for pid in processes(f"TAG={tmp_path}"):
            with contextlib.suppress(OSError):  # it has just ended
                # Proportional: of pages that processes share, such as torch's, a part each.
                total += 1024 * int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
        peak = max(peak, total)
        time.sleep(0.05)
    assert process.returncode == 0
    print(f"{suffix}: {peak / size:.1f} times the document")
    assert peak < 7 * size


# The hub


HUB = "hf://datasets/HuggingFaceFW/fineweb/sample/10BT"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """Three parquet files of 600 documents in a folder, and others around it, which are not parquet."""
    files = {"README.md": b"x", "sample/10BT/notes.md": b"x", "sample/100BT/000_00000.parquet": b"x"}
    server = HubServer("HuggingFaceFW/fineweb", files | parquet_files(tmp_path, HUB_TEXTS))
    yield server
    server.close()


HUB_TEXTS = [f"document {i} " * 1500 for i in range(600)]  # so that there are shards before the last file


def parquet_files(folder: Path, texts: list[str]) -> dict[str, bytes]:
    files = {}
    for i in range(3):
        write_documents(folder / "one.parquet", texts[i * len(texts) // 3 : (i + 1) * len(texts) // 3])
        files[f"sample/10BT/{i:03d}_00000.parquet"] = (folder / "one.parquet").read_bytes()
    return files


def hub_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    env = environment(HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "hf"))
    return {key: value for key, value in env.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}


def test_the_hub(tmp_path, hub):
    """Catches a wrong order of files, other folders read, a cut answer taken for whole, files kept, a refusal at once
    where the hub is only busy, and a restart that takes another revision."""
    first, last = "sample/10BT/000_00000.parquet", "sample/10BT/002_00000.parquet"
    hub.faults[first] = [Fault(cut_after=5000), Fault(status=503)]
    hub.always[last] = Fault(status=403)
    out, options = tmp_path / "out", ["--input", HUB, "--tokenizer", "bytes", "--shard-tokens", "1M"]
    env = hub_environment(hub, tmp_path)
    output = run(out, *options, code=1, env=env)
    assert f"{last} cannot be read at its row 1: " in output and hub.endpoint in output
    assert "the same command goes on" in output and "HF_ENDPOINT" in output
    assert not hub.faults[first], "both were met"
    wanted = expected(HUB_TEXTS, 1_000_000)
    assert 0 < len(shards(out)) < len(wanted) and shards(out).items() <= wanted.items()

    del hub.always[last]
    hub.revisions["a" * 40] = parquet_files(tmp_path, ["other text"] * 600)
    hub.requests.clear()
    run(out, *options, env=env)
    assert_same(shards(out), wanted)
    assert not [path for _, path in hub.requests if "a" * 40 in path or "/main" in path]
    others = {path.name for path in out.iterdir()} - wanted.keys()
    assert others == {".lock", "fineweb.json", "tokens.bin"}
    assert not [path for path in (tmp_path / "hf").rglob("*.parquet")], "files are not kept"
    assert "found 600 documents" in run(out, *options, env=environment(HF_ENDPOINT="http://127.0.0.1:9"))

    (tmp_path / "other").mkdir()
    write_documents(tmp_path / "other/a.jsonl.gz", ["one", "two"])
    hub.revisions["b" * 40] = {"x/a.jsonl.gz": (tmp_path / "other/a.jsonl.gz").read_bytes()}
    options[1:2] = ["hf://datasets/HuggingFaceFW/fineweb/x/a.jsonl.gz", str(tmp_path / "other")]
    run(tmp_path / "mixed", *options, env=env)
    assert_same(shards(tmp_path / "mixed"), expected(["one", "two"] * 2, 1_000_000))


def test_a_hub_that_cannot_be_reached_or_lacks_the_folder(tmp_path, hub):
    """One message, soon, with the ways out; nothing is written."""
    env = hub_environment(hub, tmp_path)
    for name, endpoint, said in [
        (HUB, "http://127.0.0.1:9", "10BT cannot be listed: "),
        (HUB.replace("fineweb", "finemath"), hub.endpoint, "10BT cannot be listed: "),
        (HUB + "0", hub.endpoint, "10BT0: expected a file .jsonl"),
        (HUB + "/notes.md", hub.endpoint, "notes.md: expected a file .jsonl"),
    ]:
        began, options = time.perf_counter(), ["--input", name, "--tokenizer", "bytes"]
        output = run(tmp_path / "out", *options, code=1, env=env | {"HF_ENDPOINT": endpoint})
        assert said in output and (hub.endpoint == endpoint or "HF_ENDPOINT" in output), output
        assert time.perf_counter() - began < 15
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# How tokens are spelled


def token_bytes(path: Path) -> list[bytes]:
    """What tokens.bin says, read here independently: lengths up to the one at which all bytes are accounted for."""
    numbers = np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()
    size = next(n for n in range(len(numbers) + 1) if n + sum(numbers[:n]) == len(numbers))
    ends = np.cumsum([0, *numbers[:size]])
    return [bytes(numbers[size + a : size + b]) for a, b in itertools.pairwise(ends)]


def metaspace_bpe(texts: list[str]) -> tokenizers.Tokenizer:
    """As Llama's: a space is part of the token after it, bytes where a character is unknown."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, special_tokens=special[:2], show_progress=False)
    trainer.limit_alphabet = 60
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    for name in special[2:]:
        state["model"]["vocab"][name] = len(state["model"]["vocab"])
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def metaspace_unigram(texts: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=800, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("kind", ["tiktoken", "byte level", "metaspace", "unigram", "bytes"])
def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path, vocabulary, sources, kind):
    """Joined, they are what was tokenized: catches characters taken for bytes, lost spaces, BOS and specials spelled,
    numbers that are off by one."""
    texts = [text for text in (*sources[200:260], *UNICODE) if text.strip(" ") == text and "endoftext" not in text]
    out, bos, begin = tmp_path / "out", "<s>", b" "
    match kind:
        case "tiktoken":
            name, bos, begin = ENCODING, "<|endoftext|>", b""
        case "byte level":
            plain = tokenizers.Tokenizer.from_file(str(vocabulary.file))
            plain.add_tokens(["\t\t\t\t", "ganz ä"])
            plain.add_special_tokens(["<pad>"])
            texts.append("x\t\t\t\tganz äy")
            bos, begin = "<|endoftext|>", b""
        case "metaspace":
            plain = metaspace_bpe(texts)
        case "unigram":
            texts = [prose(3000, i).replace("\n", " ").strip().replace("  ", " ") for i in range(5)]
            plain = metaspace_unigram(texts)
        case "bytes":
            name, begin = kind, b""
    if kind not in ("tiktoken", "bytes"):
        name = str(tmp_path / "tokenizer.json")
        plain.save(name)
    write_documents(tmp_path / "a.jsonl", texts)
    options = ["--input", tmp_path / "a.jsonl", "--tokenizer", name, "--bos", bos, "--shard-tokens", "100M"]
    run(out, *options, env=environment(PYTHONPATH=str(vocabulary.folder)))
    spelled, record = token_bytes(out / "tokens.bin"), json.loads((out / "fineweb.json").read_text())
    assert len(spelled) == record["vocab_size"] and spelled[record["bos"]] == b""
    assert train_gpt.read_token_bytes(out, record["vocab_size"]) == spelled
    documents = documents_of(shards(out), "val", record["bos"])
    for text, document in zip(texts, documents, strict=True):
        assert b"".join(spelled[token] for token in document) == begin + text.encode()
    if kind not in ("tiktoken", "bytes"):
        unspelled = {plain.id_to_token(token) for token, text in enumerate(spelled) if not text}
        assert unspelled <= {"<unk>", "<s>", "<pad>", "<|endoftext|>"}
    else:
        assert spelled.count(b"") == 1


def test_word_pieces_are_spelled_with_their_space(tmp_path):
    """`play` and `##play` are other bytes; the decoder of the library joins them in the same way."""
    pieces = ["[UNK]", "[CLS]", "play", "##ing", "##i", "##play", "."]
    plain = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    plain.add_special_tokens(["[UNK]", "[CLS]"])
    plain.decoder = tokenizers.decoders.WordPiece()
    assert fineweb.spelled_by_file(plain) == [b"", b"", b" play", b"ing", b"i", b"play", b"."]


def test_tokens_bin_comes_to_shards_that_are_there(tmp_path):
    """Written by a former version, say: it is added, and nothing else changes."""
    write_documents(tmp_path / "a.jsonl", ["abc"] * 100)
    out, options = tmp_path / "out", ["--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--shard-tokens", 150]
    run(out, *options)
    wanted = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("fineweb*")}
    content = (out / "tokens.bin").read_bytes()
    (out / "tokens.bin").unlink()
    assert "found 100 documents" in run(out, *options)
    assert (out / "tokens.bin").read_bytes() == content
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("fineweb*")} == wanted


# Input that is wrong


SETTINGS = fineweb.Settings("text", "bytes", None, "<|endoftext|>", 100, None)


def broken_input(folder: Path) -> list[tuple[str, str]]:
    """Pattern of an input, and what the message about it must say."""
    good = '{"text": "fine"}\n'
    files = {
        "json.jsonl": (good * 70_000 + "{oops}\n" + good).encode(),  # far enough to be in a later batch
        "utf8.jsonl": (good * 2).encode() + b'{"text": "\xff"}\n',
        "field.jsonl": (good + '{"txt": "misspelt"}\n').encode(),
        "list.jsonl": b"[1, 2]\n",
        "number.jsonl": (good + '{"text": 5}\n').encode(),
        "cut.jsonl.gz": gzip.compress(good.encode() * 70_000)[:300],
        "not.jsonl.gz": b"plain text",
        "utf8.txt": b"caf\xe9",
        "not.parquet": b"PAR1 and so on",
        "suffix.csv": b"a,b\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), folder / "column.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "numbers.parquet")
    (folder / "empty").mkdir()
    (folder / "empty/suffix.csv").write_text("a,b")
    binary = pyarrow.array([b"good", b"\xff"], pyarrow.binary())
    invalid = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), folder / "utf8.parquet")
    return [
        ("json.jsonl", "json.jsonl cannot be read at its line 70001: Expecting property name"),
        ("utf8.jsonl", "utf8.jsonl cannot be read at its line 3: 'utf-8' codec can't decode"),
        ("field.jsonl", "line 2: expected an object with the field text (see --text-field), found b'{\"txt"),
        ("list.jsonl", "line 1: expected an object with the field text (see --text-field), found b'[1, 2]\\n'"),
        ("number.jsonl", "number.jsonl cannot be read at its line 2: expected a text, found a int"),
        ("cut.jsonl.gz", "cut.jsonl.gz cannot be read at its line 6148: Compressed file ended"),
        ("not.jsonl.gz", "not.jsonl.gz cannot be read at its line 1: Not a gzipped file"),
        ("utf8.txt", "utf8.txt cannot be read at its piece 1: 'utf-8' codec can't decode"),
        ("not.parquet", "not.parquet cannot be read at its row 1"),
        ("column.parquet", "row 1: no column text, but id, body: name one with --text-field"),
        ("numbers.parquet", "numbers.parquet cannot be read at its row 1: expected a text, found a int"),
        ("utf8.parquet", "utf8.parquet cannot be read at its row 1: 'utf-8' codec can't decode"),
        ("suffix.csv", "suffix.csv: expected a file .jsonl, .jsonl.gz, .txt, .parquet, or a folder with such files"),
        ("none.jsonl", "none.jsonl: expected a file .jsonl, .jsonl.gz, .txt, .parquet, or a folder with such files"),
        ("empty", "empty: expected a file .jsonl, .jsonl.gz, .txt, .parquet, or a folder with such files"),
    ]


def test_wrong_input_is_named(tmp_path):
    """Catches a message without file and line. Here without processes, which take a second each."""
    for pattern, message in broken_input(tmp_path):
        with pytest.raises(ShardError, match=re.escape(message)):
            files = fineweb.find_files([str(tmp_path / pattern)])
            list(fineweb.read(files, fineweb.Place(), SETTINGS))


def test_wrong_input_is_named_by_the_script(tmp_path):
    """A line in a later batch, and an input without any document; nothing is left of them."""
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    broken = dict(broken_input(tmp_path))
    for i, pattern in enumerate(("json.jsonl", "empty.jsonl")):
        message = broken.get(pattern, "the input has no documents, or too few to draw one for validation: nothing")
        options = ["--input", tmp_path / pattern, "--tokenizer", "bytes"]
        assert message in run(tmp_path / f"out{i}", *options, code=1)
        assert shards(tmp_path / f"out{i}") == {}


def test_wrong_options_are_refused(tmp_path, refusal):
    for options, message in [
        (["--shard-tokens", "0"], "0 is not a positive count"),
        (["--shard-tokens", "many"], "many is not a positive count"),
        (["--shard-tokens", "1.0001K"], "is not a positive count"),
        (["--max-document", "63"], "--max-document 63: expected at least 64"),
    ]:
        assert message in refusal(tmp_path / "out", "--input", "a.txt", *options, code=2)
    (tmp_path / "a.txt").write_text("abc")
    options = ["--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--shard-tokens", "3G"]
    assert "header holds at most 2,147,483,647" in refusal(tmp_path / "out", *options)


@pytest.mark.parametrize(
    "text, count", [("7", 7), ("100M", 100_000_000), ("1g", 10**9), ("1.5K", 1500), ("1_000", 1000)]
)
def test_amounts(text: str, count: int):
    assert fineweb.amount(text) == count


@pytest.mark.parametrize("text", ["", "-1", "0", "1.5", "1T", "M", "1e3"])
def test_wrong_amounts(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        fineweb.amount(text)


def test_tokenizers_that_will_not_do(tmp_path, vocabulary, monkeypatch):
    """Each is refused before any work, with what to do."""
    file = str(vocabulary.file)
    for name, bos, message in [
        ("gpt3", "<|endoftext|>", "tokenizer gpt3 cannot be loaded: Unknown encoding gpt3"),
        (file, "<s>", "<s> is no special token of"),
        (file, "e", "e is no special token of"),
        (str(tmp_path / "none.json"), "x", "none.json cannot be loaded: No such file"),
    ]:
        with pytest.raises(ShardError, match=re.escape(message)):
            fineweb.load_tokenizer(name, bos)
    assert fineweb.load_tokenizer(file, "<|endoftext|>").bos == vocabulary.bos

    large = json.loads(vocabulary.file.read_text("utf-8"))
    large["model"]["vocab"]["an unused token"] = 65_536
    (tmp_path / "large.json").write_text(json.dumps(large))
    with pytest.raises(ShardError, match=r"has 65,537 tokens, but shards hold at most 65,536"):
        fineweb.load_tokenizer(str(tmp_path / "large.json"), "<|endoftext|>")

    for library in ("tiktoken", "tokenizers"):
        monkeypatch.setitem(sys.modules, library, None)
        fineweb.load_tokenizer.cache_clear()
        with pytest.raises(ShardError, match=f"cannot be loaded: .*{library}"):
            fineweb.load_tokenizer({"tiktoken": "gpt2", "tokenizers": file}[library], "<|endoftext|>")
    write_documents(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ShardError, match=r"a\.parquet cannot be read.*pyarrow"):
        list(fineweb.read(fineweb.find_files([str(tmp_path / "a.parquet")]), fineweb.Place(), SETTINGS))


def test_gpt2_without_network_says_the_ways_out(tmp_path):
    write_documents(tmp_path / "a.jsonl", ["x"])
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    env = environment(TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"), **nowhere)
    output = run(tmp_path / "out", "--input", tmp_path / "a.jsonl", code=1, env=env)
    assert (
        "tokenizer gpt2 cannot be loaded" in output and "TIKTOKEN_CACHE_DIR" in output and "--tokenizer FILE" in output
    )


def test_small_trains_on_it(tmp_path, vocabulary, sources):
    """A tiny `small` with another vocabulary and its prediction of prefixes; catches another format of tokens.bin."""
    write_documents(tmp_path / "a.jsonl", sources[:200])
    run(tmp_path / "out", "--input", tmp_path / "a.jsonl", "--tokenizer", vocabulary.file)
    options = [*tiny_options(), "--model.vocab-size", 1257, "--data.bos", 1256, "--sample-tokens", 0, "--device", "cpu"]
    options += ["--data-dir", tmp_path / "out", "--log-dir", tmp_path / "logs", "--max-steps", 3, "--no-warmup"]
    result = run_process([sys.executable, Path(train_gpt.__file__), "small", *options])
    assert result.returncode == 0, result.stderr
    (tmp_path / "out/tokens.bin").unlink()
    result = run_process([sys.executable, Path(train_gpt.__file__), "small", *options])
    assert result.returncode == 1 and "tokens.bin is missing" in result.stderr, "it was read"
