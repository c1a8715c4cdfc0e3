"""records/search.py: its alternatives exist, its rounds halve as they should, and it goes on where it stopped."""

import argparse

import pytest
from conftest import tiny_options

import search
import train_gpt
from search import SPACE, TRACK, Trial, draw, ranked, read_csv, table


@pytest.mark.parametrize("index", range(max(map(len, SPACE.values()))))
def test_every_alternative_is_another_track(index):
    """Catches: an option that has another name by now, or an alternative that is the track as it is.

    The alternatives of this index are tried all at once, because parsing takes long; no two names share an option.
    """
    tried = {name: words[index].split() for name, words in SPACE.items() if index < len(words)}
    track, _ = train_gpt.parse_command(["nano", *(word for words in tried.values() for word in words)])
    before = train_gpt.flatten(train_gpt.NANO)
    changed = [key for key, value in train_gpt.flatten(track).items() if value != before.get(key)]
    for name, words in tried.items():
        options = [word[2:].replace("-", "_").replace(".no_", ".") for word in words if word.startswith("--")]
        assert any(key.startswith(option) for key in changed for option in options), (name, words)
    for words in SPACE.values():
        assert len(set(words)) == len(words)


def test_candidates_are_different_and_the_same_each_time():
    found = draw(30, seed=1)
    assert found == draw(30, seed=1) != draw(30, seed=2)
    assert found[0] == TRACK and len({words for _, words in found}) == len(found) == 31


def options_of(tmp_path, **changes) -> argparse.Namespace:
    values = {"candidates": 9, "steps": 300, "seed": 0, "jobs": 1, "out": tmp_path}
    return argparse.Namespace(**values | changes)


def test_rounds_drop_two_thirds_and_triple_the_seeds(tmp_path, monkeypatch):
    """9 candidates and the track: 10 runs of seed 0, then 3 and the track with 3 seeds, then 1 and the track with 9.

    One that fails is left out, one that costs twice as much gets half the steps, and a second call has nothing to do.
    """
    candidates = draw(9, 0)
    quality = {words: 1.2 - 0.01 * i for i, (_, words) in enumerate(candidates)}
    broken, slow = candidates[3][1], candidates[5][1]
    runs = []

    def train(candidate, steps, seed, jobs):
        if candidate[1] == broken:
            raise RuntimeError("exit code 1")
        runs.append((candidate[1], steps, seed))
        return Trial(*candidate, steps, seed, quality[candidate[1]] + 0.001 * seed)

    monkeypatch.setattr(search, "train", train)
    monkeypatch.setattr(search, "relative_cost", lambda words: 2.0 if words == slow else 1.0)
    search.search(options_of(tmp_path), tmp_path / "search.csv")
    counts = {words: sum(run[0] == words for run in runs) for words in quality}
    assert counts[candidates[9][1]] == 9 and counts[""] == 9 and counts[broken] == 0
    assert sorted(counts.values()) == [0, 1, 1, 1, 1, 1, 3, 3, 9, 9]
    assert {steps for words, steps, _ in runs if words == slow} == {150}
    assert {steps for words, steps, _ in runs if words not in (slow,)} == {300}

    before = len(runs)
    search.search(options_of(tmp_path), tmp_path / "search.csv")
    assert len(runs) == before
    trials = read_csv(tmp_path / "search.csv", Trial)
    assert len(trials) == before and {t.words for t in trials} == {words for words in quality if words != broken}
    assert ranked(candidates, trials, 9)[0] == candidates[9]
    rows = table(trials).splitlines()
    assert rows[2].split("|")[5:8] == [" 1.1140 ", " -0.0900 ", rows[2].split("|")[7]]


def test_a_real_round(tmp_path, tiny_data, monkeypatch):
    """A candidate and the track, made tiny, are timed and trained."""
    monkeypatch.setattr(search, "DATA", tiny_data)
    common = ("--data-dir", str(tiny_data), "--sample-tokens", "0", "--device", "cpu", "--dtype", "float32")
    monkeypatch.setattr(search, "COMMON", (*common, *tiny_options(), "--data.rows-per-step", "1"))
    space = {
        "gates": ["--model.gate-networks"],
        "smear": ["--model.smear"],
        "signs": ["--model.ngram-signs 8"],
    }
    monkeypatch.setattr(search, "SPACE", space)
    search.search(options_of(tmp_path, candidates=1, steps=18), tmp_path / "search.csv")
    trials = read_csv(tmp_path / "search.csv", Trial)
    assert len(trials) == 2 and {t.seed for t in trials} == {0}
    assert all(4 <= t.steps <= 90 and 3 < t.loss < 6 for t in trials)
