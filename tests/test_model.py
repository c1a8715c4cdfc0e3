"""The model against the golden numbers, the naive float64 reference, and the properties that no formula states."""

import functools
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt
from train_gpt import GPT, MEDIUM, NANO, SMALL, TRACKS, XL, ModelConfig, Row, Settings

GOLDEN = Path(__file__).parent / "golden_model.npz"

# What the tracks leave out. MEDLEY: several skips, one of them from a layer without attention and one into the last
# layer, whose network gates no value embedding and mixes one in; one gate network; a paired layer that is long, gated
# and has XSA; several layers of composed heads; single tokens beside n-grams, with signs and normed; matrices of one
# head; wider gates; value embeddings that are not in the order of the layers.
MEDLEY = ModelConfig(
    vocab_size=300,
    num_layers=6,
    num_heads=4,
    head_dim=16,
    without_attention=(0, 4),
    paired_layers=(3,),
    long_layers=(1, 3, 5),
    gated_layers=(2, 3),
    xsa_layers=(2, 3, 5),
    dc_layers=(1, 2),
    dc_window=9,
    value_layers=(3, 1),
    skips=((0, 2), (1, 4), (2, 4), (2, 5)),
    network_width=24,
    mix_in=("x0", "value3", "out2", "ngram"),
    mix_out=(("ngram", 0.1), ("value1", 0.2), ("out4", -0.5)),
    ngrams=(1, 3),
    ngram_rows=211,
    ngram_signs=13,
    ngram_norm=True,
    gate_dim=16,
    qk_heads=1,
)
# No gate networks, so that all these are learned numbers, but for the network of the end; one matrix of all heads.
NUMBERS = replace(
    MEDLEY,
    gate_networks=False,
    without_attention=(2,),
    paired_layers=(0, 4),
    dc_layers=(1, 3, 5),
    value_layers=(0, 5),
    late_input=3,  # a skip leads into the next layer: the output of one and the input of the other differ
    mix_in=(),
    mix_out=(("value5", 0.1), ("first", 0.2), ("last", 0.3)),
    smear=False,
    ngrams=(2,),
    ngram_signs=0,
    qk_heads=4,
)
NARROW = {"vocab_size": 300, "head_dim": 8, "ngram_rows": 389, "dc_window": 9, "network_width": 16}
CONFIGS = {
    "small": replace(SMALL.model, **NARROW, ngram_signs=17),
    "medium": replace(MEDIUM.model, **NARROW, ngram_signs=17),
    "xl": replace(XL.model, **NARROW, ngram_signs=17),
    "nano": replace(NANO.model, ngram_rows=1009),
    "medley": MEDLEY,
    "numbers": NUMBERS,
}


def layout_of(config: ModelConfig) -> reference.Layout:
    there = lambda layers: tuple(i for i in layers if i in config.attention_layers)
    return reference.Layout(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        no_attention=config.without_attention,
        paired=config.paired_layers,
        long=config.long_layers,
        value_tables=there(config.value_layers),
        gated=there(config.gated_layers),
        xsa=there(config.xsa_layers),
        dc=there(config.dc_layers),
        dc_window=config.dc_window,
        gate_networks=config.gate_networks,
        post_layer=config.second_gates if config.gate_networks else None,
        skips=config.skips,
        late_input=config.late_input,
        mix_in=config.mix_in,
        mix_out=tuple(stream for stream, _ in config.mix_out),
        smear=config.smear,
        key_offset=config.key_offset,
        ngrams=config.ngrams,
        normed_ngrams=config.ngram_norm,
        qk_heads=config.qk_heads,
    )


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64, world_size: int = 1) -> GPT:
    """A model in which no path is switched off by a zero at the start. A parameter depends on its name alone."""
    model = GPT(config, cpu(dtype, world_size=world_size))
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith("_lambda"):
                p.add_(0.1 * noise + 0.05)
            elif "." in name or name == "gate_scale":  # networks: their values at the start, and more
                p.add_(0.3 * noise)
            elif name.endswith(("_gate", "_gates")):
                p.copy_(0.5 * noise)
            else:
                scale = {"embed": 1.0, "ngram_embed": 1.0, "value_embeds": 0.5, "head": 0.1}
                p.copy_(noise * scale.get(name, 0.7 * config.width**-0.5))
    return model


