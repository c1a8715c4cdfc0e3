"""records/ablate.py: its variants are what they are called, its table is right, and it goes on where it stopped."""

import functools
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO, tiny_options
from scipy import stats

import ablate
import train_gpt
from ablate import FULL, VARIANTS, Result
from runlogs import LogError, parse_log

LINE = "=" * 100


@functools.cache
def track_of(variant: str) -> train_gpt.Track:
    return train_gpt.parse_command(["nano", *VARIANTS[variant].split()])[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_value_of_the_track(variant):
    """Catches: an option that has another name by now, or that changes nothing because it is the default."""
    assert (track_of(variant) != train_gpt.NANO) == (variant != FULL)
    train_gpt.GPT(track_of(variant).model, train_gpt.Runtime("cpu"))


def test_variants_that_change_the_batch_or_the_tying_do_so():
    steps = range(train_gpt.NANO.schedule.total_steps)

    def settings_of(variant: str) -> list[train_gpt.Settings]:
        return [track_of(variant).at(step) for step in steps]

    tokens = lambda variant: sum(at.stage.tokens for at in settings_of(variant))
    assert tokens("with growth of the batch") == pytest.approx(tokens(FULL), rel=2e-2)
    assert all(at.tied for at in settings_of("always tied"))
    assert not any(at.tied for at in settings_of("never tied")[2:])
    assert len({at.frequencies for at in settings_of("no YaRN")}) == 1
    assert {at.prediction_weights for at in settings_of(FULL)} == {(1.0,)}
    assert {len(at.prediction_weights) for at in settings_of("with multi-token prediction")} == {1, 2, 3}


def made_log(path: Path, losses: list[float], seed: int = 0, source: str | None = None, end: bool = True) -> Path:
    """A complete log with validations every 50 steps, 10 s apart."""
    source = (REPO / "train_gpt.py").read_text() if source is None else source
    total = 50 * (len(losses) - 1)
    lines = [source, LINE, "target_loss: 1.22", f"seed: {seed}", "CPU: Some CPU", LINE]
    for i, loss in enumerate(losses):
        lines.append(f"step:{50 * i}/{total} val_loss:{loss:.4f} train_time:{10000 * i}ms step_avg:200.00ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines + ["peak memory allocated: 9 MiB reserved: 9 MiB"] * end) + "\n")
    return path


@pytest.mark.parametrize(
    ("losses", "seconds"), [((5.5, 2.0, 1.32, 1.12), 25.0), ((5.5, 1.22, 1.1), 10.0), ((5.5, 1.4, 1.3), None)]
)
def test_time_to_target_is_interpolated(tmp_path, losses, seconds):
    log = parse_log(made_log(tmp_path / "run.txt", list(losses)))
    assert ablate.seconds_to_target(log) == (None if seconds is None else pytest.approx(seconds))


def test_only_complete_logs_of_this_source_count(tmp_path):
    """Catches: a cut-off run in the table; results of two versions of train_gpt.py mixed."""
    folder = ablate.folder_of(FULL, tmp_path)
    made_log(folder / "a.txt", [5.5, 1.3, 1.2], seed=0)
    made_log(folder / "b.txt", [5.5, 1.3, 1.1], seed=1, end=False)
    ours = ablate.digest((REPO / "train_gpt.py").read_text())
    assert ablate.find_results(tmp_path) == [Result(FULL, 0, 1.2, 20.0, pytest.approx(18.0), ours, "Some CPU")]
    made_log(folder / "c.txt", [5.5, 1.3, 1.2], seed=2, source="print('another')")
    with pytest.raises(LogError, match=r"c\.txt is of another train_gpt\.py"):
        ablate.find_results(tmp_path)


def test_the_table_pairs_by_seed_and_survives_the_csv(tmp_path):
    """Against scipy's paired test on fixed numbers."""
    full, other = [1.00, 1.10, 1.05], [1.08, 1.12, 1.15]
    made = dict(source="0123456789ab", cpu="Some CPU, 2 threads")
    results = [Result(FULL, seed, loss, 100.0, 90.0, **made) for seed, loss in enumerate(full)]
    results += [
        Result("no smear", seed, loss, 110.0, None if seed else 99.0, **made) for seed, loss in enumerate(other)
    ]
    results += [Result("no skip", 7, 1.0, 100.0, 80.0)]  # no run of the full recipe to pair it with
    ablate.write_csv(results, tmp_path / "ablation.csv")
    assert ablate.read_csv(tmp_path / "ablation.csv") == results
    *_, first, second = ablate.table(results).splitlines()
    p = stats.ttest_rel(other, full).pvalue
    change = statistics.mean(other) - statistics.mean(full)
    assert first == f"| {FULL} | 3 | 1.0500 |  |  | 90 s | 1.00 |"
    assert second == f"| no smear | 3 | 1.1167 | {change:+.4f} | {p:.2g} | 99 s (1 of 3 runs) | 1.10 |"
    moved = [replace(r, cpu="Another") if r.variant == FULL else r for r in results]
    *_, second = ablate.table(moved).splitlines()  # times of two machines do not compare, losses do
    assert second == f"| no smear | 3 | 1.1167 | {change:+.4f} | {p:.2g} | – | – |"


def command(monkeypatch, capsys, *words: str) -> tuple[object, str]:
    """What a command line ends with (None: well) and prints."""
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, words)])
    try:
        ablate.main()
        code = None
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def published(folder: Path, source: str) -> list[Result]:
    """Three variants, one of which has another name by now, as a clone has them: without logs."""
    rows = [
        Result(variant, seed, 1.1 + 0.01 * seed, 20.0, 18.0, source, "Some CPU")
        for variant in (FULL, "no smear", "no spare part")
        for seed in range(2)
    ]
    folder.mkdir()
    ablate.write_csv(rows, folder / "ablation.csv")
    (folder / "ablation.md").write_text(ablate.report(rows))
    return rows


