"""Checkpoints: a run that was killed, stopped or resumed with other ranks ends as if nothing had happened."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    LAUNCHER_VARIABLES,
    REPO,
    cpu,
    mutated,
    text_like,
    tiny_options,
    tiny_track,
    torchrun,
    write_shard,
    write_token_bytes,
)

import train_gpt
from train_gpt import Checkpoint, CheckpointError, Options, Progress, SpeedrunError, Trainer, train

TIMES = re.compile(r"train_time:\S+ step_avg:\S+|peak memory.*")


def words(data_dir: Path, out: Path, *more: object) -> list[str]:
    """A run of the tiny track, in two rows per step, that saves every second step and goes on where it stopped."""
    options = ["--data-dir", data_dir, "--log-dir", out / "logs", "--checkpoint-dir", out / "checkpoints"]
    options += ["--data.rows-per-step", "2"]
    options += ["--device", "cpu", "--dtype", "float32", "--sample-tokens", "0", "--val-every", "8"]
    options += ["--save-every", "2", "--save-final", "--resume", "auto"]
    return [*tiny_options(), *map(str, options), *map(str, more)]


def run(data_dir: Path, out: Path, *more: object, dtype: torch.dtype = torch.float32) -> None:
    """The command in this process."""
    track, options = train_gpt.parse_command(["nano", *words(data_dir, out, *more)])
    train(track, options, cpu(dtype))


def start(data_dir: Path, out: Path, *more: object) -> subprocess.Popen:
    """The command in a process of its own, on one thread."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, REPO / "train_gpt.py", "nano", *words(data_dir, out, *more)]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def final(out: Path, step: int = 20) -> dict[str, torch.Tensor]:
    """The tensors of the newest run's checkpoint after `step` steps."""
    folder = sorted((out / "checkpoints").iterdir())[-1]
    return dict(Checkpoint(folder / f"step_{step:06}").tensors())


def lines(out: Path) -> list[str]:
    """The events of the newest run's log without its times, and without what says that it was resumed."""
    path = sorted((out / "logs").glob("*.txt"))[-1]
    body = path.read_text().split("\n" + "=" * 100 + "\n")[-1]
    return [TIMES.sub("", line) for line in body.splitlines() if not line.startswith("resumed at")]


def metrics(out: Path) -> list[dict]:
    """The objects of the newest run's .jsonl, without its times."""
    path = sorted((out / "logs").glob("*.jsonl"))[-1]
    return [json.loads(line) | {"train_time": 0} for line in path.read_text().splitlines()]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit, but for the random generator, which nothing in training uses."""
    assert a.keys() == b.keys()
    for name in a.keys() - {"rng"}:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory) -> Path:
    """A run without interruption, which keeps all its checkpoints."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(tiny_data, out, "--keep-checkpoints", "99")
    return out


def until_step(out: Path, undisturbed: Path, step: int) -> None:
    """What a run leaves that was killed after its checkpoint of `step`: later lines in the log, torn files."""
    shutil.copytree(undisturbed, out, dirs_exist_ok=True)
    (folder,) = (out / "checkpoints").iterdir()
    (folder / "finished").unlink()
    for later in folder.glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)


@pytest.mark.parametrize("step", [2, 8, 12, 14, 18])
def test_a_resumed_run_ends_bit_for_bit_as_the_undisturbed_one(tiny_data, undisturbed, tmp_path, step):
    """At a validation (8), at a new stage (12, 18), after untying at step 13 (14). Catches: state that is not saved."""
    until_step(tmp_path, undisturbed, step)
    run(tiny_data, tmp_path)
    assert_equal(final(tmp_path), final(undisturbed))
    assert lines(tmp_path) == lines(undisturbed)
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert len(re.findall(rf"^resumed at step {step} from ", log.read_text(), re.M)) == 1
    assert metrics(tmp_path) == metrics(undisturbed)


