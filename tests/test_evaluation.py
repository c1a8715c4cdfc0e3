"""HellaSwag against one-by-one scoring, the plan against counted bytes, small siblings of a track."""

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, cpu, run_process, tiny_track, torchrun
from test_model import CONFIGS, make_row, random_model

import train_gpt
from train_gpt import (
    GPT,
    MEDIUM,
    NANO,
    SMALL,
    TRACKS,
    XL,
    Options,
    Runtime,
    SpeedrunError,
    hellaswag,
    pack,
    parse_command,
    plan_memory,
    read_hellaswag,
    scaled,
    token_losses,
)

# ---- HellaSwag ----


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """23 items with endings of very different lengths, some longer than a row of the tests."""
    rng = np.random.default_rng(3)
    word = lambda: bytes(rng.integers(97, 123, rng.integers(1, 9)).tolist()).decode()
    phrase = lambda most: " ".join(word() for _ in range(rng.integers(1, most)))
    path = tmp_path_factory.mktemp("hellaswag") / "items.jsonl"
    items = [
        {"ctx": phrase(12), "endings": [phrase(9) for _ in range(4)], "label": str(i % 4), "ind": i} for i in range(23)
    ]
    path.write_text("\n".join(map(json.dumps, items)) + "\n\n")
    return path


def model_of(name: str) -> tuple[GPT, train_gpt.Track]:
    config = replace(CONFIGS[name], vocab_size=257, vocab_multiple=16)
    track = replace(NANO, model=config)
    return random_model(config), track


def one_by_one(model: GPT, track: train_gpt.Track, items: list, settings: train_gpt.Settings) -> list[list[float]]:
    """Sum of the losses of each ending, each alone in a row of its own: from the logits, token by token."""
    found = []
    for item in items:
        sums = []
        for ending in item.endings:
            tokens = np.array([track.data.bos] * 3 + item.context + ending)
            row = train_gpt.make_row(tokens, np.array([0, 1, 2]), len(tokens), pin=False)
            log_probs = model.logits(row, settings).log_softmax(1)
            last = range(len(tokens) - 1 - len(ending), len(tokens) - 1)
            sums.append(-sum(log_probs[t, tokens[t + 1]].item() for t in last))
        found.append(sums)
    return found


@pytest.mark.parametrize("name", ["nano", "small", "medium"])
def test_packed_items_score_as_one_by_one(questions, name):
    """Every loss to 1e-9, hence every choice. Catches: a target off by one, the space before the ending forgotten,
    anything of one item that reaches the next."""
    config = replace(CONFIGS[name], head_dim=8, num_heads=4 if name == "medium" else CONFIGS[name].num_heads)
    config = replace(config, vocab_size=257, vocab_multiple=16)
    model, track = random_model(config), replace(NANO, model=config)
    settings = track.validation_at(510)
    items = read_hellaswag(str(questions), track)
    assert len(items) == 23 and bytes(items[0].endings[0]).startswith(b" ")
    expected = one_by_one(model, track, items, settings)
    sums = [None] * 92
    rows = list(pack(items, track.data.bos, 300))
    assert len(rows) > 5
    for packed in rows:
        losses = token_losses(model, packed.row, settings)
        for number, begin, end in packed.spans:
            sums[number] = losses[begin:end].sum().item()
    assert np.array(sums) == pytest.approx(np.array(expected).ravel(), rel=1e-9)

    plain = [int(np.argmin(s)) == item.label for s, item in zip(expected, items, strict=True)]
    lengths = [[len(ending) for ending in item.endings] for item in items]
    normalized = [
        int(np.argmin(np.array(s) / n)) == item.label for s, n, item in zip(expected, lengths, items, strict=True)
    ]
    found = hellaswag(model, track, 510, cpu(torch.float64), items, tokens=300)
    assert (found.items, found.plain, found.normalized) == (23, np.mean(plain), np.mean(normalized))


