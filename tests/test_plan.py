"""The plan of a track against counted bytes, and against itself."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, cpu

import train_gpt
from plan import (
    counting,
    flops_per_token,
    gpu_runtime,
    options_that_fit,
    parameter_counts,
    plan,
    plan_memory,
    print_plan,
)
from train_gpt import GPT, NANO, SMALL, TRACKS, XL, Options, SpeedrunError

NARROW = replace(  # every part of `small`, in rows of 2,048 tokens
    SMALL,
    model=replace(SMALL.model, vocab_size=257, num_heads=2, head_dim=16, ngram_rows=1024, ngram_signs=64),
    data=replace(SMALL.data, rows_per_step=192),
)


SAMPLED = replace(NARROW, model=replace(NARROW.model, vocab_size=4096, sampled_vocab=1024))


@pytest.mark.parametrize("track", [NANO, NARROW, SAMPLED], ids=["nano", "small", "sampled"])
def test_a_plan_counts_what_a_step_on_the_cpu_holds(track):
    """Weights, optimizer state and gradients to the byte, activations to 10%: planned without data, counted with it.
    Catches: a part of the model that the plan does not run, such as n-grams or composed heads; buffers forgotten."""
    runtime = cpu()
    planned = plan_memory(track, runtime)
    model = GPT(track.model, runtime)
    params = dict(model.named_parameters())
    optimizer = train_gpt.Optimizer(params, track.optimizer, runtime)
    length = track.schedule.extension.tokens // track.data.rows_per_step
    tokens = np.random.default_rng(0).integers(0, 257, length + 1)
    row = train_gpt.make_row(tokens, np.array([0, 700]), 1348, track.model)
    if count := track.model.sampled_vocab:
        sampled, n = train_gpt.sample_vocab(np.isin(np.arange(4096), tokens), count, 0, 0, 0)
        row = row._replace(sampled=sampled, num_targets=n)
    with counting() as saved:
        loss, _ = model(row, track.at(track.schedule.total_steps - 1), torch.ones(1))
    for p in params.values():
        saved.pop(p.untyped_storage()._cdata, None)
    loss.backward()
    size = lambda tensors: sum(t.nbytes for t in tensors)
    assert planned.weights == size(model.state_dict().values()) + size([*model.buffers()])
    assert planned.gradients == size(p.grad for p in params.values())
    assert planned.optimizer == size(t for state in optimizer.state.values() for t in state.values())
    assert planned.activations == pytest.approx(sum(saved.values()), rel=0.1)


def test_a_plan_of_several_processes_shares_the_state():
    """bfloat16 weights and gradients on every rank, sums of those of the embedding, five tables of values and that of
    n-grams in float32, of the MLP's matrices and the head in bfloat16; momentum (4 bytes) and lower halves (2) of the
    banks shared."""
    one, eight = (plan_memory(SMALL, gpu_runtime(Options(), world, 80)) for world in (1, 8))
    matrices, numbers, signs, prefixes = 75_497_472, 635_885_377, 2 * 8192 * 768, 8 * 50304
    assert one.weights == pytest.approx(2 * numbers + signs + prefixes, rel=1e-6)
    sums = 4 * 768 * (6 * 50304 + 377_280) + 2 * (22 * 3072 * 768 + 768 * 50304)
    assert one.gradients == pytest.approx(2 * numbers + sums, rel=1e-6)
    assert one.optimizer > 6 * matrices
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=0.1)  # banks are padded to 8 pieces
    assert eight.activations == one.activations > 0


@pytest.mark.parametrize("name", ["small", "medium", "xl"])
def test_what_is_said_to_fit_is_no_larger_than_the_gpu(name):
    """Catches: a table of the largest GPU's logits above a verdict on those of a smaller one; more than there is."""
    track = TRACKS[name]
    text = plan(track, Options(), tokens_per_second=100_000)
    tokens = sum(track.at(step).stage.tokens for step in range(track.schedule.total_steps))
    assert text.startswith(f"{name}: ") and f"{tokens:,} tokens" in text and "100,000 tokens/s" in text
    rows = {line[:32].strip(): line[32:].replace(",", "").split() for line in text.splitlines() if line[32:]}
    numbers = lambda part: [float(word) for word in rows[part]]
    for size in (24, 40, 80, 141):
        said = re.findall(r"W = \d: ([^,\n]+)", re.search(rf"^ *{size} GB  (W.*)$", text, re.M)[1])
        needed = numbers(f"all with {size} GB")
        same = ("weights", "optimizer", "gradients", "activations", "CUDA, NCCL", f"logits with {size} GB")
        assert needed == pytest.approx([sum(column) for column in zip(*map(numbers, same), strict=True)], abs=1)
        assert [word == "fits" for word in said] == [megabytes <= 1000 * size for megabytes in needed]
    assert options_that_fit(XL, Options(), 8, 80) == "fits"


