"""records/plot.py and the parser behind it, records/runlogs.py, on made logs in the field's format."""

import io
import subprocess
import sys
from datetime import date
from pathlib import Path

import matplotlib.dates
import matplotlib.image
import numpy as np
import pytest

import plot
from plot import Record, RunSet, curve, draw_history, draw_runs, leaps, mean_and_range, read_history, running_mean
from runlogs import LogError, finite, parse_log

SCRIPT = Path(__file__).resolve().parents[1] / "records" / "plot.py"
LINE = "=" * 100
SCHEDULE = """schedule.scheduled_steps: 400
schedule.stages.0.tokens: 1000
schedule.stages.1.tokens: 3000
schedule.extension.tokens: 5000"""


def make_log(
    path: Path,
    steps: int = 500,
    settings: str = "target_loss: 1.22",
    source: str = "print('hello')",
    total: int | None = None,
    shift: float = 0.0,
    ms: int = 50,
    val_every: int = 250,
    train_every: int = 10,
) -> Path:
    """A log whose losses are simple functions of the step: train 6 - step/100, val 0.25 above that."""
    total = steps if total is None else total
    lines = [source, LINE, "Running PyTorch 2.13.0", settings, "train_loss: not a log line", LINE]
    for step in range(steps + 1):
        clock = f"train_time:{ms * step}ms step_avg:{ms:.2f}ms"
        if (val_every and step % val_every == 0) or step == total:
            lines.append(f"step:{step}/{total} val_loss:{6.25 - step / 100 + shift:.4f} {clock}")
        if step and train_every and step % train_every == 0:
            lines.append(f"step:{step}/{total} train_loss:{6 - step / 100 + shift:.4f} {clock}")
        elif step:
            lines.append(f"step:{step}/{total} {clock}")
    lines.append("peak memory allocated: 100 MiB reserved: 200 MiB")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def make_seeds(folder: Path, num_runs: int = 3, **options) -> Path:
    """A folder of runs whose losses lie 0, 0.4, 0.8… above those of make_log, one faster than the next."""
    for seed in range(num_runs):
        make_log(folder / f"{seed}.txt", shift=0.4 * seed, ms=50 + 10 * seed, **options)
    return folder


def run_set(folder: Path, name: str = "set", smoothing: int = 1) -> RunSet:
    return RunSet(name, [parse_log(path) for path in sorted(folder.glob("*.txt"))], smoothing)


@pytest.fixture
def command(monkeypatch, capsys):
    """`python records/plot.py …` in this process: its output, or the message with which it stops."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            plot.main()
        except SystemExit as stop:
            return str(stop)
        return capsys.readouterr().out

    return run


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def legend(figure) -> list[str]:
    owner = figure.legends[0] if figure.legends else figure.axes[0].get_legend()
    return [text.get_text() for text in owner.get_texts()]


# ---- runlogs: what a log says ----


def test_parse_log_reads_every_loss_line(tmp_path: Path):
    """Catches a wrong unit of time, train and val mixed up, lines lost."""
    log = parse_log(make_log(tmp_path / "run.txt", steps=520))
    val = [(event.step, event.seconds, event.val_loss) for event in log.val]
    assert val == [(0, 0.0, 6.25), (250, 12.5, 3.75), (500, 25.0, 1.25), (520, 26.0, 1.05)]
    assert [event.step for event in log.train] == list(range(10, 521, 10))
    assert (log.train[0].seconds, log.train[0].train_loss) == (0.5, 5.9)
    assert (log.total_steps, log.target, log.final) == (520, 1.22, log.val[-1])


def test_parse_log_takes_nothing_from_the_source(tmp_path: Path):
    """The source at the top of a log may show log lines and settings of its own."""
    source = "step:7/9 val_loss:1.0 train_time:1ms step_avg:1ms\ntarget_loss: 9.99"
    log = parse_log(make_log(tmp_path / "run.txt", source=source))
    assert log.source == source + "\n"
    assert log.target == 1.22 and log.total_steps == 500 and log.val[0].step == 0


def test_parse_log_reads_other_dialects(tmp_path: Path):
    """llm.c's lines, carriage returns, seconds, fields of other logs; losses that are not finite are kept apart."""
    lines = [
        "source",
        LINE,
        "environment",
        LINE,
        "s:0 tel:10.8",
        "step:1/20 train_loss:nan train_time:5ms step_avg:nanms",
        "step:2/20 train_loss:inf train_time:10ms step_avg:5.00ms",
        "step:3/20 train_loss:4.5 lr:0.02 train_time:15.5ms step_avg:5.17ms",
        "some warning",
        "step:4/20 val_loss:4.25 train_time:2.5s",
    ]
    path = tmp_path / "run.txt"
    path.write_bytes("\r\n".join(lines).encode())
    log = parse_log(path)
    assert [(event.step, event.seconds, loss) for event, loss in finite(log.events, "val_loss")] == [
        (0, None, 10.8),
        (4, 2.5, 4.25),
    ]
    assert [(event.step, event.seconds, loss) for event, loss in finite(log.events, "train_loss")] == [(3, 0.0155, 4.5)]
    assert log.notes == ["some warning"]


