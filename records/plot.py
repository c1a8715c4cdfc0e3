"""Draws the loss curves of run logs over steps, training tokens and training time, and the history of public records.

    python records/plot.py LOG…                                      # one PNG beside each log, of the same name
    python records/plot.py LOG… --out PNG                            # all logs in one picture
    python records/plot.py --set NAME LOG… --set NAME LOG… --out PNG # seeds: mean and range of each set in one picture
    python records/plot.py --history [--out PNG]                     # records/history.csv as records/history.png

A LOG may be a folder: all *.txt in it. runlogs.py says which forms of log are read; losses that are not finite are left
out. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # without pyplot, whose import costs as much again as all the rest
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from runlogs import Event, Log, LogError, finite, read_logs

HISTORY = Path(__file__).resolve().parent / "history.csv"
AXES = {"step": "step", "tokens": "training tokens", "seconds": "training time (s)"}
SMOOTHING = 5  # training losses per running mean in a set; a step's batch is small, so single ones are noisy
DPI = 150
LEAP = 1.1  # a record that divides the time by this or more is named in the history
TICKS = (30, 60, 100, 180, 300, 600, 1200, 2700, 5400, 10800, 21600, 43200)  # seconds

# Okabe & Ito's palette, which the colour-blind can tell apart, without its yellow: too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

Curve = tuple[list[int], list[float], list[float]]  # steps, ascending; their places on an axis; the losses there


@dataclass(frozen=True)
class RunSet:
    """Runs that share a colour."""

    name: str
    logs: list[Log]
    smoothing: int = 1  # training losses per running mean

    def finals(self) -> list[tuple[Log, Event]]:
        """The last validation of each run that has one at its last step."""
        last = [(log, event) for log in self.logs for event, _ in finite(log.events, "val_loss")[-1:]]
        return [(log, event) for log, event in last if event.total in (None, event.step)]

    def drawn(self) -> list[Log]:
        """The finished runs; all where none is. A run that ends early would bend the mean of the others."""
        return [log for log, _ in self.finals()] or self.logs

    def label(self) -> str:
        """For the legend, such as "nano: 1.0763 ± 0.0042 (n=10), 91.2 s"; ± is the standard deviation of the runs."""
        finals = [event for _, event in self.finals()]
        if not finals:
            last = [event for event, _ in finite(self.logs[0].events, "val_loss")[-1:]]
            if len(self.logs) == len(last) == 1:
                return f"{self.name}: {last[0].val_loss:.4f} at step {last[0].step:,} of {last[0].total:,}"
            return f"{self.name}: no final validation"
        text = f"{self.name}: {statistics.fmean(event.val_loss for event in finals):.4f}"
        if len(finals) > 1:
            text += f" ± {statistics.stdev(event.val_loss for event in finals):.4f} (n={len(finals)})"
        seconds = [seconds for _, seconds in finite(finals, "seconds")]
        text += f", {statistics.fmean(seconds):,.1f} s" if seconds else ""
        missing = len(self.logs) - len(finals)
        return text + (f"; {missing} unfinished left out" if missing else "")


def position(log: Log, event: Event, axis: str) -> float | None:
    """Where an event lies on an axis; None where the log does not say."""
    value = log.tokens_at(event.step) if axis == "tokens" else getattr(event, axis)
    return value if value is not None and math.isfinite(value) else None


def curve(log: Log, kind: str, axis: str, smoothing: int = 1) -> Curve:
    """The finite losses of one run, "train_loss" or "val_loss", by step, with their place on the axis."""
    found = [(event.step, position(log, event, axis), loss) for event, loss in finite(log.events, kind)]
    points = sorted(point for point in found if point[1] is not None)
    steps, places, losses = ([point[i] for point in points] for i in range(3))
    return steps, places, running_mean(losses, smoothing)


def running_mean(values: list[float], width: int) -> list[float]:
    """Centred mean of `width` (odd) values; towards the ends of fewer, as many before as after, so it never lags."""
    halves = [min(width // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.fmean(values[i - half : i + half + 1]) for i, half in enumerate(halves)]


def mean_and_range(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(place, mean, least, greatest loss) at each step, over the runs, from where the last begins to where one ends.

    Each run is interpolated linearly between its steps; the place is the mean of the runs' (of their seconds, say).
    """
    curves = [run for run in curves if run[0]]
    if not curves:
        return (np.array([]),) * 4
    grid = np.unique(np.concatenate([steps for steps, _, _ in curves]))
    grid = grid[(grid >= max(steps[0] for steps, _, _ in curves)) & (grid <= min(steps[-1] for steps, _, _ in curves))]
    place = np.mean([np.interp(grid, steps, places) for steps, places, _ in curves], axis=0)
    losses = np.array([np.interp(grid, steps, losses) for steps, _, losses in curves])
    return place, losses.mean(0), losses.min(0), losses.max(0)


