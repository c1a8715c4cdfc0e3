"""Wrong inputs: each ends with one message on stderr that names it, no traceback, and nothing written."""

import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    BOS,
    REPO,
    cpu,
    documents,
    tiny_options,
    tiny_track,
    write_shard,
    write_tiny_data,
    write_token_bytes,
)

import train_gpt
from train_gpt import (
    RANGES,
    TRACKS,
    Optimizer,
    OptimizerConfig,
    Options,
    SpeedrunError,
    check_numbers,
    check_ranges,
    flatten,
)

# Options of a tiny run, then what is wrong, and what the message says of it.
NUMBERS = [
    ("--seed -1", "--seed: found -1, expected from 0 to"),
    ("--seed 99999999999999999999", "--seed: found 99999999999999999999"),
    ("--max-steps -1", "--max-steps: found -1, expected at least 0"),
    ("--sample-tokens -5", "--sample-tokens: found -5"),
    ("--loss-chunk 0", "--loss-chunk: found 0, expected at least 1"),
    ("--save-every -2", "--save-every: found -2"),
    ("--save-every 3", "--save-every 3: not even"),
    ("--keep-checkpoints 0", "--keep-checkpoints: found 0"),
    ("--val-every -1", "val-every: found -1"),
    ("--target-loss nan", "--target-loss: found nan, expected a finite number"),
    # the model
    ("--model.num-layers 0", "--model.num-layers: found 0"),
    ("--model.num-heads 3", "num_heads 3 a multiple of qk_heads 2 and of 2"),
    ("--model.num-heads 3 --model.qk-heads 3", "num_heads 3 a multiple of qk_heads 3 and of 2"),
    ("--model.qk-heads 0", "--model.qk-heads: found 0, expected at least 1"),
    ("--model.num-heads -2", "--model.num-heads: found -2"),
    ("--model.head-dim 6", "head_dim 6 a multiple of 4"),
    ("--model.head-dim 0", "--model.head-dim: found 0"),
    ("--model.mlp-ratio 0", "--model.mlp-ratio: found 0"),
    ("--model.mlp-ratio -1", "--model.mlp-ratio: found -1"),
    ("--model.vocab-multiple 0", "--model.vocab-multiple: found 0"),
    ("--model.vocab-multiple -16", "--model.vocab-multiple: found -16"),
    ("--model.vocab-size 0", "--model.vocab-size: found 0"),
    ("--model.vocab-size 100000", "16 bits per token"),
    ("--model.vocab-multiple 999999999", "--model.vocab-multiple: found 999999999"),
    ("--model.sampled-vocab -1", "--model.sampled-vocab: found -1, expected at least 0"),
    ("--model.sampled-vocab 999", "--model.sampled-vocab 999: the head has 272 columns; 0 takes all"),
    ("--model.num-heads 1000000", "out of memory: the model is too large for this machine"),
    ("--model.gate-dim 0", "--model.gate-dim: found 0"),
    ("--model.gate-dim 18", "gate_dim 18: expected an even number up to the width 16"),
    ("--model.gate-dim 11", "gate_dim 11: expected an even number up to the width 16"),
    ("--model.network-width 0", "--model.network-width: found 0"),
    ("--model.without-attention -1", "--model.without-attention: found (-1,)"),
    ("--model.paired-layers -1", "--model.paired-layers: found (-1,)"),
    ("--model.long-layers 1 -3", "--model.long-layers: found (1, -3)"),
    ("--model.dc-layers 0", "dc_layers (0,): heads in pairs cannot be composed"),
    ("--model.dc-window 0", "--model.dc-window: found 0"),
    ("--model.value-layers 0 -1", "--model.value-layers: found (0, -1)"),
    ("--model.value-std -1", "--model.value-std: found -1.0"),
    ("--model.late-input -1", "--model.late-input: found -1"),
    ("--model.second-gates -1", "--model.second-gates: found -1"),
    ("--model.mix-in first outside", "unknown stream 'outside': expected x0, ngram, first, last, outI or valueI"),
    ("--model.mix-out out 0", "unknown stream 'out': expected"),
    ("--model.mix-out first nan", "--model.mix-out: found (('first', nan),), expected a finite number"),
    ("--model.skips 3 1", "must lead to a later layer"),
    ("--model.skips -1 2", "--model.skips: found ((-1, 2),)"),
    ("--model.ngrams 2 0", "--model.ngrams: found (2, 0), expected from 1"),
    ("--model.ngrams 1000000000", "--model.ngrams: found (1000000000,), expected from 1 to 1,024"),
    ("--model.ngram-rows 0", "--model.ngram-rows: found 0"),
    ("--model.ngram-signs -1", "--model.ngram-signs: found -1"),
    ("--model.ngram-std -1", "--model.ngram-std: found -1.0"),
    ("--model.ngram-weight nan", "--model.ngram-weight: found nan, expected a finite number"),
    # the optimizer
    ("--optimizer.muon-lr nan", "--optimizer.muon-lr: found nan, expected a finite number"),
    ("--optimizer.muon-lr inf", "--optimizer.muon-lr: found inf"),
    ("--optimizer.muon-lr -1", "--optimizer.muon-lr: found -1.0, expected at least 0"),
    ("--optimizer.adam-lr nan", "--optimizer.adam-lr: found nan"),
    ("--optimizer.adam-decay -1", "--optimizer.adam-decay: found -1.0"),
    ("--optimizer.muon-beta2 1", "--optimizer.muon-beta2: found 1.0, expected at least 0 and below 1"),
    ("--optimizer.rules.head.betas 1 1", "--optimizer.rules.head.betas: found (1.0, 1.0)"),
    ("--optimizer.rules.head.betas -0.1 0.9", "--optimizer.rules.head.betas: found (-0.1, 0.9)"),
    ("--optimizer.rules.head.eps -1", "--optimizer.rules.head.eps: found -1.0, expected above 0"),
    ("--optimizer.rules.head.eps 0", "--optimizer.rules.head.eps: found 0.0"),
    ("--optimizer.rules.head.wd-mul -1", "--optimizer.rules.head.wd-mul: found -1.0"),
    ("--optimizer.rules.head.lr-mul nan", "--optimizer.rules.head.lr-mul: found (nan,)"),
    ("--optimizer.rules.head.lr-mul", "--optimizer.rules.head.lr-mul (): expected one number"),
    ("--optimizer.rules.qk-bank.lr-mul", "--optimizer.rules.qk-bank.lr-mul (): expected one number"),
    ("--optimizer.rules.pre.lr-mul 1 2", "--optimizer.rules.pre.lr-mul (1.0, 2.0): expected one number"),
    ("--optimizer.rules.head.lr-mul 1 2", "--optimizer.rules.head.lr-mul (1.0, 2.0): expected one number"),
    (
        "--optimizer.rules.mlp-bank.kind adam --optimizer.rules.mlp-bank.lr-mul 1 2",
        "--optimizer.rules.mlp-bank.lr-mul (1.0, 2.0)",
    ),
    ("--optimizer.rules.embed.kind normuon", "--optimizer.rules.embed.kind normuon is for banks of matrices"),
    ("--optimizer.rules.smear-lambda.kind muon", "smear_lambda () is none: use adam"),
    # the data
    ("--data.bos 300", "--data.bos 300: the last token is 256"),
    ("--data.bos -1", "--data.bos: found -1"),
    ("--model.vocab-size 256", "--data.bos 256: the last token is 255"),
    ("--data.rows-per-step 0", "--data.rows-per-step: found 0"),
    ("--data.val-tokens 0", "--data.val-tokens: found 0"),
    ("--data.val-row-tokens 0", "--data.val-row-tokens: found 0"),
    ("--data.val-tokens 99999999", "too few tokens: the val shards"),
    ("--data-dir nothing", "no shard *_train_*.bin in nothing. Make them with `python data/nano.py --out nothing`"),
    ("--data-dir /dev/null", "no shard *_train_*.bin in /dev/null"),
    # the schedule
    ("--schedule.scheduled-steps 0", "--schedule.scheduled-steps: found 0"),
    ("--schedule.scheduled-steps 1000000000000 --max-steps 1000000000000", "too few tokens"),
    ("--schedule.extension-steps -1", "--schedule.extension-steps: found -1"),
    ("--schedule.cooldown -1", "--schedule.cooldown: found -1.0, expected from 0 to 1"),
    ("--schedule.cooldown 1.5", "--schedule.cooldown: found 1.5"),
    ("--schedule.final-lr -1", "--schedule.final-lr: found -1.0"),
    ("--schedule.untie -1", "--schedule.untie: found -1.0"),
    ("--schedule.untie nan", "--schedule.untie: found nan"),
    ("--schedule.attn-scale 0", "--schedule.attn-scale: found 0.0, expected above 0"),
    ("--schedule.attn-scale nan", "--schedule.attn-scale: found nan"),
    ("--schedule.momentum 0.9 1", "--schedule.momentum: found (0.9, 1.0)"),
    ("--schedule.momentum-steps -1 2", "--schedule.momentum-steps: found (-1, 2)"),
    ("--schedule.yarn-max-window -1", "--schedule.yarn-max-window: found -1"),
    ("--schedule.final-long-window 0", "--schedule.final-long-window: found 0"),
    ("--schedule.final-long-window 2", "--schedule.final-long-window 2: shorter than the short window 6"),
    ("--schedule.final-long-window 99999999999", "expected from 1 to 2,147,483,647"),
    ("--schedule.stages.0.windows -1 4", "--schedule.stages.0.windows: found (-1, 4)"),
    ("--schedule.stages.1.windows 20 10", "--schedule.stages.1.windows (20, 10): expected the short one first"),
    ("--schedule.extension.windows 20 10", "--schedule.extension.windows (20, 10): expected the short one first"),
    ("--schedule.stages.0.lr -1", "--schedule.stages.0.lr: found -1.0"),
    ("--schedule.stages.0.max-doc-len 0", "--schedule.stages.0.max-doc-len: found 0"),
    ("--schedule.stages.0.tokens 0", "--schedule.stages.0.tokens: found 0"),
    ("--schedule.stages.0.tokens 101", "--schedule.stages.0.tokens 101: a step cannot be cut into 2 equal rows"),
    ("--schedule.stages.0.tokens 2", "--schedule.stages.0.prediction-weights: 3 tokens ahead in rows of 1."),
    ("--schedule.stages.0.prediction-weights", "--schedule.stages.0.prediction-weights (): the first must be above 0"),
    ("--schedule.stages.0.prediction-weights 0 0 1 1", "the first must be above 0"),
    ("--schedule.stages.0.prediction-weights 1 nan", "--schedule.stages.0.prediction-weights: found ((1.0, nan),)"),
    ("--schedule.stages.0.prediction-weights 1 1 -1 0", "--schedule.stages.0.prediction-weights: found"),
    ("--schedule.stages.0.prefix-weight 0 -1", "--schedule.stages.0.prefix-weight: found (0.0, -1.0)"),
    ("--schedule.stages.0.prefix-weight nan 0", "--schedule.stages.0.prefix-weight: found (nan, 0.0)"),
    # what this machine lacks
    ("--attention FA3", "--attention FA3 needs CUDA"),
    ("--attention FA2", "--attention FA2 needs CUDA"),
    ("--kernels triton", "--kernels triton needs CUDA"),
    ("--fp8 head", "--fp8 head needs a GPU"),
]

