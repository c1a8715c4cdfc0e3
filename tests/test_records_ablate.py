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
from ablate import FULL, Result
from runlogs import parse_log

LINE = "=" * 100
VARIANTS = ablate.VARIANTS["nano"]
OURS = ablate.digest((REPO / "train_gpt.py").read_text())


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
    assert tokens("no growth of the batch") == pytest.approx(tokens(FULL), rel=2e-2)
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


@pytest.mark.parametrize("end", [True, False])
def test_only_a_run_that_reached_its_last_step_counts(tmp_path, monkeypatch, end):
    """Catches: a run in the table that --max-steps ended; the log of an interrupted attempt taken for the run's."""

    def process(command, **_):
        folder = Path(command[command.index("--log-dir") + 1])
        path = made_log(folder / "20260102.txt", [5.5, 1.3, 1.2], seed=3)
        path.write_text(path.read_text() if end else path.read_text().replace("step:100/", "step:90/"))
        return subprocess.CompletedProcess(command, 0, stdout="")

    made_log(tmp_path / "logs" / "no_n_grams_3" / "20260101.txt", [5.5, 1.4, 1.3], seed=3)
    monkeypatch.setattr(subprocess, "run", process)
    if end:
        expected = Result("no n-grams", 3, 1.2, 20.0, pytest.approx(18.0), OURS, "Some CPU")
        assert ablate.run("nano", "no n-grams", 3, tmp_path, 1, []) == expected
    else:
        with pytest.raises(RuntimeError, match=r"20260102\.txt is incomplete"):
            ablate.run("nano", "no n-grams", 3, tmp_path, 1, [])


def write_csv(results: list[Result], path: Path) -> None:
    for result in results:
        ablate.append(result, path)


def test_the_table_pairs_by_seed_and_survives_the_csv(tmp_path):
    """Against scipy's paired test on fixed numbers."""
    full, other = [1.00, 1.10, 1.05], [1.08, 1.12, 1.15]
    made = dict(source="0123456789ab", cpu="Some CPU, 2 threads")
    results = [Result(FULL, seed, loss, 100.0, 90.0, **made) for seed, loss in enumerate(full)]
    results += [
        Result("no n-grams", seed, loss, 110.0, None if seed else 99.0, **made) for seed, loss in enumerate(other)
    ]
    results += [Result("no skip", 7, 1.0, 100.0, 80.0)]  # no run of the full recipe to pair it with
    write_csv(results, tmp_path / "ablation.csv")
    assert ablate.read_csv(tmp_path / "ablation.csv", Result) == results
    *_, first, second = ablate.table(results).splitlines()
    p = stats.ttest_rel(other, full).pvalue
    change = statistics.mean(other) - statistics.mean(full)
    assert first == f"| {FULL} | 3 | 1.0500 |  |  | 90 s | 1.00 |"
    assert second == f"| no n-grams | 3 | 1.1167 | {change:+.4f} | {p:.2g} | 99 s (1 of 3 runs) | 1.10 |"
    moved = [replace(r, cpu="Another") if r.variant == FULL else r for r in results]
    *_, second = ablate.table(moved).splitlines()  # times of two machines do not compare, losses do
    assert second == f"| no n-grams | 3 | 1.1167 | {change:+.4f} | {p:.2g} | – | – |"


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
        for variant in (FULL, "no n-grams", "no spare part")
        for seed in range(2)
    ]
    folder.mkdir()
    write_csv(rows, folder / "ablation.csv")
    (folder / "ablation.md").write_text(ablate.report("nano", rows))
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


def trained(monkeypatch, losses: dict[tuple[str, int], float]) -> None:
    """Runs end with these losses; one that is not among them is interrupted."""

    def run(track: str, variant: str, seed: int, *_) -> Result:
        if (variant, seed) not in losses:
            raise KeyboardInterrupt
        return Result(variant, seed, losses[variant, seed], 20.0, 18.0, OURS, "Some CPU")

    monkeypatch.setattr(ablate, "run", run)


