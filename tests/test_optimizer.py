"""Optimizer: Polar Express against SVD, NorMuon and Adam against plain float64 formulas, all against golden numbers."""

import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cpu
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_model import CONFIGS
from torch import Tensor, nn
from torch._dynamo.utils import counters

import train_gpt
from train_gpt import (
    GPT,
    SMALL,
    TRACKS,
    Optimizer,
    OptimizerConfig,
    Rule,
    Rules,
    join_halves,
    polar_express,
    split_halves,
)

GOLDEN = np.load(Path(__file__).parent / "golden_optimizer.npz")

# Polar Express, arXiv:2505.16932: (a, b, c) of its rounds, typed in once more.
QUINTICS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def settings_of(step: int, lr: float = 1.0, momentum: float = 0.9, tied: bool = False, unties: bool = False):
    return replace(SMALL.at(0), step=step, lr=lr, momentum=momentum, tied=tied, unties=unties)


# ----------------------------------------------------------------------------------------------------------------------
# Polar Express
# ----------------------------------------------------------------------------------------------------------------------


def quintics_of_singular_values(G: np.ndarray) -> np.ndarray:
    """What Polar Express makes of a matrix, exactly: its five polynomials applied to the singular values."""
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    s = s / (1.02 * np.sqrt((G**2).sum()) + 1e-6)
    for a, b, c in QUINTICS:
        s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vt


def with_spectrum(rows: int, cols: int, log_condition: float, seed: int) -> np.ndarray:
    """A random matrix whose singular values fall from 1 to 10^-log_condition."""
    rng = np.random.default_rng(seed)
    k = min(rows, cols)
    U, V = (np.linalg.qr(rng.standard_normal((n, k)))[0] for n in (rows, cols))
    return (U * 10.0 ** -np.linspace(0, log_condition, k)) @ V.T


