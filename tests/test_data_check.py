"""data/check.py as a user starts it, on made shards whose documents are known."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shard

from data import check

SCRIPT = Path(check.__file__).resolve()
BOS = 50256


def documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random GPT-2 documents of these lengths, BOS included."""
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(0, BOS, length - 1).tolist()] for length in lengths]


def flat(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def run(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def row(output: str, path: Path) -> list[str]:
    """Columns of the line of a shard: tokens, documents, BOS per 1,000, seen before, quantiles, max."""
    (line,) = (line for line in output.splitlines() if line.startswith(str(path)))
    return line[len(str(path)) :].replace(",", "").split()


def test_the_table_counts_documents_and_their_lengths(tmp_path: Path):
    """Catches documents cut wrongly at the first, the last or any BOS, and quantiles of anything but their lengths."""
    lengths = [1, 2, *range(10, 208), check.CHUNK, 5000]
    tail_of_an_earlier_document = [1, 2, 3]
    tokens = tail_of_an_earlier_document + flat(documents(lengths))
    path = write_shard(tmp_path / "a_train_000001.bin", tokens)
    columns = row(run(path).stdout, path)
    assert columns[:2] == [str(len(tokens)), str(len(lengths))]
    assert float(columns[2]) == pytest.approx(1000 * len(lengths) / len(tokens), abs=1e-3)
    assert columns[3] == "0.00%"
    assert [int(c) for c in columns[4:]] == [round(np.quantile(lengths, q)) for q in check.QUANTILES] + [check.CHUNK]


def test_the_bytes_of_tokens_are_no_documents(tmp_path: Path):
    """`DIR/*.bin` has tokens.bin, too: catches one refused for want of a BOS, and a cut one let through."""
    shard = write_shard(tmp_path / "a_train_000001.bin", flat(documents([10, 20])))
    spelled = write_shard(tmp_path / "tokens.bin", [1, 2, 0, 65_000, 66, 67])
    assert str(spelled) not in run(shard, spelled).stdout
    spelled.write_bytes(spelled.read_bytes()[:-1])
    assert "1 of 2 shards are damaged" in run(shard, spelled, code=1).stderr


def test_repeated_documents_are_counted_in_and_across_shards(tmp_path: Path):
    """A repeat differs from a document with the same beginning, length or tokens in another order."""
    a, b, c, d = documents([50, 50, 60, 70])
    almost = [*a[:-1], (a[-1] + 1) % BOS]
    train = write_shard(tmp_path / "x_train_000001.bin", [*a, *b, *a, *almost, *a[:20], BOS, *a[:0:-1], *a])
    val = write_shard(tmp_path / "x_val_000000.bin", [*c, *b, *d, *c])
    result = run(train, val)
    assert float(row(result.stdout, train)[3].rstrip("%")) == pytest.approx(100 * 2 / 7, abs=0.01)
    assert float(row(result.stdout, val)[3].rstrip("%")) == pytest.approx(100 * 2 / 4, abs=0.01)
    assert "1 of 4 validation documents stand in these training shards as well" in result.stdout


@pytest.mark.parametrize("position", [0, 5, check.CHUNK - 1, check.CHUNK, check.CHUNK + 77])
def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path, position: int):
    tokens = np.full(check.CHUNK + 100, 7)
    tokens[::50] = BOS
    tokens[position] = BOS + 1
    path = write_shard(tmp_path / "a_train_000001.bin", tokens)
    message = run(path, code=1).stderr
    assert f"{path} has token 50257 at position {position:,}, outside the vocabulary of 50,257" in message
    assert "1 of 1 shards" in message


def test_the_vocabulary_is_as_told(tmp_path: Path):
    """Catches options that are not listened to."""
    of_bytes = write_shard(tmp_path / "nano_val_000000.bin", [256, 1, 2, 256, 255])
    assert row(run(of_bytes, "--vocab-size", 257, "--bos", 256).stdout, of_bytes)[:2] == ["5", "2"]
    assert "no BOS token 50256" in run(of_bytes, code=1).stderr
    other = write_shard(tmp_path / "x_train_000001.bin", [1, 8, 9, 1, 31_999])
    assert row(run(other, "--vocab-size", 32_000, "--bos", 1).stdout, other)[:2] == ["5", "2"]
    assert "outside the vocabulary of 31,999" in run(other, "--vocab-size", 31_999, "--bos", 1, code=1).stderr
    assert "no BOS token 50256" in run(other, code=1).stderr


def test_the_sidecar_knows_better(tmp_path: Path):
    """Catches a vocabulary guessed where it is written down, and a flipped bit that gives another good token."""
    path, other = (write_shard(tmp_path / f"x_train_00000{i}.bin", [7, 1, 2, 7, 30 * i, 5]) for i in (1, 2))
    entries = {p.name: {"tokens": 6, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in (path, other)}
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("no json")
    assert "no BOS token 50256" in run(path, code=1).stderr
    (tmp_path / "x.json").write_text(json.dumps({"bos": 7, "vocab_size": 61, "shards": entries}))
    assert row(run(path, other).stdout, path)[:2] == ["6", "2"]
    assert "outside the vocabulary of 60" in run(path, other, "--vocab-size", 60, code=1).stderr
    assert "no BOS token 8" in run(path, "--bos", 8, code=1).stderr
    write_shard(path, [7, 1, 3, 7, 30, 5])
    result = run(path, other, code=1)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"damaged: {path} differs from its sidecar: it has SHA-256 {found}, expected" in result.stderr
    assert entries[path.name]["sha256"] in result.stderr and "1 of 2 shards" in result.stderr


@pytest.mark.parametrize("begin", [1, 1000, check.CHUNK - 1, check.CHUNK - check.ZEROS, check.CHUNK])
def test_a_page_of_zeros_is_damage(tmp_path: Path, begin: int):
    """Catches a torn page that spans two chunks of the scan; one zero less passes."""
    tokens = np.full(check.CHUNK + 4 * check.ZEROS, 7)
    tokens[0] = BOS
    tokens[begin : begin + check.ZEROS - 1] = 0
    run(write_shard(tmp_path / "a_train_000001.bin", tokens))
    tokens[begin + check.ZEROS - 1] = 0
    message = run(write_shard(tmp_path / "a_train_000001.bin", tokens), code=1).stderr
    assert f"2,048 zeros in a row at position {begin:,}" in message


def test_one_damaged_shard_does_not_hide_the_others(tmp_path: Path):
    """Catches a stop at the first damage, and an exit code of 0 after it."""
    good = write_shard(tmp_path / "b_train_000002.bin", flat(documents([30, 40])))
    bad = {
        "magic": write_shard(tmp_path / "b_train_000001.bin", [BOS, 1], magic=1),
        "version 2": write_shard(tmp_path / "b_train_000003.bin", [BOS, 1], version=2),
        "has 1,028 bytes": write_shard(tmp_path / "b_train_000004.bin", [BOS, 1], count=3),
        "among its 0 tokens": write_shard(tmp_path / "b_train_000005.bin", []),
        "cannot be read": tmp_path / "b_train_000006.bin",
        "fewer than the 1024": tmp_path / "b_train_000007.bin",
    }
    bad["fewer than the 1024"].write_bytes(good.read_bytes()[:1000])
    result = run(good, *bad.values(), code=1)
    assert row(result.stdout, good)[:2] == ["70", "2"]
    for message, path in bad.items():
        assert any(str(path) in line and message in line for line in result.stderr.splitlines()), message
    assert "6 of 7 shards" in result.stderr


def test_the_histogram_holds_every_document(tmp_path: Path):
    lengths = [1, 1, 2, 3, 4, 1000, 1024]
    path = write_shard(tmp_path / "a_train_000001.bin", flat(documents(lengths)))
    output = run(path).stdout
    lines = [line.replace(",", "").split() for line in output.split("up to the next line\n")[1].splitlines()]
    assert {int(line[0]): int(line[1]) for line in lines if int(line[1])} == {1: 2, 2: 2, 4: 1, 512: 1, 1024: 1}