def step_settings(windows: tuple[int, int], head_dim: int, grown_from: int | None = None) -> Settings:
    frequencies, attn_scale = train_gpt.base_frequencies(head_dim), 0.1
    if grown_from:
        frequencies, attn_scale = train_gpt.yarn(frequencies, attn_scale, grown_from, windows[1])
    return replace(SMALL.at(0), windows=windows, frequencies=frequencies, attn_scale=attn_scale)


def make_row(num_tokens: int, starts: list[int], config: ModelConfig, seed: int = 0, change: int | None = None) -> Row:
    """A row of random tokens; change: a position at which there is another one."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, num_tokens + 1)
    if change is not None:
        tokens[change] = (tokens[change] + 1) % config.vocab_size
    return train_gpt.make_row(tokens, np.array(starts), num_tokens, config)


def error(actual: Tensor, expected: Tensor) -> float:
    """Distance relative to the norm of what is expected."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# ---- parameters as reference.py and the golden numbers call them ----

ORACLE_NETWORKS = {"pre": "pre", "post": "post", "gates": "gates", "mix_in": "in", "mix_out": "out"}
ORACLE_LAMBDAS = {"attention_resid": "resid_attn", "attention_branch": "post_attn"}
ORACLE_LAMBDAS |= {"mlp_resid": "resid_mlp", "mlp_branch": "post_mlp"}


def oracle_name(name: str) -> str:
    network, _, part = name.partition(".")
    if part:
        return f"{ORACLE_NETWORKS[network]}_{'b' if part == 'bias' else part}"
    return "bigram_embed" if name == "ngram_embed" else name


def places(model: GPT, name: str) -> list[tuple[str, int]] | None:
    """Where the oracle, which has a number for every layer, has those of `resid` and `branch`."""
    if name not in ("resid.bias", "branch.bias"):
        return None
    outputs = model.get_submodule(name.removesuffix(".bias")).layout.outputs
    return [(ORACLE_LAMBDAS[output.role], output.layer) for output in outputs]


def from_oracle(model: GPT, name: str, values: dict[str, Tensor], prefix: str = "") -> Tensor:
    """What the oracle has for a parameter."""
    if there := places(model, name):
        return torch.stack([values[prefix + role][layer] for role, layer in there])
    return values[prefix + oracle_name(name)]


def oracle_weights(model: GPT) -> dict[str, Tensor]:
    """All weights for reference.forward, in float64, with gradients. What has no place in the model is NaN."""
    weights = {role: torch.full((model.config.num_layers,), math.nan).double() for role in ORACLE_LAMBDAS.values()}
    for name, p in model.named_parameters():
        if there := places(model, name):
            for (role, layer), value in zip(there, p.detach(), strict=True):
                weights[role][layer] = value
        else:
            weights[oracle_name(name)] = p.detach().double().clone()
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    return weights | ({"bigram_sign": model.ngram_sign} if hasattr(model, "ngram_sign") else {})


# ---- golden numbers ----


@pytest.mark.golden
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"),
    [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-3), (torch.bfloat16, 5e-3, None)],
)
def test_model_reproduces_golden_losses_and_gradients(case, dtype, loss_error, grad_error):
    """Catches any departure from the formulas of reference.py: each of them enters the logits or a gradient here.

    These weights make a model so steep that in bfloat16 some gradients are off by more than their size.
    """
    golden = {k.removeprefix(f"case{case}_"): torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN).items()}
    model = GPT(replace(SMALL.model, vocab_size=256, head_dim=8, ngram_rows=120, ngram_signs=64), cpu(dtype))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(from_oracle(model, name, golden))
        model.ngram_sign.copy_(golden["bigram_sign"])
        model.prefix.copy_(golden["prefix"])
    ngrams = (golden[name][None].long() for name in ("bigram_rows", "sign_rows"))
    row = Row(golden["tokens"].long(), golden["targets"].long(), golden["cu_seqlens"], 160, *ngrams)
    short, long = golden["windows"].tolist()
    at = replace(step_settings((short, long), 8), frequencies=tuple(golden["frequencies"].tolist()))
    at = replace(at, attn_scale=golden["attn_scale"].item())
    weights = golden["prediction_weights"], golden["prefix_weight"][None]
    loss, nll = model(row, at, *(weight.to(torch.promote_types(dtype, torch.float32)) for weight in weights))
    loss.backward()

    assert loss.item() == pytest.approx(golden["loss_sum"].item(), rel=loss_error)
    assert nll.item() / 160 == pytest.approx(golden["val_loss"].item(), rel=loss_error)
    if dtype == torch.float64:
        assert (model.logits(row, at) - golden["logits"]).abs().max() < 2e-6  # stored as float32
    for name, p in model.named_parameters() if grad_error else ():
        grad = p.grad.double()
        if places(model, name) or f"grad_{oracle_name(name)}" in golden:
            assert error(grad, from_oracle(model, name, golden, "grad_")) < grad_error, name
        else:
            flat = grad.flatten(1)
            assert error(flat.norm(dim=1), from_oracle(model, name, golden, "gradnorm_")) < grad_error, name
            assert error(flat[:, :8], from_oracle(model, name, golden, "gradhead_")) < grad_error, name