@pytest.mark.parametrize("source", ["", "0123456789ab"])
def test_the_table_of_a_clone_stays_as_it_is(tmp_path, monkeypatch, capsys, source):
    """Catches: `--table` that empties the published files where the logs are not there, or drops a variant."""
    published(tmp_path / "out", source)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, out = command(monkeypatch, capsys, "--table", "--out", tmp_path / "out")
    assert code is None and out.count("| 2 |") == 3 and "| no spare part | 2 |" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    code, _ = command(monkeypatch, capsys, "--table", "--out", tmp_path)
    assert "ablation.csv has no rows" in code and not (tmp_path / "ablation.md").exists()


def trained(monkeypatch, folder: Path, losses: dict[tuple[str, int], float]) -> None:
    """Runs, when they are started, leave logs with these final losses."""

    def run(variant: str, seed: int, out: Path, *_) -> None:
        made_log(ablate.folder_of(variant, out) / f"{seed}.txt", [5.5, 1.3, losses[variant, seed]], seed)

    monkeypatch.setattr(ablate, "run", run)
    monkeypatch.setattr(ablate, "PUBLISHED", folder)


def test_runs_change_their_own_rows_only(tmp_path, monkeypatch, capsys):
    """Catches: `--only` and a single seed that overwrite the rows of all others."""
    before = published(tmp_path / "out", ablate.digest((REPO / "train_gpt.py").read_text()))
    trained(monkeypatch, tmp_path / "out", {(FULL, 0): 1.2, ("no smear", 0): 1.21, ("no YaRN", 0): 1.22})
    only = ("--only", "no smear", "no YaRN", "--seeds", 1, "--out", tmp_path / "out")
    code, out = command(monkeypatch, capsys, *only)
    assert code is None and "| no YaRN | 1 | 1.2200 |" in out and "| no spare part | 2 |" in out
    after = {(r.variant, r.seed): r for r in ablate.read_csv(tmp_path / "out" / "ablation.csv")}
    assert {key: after[key].loss for key in after if key[1] == 0 and key[0] != "no spare part"} == {
        (FULL, 0): 1.2,
        ("no smear", 0): 1.21,
        ("no YaRN", 0): 1.22,
    }
    assert [after[r.variant, r.seed] for r in before[1::2]] == before[1::2] and len(after) == 7
    code, _ = command(monkeypatch, capsys, *only, "--extra", "--model.num-layers", "1")
    assert "runs with --extra are not of the published table" in code


