"""The reference against the golden numbers: an oracle that is wrong would make every other test worthless.

golden_model.npz and golden_optimizer.npz were computed in float64 by an implementation of the SPEC that is not here.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import (
    FLOAT64_EPS,
    SMALL,
    TABLE,
    Layout,
    NorMuon,
    ReferenceOptimizer,
    forward,
    initial_frequencies,
    normuon_step,
    polar_express,
    train_loss,
    val_loss,
    yarn,
)
from torch import Tensor

HERE = Path(__file__).parent
RTOL = 1e-12  # tight enough to tell where Adam adds its eps, which is worth 3e-11
CASES = (0, 1, 2)
LAYOUT = dataclasses.replace(SMALL, head_dim=8)
INPUTS = ("tokens", "targets", "cu_seqlens")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name: str) -> dict[str, Tensor]:
    with np.load(HERE / name) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def weights_of(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in golden.items() if name not in INPUTS and not name.startswith("case")}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load("golden_model.npz")


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal to RTOL of the largest entry: entries that cancel to nearly nothing are only as exact as their terms."""
    assert actual.shape == expected.shape, what
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= RTOL * size, f"{what}: off by {error:.3g} where the largest entry is {size:.3g}"


def run(
    golden: dict[str, Tensor],
    case: int = 0,
    layout: Layout = LAYOUT,
    tokens: Tensor | None = None,
    **changed: Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """The leaf weights of a golden case and its logits; `changed` replaces or adds weights."""
    weights = weights_of(golden) | changed
    weights = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    short, long = golden[f"case{case}_windows"].tolist()
    logits = forward(
        weights,
        layout,
        golden["tokens"] if tokens is None else tokens,
        golden["cu_seqlens"],
        (short, long),
        golden[f"case{case}_frequencies"],
        golden[f"case{case}_attn_scale"].item(),
    )
    return weights, logits


# ======================================================================================================================
# Model
# ======================================================================================================================


@pytest.mark.parametrize("case", CASES)
def test_model_matches_golden(golden: dict[str, Tensor], case: int) -> None:
    """Catches any slip in the model or the losses: a sign, an order, an off-by-one in a mask, a gate's factor of 2."""
    weights, logits = run(golden, case)
    # The golden logits are stored as float32 and lie in (0, 23), where its spacing is at most 2^-19.
    assert (logits - golden[f"case{case}_logits"]).abs().max() <= 2**-20 * 1.001
    loss = train_loss(logits, golden["targets"], golden[f"case{case}_prediction_weights"])
    check(loss.detach(), golden[f"case{case}_loss_sum"], "loss_sum")
    check(val_loss(logits, golden["targets"]).detach(), golden[f"case{case}_val_loss"], "val_loss")

    loss.backward()
    compared = set()
    for name, weight in weights.items():
        grad = weight.grad
        assert grad is not None, name
        if f"case{case}_grad_{name}" in golden:
            values = {"grad": grad}
        else:
            rows = grad.flatten(1)
            values = {"gradnorm": rows.norm(dim=1), "gradhead": rows[:, :8]}
        for kind, value in values.items():
            key = f"case{case}_{kind}_{name}"
            check(value, golden[key], key)
            compared.add(key)
    assert compared == {key for key in golden if key.startswith(f"case{case}_grad")}  # none left out


def test_yarn_steps_lead_from_one_golden_case_to_the_next(golden: dict[str, Tensor]) -> None:
    """Catches a ramp the wrong way round, a wrong r, and YaRN starting from the first frequencies at every step."""
    frequencies, attn_scale, window = initial_frequencies(LAYOUT.head_dim), 0.1, None
    for case in CASES:
        long = golden[f"case{case}_windows"][1].item()
        if window is not None:
            frequencies, attn_scale = yarn(frequencies, attn_scale, window, long)
        window = long
        check(frequencies, golden[f"case{case}_frequencies"], "frequencies")
        assert attn_scale == pytest.approx(golden[f"case{case}_attn_scale"].item(), rel=RTOL)


def test_logits_depend_on_no_later_token(golden: dict[str, Tensor]) -> None:
    """Catches a leak from the future, of which paired heads have a way of their own (position 2t sees 2t+1)."""
    tokens = golden["tokens"].clone()
    tokens[50] = (tokens[50] + 1) % 256
    before, after = run(golden)[1], run(golden, tokens=tokens)[1]
    assert torch.equal(before[:50], after[:50])
    assert not torch.equal(before[50], after[50])


def test_float32_epsilon_would_not_match(golden: dict[str, Tensor]) -> None:
    """Catches an epsilon that is ignored: with float32's the logits move, by more than the comparison allows."""
    weights = weights_of(golden)
    settings = ((8, 24), golden["case0_frequencies"], 0.1)
    logits = [
        forward(weights, LAYOUT, golden["tokens"], golden["cu_seqlens"], *settings, norm_eps=eps)
        for eps in (FLOAT64_EPS, torch.finfo(torch.float32).eps)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_skips_add_up(golden: dict[str, Tensor]) -> None:
    """Catches a gate or λ taken for the wrong skip: skip 1→3 joins the golden one, before or after it in the list."""
    gate, skip_lambda = golden["skip_gate"], golden["skip_lambda"].double()
    other_gate, other_lambda = gate.flip(0), torch.tensor(-0.7, dtype=torch.float64)
    alone = run(golden)[1]
    results = []
    for order in ((0, 1), (1, 0)):
        skips = [((3, 6), gate, skip_lambda), ((1, 3), other_gate, other_lambda)]
        pairs, gates, lambdas = zip(*(skips[i] for i in order), strict=True)
        layout = dataclasses.replace(LAYOUT, skips=pairs)
        results.append(run(golden, layout=layout, skip_gate=torch.stack(gates), skip_lambda=torch.stack(lambdas))[1])
    assert torch.equal(results[0], results[1])
    assert (results[0] - alone).abs().max() > 1e-3
    # σ(-1000) = 0 closes the second skip and leaves the golden one.
    closed = torch.stack([skip_lambda, torch.tensor(-1000.0, dtype=torch.float64)])
    layout = dataclasses.replace(LAYOUT, skips=((3, 6), (1, 3)))
    logits = run(golden, layout=layout, skip_gate=torch.stack([gate, other_gate]), skip_lambda=closed)[1]
    assert torch.equal(logits, alone)


def test_second_input_embedding_is_mixed_in_beside_x0(golden: dict[str, Tensor]) -> None:
    """Catches x02 that is smeared, unnormed or mixed elsewhere: as a copy of x0 it can only do what x0_λ does."""
    embed, x0_lambda = golden["embed"], golden["x0_lambda"].double()
    no_smear = torch.zeros((), dtype=torch.float64)
    layout = dataclasses.replace(LAYOUT, second_embed=(1,))
    split = {"x0_lambda": 0.25 * x0_lambda, "x02_lambda": 0.75 * x0_lambda}
    half = run(golden, layout=layout, smear_lambda=no_smear, embed2=embed, **split)[1]
    torch.testing.assert_close(half, run(golden, smear_lambda=no_smear)[1], rtol=1e-12, atol=1e-12)


# ======================================================================================================================
# Optimizer
# ======================================================================================================================


def test_optimizer_matches_golden() -> None:
    """Catches any slip in the 12 steps: eps, bias correction, decay, momentum, accumulation, tying, taking over."""
    golden = load("golden_optimizer.npz")
    names = [key.removeprefix("start_") for key in golden if key.startswith("start_")]
    optimizer = ReferenceOptimizer({name: golden[f"start_{name}"] for name in names}, TABLE)
    split_step = int(golden["split_step"])
    compared = set()
    for step in range(12):
        gradients = {name: golden[f"grad{step}_{name}"] for name in names}
        lr_factor, momentum = golden["lr"][step].item(), golden["momentum"][step].item()
        optimizer.step(gradients, step, lr_factor, momentum, split_step)
        for name in names:
            if f"after{step}_{name}" in golden:
                check(optimizer.params[name], golden[f"after{step}_{name}"], f"after{step}_{name}")
                compared.add(f"after{step}_{name}")
    assert compared == {key for key in golden if key.startswith("after")}


@pytest.mark.parametrize("shape", [(24, 24), (48, 12), (12, 48)])
def test_polar_express_comes_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """Catches a wrong coefficient or side: the truth is UVᵀ of the SVD, and the five rounds stay within 20% of it."""
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    X = polar_express(G)
    # Same singular vectors, singular values near 1: UᵀXV is diagonal.
    core = U.T @ X @ Vh.T
    values = core.diagonal()
    assert (core - values.diag()).abs().max() < 1e-9
    assert values.min() > 0.8
    assert values.max() < 1.2


def test_zero_matrices_of_a_bank_stay_zero() -> None:
    """Catches 0/0 in the padding of the banks."""
    bank = torch.zeros(2, 8, 4, dtype=torch.float64)
    assert not normuon_step(bank, torch.zeros_like(bank), {}, NorMuon(), 1.0, 0.95).any()