# Of what tyro itself finds out: exit code 2.
OPTIONS = [
    ("--seeed 3", "--seed"),  # it suggests the nearest
    ("--optimizer.muon-ls 3", "--optimizer.muon-lr"),
    ("--windows 3 4", "windows"),
    ("--seed", "--seed"),
    ("--seed three", "--seed"),
    ("--seed 1.5", "--seed"),
    ("--data-dir", "--data-dir"),
    ("--device tpu", "--device"),
    ("--dtype float16", "--dtype"),
    ("--optimizer.rules.head.kind sgd", "--optimizer.rules.head.kind"),
    ("--optimizer.rules.head.betas 0.9", "--optimizer.rules.head.betas"),
    ("--optimizer.polar-express-rounds 6", "--optimizer.polar-express-rounds"),
    ("--schedule.stages.0.windows 4", "--schedule.stages.0.windows"),
    ("--schedule.stages.9.tokens 4", "--schedule.stages.9.tokens"),
    ("--model.skips 0", "--model.skips"),
    ("--schedule.stages.0.prefix-weight 1", "--schedule.stages.0.prefix-weight"),
    ("--model.value-embeds 0 0", "--model.value-embeds"),
    ("small", "small"),
]


@pytest.fixture
def refused(alone, monkeypatch, capfd, tmp_path, tiny_data):
    """refused(words, code): what a tiny run with these options, which must be refused, says on stderr."""

    def call(*words: str, code: int = 1, track: str = "nano") -> str:
        common = [*tiny_options(), "--data.rows-per-step", "2", "--data-dir", tiny_data, "--max-steps", "1"]
        common += ["--device", "cpu", "--dtype", "float32", "--no-warmup"]
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", track, *map(str, common), *words])
        monkeypatch.setattr(os, "_exit", sys.exit)
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(SystemExit) as end:
            train_gpt.main()
        shown = capfd.readouterr()
        assert end.value.code == code and "Traceback" not in shown.err and not shown.out, shown
        assert list(Path().iterdir()) == []
        if code == 1:
            assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        return shown.err

    return call


