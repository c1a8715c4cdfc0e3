"""The reference itself: an oracle that is wrong would make every other test worthless.

When make_golden.py was written, it gave the numbers of an implementation by other hands to 1e-14 of the largest entry:
losses, gradients and 12 optimizer steps. What has changed in it since stands on the tests here, and on train_gpt.py,
which says the same in another way.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden import FILES, LAYOUT, VOCAB
from reference import FLOAT64_EPS, Layout, NorMuon, forward, normuon_step, polar_express
from torch import Tensor

HERE = Path(__file__).parent
RTOL = 1e-12  # tight enough to tell where Adam adds its eps, which is worth 3e-11
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


def run(
    golden: dict[str, Tensor],
    layout: Layout = LAYOUT,
    tokens: Tensor | None = None,
    **changed: Tensor,
) -> Tensor:
    """Logits of the first golden case; `changed` replaces or adds weights."""
    short, long = golden["case0_windows"].tolist()
    return forward(
        weights_of(golden) | changed,
        layout,
        golden["tokens"] if tokens is None else tokens,
        golden["cu_seqlens"],
        (short, long),
        golden["case0_frequencies"],
        golden["case0_attn_scale"].item(),
    )


# ======================================================================================================================
# Golden numbers
# ======================================================================================================================


@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_the_golden_numbers_are_those_that_the_reference_makes(name: str) -> None:
    """Catches a formula of the reference that was changed, in any place, while the numbers stayed: train_gpt.py would
    be held against two truths. An error is relative to the largest entry: those that cancel to nearly nothing are only
    as exact as their terms."""
    made = {key: torch.from_numpy(np.asarray(value)) for key, value in FILES[name]().items()}
    kept = load(name)
    assert kept.keys() == made.keys(), "make them again: python tests/make_golden.py"
    for key, expected in made.items():
        found = kept[key]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), key
        size, off = expected.abs().max().item(), (found.double() - expected.double()).abs().max().item()
        allowed = 2**-19 if key.endswith("_logits") else RTOL * size  # float32 below 23: one step of its spacing
        assert off <= allowed, f"{key}: off by {off:.3g} where the largest entry is {size:.3g}: make the numbers again"


# ======================================================================================================================
# Model
# ======================================================================================================================


def test_logits_depend_on_no_later_token(golden: dict[str, Tensor]) -> None:
    """Catches a leak from the future, of which paired heads have a way of their own (position 2t sees 2t+1)."""
    tokens = golden["tokens"].clone()
    tokens[50] = (tokens[50] + 1) % VOCAB
    before, after = run(golden), run(golden, tokens=tokens)
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
    alone = run(golden)
    results = []
    for order in ((0, 1), (1, 0)):
        skips = [((3, 6), gate, skip_lambda), ((1, 3), other_gate, other_lambda)]
        pairs, gates, lambdas = zip(*(skips[i] for i in order), strict=True)
        layout = dataclasses.replace(LAYOUT, skips=pairs)
        results.append(run(golden, layout=layout, skip_gate=torch.stack(gates), skip_lambda=torch.stack(lambdas)))
    assert torch.equal(results[0], results[1])
    assert (results[0] - alone).abs().max() > 1e-3
    # σ(-1000) = 0 closes the second skip and leaves the golden one.
    closed = torch.stack([skip_lambda, torch.tensor(-1000.0, dtype=torch.float64)])
    layout = dataclasses.replace(LAYOUT, skips=((3, 6), (1, 3)))
    logits = run(golden, layout=layout, skip_gate=torch.stack([gate, other_gate]), skip_lambda=closed)
    assert torch.equal(logits, alone)


def test_second_input_embedding_is_mixed_in_beside_x0(golden: dict[str, Tensor]) -> None:
    """Catches x02 that is smeared, unnormed or mixed elsewhere: as a copy of x0 it can only do what x0_λ does."""
    embed, x0_lambda = golden["embed"], golden["x0_lambda"].double()
    no_smear = torch.zeros((), dtype=torch.float64)
    layout = dataclasses.replace(LAYOUT, second_embed=(1,))
    split = {"x0_lambda": 0.25 * x0_lambda, "x02_lambda": 0.75 * x0_lambda}
    half = run(golden, layout=layout, smear_lambda=no_smear, embed2=embed, **split)
    torch.testing.assert_close(half, run(golden, smear_lambda=no_smear), rtol=1e-12, atol=1e-12)


# ======================================================================================================================
# Optimizer
# ======================================================================================================================


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
