"""Schedule and command line, against numbers and formulas worked out by hand."""

import dataclasses
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cpu, documents, tiny_track, write_shard, write_token_bytes
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import GPT, MEDIUM, NANO, SMALL, TRACKS, XL, Options, SpeedrunError, Trainer, make_row, parse_command

GOLDEN = np.load(Path(__file__).parent / "golden_schedule.npz")
LAST = 1284

# step: (tokens, windows in blocks of 128, lr factor, prediction weights, prefix weight), by hand: 1,270 steps in three
# stages that end at 423.3 and 846.7, rounded, then 15. In the first two the last weight falls to 0 over the stage, in
# the second that of the prefix as well. The cooldown begins at 508 and ends at 1270; it falls linearly from the stage's
# value to 0.15.
SMALL_AT = {
    0: (131_072, (1, 3), 1.0, (1, 0.5, 0.25), 0.25),
    1: (131_072, (1, 3), 1.0, (1, 0.5, 0.25 * 422 / 423), 0.25),
    422: (131_072, (1, 3), 1.0, (1, 0.5, 0.25 / 423), 0.25),
    423: (262_144, (3, 7), 1.52, (1, 0.5), 0.25),
    508: (262_144, (3, 7), 1.52, (1, 0.5 * 339 / 424), 0.25 * 339 / 424),
    509: (262_144, (3, 7), 1.52 - 1.37 / 762, (1, 0.5 * 338 / 424), 0.25 * 338 / 424),
    846: (262_144, (3, 7), 1.52 - 1.37 * 338 / 762, (1, 0.5 / 424), 0.25 / 424),
    847: (393_216, (5, 11), 1.73 - 1.58 * 339 / 762, (1,), 0),
    1269: (393_216, (5, 11), 1.73 - 1.58 * 761 / 762, (1,), 0),
    1270: (393_216, (6, 13), 0.15, (1,), 0),
    LAST: (393_216, (6, 13), 0.15, (1,), 0),
}


@pytest.mark.parametrize("step", SMALL_AT)
def test_small_at_every_boundary(step):
    """Catches: a stage that begins a step early or late, a cooldown from the wrong value, weights that jump."""
    tokens, windows, lr, weights, prefix = SMALL_AT[step]
    settings = SMALL.at(step)
    assert settings.step == step
    assert settings.stage.tokens == tokens and settings.stage.max_doc_len == (896 if step < 423 else 2048)
    assert settings.windows == (128 * windows[0], 128 * windows[1])
    assert settings.lr == pytest.approx(lr, rel=1e-12)
    assert settings.prediction_weights == pytest.approx(weights, rel=1e-12)
    assert settings.prefix_weight == pytest.approx(prefix, rel=1e-12)
    assert replace(SMALL, prefix_loss=False).at(step) == replace(settings, prefix_weight=0.0)


def test_small_has_its_steps_and_validations():
    """Catches: an edit of the official track that nobody meant."""
    s = SMALL.schedule
    assert (s.scheduled_steps, s.extension_steps, s.total_steps, SMALL.val_every) == (1270, 15, 1285, 250)
    assert [steps.start for _, steps in s.parts()] == [0, 423, 847, 1270]
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
        (1235, 0.95),
        (1236, 0.948),
        (1260, 0.9),
        (LAST, 0.852),
    ],
)
def test_momentum_rises_over_300_steps_and_falls_over_the_last_50(step, momentum):
    """Catches: a fall that ends with the scheduled steps instead of the run, or a ramp off by one."""
    assert SMALL.at(step).momentum == pytest.approx(momentum, rel=1e-12)


# The first steps of the stages and of the extension, and the step that unties: by hand.
BOUNDARIES = {
    "nano": ([0, 35, 71, 106], 71),
    "small": ([0, 423, 847, 1270], 847),
    "medium": ([0, 392, 783, 1175, 1567, 1958, 2350, 2742, 3133, 3525, 3917, 4308, 4700], 783),
    "xl": ([0, 6768, 13_536, 20_304], 13_537),
}


@pytest.mark.parametrize("name", TRACKS)
def test_every_track_changes_stage_and_unties_once_at_the_nearest_step(name):
    """Catches: ends of stages rounded down, an even untie step, on which Adam does not step; a hand-over repeated."""
    track, (starts, unties) = TRACKS[name], BOUNDARIES[name]
    settings = [track.at(step) for step in range(track.schedule.total_steps)]
    assert [part.start for _, part in track.schedule.parts()] == starts
    assert [
        s.step
        for s, before in zip(settings, [None, *settings], strict=False)
        if not before or s.stage is not before.stage
    ] == starts
    assert [s.step for s in settings if s.unties] == [unties]
    assert [s.step for s in settings if s.tied] == list(range(unties + 1))


