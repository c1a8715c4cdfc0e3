"""The reference itself: an oracle that is wrong would make every other test worthless.

Its golden numbers came from an implementation by other hands: losses, gradients, 12 optimizer steps, the schedule. What
they do not reach (n-gram keys, prefixes, layouts other than that of `small`) stands on the tests here, and on
train_gpt.py, which says the same in another way.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from make_golden import FILES, LAYOUT, differences, is_weight, load, made_anew
from reference import (
    FLOAT64_EPS,
    MEDIUM,
    NANO,
    SMALL,
    XL,
    Layout,
    NorMuon,
    forward,
    gate_outputs,
    initial_frequencies,
    mix_outputs,
    ngram_embedding,
    ngram_key,
    ngram_rows,
    normuon_step,
    polar_express,
    prefix_table,
    train_loss,
)
from torch import Tensor

LAYOUTS = {
    "small": LAYOUT,
    "medium": dataclasses.replace(MEDIUM, head_dim=8),
    "xl": dataclasses.replace(XL, head_dim=4),
    "nano": dataclasses.replace(NANO, head_dim=8),
}
VOCAB, TOKENS = 60, 70


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in load("golden_model.npz").items()}


def run(golden: dict[str, Tensor], layout: Layout = LAYOUT, eps: float = FLOAT64_EPS, **changed: Tensor) -> Tensor:
    """Logits of the first golden case; `changed` replaces or adds weights or inputs."""
    data = golden | changed
    short, long = data["case0_windows"].tolist()
    return forward(
        {name: value for name, value in data.items() if is_weight(name)},
        layout,
        data["tokens"],
        data["cu_seqlens"],
        (short, long),
        data["case0_frequencies"],
        data["case0_attn_scale"].item(),
        eps,
        (data["bigram_rows"], data["sign_rows"]),
    )


def random_weights(layout: Layout) -> dict[str, Tensor]:
    """Weights of a layout, of such sizes that nothing is negligible."""
    layers, heads, d = layout.num_layers, layout.num_heads, layout.num_heads * layout.head_dim
    attention, tables = layers - len(layout.no_attention), len(layout.value_tables)
    shapes = {
        "embed": (VOCAB, d),
        "head": (d, VOCAB),
        "qk_bank": (attention * heads, 2 * layout.head_dim, d),
        "vo_bank": (2 * attention, d, d),
        "mlp_bank": (2 * layers, 2 * d, d),
        "value_embeds": (tables, VOCAB, d),
        "value_gates": (tables - (layout.mixing in layout.value_tables), heads, 12),
        "bigram_embed": (97, d),
    }
    lambdas = {"sa_lambda": (layers, 2)} | dict.fromkeys(
        ("resid_attn", "resid_mlp", "post_attn", "post_mlp"), (layers,)
    )
    if layout.smear:
        shapes |= {"smear_gate": (12,)}
        lambdas |= {"smear_lambda": ()}
    if layout.skips:
        lambdas |= {"skip_lambda": ()}
    count = lambda outputs: sum(width for _, width in outputs)
    if layout.gate_networks:
        networks = {"in": count(mix_outputs(layout)), "out": len(layout.mix_out)}
        networks["pre"] = count(gate_outputs(layout, 0, layout.post_layer))
        networks["post"] = count(gate_outputs(layout, layout.post_layer, layers))
        for name, outputs in networks.items():
            shapes |= {f"{name}_w1": (16, d), f"{name}_w2": (outputs, 16), f"{name}_b": (outputs,)}
        lambdas |= {"gate_scale": ()}
    else:
        lambdas |= {"gates_b": (count(gate_outputs(layout, 0, layers)),)}
    generator = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = {name: draw(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    weights |= {name: 0.8 + 0.1 * draw(shape) for name, shape in lambdas.items()}
    if layout.gate_networks:
        weights["bigram_sign"] = draw((13, d)).sign()
    return weights


def run_layout(layout: Layout, tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Logits of a row of two documents, its n-grams hashed."""
    cu_seqlens = torch.tensor([0, 20, TOKENS, TOKENS])
    return forward(weights, layout, tokens, cu_seqlens, (9, 25), initial_frequencies(layout.head_dim), 0.2)


# ======================================================================================================================
# Golden numbers
# ======================================================================================================================


@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_the_golden_numbers_are_those_that_the_reference_makes(name: str) -> None:
    """Catches a formula of the reference that was changed, in any place, while the numbers stayed: train_gpt.py would
    be held against two truths."""
    kept = load(name)
    assert not differences(kept, made_anew(name, kept))


# ======================================================================================================================
# Tables over tokens
# ======================================================================================================================


def test_ngram_keys_end_at_the_start_of_the_document() -> None:
    """Catches a key that looks into the document before, and one in which no token is as good as token 0."""
    tokens, documents = [7, 3, 0, 3, 5], [1, 1, 1, 2, 2]
    prime = 2**31 - 1
    assert ngram_key(tokens, 1, 2, documents) == (48271 * 3 + 8) % prime
    assert ngram_key(tokens, 3, 2, documents) == 48271 * 3  # token 0 stands before, in another document
    assert ngram_key(tokens, 3, 2, [1] * 5) == 48271 * 3 + 1
    assert ngram_key(tokens, 2, 3, documents) == (48271 * (48271 * 0 + 4) + 8) % prime
    assert ngram_key(tokens, 1, 3, documents) == 48271 * (48271 * 3 + 8) % prime


