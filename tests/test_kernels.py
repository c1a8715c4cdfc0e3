"""Triton kernels and the operators around them: in Triton's interpreter against float64, compiled for every GPU that we
name, and (marked `cuda`) on one."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import cpu, run_process, tiny_track
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import make_row

import train_gpt
from train_gpt import GPT, SMALL, fused_cross_entropy, rotary_tables

triton = pytest.importorskip("triton")

INTERPRETED = [pytest.param("cpu", torch.float32, 1e-5), pytest.param("cpu", torch.float16, 4e-3)]
ON_GPU = [pytest.param("cuda", torch.bfloat16, 1e-2, marks=pytest.mark.cuda)]
if torch.cuda.is_available():  # there the kernels are compiled, and the interpreter is off
    INTERPRETED = []
KINDS = pytest.mark.parametrize("device, dtype, tolerance", INTERPRETED + ON_GPU)
sizes = st.integers(1, 70)


@pytest.fixture(autouse=True, scope="module")
def rounded_as_on_a_gpu():
    """To nearest. Triton's interpreter loses the carry where FP8 rounds up to a power of two (-124.7 becomes -64), and
    cuts the last bits of bfloat16 off."""
    from triton.runtime import interpreter

    kinds = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "bf16": torch.bfloat16}
    convert = interpreter._convert_float

    def to_nearest(data, source, target, rounding):
        if str(source) != "fp32" or str(target) not in kinds:
            return convert(data, source, target, rounding)
        rounded = torch.from_numpy(data).to(kinds[str(target)])
        return rounded.view(torch.uint16 if str(target) == "bf16" else torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", to_nearest)
        yield


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the root mean square of the truth."""
    return float(
        (found.detach().double().cpu() - truth.cpu()).abs().max() / truth.square().mean().sqrt().clamp_min(1e-30)
    )


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def rounded(x: torch.Tensor, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in the kernel's dtype, and the same values in float64: rounding the input is not the kernel's error."""
    low = x.to(dtype)
    return low.to(device), low.double()


# ---- symmetric products ----


def assert_mirrored(Y: torch.Tensor, tolerance: float) -> None:
    """Tiles beside the diagonal bit for bit; those on it are whole products, whose halves may round differently."""
    shape = train_gpt.tiles(Y.device)
    tile = torch.arange(Y.size(-1), device=Y.device) // min(shape.m, shape.n)
    beside = tile[:, None] != tile
    assert torch.equal(Y[:, beside], Y.mT[:, beside])
    assert error(Y, Y.mT.double().cpu()) < 16 * tolerance


@KINDS
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 3), r=sizes, c=sizes, transposed=st.booleans())
def test_symmetric_product_is_x_xt(device, dtype, tolerance, n, r, c, transposed):
    """Catches tiles left out, mirrored wrongly or cut wrongly at odd sizes, and strides that are not listened to."""
    X, exact = rounded(random(n, c, r).mT if transposed else random(n, r, c), device, dtype)
    Y = torch.ops.speedrun.symmetric_product(X)
    truth = exact @ exact.mT
    assert_mirrored(Y, tolerance)
    assert error(Y, truth) < 8 * tolerance * max(1, c**0.5 / 4)


@KINDS
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 3), r=sizes)
def test_quadratic_is_ai_plus_ba_plus_ca2(device, dtype, tolerance, n, r):
    """Catches a diagonal that is left out, or that a tile beside the diagonal gets as well."""
    G, _ = rounded(random(n, r, r, seed=1), device, dtype)
    A, exact = rounded(((G + G.mT) / 2).double().cpu(), device, dtype)
    Y = torch.ops.speedrun.quadratic(A, 4.0, -2.5, 0.7)
    assert_mirrored(Y, tolerance)
    identity = torch.eye(r, dtype=torch.float64)
    assert error(Y, 4 * identity - 2.5 * exact + 0.7 * exact @ exact) < 8 * tolerance


@KINDS
def test_a_round_of_polar_express(device, dtype, tolerance):
    """aX + bAX + cA^2X with A = X X^T, by the kernels and by torch. Catches coefficients that are mixed up."""
    X, exact = rounded(random(3, 20, 33, scale=0.1), device, dtype)
    A = exact @ exact.mT
    truth = 4 * exact - 2.5 * A @ exact + 0.7 * A @ A @ exact
    for fused in (False, True):
        assert error(train_gpt.quintic(X, 4.0, -2.5, 0.7, fused), truth) < 8 * tolerance


@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 24, 100])
def test_every_tile_below_the_diagonal_is_numbered_once(tiles):
    """The kernel's way from a number to (row, column), in float32 as there."""
    numbers = torch.arange(tiles * (tiles + 1) // 2)
    i = ((torch.sqrt(8 * numbers.float() + 1) - 1) / 2).int()
    i += ((i + 1) * (i + 2) // 2 <= numbers).int() - (i * (i + 1) // 2 > numbers).int()
    pairs = torch.stack((i, numbers - i * (i + 1) // 2), 1)
    assert pairs.tolist() == [[row, col] for row in range(tiles) for col in range(row + 1)]


# ---- norm and rotary embedding ----


@KINDS
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("offset", [False, True])
@settings(max_examples=6, deadline=None)
@given(T=st.integers(1, 40), H=st.sampled_from([2, 4]), D=st.sampled_from([8, 16]))
def test_norm_rotary_and_key_offset(device, dtype, tolerance, G, offset, T, H, D):
    """Kernel and twin against the formula in float64, results and gradients.

    Catches a rotation by another position, the wrong half of heads, a transposed rotation backward, the key of the
    first or of the last token under the offset, and a gradient of the norm that forgets one half of the dims.
    """
    qk, exact = rounded(random(T, 2, H, D, scale=2.0), device, dtype)
    angles = torch.cat((random(T * G, D // 4, seed=1).repeat_interleave(2, 1), torch.zeros(T * G, D // 2)), 1)
    sign = torch.tensor([1.0, -1.0]).double().repeat(D // 2)
    (cos, exact_cos), (sin, exact_sin) = (
        rounded(table.view(T, G, D), device, dtype) for table in (angles.cos(), angles.sin() * sign)
    )
    q_grad, exact_q_grad = rounded(random(T, H, D, seed=2), device, dtype)
    k_grad, exact_k_grad = rounded(random(T, H, D, seed=3), device, dtype)

    exact.requires_grad_()
    unit = exact / (exact.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    heads = []
    for h in range(H):
        c, s = (table[:, h * G // H, None] for table in (exact_cos, exact_sin))
        x = unit[:, :, h]  # (T, 2, D)
        pairs = x.unflatten(-1, (-1, 2))
        heads.append(x * c + torch.stack((pairs[..., 1], pairs[..., 0]), -1).flatten(-2) * s)
    q, k = torch.stack(heads, 2).unbind(1)
    if offset:
        k = torch.stack([torch.cat((k[t, :, : D // 2], k[max(t - 1, 0), :, D // 2 :]), -1) for t in range(T)])
    (truth,) = torch.autograd.grad((q, k), exact, (exact_q_grad, exact_k_grad))
    for fused in (False, True):
        leaf = qk.clone().requires_grad_()
        found = train_gpt.normed_and_rotated(leaf, cos, sin, offset, fused)
        (grad,) = torch.autograd.grad(found, leaf, (q_grad, k_grad))
        for a, b in zip((*found, grad), (q.detach(), k.detach(), truth), strict=True):
            assert error(a, b) < 10 * tolerance, fused


# ---- composed heads ----


@KINDS
@pytest.mark.parametrize("window", [3, 17])
@settings(max_examples=6, deadline=None)
@given(T=st.integers(1, 140), cuts=st.lists(st.integers(1, 139), max_size=4), H=st.sampled_from([2, 3]))
@example(T=140, cuts=[1, 40], H=3)  # three programs of keys, a document of one token, one that crosses tiles
def test_composed_heads(device, dtype, tolerance, window, T, cuts, H):
    """Kernel and twin against the formula in float64 on a dense mask: result and all four gradients.

    Catches a window or a causal mask that is one off, another document's key, a tile at the edge that is left out, a
    head mixed with another's weight or values, a scale left out, and a gradient without the mean of its row.
    """
    shapes = (*[(T, H, 16)] * 3, (T, H), (T, H, 16))
    pairs = [rounded(random(*shape, seed=i), device, dtype) for i, shape in enumerate(shapes)]
    (*inputs, grad), (*exact, exact_grad) = zip(*pairs, strict=True)
    q, k, v, mix = (x.requires_grad_() for x in exact)
    starts = sorted({0, *(c for c in cuts if c < T)})
    document = torch.zeros(T).index_fill(0, torch.tensor(starts), 1).cumsum(0)
    back = torch.arange(T)[:, None] - torch.arange(T)
    mask = (document[:, None] == document) & (back >= 0) & (back <= window)
    scores = 0.2 * torch.einsum("thd,shd->hts", q, k)
    composed = torch.einsum("hts,th->ts", scores.masked_fill(~mask, -torch.inf).softmax(-1), mix)
    out = torch.einsum("ts,shd->thd", composed, v)
    truth = out.detach(), *torch.autograd.grad(out, (q, k, v, mix), exact_grad)
    cu_seqlens = torch.tensor([*starts, T, T], dtype=torch.int32, device=device)
    for fused in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = train_gpt.composed_attention(*leaves, cu_seqlens, 0.2, window, fused)
        found = out, *torch.autograd.grad(out, leaves, grad)
        for a, b in zip(found, truth, strict=True):
            # Alone in its document a token has no gradients of scores but what rounding leaves.
            assert error(a, b) < 10 * tolerance or (a.double().cpu() - b).abs().max() < tolerance, fused


@pytest.mark.parametrize("window, kernels", [(224, True), (225, False)])
def test_windows_that_the_tiles_of_composed_heads_do_not_hold(window, kernels):
    """Catches a limit one off, where the tile would have twice the keys: more than any GPU's shared memory."""
    sizes = train_gpt._composed_sizes(torch.empty(1, 1, 16), window)
    assert (sizes["TILE"] == 256) == kernels == (window <= train_gpt.COMPOSED_WINDOW)


# ---- the MLP ----


def mlp_truth(h: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of relu(h fc^T)^2 proj by autograd, float64."""
    leaves = [x.clone().requires_grad_() for x in (h, fc, proj)]
    out = torch.relu(leaves[0] @ leaves[1].T) ** 2 @ leaves[2]
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def mlp_of_kernel(h, fc, proj, grad) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (h, fc, proj)]
    out = train_gpt.relu_squared_mlp(*leaves, fused=True)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@KINDS
@pytest.mark.parametrize("descriptors", [False, True])
@settings(max_examples=6, deadline=None)
@given(T=st.integers(1, 70), d=st.integers(1, 40), hidden=sizes)
def test_mlp_and_its_gradients(device, dtype, tolerance, descriptors, T, d, hidden):
    """Catches a tile visited twice or never by the persistent programs, wrong halves, a wrong root or factor."""
    if device == "cpu":
        patch = pytest.MonkeyPatch()
        patch.setattr(train_gpt, "tiles", lambda _: replace(train_gpt.INTERPRETED_TILES, descriptors=descriptors))
    d, hidden = (
        (8 * (d // 8 + 1), 8 * (hidden // 8 + 1)) if descriptors else (d, hidden)
    )  # descriptors want rows of a multiple of 16 bytes
    inputs = [random(T, d, seed=1), random(hidden, d, seed=2, scale=d**-0.5), random(hidden, d, seed=3, scale=d**-0.5)]
    pairs = [rounded(x, device, dtype) for x in (*inputs, random(T, d, seed=4))]
    try:
        results = mlp_of_kernel(*(low for low, _ in pairs))
    finally:
        if device == "cpu":
            patch.undo()
    for found, truth in zip(results, mlp_truth(*(exact for _, exact in pairs)), strict=True):
        assert error(found, truth) < 10 * tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 in the interpreter")
def test_mlp_gradient_is_the_slope_of_the_output():
    """Finite differences of the plain formula in float64, along random directions."""
    h, fc, proj, grad = (random(*shape, seed=i) for i, shape in enumerate([(20, 24), (40, 24), (40, 24), (20, 24)]))
    _, *found = mlp_of_kernel(*(x.float() for x in (h, fc, proj, grad)))
    value = lambda h, fc, proj: ((torch.relu(h @ fc.T) ** 2 @ proj) * grad).sum()
    for i in range(3):
        direction = random(*(h, fc, proj)[i].shape, seed=9)
        moved = lambda eps, i=i, v=direction: value(
            *(x + eps * v if j == i else x for j, x in enumerate((h, fc, proj)))
        )
        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert float((found[i].double() * direction).sum()) == pytest.approx(float(slope), rel=1e-4)


# ---- the loss ----


def plain_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, column_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per position, formula by formula: softmax of 23 sigmoid((z + 5) / 7.5), cross-entropy for each target.

    column_weights (V,): how often each column counts in the softmax; that of a target is 1.
    """
    log_weights = torch.zeros(logits.size(1)) if column_weights is None else column_weights.log()
    log_p = torch.log_softmax(23 / (1 + torch.exp(-(logits + 5) / 7.5)) + log_weights, dim=1)
    losses, first = [], []
    for t in range(len(logits)):
        each = [-log_p[t, target] if target >= 0 else 0 * log_p[t, 0] for target in targets[:, t]]
        losses.append(sum(w * ce for w, ce in zip(weights, each, strict=True)))
        first.append(each[0])
    return torch.stack(losses), torch.stack(first)


def loss_truth(logits, targets, weights, column_weights=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    losses, first = plain_loss(logits, targets, weights.double(), column_weights)
    return losses.detach(), first.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def some_targets(K: int, T: int, V: int, seed: int = 5) -> torch.Tensor:
    """As in a row: the targets of k are those of 0 moved by k, none past the end; of the last k those of a prefix,
    where there are several; and a few left out."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, V, (T,), generator=generator)
    targets = torch.stack([torch.cat((row[k:], row.new_full((min(k, T),), -1))) for k in range(K)])
    if K > 1:
        prefix = torch.randint(-V, V, (V,), generator=generator)  # every other token has none
        targets[-1] = prefix[row].clamp_min(-1)
    return torch.where(torch.rand(targets.shape, generator=generator) < 0.1, -1, targets)


def a_sample(V: int, drawn: int | None, others: int = 1000) -> tuple[int, tuple[torch.Tensor, int], torch.Tensor]:
    """How many of V columns can be targets where the others were drawn (None: no sample), what the loss is told of it,
    and the weight of each column."""
    n = V if drawn is None else max(V - drawn, 1)
    vocab = V + others * (n < V)
    weights = torch.full((V,), (vocab - n) / max(V - n, 1), dtype=torch.float64)
    weights[:n] = 1
    return n, () if drawn is None else (torch.tensor(n), vocab), weights


@KINDS
@settings(max_examples=20, deadline=None)
@given(
    T=st.integers(1, 6),
    V=st.integers(2, 200),
    K=st.integers(1, 4),
    scale=st.sampled_from([0.1, 3.0, 1e3]),
    drawn=st.one_of(st.none(), st.integers(0, 150)),
)
def test_cross_entropy_and_its_gradient(device, dtype, tolerance, T, V, K, scale, drawn):
    """Catches padding that enters the sum, a wrong chain rule of the soft-cap, targets not ignored, overflow; sampled
    columns whose weight is that of a target, or forgotten in the gradient."""
    logits, exact = rounded(random(T, V, scale=scale), device, dtype)
    n, sample, column_weights = a_sample(V, drawn)
    targets, weights = some_targets(K, T, n), torch.tensor([1.0, 0.5, 0.25, 0.1][:K])
    losses, nlls, grad = loss_truth(exact, targets, weights, column_weights)
    sample = sample and (sample[0].to(device), sample[1])
    for in_place in (False, True):
        out = logits.clone()
        of = out if in_place else logits
        found = fused_cross_entropy(of, targets.to(device), weights.to(device), out, 0.5, *sample)
        assert torch.allclose(found[0].double().cpu(), losses, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found[1].double().cpu(), nlls, rtol=1e-4, atol=1e-4)
        assert torch.allclose(0.5 * out.double().cpu(), grad, rtol=2 * tolerance, atol=2 * tolerance)
    untouched = logits.clone()
    again = fused_cross_entropy(untouched, targets.to(device), weights.to(device), None, 1.0, *sample)
    assert torch.equal(untouched, logits) and torch.equal(again[0], found[0])


@settings(max_examples=50, deadline=None)
@given(
    T=st.integers(1, 12),
    V=st.integers(2, 40),
    K=st.integers(1, 3),
    scale=st.sampled_from([0.1, 3.0, 1e3]),
    drawn=st.one_of(st.none(), st.integers(0, 30)),
)
def test_the_plain_twin_of_the_cross_entropy(T, V, K, scale, drawn):
    """The gradient written by hand equals autograd of the formula, in float64 to rounding."""
    n, sample, column_weights = a_sample(V, drawn)
    logits, targets, weights = random(T, V, scale=scale), some_targets(K, T, n), random(K).abs()
    found = train_gpt.softcapped_cross_entropy(logits, targets, weights, *sample)
    for a, b in zip(found, loss_truth(logits, targets, weights, column_weights), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_the_loss_is_its_slope():
    logits, targets, weights = random(6, 30), some_targets(2, 6, 30), torch.tensor([1.0, 0.5], dtype=torch.float64)
    grad = train_gpt.softcapped_cross_entropy(logits, targets, weights)[2]
    v = random(6, 30, seed=8)
    up, down = (plain_loss(logits + eps * v, targets, weights)[0].sum() for eps in (1e-6, -1e-6))
    assert float((grad * v).sum()) == pytest.approx(float((up - down) / 2e-6), rel=1e-6)


# ---- head and loss ----


def head_truth(x, head, targets, weights, column_weights=None) -> tuple[torch.Tensor, ...]:
    x, head = x.clone().requires_grad_(), head.clone().requires_grad_()
    losses, first = plain_loss(x @ head, targets, weights.double(), column_weights)
    return losses.sum().detach(), first.sum().detach(), *torch.autograd.grad(losses.sum(), (x, head))


def run_head(x, head, targets, weights, chunk, fused, fp8=False, sample=()) -> tuple[torch.Tensor, ...]:
    """Loss, next-token loss, and the gradients of a loss that is halved after it."""
    x, head = x.clone().requires_grad_(), head.clone().requires_grad_()
    head8 = train_gpt.fp8_and_transpose(head.detach(), train_gpt.FP8_HEAD, fused) if fp8 else (None, None)
    loss, nll, _, _ = torch.ops.speedrun.head_loss(x, head, targets, weights, chunk, True, fused, *head8, *sample)
    x_grad, head_grad = torch.autograd.grad(loss / 2, (x, head))
    return loss.detach(), nll.detach(), 2 * x_grad, 2 * head_grad


@KINDS
@pytest.mark.parametrize("chunk", [7, 16, 1000])
@pytest.mark.parametrize("fused", [False, True])
def test_head_and_loss_over_slices_of_the_row(device, dtype, tolerance, chunk, fused):
    """Catches a slice left out, counted twice or with another's targets, and a gradient that is not accumulated."""
    T, d, V = 20, 24, 130
    x, exact_x = rounded(random(T, d), device, dtype)
    head, exact_head = rounded(random(d, V, seed=1), device, dtype)
    targets, weights = some_targets(3, T, V), torch.tensor([1.0, 0.5, 0.2])
    found = run_head(x, head, targets.to(device), weights.to(device), chunk, fused)
    for a, b in zip(found, head_truth(exact_x, exact_head, targets, weights), strict=True):
        assert error(a, b) < 10 * tolerance


def test_head_and_loss_in_float64_equal_the_formula():
    x, head, targets, weights = random(30, 8), random(8, 50, seed=1), some_targets(2, 30, 50), random(2).abs()
    truth = head_truth(x, head, targets, weights)
    for chunk in (1, 11, 30):
        for a, b in zip(run_head(x, head, targets, weights, chunk, fused=False), truth, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


FP8_DEVICES = ["cpu"] if not torch.cuda.is_available() else [pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", FP8_DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunk", [16, 32])
def test_the_fp8_head(device, fused, chunk):
    """Relative error (Frobenius); a forgotten scale or a wrong transpose is off by far more.

    Rounding a number to the 2 bits of e5m2 is an error of 5.1e-2 (root mean square), and that is what the gradients
    have; the losses are within 5e-3.
    """
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")
    T, d, V = 32, 128, 192
    x, exact_x = rounded(random(T, d), device, torch.bfloat16)
    head, exact_head = rounded(random(d, V, seed=1, scale=0.2), device, torch.bfloat16)
    targets, weights = some_targets(3, T, V), torch.tensor([1.0, 0.5, 0.2])
    found = run_head(x, head, targets.to(device), weights.to(device), chunk, fused, fp8=True)
    truth = head_truth(exact_x, exact_head, targets, weights)
    errors = [float((a.detach().double().cpu() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    assert max(errors[:2]) < 5e-3 and max(errors[2:]) < 5.5e-2, errors


# ---- a sample of the vocabulary ----


def sample_for(targets: torch.Tensor, V: int, S: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """As the loader gives it: columns of the head, and how many are targets."""
    return train_gpt.sample_vocab(np.isin(np.arange(V), targets), S, seed=0, step=step, row=0)


@pytest.mark.parametrize("fused, fp8", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("chunk", [16, 32])
def test_a_sample_of_everything_is_the_whole_loss(fused, fp8, chunk):
    """In another order of columns. Catches: a target mapped to another's column, or one without a target mapped; a
    gradient of the head that comes back to other columns; the FP8 head or its transpose not gathered alike."""
    if torch.cuda.is_available():
        pytest.skip("float32 in the interpreter")
    T, d, V = 32, 64, 96
    dtype = torch.bfloat16 if fp8 else torch.float32 if fused else torch.float64
    x, head = random(T, d).to(dtype), random(d, V, seed=1, scale=0.2).to(dtype)
    targets, weights = some_targets(3, T, V), torch.tensor([1.0, 0.5, 0.2], dtype=train_gpt.wide(dtype))
    sample = sample_for(targets, V, V)
    assert sample[0].tolist() != list(range(V)) and len(sample[0]) == V > sample[1]
    found = run_head(x, head, targets, weights, chunk, fused, fp8, sample)
    truth = run_head(x, head, targets, weights, chunk, fused, fp8)
    for a, b in zip(found, truth, strict=True):  # FP8 rounds, here and there another way, what is summed another way
        assert error(a, b.double()) < (0.1 if fp8 else 1e-5 if fused else 1e-12)


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_sample_is_the_loss_over_its_columns(fused, chunk):
    """Columns that are not in it count nothing and have no gradient; the drawn ones stand for all others."""
    if torch.cuda.is_available():
        pytest.skip("float32 in the interpreter")
    T, d, V, S = 20, 24, 130, 70
    dtype = torch.float32 if fused else torch.float64
    x, head = random(T, d), random(d, V, seed=1)
    targets, weights = some_targets(3, T, V), torch.tensor([1.0, 0.5, 0.2], dtype=dtype)
    sampled, n = sample_for(targets, V, S)
    column_weights = torch.zeros(V, dtype=torch.float64)
    column_weights[sampled] = torch.where(torch.arange(S) < n, 1.0, (V - n) / (S - n)).double()
    assert float(column_weights.sum()) == pytest.approx(V) and column_weights[targets[targets >= 0]].eq(1).all()
    truth = head_truth(x, head, targets, weights, column_weights)
    found = run_head(x.to(dtype), head.to(dtype), targets, weights, chunk, fused, sample=(sampled, n))
    for a, b in zip(found, truth, strict=True):
        assert error(a, b) < (1e-4 if fused else 1e-6)  # num / num is float32 in the weights above
    assert found[3][:, column_weights == 0].eq(0).all()


def sampled_runs(S: int, draws: int, V: int = 1000, d: int = 8) -> Iterator[tuple[float, torch.Tensor]]:
    """Partition sum over the whole one, and gradient of x, of one position under so many samples; first those of the
    whole vocabulary. The gradient without the target's part."""
    x, head = random(1, d, seed=3), random(d, V, seed=4, scale=0.4)
    target, weights = torch.tensor([[V // 3]]), torch.ones(1, dtype=torch.float64)
    z = (x @ head[:, V // 3]).requires_grad_()
    capped = train_gpt.softcapped(z)
    part = torch.autograd.grad(capped.sum(), z)[0] * head[:, V // 3]
    whole = None
    for step in range(-1, draws):
        sample = () if step < 0 else sample_for(target, V, S, step)
        loss, _, x_grad, _ = run_head(x, head, target, weights, 1, False, sample=sample)
        whole = loss if whole is None else whole
        yield float((loss - whole).exp()), x_grad[0] + part


def test_the_partition_sum_is_right_in_the_mean():
    """Over 1,000 draws, to four standard errors of 0.6% and 0.2%. Catches: weights of V / S or of (V - n) / S, a target
    that is drawn once more, columns that are never drawn."""
    for S, most in ((11, 7e-3), (101, 2.2e-3)):
        sums = torch.tensor([z for z, _ in sampled_runs(S, 1000)][1:], dtype=torch.float64)
        stderr = float(sums.std()) / 1000**0.5
        assert 1e-3 < stderr < most and abs(float(sums.mean()) - 1) < 4 * stderr, (S, stderr)


def test_the_bias_of_the_gradient_falls_as_one_over_the_sample():
    """Draws of 10, 20 and 40 columns of 999: the bias times their number is the same (1.4). Catches: a gradient that is
    not that of the sampled loss, weights forgotten in it.

    z g - z truth, linear in the draw, is zero in the mean; without it 2,000 draws are enough. 1/m - 1/999 is the part
    of 1/m that is left where m of 999 are drawn without replacement."""
    scaled = []
    for m in (10, 20, 40):
        (_, truth), *runs = sampled_runs(1 + m, 2000)
        linear = torch.stack([z * (g - truth) for z, g in runs])
        bias = (torch.stack([g - truth for _, g in runs]) - linear).mean(0).norm() / truth.norm()
        scaled.append(float(bias) / (1 / m - 1 / 999))
        assert linear.mean(0).norm() < 5 * linear.std(0).norm() / 2000**0.5
    assert scaled == pytest.approx([1.4] * 3, rel=0.15)


@pytest.mark.parametrize("device", FP8_DEVICES)
@given(rows=sizes, cols=sizes, seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_fp8_and_its_transpose(device, rows, cols, seed):
    """The kernel against its plain twin, and that against float64: e4m3 keeps 4 significant bits, and 448 at most.

    Catches a tile at the edge that is left out, rounding to bfloat16 before, a transpose of another tile.
    """
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")
    x, exact = rounded(random(rows, cols, seed=seed, scale=300.0), device, torch.bfloat16)
    for fused in (False, True):
        x8, x8_T = train_gpt.fp8_and_transpose(x, 1.5, fused)
        assert x8.is_contiguous() and x8_T.is_contiguous() and torch.equal(x8.T.float(), x8_T.float())
        truth = (exact / 1.5).clamp(-448, 448)
        assert ((x8.double().cpu() - truth).abs() <= 2**-4 * truth.abs() + 2**-10).all()
        same, bytes_T = train_gpt.fp8_and_transpose(x8, None, fused)
        assert same is x8 and bytes_T.dtype == x8.dtype and torch.equal(bytes_T.float(), x8.float().T)


def test_weights_in_fp8_are_made_once_per_step(monkeypatch, tiny_data):
    """Catches: a head that is quantized and transposed for each of the 8 rows of a step."""
    calls = []
    monkeypatch.setattr(GPT, "in_fp8", lambda self: calls.append(self) or train_gpt.NO_FP8)
    trainer = train_gpt.Trainer(tiny_track(), cpu(), tiny_data, seed=0)
    for step in range(2):
        trainer.train_step(step)
    assert calls == [trainer.model] * 2


def test_the_length_of_the_slices():
    """Catches an estimate that ignores the option or the memory, uneven slices, and one that FP8 cannot multiply."""
    vocab = SMALL.model.padded_vocab
    of = lambda **fields: replace(cpu(), **fields).loss_chunk
    assert of(max_loss_chunk=4096)(49152, vocab) == 4096
    assert of(max_loss_chunk=30_000)(49152, vocab) == 49152 // 2
    assert of(fused=True, logits_memory=80 * 2**30 // 8)(49152, vocab) == 49152
    assert of(fused=True, logits_memory=24 * 2**30 // 8)(49152, vocab) * vocab * 4 <= 24 * 2**30 // 8
    assert of()(1024, 384) == 1024
    for positions in (1, 15, 100, 49152):
        for limit in (1, 16, 33, 5000):
            chunk = of(max_loss_chunk=limit)(positions, vocab)
            assert chunk == positions or (chunk % 16 == 0 and chunk < limit + 16)


# ---- the MLP and projections in FP8 ----


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """x rounded to 4 significant bits, or to multiples of 2^-9, at most 448: by arithmetic in float64."""
    step = 2.0 ** (torch.floor(torch.log2(x.abs().clamp_min(2.0**-6))) - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)


def mlp_operands_in_fp8(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """h (40, 32), normed, fc and proj (96, 32), and what the operator wants of them in FP8 but for its middle scale."""
    h = train_gpt.norm(random(40, 32)).to(device, torch.bfloat16)
    bank = random(2, 96, 32, seed=1, scale=0.3).to(device, torch.bfloat16)
    fc8, proj8_T, scale_up, scale_proj = train_gpt.mlp_in_fp8(bank)
    h8, _ = train_gpt.to_fp8(h, 32**0.5)
    return h, *bank, (h8, fc8[0], proj8_T[0], scale_up[0], scale_proj[0])


@pytest.mark.parametrize("device", FP8_DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("scale", [0.25, 0.01])  # the second is too small: the format saturates
def test_the_mlp_in_fp8(device, fused, descriptors, scale, monkeypatch):
    """Against the rule in float64: every operand rounded to e4m3 by its scale, activations to bfloat16 between.

    Catches a scale that is forgotten, doubled or of another operand, activations that are squared or cut before they
    are rounded, maxima of another tile, and gradients from anything but the operands in bfloat16.
    """
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")
    if device == "cpu":
        tiles = replace(train_gpt.INTERPRETED_TILES, descriptors=descriptors)
        monkeypatch.setattr(train_gpt, "tiles", lambda _: tiles)
    h, fc, proj, (h8, fc8, proj8_T, scale_up, scale_proj) = mlp_operands_in_fp8(device)
    leaves = [x.clone().requires_grad_() for x in (h, fc, proj)]
    scales = scale_up, torch.tensor(scale, device=device), scale_proj
    out, _, largest = torch.ops.speedrun.relu_squared_mlp(*leaves, h8, fc8, proj8_T, *scales, fused)

    exact = [x.double().cpu() for x in (h, fc, proj)]
    unit = [32**0.5 / 448, *(x.abs().max() / 448 for x in exact[1:])]
    rounded_h, rounded_fc, rounded_proj = (e4m3(x / u) * u for x, u in zip(exact, unit, strict=True))
    post = (torch.relu((rounded_h @ rounded_fc.T).bfloat16()) ** 2).double()
    truth = e4m3(post / scale) * scale @ rounded_proj
    # What is left is where a last bit tips over; without FP8 the output is 4% from this, with another scale far more.
    assert (out.double().cpu() - truth).norm() < 6e-3 * truth.norm()
    assert largest.max().item() == pytest.approx(float(post.max()), rel=1e-2)
    if fused and device == "cpu":
        return  # the interpreter cannot multiply bfloat16, which backward is in, as without FP8
    grad = random(40, 32, seed=9)
    found = torch.autograd.grad(out, leaves, grad.to(out))
    for a, b in zip(found, mlp_truth(*exact, grad)[1:], strict=True):  # post is still that of FP8
        assert (a.double().cpu() - b).norm() < 6e-2 * b.norm()


def test_e4m3_of_these_tests_is_that_of_torch():
    x = random(5000, scale=100.0) * torch.tensor([1e-5, 1e-3, 1.0, 1.0, 5.0]).double().repeat(1000)
    assert torch.equal(e4m3(x.float().double()), x.float().to(torch.float8_e4m3fn).double())


def test_scales_of_the_mlp_are_those_of_the_row_before():
    """20 rows against the rule: 1 at first, then 1.8 times the largest activation of the row before over 448.

    Catches a scale that is of this row, of another layer, that validation changes, and one that is not restored.
    """
    config = replace(SMALL.model.stretched(3), vocab_size=257, num_heads=2, head_dim=16, ngram_rows=97, ngram_signs=5)
    model = GPT(config, replace(cpu(torch.bfloat16), fp8=("mlp",)), seed=1)
    with torch.no_grad():
        model.mlp_bank.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    operator, used, post = torch.ops.speedrun.relu_squared_mlp, [], []

    def spy(h, fc, proj, h8, fc8, proj8_T, scale_up, scale_post, scale_proj, fused):
        if h8 is None:
            return operator(h, fc, proj, h8, fc8, proj8_T, scale_up, scale_post, scale_proj, fused)
        used.append(scale_post.item())
        kept = (h8.float() @ fc8.float().T * scale_up).bfloat16()
        post.append(kept.relu().square().max().item())
        return operator(h, fc, proj, h8, fc8, proj8_T, scale_up, scale_post, scale_proj, fused)

    settings, expected = replace(SMALL, model=config).at(1), [1.0] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.torch.ops.speedrun, "relu_squared_mlp", spy)
        for seed in range(20):
            row = make_row(48, [0, 11, 30], config, seed=seed)
            with torch.no_grad():  # as validation does
                model(row, settings, torch.ones(1))
            assert not used
            model(row, settings, torch.ones(1))
            assert used == pytest.approx(expected, rel=1e-6), seed
            expected = [1.8 * x / 448 for x in post]
            used.clear(), post.clear()
    assert model.mlp_scale.tolist() == pytest.approx(expected, rel=1e-2)
    rotary_tables.cache_clear()


@pytest.mark.parametrize("device", FP8_DEVICES)
def test_a_projection_in_fp8(device):
    """Relative error (Frobenius): rounding to the 3 bits of e4m3 costs 2.6e-2 per operand. Gradients are exact."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")
    x, exact_x = rounded(random(48, 64, scale=30.0), device, torch.bfloat16)
    w, exact_w = rounded(random(32, 64, seed=1, scale=0.01), device, torch.bfloat16)
    grad, exact_grad = rounded(random(48, 32, seed=2), device, torch.bfloat16)
    truth = exact_x @ exact_w.T
    for largest in (None, 200.0):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        out = train_gpt.linear(*leaves, True, largest)
        found = (out.detach().double().cpu() - truth).norm() / truth.norm()
        assert 1e-2 < found < 5e-2
        for a, b in zip(
            torch.autograd.grad(out, leaves, grad), (exact_grad @ exact_w, exact_grad.T @ exact_x), strict=True
        ):
            assert error(a, b) < 2e-2
        with torch.no_grad():
            assert error(train_gpt.linear(*leaves, True, largest), truth) < 2e-2


# ---- operators of torch ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 in the interpreter")
def test_torch_accepts_the_operators():
    """Schema, shapes and dtypes without data, autograd, tracing: what torch.compile relies on."""
    leaf = lambda *shape: random(*shape).float().requires_grad_()
    ops = torch.ops.speedrun
    torch.library.opcheck(ops.symmetric_product.default, (random(2, 9, 5).float().mT,))
    torch.library.opcheck(ops.quadratic.default, (random(2, 9, 9).float(), 4.0, 1.0, 2.0))
    qk, tables = leaf(7, 2, 2, 8), random(2, 7, 2, 8).float()
    torch.library.opcheck(ops.norm_rotary.default, (qk, *tables, True))
    first = torch.tensor([0, 0, 0, 1, 4, 4, 4], dtype=torch.int32)
    heads = leaf(7, 2, 16), leaf(7, 2, 16), leaf(7, 2, 16), leaf(7, 2)
    torch.library.opcheck(ops.composed_attention.default, (*heads, first, 0.3, 2))
    for fused in (False, True):
        torch.library.opcheck(ops.relu_squared_mlp.default, (leaf(5, 8), leaf(16, 8), leaf(16, 8), *(None,) * 6, fused))
    targets, weights = some_targets(2, 20, 40), torch.tensor([1.0, 0.5])
    for need_grad, sample in ((True, ()), (False, ()), (True, sample_for(targets, 40, 36))):
        for chunk in (7, 20):
            arguments = (leaf(20, 8), leaf(8, 40), targets, weights, chunk, need_grad, True, None, None, *sample)
            tests = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(ops.head_loss.default, arguments, test_utils=tests)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 in the interpreter")
@pytest.mark.parametrize("D", [16, 24])
def test_a_whole_model_on_kernels_equals_the_plain_one(D):
    """Catches a kernel called with the wrong operands by the model (loss, gradients, an optimizer step), and with heads
    that are no power of two, which its blocks have to be."""
    config = replace(SMALL.model.stretched(4), vocab_size=257, num_heads=2, head_dim=D, ngram_rows=97, ngram_signs=5)
    row = make_row(48, [0, 11, 30], config)
    settings = replace(SMALL, model=config).at(1)
    weights = torch.tensor(settings.prediction_weights), torch.tensor([settings.prefix_weight])
    results = []
    for fused in (False, True):
        model = GPT(config, replace(cpu(), fused=fused, max_loss_chunk=32 if fused else None), seed=1)
        with torch.no_grad():
            model.mlp_bank.add_(torch.randn(model.mlp_bank.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
            model.post.w2.fill_(0.1)  # else composed heads count 0 times
        model.set_prefixes([str(token).encode() for token in range(257)])
        params = dict(model.named_parameters())
        optimizer = train_gpt.Optimizer(params, SMALL.optimizer, replace(cpu(), fused=fused))
        loss, _ = model(row, settings, *weights)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in params.items()}
        optimizer.step(settings)
        results.append((loss.detach(), grads, {name: p.detach().clone() for name, p in params.items()}))
    (loss, grads, weights), (fused_loss, fused_grads, fused_weights) = results
    assert float(fused_loss) == pytest.approx(float(loss), rel=1e-5)
    for name in grads:
        assert error(fused_grads[name], grads[name].double()) < 1e-3, name
    # Adam's first step is the sign of a gradient, which rounding can turn; the banks are orthogonalized.
    assert error(fused_weights["mlp_bank"], weights["mlp_bank"].double()) < 1e-3
    rotary_tables.cache_clear()


# ---- compiled, without a GPU ----

AHEAD_OF_TIME = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import train_gpt
from train_gpt import BIG_TILES, SMALL_TILES

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a program can have (CUDA C++ Programming Guide)
MULTIPLES_OF_16 = {"r", "c", "M", "N", "T", "V", "R", "C"}  # as Triton itself finds out for the sizes of `small`

def compile(kernel, capability, types, constants, warps, stages):
    types = types | {name: "constexpr" for name in constants}
    aligned = [n for n, t in types.items() if t.startswith("*") or (n in MULTIPLES_OF_16 and t != "constexpr")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= SHARED[capability] * 1024, (kernel.__name__, capability, made.metadata.shared)
    return made.asm["ptx"]

for capability in map(int, sys.argv[1:]):
    tiles = BIG_TILES if SHARED[capability] >= 227 else SMALL_TILES
    block = min(tiles.m, tiles.n)
    ints = lambda names: {name: "i32" for name in names.split()}
    for add in (False, True):
        scalars = dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
        types = {"X": "*bf16", "Y": "*bf16"} | scalars | ints("r c")
        ptx = compile(train_gpt._symmetric, capability, types, {"ADD": add, "BLOCK": block, "BLOCK_K": tiles.k},
                      tiles.warps, tiles.stages)
        assert ("wgmma" in ptx) == (capability == 90)
    for forward, group, offset in ((True, 1, True), (False, 1, True), (False, 2, False)):
        types = dict.fromkeys(("QK", "Q", "K", "Q_OUT", "K_OUT", "LAST", "COS", "SIN"), "*bf16")
        types |= {"RSTD": "*fp32", "eps": "fp32", "T": "i32"}
        types = {name: types[name] for name in train_gpt._norm_rotary.arg_names if name in types}
        constants = {"H": 6, "D": 128, "G": group, "OFFSET": offset, "FORWARD": forward, "BLOCK": 16}
        compile(train_gpt._norm_rotary, capability, types, constants, 4, 3)
    types = dict.fromkeys(("LSE", "MIX_GRAD"), "*fp32") | {"FIRST": "*i32", "scale": "fp32"} | ints("T window")
    for more in ({"FORWARD": True}, {"FORWARD": False}, {"KEYS": train_gpt.COMPOSED_KEYS}):
        kernel = train_gpt._composed_heads_keys if "KEYS" in more else train_gpt._composed_heads
        constants = {"H": 6, "D": 128, "BLOCK": train_gpt.COMPOSED_QUERIES, "TILE": 256} | more
        compile(kernel, capability, {name: types.get(name, "*bf16") for name in kernel.arg_names}, constants, 8,
                3 if tiles is BIG_TILES else 2)
    for forward, fp8 in [(True, False), (False, False)] + [(True, True)] * (capability >= 89):
        k = 2 * tiles.k if fp8 else tiles.k
        half, low = (tiles.m, tiles.n // 2), "fp8e4nv" if fp8 else "bf16"
        blocks = {"a": (low, tiles.m, k), "b": (low, tiles.n, k), "out": ("bf16", *half)}
        blocks |= {"post": (low, *half)} if fp8 else {}
        operand = lambda kind, *block: f"tensordesc<{kind}{list(block)}>" if tiles.descriptors else f"*{kind}"
        types = {"post": "*bf16"} | {name: operand(*block) for name, block in blocks.items()} | ints("M N K")
        types |= dict.fromkeys(("scale_ab", "scale_post", "largest"), "*fp32" if fp8 else "*bf16")
        types = {name: types[name] for name in train_gpt._linear_relu_square.arg_names if name in types}
        constants = {"FORWARD": forward, "FP8": fp8, "DESCRIPTORS": tiles.descriptors, "BLOCK_M": tiles.m,
                     "BLOCK_N": tiles.n, "BLOCK_K": k, "GROUP": 8}
        ptx = compile(train_gpt._linear_relu_square, capability, types, constants, tiles.warps,
                      tiles.stages if forward and not fp8 else tiles.stages - 1)
        assert ("wgmma" in ptx) == (capability == 90)
        assert ("cp.async.bulk.tensor" in ptx) == tiles.descriptors
    for grad in ["*bf16"] + ["*fp8e5"] * (capability >= 89):
        pointers = {"logits": "*bf16", "targets": "*i64", "weights": "*fp32", "losses": "*fp32", "nlls": "*fp32"}
        types = pointers | {"grad": grad, "num_targets": "*i64", "grad_scale": "fp32"} | ints("T V vocab")
        for sample in ({"SAMPLED": True}, {"SAMPLED": False, "num_targets": None}):
            compile(train_gpt._cross_entropy, capability, types, {"K": 4, "GRAD": True, "BLOCK": 4096} | sample, 8, 3)
    for cast in [False] + [True] * (capability >= 89):
        types = dict(zip(("X", "Y", "Y_T"), ("*bf16", "*fp8e4nv", "*fp8e4nv") if cast else ("*u8",) * 3))
        compile(train_gpt._cast_transposed, capability, types | {"R": "i32", "C": "i32", "scale": "fp32"},
                {"CAST": cast, "BLOCK": 128}, 8, 3)
    print(capability, "compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    "capabilities",
    [["80", "89", "90"], pytest.param(["86", "100", "120"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_kernels_compile_for_every_gpu(capabilities, tmp_path, monkeypatch):
    """What the interpreter lets pass: types that change in a loop, more shared memory than the GPU has, a product that
    does not run on Hopper's own instruction. Compiles to machine code; a GPU is not needed."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    script = tmp_path / "ahead_of_time.py"
    script.write_text(AHEAD_OF_TIME)
    done = run_process([sys.executable, script, *capabilities])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for c in capabilities for word in (c, "compiled")]
    assert "TRITON_INTERPRET" not in os.environ
