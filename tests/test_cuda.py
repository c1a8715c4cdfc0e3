"""What only a GPU can show: attention backends, precision of the whole model, no waiting for the device, 100 steps."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, cpu, run_process, text_like, write_shard, write_token_bytes
from test_model import make_row

import train_gpt
from train_gpt import GPT, SMALL, Options, Runtime, SpeedrunError, Trainer

pytestmark = pytest.mark.cuda

CONFIG = replace(SMALL.model, vocab_size=1000, ngram_rows=10_000)


def naive_attention(q, k, v, cu_seqlens: list[int], scale: float, window: int) -> torch.Tensor:
    """Softmax over an explicit mask; q, k, v (T, heads, D) float64."""
    T = len(q)
    position = torch.arange(T)
    document = torch.bucketize(position, torch.tensor(cu_seqlens), right=True)
    seen = (document[:, None] == document) & (position[:, None] >= position) & (position[:, None] - position <= window)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@pytest.fixture(params=["FA2", "FA3", "FA4"])
def backend(request):
    """Each FlashAttention that is installed; torch's own afterwards."""
    try:
        yield train_gpt.activate_flash_attention(request.param)
    except SpeedrunError as error:
        pytest.skip(str(error))
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.parametrize("window", [0, 100, 128, 5000])
def test_attention_and_its_gradients(backend, window):
    """Catches: a window that is one off, keys of another document, a scale that is not passed on. Head width 128."""
    T, starts = 700, [0, 1, 130, 131, 500]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(T, 3, 128, generator=generator).bfloat16().double() for _ in range(4)]
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    truth = naive_attention(*leaves, starts, 0.1, window)
    gradients = torch.autograd.grad(truth, leaves, inputs[3])
    on_gpu = [x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs[:3]]
    cu_seqlens = torch.tensor([*starts, *[T] * 9], dtype=torch.int32, device="cuda")
    out = train_gpt.attention(*on_gpu, cu_seqlens, T, 0.1, window)
    found = [out, *torch.autograd.grad(out, on_gpu, inputs[3].to("cuda", torch.bfloat16))]
    for a, b in zip(found, [truth, *gradients], strict=True):
        assert float((a.detach().cpu().double() - b.detach()).norm() / b.norm()) < 1e-2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("window", [1, 111, 224, 5000])
def test_composed_heads_and_their_gradients(window, fused):
    """Catches: a window that is one off, another document, a head mixed with another's weight. In bfloat16."""
    T, starts = 700, [0, 1, 130, 131, 500]
    generator = torch.Generator().manual_seed(1)
    shapes = (*[(T, 3, 128)] * 3, (T, 3), (T, 3, 128))
    *inputs, grad = (torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in inputs]
    q, k, v, mix = leaves
    truth = 0
    for head in range(3):  # one head's attention, on the values of all three
        one = [x[:, [head] * 3] for x in (q, k)]
        truth = truth + mix[:, head, None, None] * naive_attention(*one, v, starts, 0.1, window)
    gradients = torch.autograd.grad(truth, leaves, grad)
    on_gpu = [x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor([*starts, *[T] * 9], dtype=torch.int32, device="cuda")
    out = train_gpt.composed_attention(*on_gpu, cu_seqlens, 0.1, window, fused)
    found = [out, *torch.autograd.grad(out, on_gpu, grad.to("cuda", torch.bfloat16))]
    for a, b in zip(found, [truth.detach(), *gradients], strict=True):
        assert float((a.detach().cpu().double() - b).norm() / b.norm()) < 1e-2


def loss_and_gradients(runtime: Runtime) -> tuple[float, dict[str, torch.Tensor]]:
    """Of `small` with a small vocabulary, all weights moved a little, so that every gradient is there."""
    model = GPT(CONFIG, runtime, seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((torch.randn(p.shape, generator=generator) * 0.02).to(p.device, p.dtype))
    model.set_prefixes([str(token).encode() for token in range(CONFIG.vocab_size)])
    settings = replace(SMALL, model=CONFIG).at(1)
    weights = settings.prediction_weights, (settings.prefix_weight,)
    weights = [torch.tensor(some, device=runtime.device) for some in weights]
    row = make_row(1024, [0, 300, 301, 900], CONFIG).to(runtime)
    loss, _ = model(row, settings, *weights)
    loss.backward()
    model.hand_over_gradients()
    return float(loss), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"kernels": "plain"}, {"fp8": ()}, {"compile": False}], ids=str)