def test_a_resumed_run_says_once_that_the_target_is_reached(tiny_data, tmp_path):
    """Before and after a checkpoint. Catches: the line of the later part, as if the target had been met only there."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(tiny_data, whole, "--keep-checkpoints", "99", "--target-loss", "99")
    until_step(cut, whole, 10)
    run(tiny_data, cut, "--target-loss", "99")
    log = next((cut / "logs").glob("*.txt")).read_text()
    assert re.findall(r"^target 99.0 reached: .* (at step .*)$", log, re.M) == ["at step 0"]
    assert "resumed at step 10" in log


def test_both_halves_of_bfloat16_weights_are_kept(tiny_data, tmp_path):
    """Catches: a checkpoint without the low halves of the float32 masters."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(tiny_data, whole, "--keep-checkpoints", "99", dtype=torch.bfloat16)
    until_step(cut, whole, 8)
    run(tiny_data, cut, dtype=torch.bfloat16)
    assert_equal(final(cut), final(whole))
    assert final(whole)["optimizer.head.low"].dtype == torch.int16


def test_the_clock_adds_up(tiny_data, undisturbed, tmp_path):
    """Catches: a clock that starts anew, or that counts the time before the checkpoint twice."""
    until_step(tmp_path, undisturbed, 10)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    saved = Checkpoint(folder / "step_000010").progress.seconds
    run(tiny_data, tmp_path)
    text = next((tmp_path / "logs").glob("*.txt")).read_text().split("=" * 100)[-1]
    times = [int(ms) for ms in re.findall(r"^step:\d+/20 .*?train_time:(\d+)ms", text, re.M)]
    assert times == sorted(times)
    after = int(re.search(r"^step:11/20 train_time:(\d+)ms", text, re.M)[1])
    assert after >= 1000 * saved > 0


def test_only_the_newest_checkpoints_stay_and_a_finished_run_is_not_resumed(tiny_data, tmp_path, capsys):
    """Catches: a new run in silence, where the user thinks that the old one goes on."""
    run(tiny_data, tmp_path)
    said = re.findall("^nothing to resume: .*", capsys.readouterr().out, re.M)
    assert said == [f"nothing to resume: no run of nano in {tmp_path / 'checkpoints'}. A new run begins."]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["finished", "step_000018", "step_000020"]
    assert not list(folder.rglob("*.part"))
    run(tiny_data, tmp_path, "--max-steps", "2")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "auto began a new run"
    said = re.findall("^nothing to resume: .*", capsys.readouterr().out, re.M)
    assert said == [f"nothing to resume: the newest run, {folder}, is finished. A new run begins."]
    with pytest.raises(SpeedrunError, match="nothing is left to do"):
        run(tiny_data, tmp_path, "--resume", folder)


def test_a_run_cut_by_max_steps_goes_on(tiny_data, undisturbed, tmp_path):
    """Catches: a part of a run that counts as finished, so that `auto` begins anew at step 0."""
    for _ in range(2):  # the second time there is nothing to train: the validation alone is done again
        run(tiny_data, tmp_path, "--max-steps", "8")
        assert "incomplete run: stopped after 8 of 20 steps by --max-steps" in lines(tmp_path)
    run(tiny_data, tmp_path)
    assert "resumed at step 8 " in next((tmp_path / "logs").glob("*.txt")).read_text()
    assert_equal(final(tmp_path), final(undisturbed))
    assert lines(tmp_path) == lines(undisturbed) and metrics(tmp_path) == metrics(undisturbed)


def test_an_odd_step_is_not_resumed(tiny_data, undisturbed, tmp_path, capsys):
    """Catches: a run that goes on without the gradients that Adam has yet to use, to another end."""
    run(tiny_data, tmp_path, "--max-steps", "7", "--save-every", "0")
    (folder,) = (tmp_path / "checkpoints").iterdir()
    with pytest.raises(CheckpointError, match="step_000007: an odd number of steps"):
        run(tiny_data, tmp_path, "--resume", folder)
    capsys.readouterr()
    run(tiny_data, tmp_path)
    shown = capsys.readouterr()
    assert "passed over" in shown.err and f"the newest run, {folder}, has no good checkpoint. A new run" in shown.out
    assert_equal(final(tmp_path), final(undisturbed))


def test_names_of_runs_are_in_the_order_of_time():
    """Catches: `auto` that takes the older of two runs which began in the same second."""
    names = [train_gpt.new_run_id("nano", cpu()) for _ in range(100)]
    assert names == sorted(set(names))


