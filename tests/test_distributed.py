"""W = 2, 4, 8 processes under torchrun, and one without: one and the same run."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, cpu, tiny_options, tiny_track, torchrun
from drive import drive, sparse_gradients

from train_gpt import Options, Track, train

TOLERANCE = {"float64": 1e-10, "float32": 5e-6, "bfloat16": 2e-3}  # measured: 4e-16, 2e-7, 2e-4
BANKS = ("qk_bank", "vo_bank", "mlp_bank")
CASES = [(2, "float64"), (2, "float32"), (2, "bfloat16"), (4, "float64"), (8, "float64")]


def head_not_sharded() -> Track:
    """The tiny track with the head's state whole on every rank, while the embedding's is cut."""
    track = tiny_track()
    rules = replace(track.optimizer.rules, head=replace(track.optimizer.rules.head, sharded=False))
    return replace(track, optimizer=replace(track.optimizer, rules=rules))


def one_row_each(world_size: int) -> Track:
    """A row per rank: the gradient of the n-grams travels as rows of the table. Six steps of two layers and of one
    shape, as it takes long to compile others; the embedding unties after the fourth."""
    stage, data = tiny_track().schedule.stages[1], {"rows_per_step": world_size, "val_tokens": 4 * 96}
    track = tiny_track(stages=(stage,), extension=stage, scheduled_steps=4, extension_steps=2, **data)
    return replace(track, model=replace(track.model, num_layers=2))


@pytest.fixture(scope="module")
def driven(tmp_path_factory, tiny_data):
    """driven(W, run): what each of W ranks has after one of the runs of tests/drive.py. Each W is launched once."""

    @cache
    def launch(world_size: int) -> Path:
        out = tmp_path_factory.mktemp(f"world{world_size}")
        runs = {run: (tiny_track(), getattr(torch, run), False) for w, run in CASES if w == world_size}
        runs["one_row_each"] = (one_row_each(world_size), torch.float64, False)
        if world_size == 2:
            runs["head_not_sharded"] = (head_not_sharded(), torch.float64, False)
            runs["compiled"] = (one_row_each(2), torch.float64, True)
        for name, run in runs.items():
            torch.save(run, out / f"{name}.pt")
        files = [out / f"{name}.pt" for name in runs]
        done = torchrun(world_size, Path(__file__).with_name("drive.py"), tiny_data, out, *files)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    @cache
    def results(world_size: int, run: str) -> list[dict]:
        if world_size == 1:
            return [drive(tiny_track(), cpu(getattr(torch, run)), tiny_data)]
        return [torch.load(launch(world_size) / f"{run}-{rank}.pt", weights_only=False) for rank in range(world_size)]

    return results


@pytest.mark.parametrize(("world_size", "dtype"), CASES)
def test_the_losses_of_20_steps_do_not_depend_on_the_number_of_processes(driven, world_size, dtype):
    """Catches: rows seen twice or not at all, gradients averaged wrongly, a rank that updates the wrong piece or with
    the wrong lr_mul, state that is not resharded at the untie step. The last number is the validation loss."""
    alone = driven(1, dtype)[0]
    for rank in driven(world_size, dtype):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=TOLERANCE[dtype])
        assert rank["loader"] == alone["loader"]
    assert alone["losses"][-2] < 0.9 * alone["losses"][0], "the run must learn, or equal losses prove little"


@pytest.mark.parametrize(("world_size", "dtype"), CASES)
def test_all_ranks_hold_the_same_weights(driven, world_size, dtype):
    """Catches: a missing all-gather, or a replicated parameter whose gradient was not reduced. Bit for bit."""
    first, *others = driven(world_size, dtype)
    for other in others:
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


def test_compiled_ranks_take_the_same_steps(driven, tiny_data):
    """Catches: a sum over the ranks of an embedding's gradient that starts before the gradient is there: the hook runs
    in the backward pass all the same. Compiled, learning rates are float32."""
    alone = drive(one_row_each(2), cpu(torch.float64), tiny_data)
    for rank in driven(2, "compiled"):
        assert rank["touched"] is not None
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-6)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_rows_of_a_table_that_travel_alone_add_up_to_the_sum_of_all(driven, world_size):
    """Catches: a row sent to the wrong owner or lost, the rank's own rows counted twice or dropped, rows of the step
    before, which Adam adds up, not sent, a rank without any rows that waits for ever, rows that are kept for the next
    pair of steps, which has all. Bit for bit: sums of small integers."""
    found = [torch.cat(pieces).view(40, 3) for pieces in zip(*driven(world_size, "exchange"), strict=True)]
    assert len(found) == 3
    for step, total in zip((14, 16, 18), found, strict=True):
        expected = sum(sparse_gradients(world_size, s).sum(0) for s in (step, step + 1))
        assert expected.any() and torch.equal(total.long(), expected), step


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_with_a_row_each_train_as_one_process_with_all_rows(driven, tiny_data, world_size):
    """Catches: touched rows that are not those of the gradient, or of another step than its own."""
    alone = drive(one_row_each(world_size), cpu(torch.float64), tiny_data)
    assert alone["touched"] is None and (alone["prefix"] >= 0).any()
    for rank in driven(world_size, "one_row_each"):
        assert rank["touched"].shape == (world_size, 320)
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=TOLERANCE["float64"])
        for name, whole in alone["weights"].items():
            check_padded(rank["weights"][name], whole, name)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_pieces_of_all_ranks_add_up_to_the_state_of_one_process(driven, world_size):
    """Catches: optimizer state kept whole on every rank, pieces in the wrong order, a head's state handed over without
    being cut anew. Includes the state right after the untie step; zero matrices that pad the banks stay zero."""
    alone, ranks = driven(1, "float64")[0], driven(world_size, "float64")
    sharded = 0
    for name, state in alone["optimizer"].items():
        for key, whole in state.items():
            pieces = [rank["optimizer"][name][key] for rank in ranks]
            if pieces[0].numel() == whole.numel() and name.removeprefix("untied_") not in BANKS:
                joined = pieces[0]  # replicated: every rank has it all
                assert all(torch.equal(joined, piece) for piece in pieces)
            else:
                joined = torch.cat(pieces)
                sharded += 1
            check_padded(joined, whole, f"{name}.{key}")
    tables = {"head", "embed", "value_embeds", "ngram_embed", "untied_head", "untied_embed"}
    assert sharded >= 2 * len({*BANKS, *tables}) - 1, "two of each, of the table under Adagrad one"
    for name, whole in alone["weights"].items():
        check_padded(ranks[0]["weights"][name], whole, name)


def check_padded(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal to rounding, after which `found` may only have zeros."""
    if expected.dim() == 0:
        found, expected = found.view(1), expected.view(1)
    n = expected.shape[0]
    scale = expected.abs().max().item()
    np.testing.assert_allclose(found[:n].numpy(), expected.numpy(), rtol=1e-6, atol=1e-9 * scale, err_msg=name)
    assert (found[n:] == 0).all(), name