@pytest.mark.parametrize(("words", "said"), NUMBERS)
def test_what_cannot_work_is_refused_in_a_sentence(refused, words, said):
    """Catches: a traceback from deep inside; a number that is taken and ignored, or trains something else; a message
    that blames the data or the learning rate."""
    assert said in refused(*words.split())


@pytest.mark.parametrize(("words", "said"), OPTIONS)
def test_what_is_no_option_or_value_is_refused(refused, words, said):
    """Catches: a misspelt option that is ignored, or refused without its name."""
    assert said in refused(*words.split(), code=2)


@pytest.mark.parametrize(
    ("track", "said"),
    [("smal", "(did you mean small?)"), ("Nano", "(did you mean nano?)"), ("gpt5", "there are: nano, small")],
)
def test_a_misspelt_track_is_told_the_nearest(refused, track, said):
    """Catches: a message that leaves the search to the reader."""
    assert f"unknown track '{track}'" in (message := refused(track=track)) and said in message


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "one"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "x"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
    ],
    ids=lambda environment: " ".join(f"{name}={word}" for name, word in environment.items()),
)
def test_an_environment_that_no_launcher_makes_is_refused(refused, monkeypatch, environment):
    """Catches: a ValueError of int(); a lone process that takes itself for rank 1 and writes no log."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, word in environment.items():
        monkeypatch.setenv(name, word)
    message = refused()
    assert all(f"{name}={word}" in message for name, word in environment.items())


def test_a_port_that_is_taken_is_named(refused, monkeypatch):
    """Catches: a page of torch's traceback where another run holds the port."""
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, word in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(word))
        assert f"localhost:{port}" in refused()