def loss_range(logs: list[Log]) -> tuple[float, float]:
    """Limits of the loss axis; long runs lose the fall from ln(vocabulary), which would squeeze what follows."""
    losses = sorted(loss for log in logs for kind in ("train_loss", "val_loss") for _, loss in finite(log.events, kind))
    low = min([losses[0]] + [log.target for log in logs if log.target is not None])
    high = losses[-1 - (3 * len(losses) // 100)]
    margin = 0.06 * max(high - low, 0.01 * abs(low), 1e-6)
    return low - margin, high + margin


def axes_of(logs: list[Log]) -> list[str]:
    """The axes on which every loss of every log has its place, or at least (time) one loss of each."""

    def has(log: Log, axis: str) -> bool:
        places = [position(log, event, axis) is not None for event in log.train + log.val]
        return all(places) if axis == "tokens" else any(places)

    return [axis for axis in AXES if all(has(log, axis) for log in logs)]


def draw_runs(sets: list[RunSet]) -> Figure:
    """One panel per axis: training as lines, validation as points, each set in its colour, the target dashed."""
    logs = [log for runs in sets for log in runs.drawn()]
    axes = axes_of(logs)
    figure = Figure(figsize=(10, 4.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    panels[0].set_ylim(loss_range(logs))
    panels[0].set_ylabel("loss (nats per token)")
    for panel, axis in zip(panels, axes, strict=True):
        for i, runs in enumerate(sets):
            draw_set(panel, axis, runs, COLOURS[:2] if len(sets) == 1 else (COLOURS[i % len(COLOURS)],))
        for target in sorted({log.target for log in logs if log.target is not None}):
            panel.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:g}")
        dress(panel)
        panel.set_xlim(left=0)
        panel.set_xlabel(AXES[axis])
        panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=axis == "step"))
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    if caption := describe(sets):
        figure.supxlabel(caption, fontsize=8, color="0.4")
    return figure


def describe(sets: list[RunSet]) -> str:
    """What the lines, bands and dots of sets are."""
    smoothing = max(runs.smoothing for runs in sets)
    parts = [f"training loss: running mean of {smoothing} logged values"] if smoothing > 1 else []
    if any(len(runs.drawn()) > 1 for runs in sets):
        parts += ["mean and range of the runs at each step, placed at its mean time"]
        parts += ["dots: final validations, ±: standard deviation"]
    return "; ".join(parts)


def draw_set(panel: Axes, axis: str, runs: RunSet, colours: tuple[str, ...]) -> None:
    """Mean and range (least to greatest) of the training loss as line and band, of validations during the run dotted.

    A single run has a point for each validation, several have one for each final one and a larger one for their mean.
    With two colours, the second is for validation.
    """
    logs = runs.drawn()
    several = len(logs) > 1
    for kind, colour, style in (("train_loss", colours[0], "-"), ("val_loss", colours[-1], ":")):
        curves = [curve(log, kind, axis, runs.smoothing if kind == "train_loss" else 1) for log in logs]
        if kind == "val_loss" and max(len(steps) for steps, _, _ in curves) < 2:
            continue  # only final validations: nothing to join
        x, mean, low, high = mean_and_range(curves)
        width, alpha = (1.4, 1) if runs.smoothing > 1 or kind == "val_loss" else (0.9, 0.6)
        label = "training" if colour != colours[-1] else None
        panel.plot(x, mean, style, marker="." if len(x) == 1 else "", color=colour, lw=width, alpha=alpha, label=label)
        if several:
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    panel.plot([], [], "o" if len(colours) > 1 else "o-", color=colours[-1], markersize=5, label=runs.label())
    if not several:
        panel.plot(*curve(logs[0], "val_loss", axis)[1:], "o", color=colours[-1], markersize=4.5)
        return
    points = [(x, event.val_loss) for log, event in runs.finals() if (x := position(log, event, axis)) is not None]
    if points:
        x, y = zip(*points, strict=True)
        panel.plot(x, y, "o", color=colours[-1], markersize=3, alpha=0.5)
        panel.plot(statistics.fmean(x), statistics.fmean(y), "o", color=colours[-1], markersize=7, mec="white")


# ---- history ----


@dataclass(frozen=True)
class Record:
    track: str
    number: int  # of a record; else that of the pull request
    seconds: float  # to the target loss
    date: date | None  # None: not known; the middle of a month of which the day is not known
    change: str
    status: str = "record"  # else what it is instead

    @property
    def title(self) -> str:
        """For the picture, such as "token smearing" or "#360, open submission: sampled-softmax training loss"."""
        first = self.change.split(";")[0]
        return first if self.status == "record" else f"#{self.number}, {self.status}: {first}"


def read_history(path: Path) -> list[Record]:
    """The records of a history. Raises LogError where it cannot be read or a row is not one."""
    records = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                day = row["date"] + "-15" * (len(row["date"]) == len("2026-08"))
                if not 0 < (seconds := float(row["seconds"])) < math.inf:
                    raise ValueError(f"{seconds:g} seconds")
                place = row["track"], int(row["record"].lstrip("#")), seconds, date.fromisoformat(day) if day else None
                records.append(Record(*place, row["change"], row["status"]))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        wanted = "track,record,seconds,date,change,contributors,status"
        raise LogError(f"cannot read {path}, row {len(records) + 1}: {error}: expected {wanted}") from None
    if not any(record.date for record in records if record.status == "record"):
        raise LogError(f"{path} has no record with a date")
    return records


def leaps(records: list[Record]) -> list[Record]:
    """The records of one track to be named: first, last, leaps by LEAP or more, the largest of each quarter."""
    bests = accumulate((r.seconds for r in records), min)
    ratio = {r: best / r.seconds for r, best in zip(records[1:], bests, strict=False)}
    quarters = groupby(ratio, lambda r: (r.date.year, (r.date.month - 1) // 3))
    largest = [max(quarter, key=ratio.get) for _, quarter in quarters]
    named = {records[0], records[-1], *largest, *(r for r in ratio if ratio[r] >= LEAP)}
    return [r for r in records if r in named]


def draw_history(records: list[Record]) -> Figure:
    """Time to target over date, one point per dated record, a step line for the best so far, the leaps named.

    What is not a record is a hollow point, or a line of the legend where its date is not known.
    """
    figure = Figure(figsize=(1600 / DPI, 700 / DPI), dpi=DPI)
    panel = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.075, top=0.975)
    others = [r for r in records if r.status != "record"]
    records = [r for r in records if r.status == "record" and r.date]
    tracks = {track: [r for r in records if r.track == track] for track in dict.fromkeys(r.track for r in records)}
    dates = [r.date for r in [*records, *others] if r.date]
    span = max(dates) - min(dates)
    panel.set_xlim(min(dates) - 0.24 * span, max(dates) + 0.03 * span)
    panel.set_yscale("log")
    panel.set_ylim(0.5 * min(r.seconds for r in [*records, *others]), 1.5 * max(r.seconds for r in records))
    panel.yaxis.set_major_locator(ticker.FixedLocator(TICKS))
    panel.yaxis.set_major_formatter(lambda value, _: duration(value))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    panel.set_ylabel("training time to the target loss")
    dress(panel)
    slowest = max(tracks, key=lambda track: tracks[track][-1].seconds)
    for i, (track, rows) in enumerate(tracks.items()):
        best = list(accumulate((r.seconds for r in rows), min))
        label = f"{track}: {duration(best[0])} → {duration(best[-1])} in {rows[-1].number} records"
        days = [r.date for r in rows]
        panel.step(days, best, where="post", color=COLOURS[i], linewidth=1.4)
        panel.plot(days, [r.seconds for r in rows], "o", color=COLOURS[i], markersize=4, label=label)
        above = len(tracks) > 1 and track == slowest
        mine = [r for r in others if r.track == track]
        dated = [r for r in mine if r.date]
        x, y = [r.date for r in dated], [r.seconds for r in dated]
        panel.plot(x, y, "o", color=COLOURS[i], mfc="white", markersize=5)
        for r in mine:
            if not r.date:
                panel.plot([], [], " ", label=f"#{r.number}, {r.status}: {duration(r.seconds)}, day not known")
        place([name_leap(panel, r, above, COLOURS[i]) for r in [*leaps(rows), *dated]], above)
    panel.legend(frameon=False, loc="upper right", fontsize=10)
    return figure


def name_leap(panel: Axes, record: Record, above: bool, colour: str) -> Annotation:
    """The name of a record: right above the uppermost curve or left below another, where a falling curve never is."""
    line = {"arrowstyle": "-", "color": colour, "alpha": 0.6, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2}
    return panel.annotate(
        record.title,
        (record.date, record.seconds),
        xytext=(8, 5) if above else (-12, -8),
        textcoords="offset points",
        ha="left" if above else "right",
        va="bottom" if above else "top",
        fontsize=8.5,
        arrowprops=line | {"relpos": (0, 0.5) if above else (1, 0.5)},
    )


def place(names: list[Annotation], above: bool) -> None:
    """Moves names away from their curve until none lies on another."""
    placed: list[Bbox] = []
    renderer = FigureCanvasAgg(names[0].figure).get_renderer()
    for name in reversed(names) if above else names:
        name.update_positions(renderer)
        box = Text.get_window_extent(name)  # of the text alone; an annotation's own includes the line to its point
        step, (x, y) = (1 if above else -1), name.get_position()
        while any(box.overlaps(other) for other in placed):
            box, y = box.translated(0, step), y + step * 72 / name.figure.dpi
        name.set_position((x, y))
        placed.append(box.padded(2))


def dress(panel: Axes) -> None:
    """Light grid behind the curves, no box."""
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def duration(seconds: float) -> str:
    """73.8 s, 45 min, 5.8 h: seconds in the unit that people say."""
    if seconds < 180:
        return f"{seconds:g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.2g} h"


# ---- command ----


def logs_of(paths: Iterable[Path]) -> list[Log]:
    """The logs, each with a finite loss, of files and folders. Raises LogError."""
    logs, _ = read_logs(paths)
    for log in logs:
        if not finite(log.events, "train_loss") + finite(log.events, "val_loss"):
            raise LogError(f"{log.path} has no finite loss: did the run end before its first validation?")
    return logs


def set_of(words: list[str]) -> RunSet:
    """The set of `--set NAME LOG…`."""
    name, *paths = words
    if not paths or Path(name).is_file():
        raise LogError(f"--set {name!r} …: expected a name, then logs or a folder of logs: --set NAME LOG…")
    return RunSet(name, logs_of(map(Path, paths)), SMOOTHING)


def pictures(options: argparse.Namespace) -> Iterable[tuple[Path, Figure]]:
    """What the options ask for, with the path of each picture."""
    if options.out and options.out.suffix.lower() != ".png":
        raise LogError(f"--out {options.out}: pictures are PNG, expected a name that ends in .png")
    if options.history == bool(options.logs or options.set):
        raise LogError("expected logs, or sets (--set NAME LOG…), or --history alone (see --help)")
    if options.history:
        yield options.out or HISTORY.with_suffix(".png"), draw_history(read_history(HISTORY))
    elif options.set and not options.out:
        raise LogError("--set draws all sets into one picture: add --out PNG")
    else:
        logs = logs_of(options.logs)
        sets = [RunSet(log.path.stem, [log]) for log in logs] + [set_of(words) for words in options.set]
        if options.out:
            yield options.out, draw_runs(sets)
        else:
            for log in logs:
                yield log.path.with_suffix(".png"), draw_runs([RunSet(f"{log.path.stem}, validation", [log])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws loss curves of run logs, or the history of public records.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="logs/<run_id>.txt, or a folder of logs")
    runs = {"nargs": "+", "action": "append", "default": [], "metavar": ("NAME", "LOG")}
    parser.add_argument("--set", **runs, help="runs to draw as mean and range")
    parser.add_argument("--history", action="store_true", help="draw records/history.csv")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw all into this picture")
    try:
        for path, figure in pictures(parser.parse_args()):
            figure.savefig(path, metadata={"Software": None})  # its version would change the bytes
            print(f"plot: {path}")
    except (LogError, OSError) as error:
        sys.exit(f"records/plot.py: error: {error}")


if __name__ == "__main__":
    main()