@pytest.mark.golden
def test_yarn_steps_reproduce_golden_frequencies():
    """Catches a ramp the wrong way round, a wrong r, and YaRN starting from the first frequencies at every step."""
    golden = np.load(GOLDEN)
    frequencies, attn_scale = train_gpt.base_frequencies(8), 0.1
    for case in range(3):
        if case:
            a, b = (int(golden[f"case{i}_windows"][1]) for i in (case - 1, case))
            frequencies, attn_scale = train_gpt.yarn(frequencies, attn_scale, a, b)
        assert frequencies == pytest.approx(golden[f"case{case}_frequencies"].tolist(), rel=1e-12)
        assert attn_scale == pytest.approx(golden[f"case{case}_attn_scale"].item(), rel=1e-12)


# ---- the naive reference ----


ROWS = {  # documents, windows, the window before, weights of predictions, that of prefixes
    "one document": ([0], (5, 11), None, (1.0,), None),  # windows shorter than the document
    "documents, after YaRN": ([0, 1, 9, 10, 40], (7, 30), 13, (1.0, 0.5, 0.25), 0.25),  # some of one token
    "wide windows": ([0, 33], (70, 90), None, (1.0, 0.3), 0.4),  # longer than the row
}


def hold_against_reference(config: ModelConfig, row_name: str, num_tokens: int, single: bool = False) -> GPT:
    """Assert that loss, logits and all gradients of a random model are those of reference.py, to 1e-9 in float64;
    single: in float32 as well, to what that allows. Returns the model."""
    starts, windows, grown_from, weights, prefix_weight = ROWS[row_name]
    row = make_row(num_tokens, [start for start in starts if start < num_tokens], config)
    at = step_settings(windows, config.head_dim, grown_from)
    prefixes = prefix_weight is not None
    token_bytes = [b"" if token == 7 else str(token).encode() for token in range(config.vocab_size)]
    model = random_model(config)
    oracle = oracle_weights(model)
    frequencies, attn_scale = reference.initial_frequencies(config.head_dim), 0.1
    if grown_from:
        frequencies, attn_scale = reference.yarn(frequencies, attn_scale, grown_from, windows[1])
    expected_logits = reference.forward(
        oracle, layout_of(config), row.inputs, row.cu_seqlens, windows, frequencies, attn_scale
    )
    prefix = reference.prefix_table([text or None for text in token_bytes]) if prefixes else None
    expected_loss = reference.train_loss(expected_logits, row.targets, weights, prefix, prefix_weight)
    expected_loss.backward()
    gradients = {name: weight.grad for name, weight in oracle.items()}

    def run(model: GPT) -> tuple[float, float]:
        model.set_prefixes(token_bytes)
        dtype = torch.promote_types(model.embed.dtype, torch.float32)
        of_prefix = torch.tensor([prefix_weight], dtype=dtype) if prefixes else None
        loss, nll = model(row, at, torch.tensor(weights, dtype=dtype), of_prefix)
        loss.backward()
        return loss.item(), nll.item() / num_tokens

    loss, nll = run(model)
    assert error(model.logits(row, at), expected_logits.detach()) < 1e-9
    assert loss == pytest.approx(expected_loss.item(), rel=1e-10)
    assert nll == pytest.approx(reference.val_loss(expected_logits, row.targets).item(), rel=1e-10)
    for name, p in model.named_parameters():
        expected = from_oracle(model, name, gradients)
        assert expected.any() and error(p.grad, expected) < 1e-9, name
    if single:
        rounded = random_model(config, torch.float32)
        assert run(rounded)[0] == pytest.approx(expected_loss.item(), rel=1e-5)
        for name, p in rounded.named_parameters():
            assert error(p.grad, from_oracle(model, name, gradients)) < 2e-3, name
    return model


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "row_name"),
    [
        *((name, "documents, after YaRN") for name in ("small", "medium", "xl")),
        *((name, row) for name in ("nano", "medley", "numbers") for row in ROWS),
    ],
)
def test_model_equals_naive_reference(name, row_name):
    """Catches any departure from the formulas, in any layout. 67 tokens: an odd length, more than a block."""
    hold_against_reference(CONFIGS[name], row_name, 67, single=name != "xl")


