"""One's own text: the two commands of README, from files to a trained model, with no further option."""

import json
import random
import re
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO, cpu, run_process

import train_gpt
from train_gpt import NANO, Options, require_rows, train

MEGABYTE = 1_000_000


def text() -> str:
    """A megabyte that everybody has: modules of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    found = "".join(path.read_text(encoding="utf-8") + "\n\n" for path in sorted(library.glob("[a-t]*.py"))[:90])
    assert len(found) > MEGABYTE
    return found[:MEGABYTE]


def one_file(folder: Path) -> Path:
    (folder / "my.txt").write_text(text(), encoding="utf-8")
    return folder / "my.txt"


def twenty_files(folder: Path) -> Path:
    (folder / "texts").mkdir()
    for i in range(20):
        part = text()[i * MEGABYTE // 20 : (i + 1) * MEGABYTE // 20]
        (folder / "texts" / f"{i:02}.txt").write_text(part, encoding="utf-8")
    return folder / "texts"


def jsonl(folder: Path) -> Path:
    """Paragraphs of three functions or so."""
    lines = [json.dumps({"text": part}) for part in re.split(r"\n\n\n(?=\S)", text()) if part.strip()]
    (folder / "my.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "my.jsonl"


def tweets(folder: Path) -> Path:
    """Twenty to a row, and some of a single character."""
    draw, words = random.Random(0), text().split()
    lines = [" ".join(draw.sample(words, draw.choice((1, 5, 20)))) for _ in range(15_000)]
    (folder / "tweets.jsonl").write_text("".join(json.dumps({"text": line[:280]}) + "\n" for line in [*lines, "x"]))
    return folder / "tweets.jsonl"


@pytest.mark.parametrize("source", [one_file, twenty_files, jsonl, tweets])
def test_a_megabyte_trains_nano_with_no_further_option(source, tmp_path, capsys):
    """Catches: all of it in the validation shard, too few rows for the steps of `nano`, more validation tokens wanted
    than there are, a target that was set for other data, a row with more documents than there is room for."""
    out = tmp_path / "mine"
    command = [REPO / "data" / "fineweb.py", "--out", out, "--input", source(tmp_path), "--tokenizer", "bytes"]
    written = run_process([train_gpt.sys.executable, *command])
    assert written.returncode == 0 and "notice" not in written.stdout, written.stdout + written.stderr
    require_rows(NANO, out, cpu(), NANO.schedule.total_steps)
    short = replace(NANO, schedule=replace(NANO.schedule, scheduled_steps=3, extension_steps=1))
    loss = train(short, Options(data_dir=out, log_dir=tmp_path, warmup=False, sample_tokens=0), cpu())
    said = capsys.readouterr().out
    assert loss < 5 and "compares with no record" in said and "reached" not in said and "missed" not in said
    (log,) = tmp_path.glob("*nano*.txt")
    val = re.search(r"^data\.val_tokens: (\d+)$", log.read_text().split("=" * 100)[1], re.M)
    assert int(val[1]) == min(train_gpt.read_shard_header(next(out.glob("*_val_*.bin"))) - 1, NANO.data.val_tokens)
    assert int(val[1]) >= NANO.data.val_row_tokens


def test_too_little_text_is_counted_and_can_be_repeated(tmp_path):
    """Catches: advice to fetch the track's data, or one that does not lead further."""
    (tmp_path / "my.txt").write_text(text()[:200_000], encoding="utf-8")
    out = tmp_path / "mine"
    command = [REPO / "data" / "fineweb.py", "--out", out, "--input", tmp_path / "my.txt", "--tokenizer", "bytes"]
    assert run_process([train_gpt.sys.executable, *command]).returncode == 0
    options = Options(data_dir=out, log_dir=tmp_path, warmup=False, sample_tokens=0)
    with pytest.raises(train_gpt.SpeedrunError) as error:
        train(NANO, options, cpu())
    assert str(out) in str(error.value) and "data/nano.py" not in str(error.value)
    needed = int(re.search(r"--data\.epochs (\d+)", str(error.value))[1])
    require_rows(replace(NANO, data=replace(NANO.data, epochs=needed)), out, cpu(), NANO.schedule.total_steps)
    assert not list(tmp_path.glob("*nano*.txt")), "refused before there is a log"


def test_other_tokens_are_refused_with_the_options_that_fit_them(tmp_path):
    """Catches: a token beyond the vocabulary named only when its turn comes, or documents that never start."""
    out = tmp_path / "mine"
    command = [REPO / "data" / "fineweb.py", "--out", out, "--input", one_file(tmp_path), "--tokenizer", "bytes"]
    assert run_process([train_gpt.sys.executable, *command]).returncode == 0
    with pytest.raises(train_gpt.SpeedrunError, match=r"Add --model\.vocab-size 257 --data\.bos 256\."):
        train(train_gpt.SMALL, Options(data_dir=out, log_dir=tmp_path), cpu())
