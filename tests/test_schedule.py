"""Schedule and command line, against numbers and formulas worked out by hand."""

import dataclasses
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cpu, documents, tiny_track, write_shard
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import GPT, MEDIUM, NANO, SMALL, TRACKS, XL, Options, SpeedrunError, Trainer, make_row, parse_command

GOLDEN = np.load(Path(__file__).parent / "golden_optimizer.npz")
LAST = 1764

# step: (tokens, windows in blocks of 128, lr factor, prediction weights), by hand: 1,725 steps in three equal stages,
# then 40. In the first two the last weight falls to 0 over the stage. The cooldown begins at 862.5 and ends at 1725; it
# falls linearly from the stage's value to 0.1.
SMALL_AT = {
    0: (131_072, (1, 3), 1.0, (1, 0.5, 0.25)),
    1: (131_072, (1, 3), 1.0, (1, 0.5, 0.25 * 574 / 575)),
    574: (131_072, (1, 3), 1.0, (1, 0.5, 0.25 / 575)),
    575: (262_144, (3, 7), 1.52, (1, 0.5)),
    862: (262_144, (3, 7), 1.52, (1, 0.5 * 288 / 575)),
    863: (262_144, (3, 7), 1.52 - 1.42 * 0.5 / 862.5, (1, 0.5 * 287 / 575)),
    1149: (262_144, (3, 7), 1.52 - 1.42 * 286.5 / 862.5, (1, 0.5 / 575)),
    1150: (393_216, (5, 11), 1.73 - 1.63 / 3, (1,)),
    1724: (393_216, (5, 11), 1.73 - 1.63 * 861.5 / 862.5, (1,)),
    1725: (393_216, (6, 13), 0.1, (1,)),
    LAST: (393_216, (6, 13), 0.1, (1,)),
}


@pytest.mark.parametrize("step", SMALL_AT)
def test_small_at_every_boundary(step):
    """Catches: a stage that begins a step early or late, a cooldown from the wrong value, weights that jump."""
    tokens, windows, lr, weights = SMALL_AT[step]
    settings = SMALL.at(step)
    assert settings.step == step
    assert settings.stage.tokens == tokens and settings.stage.max_doc_len == 2048
    assert settings.windows == (128 * windows[0], 128 * windows[1])
    assert settings.lr == pytest.approx(lr, rel=1e-12)
    assert settings.prediction_weights == pytest.approx(weights, rel=1e-12)


def test_small_has_its_steps_and_validations():
    """Catches: an edit of the official track that nobody meant."""
    s = SMALL.schedule
    assert (s.scheduled_steps, s.extension_steps, s.total_steps, SMALL.val_every) == (1725, 40, 1765, 250)
    assert [steps.start for _, steps in s.parts()] == [0, 575, 1150, 1725]
    assert (SMALL.data.rows_per_step, SMALL.data.val_tokens, SMALL.data.val_row_tokens) == (8, 10_485_760, 262_144)
    assert SMALL.target_loss == 3.28 and SMALL.model.padded_vocab == 50304


@pytest.mark.parametrize(
    ("step", "momentum"),
    [
        (0, 0.85),
        (1, 0.85 + 0.1 / 300),
        (150, 0.9),
        (299, 0.85 + 29.9 / 300),
        (300, 0.95),
        (301, 0.95),
        (1715, 0.95),
        (1716, 0.948),
        (1740, 0.9),
        (LAST, 0.852),
    ],
)
def test_momentum_rises_over_300_steps_and_falls_over_the_last_50(step, momentum):
    """Catches: a fall that ends with the scheduled steps instead of the run, or a ramp off by one."""
    assert SMALL.at(step).momentum == pytest.approx(momentum, rel=1e-12)


def test_small_unties_at_step_1151():
    """Catches: an even untie step, on which Adam does not step; a hand-over repeated."""
    assert [step for step in range(LAST + 1) if SMALL.at(step).unties] == [1151]
    assert [SMALL.at(step).tied for step in (0, 1150, 1151, 1152, LAST)] == [True, True, True, False, False]