def test_nano_is_planned_for_a_cpu_and_a_gpu_only_where_that_is_asked_for():
    """Catches: how well the track of any CPU fits an H100."""
    text = plan(NANO, Options(dtype="float32"))
    assert "GB" not in text and "CUDA" not in text and re.search(r"^W = 1: 0:00:\d\d at 50 GFLOP/s", text, re.M)
    assert "80 GB  W = 1: fits" in plan(NANO, Options(device="cuda"))


def test_flops_of_a_token_by_hand():
    """GPT-2 of one layer: 6 N + 12 d T, N with the head."""
    model = replace(NANO.model, num_layers=1, paired_layers=(), long_layers=(), num_heads=2, head_dim=8, mlp_ratio=4)
    track = replace(NANO, model=model)
    assert flops_per_token(track, track.at(0)) == 6 * (12 * 256 + 16 * 272) + 12 * 16 * 65
    sampled = replace(track, model=replace(model, sampled_vocab=100))
    assert flops_per_token(sampled, track.at(0)) == 6 * (12 * 256 + 16 * 100) + 12 * 16 * 65


def test_flops_of_networks_and_composed_heads_by_hand():
    """Eight gates of a network of width 3, and heads that see 5 tokens once more. Catches: these forgotten, a table of
    n-grams that counts as a matrix, tokens beyond the layers composed as well."""
    model = replace(NANO.model, num_layers=2, long_layers=(1,), head_dim=8, mlp_ratio=4)
    model = replace(model, value_layers=(0, 1), gate_networks=True, network_width=3)
    track = replace(NANO, model=replace(model, dc_layers=(1, 2), dc_window=5))
    weights = 2 * 12 * 256 + 16 * 272 + 3 * 16 + 8 * 3
    assert flops_per_token(track, track.at(0)) == 6 * weights + 12 * 16 * (65 + 193 + 5)


def test_parameter_counts():
    """As README states them: all, in matrices, in embeddings and head."""
    expected = {
        "nano": (8_624_160, 131_072, 8_493_056),
        "small": (635_885_377, 75_699_584, 560_185_344),
        "medium": (764_026_977, 197_402_112, 566_624_256),
        "xl": (2_313_108_837, 1_463_171_328, 849_936_384),
    }
    readme = (REPO / "README.md").read_text()
    for name, counts in expected.items():
        assert parameter_counts(TRACKS[name]) == counts, name
        told = ", ".join(f"{count / 1e6:.{2 if name == 'nano' else 0}f}M" for count in counts)
        assert f"| {told} |" in readme, f"{name}: {told}"


def test_the_command_takes_options_of_the_track_and_of_its_sibling(capsys):
    """Catches: a plan of the whole track whatever was asked; numbers that divide by zero."""
    print_plan(
        ["nano", "--width", "0.5", "--model.num-layers", "3", "--dtype", "float32", "--tokens-per-second", "24576"]
    )
    out = capsys.readouterr().out
    assert "W = 1: 0:00:05 at 24,576 tokens/s" in out and "125,696 tokens" in out
    assert f"{4 * 3 * 64**2 + 2 * 3 * 64 * 64 * NANO.model.mlp_ratio:,} of them in matrices" in out
    with pytest.raises(SpeedrunError, match="vocab-multiple: found 0"):
        print_plan(["nano", "--model.vocab-multiple", "0"])
    for wrong in ("--utilization=0", "--tokens-per-second=0", "--tokens-per-second=nan"):
        with pytest.raises(SystemExit):
            print_plan(["nano", wrong])