@pytest.mark.parametrize(
    ("step", "tokens"), [(0, 0), (100, 100_000), (200, 200_000), (201, 203_000), (400, 800_000), (402, 810_000)]
)
def test_tokens_follow_the_stages(tmp_path: Path, step: int, tokens: int):
    assert parse_log(make_log(tmp_path / "run.txt", settings=SCHEDULE)).tokens_at(step) == tokens


# ---- curves ----


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path):
    path = make_log(tmp_path / "run.txt", steps=30)
    path.write_text(path.read_text().replace("train_loss:5.8000", "train_loss:nan"))
    assert curve(parse_log(path), "train_loss", "step") == ([10, 30], [10, 30], [5.9, 5.7])


def test_a_curve_over_tokens_counts_stages_of_different_size(tmp_path: Path):
    """Catches a tokens axis that is only a scaled step axis."""
    log = parse_log(make_log(tmp_path / "run.txt", steps=400, settings=SCHEDULE, val_every=200))
    assert curve(log, "val_loss", "tokens")[1] == [0, 200_000, 800_000]


def test_a_running_mean_neither_lags_nor_bends_a_straight_line():
    line = [3.0 - 0.5 * i for i in range(9)]
    assert running_mean(line, 5) == line
    assert running_mean([0.0, 0.0, 5.0, 0.0, 0.0], 5) == [0.0, 5 / 3, 1.0, 5 / 3, 0.0]
    assert running_mean([], 5) == [] and running_mean([2.0], 5) == [2.0]


def test_the_band_holds_the_mean(tmp_path: Path):
    """Against the known straight lines of three seeds, at their mean time."""
    runs = run_set(make_seeds(tmp_path / "a"))
    place, mean, low, high = mean_and_range([curve(log, "train_loss", "seconds") for log in runs.logs])
    steps = np.arange(10, 501, 10)
    np.testing.assert_allclose(place, 0.06 * steps)
    np.testing.assert_allclose(low, 6 - steps / 100)
    np.testing.assert_allclose(mean, 6 - steps / 100 + 0.4)
    np.testing.assert_allclose(high, 6 - steps / 100 + 0.8)


def test_runs_of_a_set_may_log_at_other_steps_and_end_earlier(tmp_path: Path):
    """The mean keeps to the steps that all have, or it would jump where one ends."""
    make_log(tmp_path / "a" / "0.txt", steps=100)
    make_log(tmp_path / "a" / "1.txt", steps=90, train_every=30, shift=0.5)
    runs = run_set(tmp_path / "a")
    place, mean, low, high = mean_and_range([curve(log, "train_loss", "step") for log in runs.logs])
    assert list(place) == [30, 40, 50, 60, 70, 80, 90]
    np.testing.assert_allclose(mean, 6.25 - place / 100)
    np.testing.assert_allclose(high - low, 0.5)


def test_loss_range_keeps_everything_of_a_short_run_and_the_target(tmp_path: Path):
    bottom, top = plot.loss_range([parse_log(make_log(tmp_path / "run.txt", steps=30))])
    assert bottom < 1.22 and top > 6.25


# ---- pictures of runs ----


def test_draws_a_picture_beside_the_log_without_torch(tmp_path: Path):
    """As run.sh calls it; to import torch, train_gpt or pyplot would take longer than to draw."""
    path = make_log(tmp_path / "my logs" / "run.1.txt")
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), str(path)], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == f"plot: {path.with_suffix('.png')}\n"
    assert png_size(path.with_suffix(".png")) == (1500, 660)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "matplotlib" in imported and not imported & {"torch", "train_gpt", "matplotlib.pyplot"}