@given(st.integers(1, 100_000))
def test_the_untie_step_is_two_thirds_rounded_and_odd(scheduled):
    """Catches: 2/3 in floating point that lands on the other side of an integer, or rounded up."""
    expected = round(Fraction(2 * scheduled, 3)) | 1
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


@pytest.mark.parametrize(("step", "stages"), [(0, 1), (422, 1), (423, 2), (846, 2), (847, 3), (1269, 3), (1270, 4)])
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
    before, after = SMALL.at(0).frequencies, SMALL.at(423).frequencies
    assert before[0] == after[0] == 1.0  # 61 rotations in 384 tokens
    assert after[-1] == pytest.approx(before[-1] * 3 / 7, rel=1e-12)  # less than one


def test_yarn_stops_at_its_largest_window():
    """Catches: `medium`, whose windows grow on after YaRN has ended."""
    capped = replace(SMALL, schedule=replace(SMALL.schedule, yarn_max_window=9 * 128))
    frequencies, scale = yarn_reference(128, [3 * 128, 7 * 128, 9 * 128])
    for step in (847, LAST):
        assert capped.at(step).frequencies == pytest.approx(frequencies, rel=1e-12)
        assert capped.at(step).attn_scale == pytest.approx(scale, rel=1e-12)


# By hand, as above. The twelve parts begin at 4700 i / 12, rounded, the cooldown at 1410; it falls to 0.1 over 3290.
MEDIUM_AT = {
    0: (131_072, (1, 3), 1.0, (1, 0.5, 0.25), 0.25),
    391: (131_072, (1, 3), 1.0, (1, 0.5, 0.25 / 392), 0.25),
    392: (262_144, (3, 7), 1.52, (1, 0.5), 0.25),
    782: (262_144, (3, 7), 1.52, (1, 0.5 / 391), 0.25 / 391),
    783: (393_216, (5, 11), 1.73, (1,), 0),
    1174: (393_216, (5, 11), 1.73, (1,), 0),
    1175: (524_288, (6, 13), 2.0, (1,), 0),
    1410: (524_288, (6, 13), 2.0, (1,), 0),
    1567: (524_288, (7, 15), 2 - 1.9 * 157 / 3290, (1,), 0),
    1958: (524_288, (8, 17), 2 - 1.9 * 548 / 3290, (1,), 0),
    2350: (524_288, (9, 19), 2 - 1.9 * 940 / 3290, (1,), 0),
    2742: (524_288, (10, 21), 2 - 1.9 * 1332 / 3290, (1,), 0),
    3133: (524_288, (11, 23), 2 - 1.9 * 1723 / 3290, (1,), 0),
    4699: (524_288, (11, 23), 2 - 1.9 * 3289 / 3290, (1,), 0),
    4700: (524_288, (11, 23), 0.1, (1,), 0),
    4739: (524_288, (11, 23), 0.1, (1,), 0),
}


@pytest.mark.parametrize("step", MEDIUM_AT)
def test_medium_at_every_boundary(step):
    tokens, windows, lr, weights, prefix = MEDIUM_AT[step]
    settings = MEDIUM.at(step)
    assert (settings.stage.tokens, settings.stage.max_doc_len) == (tokens, 4096)
    assert settings.windows == (128 * windows[0], 128 * windows[1])
    assert settings.lr == pytest.approx(lr, rel=1e-12)
    assert settings.prediction_weights == pytest.approx(weights, rel=1e-12)
    assert settings.prefix_weight == pytest.approx(prefix, rel=1e-12)


def test_medium_has_its_numbers():
    assert (MEDIUM.schedule.total_steps, MEDIUM.target_loss, MEDIUM.coordinate_descent_tuning) == (4740, 2.92, True)
    assert MEDIUM.validation_at(4740).windows == (11 * 128, 27 * 128)
    frequencies, scale = yarn_reference(128, [128 * w for w in (3, 7, 11, 13)])  # YaRN ends at 13
    for step in (1175, 3133, 4739):
        assert MEDIUM.at(step).frequencies == pytest.approx(frequencies, rel=1e-12)
        assert MEDIUM.at(step).attn_scale == pytest.approx(scale, rel=1e-12)
    assert (MEDIUM.optimizer.adam_lr, MEDIUM.optimizer.muon_lr) == (0.004, 0.015)
    assert MEDIUM.optimizer.rules == SMALL.optimizer.rules