SHAPES = [(16, 16), (64, 16), (16, 64), (48, 12), (7, 13), (13, 7), (1, 5), (5, 1), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("log_condition", [0.0, 1.0, 4.0])
def test_polar_express_applies_its_polynomials_to_the_singular_values(shape, log_condition):
    """Catches: a wrong coefficient, order or scale, a transposed result, matrices of a bank that mix."""
    G = np.stack([with_spectrum(*shape, log_condition, seed) * 10.0 ** (seed - 3) for seed in range(6)])
    out = polar_express(torch.from_numpy(G)).numpy()
    np.testing.assert_allclose(out, np.stack([quintics_of_singular_values(g) for g in G]), rtol=1e-9, atol=1e-10)


# The composition of the five quintics maps [0.001, 1/1.02] into this band (evaluated on 2 million points).
BAND = (0.8588, 1.1412)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
def test_polar_express_is_near_the_orthogonal_factor_of_the_svd(shape, scale):
    """Catches: iterations that diverge or are too few. Against U V^T; all singular values end in the known band."""
    G = with_spectrum(*shape, 1.0, seed=3) * scale
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    out = polar_express(torch.from_numpy(G)[None])[0].numpy()
    assert np.linalg.norm(out - U @ Vt, 2) < BAND[1] - 1
    s = np.linalg.svd(out, compute_uv=False)
    assert BAND[0] <= s.min() and s.max() <= BAND[1]


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_polar_express_in_bfloat16_stays_near_the_svd(shape):
    """Catches: an overflow or loss of orthogonality in the precision of real runs."""
    G = with_spectrum(*shape, 1.0, seed=5)
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    out = polar_express(torch.from_numpy(G)[None].bfloat16())
    assert out.dtype == torch.bfloat16
    assert np.linalg.norm(out[0].double().numpy() - U @ Vt, 2) < 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_polar_express_of_zero_is_zero(dtype):
    """Catches: NaN from the padding of the banks, or from the first steps of matrices without gradient."""
    G = torch.zeros(3, 8, 4, dtype=dtype)
    G[1] = torch.eye(8, 4)
    out = polar_express(G)
    assert torch.isfinite(out).all() and (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_fewer_rounds_are_the_first_polynomials(rounds):
    """Catches: rounds counted wrongly, or the last polynomials instead of the first."""
    G = with_spectrum(12, 8, 1.0, seed=0)
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    s = s / (1.02 * np.sqrt((G**2).sum()) + 1e-6)
    for a, b, c in QUINTICS[:rounds]:
        s = a * s + b * s**3 + c * s**5
    out = polar_express(torch.from_numpy(G)[None], rounds=rounds)[0].numpy()
    np.testing.assert_allclose(out, (U * s) @ Vt, rtol=1e-9, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Update rules, one matrix or number at a time, in float64
# ----------------------------------------------------------------------------------------------------------------------


class PlainNorMuon:
    """NorMuon (arXiv:2510.05491) of one matrix: Nesterov momentum, Polar Express, rows (or, of a wide matrix, columns)
    evened out by a running mean of their mean squares to the norm they had, decay only of what the update shrinks."""

    def __init__(self, p: np.ndarray, lr_mul: float):
        self.p, self.lr_mul = p.copy(), lr_mul
        self.buffer = np.zeros_like(p)
        rows, cols = p.shape
        self.axis = 1 if rows >= cols else 0
        self.mean_square = np.zeros(rows if rows >= cols else cols)

    def step(self, g: np.ndarray, lr_factor: float, mu: float) -> None:
        rows, cols = self.p.shape
        self.buffer += (1 - mu) * (g - self.buffer)
        u = quintics_of_singular_values((1 - mu) * g + mu * self.buffer)
        norm = np.sqrt((u**2).sum())
        self.mean_square = 0.9 * self.mean_square + 0.1 * (u**2).mean(self.axis)
        u = u / np.sqrt(np.expand_dims(self.mean_square, self.axis))
        u *= norm / np.sqrt((u**2).sum())
        lr = 0.023 * lr_factor
        step = lr * self.lr_mul * math.sqrt(max(1, rows / cols))
        self.p = self.p - step * u - step * lr * 1.2 * self.p * (u * self.p >= 0)


class PlainAdam:
    """Adam of an array, with decay only of what the update shrinks (arXiv:2510.12402), quadratic in the learning rate;
    `step` gets the sum of the gradients since the last one."""

    def __init__(self, p: np.ndarray, betas: tuple[float, float], lr_mul: float, wd_mul: float):
        self.p, self.betas, self.lr_mul, self.wd_mul = p.copy(), betas, lr_mul, wd_mul
        self.m, self.v, self.count = np.zeros_like(p), np.zeros_like(p), 0

    def step(self, g: np.ndarray, lr_factor: float) -> None:
        (b1, b2), lr = self.betas, 0.008 * lr_factor * self.lr_mul
        self.count += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        # eps is added to the root before its bias correction, as the public speedruns do
        corrected = math.sqrt(1 - b2**self.count) / (1 - b1**self.count)
        u = lr * corrected * self.m / (np.sqrt(self.v) + 1e-10)
        self.p = self.p - u - lr**2 * 0.005 * self.wd_mul * self.p * (u * self.p > 0)


@dataclass(frozen=True)
class FreeRules(Rules):
    """Rules for parameters that the tests make up."""

    bank: Rule = field(default=Rule("normuon", sharded=True, lr_mul=(1.0, 2.0)))
    numbers: Rule = field(default=Rule("adam", sharded=False, lr_mul=(5.0,), wd_mul=3.0, betas=(0.65, 0.95)))


FREE = OptimizerConfig(rules=FreeRules())
ADAGRAD = OptimizerConfig(rules=Rules(ngram_embed=Rule("adagrad", sharded=True, lr_mul=(3.0,))))


def optimizer_of(dtype: torch.dtype, config: OptimizerConfig = FREE, **arrays: np.ndarray):
    params = {name: nn.Parameter(torch.from_numpy(a.copy()).to(dtype)) for name, a in arrays.items()}
    return Optimizer(params, config, cpu(dtype)), params


def add_gradient(p: nn.Parameter, grad: np.ndarray) -> None:
    """What backward does."""
    g = torch.from_numpy(grad).to(p.dtype)
    p.grad = g if p.grad is None else p.grad + g


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16), (12, 8)])
def test_normuon_matches_the_plain_formula(shape):
    """Catches: momentum lerped the wrong way, rows evened out along the wrong side, a norm over the whole bank, lr_mul
    of fc and proj swapped, a missing shape factor, decay outside its mask or with the wrong learning rate."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, *shape)) * 0.3
    optimizer, params = optimizer_of(torch.float64, bank=start)
    plain = [PlainNorMuon(start[i], lr_mul=(1.0, 2.0)[i % 2]) for i in range(4)]
    for step in range(8):
        grad = rng.standard_normal(start.shape) * 10.0 ** rng.integers(-3, 3, (4, 1, 1))
        lr, mu = 1 + 0.1 * step, 0.85 + 0.01 * step
        add_gradient(params["bank"], grad)
        optimizer.step(settings_of(step, lr, mu))
        for i in range(4):
            plain[i].step(grad[i], lr, mu)
        expected = np.stack([p.p for p in plain])
        np.testing.assert_allclose(params["bank"].detach().numpy(), expected, rtol=1e-9, atol=1e-11)
        assert params["bank"].grad is None


def test_normuon_decays_only_where_the_update_shrinks_the_weight():
    """Catches: decay against the mask. A weight that the update makes larger must move by the update alone."""
    rng = np.random.default_rng(1)
    start, grad = rng.standard_normal((2, 1, 8, 8))
    decayed, kept = (OptimizerConfig(muon_decay=decay, rules=FreeRules()) for decay in (1.2, 0.0))
    after = {}
    for config in (decayed, kept):
        optimizer, params = optimizer_of(torch.float64, config, bank=start)
        add_gradient(params["bank"], grad)
        optimizer.step(settings_of(0))
        after[config.muon_decay] = params["bank"].detach().numpy()
    shrinks = (start - after[0.0]) * start > 0
    extra = after[1.2] - after[0.0]
    assert (extra[~shrinks] == 0).all() and shrinks.any() and not shrinks.all()
    np.testing.assert_allclose(extra[shrinks], -(0.023**2) * 1.2 * start[shrinks], rtol=1e-6)


def test_adam_matches_the_plain_formula_and_sums_two_gradients():
    """Catches: Adam stepping on even steps, gradients averaged or lost between them, a bias correction that counts
    steps of the run, decay without its mask or linear in lr."""
    rng = np.random.default_rng(2)
    start = rng.standard_normal((5, 7))
    start[0] = 0
    optimizer, params = optimizer_of(torch.float64, numbers=start)
    plain, total = PlainAdam(start, (0.65, 0.95), lr_mul=5.0, wd_mul=3.0), 0
    for step in range(12):
        grad = rng.standard_normal(start.shape) * 10.0 ** rng.integers(-6, 3)
        grad[:, 0] = 0  # a number that never gets a gradient stays where it is
        lr = 1 + 0.2 * step
        before = params["numbers"].detach().numpy().copy()
        add_gradient(params["numbers"], grad)
        optimizer.step(settings_of(step, lr))
        total = total + grad
        if step % 2 == 0:
            assert (params["numbers"].detach().numpy() == before).all()
            continue
        plain.step(total, lr)
        total = 0
        np.testing.assert_allclose(params["numbers"].detach().numpy(), plain.p, rtol=1e-11, atol=1e-13)
        assert params["numbers"].grad is None
    assert (params["numbers"].detach().numpy()[:, 0] == start[:, 0]).all()


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
def test_adagrad_matches_the_plain_formula_and_touches_no_other_row(layout):
    """Catches: a step size per number, a step on even steps, rows named twice of which one gradient counts, a row
    without a gradient that decays or moves on."""
    rng = np.random.default_rng(3)
    start = rng.standard_normal((9, 4))
    optimizer, params = optimizer_of(torch.float64, ADAGRAD, ngram_embed=start)
    table, plain, squares, total = params["ngram_embed"], start.copy(), np.zeros(9), np.zeros_like(start)
    for step in range(10):
        rows = rng.integers(0, 8, 5)  # some of them twice; the last one never
        values = rng.standard_normal((5, 4)) * 10.0 ** rng.integers(-4, 3)
        np.add.at(total, rows, values)
        indices, values = torch.from_numpy(rows)[None], torch.from_numpy(values)
        sparse = torch.sparse_coo_tensor(indices, values, (9, 4), check_invariants=True)
        grad = sparse if layout == torch.sparse_coo else sparse.to_dense()
        table.grad = grad if table.grad is None else table.grad + grad
        before = table.detach().numpy().copy()
        optimizer.step(settings_of(step, lr=1 + 0.2 * step))
        untouched = np.ones(9, bool) if step % 2 == 0 else ~total.any(1)
        assert (table.detach().numpy()[untouched] == before[untouched]).all() and untouched[8]
        if step % 2:
            squares += (total**2).mean(1)
            lr = 0.008 * 3 * (1 + 0.2 * step)
            plain -= lr * total / (np.sqrt(squares)[:, None] + 1e-10)
            total[:] = 0
        np.testing.assert_allclose(table.detach().numpy(), plain, rtol=1e-11, atol=1e-13)
    assert optimizer.state["ngram_embed"].keys() == {"square_sum"} and table.grad is None


def test_without_caution_adam_is_adamw():
    """Against torch's AdamW, whose decay takes lr * decay of every weight; ours takes lr^2 * decay * wd_mul."""
    config = replace(FREE, cautious=False)
    rng = np.random.default_rng(5)
    optimizer, params = optimizer_of(torch.float64, config, numbers=rng.standard_normal((5, 7)))
    lr = config.adam_lr * 5
    twin = nn.Parameter(params["numbers"].detach().clone())
    oracle = torch.optim.AdamW([twin], lr=lr, betas=(0.65, 0.95), eps=0, weight_decay=lr * config.adam_decay * 3)
    for step in range(1, 12, 2):
        grad = rng.standard_normal((5, 7))
        add_gradient(params["numbers"], grad)
        add_gradient(twin, grad)
        optimizer.step(settings_of(step))
        oracle.step()
        oracle.zero_grad()
        torch.testing.assert_close(params["numbers"].detach(), twin.detach(), rtol=1e-9, atol=1e-9)


