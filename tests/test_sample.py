"""Text from a model: the decoder, the draw, weights out and in, the commands' models."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOS, REPO, cpu, run_process, tiny_track
from scipy import stats
from test_model import error, random_model, step_settings

import train_gpt
from sample import Decoder, generate, look_back, sample
from shared import Text, load_model, rebuild
from train_gpt import TRACKS, CheckpointError, ModelConfig, Options, Row, text_sample, train

# The layouts of the tracks, narrow, and one with what they leave out: a paired layer with the key offset, a token's own
# n-gram beside longer ones.
NARROW = {"num_heads": 4, "head_dim": 8, "vocab_size": 300, "ngram_rows": 389, "dc_window": 9}
LAYOUTS = {name: replace(track.model, **NARROW) for name, track in TRACKS.items()}
LAYOUTS["medley"] = replace(LAYOUTS["small"], long_layers=(0, 3, 10), ngrams=(1, 4), ngram_norm=True)


def document(num_tokens: int, config: ModelConfig) -> Row:
    """A row of random tokens that are one document."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, num_tokens + 1)
    return train_gpt.make_row(tokens, np.array([0]), num_tokens, config)


@pytest.mark.parametrize("pieces", [[1] * 67, [67], [5, 1, 1, 30, 2, 28]])
@pytest.mark.parametrize("windows", [(5, 11), (70, 90)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_decoder_gives_the_logits_of_the_whole_text(name, windows, pieces):
    """In float64, token by token and in pieces. Catches: a window off by one, that of composed heads as well, positions
    that start anew, paired heads that see themselves, too few tokens read again, n-grams that end where a piece does,
    keys of those read again that replace the better ones from before."""
    config = LAYOUTS[name]
    model, at = random_model(config), step_settings(windows, config.head_dim)
    row, decode = document(67, config), Decoder(model, at)
    found = torch.cat([decode(tokens.tolist()) for tokens in row.inputs.split(pieces)])
    assert error(found, model.logits(row, at)[:, : config.vocab_size]) < 1e-11
    assert found.size(1) == config.vocab_size < config.padded_vocab, "no token of the padding may be drawn"


@pytest.mark.parametrize("change", [{"smear": False}, {"key_offset": False}, {"ngrams": ()}, {"ngrams": (2,)}])
def test_a_decoder_reads_from_the_layout_how_far_its_parts_look_back(change):
    """That the test above can fail: one token less is too few, with and without each part that looks back."""
    config = replace(LAYOUTS["medley"], **change)
    model, at, row = random_model(config), step_settings((5, 11), config.head_dim), document(20, config)
    expected = model.logits(row, at)[:, :300]
    for less in (0, 1):
        decode = Decoder(model, at)
        assert decode.look_back == look_back(config) > 0
        decode.look_back -= less
        found = torch.cat([decode([token]) for token in row.inputs.tolist()])
        assert (error(found, expected) < 1e-11) == (not less)


def test_what_a_decoder_keeps_stays_as_small_as_the_windows():
    """The cost of a token must not grow with the text: nothing that is kept does, composed heads' keys (the last)
    least of all."""
    config = LAYOUTS["medley"]
    decode, sizes = Decoder(random_model(config), step_settings((5, 11), config.head_dim)), []
    for _ in range(6):
        decode(document(50, config).inputs.tolist())
        sizes.append([len(keys) for keys, _ in decode.kept.values()])
    assert sizes[0] == sizes[-1] and max(sizes[0]) <= 11 + 2 * decode.look_back
    assert len(sizes[0]) == 11 and sizes[0][-1] == 8 + decode.look_back


def always(logits: torch.Tensor):
    """A decoder that predicts the same whatever it reads."""
    return lambda tokens: logits.expand(len(tokens), -1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_k):
    """Chi-square test of 5,000 draws. Catches: temperature upside down, one token too many in top_k."""
    logits = torch.tensor([-60.0, 0.3, 1.2, -0.5, 2.0, 0.0])  # the first is BOS, which would end the text
    drawn = list(generate(always(logits), [0], 5000, 1, temperature, top_k))
    kept = logits.topk(top_k).indices.tolist() if top_k else [1, 2, 3, 4, 5]
    assert set(drawn) == set(kept)
    expected = 5000 * (logits[kept].double() / temperature).softmax(-1)
    assert stats.chisquare([drawn.count(token) for token in kept], expected.numpy()).pvalue > 1e-3


def test_temperature_0_takes_the_likeliest_bos_ends_the_text_and_a_seed_gives_the_same_one():
    assert list(generate(always(torch.tensor([0.0, 2.0, 1.0])), [0], 4, temperature=0)) == [1] * 4
    assert list(generate(always(torch.tensor([5.0, 2.0, 1.0])), [0], 4, temperature=0)) == []
    first, again, other = (list(generate(always(torch.zeros(999)), [0], 30, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_sample_of_a_run_is_what_the_decoder_draws():
    """Catches: a sample that reads the logits of another place, or sees what comes after its place in the row."""
    track = tiny_track()
    model, before = random_model(track.model), torch.get_rng_state()
    tokens = list(generate(Decoder(model, track.validation_at(20)), [BOS], 60, seed=4))
    assert text_sample(model, track, 20, 60, seed=4) == bytes(tokens).decode(errors="replace") and len(tokens) > 5
    assert torch.equal(torch.get_rng_state(), before)


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
    exported, saved = (load_model(path, cpu()) for path in (trained / "export", *(trained / "checkpoints").iterdir()))
    assert exported.track == saved.track == tiny_track() and exported.step == saved.step == 20
    row = document(40, exported.track.model)
    logits = [model.logits(row, exported.settings) for model in (exported.model, saved.model)]
    assert torch.equal(*logits)
    padded = train_gpt.GPT(exported.track.model, cpu(world_size=8))
    sizes = lambda model: [len(p) for name, p in model.named_parameters() if "bank" in name]
    assert sizes(padded) != sizes(exported.model), "the test needs a bank that was padded"


def test_every_track_survives_its_settings():
    """Catches: a type of field that `rebuild` does not know: nested tuples, of names as well, no layer, stages."""
    for track in TRACKS.values():
        assert rebuild(train_gpt.Track, json.loads(json.dumps(train_gpt.flatten(track)))) == track


DAMAGES = {
    "empty": lambda folder, values: [path.unlink() for path in folder.iterdir()],
    "no JSON": lambda folder, values: (folder / "config.json").write_text("{"),
    "no track": lambda folder, values: (folder / "config.json").write_text("{}"),
    "a type": lambda folder, values: (folder / "config.json").write_text(json.dumps(values | {"model.num_heads": "2"})),
    "a shape": lambda folder, values: (folder / "config.json").write_text(json.dumps(values | {"model.head_dim": 12})),
    "cut weights": lambda folder, values: os.truncate(folder / "model.safetensors", 5000),
    "no folder": lambda folder, values: shutil.rmtree(folder),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_model_is_refused_in_a_sentence(trained, tmp_path, damage):
    folder = shutil.copytree(trained / "export", tmp_path / "export")
    DAMAGES[damage](folder, json.loads((folder / "config.json").read_text()))
    with pytest.raises(CheckpointError):
        load_model(folder, cpu())


def test_the_command_prints_the_prompt_and_what_follows(trained, tmp_path):
    words = ["--prompt", "ab", "--tokens", "30", "--device", "cpu", "--temperature", "1.5", "--top-k", "40"]
    done = run_process([sys.executable, REPO / "evals" / "sample.py", trained / "export", *words])
    assert done.returncode == 0 and done.stdout.startswith("ab"), done.stderr
    assert re.fullmatch(r"\n\d+ tokens, \d+ tokens/s\n", done.stderr)
    done = run_process([sys.executable, REPO / "evals" / "sample.py", tmp_path / "nothing"])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'nothing'}: no such folder" in done.stderr


@pytest.mark.parametrize("wrong", ["--temperature=-1.0", "--temperature=nan", "--tokens=-1", "--top-k=0", "--seed=x"])
def test_options_that_cannot_work_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        sample(["x", wrong])
    name, value = wrong.split("=")
    assert f"argument {name}: found {value}, expected at least" in capsys.readouterr().err
