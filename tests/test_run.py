"""The run: warm-up, clock, log, validation, errors, as README and the command line promise them."""

import io
import itertools
import json
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm.std
from conftest import BOS, REPO, cpu, documents, run_process, tiny_options, tiny_track, write_shard, write_token_bytes

import train_gpt
from train_gpt import Options, Row, Rule, Trainer, make_row, train

LINE = re.compile(
    r"step:(?P<step>\d+)/(?P<total>\d+) ((?P<kind>val_loss|train_loss):(?P<loss>\d+\.\d{4}) )?"
    r"train_time:(?P<ms>\d+)ms step_avg:(?P<average>\d+\.\d\d)ms"
)


def few_rows(**schedule) -> train_gpt.Track:
    """The tiny track with the same tokens per step in 2 rows: one process has them all, and 2 are quicker than 8."""
    return tiny_track(rows_per_step=2, **schedule)


def assert_same(a, b, path: str = "state") -> None:
    """Equal bit for bit, through dicts, tensors and plain values."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def steps(trainer: Trainer, begin: int, end: int) -> list[float]:
    """Losses of these steps, trained as in a run whose clock has just started."""
    trainer.find_prefixes()
    return [trainer.train_step(step).item() for step in range(begin, end)]


def run(track, log_dir: Path, data_dir: Path, dtype=torch.float32, **options) -> str:
    """Train in this process; returns the log."""
    before = set(log_dir.glob("*.txt"))
    options = {"sample_tokens": 0, **options}
    train(track, Options(data_dir=data_dir, log_dir=log_dir, **options), cpu(dtype))
    (path,) = set(log_dir.glob("*.txt")) - before
    return path.read_text(encoding="utf-8")


def lines_of(log: str) -> list[re.Match]:
    """The step lines of a log; every line after the second rule that begins like one must parse."""
    body = log.split("\n" + "=" * 100 + "\n")[-1].splitlines()
    found = [LINE.fullmatch(line) for line in body if line.startswith("step:")]
    assert found and all(found)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up and reproducibility
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_rows_computed_at_once_train_as_one_after_the_other(tiny_data, kind):
    """Catches: a gradient that is lost or added twice, updates of one thread that another overwrites. Bit for bit:
    whichever row comes first, the sums have the order of the rows."""
    found = []
    for at_once in (1, 2):
        track = tiny_track(rows_per_step=4)
        rules = replace(track.optimizer.rules, ngram_embed=Rule(kind, sharded=True, lr_mul=(5.0,)))
        optimizer, data = replace(track.optimizer, rules=rules), replace(track.data, rows_at_once=at_once)
        track, runtime = replace(track, optimizer=optimizer, data=data), replace(cpu(torch.bfloat16), threads=2)
        trainer = Trainer(track, runtime, tiny_data, seed=3)
        assert (trainer.pool is not None) == (at_once == 2)
        losses = steps(trainer, 0, 16)
        found.append((losses, trainer.validate(track.validation_at(16)), trainer.state()))
    assert found[0][:2] == found[1][:2]
    assert_same(found[0][2], found[1][2])


@pytest.mark.parametrize(("dtype", "stop"), [(torch.float32, 20), (torch.bfloat16, 20), (torch.float32, 7)])
def test_a_run_with_warm_up_equals_one_without(tiny_data, dtype, stop):
    """Catches: anything that the warm-up leaves behind: weights, momenta, low halves, gradients waiting for Adam, the
    loader's place or its prefetch, a tied embedding, the random generator, prefixes found off the clock. Bit for bit,
    over the whole run."""
    plain, warmed = (Trainer(few_rows(), cpu(dtype), tiny_data, seed=5) for _ in range(2))
    torch.rand(3)
    generator = torch.get_rng_state()
    warmed.warm_up(stop)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in warmed.params.values()) and (warmed.model.prefix == -1).all()
    assert_same(dict(warmed.model.named_parameters()), dict(plain.model.named_parameters()))
    assert steps(warmed, 0, stop) == steps(plain, 0, stop)
    assert_same(warmed.state(), plain.state())
    assert torch.equal(warmed.model.prefix, plain.model.prefix) and (plain.model.prefix >= 0).any()
    settings = plain.track.validation_at(stop)
    assert warmed.validate(settings) == plain.validate(settings)


def test_the_warm_up_runs_every_shape_and_precision_of_the_run(tiny_data, monkeypatch):
    """Catches: a stage whose compilation would fall into the clock. Both parities matter: Adam steps on odd steps."""
    track = few_rows()
    trainer, seen = Trainer(track, cpu(), tiny_data, seed=5), []
    original = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, step: (seen.append(step), original(self, step))[1])
    trainer.warm_up(track.schedule.total_steps)
    of_run = {(track.at(s).stage.tokens, track.at(s).windows, s % 2) for s in range(track.schedule.total_steps)}
    assert {(track.at(s).stage.tokens, track.at(s).windows, s % 2) for s in seen} == of_run
    seen.clear()
    trainer.warm_up(3)
    assert max(seen) < 3


def test_the_warm_up_needs_no_more_data_than_the_run(tmp_path):
    """Catches: "shards have run out" before a short run for which the shards suffice."""
    write_shard(tmp_path / "x_val_000001.bin", documents([50] * 20))
    exact = few_rows(scheduled_steps=3, extension_steps=1)
    stages = tuple(replace(stage, max_doc_len=1000) for stage in exact.schedule.stages)
    exact = replace(exact, schedule=replace(exact.schedule, stages=stages, extension=stages[-1]))
    lengths = [exact.at(step).stage.tokens // 2 + 1 for step in range(4) for _ in range(2)]
    write_shard(tmp_path / "x_train_000001.bin", documents(lengths))
    write_token_bytes(tmp_path)
    run(exact, tmp_path / "cold", tmp_path, warmup=False)
    run(exact, tmp_path / "warm", tmp_path, warmup=True)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_data):
    """Catches: an unseeded generator, weights that ignore --seed, a hidden dependence on what ran before."""
    first, again, other = (Trainer(few_rows(), cpu(), tiny_data, seed) for seed in (3, 3, 4))
    losses = steps(first, 0, 8)
    torch.rand(100)  # other users of the global generator must not matter
    assert steps(again, 0, 8) == losses
    assert_same(first.state() | {"rng": None}, again.state() | {"rng": None})
    assert steps(other, 0, 8) != losses
    for name in ("head", "qk_bank", "vo_bank", "mlp_bank"):
        assert not torch.equal(first.params[name], other.params[name])


def test_a_saved_state_goes_on_as_if_nothing_had_happened(tiny_data):
    """Catches: a sixth kind of state. Saved after step 8, put into another trainer, trained past the untie step."""
    trainer = Trainer(few_rows(), cpu(torch.bfloat16), tiny_data, seed=0)
    steps(trainer, 0, 8)
    state = trainer.state()
    losses = steps(trainer, 8, 20)
    resumed = Trainer(few_rows(), cpu(torch.bfloat16), tiny_data, seed=9)
    resumed.load_state(state)
    assert steps(resumed, 8, 20) == losses
    assert_same(resumed.state() | {"rng": None}, trainer.state() | {"rng": None})


# ----------------------------------------------------------------------------------------------------------------------
# Log
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_log(tiny_data, tmp_path_factory) -> str:
    return run(few_rows(val_every=8), tmp_path_factory.mktemp("logs"), tiny_data, seed=11)


def test_the_log_is_the_source_the_environment_the_settings_and_the_lines(whole_log):
    """Catches: a record that cannot be run again: source not first or altered, a number of the track not resolved."""
    source = Path(train_gpt.__file__).read_text(encoding="utf-8")
    assert whole_log.startswith(source)
    head, environment, body = whole_log.split("\n" + "=" * 100 + "\n")
    assert head.rstrip("\n") == source.rstrip("\n")
    for said in (torch.__version__, np.__version__, sys.version.split()[0], "float32", "cpu"):
        assert said in environment
    settings = dict(line.split(": ", 1) for line in environment.splitlines() if ": " in line)
    track = few_rows(val_every=8)
    expected = {
        "name": "nano",
        "seed": 11,
        "target_loss": track.target_loss,
        "model.num_layers": 5,
        "model.head_dim": 8,
        "data.rows_per_step": 2,
        "data.bos": BOS,
        "schedule.scheduled_steps": 18,
        "val_every": 8,
        "schedule.stages.1.tokens": track.schedule.stages[1].tokens,
        "schedule.stages.0.windows": track.schedule.stages[0].windows,
        "schedule.extension.tokens": 192,
        "optimizer.muon_lr": track.optimizer.muon_lr,
        "optimizer.rules.head.betas": track.optimizer.rules.head.betas,
    }
    assert {key: settings.get(key) for key in expected} == {key: str(value) for key, value in expected.items()}
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", body.splitlines()[-1])
    assert "incomplete" not in body


def test_every_line_of_a_step_parses_and_adds_up(whole_log):
    """Catches: a format that the field's tools cannot read; step_avg and train_time that contradict each other."""
    lines = lines_of(whole_log)
    for line in lines:
        step, ms, average = int(line["step"]), int(line["ms"]), float(line["average"])
        assert line["total"] == "20"
        assert average * max(step, 1) == pytest.approx(ms, abs=0.5 + 0.006 * max(step, 1))
    times = [int(line["ms"]) for line in lines]
    assert times == sorted(times)
    plain = [int(line["step"]) for line in lines if not line["kind"]]
    assert plain == list(range(1, 21))


