"""The model against the golden numbers, the naive float64 reference, and the properties that no formula states."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import cpu
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import GPT, MEDIUM, NANO, SMALL, ModelConfig, Row, Settings

GOLDEN = Path(__file__).parent / "golden_model.npz"

# A second layout: several skips, one of them into a layer without attention, a second embedding, wider gates, value
# embeddings whose gates are not in layer order, paired long layers: what the two tracks leave out.
MEDLEY = ModelConfig(
    vocab_size=300,
    num_layers=6,
    num_heads=4,
    head_dim=16,
    without_attention=(4,),
    paired_layers=(0, 3),
    long_layers=(1, 3, 5),
    value_embeds=((0, 1), (2, 0), (5, 1)),
    skips=((0, 2), (1, 4), (2, 4)),
    backout_layer=3,
    second_embed=(1, 3),
    second_embed_rows=211,
    gate_dim=16,
)
CONFIGS = {
    "small": replace(SMALL.model, vocab_size=300, head_dim=16),
    "medium": replace(MEDIUM.model, vocab_size=300, second_embed_rows=384, head_dim=16),
    "nano": NANO.model,
    "medley": MEDLEY,
}


def layout_of(config: ModelConfig) -> reference.Layout:
    return reference.Layout(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        no_attention=config.without_attention,
        paired=config.paired_layers,
        long=config.long_layers,
        value_embed=dict(config.value_embeds),
        skips=config.skips,
        backout_layer=config.backout_layer if config.backout_layer < config.num_layers else None,
        gate_width=config.gate_dim,
        second_embed=config.second_embed,
    )


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64, world_size: int = 1) -> GPT:
    """A model in which no path is switched off by a zero at the start."""
    model = GPT(config, cpu(dtype, world_size=world_size))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith("_lambda"):
                p.add_(0.1 * noise + 0.05)
            elif name.endswith(("_gate", "_gates")):
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * {"embed": 1.0, "head": 0.1}.get(name, 0.7 * config.width**-0.5))
    return model


def step_settings(windows: tuple[int, int], head_dim: int, grown_from: int | None = None) -> Settings:
    frequencies, attn_scale = train_gpt.base_frequencies(head_dim), 0.1
    if grown_from:
        frequencies, attn_scale = train_gpt.yarn(frequencies, attn_scale, grown_from, windows[1])
    return replace(SMALL.at(0), windows=windows, frequencies=frequencies, attn_scale=attn_scale)


def make_row(num_tokens: int, starts: list[int], vocab_size: int, seed: int = 0) -> Row:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, num_tokens + 1)
    return train_gpt.make_row(tokens, np.array(starts), num_tokens, pin=False)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the norm of what is expected."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# ---- golden numbers ----


@pytest.mark.golden
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"),
    [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-4), (torch.bfloat16, 5e-3, 0.1)],
)
def test_model_reproduces_golden_losses_and_gradients(case, dtype, loss_error, grad_error):
    """Catches any departure from the formulas of reference.py: each of them enters the logits or a gradient here."""
    golden = {k.removeprefix(f"case{case}_"): torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    model = GPT(replace(SMALL.model, vocab_size=128, num_heads=4, head_dim=8), cpu(dtype))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden[name].reshape(p.shape))
    row = Row(golden["tokens"], golden["targets"], golden["cu_seqlens"], 96)
    short, long = golden["windows"].tolist()
    at = replace(step_settings((short, long), 8), frequencies=tuple(golden["frequencies"].tolist()))
    at = replace(at, attn_scale=golden["attn_scale"].item())
    loss, nll = model(row, at, golden["prediction_weights"].to(torch.promote_types(dtype, torch.float32)))
    loss.backward()

    assert loss.item() == pytest.approx(golden["loss_sum"].item(), rel=loss_error)
    assert nll.item() / 96 == pytest.approx(golden["val_loss"].item(), rel=loss_error)
    if dtype == torch.float64:
        assert (model.logits(row, at) - golden["logits"]).abs().max() < 2e-6  # stored as float32
    for name, p in model.named_parameters():
        grad = p.grad.double()
        if f"grad_{name}" in golden:
            assert error(grad, golden[f"grad_{name}"].reshape(p.shape)) < grad_error, name
        else:
            flat = grad.flatten(1)
            assert error(flat.norm(dim=1), golden[f"gradnorm_{name}"]) < grad_error, name
            assert error(flat[:, :8], golden[f"gradhead_{name}"]) < grad_error, name


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


ROWS = {
    "one document": ([0], (5, 11), None, (1.0,)),  # windows shorter than the document
    "documents, after YaRN": ([0, 1, 9, 10, 40], (7, 30), 13, (1.0, 0.5, 0.25)),  # some of one token
    "wide windows": ([0, 33], (70, 90), None, (1.0, 0.3)),  # longer than the row
}


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "row_name"),
    [
        *((name, "documents, after YaRN") for name in ("small", "medium")),
        *((name, row) for name in ("nano", "medley") for row in ROWS),
    ],
)
def test_model_equals_naive_reference(name, row_name):
    """Loss, logits and all gradients to 1e-9 in float64, in float32 to what it allows. 67 tokens: an odd length."""
    config, (starts, windows, grown_from, weights) = CONFIGS[name], ROWS[row_name]
    row = make_row(67, starts, config.vocab_size)
    at = step_settings(windows, config.head_dim, grown_from)
    model = random_model(config)
    params = dict(model.named_parameters())
    oracle = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    frequencies, attn_scale = reference.initial_frequencies(config.head_dim), 0.1
    if grown_from:
        frequencies, attn_scale = reference.yarn(frequencies, attn_scale, grown_from, windows[1])
    expected_logits = reference.forward(
        oracle, layout_of(config), row.inputs, row.cu_seqlens, windows, frequencies, attn_scale
    )
    expected_loss = reference.train_loss(expected_logits, row.targets, weights)
    expected_loss.backward()

    loss, nll = model(row, at, torch.tensor(weights, dtype=torch.float64))
    loss.backward()
    assert error(model.logits(row, at), expected_logits.detach()) < 1e-9
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    assert nll.item() / 67 == pytest.approx(reference.val_loss(expected_logits, row.targets).item(), rel=1e-10)
    for n, p in params.items():
        assert error(p.grad, oracle[n].grad) < 1e-9, n

    single = random_model(config, torch.float32)
    loss, _ = single(row, at, torch.tensor(weights))
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for n, p in single.named_parameters():
        assert error(p.grad, oracle[n].grad) < 2e-3, n


@pytest.mark.parametrize("switch", ["smear", "attention_gates", "key_offset"])
def test_a_technique_that_is_switched_off_is_one_that_does_nothing(switch):
    """Against the full model, whose naive reference stands above, with the technique's weights set to no effect.

    Catches: a switch that switches nothing or something else. Smear: lambda 0. Gates: zero weights, which halve the
    output of each head. Key offset: short layers have none, so all layers are short, with equal windows.
    """
    config, windows = MEDLEY, (20, 20)
    full = random_model(replace(config, long_layers=()) if switch == "key_offset" else config)
    off = GPT(replace(config, **{switch: False}), cpu(torch.float64))
    with torch.no_grad():
        if switch == "smear":
            full.smear_lambda.zero_()
        if switch == "attention_gates":
            full.attn_gates.zero_()
        for name, p in off.named_parameters():
            p.copy_(full.get_parameter(name))
        if switch == "attention_gates":
            off.sa_lambda[:, 1] *= 0.5
    row, at = make_row(67, [0, 30], config.vocab_size), step_settings(windows, config.head_dim)
    assert error(off.logits(row, at), full.logits(row, at)) < 1e-12
    assert error(off.logits(row, at), random_model(config).logits(row, at)) > 1e-4
    gone = {"smear": {"smear_gate", "smear_lambda"}, "attention_gates": {"attn_gates"}, "key_offset": set()}[switch]
    assert {n for n, _ in full.named_parameters()} - {n for n, _ in off.named_parameters()} == gone


@pytest.mark.golden
def test_reference_and_model_agree_on_the_layout_of_small():
    assert layout_of(SMALL.model) == reference.SMALL


@given(
    T=st.integers(1, 300),
    window=st.integers(0, 320),
    cuts=st.lists(st.integers(1, 299), max_size=6),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_block_local_attention_equals_dense_attention(T, window, cuts, seed):
    """Catches wrong blocks at the edges: any length, window and cut, also a query whose window is its own token."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    starts = sorted({0, *(c for c in cuts if c < T)})
    cu_seqlens = torch.tensor([*starts, T, T], dtype=torch.int32)
    out = train_gpt.attention(q, k, v, cu_seqlens, T, 0.3, window)
    documents = reference.document_ids(cu_seqlens, T)
    for h in range(2):
        expected = reference.masked_attention(q[:, h], k[:, h], v[:, h], documents, window, 0.3)
        assert torch.allclose(out[:, h], expected, rtol=1e-10, atol=1e-12)


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
    config = replace(NANO.model, num_layers=1, head_dim=8)
    model = random_model(config, torch.float32)
    row, at = make_row(16_384 + 100, [0, 9000], config.vocab_size), step_settings((8, 16), 8)
    weights = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        sliced = model(row, at, weights)
    whole = model(row, at, weights)
    assert sliced[0].item() == pytest.approx(whole[0].item(), rel=1e-6)
    assert sliced[1].item() == pytest.approx(whole[1].item(), rel=1e-6)