# ---- shards ----


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.bin")


SPOILT = {
    "cut off": (lambda path: rewrite(path, lambda data: data[:-100]), "but its header says"),
    "longer": (lambda path: rewrite(path, lambda data: data + b"\0"), "but its header says"),
    "empty": (lambda path: rewrite(path, lambda data: b""), "first integer an empty file"),
    "a header alone": (lambda path: rewrite(path, lambda data: data[:1024]), "1024 bytes, but its header says"),
    "half a header": (lambda path: rewrite(path, lambda data: data[:500]), "not a token shard"),
    "text": (lambda path: path.write_text("<html>404 Not Found</html>" * 100), "not a token shard"),
    "another magic": (lambda path: write_shard(path, [BOS] * 9, magic=20240801), "20240801, expected 20240520"),
    "another version": (lambda path: write_shard(path, [BOS] * 9, version=2), "shard version 2, expected 1"),
    "a negative count": (lambda path: write_shard(path, [], count=-1), "its header says -1 tokens"),
    "a folder": (replaced_by_a_folder, "cannot be read (Is a directory)"),
    "a dangling link": (replaced_by_a_dangling_link, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_shard_is_named_before_the_run_begins(refused, tmp_path, how, split):
    """Catches: an OSError or IndexError of a file that is no shard, or one that shows only after hours."""
    spoil, said = SPOILT[how]
    path = write_tiny_data(tmp_path / "data") / f"tiny_{split}_000002.bin"
    spoil(path)
    message = refused("--data-dir", str(tmp_path / "data"))
    assert f"{path}: " in message and said in message


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ((), "no shard *_train_*.bin"),
        (("val",), "no shard *_train_*.bin"),
        (("train",), "no shard *_val_*.bin"),
    ],
)
def test_a_folder_without_shards_is_named(refused, tmp_path, splits, said):
    """Catches: an empty or half-copied folder that ends as an IndexError."""
    (tmp_path / "data").mkdir()
    for split in splits:
        write_shard(tmp_path / "data" / f"x_{split}_000001.bin", documents([50] * 40))
    folder = tmp_path / "data"
    expected = f"{said} in {folder}. Make them with `python data/nano.py --out {folder}`"
    assert expected in refused("--data-dir", str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), " is missing: prefixes of tokens are predicted"),
        (replaced_by_a_folder, ": cannot be read (Is a directory)"),
        (lambda path: rewrite(path, lambda data: b""), ": not a token shard (first integer an empty file"),
        (lambda path: rewrite(path, lambda data: data[:-1]), " bytes, but its header says "),
        (lambda path: write_shard(path, [1] * 101), ": not the bytes of 257 tokens"),
        (lambda path: write_shard(path, [1] * 257 + [65] * 256), ": not the bytes of 257 tokens"),
        (lambda path: write_token_bytes(path.parent, 256), ": not the bytes of 257 tokens"),
        (lambda path: write_token_bytes(path.parent, 50_257, 50_256), ": not the bytes of 257 tokens"),
    ],
)
def test_bytes_of_tokens_that_are_missing_or_of_others_are_refused(refused, tmp_path, change, said):
    """Catches: prefixes of another vocabulary learnt in silence, a loss left out because its file is not there."""
    path = write_tiny_data(tmp_path / "data") / "tokens.bin"
    change(path)
    message = refused("--data-dir", str(tmp_path / "data"))
    assert str(path) in message and said in message
    assert "or train with --no-prefix-loss" in message or "Delete it and fetch it again" in message or "cannot" in said