def test_signs_and_rows_come_from_different_parts_of_the_key() -> None:
    """Catches signs that follow from the row: bigrams that share a row would then never differ in sign."""
    tokens = torch.randint(0, 1000, (400,), generator=torch.Generator().manual_seed(0))
    rows, signs = ngram_rows(tokens, torch.ones(400, dtype=torch.long), 2, rows=8, sign_rows=4)
    assert set(zip(rows.tolist(), signs.tolist(), strict=True)) == {
        (row, sign) for row in range(8) for sign in range(4)
    }


def test_embeddings_of_ngrams_add_up_and_are_normed_together() -> None:
    """Catches the embedding of one size alone, and a norm of each, or of none."""
    tokens, documents = [7, 3, 9, 3], torch.tensor([1, 1, 1, 2])
    table = torch.randn(11, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = dataclasses.replace(NANO, ngrams=(2, 4))
    found = ngram_embedding({"bigram_embed": table}, layout, torch.tensor(tokens), documents, FLOAT64_EPS)
    for t in range(4):
        total = sum(table[ngram_key(tokens, t, n, documents.tolist()) % 11] for n in (2, 4))
        torch.testing.assert_close(found[t], total / total.square().mean().sqrt(), rtol=1e-12, atol=1e-12)


def test_prefix_is_the_longest_proper_one() -> None:
    """Catches the token itself, the shortest prefix, an inner part, and a prefix of what is no text."""
    tokens = [b"t", b"h", b"th", b"the", b"thereof", b"he", None, b"ab", None]
    assert prefix_table(tokens) == [-1, -1, 0, 2, 3, 1, -1, -1, -1]


# ======================================================================================================================
# Model
# ======================================================================================================================


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_depend_on_no_later_token_and_on_every_weight(name: str) -> None:
    """Catches a leak from the future, of which paired heads have a way of their own (position 2t sees 2t+1), and a
    weight that a layout has but that nothing reads."""
    layout = LAYOUTS[name]
    weights = {key: value.requires_grad_() for key, value in random_weights(layout).items()}
    tokens = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[50] = (changed[50] + 1) % VOCAB
    before, after = run_layout(layout, tokens, weights), run_layout(layout, changed, weights)
    assert torch.equal(before[:50], after[:50])
    assert not torch.equal(before[50], after[50])

    train_loss(before, tokens.roll(-1), [1.0]).backward()
    unread = {
        (key, i)
        for key, weight in weights.items()
        if key not in ("embed", "bigram_embed", "value_embeds")
        for i, part in enumerate(weight.grad if weight.dim() else weight.grad[None])
        if not part.any()
    }
    expected = {("sa_lambda", i) for i in layout.no_attention}
    expected |= {(key, i) for key in ("resid_attn", "post_attn") for i in layout.no_attention}
    if layout.mixing:
        expected |= {(key, layout.mixing) for key in ("resid_attn", "post_attn", "resid_mlp", "post_mlp")}
    assert unread == expected


def test_networks_of_small_have_the_outputs_of_the_golden_weights(golden: dict[str, Tensor]) -> None:
    """Catches a gate too many or too few, in the layout at its real width."""
    for name, span in {"pre": (0, 4), "post": (4, 11)}.items():
        assert sum(width for _, width in gate_outputs(SMALL, *span)) == len(golden[f"{name}_b"])


def test_float32_epsilon_would_not_match(golden: dict[str, Tensor]) -> None:
    """Catches an epsilon that is ignored: with float32's the logits move, by more than the comparison allows."""
    logits = [run(golden, eps=eps) for eps in (FLOAT64_EPS, torch.finfo(torch.float32).eps)]
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_coefficients_without_an_input_are_networks_that_read_nothing() -> None:
    """Catches a learned coefficient of x0 or of the n-grams that acts elsewhere than a gate network's output: with W2
    zero the network is its bias, times its scale."""
    layout = dataclasses.replace(LAYOUTS["nano"], num_layers=4, value_tables=(0, 3), paired=(0, 2), long=())
    weights = random_weights(layout)
    tokens = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))
    alone = run_layout(layout, tokens, weights)

    d, scale = layout.num_heads * layout.head_dim, torch.tensor(0.3, dtype=torch.float64)
    weights["gate_scale"] = scale
    for name, b in zip(("pre", "post"), (weights["gates_b"] / scale).chunk(2), strict=True):
        weights |= {f"{name}_w1": torch.ones(16, d), f"{name}_w2": torch.zeros(4, 16), f"{name}_b": b}
    from_networks = run_layout(dataclasses.replace(layout, gate_networks=True, post_layer=2), tokens, weights)
    torch.testing.assert_close(from_networks, alone, rtol=1e-12, atol=1e-12)


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
