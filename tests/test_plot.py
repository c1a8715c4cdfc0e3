"""records/plot.py on made logs in the field's format."""

import subprocess
import sys
from pathlib import Path

import pytest

from records.plot import Log, LogError, Point, loss_range, parse_log

SCRIPT = Path(__file__).resolve().parents[1] / "records" / "plot.py"
LINE = "=" * 100


def make_log(path: Path, steps: int = 500, target: str = "target_loss: 1.22", source: str = "print('hello')") -> Path:
    """A log whose losses are simple functions of the step: train 6 - step/100, val 0.25 above that."""
    lines = [source, LINE, "Running PyTorch 2.13.0", target, "train_loss: not a log line", LINE]
    for step in range(steps + 1):
        clock = f"train_time:{50 * step}ms step_avg:50.00ms"
        if step % 250 == 0 or step == steps:
            lines.append(f"step:{step}/{steps} val_loss:{6.25 - step / 100:.4f} {clock}")
        if step and step % 10 == 0:
            lines.append(f"step:{step}/{steps} train_loss:{6 - step / 100:.4f} {clock}")
        elif step:
            lines.append(f"step:{step}/{steps} {clock}")
    lines.append("peak memory allocated: 100 MiB reserved: 200 MiB")
    path.write_text("\n".join(lines) + "\n")
    return path


def plot(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_parse_log_reads_every_loss_line(tmp_path: Path):
    """Catches a wrong unit of time, train and val mixed up, lines lost."""
    log = parse_log(make_log(tmp_path / "run.txt", steps=520))
    assert log.val == [Point(0, 0.0, 6.25), Point(250, 12.5, 3.75), Point(500, 25.0, 1.25), Point(520, 26.0, 1.05)]
    assert [point.step for point in log.train] == list(range(10, 521, 10))
    assert log.train[0] == Point(10, 0.5, 5.9)
    assert (log.steps, log.target) == (520, 1.22)


def test_parse_log_takes_nothing_from_the_source(tmp_path: Path):
    """The source at the top of a log may show log lines and settings of its own, even separators."""
    source = f"step:7/9 val_loss:1.0 train_time:1ms step_avg:1ms\ntarget_loss: 9.99\n{LINE}\ntarget_loss=8.88"
    log = parse_log(make_log(tmp_path / "run.txt", source=source))
    assert log.target == 1.22 and log.steps == 500 and log.val[0].step == 0


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("target_loss: 3.28", 3.28),
        ("track.target_loss: 3.28", 3.28),
        ("Track(x=1, target_loss=3.28, y=2)", 3.28),
        ("", None),
    ],
)
def test_the_target_is_optional(tmp_path: Path, line: str, target: float | None):
    assert parse_log(make_log(tmp_path / "run.txt", target=line)).target == target


def test_parse_log_is_tolerant(tmp_path: Path):
    """Losses that are not finite, torn last lines and the fields of other logs do not stop it."""
    lines = [
        "source",
        LINE,
        "environment",
        LINE,
        "step:0/20 val_loss:10.8 train_time:0ms step_avg:nanms",
        "step:1/20 train_loss:nan train_time:5ms step_avg:5.00ms",
        "step:2/20 train_loss:inf train_time:10ms step_avg:5.00ms",
        "step:3/20 train_loss:4.5 lr:0.02 train_time:15.5ms step_avg:5.17ms",
        "some warning",
        "step:4/20 train_loss:4.",
    ]
    path = tmp_path / "run.txt"
    path.write_bytes("\r\n".join(lines).encode() + b" \xff\xfe")
    log = parse_log(path)
    assert log.val == [Point(0, 0.0, 10.8)]
    assert log.train == [Point(3, 0.0155, 4.5)]


def test_draws_a_picture_beside_the_log_without_torch(tmp_path: Path):
    """As run.sh calls it; to import torch or train_gpt would take longer than to draw."""
    folder = tmp_path / "my logs"
    folder.mkdir()
    path = make_log(folder / "run.1.txt")
    command = [sys.executable, "-X", "importtime", str(SCRIPT), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == f"plot: {folder / 'run.1.png'}\n"
    width, height = png_size(folder / "run.1.png")
    assert width > height > 400
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "matplotlib" in imported and not imported & {"torch", "train_gpt"}


def test_the_picture_shows_the_curves(tmp_path: Path):
    """Catches an empty picture: pixels of each curve's colour are there, and both halves have them."""
    import matplotlib.image
    import numpy as np

    plot(make_log(tmp_path / "run.txt"))
    pixels = (matplotlib.image.imread(tmp_path / "run.png")[..., :3] * 255).astype(int)
    for half in (pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]):
        validation = np.abs(half - np.array([0xD5, 0x5E, 0x00])).max(axis=-1) < 8
        training = np.abs(half - (0.6 * np.array([0x00, 0x72, 0xB2]) + 0.4 * 255)).max(axis=-1) < 25
        assert validation.sum() > 300
        assert training.sum() > 300


def test_out_draws_all_logs_into_one_picture(tmp_path: Path):
    one, two = make_log(tmp_path / "one.txt"), make_log(tmp_path / "two.txt", steps=300)
    assert plot(one, two, "--out", tmp_path / "both.png").stdout == f"plot: {tmp_path / 'both.png'}\n"
    assert {path.name for path in tmp_path.glob("*.png")} == {"both.png"}
    plot(one, two)
    assert {path.name for path in tmp_path.glob("*.png")} == {"both.png", "one.png", "two.png"}


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_short_runs_can_be_drawn(tmp_path: Path, steps: int):
    plot(make_log(tmp_path / "run.txt", steps=steps))
    png_size(tmp_path / "run.png")


def test_loss_range_keeps_everything_of_a_short_run_and_the_target():
    log = Log(Path("run.txt"), val=[Point(0, 0, 5.5), Point(9, 1, 3.0)], target=1.2)
    bottom, top = loss_range([log])
    assert bottom < 1.2 and top > 5.5


@pytest.mark.parametrize(
    "content", ["", "source only\n", f"source\n{LINE}\nenvironment\n{LINE}\nstep:1/9 train_time:5ms\n"]
)
def test_a_log_without_losses_is_a_message(tmp_path: Path, content: str):
    path = tmp_path / "run.txt"
    path.write_text(content)
    with pytest.raises(LogError, match="no loss line"):
        parse_log(path)
    result = plot(path, code=1)
    assert str(path) in result.stderr and "no loss line" in result.stderr
    assert not (tmp_path / "run.png").exists()


def test_a_missing_log_is_a_message(tmp_path: Path):
    assert "nowhere.txt: No such file" in plot(tmp_path / "nowhere.txt", code=1).stderr