def test_a_run_killed_in_its_last_validation_goes_on_there(tiny_data, undisturbed, tmp_path):
    """Catches: "nothing is left to do" for a run whose result nobody has seen."""
    until_step(tmp_path, undisturbed, 20)
    path = next((tmp_path / "logs").glob("*.txt"))
    path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"step:20/20 val_loss")])
    run(tiny_data, tmp_path)
    assert lines(tmp_path) == lines(undisturbed) and metrics(tmp_path) == metrics(undisturbed)
    assert list((tmp_path / "checkpoints").glob("*/finished"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "1"], "seed was 0, is 1"),
        (["--optimizer.muon-lr", "0.5"], "optimizer.muon_lr was 0.028, is 0.5"),
        (["--schedule.stages.2.max-doc-len", "9"], "schedule.stages.2.max_doc_len was"),
    ],
)
def test_another_track_or_seed_is_refused_unless_forced(tiny_data, undisturbed, tmp_path, change, said):
    until_step(tmp_path, undisturbed, 10)
    with pytest.raises(SpeedrunError, match=re.escape(said)):
        run(tiny_data, tmp_path, *change)
    run(tiny_data, tmp_path, *change, "--force")
    assert f"with --force: {said}" in next((tmp_path / "logs").glob("*.txt")).read_text()


@pytest.mark.parametrize("change", [["--model.num-layers", "6"], ["--model.head-dim", "32"]])
def test_a_model_of_another_size_is_refused_even_if_forced(tiny_data, undisturbed, tmp_path, change):
    until_step(tmp_path, undisturbed, 10)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        run(tiny_data, tmp_path, *change, "--force")