# ---- what no token may know ----


@pytest.mark.parametrize("name", CONFIGS)
def test_a_future_token_never_changes_a_logit(name):
    """Causality through every path: paired heads, smear, key offset, skips. Bit for bit."""
    config = CONFIGS[name]
    model, at = random_model(config), step_settings((20, 60), config.head_dim)
    row = make_row(70, [0, 31], config.vocab_size)
    before = model.logits(row, at)
    for changed in (1, 30, 31, 32, 69):
        inputs = row.inputs.clone()
        inputs[changed] = (inputs[changed] + 1) % config.vocab_size
        after = model.logits(replace(row, inputs=inputs), at)
        assert torch.equal(before[:changed], after[:changed]), changed
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("name", CONFIGS)
def test_another_document_changes_nothing_but_what_smear_and_key_offset_let_across(name):
    """Two things may come across a document's start, and nothing else:

    - smear mixes the last token of the document before into the first embedding, and
    - the key offset gives the first key the stationary dims of the key before, which knows its whole document.
    """
    config = CONFIGS[name]
    model = random_model(config)
    row, start, at = make_row(70, [0, 31], config.vocab_size), 31, step_settings((20, 60), config.head_dim)

    def change(model: GPT, position: int) -> bool:
        """Whether another token at `position` of the first document changes the second one."""
        inputs = row.inputs.clone()
        inputs[position] = (inputs[position] + 1) % config.vocab_size
        before, after = model.logits(row, at), model.logits(replace(row, inputs=inputs), at)
        return not torch.equal(before[start:], after[start:])

    assert change(model, start - 1) and change(model, start - 5)  # both leaks are open

    sealed = random_model(replace(config, long_layers=()))
    assert change(sealed, start - 1) and not change(sealed, start - 2)  # smear alone: only the very last token

    with torch.no_grad():
        sealed.smear_lambda.zero_()
    assert not change(sealed, start - 1)