def test_a_head_whose_state_is_whole_on_every_rank_is_handed_over_as_well(driven):
    """Catches: that state gathered all the same when the embedding, whose state is cut, takes it over."""
    whole, cut = driven(2, "head_not_sharded"), driven(1, "float64")[0]
    for rank in whole:
        np.testing.assert_allclose(rank["losses"], cut["losses"], rtol=TOLERANCE["float64"])
        assert rank["optimizer"]["head"]["exp_avg"].numel() == cut["optimizer"]["head"]["exp_avg"].numel()
        assert rank["optimizer"]["embed"]["exp_avg"].numel() == cut["optimizer"]["embed"]["exp_avg"].numel() // 2


def test_the_command_under_torchrun_logs_the_run_of_one_process(tmp_path, tiny_data, alone):
    """Catches: losses of rank 0's rows alone in the log, a log or verdict per rank, a hang at the end. The command is
    the one of run.sh, with warm-up, validations and sample."""
    train(tiny_track(val_every=8), Options(data_dir=tiny_data, log_dir=tmp_path / "1", sample_tokens=5), cpu())
    words = ["--device", "cpu", "--dtype", "float32", "--val-every", "8", "--sample-tokens", "5"]
    words += ["--data-dir", tiny_data, "--log-dir", tmp_path / "2"]
    done = torchrun(2, REPO / "train_gpt.py", "nano", *tiny_options(), *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall("^(reached|missed) ", done.stdout, re.M)) == 1
    assert done.stdout.count("sample:") == 1
    lines = {}
    for world_size in (1, 2):
        (log,) = (tmp_path / str(world_size)).glob("*.txt")
        lines[world_size] = re.findall(r"^step:(\d+)/20 (\w+_loss):(\S+)", log.read_text(), re.M)
    assert [line[:2] for line in lines[1]] == [line[:2] for line in lines[2]]
    assert {"val_loss", "train_loss"} == {line[1] for line in lines[1]} and len(lines[1]) >= 6
    for one, two in zip(lines[1], lines[2], strict=True):
        assert float(one[2]) == pytest.approx(float(two[2]), abs=2e-3)


@pytest.mark.parametrize(
    ("world_size", "words", "message"),
    [
        (3, ["nano", *tiny_options()], "3 processes cannot share the 8 rows of a step"),
        (2, ["tiny"], "unknown track 'tiny'"),
    ],
)
def test_an_error_of_the_user_is_said_once_by_rank_0(tiny_data, tmp_path, world_size, words, message):
    """Catches: a message per rank, a traceback, a message lost as another rank ended first, a hang, exit code 0."""
    words = [*words, "--data-dir", tiny_data, "--log-dir", tmp_path, "--device", "cpu"]
    done = torchrun(world_size, REPO / "train_gpt.py", *words, timeout=120)
    assert done.returncode != 0
    errors = re.findall("^error: .*", done.stderr, re.M)
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert 'train_gpt.py", line' not in done.stderr, done.stderr