def events_of(log_dir: Path) -> list[dict]:
    (path,) = log_dir.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_metrics_are_the_events_of_the_log_as_json(tiny_data, tmp_path):
    """Catches: a step in several objects or in none, a number that is in one of the two files alone, tokens or a
    learning rate of another step."""
    track = few_rows(val_every=8)
    log = run(track, tmp_path, tiny_data, seed=11)
    events = events_of(tmp_path)
    assert [event["step"] for event in events] == list(range(21))
    losses = {"train_loss": {}, "val_loss": {}}
    last_ms = {}
    for line in lines_of(log):
        last_ms[int(line["step"])] = int(line["ms"])
        if line["kind"]:
            losses[line["kind"]][int(line["step"])] = float(line["loss"])
    for event in events:
        step = event["step"]
        assert round(1000 * event["train_time"]) == last_ms[step]
        assert event["tokens"] == sum(track.at(before).stage.tokens for before in range(step))
        if step:
            assert (event["lr"], event["momentum"]) == (track.at(step - 1).lr, track.at(step - 1).momentum)
    for kind, told in losses.items():
        found = {event["step"]: event[kind] for event in events if kind in event}
        assert found == pytest.approx(told, abs=6e-5), kind


WANDB = """
class Error(Exception): pass
class Run:
    def __init__(self, settings): self.settings, self.logged, self.ended = settings, [], None
    def log(self, data, step=None): self.logged.append((step, dict(data)))
    def finish(self, exit_code=None): self.ended = exit_code
def init(**settings):
    if settings["config"]["seed"] == 99: raise Error("no API key configured")
    runs.append(Run(settings))
    return runs[-1]
runs = []
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the package, which the requirements leave out."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_wandb_gets_the_same_numbers(wandb, tiny_data, tmp_path):
    """Catches: a step told twice, settings that are missing, a failed run that counts as finished, another rank's."""
    logs = tmp_path / "logs"
    log = run(few_rows(val_every=8), logs, tiny_data, track_with="wandb", seed=11)
    (told,) = wandb.runs
    assert told.logged == [(event.pop("step"), event) for event in events_of(logs)]
    assert told.ended == 0 and told.settings["dir"] == logs
    assert told.settings["config"]["val_every"] == 8 and told.settings["config"]["seed"] == 11
    assert told.settings["id"] == told.settings["name"] == next(logs.glob("*.txt")).stem
    assert "\ntrack_with: wandb\n" in log

    class Other:
        rank, world_size = 1, 1

    log = train_gpt.RunLog("nano", 20, "", {}, logs, Other(), track_with="wandb")
    log.step(1, 1.0, train_loss=2.0)
    log.close()
    assert len(wandb.runs) == 1
    with pytest.raises(train_gpt.SpeedrunError, match=r"WANDB_MODE=offline.*no API key"):
        run(few_rows(), logs, tiny_data, track_with="wandb", seed=99)
    assert len(list(logs.glob("*.txt"))) == 1
    with pytest.raises(ZeroDivisionError), train_gpt.RunLog("nano", 20, "", {"seed": 1}, logs, cpu(), "wandb"):
        raise ZeroDivisionError
    assert wandb.runs[-1].ended == 1