def test_the_picture_shows_the_curves_in_every_panel(tmp_path: Path, command):
    """Catches an empty picture: each third has pixels of each curve's colour."""
    command(make_log(tmp_path / "run.txt", settings=SCHEDULE))
    pixels = (matplotlib.image.imread(tmp_path / "run.png")[..., :3] * 255).astype(int)
    for third in np.array_split(pixels[100:], 3, axis=1):
        validation = np.abs(third - np.array([0xD5, 0x5E, 0x00])).max(axis=-1) < 8
        training = np.abs(third - (0.6 * np.array([0x00, 0x72, 0xB2]) + 0.4 * 255)).max(axis=-1) < 25
        assert validation.sum() > 200
        assert training.sum() > 200


def test_there_is_a_panel_for_each_axis_that_all_logs_have(tmp_path: Path):
    """Tokens need the schedule of every step, seconds a clock, which logs of llm.c lack."""
    ours = parse_log(make_log(tmp_path / "ours.txt", settings=SCHEDULE))
    public = parse_log(make_log(tmp_path / "public.txt", settings=""))
    longer = parse_log(make_log(tmp_path / "longer.txt", settings=SCHEDULE.rpartition("\n")[0]))
    (tmp_path / "llmc.txt").write_text("s:0 tel:11.0\ns:1 trl:10.9\ns:250 tel:6.0\n")
    llmc = parse_log(tmp_path / "llmc.txt")
    for logs, axes in (
        ([ours], ["step", "training tokens", "training time (s)"]),
        ([ours, public], ["step", "training time (s)"]),
        ([longer], ["step", "training time (s)"]),
        ([ours, llmc], ["step"]),
    ):
        figure = draw_runs([RunSet(log.path.stem, [log]) for log in logs])
        assert [panel.get_xlabel() for panel in figure.axes] == axes


def test_the_tokens_panel_ends_at_the_tokens_of_the_run(tmp_path: Path):
    log = parse_log(make_log(tmp_path / "run.txt", steps=400, settings=SCHEDULE))
    lines = draw_runs([RunSet("run", [log])]).axes[1].get_lines()
    assert max(max(line.get_xdata()) for line in lines if len(line.get_xdata())) == 800_000


def test_a_single_run_has_a_point_for_each_validation(tmp_path: Path):
    log = parse_log(make_log(tmp_path / "run.txt"))
    points = [line for line in draw_runs([RunSet("run", [log])]).axes[0].get_lines() if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in points if len(line.get_xdata())] == [[0, 250, 500]]


def test_out_draws_all_logs_into_one_picture(tmp_path: Path, command):
    one, two = make_log(tmp_path / "one.txt"), make_log(tmp_path / "two.txt", steps=300)
    assert command(one, two, "--out", tmp_path / "both.png") == f"plot: {tmp_path / 'both.png'}\n"
    assert {path.name for path in tmp_path.glob("*.png")} == {"both.png"}
    command(one, two)
    assert {path.name for path in tmp_path.glob("*.png")} == {"both.png", "one.png", "two.png"}


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1}, {"train_every": 0}])
def test_short_runs_and_runs_without_training_losses_can_be_drawn(tmp_path: Path, options: dict, command):
    command(make_log(tmp_path / "run.txt", **options))
    png_size(tmp_path / "run.png")


def test_a_run_that_ended_early_says_where(tmp_path: Path):
    log = parse_log(make_log(tmp_path / "run.txt", steps=300, total=500))
    assert "run: 3.7500 at step 250 of 500" in legend(draw_runs([RunSet("run", [log])]))


def test_sets_are_drawn_as_mean_and_band_with_their_finals_in_the_legend(tmp_path: Path, command):
    """Three seeds and one, with validations during the run and only at its end."""
    make_seeds(tmp_path / "a", val_every=0)
    one = make_log(tmp_path / "b.txt", steps=700)
    sets = ["--set", "A, many", tmp_path / "a", "--set", "B", one]
    assert command(*sets, "--out", tmp_path / "sets.png") == f"plot: {tmp_path / 'sets.png'}\n"
    assert png_size(tmp_path / "sets.png") == (1500, 660)
    figure = draw_runs([run_set(tmp_path / "a", "A, many", 5), RunSet("B", [parse_log(one)], 5)])
    # Finals 1.25, 1.65, 2.05 after 25, 30, 35 s: their mean, sample deviation and mean time.
    assert legend(figure) == ["A, many: 1.6500 ± 0.4000 (n=3), 30.0 s", "B: -0.7500, 35.0 s", "target 1.22"]
    for panel, last in zip(figure.axes, (500, 30), strict=True):
        (band,) = panel.collections
        assert band.get_datalim(panel.transData).x1 == pytest.approx(last)
    assert "running mean of 5" in figure.get_supxlabel()


