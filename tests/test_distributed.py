"""W = 1, 2, 4, 8 processes under torchrun: one and the same run.

Run as a script (by torchrun), this file is the driver: it trains the tiny track and writes what each rank has.
"""

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import REPO, tiny_options, tiny_track, torchrun, write_tiny_data

from train_gpt import Options, Runtime, Trainer

WORLD_SIZES = (1, 2, 4, 8)


def drive(data_dir: Path, out: Path, dtypes: list[str]) -> None:
    """Train the tiny track to its end in each precision; rank r writes its state to `out`/DTYPE-r.pt."""
    track, runtime = tiny_track(), Runtime.create(Options(device="cpu"))
    for dtype in dtypes:
        trainer = Trainer(track, replace(runtime, dtype=getattr(torch, dtype)), data_dir, seed=1)
        losses, unties, moments = [], [], {}
        for step in range(track.schedule.total_steps):
            losses.append(runtime.sum(trainer.train_step(step).double()).item())
            unties.append(track.at(step).unties)
            if unties[-1]:
                moments = {"untied_" + name: trainer.optimizer.state[name] for name in ("head", "embed")}
                moments = {n: {k: t.clone() for k, t in s.items()} for n, s in moments.items()}
        losses.append(trainer.validate(track.validation_at(track.schedule.total_steps)))
        state = trainer.state()
        optimizer = state["optimizer"] | moments
        saved = {"losses": losses, "weights": state["weights"], "optimizer": optimizer, "loader": trainer.loader.position}
        torch.save(saved, out / f"{dtype}-{runtime.rank}.pt")
    if runtime.world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """driven(W, dtype): what each of W ranks has after the run. Each W is launched once."""

    @cache
    def launch(world_size: int) -> Path:
        out = tmp_path_factory.mktemp(f"world{world_size}")
        data_dir = write_tiny_data(out / "data")
        dtypes = ["float64", "float32"] + (["bfloat16"] if world_size <= 2 else [])
        done = torchrun(world_size, __file__, data_dir, out, *dtypes)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    def results(world_size: int, dtype: str) -> list[dict]:
        out = launch(world_size)
        return [torch.load(out / f"{dtype}-{rank}.pt", weights_only=False) for rank in range(world_size)]

    return results


TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 2e-2}
CASES = [(w, d) for w in WORLD_SIZES[1:] for d in ("float64", "float32")] + [(2, "bfloat16")]


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


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_the_pieces_of_all_ranks_add_up_to_the_state_of_one_process(driven, world_size):
    """Catches: optimizer state kept whole on every rank, pieces in the wrong order, a head's state handed over without
    being cut anew. Includes the state right after the untie step; zero matrices that pad the banks stay zero."""
    alone, ranks = driven(1, "float64")[0], driven(world_size, "float64")
    sharded = 0
    for name, state in alone["optimizer"].items():
        for key, whole in state.items():
            pieces = [rank["optimizer"][name][key] for rank in ranks]
            if pieces[0].numel() == whole.numel() and name.removeprefix("untied_") not in ("attn_bank", "mlp_bank"):
                joined = pieces[0]  # replicated: every rank has it all
                assert all(torch.equal(joined, piece) for piece in pieces)
            else:
                joined = torch.cat(pieces)
                sharded += 1
            check_padded(joined, whole, f"{name}.{key}")
    assert sharded >= 2 * len({"attn_bank", "mlp_bank", "head", "embed", "value_embeds", "untied_head", "untied_embed"})
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


def test_the_command_gives_the_same_log_under_torchrun(tmp_path):
    """Catches: losses of rank 0's rows alone in the log, a log or verdict per rank, a hang at the end. The command is
    the one of run.sh, with warm-up, validations and sample."""
    data_dir, lines = write_tiny_data(tmp_path / "data"), {}
    words = ["--data-dir", data_dir, "--device", "cpu", "--dtype", "float32", "--val-every", "8", "--sample-tokens", "5"]
    for world_size in (1, 2):
        logs = tmp_path / f"logs{world_size}"
        done = torchrun(world_size, REPO / "train_gpt.py", "nano", *tiny_options(), *words, "--log-dir", logs)
        assert done.returncode == 0, done.stderr[-4000:]
        assert len(re.findall("^(reached|missed) ", done.stdout, re.M)) == 1
        assert done.stdout.count("sample:") == 1
        (log,) = logs.glob("*.txt")
        lines[world_size] = re.findall(r"^step:(\d+)/20 (\w+_loss):(\S+)", log.read_text(), re.M)
    assert [line[:2] for line in lines[1]] == [line[:2] for line in lines[2]]
    assert {"val_loss", "train_loss"} == {line[1] for line in lines[1]} and len(lines[1]) >= 6
    for one, two in zip(lines[1], lines[2], strict=True):
        assert float(one[2]) == pytest.approx(float(two[2]), abs=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano", *tiny_options(), "--data-dir", "DATA"], "3 processes cannot share the 8 rows of a step"),
        (["nano", *tiny_options(), "--data-dir", "NOWHERE"], "no shard *_train_*.bin in NOWHERE"),
        (["tiny"], "unknown track 'tiny'"),
    ],
)
def test_an_error_of_the_user_is_said_once_by_rank_0(tmp_path, words, message):
    """Catches: a message per rank, a traceback, a message lost because another rank ended first, a hang, exit code 0."""
    data_dir = write_tiny_data(tmp_path / "data")
    paths = {"DATA": str(data_dir), "NOWHERE": str(tmp_path / "nowhere")}
    words = [paths.get(word, word) for word in words]
    done = torchrun(3, REPO / "train_gpt.py", *words, timeout=120)
    assert done.returncode != 0
    errors = re.findall("^error: .*", done.stderr, re.M)
    assert len(errors) == 1 and message.replace("NOWHERE", paths["NOWHERE"]) in errors[0], done.stderr
    said_by_ranks = done.stderr.split("ChildFailedError")[0]  # what follows is torchrun's own summary
    assert "train_gpt.py\", line" not in said_by_ranks


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