def test_tensorboard_gets_the_same_numbers(tiny_data, tmp_path, monkeypatch):
    """With a stand-in for the package, which the requirements leave out. Catches: a file that is not closed."""
    scalars = {}

    class SummaryWriter:
        def __init__(self, folder: str):
            scalars["folder"] = Path(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars[name, step] = value

        def close(self) -> None:
            scalars["closed"] = True

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorboard.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    run(few_rows(), tmp_path / "logs", tiny_data, track_with="tensorboard")
    assert scalars.pop("folder") == next((tmp_path / "logs").glob("*.txt")).with_suffix("")
    assert scalars.pop("closed")
    events = events_of(tmp_path / "logs")
    assert scalars == {(key, event["step"]): event[key] for event in events for key in event.keys() - {"step"}}


def test_validation_comes_every_so_many_steps_and_at_the_end(whole_log, tiny_data, tmp_path):
    """Catches: a validation after the wrong number of updates, left out at the end, or in it twice."""

    def validated(log: str) -> list[int]:
        return [int(line["step"]) for line in lines_of(log) if line["kind"] == "val_loss"]

    assert validated(whole_log) == [0, 8, 16, 20]
    assert validated(run(few_rows(val_every=0), tmp_path, tiny_data)) == [20]
    assert validated(run(few_rows(val_every=5), tmp_path, tiny_data)) == [0, 5, 10, 15, 20]


def test_the_log_names_the_first_validation_at_the_target(whole_log, tiny_data, tmp_path):
    """Catches: a line for each validation below the target or for one above it, the time of another step."""
    losses = [float(line["loss"]) for line in lines_of(whole_log) if line["kind"] == "val_loss"]
    target = round((losses[0] + losses[1]) / 2, 3)
    assert losses[0] > target > losses[1] and "reached: " not in whole_log.split("=" * 100)[-1]
    log = run(replace(few_rows(val_every=8), target_loss=target), tmp_path, tiny_data, seed=11)
    (said,) = re.findall(r"^target.*", log.split("=" * 100)[-1], re.MULTILINE)
    ms = next(int(line["ms"]) for line in lines_of(log) if line["kind"] == "val_loss" and line["step"] == "8")
    seconds = float(re.fullmatch(rf"target {target} reached: in (\d+\.\d{{3}}) s at step 8", said)[1])
    assert round(1000 * seconds) == ms > 0


@pytest.mark.parametrize(("rows", "threads", "at_once"), [(1, 2, 1), (4, 1, 1), (4, 2, 2), (2, 8, 2)])
def test_rows_have_as_many_threads_as_a_step_has_rows_and_the_process_threads(tiny_data, rows, threads, at_once):
    """Catches: two threads where the process was given one, and half of them idle where a step has one row."""
    track, before = tiny_track(rows_per_step=rows), torch.get_num_threads()
    track = replace(track, data=replace(track.data, rows_at_once=2))
    try:
        trainer = Trainer(track, replace(cpu(), threads=threads), tiny_data, seed=3)
        assert trainer.at_once == at_once and (trainer.pool is not None) == (at_once > 1)
        assert torch.get_num_threads() == (1 if at_once > 1 else before)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps open files where they are")
def test_a_log_that_is_moved_away_loses_nothing(tiny_data, tmp_path, monkeypatch):
    """Catches: a run that opens its log by name again, and dies of that after its last step."""
    track = replace(few_rows(scheduled_steps=3, extension_steps=1), target_loss=99.0)
    original = Trainer.train_step

    def train_step(self, step: int):
        for path in tmp_path.glob("*.txt"):
            path.rename(path.with_suffix(".moved"))
        return original(self, step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    options = Options(data_dir=tiny_data, log_dir=tmp_path, sample_tokens=0, warmup=False, export=tmp_path / "export")
    train(track, options, cpu())
    (moved,) = tmp_path.glob("*.moved")
    assert "\ntarget 99.0 reached: " in moved.read_text() and (tmp_path / "export" / "model.safetensors").exists()


def test_the_logged_losses_are_those_of_the_steps(whole_log, tiny_data):
    """Catches: a mean over the wrong steps or rows; a validation before or after the update it is logged for."""
    trainer, track = Trainer(few_rows(), cpu(), tiny_data, seed=11), few_rows()
    trainer.find_prefixes()
    losses, validations = [], {}
    for step in range(21):
        if step in (0, 8, 16, 20):
            validations[step] = trainer.validate(track.validation_at(step))
        if step < 20:
            losses.append(trainer.train_step(step).item())
    begin = 0
    for line in lines_of(whole_log):
        step = int(line["step"])
        if line["kind"] == "train_loss":
            assert float(line["loss"]) == pytest.approx(np.mean(losses[begin:step]), abs=6e-5)
            begin = step
        elif line["kind"] == "val_loss":
            assert float(line["loss"]) == pytest.approx(validations[step], abs=6e-5)
    assert begin == 20


def test_without_the_prefix_loss_no_bytes_of_tokens_are_needed(tiny_data, tmp_path):
    """Catches: an option that the log hides, that leaves the weights of the loss on, or turns on with any stage."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data, ignore=shutil.ignore_patterns("tokens.bin"))
    track = replace(few_rows(), prefix_loss=False)
    settings, log = run(track, tmp_path / "logs", data).split("=" * 100)[-2:]
    assert "\nprefix_loss: False\n" in settings
    off = [replace(stage, prefix_weight=(0.0, 0.0)) for stage in track.schedule.stages]
    by_weights = steps(Trainer(few_rows(stages=tuple(off)), cpu(), data, seed=0), 0, 20)
    with_them = steps(Trainer(few_rows(), cpu(), tiny_data, seed=0), 0, 20)
    logged = [float(loss) for loss in re.findall(r"train_loss:(\S+)", log)]
    count = 20 // len(logged)
    assert logged == pytest.approx([np.mean(by_weights[i : i + count]) for i in range(0, 20, count)], abs=6e-5)
    assert by_weights[0] == with_them[0] and by_weights[4] != with_them[4]


def reduced(track: train_gpt.Track) -> train_gpt.Track:
    """30 steps of a track with its layers, skips, stages, rules and learning rates, but narrow and with short rows."""
    s = track.schedule
    small = lambda stage: replace(
        stage, tokens=24 * stage.tokens // s.stages[0].tokens * 2, windows=tuple(w // 64 + 2 for w in stage.windows)
    )
    schedule = replace(
        s,
        scheduled_steps=28,
        extension_steps=2,
        stages=tuple(map(small, s.stages)),
        extension=small(s.extension),
        final_long_window=s.final_long_window // 64,
        yarn_max_window=s.yarn_max_window // 64 + 2,
        momentum_steps=(8, 4),
    )
    model = replace(track.model, vocab_size=257, num_heads=2, head_dim=8, vocab_multiple=16)
    data = replace(track.data, bos=BOS, rows_per_step=2, val_tokens=700, val_row_tokens=350)
    return replace(track, model=model, schedule=schedule, data=data, val_every=10)


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_every_track_trains_for_30_steps(name, tiny_data, tmp_path):
    """Catches: a track that cannot run to its end, or does not learn: its loss falls from that of uniform."""
    log = run(reduced(train_gpt.TRACKS[name]), tmp_path, tiny_data, warmup=False)
    losses = [float(line["loss"]) for line in lines_of(log) if line["kind"] == "val_loss"]
    assert len(losses) == 4 and losses[0] == pytest.approx(np.log(272), abs=0.3)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.9, losses
    assert "peak memory" in log.splitlines()[-1]


def test_max_steps_stops_early_and_marks_the_log(tiny_data, tmp_path, capsys):
    """Catches: a short run that passes for a record; a final validation with the window of the whole run's end."""
    log = run(few_rows(), tmp_path, tiny_data, max_steps=7)
    assert re.search(r"^incomplete run: stopped after 7 of 20 steps", log, re.M)
    assert log.splitlines()[-1].startswith("peak memory allocated")
    assert [int(line["step"]) for line in lines_of(log) if not line["kind"]] == list(range(1, 8))
    shown = capsys.readouterr().out
    assert re.search(r"^incomplete, 7 of 20 steps in \d+\.\d s: validation loss \d\.\d{4}$", shown, re.M)
    assert "missed" not in shown
    assert "incomplete run:" not in run(few_rows(), tmp_path, tiny_data, max_steps=99).split("=" * 100)[-1]


def test_the_clock_counts_training_only(tiny_data, tmp_path, monkeypatch):
    """Catches: warm-up, validation or a checkpoint in the official time. On the clock of this test a step
    costs a second and each of the others a million."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(**vars(time) | {"perf_counter": lambda: clock.now})
    monkeypatch.setattr(train_gpt, "time", fake)

    def costs(seconds: float, method):
        def timed(self, *args, **kwargs):
            clock.now += seconds
            return method(self, *args, **kwargs)

        return timed

    for name, seconds in (("warm_up", 1e6), ("validate", 1e6), ("owned", 1e6), ("train_step", 1.0)):
        monkeypatch.setattr(Trainer, name, costs(seconds, getattr(Trainer, name)))
    log = run(few_rows(val_every=6), tmp_path, tiny_data, save_every=4, checkpoint_dir=tmp_path / "checkpoints")
    for line in lines_of(log):
        assert int(line["ms"]) == 1000 * int(line["step"])


def test_the_terminal_shows_verdict_log_and_sample(tiny_data, tmp_path, capsys):
    """Catches: a user who does not learn whether the target was reached, or where the log is."""
    log_dir = tmp_path / "logs"
    run(replace(few_rows(), target_loss=100.0), log_dir, tiny_data, sample_tokens=20)
    shown = capsys.readouterr().out
    (path,) = log_dir.glob("*.txt")
    assert re.search(r"^reached 100\.0 in \d+\.\d s: validation loss \d\.\d{4}", shown, re.M)
    assert f"log: {path}" in shown and "sample:\n" in shown
    run(replace(few_rows(), target_loss=0.1), log_dir, tiny_data)
    assert "missed 0.1 in" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Validation and sample
# ----------------------------------------------------------------------------------------------------------------------


def test_validation_is_the_mean_cross_entropy_of_the_stream(tiny_data):
    """Catches: a loss averaged over rows instead of tokens (the last row is shorter), several prediction weights in
    it, a document boundary ignored. The rows are cut here, from the files, and the entropy taken from the logits."""
    track = few_rows()
    trainer = Trainer(track, cpu(torch.float64), tiny_data, seed=2)
    steps(trainer, 0, 4)
    shards = sorted(tiny_data.glob("*_val_*.bin"))
    stream = np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in shards]).astype(np.int64)
    for step in (4, 20):
        settings, total = track.validation_at(step), 0.0
        for begin in range(0, 700, 96):
            tokens = stream[begin : min(begin + 96, 700) + 1]
            n = len(tokens) - 1
            starts = [0] + [i for i in range(1, n) if tokens[i] == BOS] + [n]
            inputs = torch.from_numpy(tokens[:-1].copy())
            ngrams = make_row(tokens, np.array(starts[:-1]), n, track.model)[4:6]  # see test_loader.py
            cu_seqlens = torch.tensor(starts, dtype=torch.int32)
            row = Row(inputs, torch.from_numpy(tokens[1:].copy()), cu_seqlens, n, *ngrams)
            logits = trainer.model.logits(row, settings).numpy()
            log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            total -= log_probs[np.arange(n), tokens[1:]].sum()
        assert trainer.validate(settings) == pytest.approx(total / 700, rel=1e-12)


def test_validation_changes_nothing(tiny_data):
    """Catches: gradients, optimizer state or loader moved by a validation between steps."""
    quiet, checked = (Trainer(few_rows(), cpu(), tiny_data, seed=2) for _ in range(2))
    for step in range(4):
        checked.validate(checked.track.validation_at(step))
        assert checked.train_step(step).item() == quiet.train_step(step).item()
    assert_same(checked.state(), quiet.state())


@pytest.mark.parametrize(("seconds", "shown"), [(3, True), (0.001, False)])
def test_validations_and_warm_ups_of_over_five_seconds_show_a_bar(tiny_data, monkeypatch, seconds, shown):
    """Catches: minutes without a sign of life, a bar that flashes up for moments or stays. `seconds` pass on the bar's
    clock between two looks at it."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    ticks = itertools.count()
    monkeypatch.setattr(tqdm.std, "time", lambda: 1e9 + seconds * next(ticks))
    monkeypatch.setattr(sys, "stderr", Terminal())
    trainer = Trainer(few_rows(), cpu(), tiny_data, seed=2)
    for name, total, act in (
        ("warm-up", 4, lambda: trainer.warm_up(20)),
        ("validation", 8, lambda: trainer.validate(trainer.track.validation_at(0))),
    ):
        sys.stderr = Terminal()
        act()
        said = sys.stderr.getvalue()
        assert bool(re.search(rf"{name}: .*\d/{total} ", said)) == shown, said
        assert not said.split("\r")[-1].strip(), "gone at the end"


# ----------------------------------------------------------------------------------------------------------------------
# Errors of the user
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(alone, monkeypatch, capfd, tmp_path):
    """command(*options): run the command line in this process -> (exit code, stdout, stderr, logs)."""

    def call(*words, data_dir):
        words = [
            "nano",
            *tiny_options(),
            "--data.rows-per-step",
            "2",
            "--sample-tokens",
            "0",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            *words,
        ]
        words += ["--data-dir", data_dir, "--log-dir", tmp_path / "logs"]
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *(str(word) for word in words)])
        code = 0
        try:
            train_gpt.main()
        except SystemExit as stop:
            code = stop.code
        shown = capfd.readouterr()
        return code, shown.out, shown.err, [path.read_text() for path in (tmp_path / "logs").glob("*.txt")]

    return call