def test_other_data_are_refused_and_a_log_says_which_were_read(tiny_data, undisturbed, tmp_path):
    """Catches: a run that goes on with other bytes without a word; a log that does not say what was read. Of the
    shards that were not opened yet, any may come."""
    read = [line for line in lines(undisturbed) if line.startswith("data: ")]
    paths = sorted(tiny_data.glob("*.bin"))
    tokens = {path.name: (path.stat().st_size - 1024) // 2 for path in paths}
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert read == [f"data: {name} {tokens[name]} tokens sha256 {hashes[name]}" for name in hashes]
    until_step(tmp_path, undisturbed, 8)
    other = shutil.copytree(tiny_data, tmp_path / "other")
    write_shard(other / "tiny_train_000001.bin", text_like(6000, seed=3))
    with pytest.raises(
        SpeedrunError, match=r"of another run: the data has changed: \S*tiny_train_000001\.bin was 6000"
    ):
        run(other, tmp_path)
    (other / "tiny_train_000001.bin").unlink()
    with pytest.raises(SpeedrunError, match=r"tiny_train_000001\.bin was 6000 tokens sha256 \w+, is missing"):
        run(other, tmp_path)
    run(tiny_data, tmp_path)
    assert [line for line in lines(tmp_path) if line.startswith("data: ")] == read


def test_another_source_is_refused(tiny_data, undisturbed, tmp_path, monkeypatch):
    until_step(tmp_path, undisturbed, 10)
    changed = tmp_path / "train_gpt.py"
    changed.write_text((REPO / "train_gpt.py").read_text() + "\n")
    monkeypatch.setattr(train_gpt, "__file__", str(changed))
    with pytest.raises(SpeedrunError, match=r"train_gpt\.py has changed"):
        run(tiny_data, tmp_path)


def test_a_torn_checkpoint_is_named_and_passed_over(tiny_data, undisturbed, tmp_path, capsys):
    """Cut off, with a byte changed, without its digest, a folder of something else: the good one before is taken."""
    until_step(tmp_path, undisturbed, 14)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    cut = folder / "step_000014" / "rank_0_of_1.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped = folder / "step_000012" / "rank_0_of_1.safetensors"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (folder / "step_000010" / "rank_0_of_1.sha256").unlink()
    (folder / "step_000016").mkdir()
    run(tiny_data, tmp_path)
    said = capsys.readouterr().err
    for step in (10, 12, 14, 16):
        assert re.search(rf"passed over: .*step_0000{step}", said), step
    assert "resumed at step 8 " in next((tmp_path / "logs").glob("*.txt")).read_text()
    assert_equal(final(tmp_path), final(undisturbed))


def test_a_log_that_lost_lines_is_not_continued(tiny_data, undisturbed, tmp_path):
    until_step(tmp_path, undisturbed, 10)
    path = next((tmp_path / "logs").glob("*.txt"))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(SpeedrunError, match="lines are missing"):
        run(tiny_data, tmp_path)


def test_two_runs_cannot_write_one_log(tiny_data, undisturbed, tmp_path):
    until_step(tmp_path, undisturbed, 10)
    path = next((tmp_path / "logs").glob("*.txt"))
    writer = train_gpt.LineFile(path, path.stat().st_size)
    with pytest.raises(SpeedrunError, match="cannot write the log"):
        run(tiny_data, tmp_path)
    writer.write("still mine")
    assert path.read_text().endswith("still mine\n")


# ---- damage ----


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_is_accepted_or_crashes(undisturbed, tmp_path, count):
    """Catches: a change that no digest covers; an error of a library instead of a message. Digests too are damaged."""
    shutil.copytree(next((undisturbed / "checkpoints").iterdir()) / "step_000010", tmp_path / "c")
    Checkpoint(tmp_path / "c")
    rng = random.Random(0)
    files = sorted((tmp_path / "c").iterdir())
    original = {file: file.read_bytes() for file in files}
    for i in range(count):
        file = files[0] if rng.random() < 0.8 else files[1]
        file.write_bytes(mutated(original[file], rng))
        if file.read_bytes() != original[file]:
            with pytest.raises(CheckpointError):
                if Checkpoint(tmp_path / "c").progress and file.suffix == ".sha256":
                    raise CheckpointError(f"{i}: only the name after the digest was changed")
        file.write_bytes(original[file])


def test_a_file_with_a_digest_but_foreign_content_is_refused(undisturbed, tmp_path, tiny_data):
    """Catches: trust in whatever has a right digest: no metadata, missing and misshaped tensors, a run id as a path."""
    source = next((undisturbed / "checkpoints").iterdir()) / "step_000010"
    tensors = dict(Checkpoint(source).tensors())
    with safetensors.safe_open(source / "rank_0_of_1.safetensors", framework="pt") as file:
        metadata = file.metadata()

    def forge(tensors: dict, metadata: dict | None) -> Path:
        folder = tmp_path / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "rank_0_of_1.safetensors"
        safetensors.torch.save_file(tensors, path, metadata)
        path.with_suffix(".sha256").write_text(train_gpt.digest(path))
        return folder

    progress = json.loads(metadata["progress"])
    for bad in (None, {}, {"progress": "["}, {"progress": "{}"}, {"progress": "[1]"}):
        with pytest.raises(CheckpointError, match=r"not a checkpoint of train_gpt\.py"):
            Checkpoint(forge(tensors, bad))
    for run_id in ("../../etc/passwd", "a/b", "", 7):
        with pytest.raises(CheckpointError):
            Checkpoint(forge(tensors, {"progress": json.dumps(progress | {"run_id": run_id})}))
    trainer = train_gpt.Trainer(tiny_track(), cpu(), tiny_data, seed=0)
    trainer.load(Checkpoint(forge(tensors, metadata)))
    name = "optimizer.head.exp_avg"
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"weights.more": torch.zeros(1)},
        tensors | {name: tensors[name].double()},
        tensors | {name: tensors[name][:-1]},
        tensors | {"weights.qk_bank": tensors["weights.qk_bank"][:, :-1].contiguous()},
    ):
        with pytest.raises(CheckpointError):
            trainer.load(Checkpoint(forge(wrong, metadata)))


