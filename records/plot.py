"""Draws the loss curves of run logs: loss over steps and over training time.

    python records/plot.py LOG…               # one PNG beside each log, of the same name
    python records/plot.py LOG… --out PNG     # all logs in one picture

A log is the source text, a line of 100 `=`, the environment with the resolved settings, again `=`, then lines such as
`step:250/1765 val_loss:4.1234 train_time:12345ms step_avg:49.38ms`. Lines of any other form are passed over.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

SEPARATOR = re.compile(r"^={100}\s*$", re.MULTILINE)
STEP_LINE = re.compile(
    r"^\s*step:(?P<step>\d+)/(?P<steps>\d+)\s+(?P<kind>train|val)_loss:(?P<loss>\S+).*?\btrain_time:(?P<ms>[\d.]+)ms",
    re.MULTILINE,
)
TARGET = re.compile(r"\btarget_loss['\"]?\s*[:=]\s*(?P<loss>\d+(?:\.\d+)?)")

# Okabe & Ito's palette, which the colour-blind can tell apart, without its yellow: too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


class LogError(Exception):
    """A log cannot be drawn; the message says why, in words for the user."""


@dataclass(frozen=True)
class Point:
    step: int
    seconds: float  # training time on the run's clock
    loss: float


@dataclass(frozen=True)
class Log:
    """The loss curves of one run, in the order of the log."""

    path: Path
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    steps: int | None = None  # the run's full length
    target: float | None = None  # validation loss to reach, where the header gives one


def parse_log(path: str | Path) -> Log:
    """Reads the loss lines of a log, and the target loss from its header. Losses that are not finite are left out.

    Raises LogError if the file cannot be read or has no loss line, OSError never.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from error
    # The source text at the top could itself show log lines or settings: only what the run wrote counts.
    *head, lines = SEPARATOR.split(text)
    target = TARGET.search(head[-1]) if len(head) > 1 else None
    points: dict[str, list[Point]] = {"train": [], "val": []}
    steps = None
    for match in STEP_LINE.finditer(lines):
        try:
            loss, seconds = float(match["loss"]), float(match["ms"]) / 1000
        except ValueError:
            continue
        steps = int(match["steps"])
        if math.isfinite(loss):
            points[match["kind"]].append(Point(int(match["step"]), seconds, loss))
    if not points["train"] and not points["val"]:
        raise LogError(
            f"{path} has no loss line such as 'step:250/1765 val_loss:4.1234 train_time:12345ms' after its last line "
            "of 100 '=': did the run end before its first validation?"
        )
    return Log(path, points["train"], points["val"], steps, float(target["loss"]) if target else None)


def loss_range(logs: list[Log]) -> tuple[float, float]:
    """Limits of the loss axis; long runs lose the fall from ln(vocabulary), which would squeeze what follows."""
    losses = sorted(point.loss for log in logs for point in log.train + log.val)
    low = min([losses[0]] + [log.target for log in logs if log.target is not None])
    high = losses[-1 - (3 * len(losses) // 100)]
    margin = 0.06 * max(high - low, 0.01 * abs(low), 1e-6)
    return low - margin, high + margin


def draw(logs: list[Log], out: Path) -> None:
    """Draws the curves of all logs into one PNG with two panels, over steps and over training seconds."""
    # Without pyplot, whose import costs as much again as all the rest.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylim(loss_range(logs))
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_xlabel("step")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlabel("training time (s)")
    for panel, axis in zip(panels, ("step", "seconds"), strict=True):
        for i, log in enumerate(logs):
            draw_log(panel, axis, log, None if len(logs) == 1 else COLOURS[i % len(COLOURS)])
        for target in sorted({log.target for log in logs if log.target is not None}):
            panel.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:g}")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, loc="upper right")
    if len(logs) == 1:
        figure.suptitle(logs[0].path.stem, fontsize=10, color="0.3")
    figure.savefig(out)


def draw_log(panel, axis: str, log: Log, colour: str | None) -> None:
    """Draws one log over "step" or "seconds": training as a line, validation as points with the last one's value.

    In `colour`, with the value in the legend, where several logs share the panel; else in two colours.
    """
    train_colour, val_colour = (colour, colour) if colour else COLOURS[:2]
    train_x, val_x = ([getattr(point, axis) for point in points] for points in (log.train, log.val))
    train_y, val_y = ([point.loss for point in points] for points in (log.train, log.val))
    final = f"{val_y[-1]:.4f}" if val_y else "no validation"
    panel.plot(train_x, train_y, color=train_colour, linewidth=0.9, alpha=0.6, label=None if colour else "training")
    label = f"{log.path.stem}: {final}" if colour else "validation"
    panel.plot(val_x, val_y, "o:", color=val_colour, linewidth=1.2, markersize=4.5, label=label)
    if val_y and not colour:
        # Inside the panel: on the side of its middle, and clear of the noise of the training loss.
        is_early, is_high = val_x[-1] < max(train_x + val_x) / 2, val_y[-1] > sum(panel.get_ylim()) / 2
        offset = (3, -28 if is_high else 22)
        text = panel.annotate(final, (val_x[-1], val_y[-1]), xytext=offset, textcoords="offset points")
        text.set(ha="left" if is_early else "right", color=val_colour, weight="bold")
        text.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the loss curves of run logs.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs/<run_id>.txt")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw all logs into this picture")
    options = parser.parse_args()
    try:
        logs = [parse_log(path) for path in options.logs]
        pictures = {options.out: logs} if options.out else {log.path.with_suffix(".png"): [log] for log in logs}
        for picture, shown in pictures.items():
            draw(shown, picture)
            print(f"plot: {picture}")
    except (LogError, OSError, ImportError) as error:
        sys.exit(f"records/plot.py: error: {error}")


if __name__ == "__main__":
    main()