def assert_one_message(code: int, err: str, *parts: str) -> None:
    assert code == 1
    assert err.count("error:") == 1 and "Traceback" not in err
    message = err[err.index("error:") :]
    assert message.count("\n") == 1, "one line, and the last"
    for part in parts:
        assert re.search(part, message), (part, message)


def spoilt(folder: Path, good: Path, split: str, how: str) -> Path:
    shutil.copytree(good, folder)
    path = folder / f"tiny_{split}_000002.bin"
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-100])
    elif how == "magic":
        path.write_bytes(b"\x01\x02\x03\x04" + data[4:])
    elif how == "token":
        path.write_bytes(data[:-402] + b"\x01\x01" + data[-400:])
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("how", "said"), [("truncated", "bytes, but its header says"), ("magic", "expected 20240520")])
def test_a_damaged_shard_stops_the_run_before_it_begins(command, tiny_data, tmp_path, split, how, said):
    """Catches: a run lost at its end to a shard that was bad from the start; a traceback instead of a message."""
    code, _, err, logs = command(data_dir=spoilt(tmp_path / "data", tiny_data, split, how))
    assert_one_message(code, err, rf"tiny_{split}_000002\.bin", said)
    assert not any("step:" in log.split("=" * 100)[-1] for log in logs)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_stops_the_run(command, tiny_data, tmp_path, split):
    """Catches: an IndexError of the embedding, or garbage learnt. The second shard is read in the course of the run."""
    code, _, err, logs = command(data_dir=spoilt(tmp_path / "data", tiny_data, split, "token"))
    assert_one_message(code, err, rf"tiny_{split}_000002\.bin", r"token 257\b", "257 tokens")
    assert split == "val" or logs[0].startswith('"""')  # validation shards are checked before the log begins


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_few_tokens_are_refused_at_once(command, tiny_data, tmp_path, split):
    """Catches: a run that ends in its middle though the headers told. Found and needed numbers are said."""
    shutil.copytree(tiny_data, tmp_path / "data")
    for path in (tmp_path / "data").glob(f"*_{split}_*.bin"):
        write_shard(path, documents([20] * 5))
    code, _, err, _ = command(data_dir=tmp_path / "data")
    advice = f"python data/nano.py --out {re.escape(str(tmp_path / 'data'))}"
    assert_one_message(code, err, "too few tokens", split, r"\b200\b", advice)