def test_without_second_moment_and_caution_normuon_is_muon():
    """Against Muon's formula: Nesterov momentum, orthogonal update, decay of every weight."""
    config = replace(FREE, cautious=False, rules=FreeRules(bank=Rule("muon", sharded=True)))
    rng = np.random.default_rng(6)
    p = rng.standard_normal((12, 8))
    optimizer, params = optimizer_of(torch.float64, config, bank=p[None])
    buffer = np.zeros_like(p)
    for step in range(6):
        grad = rng.standard_normal(p.shape)
        add_gradient(params["bank"], grad[None])
        optimizer.step(settings_of(step, momentum=0.9))
        buffer = 0.9 * buffer + 0.1 * grad
        lr = 0.023 * math.sqrt(12 / 8)
        p = p * (1 - lr * 0.023 * 1.2) - lr * quintics_of_singular_values(0.1 * grad + 0.9 * buffer)
        np.testing.assert_allclose(params["bank"][0].detach().numpy(), p, rtol=1e-9, atol=1e-11)
    assert optimizer.state["bank"].keys() == {"momentum"}


def test_head_and_embed_are_one_until_they_untie_and_go_on_with_the_heads_state():
    """Catches: the embedding's gradient lost or not transposed, an embedding updated on its own while tied, a hand-over
    of the state untransposed, a step early or late, or that leaves the two sharing memory."""
    rng = np.random.default_rng(3)
    d, V = 6, 16
    start = rng.standard_normal((d, V))
    optimizer, params = optimizer_of(torch.float64, OptimizerConfig(), head=start, embed=start.T.copy())
    args = ((0.5, 0.95), 1.0, 150.0)
    head, embed = PlainAdam(start, *args), None
    sums = {"head": 0, "embed": 0}
    for step in range(13):
        for name, shape in (("head", (d, V)), ("embed", (V, d))):
            grad = rng.standard_normal(shape)
            add_gradient(params[name], grad)
            sums[name] = sums[name] + grad
        optimizer.step(settings_of(step, 1 + 0.1 * step, tied=step <= 7, unties=step == 7))
        if step % 2:
            if step <= 7:
                head.step(sums["head"] + sums["embed"].T, 1 + 0.1 * step)
            else:
                head.step(sums["head"], 1 + 0.1 * step)
                embed.step(sums["embed"], 1 + 0.1 * step)
            sums = {"head": 0, "embed": 0}
            if step == 7:
                embed = PlainAdam(head.p.T, *args)
                embed.m, embed.v, embed.count = head.m.T.copy(), head.v.T.copy(), head.count
        np.testing.assert_allclose(params["head"].detach().numpy(), head.p, rtol=1e-11, atol=1e-13)
        expected = head.p.T if embed is None else embed.p
        np.testing.assert_allclose(params["embed"].detach().numpy(), expected, rtol=1e-11, atol=1e-13)
    assert not np.allclose(head.p.T, embed.p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_matrices_of_a_bank_stay_zero(dtype):
    """Catches: NaN or drift in the zero matrices that pad a bank to a multiple of the number of processes."""
    rng = np.random.default_rng(4)
    start = np.concatenate((rng.standard_normal((2, 8, 4)), np.zeros((2, 8, 4))))
    optimizer, params = optimizer_of(dtype, bank=start)
    for step in range(6):
        add_gradient(params["bank"], np.concatenate((rng.standard_normal((2, 8, 4)), np.zeros((2, 8, 4)))))
        optimizer.step(settings_of(step))
        assert (params["bank"][2:] == 0).all() and torch.isfinite(params["bank"]).all()
    assert all(torch.isfinite(t).all() for t in optimizer.state["bank"].values())


# ----------------------------------------------------------------------------------------------------------------------
# Golden numbers
# ----------------------------------------------------------------------------------------------------------------------


def parameter_of(golden: str) -> str:
    """The name of the model's parameter of which the golden numbers are."""
    network, _, part = golden.rpartition("_")
    if part in ("w1", "w2", "b"):
        network = {"in": "mix_in", "out": "mix_out"}.get(network, network)
        return f"{network}.{'bias' if part == 'b' else part}"
    both = {
        "resid_attn": "resid.bias",
        "resid_mlp": "resid.bias",
        "post_attn": "branch.bias",
        "post_mlp": "branch.bias",
    }
    return (both | {"bigram_embed": "ngram_embed"}).get(golden, golden)


def golden_arrays(prefix: str) -> dict[str, np.ndarray]:
    """Those of all parameters; what is two there and one in the model, one after the other."""
    found: dict[str, list[np.ndarray]] = {}
    for name in GOLDEN.files:
        if name.startswith(prefix):
            found.setdefault(parameter_of(name.removeprefix(prefix)), []).append(GOLDEN[name].astype(np.float64))
    return {name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for name, arrays in found.items()}


GOLDEN_START = golden_arrays("start_")


def is_stored_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """Single numbers are never below float32."""
    single = name.endswith((".bias", "_lambda", "gate_scale"))
    return torch.promote_types(dtype, torch.float32) if single else dtype


def golden_run(dtype: torch.dtype):
    """Run the golden steps; yields after each (step, optimizer, masters by name)."""
    stored = {name: torch.tensor(a).to(is_stored_as(name, dtype)) for name, a in GOLDEN_START.items()}
    params = {name: nn.Parameter(value) for name, value in stored.items()}
    optimizer = Optimizer(params, OptimizerConfig(), cpu(dtype))
    split = int(GOLDEN["split_step"])
    for step, (lr, momentum) in enumerate(zip(GOLDEN["lr"], GOLDEN["momentum"], strict=True)):
        for name, grad in golden_arrays(f"grad{step}_").items():
            add_gradient(params[name], grad)
        optimizer.step(settings_of(step, float(lr), float(momentum), tied=step <= split, unties=step == split))
        yield step, {name: master_of(p.data, optimizer.state[name].get("low")) for name, p in params.items()}


def master_of(p: Tensor, low: Tensor | None) -> np.ndarray:
    return (p if low is None else join_halves(p.view(low.shape), low).view(p.shape)).double().numpy()


@pytest.mark.golden
def test_golden_updates_in_float64():
    """Catches: any deviation of the optimizer from that of reference.py, to 1e-9 relative; a rule that is another."""
    compared = set()
    for step, masters in golden_run(torch.float64):
        for name, expected in golden_arrays(f"after{step}_").items():
            np.testing.assert_allclose(
                masters[name], expected, rtol=1e-9, atol=1e-12, err_msg=f"{name} after step {step}"
            )
            compared.add((step, name))
    assert compared == {(step, name) for step in (0, 1, 7, 11) for name in GOLDEN_START}
    assert set(GOLDEN_START) == {name for name, _ in GPT(CONFIGS["small"], cpu()).named_parameters()}


@pytest.mark.golden
@pytest.mark.parametrize(("dtype", "banks", "rest"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.05, 0.005)])
def test_golden_updates_in_the_precision_of_a_run(dtype, banks, rest):
    """Catches: state or master weights kept in bfloat16. What is compared is the way from the start, relative to its
    length; in bfloat16 the gradients, their sums and Polar Express are rounded to 8 bits. One number in a thousand is
    let off: where two gradients cancel, rounding can turn Adam's first step, which is little but a sign."""
    for step, masters in golden_run(dtype):
        for name, expected in golden_arrays(f"after{step}_").items():
            if name == "embed" and step < int(GOLDEN["split_step"]):
                continue  # a mirror of the head's upper halves: no master yet
            start = torch.tensor(GOLDEN_START[name])
            way = expected - start.numpy()
            error = masters[name] - start.to(is_stored_as(name, dtype)).double().numpy() - way
            error = np.sort(np.abs(error), axis=None)[: error.size - error.size // 1000]
            relative = banks if "bank" in name else rest
            allowed = relative * np.linalg.norm(way) + 2.0**-23 * np.linalg.norm(start)
            assert np.linalg.norm(error) <= allowed, (name, step)


# ----------------------------------------------------------------------------------------------------------------------
# Rules
# ----------------------------------------------------------------------------------------------------------------------

# The table of record 89, typed in once more: betas, lr_mul and wd_mul of Adam. Networks: the latter of biases is 0.
ADAM = {
    **dict.fromkeys(("sa_lambda", "smear_lambda", "skip_lambda"), ((0.9, 0.99), 5.0, 0.0)),
    "resid": ((0.9, 0.95), 5.0, 0.0),
    "branch": ((0.9, 0.95), 1.0, 0.0),
    "smear_gate": ((0.9, 0.99), 0.01, 0.0),
    "value_gates": ((0.9, 0.99), 1.0, 1.0),
    **dict.fromkeys(("mix_in", "mix_out"), ((0.9, 0.99), 0.25, 1.0)),
    **dict.fromkeys(("pre", "post"), ((0.9, 0.99), 0.1, 1.0)),
    "gate_scale": ((0.9, 0.99), 0.1, 0.0),
    **dict.fromkeys(("value_embeds", "ngram_embed"), ((0.75, 0.95), 75.0, 5.0)),
    **dict.fromkeys(("head", "embed"), ((0.5, 0.95), 1.0, 150.0)),
}
LR_MUL_OF_BANKS = {"qk_bank": (1.0,), "vo_bank": (1.0,), "mlp_bank": (1.0, 2.0)}
OWN = {"nano": {"gates": ((0.65, 0.95), 5.0, 0.0), "ngram_embed": ((0.9, 0.99), 7.0, 1.0)}}


@pytest.mark.parametrize("name", TRACKS)
def test_every_parameter_of_every_track_has_the_rule_of_the_table(name):
    """Catches: a parameter without a rule, one with that of another, a bias that decays."""
    config = TRACKS[name].optimizer
    optimizer = Optimizer(dict(GPT(CONFIGS[name], cpu()).named_parameters()), config, cpu())
    for parameter, rule in optimizer.rules.items():
        if parameter in LR_MUL_OF_BANKS:
            lr_mul = (1.0,) if name == "nano" else LR_MUL_OF_BANKS[parameter]
            assert (rule.kind, rule.lr_mul, rule.wd_mul) == ("normuon", lr_mul, 1.0), parameter
            continue
        network, _, part = parameter.partition(".")
        betas, lr_mul, wd_mul = (ADAM | OWN.get(name, {}))[network]
        wd_mul = 0.0 if part == "bias" else wd_mul
        found = (rule.kind, rule.betas, rule.lr_mul, rule.wd_mul, rule.eps)
        kind = "adagrad" if (name, parameter) == ("nano", "ngram_embed") else "adam"
        assert found == (kind, betas, (lr_mul,), wd_mul, 1e-10), parameter
    lr = {"small": (0.008, 0.023), "nano": (0.025, 0.028)}.get(name, (0.004, 0.015))
    assert (config.adam_lr, config.muon_lr, config.adam_decay, config.muon_decay) == (*lr, 0.005, 1.2)
    assert config.muon_beta2 == (0.95 if name == "nano" else 0.9)


def test_queries_and_keys_are_orthogonalized_in_pairs_of_heads_and_the_rest_whole():
    """Catches: matrices of single heads or of the whole layer, heads that are not neighbours, Wq with Wk in one."""
    config = replace(SMALL.model, vocab_size=50, head_dim=4, ngram_rows=8)  # width 24
    model = GPT(config, cpu(torch.float64, world_size=8))
    shapes = {"qk_bank": (64, 8, 24), "vo_bank": (24, 24, 24), "mlp_bank": (24, 96, 24)}
    assert {name: tuple(model.get_parameter(name).shape) for name in shapes} == shapes, "60, 20 and 22, padded"
    optimizer = Optimizer({"qk_bank": model.qk_bank}, OptimizerConfig(), cpu(torch.float64))
    rng = np.random.default_rng(0)
    start, grad = model.qk_bank.detach().numpy().copy(), rng.standard_normal((64, 8, 24))
    model.qk_bank.grad = torch.from_numpy(grad.copy())
    optimizer.step(settings_of(0))
    found = model.qk_bank.detach().numpy()
    for layer in range(10):
        whole = [array[6 * layer : 6 * layer + 6].reshape(2, 24, 24) for array in (start, grad, found)]  # Wq, Wk
        for of in (0, 1):
            for head in (0, 2, 4):
                rows = slice(4 * head, 4 * head + 8)
                plain = PlainNorMuon(whole[0][of][rows], lr_mul=1.0)
                plain.step(whole[1][of][rows], 1.0, 0.9)
                np.testing.assert_allclose(whole[2][of][rows], plain.p, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# bfloat16 with the low half of a float32 master
# ----------------------------------------------------------------------------------------------------------------------

any_float32 = hnp.arrays(np.uint32, st.integers(1, 20), elements=st.integers(0, 2**32 - 1))
special = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-40, -1e-45, 3.4e38, 1.1754944e-38])