def test_an_unfinished_run_does_not_bend_the_mean_of_a_set(tmp_path: Path):
    make_seeds(tmp_path / "a", num_runs=2)
    make_log(tmp_path / "a" / "9.txt", steps=260, total=500, shift=3)
    runs = run_set(tmp_path / "a")
    assert [log.path.stem for log in runs.drawn()] == ["0", "1"]
    assert runs.label() == "set: 1.4500 ± 0.2828 (n=2), 27.5 s; 1 unfinished left out"
    (tmp_path / "a" / "0.txt").unlink()
    (tmp_path / "a" / "1.txt").unlink()
    assert draw_runs([run_set(tmp_path / "a")]).axes


def test_a_set_may_hold_finals_without_a_time(tmp_path: Path):
    make_seeds(tmp_path / "a", num_runs=2)
    path = tmp_path / "a" / "1.txt"
    path.write_text(path.read_text().replace("val_loss:1.6500 train_time:30000ms step_avg:60.00ms", "val_loss:1.6500"))
    assert len(draw_runs([run_set(tmp_path / "a")]).axes) == 2


def test_the_same_logs_give_the_same_bytes(tmp_path: Path, command):
    make_seeds(tmp_path / "a")
    for name in ("1.png", "2.png"):
        command("--set", "A", tmp_path / "a", "--out", tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert b"Matplotlib" not in (tmp_path / "1.png").read_bytes()


# ---- history ----


def test_the_history_has_a_point_for_each_dated_record():
    rows = [line.split(",") for line in plot.HISTORY.read_text(encoding="utf-8").splitlines()[1:]]
    records = read_history(plot.HISTORY)
    assert len(records) == len(rows) and sum(r.date is not None for r in records) == sum(row[3] != "" for row in rows)
    (panel,) = draw_history(records).axes
    points = [line for line in panel.get_lines() if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in points) == sum(r.date is not None for r in records) > 100
    small = [(r.date, r.seconds) for r in records if r.track == "small" and r.status == "record"]
    assert list(zip(points[0].get_xdata(), points[0].get_ydata(), strict=True)) == small
    days = matplotlib.dates.date2num([r.date for r in records if r.date])
    assert panel.get_xlim()[0] < min(days) and panel.get_xlim()[1] > max(days)


def test_what_is_no_record_is_drawn_as_what_it_is(tmp_path: Path):
    """Catches: an open submission on the line of records or counted as one; one without a day that is left out."""
    path = tmp_path / "history.csv"
    lines = ["small,1,100,2026-01-02,first,,record", "small,2,80,2026-02-03,second,,record"]
    lines += ["small,#7,70,,third,,merged after record 2", "small,#9,40,2026-03,fourth; more,,open submission"]
    path.write_text("\n".join(["track,record,seconds,date,change,contributors,status", *lines]) + "\n")
    records = read_history(path)
    assert records[3] == Record("small", 9, 40.0, date(2026, 3, 15), "fourth; more", "open submission")
    (panel,) = draw_history(records).axes
    best, points, hollow, *_ = panel.get_lines()
    assert [*best.get_ydata()] == [*points.get_ydata()] == [100, 80]
    assert [*hollow.get_ydata()] == [40] and hollow.get_markerfacecolor() == "white"
    assert {text.get_text() for text in panel.texts} == {"first", "second", "#9, open submission: fourth"}
    legend = [text.get_text() for text in panel.get_legend().get_texts()]
    assert legend == ["small: 100 s → 80 s in 2 records", "#7, merged after record 2: 70 s, day not known"]


def test_the_history_is_drawn_at_the_size_of_a_readme(tmp_path: Path, command):
    assert command("--history", "--out", tmp_path / "history.png") == f"plot: {tmp_path / 'history.png'}\n"
    assert png_size(tmp_path / "history.png") == (1600, 700)


def test_the_picture_of_the_history_is_up_to_date():
    """records/history.png belongs to records/history.csv, whatever the version of matplotlib does to single pixels."""
    content = io.BytesIO()
    draw_history(read_history(plot.HISTORY)).savefig(content, metadata={"Software": None})
    content.seek(0)
    fresh, kept = matplotlib.image.imread(content), matplotlib.image.imread(plot.HISTORY.with_suffix(".png"))
    assert fresh.shape == kept.shape and np.abs(fresh - kept).mean() < 0.01


def test_names_of_leaps_lie_neither_on_each_other_nor_outside():
    from matplotlib.text import Annotation, Text

    figure = draw_history(read_history(plot.HISTORY))
    figure.draw_without_rendering()
    (panel,) = figure.axes
    boxes = [Text.get_window_extent(child) for child in panel.get_children() if isinstance(child, Annotation)]
    assert len(boxes) > 12
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert panel.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1
        assert panel.bbox.y0 < box.y0 and box.y1 < figure.bbox.y1


def test_leaps_are_the_first_the_last_the_large_and_the_largest_of_each_quarter():
    seconds = [(1, 100), (1, 50), (2, 40), (3, 39.9), (4, 37), (5, 36), (6, 35), (7, 34.9)]
    records = [Record("t", i, s, date(2026, month, 1), "") for i, (month, s) in enumerate(seconds)]
    # 0 first, 1 and 2 by more than a tenth, 4 largest (1.08) of the second quarter, 7 last; 3, 5 and 6 are none.
    assert [r.number for r in leaps(records)] == [0, 1, 2, 4, 7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("small,1,2700.0,,baseline,,record", "no record with a date"),
        ("small,#1,2700.0,2024-05-28,baseline,,open submission", "no record with a date"),
        ("small,1,-3,2024-05-28,baseline,,record", "-3 seconds"),
        ("small,1,2700.0,28 May,baseline,,record", "Invalid isoformat"),
        ("small,1", "expected track,record,seconds,date,change,contributors,status"),
    ],
)
def test_a_bad_history_is_a_message(tmp_path: Path, rows: str, message: str):
    (tmp_path / "history.csv").write_text(f"track,record,seconds,date,change,contributors,status\n{rows}\n")
    with pytest.raises(LogError, match=message):
        read_history(tmp_path / "history.csv")
    with pytest.raises(LogError, match="cannot read"):
        read_history(tmp_path / "nowhere.csv")