@pytest.mark.parametrize("name", ["small", "medley", "numbers"])
def test_gradients_in_bfloat16_are_near_those_in_float64(name):
    """Catches: a sum, a norm or a coefficient that loses its meaning in 8 bits. Weights near those of the start; where
    a parameter has few numbers, its gradient can be a sum whose terms cancel."""
    config = CONFIGS[name]
    row, at = make_row(160, [0, 1, 60, 100], config), step_settings((20, 60), config.head_dim)
    model, rounded = (GPT(config, cpu(dtype)) for dtype in (torch.float64, torch.bfloat16))
    pairs = {n: (p, rounded.get_parameter(n)) for n, p in model.named_parameters()}
    for n, (p, low) in pairs.items():
        generator = torch.Generator().manual_seed(zlib.crc32(n.encode()))
        with torch.no_grad():
            p.copy_(low.add_(0.05 * torch.randn(p.shape, generator=generator)))
    for either in (model, rounded):
        either.set_prefixes([str(token).encode() for token in range(config.vocab_size)])
        weights = torch.tensor([1.0, 0.5, 0.25], dtype=train_gpt.wide(either.head.dtype))
        loss, _ = either(row, at, weights[:2], weights[2:])
        loss.backward()
    for n, (p, low) in pairs.items():
        assert p.numel() < 100 or error(low.grad, p.grad) < 0.1, n
    exact, found = (torch.cat([pair[i].grad.double().flatten() for pair in pairs.values()]) for i in (0, 1))
    assert error(found, exact) < 0.03


NETWORK = ("w1", "w2", "bias")
SWITCHED_OFF = {  # the parameters that the layout then does without
    "smear": (False, {"smear_gate", "smear_lambda"}),
    "key_offset": (False, set()),
    "paired_layers": ((), set()),
    "long_layers": ((), set()),
    "gated_layers": ((), set()),
    "xsa_layers": ((), set()),
    "dc_layers": ((), set()),
    "value_layers": ((), {"value_embeds", "value_gates"}),
    "skips": ((), {"skip_lambda"}),
    "late_input": (None, set()),
    "gate_networks": (False, {"gate_scale", *(f"{network}.{part}" for network in ("pre", "post") for part in NETWORK)}),
    "second_gates": (None, {f"post.{part}" for part in NETWORK}),
    "mix_in": ((), {f"mix_in.{part}" for part in NETWORK}),
    "mix_out": ((), {f"mix_out.{part}" for part in NETWORK}),
    "ngrams": ((), {"ngram_embed"}),
    "ngram_signs": (0, set()),
}


@pytest.mark.golden
@pytest.mark.parametrize("technique", SWITCHED_OFF)
def test_a_technique_that_is_switched_off_is_gone(technique):
    """Against the reference without it. Catches: a switch that switches nothing, something else as well, or leaves
    parameters behind that nothing reads."""
    value, gone = SWITCHED_OFF[technique]
    full = replace(CONFIGS["small"], num_heads=2, vocab_size=50)
    off = replace(full, **{technique: value})
    if technique == "value_layers":
        off = replace(off, mix_out=tuple(pair for pair in off.mix_out if pair[0] != "value1"))
    model = hold_against_reference(off, "documents, after YaRN", 30)
    names, all_names = ({name for name, _ in GPT(config, cpu()).named_parameters()} for config in (off, full))
    assert all_names - names == gone and names - all_names <= {"gates.bias"}
    row, at = make_row(30, [0, 9], full), step_settings((7, 12), full.head_dim)
    assert error(model.logits(row, at), random_model(full).logits(row, at)) > 1e-6