@given(st.one_of(any_float32, st.lists(special, min_size=1).map(lambda x: np.array(x, np.float32).view(np.uint32))))
def test_high_and_low_half_are_the_float32_bit_for_bit(bits):
    """Catches: a sign extension of the low half, rounding instead of truncation, flushed subnormals."""
    master = torch.from_numpy(bits.view(np.float32).copy())
    high, low = torch.zeros(len(bits), dtype=torch.bfloat16), torch.zeros(len(bits), dtype=torch.int16)
    split_halves(master, high, low)
    assert (high.view(torch.int16).numpy().view(np.uint16) == bits >> 16).all()
    assert (low.numpy().view(np.uint16) == bits & 0xFFFF).all()
    assert (join_halves(high, low).numpy().view(np.uint32) == bits).all()


def check_bit_for_bit(kind: str, shape: tuple[int, ...], steps: int, config: OptimizerConfig = FREE) -> None:
    """The same run on bfloat16 with low halves and on a float32 parameter."""
    rng = np.random.default_rng(6)
    start = torch.from_numpy(rng.standard_normal(shape)).bfloat16()
    halves = nn.Parameter(start.clone())
    whole = nn.Parameter(start.float())
    by_halves, by_whole = (Optimizer({kind: p}, config, cpu(p.dtype)) for p in (halves, whole))
    for step in range(1, 2 * steps, 2):  # odd: Adam would add the gradients of two steps up in bfloat16
        grad = torch.from_numpy(rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 2)).bfloat16()
        grad[step % 3] = 0  # the row of a table that is not touched
        halves.grad, whole.grad = grad.clone(), grad.float()
        settings = settings_of(step, lr=0.01 + 0.1 * step)
        by_halves.step(settings)
        by_whole.step(settings)
        low = by_halves.state[kind]["low"]
        master = join_halves(halves.data.view(low.shape), low).view(shape)
        assert torch.equal(master.view(torch.int32), whole.data.view(torch.int32)), f"step {step}"
        upper = whole.data.view(torch.int32) >> 16
        assert torch.equal(halves.data.view(torch.int16).int(), upper), "the visible value is the upper half, truncated"
    assert (low != 0).any()