def test_shards_that_run_out_on_the_way_end_the_run_and_keep_its_log(command, tiny_data, tmp_path):
    """Catches: a second epoch in silence. The headers suffice here, but long documents are cut to max_doc_len."""
    shutil.copytree(tiny_data, tmp_path / "data")
    for path in (tmp_path / "data").glob("*_train_*.bin"):
        write_shard(path, documents([500] * 60))
    code, _, err, logs = command(data_dir=tmp_path / "data")
    assert_one_message(code, err, "run out", "No data is repeated unless asked for")
    assert logs[0].startswith('"""') and re.search(r"^step:3/20 train_time", logs[0], re.M)
    assert "run out" in logs[0].splitlines()[-1], "the log says why it ends"


def test_a_missing_folder_is_named_with_the_command_that_makes_it(command, tmp_path):
    """Catches: an IndexError on an empty list of shards."""
    code, _, err, logs = command(data_dir=tmp_path / "nothing")
    assert_one_message(code, err, f"python data/nano.py --out {tmp_path / 'nothing'}")
    assert not logs


@pytest.mark.parametrize("when", ["--max-steps 20", "--max-steps 1"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_log(command, tiny_data, when):
    """Catches: hours of training on NaN; a NaN of the last update that ends as "missed" with exit code 0 (with one
    step the training loss is still fine, only the weights are not)."""
    words = ("--optimizer.muon-lr", "1e30", "--optimizer.adam-lr", "1e30", "--val-every", "0", *when.split())
    code, _, err, logs = command(*words, data_dir=tiny_data)
    said = (
        "a weight is not finite on rank 0"
        if when == "--max-steps 1"
        else r"the loss of step \d+ is not finite on rank 0"
    )
    assert_one_message(code, err, said)
    (log,) = logs
    assert log.startswith('"""') and re.search(r"^step:1/20 train_time", log, re.M)
    assert re.search(said, log.split("=" * 100)[-1]), "the log says why it ends"
    assert "peak memory allocated:" not in log.split("=" * 100)[-1]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--max-steps -1", ()),
        ("--data.rows-per-step 0", ()),
        ("--schedule.scheduled-steps 0", ()),
        ("--schedule.stages.0.tokens 101", ("101", "2 equal rows")),
        ("--model.num-layers 0", ("num-layers: found 0",)),
        ("--model.head-dim 6", ("head_dim 6", "multiple of 4")),
        ("--model.num-heads 3", ("num_heads 3", "qk_heads 2")),
        ("--model.skips 3 1", ("later layer",)),
        ("--model.ngrams 2 0", (r"ngrams: found \(2, 0\)", "from 1 to")),
        ("--model.gate-dim 18", ("gate_dim 18", "width 16")),
    ],
)
def test_numbers_that_cannot_work_are_refused_in_a_sentence(command, tiny_data, words, parts):
    """Catches: a ZeroDivisionError or a shape mismatch from deep inside."""
    code, _, err, _ = command(*words.split(), data_dir=tiny_data)
    assert_one_message(code, err, *parts)