def test_without_the_empty_documents_items_would_reach_each_other(questions, monkeypatch):
    """That the test above can fail: smear and key offset do carry something across a document's start."""
    model, track = model_of("nano")
    settings, losses = track.validation_at(510), []
    for before in (97, 98):
        tokens = np.array([256, before, 256, *b"some words"])
        row = train_gpt.make_row(tokens, np.array([0, 2]), len(tokens), pin=False)
        losses.append(token_losses(model, row, settings)[2:])
    assert not torch.allclose(*losses, rtol=1e-9)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"ctx": "a"}', '{"ctx": "a", "endings": ["b"], "label": 1}', '{"ctx": 1, "endings": ["b"], "label": 0}'],
)
def test_what_is_not_hellaswag_is_refused(tmp_path, text):
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(SpeedrunError, match=r"items\.jsonl"):
        read_hellaswag(str(tmp_path / "items.jsonl"), NANO)
    with pytest.raises(SpeedrunError, match=r"nothing\.jsonl.*`hellaswag`") as refused:
        read_hellaswag(str(tmp_path / "nothing.jsonl"), NANO)
    assert "--" not in str(refused.value), "the option is --data of one command and --eval of another"


def test_the_hub_is_tried_once_and_its_file_kept(tmp_path, monkeypatch):
    """Without a network. Catches: half a minute of the client's retries before the message; a file that is here and
    not taken. Where the client keeps it is written out here."""
    import pyarrow.parquet
    from huggingface_hub import constants

    waits = []
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SpeedrunError, match="cannot be fetched"):
        read_hellaswag("hellaswag", NANO)
    assert not waits
    kept = tmp_path / "datasets--Rowan--hellaswag"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("c" * 40)
    path = kept / "snapshots" / ("c" * 40) / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"ctx": ["a"], "endings": [["b", "c"]], "label": ["1"]}), path)
    (item,) = read_hellaswag("hellaswag", NANO)
    assert (bytes(item.context), [bytes(e) for e in item.endings], item.label) == (b"a", [b" b", b" c"], 1)
    assert not waits


def test_the_command_scores_an_export_on_any_number_of_processes(questions, tmp_path):
    model, track = model_of("nano")
    train_gpt.export(tmp_path / "model", model.float(), track, 510)
    words = ["eval", tmp_path / "model", "--data", questions, "--device", "cpu", "--dtype", "float32"]
    one = run_process([sys.executable, REPO / "train_gpt.py", *words])
    two = torchrun(2, REPO / "train_gpt.py", *words)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert one.stdout.startswith("hellaswag: 23 items, accuracy 0.") and one.stdout.count("\n") == 1
    assert one.stdout.split("(")[0] == two.stdout.split("(")[0]


def test_a_run_scores_its_model_at_the_end(questions, tiny_data, tmp_path):
    """The log has the line, before those of the shards; questions that cannot be read stop the run before it begins."""
    options = Options(data_dir=tiny_data, log_dir=tmp_path, sample_tokens=0, eval=str(questions))
    train_gpt.train(tiny_track(), options, cpu())
    (log,) = tmp_path.glob("*.txt")
    *_, line, _ = (line for line in log.read_text().splitlines() if not line.startswith("data: "))
    assert line.startswith("hellaswag: 23 items, accuracy 0.")
    with pytest.raises(SpeedrunError, match="nothing"):
        train_gpt.train(tiny_track(), replace(options, eval=str(tmp_path / "nothing")), cpu())
    assert len(list(tmp_path.glob("*.txt"))) == 1


# ---- the plan ----


def test_a_plan_counts_what_a_step_on_the_cpu_holds():
    """Weights, optimizer state and gradients to the byte, activations to 10%: planned without data, counted with it."""
    runtime = cpu()
    planned = plan_memory(NANO, runtime)
    model = GPT(NANO.model, runtime)
    params = dict(model.named_parameters())
    optimizer = train_gpt.Optimizer(params, NANO.optimizer, runtime)
    row = make_row(2048, [0, 700], 257)
    with train_gpt.counting() as saved:
        loss, _ = model(row, NANO.at(499), torch.ones(1))
    for p in params.values():
        saved.pop(p.untyped_storage()._cdata, None)
    loss.backward()
    size = lambda tensors: sum(t.nbytes for t in tensors)
    assert planned.weights == size(params.values())
    assert planned.gradients == size(p.grad for p in params.values())
    assert planned.optimizer == size(t for state in optimizer.state.values() for t in state.values())
    assert planned.activations == pytest.approx(sum(saved.values()), rel=0.1)


def test_a_plan_of_several_processes_shares_the_state():
    """bfloat16 weights and gradients on every rank; momentum (4 bytes) and lower halves (2) of the banks shared."""
    one, eight = (plan_memory(SMALL, train_gpt.gpu_runtime(Options(), world, 80)) for world in (1, 8))
    matrices = 75_497_472
    assert one.weights == pytest.approx(2 * 268_665_983, rel=1e-3) and one.gradients == one.weights
    assert one.optimizer > 6 * matrices
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=0.1)  # banks are padded to 8 pieces
    assert eight.activations == one.activations > 0


