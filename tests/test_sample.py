"""Text from a model: the cache, the draw, weights out and in, the command."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, cpu, run_process, tiny_track
from scipy import stats
from test_model import CONFIGS, error, make_row, random_model, step_settings

import train_gpt
from train_gpt import Cache, CheckpointError, Options, SpeedrunError, Text, generate, load_model, train


@pytest.mark.parametrize("pieces", [[1] * 67, [67], [5, 1, 1, 30, 2, 28]])
@pytest.mark.parametrize("windows", [(5, 11), (70, 90)])
@pytest.mark.parametrize("name", ["nano", "medley"])
def test_a_cache_gives_the_logits_of_the_whole_text(name, windows, pieces):
    """In float64, token by token and in pieces. Catches: a window off by one, positions that start anew, paired heads
    that see themselves, a smear or key offset that forgets the token before the piece."""
    config = CONFIGS[name]
    model, at = random_model(config), step_settings(windows, config.head_dim)
    row, cache = make_row(67, [0], config.vocab_size), Cache()
    found = torch.cat([model.decode(tokens, at, cache) for tokens in row.inputs.split(pieces)])
    assert cache.length == 67
    assert error(found, model.logits(row, at)) < 1e-11


def test_the_cache_stays_as_small_as_the_windows():
    """The cost of a token must not grow with the text: nothing in the cache does."""
    config = CONFIGS["medley"]
    model, at, cache = random_model(config), step_settings((5, 11), config.head_dim), Cache()
    sizes = []
    for _ in range(6):
        model.decode(make_row(50, [0], config.vocab_size).inputs, at, cache)
        sizes.append({layer: len(keys) for layer, (keys, _) in cache._keys.items()})
    assert sizes[0] == sizes[-1] and set(sizes[0].values()) == {5, 11}


def fixed_model(logits: torch.Tensor) -> SimpleNamespace:
    """Predicts the same whatever it reads; its vocabulary is padded by 2."""
    padded = torch.cat((logits, torch.full((2,), 99.0)))
    config = SimpleNamespace(vocab_size=len(logits))
    return SimpleNamespace(embed=logits, config=config, decode=lambda tokens, *_: padded.expand(len(tokens), -1))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_k):
    """Chi-square test of 5,000 draws. Catches: temperature upside down, one token too many in top_k, padding drawn."""
    logits = torch.tensor([-60.0, 0.3, 1.2, -0.5, 2.0, 0.0])  # the first is BOS, which would end the text
    drawn = list(generate(fixed_model(logits), None, [0], 5000, 1, temperature, top_k))
    kept = logits.topk(top_k).indices.tolist() if top_k else [1, 2, 3, 4, 5]
    assert set(drawn) == set(kept)
    expected = 5000 * (logits[kept].double() / temperature).softmax(-1)
    assert stats.chisquare([drawn.count(token) for token in kept], expected.numpy()).pvalue > 1e-3


def test_temperature_0_takes_the_likeliest_and_bos_ends_the_text():
    assert list(generate(fixed_model(torch.tensor([0.0, 2.0, 1.0])), None, [0], 4, temperature=0)) == [1] * 4
    assert list(generate(fixed_model(torch.tensor([5.0, 2.0, 1.0])), None, [0], 4, temperature=0)) == []


def test_the_draw_is_of_its_seed_and_leaves_the_runs_generator_alone():
    logits, before = torch.zeros(30), torch.get_rng_state()
    logits[0] = -99
    first, again, other = (list(generate(fixed_model(logits), None, [0], 30, seed)) for seed in (1, 1, 2))
    assert first == again != other and torch.equal(torch.get_rng_state(), before)


def test_bytes_become_text():
    """Catches: a character of several bytes torn apart, a broken one that raises."""
    text = Text(257)
    assert text.encode("hiä") == [104, 105, 195, 164]
    assert list(text.stream([104, 195, 164])) == ["h", "", "ä", ""]
    assert "".join(text.stream([255, 195])) == "��"


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> Path:
    """A finished run of the tiny track: checkpoints/ and export/."""
    out = tmp_path_factory.mktemp("trained")
    options = Options(data_dir=tiny_data, log_dir=out / "logs", checkpoint_dir=out / "checkpoints", sample_tokens=0)
    train(tiny_track(), replace(options, save_final=True, export=out / "export"), cpu())
    return out


def test_export_and_checkpoint_give_the_model_back(trained):
    """Catches: padding of the banks exported, a field of the track lost, weights under another name."""
    exported, from_export, step = load_model(trained / "export", cpu())
    saved, from_checkpoint, _ = load_model(next((trained / "checkpoints").iterdir()), cpu())
    assert from_export == from_checkpoint == tiny_track() and step == 20
    row, at = make_row(40, [0], 257), from_export.validation_at(20)
    assert torch.equal(exported.logits(row, at), saved.logits(row, at))
    padded = train_gpt.GPT(from_export.model, cpu(world_size=8))
    assert len(padded.attn_bank) > len(exported.attn_bank) or len(padded.mlp_bank) > len(exported.mlp_bank)


def test_every_track_survives_its_settings():
    """Catches: a type of field that `rebuild` does not know, such as nested tuples or a tuple of stages."""
    for track in train_gpt.TRACKS.values():
        assert train_gpt.rebuild(train_gpt.Track, json.loads(json.dumps(train_gpt.flatten(track)))) == track


@pytest.mark.parametrize(
    "damage", ["no folder", "empty", "no JSON", "no track", "wrong type", "cut weights", "a shape"]
)
def test_what_is_no_model_is_refused_in_a_sentence(trained, tmp_path, damage):
    folder = tmp_path / "export"
    if damage != "no folder":
        shutil.copytree(trained / "export", folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads((trained / "export" / "config.json").read_text())
    match damage:
        case "empty":
            config.unlink()
            weights.unlink()
        case "no JSON":
            config.write_text("{")
        case "no track":
            config.write_text("{}")
        case "wrong type":
            config.write_text(json.dumps(values | {"model.num_heads": "2"}))
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-9])
        case "a shape":
            config.write_text(json.dumps(values | {"model.head_dim": 12}))
    with pytest.raises(CheckpointError):
        load_model(folder, cpu())


def test_the_command_prints_the_prompt_and_what_follows(trained, tmp_path):
    words = ["--prompt", "ab", "--tokens", "30", "--device", "cpu", "--temperature", "1.5", "--top-k", "40"]
    done = run_process([sys.executable, REPO / "train_gpt.py", "sample", trained / "export", *words])
    assert done.returncode == 0 and done.stdout.startswith("ab"), done.stderr
    assert re.fullmatch(r"\n\d+ tokens, \d+ tokens/s\n", done.stderr)
    done = run_process([sys.executable, REPO / "train_gpt.py", "sample", tmp_path / "nothing"])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert str(tmp_path / "nothing") in done.stderr


@pytest.mark.parametrize("wrong", ["--temperature=-1.0", "--tokens=-1", "--top-k=0"])
def test_options_that_cannot_work_are_refused(wrong):
    with pytest.raises(SpeedrunError, match="at least"):
        train_gpt.sample(["x", wrong])