def test_rows_of_another_source_are_not_mixed_or_dropped_silently(tmp_path, monkeypatch, capsys):
    """Catches: a table of two versions of train_gpt.py; published rows that are gone after a partial run."""
    folder = tmp_path / "out"
    before = published(folder, "0123456789ab")
    trained(monkeypatch, folder, {(FULL, 0): 1.2, ("no smear", 0): 1.21})
    words = ("--only", "no smear", "--seeds", 1, "--out")
    code, _ = command(monkeypatch, capsys, *words, folder)
    assert "has 6 rows of another train_gpt.py (0123456789ab, ours is" in code and "--force" in code
    assert not (folder / "logs").exists() and ablate.read_csv(folder / "ablation.csv") == before
    code, out = command(monkeypatch, capsys, *words, tmp_path / "mine")
    assert code is None and "| no smear | 1 |" in out and ablate.read_csv(folder / "ablation.csv") == before
    code, out = command(monkeypatch, capsys, *words, folder, "--force")
    assert code is None and [r.loss for r in ablate.read_csv(folder / "ablation.csv")] == [1.2, 1.21]


def test_what_is_complete_counts_when_it_is_interrupted(tmp_path, monkeypatch, capsys):
    """Catches: Ctrl-C that leaves complete runs out of the CSV, or takes published rows away, even with --force."""
    before = published(tmp_path / "out", "0123456789ab")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "run_all", interrupted)
    code, _ = command(monkeypatch, capsys, "--out", tmp_path / "out", "--force")
    assert code.startswith("interrupted") and ablate.read_csv(tmp_path / "out" / "ablation.csv") == before
    made_log(ablate.folder_of(FULL, tmp_path / "mine") / "0.txt", [5.5, 1.3, 1.2])
    command(monkeypatch, capsys, "--out", tmp_path / "mine")
    assert [r.loss for r in ablate.read_csv(tmp_path / "mine" / "ablation.csv")] == [1.2]


def test_it_trains_what_is_missing_and_keeps_what_is_there(tiny_data, tmp_path):
    """The command, on the tiny track: two runs, a table, and nothing left to do on the second call."""
    command = [sys.executable, REPO / "records" / "ablate.py", "--seeds", "1", "--only", "no smear", "--out", tmp_path]
    extra = [
        "--extra",
        *tiny_options(),
        "--data.rows-per-step",
        1,
        "--data-dir",
        tiny_data,
        "--device",
        "cpu",
        "--val-every",
        20,
    ]
    calls = [
        subprocess.run([*map(str, [*command, *extra])], capture_output=True, text=True, timeout=300) for _ in range(2)
    ]
    for call in calls:
        assert call.returncode == 0, call.stderr
        assert "| full recipe | 1 |" in call.stdout and "| no smear | 1 |" in call.stdout
    assert calls[0].stdout == calls[1].stdout
    logs = [parse_log(path) for path in (tmp_path / "logs").rglob("*.txt")]
    assert [log.settings["inductor"] for log in logs] == ["{}", "{}"]  # which records/check.py wants
    assert "./run.sh nano --model.no-smear" in (tmp_path / "ablation.md").read_text()
    events = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(events) == 2 * (1 + 20)  # the validation before the first step, and every step


def test_a_run_that_fails_is_reported_and_the_others_go_on(tiny_data, tmp_path):
    command = [sys.executable, REPO / "records" / "ablate.py", "--seeds", "1", "--only", "no smear", "--out", tmp_path]
    done = subprocess.run([*map(str, command), "--extra", "--data-dir", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "2 runs failed" in done.stderr and "no shard" in done.stderr