def test_the_model_agrees_with_the_cpu(options):
    """Loss and gradients in bfloat16 on the GPU against float32 on the CPU. Those of a few numbers can be sums whose
    terms cancel: they count with all others alone."""
    loss, gradients = loss_and_gradients(cpu())
    found_loss, found = loss_and_gradients(Runtime.create(Options(device="cuda", **options)))
    assert found_loss == pytest.approx(loss, rel=5e-3)
    error = lambda a, b: float((a - b).norm() / b.norm().clamp_min(1e-12))
    for name, truth in gradients.items():
        assert truth.numel() < 100 or error(found[name], truth) < 0.1, name
    both = (torch.cat([grads[name].flatten() for name in gradients]) for grads in (found, gradients))
    assert error(*both) < 0.1


def write_data(folder: Path) -> Path:
    for i in (1, 2):
        write_shard(folder / f"x_train_{i:06}.bin", text_like(4_000_000, seed=i, longest=900))
    write_shard(folder / "x_val_000000.bin", text_like(140_000, seed=9, longest=900))
    write_token_bytes(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def track():
    """`small` with short rows and a byte vocabulary, as the made shards have it."""
    stages = tuple(replace(stage, tokens=stage.tokens // 16) for stage in SMALL.schedule.stages)
    extension = replace(SMALL.schedule.extension, tokens=SMALL.schedule.extension.tokens // 16)
    schedule = replace(SMALL.schedule, stages=stages, extension=extension, scheduled_steps=96, extension_steps=4)
    data = replace(SMALL.data, bos=256, val_tokens=131_072, val_row_tokens=32_768)
    return replace(SMALL, schedule=schedule, data=data, model=replace(SMALL.model, vocab_size=257))


def test_a_step_never_waits_for_the_device(data):
    """Catches: `.item()`, a copy from unpinned memory, a shape that depends on data."""
    trainer = Trainer(track(), Runtime.create(Options(device="cuda")), data, seed=0)
    trainer.find_prefixes()
    for step in range(3):
        trainer.train_step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 7):
            trainer.train_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_compiled_after_the_warm_up(data):
    trainer = Trainer(track(), Runtime.create(Options(device="cuda")), data, seed=0)
    trainer.warm_up(trainer.track.schedule.total_steps)
    trainer.find_prefixes()
    graphs = train_gpt.compilations()
    for step in range(trainer.track.schedule.total_steps):
        trainer.train_step(step)
    trainer.validate(trainer.track.validation_at(100))
    assert train_gpt.compilations() == graphs > 0


def test_100_steps_end_at_the_same_loss_with_fp8_bf16_and_plain_twins(tmp_path):
    """On rehearsal shards, 100 steps of `small`: validation losses within 0.02 of each other."""
    shards = tmp_path / "rehearsal"
    made = run_process(
        [sys.executable, REPO / "data/rehearsal.py", "--out", shards, "--tokens", "40M", "--val-tokens", "300k"]
    )
    assert made.returncode == 0, made.stderr
    schedule = replace(SMALL.schedule, scheduled_steps=96, extension_steps=4)
    short = replace(SMALL, schedule=schedule, data=replace(SMALL.data, val_tokens=262_144))
    losses = {}
    for name, options in {"fp8": {}, "bf16": {"fp8": ()}, "plain": {"kernels": "plain"}}.items():
        trainer = Trainer(short, Runtime.create(Options(device="cuda", **options)), shards, seed=0)
        trainer.find_prefixes()
        for step in range(100):
            trainer.train_step(step)
        losses[name] = trainer.validate(short.validation_at(100))
        del trainer
    assert max(losses.values()) - min(losses.values()) < 0.02, losses