def test_xl_sees_as_many_tokens_as_the_run_of_october_2024():
    tokens = sum(XL.at(step).stage.tokens for step in range(XL.schedule.total_steps))
    assert XL.schedule.total_steps == 20_344 and tokens == pytest.approx(20_344 * 491_520, rel=2e-3)


def test_only_medium_tunes_by_coordinate_descent():
    assert [name for name, track in TRACKS.items() if track.coordinate_descent_tuning] == ["medium"]


def test_only_the_final_validation_widens_the_window():
    """Catches: a wider window in earlier validations, or a YaRN change that comes with it."""
    last, final = SMALL.at(LAST), SMALL.validation_at(1285)
    assert final.windows == (6 * 128, 20 * 128)
    assert (final.frequencies, final.attn_scale) == (last.frequencies, last.attn_scale)
    for step in (0, 250, 423, 847, 1270, LAST):
        assert SMALL.validation_at(step) == SMALL.at(step)


@pytest.mark.golden
def test_every_step_of_small_matches_the_golden_run():
    """Catches: any other reading of stages, cooldown, momentum and weights than that of the golden numbers, which a
    second implementation computed; the last of them are of the final validation."""
    for step in range(LAST + 1):
        settings, stage = SMALL.at(step), int(GOLDEN["stage"][step])
        weights = (*settings.prediction_weights, 0.0, 0.0)[:3]
        np.testing.assert_allclose(settings.lr, GOLDEN["lr"][step], rtol=1e-12)
        np.testing.assert_allclose(settings.momentum, GOLDEN["momentum"][step], rtol=1e-12)
        np.testing.assert_allclose(weights, GOLDEN["prediction_weights"][step], rtol=1e-12)
        np.testing.assert_allclose(settings.prefix_weight, GOLDEN["prefix_weight"][step], rtol=1e-12)
        assert settings.stage is (*SMALL.schedule.stages, SMALL.schedule.extension)[stage]
        assert settings.unties == (step == GOLDEN["split_step"])


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
        assert 0.15 - 1e-12 <= settings.lr <= 1.73 and 0.85 - 1e-12 <= settings.momentum <= 0.95 + 1e-12
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
    for network in track.model.networks:
        assert f"coefficients {network.name}" in shown
    tokens = " ".join(str(stage.tokens) for stage in track.schedule.stages)
    assert f"--schedule.stages.I. tokens {tokens}" in shown
    assert "evals/plan.py" in shown


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
    write_token_bytes(tmp_path, 300)
    trainer = Trainer(track, cpu(), tmp_path, seed=0)
    losses = [trainer.train_step(step).item() for step in range(4)]
    assert losses[-1] < losses[0]
    assert trainer.params["mlp_bank"].shape[0] == 4


@pytest.mark.parametrize("track", [NANO, SMALL], ids=lambda track: track.name)
def test_every_depth_has_gradients_for_all_its_parameters(track):
    """Catches: a parameter of a layer that is not there (its skip, mix, value embedding): its step would fail."""
    for num_layers in range(1, track.model.num_layers + 1):
        model = replace(track.model, num_layers=num_layers, num_heads=2, head_dim=8, vocab_size=300)
        gpt = GPT(model, cpu())
        row = make_row(np.arange(33), np.array([0, 20]), 32, model)
        gpt(row, replace(track, model=model).at(0), torch.ones(2))[0].backward()
        assert [name for name, p in gpt.named_parameters() if p.grad is None] == [], num_layers


def test_the_tiny_track_of_the_tests_crosses_all_changes():
    """Catches: an edit of `nano` after which the tests no longer pass stages, untying and every technique."""
    track = tiny_track()
    s = track.schedule
    assert s.total_steps == 20 and s.untie_step == 13 and len(s.stages) >= 2
    assert len({stage.tokens for stage in s.stages}) == len(s.stages)
    model = track.model
    assert any(layer.paired for layer in model.layers) and any(layer.long for layer in model.layers)
    assert any(layer.attention is None for layer in model.layers) and any(layer.late for layer in model.layers)
    assert any(layer.table is not None for layer in model.layers) and model.ngram_signs and model.smear
    names = {network.name for network in model.networks}
    assert names == {"pre", "post", "mix_in", "mix_out", "resid", "branch"}
    roles = {output.role for network in model.networks for output in network.outputs}
    assert roles >= {"xsa", "gate", "skip", "dc_in", "dc_out", "values", "end"}
    assert len({s.prefix_weight for s in map(track.at, range(20))}) > 3