@pytest.mark.parametrize("name", TRACKS)
def test_the_plan_of_every_track_is_printed_without_a_gpu(name, capsys):
    track, options = parse_command([name, "--plan", "--plan-tokens-per-second", "100000"])
    text = train_gpt.plan(track, options)
    assert text.startswith(f"{name}: ") and "parameters" in text and "80 GB" in text
    tokens = sum(track.at(step).stage.tokens for step in range(track.schedule.total_steps))
    assert f"{tokens:,} tokens" in text and "100,000 tokens/s" in text
    assert ("W = 8" in text) == (track.data.rows_per_step > 1)
    assert "80 GB  W = 1: fits" in text or name == "medium"


def test_xl_fits_80_gb():
    assert train_gpt.fit(XL, Options(), 8, 80) == "fits"


def test_flops_of_a_token_by_hand():
    """GPT-2 of one layer: 6 N + 12 d T, N with the head."""
    model = replace(NANO.model, num_layers=1, paired_layers=(), long_layers=(), num_heads=2, head_dim=8, mlp_ratio=4)
    track = replace(NANO, model=model)
    assert train_gpt.flops_per_token(track, track.at(0)) == 6 * (12 * 256 + 16 * 272) + 12 * 16 * 65


# ---- small siblings ----


def test_a_scaled_track_keeps_its_recipe():
    half = scaled(SMALL, "width=0.5,depth=0.5")
    m = half.model
    assert (m.num_heads, m.head_dim, m.num_layers) == (6, 64, 6), "three heads could not be paired"
    assert half.schedule.attn_scale == pytest.approx(0.2), "scores of heads half as wide are half as large"
    assert half.optimizer.rules.head.lr_mul == (2.0,) and half.optimizer.rules.embed.lr_mul == (2.0,)
    assert half.optimizer.muon_lr == SMALL.optimizer.muon_lr
    before, after = SMALL.optimizer.rules.head, half.optimizer.rules.head
    decay = lambda rule: rule.lr_mul[0] ** 2 * rule.wd_mul
    assert decay(after) == pytest.approx(decay(before))
    assert {layer for layer, _ in m.value_embeds} <= set(range(m.num_layers)) and m.backout_layer < m.num_layers
    assert 0 in m.paired_layers and m.num_layers - 1 in m.long_layers, "the first and the last keep their roles"
    assert scaled(MEDIUM, "width=0.25").model.num_heads == 2 and scaled(MEDIUM, "width=0.25").model.head_dim == 128
    assert scaled(SMALL, "depth=1") == SMALL
    for track in TRACKS.values():
        for text in ("width=0.5", "depth=0.5", "width=2", "width=0.25,depth=0.3"):
            train_gpt.meta_model(scaled(track, text), Runtime(torch.device("meta")))


@pytest.mark.parametrize("text", ["", "width", "width=a", "height=2", "width=0.01", "depth=0", "width=-1", "depth=inf"])
def test_a_scale_that_cannot_be_is_refused(text):
    with pytest.raises(SpeedrunError, match="--scale"):
        scaled(NANO, text)


@pytest.mark.parametrize("words", [["--scale", "width=0.5"], ["--scale=width=0.5"]])
def test_options_change_the_scaled_track(words):
    track, options = parse_command(["nano", *words, "--model.num-layers", "4"])
    assert (track.model.width, track.model.num_layers, options.scale) == (64, 4, "width=0.5")


def test_parameter_counts():
    """As README states them: all, in matrices, in embeddings and head."""
    expected = {
        "nano": (4_595_831, 262_144, 4_333_568),
        "small": (268_665_983, 75_497_472, 193_167_360),
        "medium": (613_420_437, 201_326_592, 412_090_368),
        "xl": (1_849_106_539, 1_462_763_520, 386_334_720),
    }
    readme = (REPO / "README.md").read_text()
    for name, counts in expected.items():
        params = dict(train_gpt.meta_model(TRACKS[name], Runtime(torch.device("meta"))).named_parameters())
        size = lambda *names, params=params: sum(p.numel() for n, p in params.items() if not names or n in names)
        found = size(), size("attn_bank", "mlp_bank"), size("embed", "head", "value_embeds", "embed2")
        assert found == counts, name
        told = ", ".join(f"{count / 1e6:.{2 if name == 'nano' else 0}f}M" for count in counts)
        assert f"| {told} |" in readme, f"{name}: {told}"