# ---- messages ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"source only\n", "no line such as 'step:"),
        (f"source\n{LINE}\nenvironment\n{LINE}\nstep:1/9 train_time:5ms\n".encode(), "no finite loss"),
        (f"{LINE}\n{LINE}\nstep:1/9 train_loss:nan train_time:5ms\n".encode(), "no finite loss"),
        (f"{LINE}\n{LINE}\nstep:1/9 val_loss:4.1 train_\n".encode(), "line 3: expected key:value"),
        (f"{LINE}\n{LINE}\nstep:1/9 val_loss:4.1s train_time:5ms\n".encode(), "line 3: val_loss is not a number"),
        (f"{LINE}\n{LINE}\nstep:1/9 val_loss:4.1 train_time:5h\n".encode(), "train_time is not a time such as"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not text"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_a_message(tmp_path: Path, content: bytes, message: str, command):
    path = tmp_path / "run.txt"
    path.write_bytes(content)
    answer = command(path)
    assert answer.startswith("records/plot.py: error: ") and str(path) in answer and message in answer
    assert answer.count("\n") == 0 and not (tmp_path / "run.png").exists()


def test_wrong_commands_are_messages(tmp_path: Path, command):
    log, empty = make_log(tmp_path / "run.txt", steps=20), tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([], "expected logs, or sets"),
        ([tmp_path / "nowhere.txt"], "nowhere.txt: No such file"),
        ([empty], "no *.txt in this folder"),
        (["--set", "A", log], "add --out PNG"),
        (["--set", "A", "--out", "a.png"], "expected a name, then logs"),
        (["--set", log, log, "--out", "a.png"], "expected a name, then logs"),
        ([log, "--out", "a.pdf"], "pictures are PNG"),
        ([log, "--out", tmp_path / "none" / "a.png"], "No such file"),
        (["--history", log], "or --history alone"),
    ):
        answer = command(*arguments)
        assert answer.startswith("records/plot.py: error: ") and message in answer, answer
