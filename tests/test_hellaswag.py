"""HellaSwag against one-by-one scoring."""

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, cpu, run_process, torchrun
from test_model import random_model

import train_gpt
from hellaswag import accuracy, hellaswag, pack, read_hellaswag, token_losses
from shared import Trained
from train_gpt import GPT, NANO, TRACKS, SpeedrunError


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """23 items with endings of very different lengths, some longer than a row of the tests."""
    rng = np.random.default_rng(3)
    word = lambda: bytes(rng.integers(97, 123, rng.integers(1, 9)).tolist()).decode()
    phrase = lambda most: " ".join(word() for _ in range(rng.integers(1, most)))
    path = tmp_path_factory.mktemp("hellaswag") / "items.jsonl"
    items = [
        {"ctx": phrase(12), "endings": [phrase(9) for _ in range(4)], "label": str(i % 4), "ind": i} for i in range(23)
    ]
    path.write_text("\n".join(map(json.dumps, items)) + "\n\n")
    return path


def one_by_one(model: GPT, track: train_gpt.Track, items: list, settings: train_gpt.Settings) -> list[list[float]]:
    """Sum of the losses of each ending, each alone in a row of its own: from the logits, token by token."""
    found = []
    for item in items:
        sums = []
        for ending in item.endings:
            tokens = np.array([track.data.bos] * 3 + item.context + ending)
            row = train_gpt.make_row(tokens, np.array([0, 1, 2]), len(tokens), track.model)
            log_probs = model.logits(row, settings).log_softmax(1)
            last = range(len(tokens) - 1 - len(ending), len(tokens) - 1)
            sums.append(-sum(log_probs[t, tokens[t + 1]].item() for t in last))
        found.append(sums)
    return found


@pytest.mark.parametrize("name", ["nano", "small", "medium"])
def test_packed_items_score_as_one_by_one(questions, name):
    """Every loss to 1e-9, hence every choice. Catches: a target off by one, the space before the ending forgotten,
    anything of one item that reaches the next, as n-grams or heads that are composed may."""
    config = replace(TRACKS[name].model, head_dim=8, num_heads=4, vocab_size=257, vocab_multiple=16, ngram_rows=384)
    model, track = random_model(config), replace(NANO, model=config)
    settings = track.validation_at(510)
    items = read_hellaswag(str(questions), track)
    assert len(items) == 23 and bytes(items[0].endings[0]).startswith(b" ")
    expected = one_by_one(model, track, items, settings)
    sums = [None] * 92
    rows = list(pack(items, track, 300))
    assert len(rows) > 5
    for packed in rows:
        losses = token_losses(model, packed.row, settings)
        for number, begin, end in packed.spans:
            sums[number] = losses[begin:end].sum().item()
    assert np.array(sums) == pytest.approx(np.array(expected).ravel(), rel=1e-9)

    lengths = [[len(ending) for ending in item.endings] for item in items]
    best = lambda scores: np.argmin(scores, axis=1) == [item.label for item in items]
    found = accuracy(Trained(model, track, 510), cpu(torch.float64), items, tokens=300)
    assert found == (best(expected).mean(), best(np.divide(expected, lengths)).mean())


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"ctx": "a"}', '{"ctx": "a", "endings": ["b"], "label": 1}', '{"ctx": 1, "endings": ["b"], "label": 0}'],
)
def test_what_is_not_hellaswag_is_refused(tmp_path, text):
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(SpeedrunError, match=r"items\.jsonl"):
        read_hellaswag(str(tmp_path / "items.jsonl"), NANO)
    with pytest.raises(SpeedrunError, match=r"nothing\.jsonl.*--data"):
        read_hellaswag(str(tmp_path / "nothing.jsonl"), NANO)


def test_the_hub_is_tried_once_and_its_file_kept(tmp_path, monkeypatch):
    """Without a network. Catches: half a minute of the client's retries before the message; a file that is here and
    not taken. Where the client keeps it is written out here."""
    import pyarrow.parquet
    from huggingface_hub import constants

    waits = []
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SpeedrunError, match="cannot be fetched"):
        read_hellaswag("hellaswag", NANO)
    assert not waits
    kept = tmp_path / "datasets--Rowan--hellaswag"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("c" * 40)
    path = kept / "snapshots" / ("c" * 40) / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"ctx": ["a"], "endings": [["b", "c"]], "label": ["1"]}), path)
    (item,) = read_hellaswag("hellaswag", NANO)
    assert (bytes(item.context), [bytes(e) for e in item.endings], item.label) == (b"a", [b" b", b" c"], 1)
    assert not waits


def test_the_command_scores_an_export_on_any_number_of_processes(questions, tmp_path):
    track = replace(NANO, model=replace(NANO.model, vocab_multiple=16))
    model = random_model(track.model)
    train_gpt.export(tmp_path / "model", model.float(), track, 120)
    script, words = REPO / "evals" / "hellaswag.py", ["--data", questions, "--device", "cpu", "--dtype", "float32"]
    one = run_process([sys.executable, script, tmp_path / "model", *words])
    two = torchrun(2, script, tmp_path / "model", *words)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert one.stdout.startswith("hellaswag: 23 items, accuracy 0.") and one.stdout.count("\n") == 1
    assert one.stdout.split("(")[0] == two.stdout.split("(")[0]
    for folder, data, said in (("nothing", questions, "no such folder"), ("model", "nothing", "no JSONL file")):
        done = run_process([sys.executable, script, tmp_path / folder, "--data", data])
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    with pytest.raises(SystemExit):
        hellaswag(["x", "--limit", "0"])