# ---- checkpoints ----


def test_a_checkpoint_that_is_not_there_says_where_some_are(refused, tmp_path):
    """Catches: "rank_0 is missing" of a folder that does not exist, or that holds whole runs."""
    runs = [tmp_path / "runs" / f"202611{day}-120000-nano-ab" for day in (10, 11, 12, 13)]
    for run in runs:
        (run / "step_000002").mkdir(parents=True)
    newest = ", ".join(map(str, runs[:0:-1]))
    gone = refused("--resume", "nothing", "--checkpoint-dir", str(tmp_path / "runs"))
    assert f"--resume nothing: no such folder. Name a run, such as {newest}.\n" in gone
    above = refused("--resume", str(tmp_path / "runs"))
    assert f"--resume {tmp_path / 'runs'}: no checkpoint in this folder. Name a run, such as {newest}.\n" in above


def test_a_checkpoint_where_there_is_none_at_all(refused):
    """Catches: an empty list of suggestions."""
    assert "There is no run to go on with." in refused("--resume", "checkpoints")


# ---- what the command line cannot reach ----


def test_a_parameter_without_a_rule_is_named():
    """Catches: AttributeError: 'Rules' object has no attribute, for whoever adds a parameter to the model."""
    params = {"new_gate": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(SpeedrunError, match="the parameter new_gate has no rule: add a line for it to the class Rules"):
        Optimizer(params, OptimizerConfig(), cpu())


def test_sizes_that_fp8_cannot_take_are_refused(tiny_data):
    """Catches: torch._scaled_mm's traceback in the first step: both its operands take multiples of 16 along the
    dimension that is summed, and the second one along both. That is the row in the head's gradient."""
    fp8, track = replace(cpu(), fp8=("head",)), tiny_track(rows_per_step=2)
    stages = tuple(replace(stage, tokens=2 * 48) for stage in track.schedule.stages)
    fitting = replace(track, schedule=replace(track.schedule, stages=stages, extension=stages[0]))
    check_numbers(fitting, Options(), fp8)
    odd = replace(fitting.schedule, extension=replace(stages[0], tokens=2 * 40))
    for wrong, said in (
        (
            replace(fitting, schedule=odd),
            r"--schedule\.extension\.tokens 80 are rows of 40: FP8 takes multiples of 16",
        ),
        (replace(fitting, model=replace(track.model, head_dim=4)), "the width of the model is 8: FP8"),
        (replace(fitting, model=replace(track.model, vocab_multiple=8)), "makes 264 of the vocabulary: FP8"),
    ):
        check_numbers(wrong, Options(), cpu())
        with pytest.raises(SpeedrunError, match=said):
            check_numbers(wrong, Options(), fp8)


@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_processes_that_cannot_share_the_rows_are_refused(tiny_data, world_size):
    """Catches: rows that nobody trains on."""
    with pytest.raises(
        SpeedrunError,
        match=f"{world_size} processes cannot share the 8 rows of a step: change NPROC or --data.rows-per-step",
    ):
        check_numbers(tiny_track(), Options(), cpu(world_size=world_size))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1])