# ---- signals, kills, ranks ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tiny_data, undisturbed, tmp_path, number, code):
    process = start(tiny_data, tmp_path)
    wait_for(lambda: any((tmp_path / "checkpoints").glob("*/step_000004/*.safetensors")), process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was done before the signal came")
    assert process.returncode == code, said
    assert re.search(rf"stopped by {number.name} after \d+ steps; go on with --resume ", said)
    assert "Traceback" not in said
    run(tiny_data, tmp_path)
    assert_equal(final(tmp_path), final(undisturbed))


@pytest.mark.parametrize(
    ("options", "step", "saved"),
    [
        ("--save-every 6", 8, 8),
        ("--save-every 6", 20, 20),
        ("--save-every 4 --val-every 9", 9, 8),
        ("--save-every 0 --no-save-final", 8, None),
    ],
)
def test_a_signal_ends_a_validation_between_its_rows(
    tiny_data, undisturbed, tmp_path, monkeypatch, options, step, saved
):
    """After the first of its eight rows. Catches: a validation that is done to its end, half of one in the log, a
    checkpoint after an odd step, a signal in the last validation that is forgotten."""
    real_rows, real_validate, seen = train_gpt.validation_rows, train_gpt.Trainer.validate, []

    def validation_rows(*arguments):
        for row in real_rows(*arguments):
            seen.append(row)
            yield row
            if here[0] and len(seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def validate(self, settings, *arguments, **more):
        here[0] = settings == self.track.validation_at(step)
        seen.clear()
        return real_validate(self, settings, *arguments, **more)

    here = [False]
    monkeypatch.setattr(train_gpt, "validation_rows", validation_rows)
    monkeypatch.setattr(train_gpt.Trainer, "validate", validate)
    with pytest.raises(train_gpt.Interrupted) as end:
        run(tiny_data, tmp_path, *options.split())
    assert end.value.code == 143 and len(seen) == 2, "the second row is read, but not computed"
    folders = sorted((tmp_path / "checkpoints").glob("*/step_*"))
    assert (int(folders[-1].name.removeprefix("step_")) if folders else None) == saved
    how = f"; go on with --resume {folders[-1]}" if saved else ", what the log holds so far is kept"
    assert str(end.value) == f"stopped by SIGTERM after {step} steps{how}" == lines(tmp_path)[-1]
    assert not [line for line in lines(tmp_path) if line.startswith(f"step:{step}/20 val_loss")]
    if "--val-every" not in options and saved:
        monkeypatch.undo()
        run(tiny_data, tmp_path)
        assert_equal(final(tmp_path), final(undisturbed))
        assert [line for line in lines(tmp_path) if "train_loss" not in line] == [
            line for line in lines(undisturbed) if "train_loss" not in line
        ]


def test_a_signal_ends_the_warm_up_at_once(tiny_data, tmp_path, monkeypatch):
    """Catches: a checkpoint of the state that the warm-up has yet to restore; a compiler that takes the signal for an
    error of its own."""

    def train_step(self, step):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except Exception:
            raise AssertionError("taken for another error") from None

    monkeypatch.setattr(train_gpt.Trainer, "train_step", train_step)
    with pytest.raises(train_gpt.Interrupted, match="stopped by SIGINT in the warm-up") as end:
        run(tiny_data, tmp_path)
    assert end.value.code == 130 and not list((tmp_path / "checkpoints").rglob("*"))
    assert lines(tmp_path)[-1].startswith("stopped by SIGINT in the warm-up")


def test_a_second_signal_ends_the_run_at_once(monkeypatch):
    """Unless it comes right after the first. Catches: a run that can only be killed."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), train_gpt.Interrupt(cpu()) as interrupt:
        for now in (100.0, 100.9):  # noqa: B007 - the clock reads it
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.ask() == signal.SIGTERM
        now = 101.1
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


SIGNALLED = """
import os, signal, sys, time, train_gpt
where = sys.argv.pop(1)
rows, train_step, calls = train_gpt.validation_rows, train_gpt.Trainer.train_step, []
write = train_gpt.write_checkpoint

def validation_rows(track, tokens, runtime):
    calls.append(0)
    for i, row in enumerate(rows(track, tokens, runtime)):
        if where == "validation" and len(calls) == 2 and runtime.rank == 1 and i == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # as where a scheduler tells all processes, and the launcher once more
        yield row

def warm_up_step(self, step):
    if where == "warm-up" and step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(self, step)

def write_checkpoint(folder, rank, *arguments):
    time.sleep(rank)  # the launcher ends rank 1 as soon as rank 0 is gone
    write(folder, rank, *arguments)

train_gpt.validation_rows, train_gpt.Trainer.train_step = validation_rows, warm_up_step
train_gpt.write_checkpoint = write_checkpoint
train_gpt.main()
"""


@pytest.mark.parametrize(
    ("where", "said"), [("validation", "after 8 steps; go on with"), ("warm-up", "in the warm-up")]
)
def test_ranks_end_together_on_a_signal(tiny_data, tmp_path, where, said):
    """In the validation one of two gets it, before the last row that both have, with a row more on rank 0; in the
    warm-up both, as from a launcher. Catches: a rank that waits for the other, a checkpoint with one rank's pieces."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    arguments = words(tiny_data, tmp_path, "--save-every", "6", "--data.val-tokens", "600")
    done = torchrun(2, script, where, "nano", *arguments)
    assert done.stderr.count(f"stopped by SIGTERM {said}") == 1, done.stderr[-3000:]
    assert re.search(r"exitcode +: 143", done.stderr) and "in vain" not in done.stderr
    folders = sorted((tmp_path / "checkpoints").glob("*/step_*"))
    assert [Checkpoint(folder).progress.step for folder in folders] == ([6, 8] if where == "validation" else [])


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    """Until it holds, or the process has ended."""
    begin = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - begin < seconds:
        time.sleep(0.002)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_undisturbed_one(tiny_data, undisturbed, tmp_path, kills):
    """SIGKILL at random moments, every second one while a checkpoint is being written, then resumed until done."""
    rng, done = random.Random(1), 0
    while done < kills:
        out = tmp_path / str(done)
        while True:
            process = start(tiny_data, out)
            begun = lambda out=out: any(out.rglob("*.safetensors")) or any(out.rglob("*.part"))
            wait_for(begun, process)
            if done < kills and rng.random() < 0.8:
                if done % 2:
                    wait_for(lambda out=out: any(out.rglob("*.part")), process)
                else:
                    time.sleep(rng.uniform(0, 1.0))
                process.kill()
                done += process.wait() != 0
            process.communicate()
            if process.returncode == 0:
                break
        assert_equal(final(out), final(undisturbed))
        assert lines(out) == lines(undisturbed)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(4, 8, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(tiny_data, tmp_path, before, after):
    """To rounding, in float64. Catches: pieces joined in the wrong order or cut anew wrongly, lost padding of banks."""
    rows = "--data.rows-per-step", max(before, after)

    def command(world_size: int, out: Path, *extra: object) -> None:
        if world_size == 1:
            return run(tiny_data, out, *rows, *extra, dtype=torch.float64)
        arguments = words(tiny_data, out, "--dtype", "float64", *rows, *extra)
        done = torchrun(world_size, REPO / "train_gpt.py", "nano", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]

    command(before, tmp_path / "whole", "--keep-checkpoints", "99")
    until_step(tmp_path / "cut", tmp_path / "whole", 10)
    (steps,) = (tmp_path / "cut" / "checkpoints").iterdir()
    (steps / "step_000020").mkdir()  # of ranks that were killed while they wrote
    torn = f"{steps.name}/step_000020/rank_0_of_{before}.safetensors"
    shutil.copy(tmp_path / "whole" / "checkpoints" / torn, tmp_path / "cut" / "checkpoints" / torn)
    command(after, tmp_path / "cut")
    log = next((tmp_path / "cut" / "logs").glob("*.txt")).read_text()
    assert re.search(rf"^resumed at step 10 from \S+, by {after} processes instead of {before}$", log, re.M)
    found, expected = final(tmp_path / "cut"), final(tmp_path / "whole")
    for name in expected.keys() - {"rng", "mlp_scale"}:
        rows = min(len(found[name]), len(expected[name]))
        a, b = found[name].double().numpy(), expected[name].double().numpy()
        np.testing.assert_allclose(a[:rows], b[:rows], rtol=1e-7, atol=1e-9 * np.abs(b).max(), err_msg=name)
        assert not a[rows:].any() and not b[rows:].any(), name
    losses = [
        [float(x) for x in re.findall(r"val_loss:(\S+)", "\n".join(lines(d)))]
        for d in (tmp_path / "cut", tmp_path / "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1.1e-4)


def test_scales_of_fp8_are_each_ranks_own_and_at_another_number_of_ranks_the_largest(tiny_data, tmp_path):
    """Catches: scales of rank 0 for all, lost, or too small for another rank; a warm-up's that stay."""
    track, values = tiny_track(rows_per_step=4), torch.tensor([[3.0, 0.5, 1, 1, 1], [1, 2, 1, 1, 1]])
    trainer_of = lambda rank, world_size: Trainer(track, cpu(rank=rank, world_size=world_size), tiny_data, seed=0)
    for rank, scale in enumerate(values):
        trainer = trainer_of(rank, 2)
        state = trainer.state()
        trainer.model.mlp_scale.copy_(scale)
        position = trainer.loader.position
        progress = Progress("run", 2, 0.0, position, {}, 0, 0, {}, "source", {}, world_size=2)
        train_gpt.write_checkpoint(tmp_path / "step", rank, trainer.owned(), progress)
        trainer.load_state(state)
        assert trainer.model.mlp_scale.tolist() == [1] * 5
    checkpoint = Checkpoint(tmp_path / "step")
    largest = values.amax(0).tolist()
    for world_size, expected in ((2, values.tolist()), (1, [largest]), (4, [largest] * 4)):
        for rank in range(world_size):
            trainer = trainer_of(rank, world_size)
            trainer.load(checkpoint)
            assert trainer.model.mlp_scale.tolist() == expected[rank], (world_size, rank)


# ---- full disks and numbers that are not finite ----


def test_a_full_disk_ends_neither_log_nor_run(tmp_path, capsys, monkeypatch):
    """Lines wait in memory and are written, each once and in order, when there is room again."""
    log = train_gpt.LineFile(tmp_path / "log.txt")
    real, room = log._file, [25]

    class Full(io.RawIOBase):
        def write(self, data: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            taken = min(len(data), room[0])
            room[0] -= taken
            return real.write(data[:taken])

    log._file = Full()
    for i in range(9):
        log.write(f"line {i}")
    assert (tmp_path / "log.txt").read_bytes() == b"line 0\nline 1\nline 2\nline"
    assert capsys.readouterr().err.count("No space left on device") == 1, "said once"
    room[0] = 1000
    log.write("line 9")
    assert (tmp_path / "log.txt").read_text() == "".join(f"line {i}\n" for i in range(10))
    assert log.size == 70 and not log.pending
    room[0] = 0
    log.write("lost")
    with pytest.raises(SpeedrunError, match=r"its last 1 lines cannot be written[^$]*\nlost"):
        log.close()
    room[0] = 1000
    log.close()
    assert (tmp_path / "log.txt").read_text().endswith("line 9\nlost\n")


def test_the_lines_of_the_record_are_shown_where_a_full_disk_has_no_room_for_them(tmp_path):
    """Catches: the last lines of the .jsonl in the place of those that make the record."""
    log = train_gpt.RunLog("nano", 20, "", {}, tmp_path, cpu())

    class Full(io.RawIOBase):
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    log.file._file = log.metrics._file = Full()
    log.step(20, 1.0, {"tokens": 5}, val_loss=1.5)
    with pytest.raises(SpeedrunError, match=r"\.txt: not complete, its last 1 lines[^$]*\nstep:20/20 val_loss:1\.5000"):
        log.close()


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_run_goes_on(tiny_data, tmp_path, monkeypatch, capsys):
    real = safetensors.torch.save_file

    def full(tensors, path, metadata):
        real(tensors, path, metadata)
        if "step_000006" in str(path):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    run(tiny_data, tmp_path, "--keep-checkpoints", "99")
    assert capsys.readouterr().err.count("No space left on device") == 1
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert not any((folder / "step_000006").iterdir()) and (folder / "finished").exists()
    assert len(final(tmp_path)) > 20


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(tiny_data, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SpeedrunError, match="final checkpoint could not be written"):
        run(tiny_data, tmp_path)


@pytest.mark.parametrize("poison", ["loss", "weight"])
def test_numbers_that_are_not_finite_stop_the_run_with_step_rank_and_last_state(
    tiny_data, tmp_path, monkeypatch, poison
):
    real = train_gpt.Trainer.train_step

    def train_step(self, step):
        loss = real(self, step)
        if step == 12 and poison == "weight":
            self.params["value_embeds"].data[0, 250, 0] = float("inf")  # a row that no token reads
        return loss * float("nan") if step == 12 and poison == "loss" else loss

    monkeypatch.setattr(train_gpt.Trainer, "train_step", train_step)
    said = r"the loss of step 13 is" if poison == "loss" else "a weight is"
    with pytest.raises(SpeedrunError, match=rf"{said} not finite on rank 0 of 1, after 14 .*step_000012"):
        run(tiny_data, tmp_path, "--no-warmup")
    assert not list((tmp_path / "checkpoints").rglob("step_000014"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--save-every", "3"), "even"),
        (("--keep-checkpoints", "0"), "at least 1"),
        (("--resume", "/nowhere"), "nowhere"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_data, tmp_path, options, said):
    with pytest.raises(SpeedrunError, match=said):
        run(tiny_data, tmp_path, *options)


def test_saving_changes_nothing(tiny_data, undisturbed, tmp_path):
    """The weights of a run that never saves, which stands for one by an older version, are the same."""
    track = tiny_track(val_every=8, rows_per_step=2)
    trainers = []
    real = train_gpt.conclude
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "conclude", lambda trainer, *a: (trainers.append(trainer), real(trainer, *a)))
        train(track, Options(data_dir=tiny_data, log_dir=tmp_path, sample_tokens=0), cpu())
    assert_equal(trainers[0].owned(), final(undisturbed))


# ---- ranks that die or hang ----


def ranks_of(mark: str) -> dict[int, int]:
    """Process ids by rank of the run whose environment has the MARK. Linux only."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().decode(errors="replace")
            environ = dict(x.split("=", 1) for x in text.split("\0") if "=" in x)
            if environ.get("MARK") == mark and "RANK" in environ:
                found[int(environ["RANK"])] = int(path.parent.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("killed", 1),
        pytest.param("stopped", 1, marks=pytest.mark.slow),
        pytest.param("killed", 20, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_all_and_is_named(tmp_path, how, count):
    """Killed, or stopped so that it hangs, at random moments; what is left can be resumed. The last line is ours."""
    rng, data = random.Random(2), tmp_path / "data"
    data.mkdir()
    write_shard(data / "long_train_000001.bin", text_like(700_000, seed=1))  # the blow comes before the end
    write_shard(data / "long_val_000000.bin", text_like(2000, seed=2))
    write_token_bytes(data)
    for i in range(count):
        out, rank = tmp_path / str(i), rng.randrange(2)
        env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
        env |= {"OMP_NUM_THREADS": "1", "NPROC": "2", "PYTHON": sys.executable, "MARK": str(out)}
        options = words(data, out, "--schedule.scheduled-steps", "3000", "--save-every", "100")
        out.mkdir()
        with open(out / "said.txt", "w") as said:
            process = subprocess.Popen([REPO / "run.sh", "nano", *options], stdout=said, stderr=said, env=env)
        wait_for(lambda out=out: any_good(out), process, 120)
        time.sleep(rng.uniform(0, 1.0))
        ranks = ranks_of(str(out))
        assert process.poll() is None and len(ranks) == 2, (out / "said.txt").read_text()[-2000:]
        os.kill(ranks[rank], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        began = time.monotonic()
        process.wait(timeout=120)
        # A limit of 60 s for a collective, and torchrun's 30 s for a process to end by itself.
        assert time.monotonic() - began < (30 if how == "killed" else 110) and process.returncode != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
        expected = {
            "killed": f"error: rank {rank} was killed by SIGKILL",
            "stopped": f"error: rank {1 - rank} of 2 waited",
        }
        message = (out / "said.txt").read_text().splitlines()[-1]
        assert message.startswith(expected[how]), message
        assert any_good(out)


def any_good(out: Path) -> bool:
    """Whether there is a checkpoint whose pieces, those of all ranks, are complete."""
    for step in (out / "checkpoints").glob("*/step_*"):
        with contextlib.suppress(CheckpointError):
            Checkpoint(step)
            return True
    return False
