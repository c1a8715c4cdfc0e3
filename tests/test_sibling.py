"""Small siblings of a track."""

import re
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import REPO, cpu, run_process, tiny_options
from test_model import random_model, step_settings

from plan import meta_model
from sibling import own_parser, parse_own, scaled, sibling
from train_gpt import MEDIUM, SMALL, TRACKS, SpeedrunError, make_row

WHOLE, HALF = Fraction(1), Fraction(1, 2)


def test_a_scaled_track_keeps_its_recipe():
    half = scaled(SMALL, HALF, HALF)
    m = half.model
    assert (m.num_heads, m.head_dim, m.num_layers) == (6, 64, 6), "three heads could not be paired"
    assert half.schedule.attn_scale == pytest.approx(0.2), "scores of heads half as wide are half as large"
    assert half.optimizer.rules.head.lr_mul == (2.0,) and half.optimizer.rules.embed.lr_mul == (2.0,)
    assert half.optimizer.muon_lr == SMALL.optimizer.muon_lr
    before, after = SMALL.optimizer.rules.head, half.optimizer.rules.head
    decay = lambda rule: rule.lr_mul[0] ** 2 * rule.wd_mul
    assert decay(after) == pytest.approx(decay(before))
    assert set(m.value_layers) <= set(range(m.num_layers)) and m.ngram_rows == SMALL.model.ngram_rows
    assert 0 in m.paired_layers and m.num_layers - 1 in m.long_layers, "the first and the last keep their roles"
    assert m.dc_layers == (m.mixing_layer,) == (m.num_layers - 1,)
    quarter = scaled(MEDIUM, HALF / 2, WHOLE).model
    assert (quarter.num_heads, quarter.head_dim) == (2, 128)
    assert scaled(SMALL, WHOLE, WHOLE) == SMALL
    for track in TRACKS.values():
        for width, depth in ((HALF, WHOLE), (WHOLE, HALF), (2 * WHOLE, WHOLE), (HALF / 2, Fraction("0.3"))):
            meta_model(scaled(track, width, depth if track.model.num_layers > 1 else WHOLE), cpu())


@pytest.mark.parametrize(
    "alone", [{"qk_heads": 1, "paired_layers": ()}, {"qk_heads": 1, "mix_in": ()}, {"qk_heads": 4, "num_heads": 12}]
)
def test_heads_stay_as_many_as_their_groups_take(alone):
    """Half of six would be too few for gates by halves and for pairs, half of twelve for matrices of four heads."""
    model = scaled(replace(SMALL, model=replace(SMALL.model, **alone)), HALF, WHOLE).model
    assert (model.num_heads, model.head_dim) == (alone.get("num_heads", 6), 64)


@pytest.mark.parametrize("track", TRACKS.values(), ids=TRACKS)
def test_a_sibling_of_any_depth_uses_all_that_it_has(track):
    """Every parameter and every coefficient has a gradient. Catches: roles of two layers that exclude each other on
    one, a network that waits for a stream that never comes, a stream of a layer that is gone."""
    narrow = {"num_heads": 2, "head_dim": 8, "vocab_size": 60, "ngram_rows": 97}
    tokens = np.random.default_rng(0).integers(0, 60, 31)
    for layers in range(1, min(track.model.num_layers, 16) + 1):
        config = replace(scaled(track, WHOLE, Fraction(layers, track.model.num_layers)).model, **narrow)
        assert config.num_layers == layers
        model = random_model(config)
        row = make_row(tokens, np.array([0]), 30, config)
        loss, _ = model(row, step_settings((5, 9), 8), torch.ones(1, dtype=torch.float64))
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.any(), f"{name} of {layers} layers"
            assert p.grad.all() or not name.endswith(".bias"), f"{name} of {layers} layers"


@pytest.mark.parametrize("track", TRACKS.values(), ids=TRACKS)
@pytest.mark.parametrize(("width", "depth"), [("0.3", "1"), ("0.001", "1"), ("3.001", "1"), ("1", "0.001")])
def test_a_sibling_that_cannot_be_is_answered_with_some_that_can(track, width, depth):
    """Catches: advice that is refused in its turn, or that is far from what was asked for."""
    width, depth = Fraction(width), Fraction(depth)
    with pytest.raises(SpeedrunError) as error:
        scaled(track, width, depth)
    assert ("--width" in str(error.value)) == (width != 1)
    named = [Fraction(word) for word in re.findall(r"(\d+(?:/\d+)?) \(", str(error.value).split("Possible")[1])]
    for found in named:
        meta_model(scaled(track, found, depth) if width != 1 else scaled(track, width, found), cpu())
    shallowest = Fraction(1, track.model.num_layers)
    assert min(abs(found - (width if width != 1 else max(depth, shallowest))) for found in named) < HALF


@pytest.mark.parametrize("word", ["", "a", "0", "-1", "inf", "nan", "1/0", "101"])
def test_what_is_no_factor_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        sibling(["nano", f"--width={word}"])
    assert f"argument --width: found {word}, expected a number" in capsys.readouterr().err


def test_a_third_may_be_written_in_any_way():
    """Catches: 0.3333333333333333 of six heads that are not quite two."""
    for words in (["--width", "1/3"], [f"--width={1 / 3}"]):
        known, rest = parse_own(["small", *words, "--seed", "1"], own_parser(""))
        assert scaled(SMALL, known.width, known.depth).model.num_heads == 2 and rest == ["small", "--seed", "1"]


def test_the_command_trains_the_sibling_with_further_options(tiny_data, tmp_path):
    """Catches: options that change the whole track, which is scaled afterwards; a log that does not say what ran."""
    words = [*tiny_options(), "--width", "0.5", "--max-steps", "2", "--data-dir", tiny_data, "--log-dir", tmp_path]
    words += ["--device", "cpu", "--no-warmup", "--sample-tokens", "0"]
    done = run_process([sys.executable, REPO / "evals" / "sibling.py", "nano", *words])
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("*-nano-*.txt")
    source, settings, _ = log.read_text().split("=" * 100 + "\n", 2)
    assert source.startswith((REPO / "train_gpt.py").read_text()[:1000])
    assert "model.num_heads: 2\nmodel.head_dim: 8\n" in settings, "those of the options"
    assert "optimizer.rules.head.lr_mul: (2.0,)" in settings, "that of the sibling"
    done = run_process([sys.executable, REPO / "evals" / "sibling.py", "nano", "--width", "0.3"])
    assert done.returncode == 1 and done.stderr.startswith("error: --width 0.3") and done.stderr.count("\n") == 1