def test_runs_add_their_own_rows_only(tmp_path, monkeypatch, capsys):
    """Catches: `--only` and a single seed that touch the rows of all others; a run that is there trained again."""
    before = published(tmp_path / "out", OURS)
    trained(monkeypatch, {("no YaRN", 0): 1.22})
    only = ("--only", "no n-grams", "no YaRN", "--seeds", 1, "--out")
    code, out = command(monkeypatch, capsys, "nano", *only, tmp_path / "out")
    assert code is None and "| no YaRN | 1 | 1.2200 |" in out and "| no spare part | 2 |" in out
    *others, new = ablate.read_csv(tmp_path / "out" / "ablation.csv", Result)
    assert others == before and (new.variant, new.seed, new.loss) == ("no YaRN", 0, 1.22)
    code, _ = command(monkeypatch, capsys, *only, REPO / "records" / "nano" / "ablation", "--extra", "--val-every", "1")
    assert "runs with --extra are not of the published table" in code
    code, _ = command(monkeypatch, capsys, "--only", "no spare part")
    assert code == 2  # argparse has said why


def test_rows_of_another_source_are_not_mixed_or_dropped_silently(tmp_path, monkeypatch, capsys):
    """Catches: a table of two versions of train_gpt.py; published rows that are gone after a partial run."""
    folder = tmp_path / "out"
    before = published(folder, "0123456789ab")
    trained(monkeypatch, {(FULL, 0): 1.2, ("no n-grams", 0): 1.21})
    words = ("--only", "no n-grams", "--seeds", 1, "--out")
    code, _ = command(monkeypatch, capsys, *words, folder)
    assert "has 6 rows of another train_gpt.py (0123456789ab, ours is" in code and "--out FOLDER" in code
    assert ablate.read_csv(folder / "ablation.csv", Result) == before
    code, out = command(monkeypatch, capsys, *words, tmp_path / "mine")
    assert code is None and "| no n-grams | 1 |" in out
    edited = lambda track, variant, seed, *_: Result(variant, seed, 1.2, 20.0, 18.0, "edited meanwhile")
    monkeypatch.setattr(ablate, "run", edited)
    code, _ = command(monkeypatch, capsys, *words[:-2], 2, "--out", tmp_path / "mine")
    assert "has 2 rows of another train_gpt.py (edited meanwhile" in code


def test_what_is_complete_counts_when_it_is_interrupted(tmp_path, monkeypatch, capsys):
    """Catches: Ctrl-C that leaves complete runs out of the CSV, or that takes rows away which were there."""
    before = published(tmp_path / "out", OURS)
    trained(monkeypatch, {(FULL, 2): 1.2})
    code, _ = command(monkeypatch, capsys, "--only", "no n-grams", "--out", tmp_path / "out")
    assert code.startswith("interrupted")
    *others, new = ablate.read_csv(tmp_path / "out" / "ablation.csv", Result)
    assert others == before and (new.variant, new.seed, new.loss) == (FULL, 2, 1.2)


def test_it_trains_what_is_missing_and_keeps_what_is_there(tiny_data, tmp_path):
    """The command, on the tiny track: two runs, a table, and nothing left to do on the second call."""
    command = [
        sys.executable,
        REPO / "records" / "ablate.py",
        "--seeds",
        "1",
        "--only",
        "no n-grams",
        "--out",
        tmp_path,
    ]
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
        assert "| full recipe | 1 |" in call.stdout and "| no n-grams | 1 |" in call.stdout
    assert calls[0].stdout == calls[1].stdout
    logs = [parse_log(path) for path in (tmp_path / "logs").rglob("*.txt")]
    assert [log.settings["inductor"] for log in logs] == ["{}", "{}"]  # which records/check.py wants
    assert "./run.sh nano --model.ngrams" in (tmp_path / "ablation.md").read_text()
    events = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(events) == 2 * (1 + 20)  # the validation before the first step, and every step


def test_a_run_that_fails_is_reported_and_the_others_go_on(tiny_data, tmp_path):
    command = [
        sys.executable,
        REPO / "records" / "ablate.py",
        "--seeds",
        "1",
        "--only",
        "no n-grams",
        "--out",
        tmp_path,
    ]
    done = subprocess.run([*map(str, command), "--extra", "--data-dir", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "2 runs failed" in done.stderr and "no shard" in done.stderr