@pytest.mark.golden
def test_reference_and_model_agree_on_the_layouts_of_the_tracks():
    """Catches: a layer in another place in one of the deeper tracks, whose layouts come from that of `small`."""
    layouts = {name: layout_of(track.model) for name, track in TRACKS.items()}
    expected = {"small": reference.SMALL, "medium": reference.MEDIUM, "xl": reference.XL, "nano": reference.NANO}
    assert layouts == expected


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8, 9, 13])
def test_a_layout_of_another_depth_is_a_model_in_which_everything_learns(depth):
    """Catches: roles that meet in one layer and exclude each other, a gate network that never reads, a stream that
    is weighed but not there."""
    model = random_model(replace(CONFIGS["small"].stretched(depth), num_heads=2))
    row, at = make_row(30, [0, 9], model.config), step_settings((7, 12), 8)
    model(row, at, torch.ones(1, dtype=torch.float64))[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@given(
    T=st.integers(1, 300),
    window=st.integers(0, 320),
    cuts=st.lists(st.integers(1, 299), max_size=6),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_block_local_attention_equals_dense_attention(T, window, cuts, seed):
    """Catches wrong blocks at the edges: any length, window and cut, also a query whose window is its own token.
    Composed heads likewise, whose weights are mixed before they meet the values."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    mix = torch.randn(T, 2, generator=generator, dtype=torch.float64)
    starts = sorted({0, *(c for c in cuts if c < T)})
    cu_seqlens = torch.tensor([*starts, T, T], dtype=torch.int32)
    out = train_gpt.attention(q, k, v, cu_seqlens, T, 0.3, window)
    composed = train_gpt.composed_attention(q, k, v, mix, cu_seqlens, 0.3, window)
    documents = reference.document_ids(cu_seqlens, T)
    mixed = torch.zeros(T, T, dtype=torch.float64)
    for h in range(2):
        weights = reference.attention_weights(q[:, h], k[:, h], documents, window, 0.3)
        mixed += mix[:, h, None] * weights
        assert torch.allclose(out[:, h], weights @ v[:, h], rtol=1e-10, atol=1e-12)
    for h in range(2):
        assert torch.allclose(composed[:, h], mixed @ v[:, h], rtol=1e-10, atol=1e-12)


def test_attention_of_the_cpu_costs_linear_memory():
    """A row of 65,536 tokens: a dense mask would take 4 GiB per head. Catches a fall back to dense attention."""
    T, document = 65_536, 5_000
    q = torch.randn(T, 1, 4)
    cu_seqlens = torch.tensor([*range(0, T, document), T], dtype=torch.int32)
    out = train_gpt.attention(q, q, q, cu_seqlens, document, 0.1, 100)
    last = slice(T - 50, T)  # by hand: all keys of these queries lie in the last 150 tokens, in one document
    part = q[T - 150 :, 0].double()
    expected = reference.masked_attention(part, part, part, torch.zeros(150, dtype=torch.long), 100, 0.1)
    assert torch.allclose(out[last, 0].double(), expected[-50:], atol=1e-5)


def test_validation_over_slices_equals_the_whole_row():
    """Without gradients the head runs over slices of 16,384 tokens: the sum must not depend on the cuts."""
    config = replace(NANO.model, num_layers=1, head_dim=8, ngram_rows=1009)
    model = random_model(config, torch.float32)
    model.set_prefixes([str(token).encode() for token in range(config.vocab_size)])
    row, at = make_row(16_384 + 100, [0, 9000], config), step_settings((8, 16), 8)
    weights = torch.tensor([1.0, 0.5, 0.25])
    with torch.no_grad():
        sliced = model(row, at, weights[:2], weights[2:])
    whole = model(row, at, weights[:2], weights[2:])
    assert sliced[0].item() == pytest.approx(whole[0].item(), rel=1e-6)
    assert sliced[1].item() == pytest.approx(whole[1].item(), rel=1e-6)


# ---- what no token may know ----


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "xl"])  # that one is a deeper `medium`
def test_a_future_token_never_changes_a_logit(name):
    """Causality through every path: paired and composed heads, smear, key offset, n-grams, networks. Bit for bit."""
    config = CONFIGS[name]
    model, at = random_model(config), step_settings((20, 60), config.head_dim)
    logits = lambda change=None: model.logits(make_row(70, [0, 31], config, change=change), at)
    before = logits()
    for changed in (1, 30, 31, 32, 69):
        after = logits(changed)
        assert torch.equal(before[:changed], after[:changed]), changed
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "xl"])  # that one is a deeper `medium`
def test_another_document_changes_nothing_but_what_smear_and_key_offset_let_across(name):
    """Two things may come across a document's start, and nothing else, n-grams least of all:

    - smear mixes the last token of the document before into the first embedding, and
    - the key offset gives the first key the stationary dims of the key before, which knows its whole document.
    """
    config, start = CONFIGS[name], 31
    at = step_settings((20, 60), config.head_dim)

    def change(model: GPT, position: int) -> bool:
        """Whether another token at `position` of the first document changes the second one."""
        before, after = (model.logits(make_row(70, [0, start], config, change=c), at) for c in (None, position))
        return not torch.equal(before[start:], after[start:])

    open_model = random_model(config)
    assert change(open_model, start - 1) and change(open_model, start - 5)  # the key offset leaks

    sealed = random_model(replace(config, key_offset=False))
    assert change(sealed, start - 1) == config.smear and not change(sealed, start - 2)  # the very last token alone

    if config.smear:
        with torch.no_grad():
            sealed.smear_lambda.zero_()
        assert not change(sealed, start - 1)


# ---- initialization and banks ----


@pytest.fixture(scope="module")
def at_start() -> GPT:
    """`small` with a small vocabulary, as it starts."""
    return GPT(replace(SMALL.model, vocab_size=1000, ngram_rows=1000), cpu())


def test_initial_weights_have_their_spread(at_start):
    """Catches: a standard deviation taken for the half-width of a uniform one, a matrix that starts at zero or should,
    signs that another seed would change under a checkpoint."""
    model, d = at_start, 768
    qk, vo, mlp = model.qk_bank.view(10, 2, d, d), model.vo_bank.view(10, 2, d, d), model.mlp_bank.view(11, 2, 4 * d, d)
    for matrices in (qk[:, 0], qk[:, 1], vo[:, 0], vo[:, 1], mlp[:, 0]):
        assert matrices.std().item() == pytest.approx(0.5 * d**-0.5, rel=1e-2)
        assert matrices.abs().max().item() == pytest.approx(0.5 * (3 / d) ** 0.5, rel=1e-3)  # uniform
    assert not torch.equal(qk[:, 0], qk[:, 1])
    assert not mlp[:, 1].any()
    assert model.head.std().item() == pytest.approx(0.005, rel=1e-2)
    assert model.value_embeds.std().item() == pytest.approx(0.01, rel=1e-2)
    assert torch.equal(model.embed, model.head.T)
    for name in ("ngram_embed", "value_gates", "smear_gate", "smear_lambda"):
        assert not getattr(model, name).any(), name
    assert torch.equal(model.sa_lambda, torch.tensor([0.5, 1.0]).repeat(11, 1)) and model.skip_lambda == -1.5
    assert SMALL.model.padded_vocab == 50304
    assert model.ngram_sign.shape == (8192, d)
    assert (model.ngram_sign.abs() == 1).all() and abs(model.ngram_sign.mean().item()) < 1e-3
    signs = [GPT(CONFIGS["small"], cpu(), seed).ngram_sign for seed in (0, 1)]
    assert torch.equal(*signs) and "ngram_sign" not in model.state_dict(), "a checkpoint does not hold them"


def test_initial_coefficients_of_small(at_start):
    """Catches: gates that do not start where they are meant to: at a scale of 0.1, no network reads anything yet."""
    pre = [0.0] * 12 + [0.25] * 6 + [0.0, 0.05] * 4
    post = [0.0] * 12 + [0.25] * 6 + [0.0, 0.05] * 5 + [0.5] + [1.0] * 6 + [0.0] * 6
    mix_in = [0.0] * 6 + [2.0, 2.0, 1.1**0.5, 1.0, 0.0, 0.05, 1.1**0.5, 1.0]
    expected = {"pre": pre, "post": post, "mix_in": mix_in, "mix_out": [0.0, -0.5, 0.0, 0.0, 0.0]}
    for name, values in expected.items():
        network = at_start.get_submodule(name)
        found = torch.cat([value for _, value in network(torch.randn(3, 768), at_start.gate_scale)], dim=-1)
        torch.testing.assert_close(found, torch.tensor(values).expand(3, -1), rtol=1e-6, atol=1e-6)
        assert network.w1.shape == (64, 768) and network.w1.std().item() == pytest.approx((3 * 768) ** -0.5, rel=2e-2)
        assert network.w1.abs().max().item() == pytest.approx(768**-0.5, rel=1e-3)
    assert torch.allclose(at_start.resid.bias, torch.tensor(1.1) ** 0.5)
    assert (at_start.branch.bias == 1).all() and at_start.gate_scale.item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["small", "nano"])
def test_from_the_start_every_weight_learns(name):
    """Catches: two factors that both start at zero, such as a table of n-grams and its weight: neither would ever get a
    gradient. Three updates, because what stands behind a zero waits for it to leave."""
    track = TRACKS[name]
    model = GPT(CONFIGS[name], cpu())
    params = dict(model.named_parameters())
    optimizer = train_gpt.Optimizer(params, track.optimizer, cpu())
    row, at = make_row(40, [0, 9], CONFIGS[name]), step_settings((9, 20), CONFIGS[name].head_dim)
    for step in (1, 3, 5, 7):
        model(row, at, torch.ones(1))[0].backward()
        still = [name for name, p in params.items() if not p.grad.any()]
        optimizer.step(replace(at, step=step))
    assert not still


def test_tables_of_nano_start_as_it_says():
    """Catches: tables and weights that start as those of `small` do."""
    model = GPT(NANO.model, cpu())
    assert not model.value_embeds.any() and model.ngram_embed.std().item() == pytest.approx(0.005, rel=1e-2)
    for (role, _), output in zip(reference.gate_outputs(reference.NANO, 0, 1), model.gates.bias, strict=True):
        assert output == {"x0": 0.0, "ngram": 0.5}[role[0]]


def test_queries_and_keys_start_equal_where_the_layout_says_so():
    """Catches: Wk copied into another matrix, or other weights that change with it."""
    config = CONFIGS["medley"]  # 4 matrices of Wq, then 4 of Wk
    free, equal = (GPT(replace(config, equal_qk_init=value), cpu()) for value in (False, True))
    banks = [model.qk_bank.unflatten(0, (4, 2, 4)) for model in (free, equal)]
    assert torch.equal(banks[1][:, 1], banks[1][:, 0]) and not torch.equal(banks[0][:, 1], banks[0][:, 0])
    assert torch.equal(banks[1][:, 0], banks[0][:, 0])
    assert all(torch.equal(p, q) for p, q in zip((free.vo_bank, free.head), (equal.vo_bank, equal.head), strict=True))


@pytest.mark.parametrize("world_size", [2, 8])
def test_banks_are_padded_with_zero_matrices_that_change_nothing(world_size):
    """Catches weights that depend on the number of processes, and layers that read the padding."""
    config = replace(CONFIGS["medley"], num_layers=5, qk_heads=4)  # 6, 6 and 10 matrices
    one, many = random_model(config), random_model(config, world_size=world_size)
    row, at = make_row(50, [0, 20], config), step_settings((9, 20), config.head_dim)
    with torch.no_grad():
        for name in ("qk_bank", "vo_bank", "mlp_bank"):
            ours, padded = getattr(one, name), getattr(many, name)
            assert len(padded) % world_size == 0 and (len(padded) > len(ours)) == (world_size == 8)
            assert not GPT(config, cpu(world_size=world_size)).get_parameter(name)[len(ours) :].any()
            padded[: len(ours)] = ours
    assert torch.equal(one.logits(row, at), many.logits(row, at))
    loss, _ = many(row, at, torch.ones(1, dtype=torch.float64))
    loss.backward()
    for name in ("qk_bank", "vo_bank", "mlp_bank"):
        assert not many.get_parameter(name).grad[len(one.get_parameter(name)) :].any()


def test_impossible_layouts_are_refused():
    """Catches: a layout that fails only in the middle of a run, or without saying which number is wrong."""
    even, paired = {"num_heads": 3, "qk_heads": 1, "mix_in": ("last",)}, {"dc_layers": (0,), "paired_layers": (0,)}
    wrong = [
        {"head_dim": 30},
        {"num_heads": 3, "qk_heads": 1, "paired_layers": (0,)},
        {"skips": ((3, 1),)},
        {"num_layers": 0},
    ]
    wrong += [{"qk_heads": 4}, even, paired, {"mix_in": ("out",)}, {"mix_out": (("embed", 0.1),)}]
    for change in wrong:
        with pytest.raises(train_gpt.SpeedrunError, match="model"):
            GPT(replace(NANO.model, **change), cpu())
    for change in ({"head_dim": 4}, {"gate_dim": 11}):
        with pytest.raises(train_gpt.SpeedrunError, match="gate_dim"):
            GPT(replace(NANO.model, **change), cpu())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_with_a_sample_trains_on_it_and_validates_on_everything(monkeypatch, compiled):
    """Every prediction and prefix, over a sample of all columns in another order and over one of half of them; the
    same when traced. Catches: an estimate in validation, a sample that some prediction does not use."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = random_model(replace(CONFIGS["small"], vocab_size=257))
    if compiled:
        plain, model = model, GPT(model.config, replace(cpu(torch.float64), compile=True))
        model.load_state_dict(plain.state_dict())
    prefix = model.set_prefixes([str(token).encode() for token in range(257)])
    row, at = make_row(64, [0, 20], model.config), step_settings((16, 32), model.config.head_dim)
    V, weights = model.config.padded_vocab, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    wanted = {*row.targets.tolist(), *prefix[row.targets].tolist()} - {-1}

    def run(row: Row) -> tuple[float, float, Tensor]:
        model.zero_grad()
        loss, nll = model(row, at, weights[:2], weights[2:])
        loss.backward()
        model.hand_over_gradients()
        with torch.no_grad():
            assert model(row, at, weights[:1])[1].item() == pytest.approx(validated, rel=1e-12)
        return loss.item(), nll.item(), model.head.grad.clone()

    with torch.no_grad():
        validated = model(row, at, weights[:1])[1].item()
    loss, nll, grad = run(row)
    assert nll == pytest.approx(validated, rel=1e-12)
    samples = (train_gpt.sample_vocab(np.isin(np.arange(V), [*wanted]), S, 0, 0, 0) for S in (V, len(wanted) + 40))
    (every, every_nll, every_grad), (some, some_nll, some_grad) = (
        run(row._replace(sampled=sampled, num_targets=n)) for sampled, n in samples
    )
    assert every == pytest.approx(loss, rel=1e-12) and every_nll == pytest.approx(nll, rel=1e-12)
    assert error(every_grad, grad) < 1e-12
    assert 1e-6 < abs(some / loss - 1) < 0.1 and 1e-6 < abs(some_nll / nll - 1) < 0.1
    assert (some_grad != 0).any(0).sum() == len(wanted) + 40 < (grad != 0).any(0).sum()


def test_compiled_passes_add_up_the_gradients_of_large_parameters(monkeypatch):
    """Catches: a table or a bank whose gradient is lost, counted twice, or kept for the next step."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = replace(NANO.model, num_layers=3, head_dim=8, ngram_rows=211, ngrams=(1, 3), value_layers=(0, 1))
    plain = random_model(config)
    compiled = GPT(config, replace(cpu(torch.float64), compile=True))
    compiled.load_state_dict(plain.state_dict())
    settings = step_settings((16, 32), config.head_dim)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for step in range(2):
        plain.zero_grad()
        compiled.zero_grad()
        for seed in (2 * step, 2 * step + 1):
            for model in (plain, compiled):
                model(make_row(64, [0, 20], config, seed), settings, weights)[0].backward()
        compiled.hand_over_gradients()
        for (name, p), expected in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            assert error(p.grad, expected.grad) < 1e-12, (step, name)