@given(st.integers(1, 100_000))
def test_the_untie_step_is_two_thirds_rounded_up_and_odd(scheduled):
    """Catches: 2/3 in floating point that rounds up where the product is an integer."""
    expected = -(-2 * scheduled // 3) | 1
    assert replace(SMALL.schedule, scheduled_steps=scheduled).untie_step == expected


def test_adam_steps_on_odd_steps_only():
    """Catches: Adam on even steps, or on every one."""
    assert [SMALL.at(step).adam_steps for step in range(6)] == [False, True] * 3


def yarn_reference(head_dim: int, long_windows: list[int]) -> tuple[np.ndarray, float]:
    """Frequencies and softmax scale after these long windows, in tokens (YaRN, arXiv:2309.00071)."""
    f, scale = (1 / 1024) ** np.linspace(0, 1, head_dim // 4), 0.1
    for a, b in pairwise(long_windows):
        rotations, s = a * f / (2 * np.pi), a / b
        w = np.clip((rotations - 1) / 31, 0, 1)
        f, scale = f * (s + w * (1 - s)), scale * (1 + 0.2 * np.log(b / a))
    return f, scale


@pytest.mark.parametrize(("step", "stages"), [(0, 1), (574, 1), (575, 2), (1149, 2), (1150, 3), (1724, 3), (1725, 4)])
def test_rotary_frequencies_and_scale_follow_yarn(step, stages):
    """Catches: YaRN applied once too often or at the wrong boundary, windows in blocks instead of tokens, and the
    short window taken for the long one."""
    frequencies, scale = yarn_reference(128, [128 * w for w in (3, 7, 11, 13)[:stages]])
    settings = SMALL.at(step)
    assert len(settings.frequencies) == 32
    assert settings.frequencies == pytest.approx(frequencies, rel=1e-12)
    assert settings.attn_scale == pytest.approx(scale, rel=1e-12)


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    """Catches: the ramp of YaRN the wrong way round."""
    before, after = SMALL.at(0).frequencies, SMALL.at(575).frequencies
    assert before[0] == after[0] == 1.0  # 61 rotations in 384 tokens
    assert after[-1] == pytest.approx(before[-1] * 3 / 7, rel=1e-12)  # less than one


def test_yarn_stops_at_its_largest_window():
    """Catches: `medium`, whose windows grow on after YaRN has ended."""
    capped = replace(SMALL, schedule=replace(SMALL.schedule, yarn_max_window=9 * 128))
    frequencies, scale = yarn_reference(128, [3 * 128, 7 * 128, 9 * 128])
    for step in (1150, LAST):
        assert capped.at(step).frequencies == pytest.approx(frequencies, rel=1e-12)
        assert capped.at(step).attn_scale == pytest.approx(scale, rel=1e-12)


# By hand, as above. The twelve parts begin at 4700 i // 12, the cooldown at 1410; it falls to 0.1 over 3290.
MEDIUM_AT = {
    0: (131_072, (1, 3), 1.0, (1, 0.5, 0.25)),
    390: (131_072, (1, 3), 1.0, (1, 0.5, 0.25 / 391)),
    391: (262_144, (3, 7), 1.52, (1, 0.5)),
    783: (393_216, (5, 11), 1.73, (1,)),
    1174: (393_216, (5, 11), 1.73, (1,)),
    1175: (524_288, (6, 13), 2.0, (1,)),
    1410: (524_288, (6, 13), 2.0, (1,)),
    1566: (524_288, (7, 15), 2 - 1.9 * 156 / 3290, (1,)),
    1958: (524_288, (8, 17), 2 - 1.9 * 548 / 3290, (1,)),
    2350: (524_288, (9, 19), 2 - 1.9 * 940 / 3290, (1,)),
    2741: (524_288, (10, 21), 2 - 1.9 * 1331 / 3290, (1,)),
    3133: (524_288, (11, 23), 2 - 1.9 * 1723 / 3290, (1,)),
    4699: (524_288, (11, 23), 2 - 1.9 * 3289 / 3290, (1,)),
    4700: (524_288, (11, 23), 0.1, (1,)),
    4739: (524_288, (11, 23), 0.1, (1,)),
}


@pytest.mark.parametrize("step", MEDIUM_AT)
def test_medium_at_every_boundary(step):
    tokens, windows, lr, weights = MEDIUM_AT[step]
    settings = MEDIUM.at(step)
    assert (settings.stage.tokens, settings.stage.max_doc_len) == (tokens, 4096)
    assert settings.windows == (128 * windows[0], 128 * windows[1])
    assert settings.lr == pytest.approx(lr, rel=1e-12)
    assert settings.prediction_weights == pytest.approx(weights, rel=1e-12)


def test_medium_has_its_numbers():
    assert (MEDIUM.schedule.total_steps, MEDIUM.target_loss, MEDIUM.coordinate_descent_tuning) == (4740, 2.92, True)
    assert [step for step in range(4740) if MEDIUM.at(step).unties] == [785]  # 4700 / 6 = 783.3
    assert MEDIUM.validation_at(4740).windows == (11 * 128, 27 * 128)
    frequencies, scale = yarn_reference(128, [128 * w for w in (3, 7, 11, 13)])  # YaRN ends at 13
    for step in (1175, 3133, 4739):
        assert MEDIUM.at(step).frequencies == pytest.approx(frequencies, rel=1e-12)
        assert MEDIUM.at(step).attn_scale == pytest.approx(scale, rel=1e-12)
    rates = {f.name: getattr(MEDIUM.optimizer.rules, f.name) for f in dataclasses.fields(MEDIUM.optimizer.rules)}
    lr = {name: rule.lr_mul[0] * MEDIUM.optimizer.adam_lr for name, rule in rates.items() if rule.kind == "adam"}
    assert lr["head"] == lr["embed"] == 0.004 and lr["embed2"] == lr["value_embeds"] == 75 * 0.004
    assert lr["resid_lambda"] == lr["skip_lambda"] == pytest.approx(5 * 0.008) and lr["x0_lambda"] == 5 * 0.004
    assert {lr[name] for name in lr if "gate" in name} == {0.1 * 0.004}
    for name in ("embed", "head", "value_embeds", "embed2", "x0_lambda", "x02_lambda"):
        assert (rates[name].betas, rates[name].eps) == ((0.8, 0.95), 1e-8)
    assert rates["sa_lambda"].betas == (0.9, 0.99) and MEDIUM.optimizer.muon_lr == 0.015


def test_xl_sees_as_many_tokens_as_the_run_of_october_2024():
    tokens = sum(XL.at(step).stage.tokens for step in range(XL.schedule.total_steps))
    assert XL.schedule.total_steps == 20_344 and tokens == pytest.approx(20_344 * 491_520, rel=2e-3)


def test_only_medium_tunes_by_coordinate_descent():
    assert [name for name, track in TRACKS.items() if track.coordinate_descent_tuning] == ["medium"]


def test_only_the_final_validation_widens_the_window():
    """Catches: a wider window in earlier validations, or a YaRN change that comes with it."""
    last, final = SMALL.at(LAST), SMALL.validation_at(1765)
    assert final.windows == (6 * 128, 20 * 128)
    assert (final.frequencies, final.attn_scale) == (last.frequencies, last.attn_scale)
    for step in (0, 250, 575, 1150, 1725, LAST):
        assert SMALL.validation_at(step) == SMALL.at(step)


@pytest.mark.golden
def test_lr_and_momentum_match_the_golden_run():
    """Catches: any other reading of cooldown, stages and momentum than that of the golden optimizer numbers."""
    schedule = replace(SMALL.schedule, scheduled_steps=9, extension_steps=3, momentum_steps=(6, 3))
    track = replace(SMALL, schedule=schedule)
    steps = [track.at(step) for step in range(12)]
    np.testing.assert_allclose([s.lr for s in steps], GOLDEN["lr"], rtol=1e-12)
    np.testing.assert_allclose([s.momentum for s in steps], GOLDEN["momentum"], rtol=1e-12)
    assert [s.step for s in steps if s.unties] == [int(GOLDEN["split_step"])]


@given(st.lists(st.integers(0, LAST), max_size=12))
def test_settings_are_a_pure_function_of_the_step(steps):
    """Catches: anything "applied" as a stage is passed, which a warm-up, a resume or another rank would see twice."""
    fresh = dataclasses.replace(SMALL)
    assert [SMALL.at(step) for step in steps] == [fresh.at(step) for step in reversed(steps)][::-1]
    assert len({SMALL.at(step) for step in steps}) == len(set(steps))  # hashable, and no step is another


@given(
    scheduled=st.integers(1, 60),
    extension=st.integers(0, 5),
    cooldown=st.floats(0, 1, allow_subnormal=False),  # a run on the CPU flushes them
    momentum_steps=st.tuples(st.integers(0, 80), st.integers(0, 80)),
)
def test_every_step_of_any_schedule_has_sane_settings(scheduled, extension, cooldown, momentum_steps):
    """Catches: a division by zero or an index off the end in short schedules, as tests and experiments use them."""
    schedule = replace(
        SMALL.schedule,
        scheduled_steps=scheduled,
        extension_steps=extension,
        cooldown=cooldown,
        momentum_steps=momentum_steps,
    )
    track = replace(SMALL, schedule=schedule)
    for step in range(schedule.total_steps):
        settings = track.at(step)
        assert 0.1 - 1e-12 <= settings.lr <= 1.73 and 0.85 - 1e-12 <= settings.momentum <= 0.95 + 1e-12
        assert (settings.stage is schedule.extension) == (step >= scheduled)
        assert all(0 <= w <= 1 for w in settings.prediction_weights) and math.isfinite(settings.attn_scale)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def test_numbers_of_the_track_are_overridden_and_no_others():
    """Catches: an override that is lost, or lands in another stage."""
    words = "--schedule.scheduled-steps 20 --model.num-layers 2 --schedule.stages.0.tokens 512 --max-steps 7 --seed 3"
    track, options = parse_command(["nano", *words.split(), "--val-every", "5", "--dtype", "float64", "--no-warmup"])
    stages = (replace(NANO.schedule.stages[0], tokens=512), *NANO.schedule.stages[1:])
    expected = replace(
        NANO,
        model=replace(NANO.model, num_layers=2),
        schedule=replace(NANO.schedule, scheduled_steps=20, stages=stages),
        val_every=5,
    )
    assert track == expected
    assert (options.max_steps, options.seed, options.dtype, options.warmup) == (7, 3, "float64", False)


def test_the_tracks_come_unchanged_without_options_and_nano_is_the_default():
    """Catches: a number altered on its way through the command line."""
    assert parse_command([])[0] == parse_command(["nano"])[0] == NANO
    assert parse_command(["small"])[0] == SMALL
    assert parse_command(["--seed", "2"])[0] == NANO


def test_val_every_zero_means_only_at_the_end():
    """Catches: 0 taken for "not given"."""
    assert parse_command(["small", "--val-every", "0"])[0].val_every == 0


@pytest.mark.parametrize(
    "words",
    [["--no-such-option", "1"], ["--model.no-such 1"], ["--seed", "x"], ["--dtype", "float8"], ["more", "words"]],
)
def test_a_wrong_option_exits_with_2_and_is_named(words, capsys):
    """Catches: a misspelt option that is ignored while the run goes on with the default."""
    with pytest.raises(SystemExit) as stop:
        parse_command(["nano", *words])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert words[0].split()[0] in shown.err + shown.out


def test_an_unknown_track_is_named_with_those_there_are():
    """Catches: a silent fall-back to nano."""
    with pytest.raises(SpeedrunError, match=r"'smal'.*nano.*small"):
        parse_command(["smal"])


@pytest.mark.parametrize(
    "words", [["--help"], ["nano", "-h"], ["small", "--seed", "1", "--help"], ["medium", "--help"]]
)
def test_help_fits_a_screen(words, capsys):
    """Catches: a page that nobody reads; an option or a number that is not on it; another track's values."""
    with pytest.raises(SystemExit) as stop:
        parse_command(words)
    shown = capsys.readouterr().out
    track = TRACKS.get(words[0], NANO)
    assert not stop.value.code and len(shown.splitlines()) <= 60
    shown = " ".join(shown.split())
    for option in dataclasses.fields(Options):
        assert f" --{option.name.replace('_', '-')} " in shown
    for number in dataclasses.fields(track.model):
        assert f" {number.name.replace('_', '-')} {getattr(track.model, number.name)}".replace(", ", ",") in shown
    assert f"--schedule.stages.{len(track.schedule.stages) - 1}. tokens" in shown and "evals/plan.py" in shown


@pytest.mark.parametrize("words", [["--help-all"], ["small", "--help-all"]])
def test_help_all_explains_the_options_and_the_numbers(words, capsys):
    """Catches: options without their docstrings, and a track whose help shows another's defaults."""
    with pytest.raises(SystemExit) as stop:
        parse_command(words)
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in ("--seed", "--max-steps", "--data-dir", "--log-dir", "--val-every", "--device", "--no-compile"):
        assert option in shown
    for explained in (
        "the log is marked as that of an incomplete run",
        "Short and long attention window, in tokens",
        "--model.num-layers",
        "--schedule.scheduled-steps INT",
        "--schedule.stages.2.windows",
        f"(default: {(SMALL if 'small' in words else NANO).schedule.scheduled_steps})",
    ):
        assert explained in shown


@pytest.mark.parametrize("name", ["nano", "small"])
def test_a_track_of_two_layers_trains(name, tmp_path):
    """Catches: a layout that names layers by position elsewhere than in the track. Other widths are made tiny."""
    rows = {"nano": NANO, "small": SMALL}[name].data.rows_per_step
    words = "--model.num-layers 2 --model.num-heads 2 --model.head-dim 8 --model.vocab-size 300 --data.bos 256"
    words += f" --schedule.stages.0.tokens {32 * rows} --data.val-tokens 99"
    track, _ = parse_command([name, *words.split()])
    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_000001.bin", documents([50] * 600))
    trainer = Trainer(track, cpu(), tmp_path, seed=0)
    losses = [trainer.train_step(step).item() for step in range(4)]
    assert losses[-1] < losses[0]
    assert trainer.params["mlp_bank"].shape[0] == 4


@pytest.mark.parametrize("track", [NANO, SMALL], ids=lambda track: track.name)
def test_every_depth_has_gradients_for_all_its_parameters(track):
    """Catches: a parameter of a layer that is not there (its skip, backout, value embedding): its step would fail."""
    for num_layers in range(1, track.model.num_layers + 1):
        model = replace(track.model, num_layers=num_layers, num_heads=2, head_dim=8, vocab_size=300)
        gpt = GPT(model, cpu())
        row = make_row(np.arange(33), np.array([0, 20]), 32, pin=False)
        gpt(row, replace(track, model=model).at(0), torch.ones(2))[0].backward()
        assert [name for name, p in gpt.named_parameters() if p.grad is None] == [], num_layers


def test_the_tiny_track_of_the_tests_crosses_all_changes():
    """Catches: an edit of `nano` after which the tests no longer pass stages, untying and every technique."""
    track = tiny_track()
    s = track.schedule
    assert s.total_steps == 20 and s.untie_step == 13 and len(s.stages) >= 2
    assert len({stage.tokens for stage in s.stages}) == len(s.stages)
    layers = track.model.layers
    assert any(layer.paired for layer in layers) and any(layer.long for layer in layers)
    assert any(layer.value for layer in layers) and any(layer.skips for layer in layers)
    assert any(layer.attention is None for layer in layers) and track.model.backout_layer < track.model.num_layers