def test_no_number_of_a_track_or_run_may_be_nan_infinite_or_negative(wrong):
    """Catches: a field added later that takes what trains on NaN or in reverse. Weights of a stream may be
    negative."""
    spoil = lambda value: (*value[:-1], spoil(value[-1])) if type(value) is tuple else wrong
    options = Options(max_steps=1, loss_chunk=16)
    values = {key: value for track in TRACKS.values() for key, value in flatten(track).items()} | flatten(options)
    numbers = {key: value for key, value in values.items() if type(value) in (int, float, tuple) and value != ()}
    del numbers["model.mix_in"]  # names of streams alone
    assert len(numbers) > 100
    for key, value in numbers.items():
        if wrong == -1 and key in ("model.ngram_weight", "model.mix_out"):
            continue
        with pytest.raises(SpeedrunError, match=f"--{key.replace('_', '-')}: found"):
            check_ranges({key: spoil(value)})
    check_ranges(values)


def test_the_ranges_are_of_fields_that_exist():
    """Catches: a field that was renamed, and lost its range."""
    kinds = [kind for kind in vars(train_gpt).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert {field for words, *_ in RANGES for field in words.split()} <= fields


# ---- as processes ----


def shell(command: str, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "REPO": str(REPO)} | env
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=600)


def test_a_reader_that_has_seen_enough_ends_the_help_quietly():
    """Catches: a traceback of BrokenPipeError after `--help | head`, or Python's own complaint at its end."""
    done = shell('"$PYTHON" "$REPO/train_gpt.py" nano --help | true; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stderr) == (141, "")


def test_run_sh_shows_what_train_gpt_refuses(tmp_path):
    """Catches: a message lost between train_gpt.py, torchrun and run.sh. Three processes cannot share one row."""
    write_tiny_data(tmp_path / "data")
    command = f'"$REPO/run.sh" nano --device cpu --data-dir {tmp_path / "data"} --log-dir {tmp_path / "logs"}'
    done = shell(command, NPROC="3")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 3 processes cannot share the 2 rows of a step")
    assert not (tmp_path / "logs").exists()