def test_adam_on_two_halves_equals_adam_on_float32_bit_for_bit():
    """Catches: any step of the update that goes through bfloat16."""
    check_bit_for_bit("numbers", (9, 7), steps=20)


def test_adagrad_on_two_halves_equals_adagrad_on_float32_bit_for_bit():
    """Catches: low halves that are not those of the touched rows."""
    check_bit_for_bit("ngram_embed", (9, 7), steps=20, config=ADAGRAD)


def test_normuon_on_two_halves_equals_normuon_on_float32_bit_for_bit(monkeypatch):
    """Catches: momentum, evening out or decay that goes through bfloat16. Polar Express does, and is meant to: here it
    does so for the float32 parameter too."""
    original = train_gpt.polar_express
    monkeypatch.setattr(train_gpt, "polar_express", lambda G, fused, rounds: original(G.bfloat16(), rounds=rounds))
    check_bit_for_bit("bank", (4, 16, 8), steps=20)


def test_small_updates_are_not_lost_in_bfloat16():
    """Catches: a master that forgets its low half: steps of 2^-12 of the weight vanish in bfloat16's 8 bits."""
    config = OptimizerConfig(adam_lr=2.0**-12, adam_decay=0.0, rules=FreeRules(numbers=Rule("adam", sharded=False)))
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer({"numbers": p}, config, cpu(torch.bfloat16))
    for step in range(1, 2 * 64, 2):
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step(settings_of(step))
    assert p.detach().float().numpy() == pytest.approx(1 - 64 * 2.0**-12, abs=2.0**-8)
    assert (p < 1).all()