def test_a_folder_that_cannot_hold_the_log_is_refused(command, tiny_data, tmp_path):
    """Catches: an OSError's traceback where --log-dir is a file, read-only or full."""
    (tmp_path / "logs").write_text("in the way")
    code, _, err, _ = command(data_dir=tiny_data)
    assert_one_message(code, err, "cannot write the log", "--log-dir")


@pytest.mark.parametrize("folder", ["a file", "below a file", "read-only"])
@pytest.mark.parametrize("option", ["--export", "--save-every 2 --checkpoint-dir", "--save-final --checkpoint-dir"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(command, tiny_data, tmp_path, option, folder):
    """Catches: a traceback after the last step, exit code 0 without the checkpoint that was asked for."""
    (tmp_path / "file").touch()
    places = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "read-only": Path("/proc")}
    if not places[folder].exists() and folder == "read-only":
        pytest.skip("needs a folder that not even root can write to")
    code, out, err, logs = command(*option.split(), places[folder], data_dir=tiny_data)
    assert_one_message(code, err, option.split()[-1], re.escape(str(places[folder])), "cannot be written")
    assert not logs and "step:" not in out


def test_a_folder_of_checkpoints_that_is_not_used_is_not_made(command, tiny_data, tmp_path):
    """Catches: a refusal of, or an empty folder in, a place that the run never writes to."""
    code, *_ = command("--checkpoint-dir", tmp_path / "unused", "--max-steps", "0", data_dir=tiny_data)
    assert code == 0 and not (tmp_path / "unused").exists()


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_refused_before_the_first_step(command, tiny_data, monkeypatch, package):
    """Catches: an ImportError's traceback, and a log without a step that stays behind."""
    find = train_gpt.importlib.util.find_spec
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    code, _, err, logs = command("--track-with", package, data_dir=tiny_data)
    assert_one_message(code, err, f"pip install {package}")
    assert not logs


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_cuda_without_a_gpu_is_refused(command, tiny_data):
    """Catches: a page of torch's traceback for a laptop's most likely mistake."""
    code, _, err, _ = command("--device", "cuda", data_dir=tiny_data)
    assert_one_message(code, err, "no CUDA device", "--device cpu")


def test_the_launcher_learns_the_log_and_the_error(command, tiny_data, tmp_path, monkeypatch):
    """Catches: a torchrun that does not know what was wrong, a run.sh that cannot plot the log."""
    monkeypatch.setenv("TRAIN_GPT_LOG_PATH_FILE", str(tmp_path / "log_path"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    code, *_, logs = command("--max-steps", "1", data_dir=tiny_data)
    assert code == 0 and Path((tmp_path / "log_path").read_text()).read_text() == logs[0]
    assert not (tmp_path / "error").exists()
    _, _, err, _ = command(data_dir=tmp_path / "nothing")
    recorded = json.loads((tmp_path / "error").read_text())["message"]["message"]
    assert recorded == err[err.index("error:") :].strip().removeprefix("error: ")


# ----------------------------------------------------------------------------------------------------------------------
# As processes
# ----------------------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_option_that_helps(tiny_data, tmp_path, alone, capsys, monkeypatch):
    """Catches: a page of traceback, and a message that leaves the user with nothing to try."""

    def train_step(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.61 GiB. GPU 0 has a total capacity of 24")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    folders = ["--data-dir", str(tiny_data), "--log-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "nano", *tiny_options(), *folders, "--loss-chunk", "4096"])
    with pytest.raises(SystemExit) as end:
        train_gpt.main()
    message = capsys.readouterr().err
    assert end.value.code == 1
    assert message.startswith("error: the GPU of process 0 ran out of memory: CUDA out of memory. --loss-chunk (now ")
    assert "Traceback" not in message


IMPORT = """
import os, sys, time
import torch, tyro, tqdm, numpy  # what these do on import is not ours
import torch.nn.attention.varlen
def world():
    return [dict(os.environ), os.listdir(), torch.get_rng_state().tolist(), torch.get_default_dtype(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), sys.argv,
            torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.cuda.is_initialized(),
            torch.distributed.is_available() and torch.distributed.is_initialized()]
before, start = world(), time.process_time()
import train_gpt
assert world() == before
print(time.process_time() - start)
"""


def test_importing_takes_under_3_seconds_and_does_nothing(tmp_path):
    """Catches: a run, a process group, a seed, a thread count or a file made by `import train_gpt`. The time is
    what it adds to that of torch, in CPU seconds: other work on the machine counts for less."""
    script = tmp_path / "import_it.py"
    script.write_text(IMPORT)
    done = run_process([sys.executable, script])
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and re.fullmatch(r"\d+\.\d+\n", done.stdout)
    assert float(done.stdout) < 3


def test_a_damaged_shard_gives_no_traceback_in_a_real_process(tiny_data, tmp_path):
    """Catches: threads that print on their own, warnings at exit, a hang of the background reader."""
    data_dir = spoilt(tmp_path / "data", tiny_data, "train", "token")
    words = [*tiny_options(), "--data-dir", data_dir, "--log-dir", tmp_path / "logs", "--device", "cpu"]
    done = run_process([sys.executable, REPO / "train_gpt.py", "nano", *words], timeout=120)
    assert_one_message(done.returncode, done.stderr, r"tiny_train_000002\.bin", "token 257")


def test_nothing_compiles_after_the_warm_up(tiny_data, monkeypatch):
    """Every stage with its validation and the final one has its graph, as many as `small` has, before the clock starts.

    Catches: a graph per step (a float or a tuple that changes), and torch's limit of 8 graphs per function. The graphs
    are only captured here, not turned into C++: backend="eager".
    """
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    torch._dynamo.reset()
    track = few_rows(val_every=3, val_tokens=7 * 96)  # whole rows only
    trainer = Trainer(track, replace(cpu(), compile=True), tiny_data, seed=0)
    total = track.schedule.total_steps
    trainer.warm_up(total)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2 * len(track.schedule.stages) + 3  # training and validation per stage and extension, and the last
    for step in range(total):
        if step % 3 == 0:
            trainer.validate(track.validation_at(step))
        trainer.train_step(step)
    trainer.validate(track.validation_at(total))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_losses_equal_eager_ones(tiny_data):
    """Catches: a graph break (fullgraph), or a compiled path that computes something else, across stages."""
    track = few_rows()
    track = replace(track, model=replace(track.model, num_layers=1))
    eager, compiled = (Trainer(track, replace(cpu(), compile=c), tiny_data, seed=0) for c in (False, True))
    assert steps(compiled, 0, 2) == pytest.approx(steps(eager, 0, 2), rel=1e-5)
    settings = track.validation_at(2)
    assert compiled.validate(settings) == pytest.approx(eager.validate(settings), rel=1e-5)