# ---- initialization and banks ----


def test_initial_weights_have_their_spread():
    config, d = replace(SMALL.model, vocab_size=1000), 768
    model = GPT(config, cpu())
    attn, mlp = model.attn_bank.view(-1, 4, d, d), model.mlp_bank.view(-1, 2, 4 * d, d)
    assert attn.shape[0] == 10 and mlp.shape[0] == 11
    assert attn[:, :3].std().item() == pytest.approx(d**-0.5, rel=1e-2)
    assert attn[:, :3].abs().max().item() == pytest.approx((3 / d) ** 0.5, rel=1e-3)  # uniform
    assert mlp[:, 0].std().item() == pytest.approx(0.5 * d**-0.5, rel=1e-2)
    assert not attn[:, 3].any() and not mlp[:, 1].any()
    assert model.head.std().item() == pytest.approx(0.005, rel=1e-2)
    assert torch.equal(model.embed, model.head.T)
    for name in ("value_embeds", "attn_gates", "value_gates", "smear_gate", "skip_gate", "x0_lambda", "smear_lambda"):
        assert not getattr(model, name).any(), name
    assert torch.equal(model.sa_lambda, torch.tensor([0.5, 1.0]).repeat(11, 1))
    assert (model.resid_lambda == 1.1).all() and (model.skip_lambda == -1.5).all() and model.backout_lambda == 0.5
    assert SMALL.model.padded_vocab == 50304