# ---- compiled ----


def test_an_update_is_compiled_once_per_shape(monkeypatch):
    """Catches: a learning rate or momentum that reaches the compiled update as a number, which makes a graph per step;
    parameters that differ in lr_mul or decay alone and do not share a graph; a graph break, which fullgraph refuses."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rng = np.random.default_rng(7)
    shapes = {"bank": (4, 12, 8), "value_gates": (5, 7), "smear_gate": (5, 7), "pre.w1": (5, 7)}
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    before, masters = counters["stats"]["unique_graphs"], []
    for compiled in (False, True):
        params = {name: nn.Parameter(torch.from_numpy(a).bfloat16()) for name, a in start.items()}
        optimizer = Optimizer(params, FREE, replace(cpu(torch.bfloat16), compile=compiled))
        for step in range(8):
            for name, p in params.items():
                p.grad = torch.from_numpy(start[name]).bfloat16() * (step + 1)
            optimizer.step(settings_of(step, lr=1 + 0.1 * step, momentum=0.85 + 0.01 * step))
        masters.append([master_of(p.data, optimizer.state[name]["low"]) for name, p in params.items()])
    assert counters["stats"]["unique_graphs"] - before == 2, "one of the bank, one of the gates"
    for plain, compiled in zip(*masters, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-6)