def test_a_second_embedding_does_not_start_at_zero():
    """With x02_lambda zero as well, neither would ever have a gradient."""
    config = CONFIGS["medium"]
    model = GPT(config, cpu())
    assert model.embed2.std().item() == pytest.approx(0.005, rel=2e-2) and not model.x02_lambda.any()
    assert torch.equal(GPT(replace(config, second_embed=()), cpu()).head, model.head), "all else is as without it"
    row, at = make_row(40, [0], config.vocab_size), step_settings((9, 20), config.head_dim)
    model(row, at, torch.ones(1))[0].backward()
    assert model.x02_lambda.grad.abs().min() > 0


def test_queries_and_keys_start_equal_where_the_layout_says_so():
    """Catches: Wk copied into another matrix, or other weights that change with it."""
    config = CONFIGS["medley"]
    free, equal = (GPT(replace(config, equal_qk_init=value), cpu()).attn_bank[:20] for value in (False, True))
    assert torch.equal(equal[1::4], equal[0::4]) and not torch.equal(free[1], free[0])
    for matrix in (0, 2, 3):
        assert torch.equal(equal[matrix::4], free[matrix::4])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_banks_are_padded_with_zero_matrices_that_change_nothing(world_size):
    """Catches weights that depend on the number of processes, and layers that read the padding."""
    config = NANO.model
    one, many = random_model(config), random_model(config, world_size=world_size)
    row, at = make_row(50, [0, 20], config.vocab_size), step_settings((9, 20), config.head_dim)
    with torch.no_grad():
        for name in ("attn_bank", "mlp_bank"):
            ours, padded = getattr(one, name), getattr(many, name)
            assert len(padded) % world_size == 0
            assert not GPT(config, cpu(world_size=world_size)).get_parameter(name)[len(ours) :].any()
            padded[: len(ours)] = ours
        for name, p in many.named_parameters():
            if not name.endswith("_bank"):
                p.copy_(one.get_parameter(name))
    assert torch.equal(one.logits(row, at), many.logits(row, at))
    loss, _ = many(row, at, torch.ones(1, dtype=torch.float64))
    loss.backward()
    assert not many.attn_bank.grad[len(one.attn_bank) :].any()


def test_impossible_layouts_are_refused():
    for wrong in ({"head_dim": 30}, {"num_heads": 3}, {"skips": ((3, 1),)}, {"num_layers": 0}):
        with pytest.raises(train_gpt.SpeedrunError, match="model"):
            GPT(replace(NANO.model, **wrong), cpu())
    with pytest.raises(train_gpt.SpeedrunError, match="gate_dim"):
        GPT(replace(NANO.model, head_dim=4), cpu())


def test_compiled_lookups_add_up_the_gradients_of_tables(monkeypatch):
    """Catches: a table whose gradient is lost, counted twice, or kept for the next step, where autograd makes none."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = random_model(MEDLEY)
    compiled = GPT(MEDLEY, replace(cpu(torch.float64), compile=True))
    compiled.load_state_dict(plain.state_dict())
    settings = step_settings((16, 32), MEDLEY.head_dim)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for step in range(2):  # gradients of the first stay, as those of Adam's parameters do on even steps
        for seed in (2 * step, 2 * step + 1):
            for model in (plain, compiled):
                model(make_row(64, [0, 20], 300, seed), settings, weights)[0].backward()
        compiled.hand_over_table_gradients()
        for (name, p), expected in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            assert error(p.grad, expected.grad) < 1e-12, (step, name)
