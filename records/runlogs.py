"""Reads the logs of runs: ours and those of the public speedrun, whose format ours is.

A log is the source text, a line of `=`, versions, device and settings, again `=`, then a line per event such as

    step:250/1765 val_loss:4.1234 train_time:12345ms step_avg:49.38ms
    step:251/1765 train_time:12394ms step_avg:49.38ms

Also read: times in seconds, no total, no average, averages of `nan` while the first steps are not timed, and the
`s:250 tel:4.1234` lines of llm.c. Towards its end a log names the shards that were read:

    data: nano_train_000001.bin 30946110 tokens sha256 39582df2...

Lines that are neither (warnings, notes) are kept as `notes`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SEPARATOR = re.compile(r"^={80,}[ \t]*\r?$", re.MULTILINE)
EVENT = re.compile(r"^\s*(?:step|s)\s*:\s*\d")  # a line that has to parse
DATA = re.compile(r"data: (\S+) (\d+) tokens sha256 ([0-9a-f]{64})")
STEP = re.compile(r"(\d+)(?:/(\d+))?")
NUMBER = re.compile(r"(-?(?:nan|inf|\d+(?:\.\d*)?(?:e[+-]?\d+)?))(ms|s)?")
VAL_LOSS, TRAIN_LOSS = ("val_loss", "val", "tel"), ("train_loss", "loss", "trl", "trn")
SECONDS, NATS = {None: 1e-3, "ms": 1e-3, "s": 1.0}, {None: 1.0}  # by the unit that follows a number
GPU_NAME = re.compile(r"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", re.MULTILINE)  # in the table of nvidia-smi


class LogError(Exception):
    """A log cannot be used; the message names the file, the line and what is wrong, in words for the user."""


@dataclass(frozen=True)
class Event:
    """One line of a log."""

    line: int  # number in the file, from 1
    step: int
    total: int | None = None  # steps of the whole run
    seconds: float | None = None  # training time so far, on the run's clock
    average: float | None = None  # seconds per step so far; nan while the run does not time its first steps
    val_loss: float | None = None
    train_loss: float | None = None


@dataclass(frozen=True)
class Log:
    path: Path
    source: str | None  # None: the log does not begin with the text of its program
    environment: str  # versions, device, settings, as they stand
    settings: dict[str, str]  # `key: value` lines of the environment, such as "data.val_tokens"
    events: list[Event]
    notes: list[str] = field(default_factory=list)  # other lines after the environment
    data: dict[str, tuple[int, str]] = field(default_factory=dict)  # tokens and SHA-256 of each shard, in order

    @property
    def val(self) -> list[Event]:
        return [event for event in self.events if event.val_loss is not None]

    @property
    def train(self) -> list[Event]:
        return [event for event in self.events if event.train_loss is not None]

    @property
    def final(self) -> Event | None:
        """The last validation."""
        return self.val[-1] if self.val else None

    @property
    def total_steps(self) -> int | None:
        return self.events[-1].total if self.events else None

    @property
    def track(self) -> str | None:
        return self.settings.get("name")

    @property
    def hardware(self) -> dict[str, str]:
        """What the environment says of "Device" (kind and number), "CPU" and "GPU"."""
        gpus = Counter(GPU_NAME.findall(self.environment))
        found = {"Device": self.settings.get("Device", "").split(",")[0], "CPU": self.settings.get("CPU", "")}
        found["GPU"] = ", ".join(f"{n} x {name}" for name, n in gpus.items())
        return {kind: name for kind, name in found.items() if name}

    @property
    def target(self) -> float | None:
        """Validation loss to reach, where the settings give one."""
        try:
            return float(self.settings["target_loss"])
        except (KeyError, ValueError):
            return None

    def tokens_at(self, step: int) -> int | None:
        """Training tokens of the first `step` steps by the schedule in the settings; None where that is not there."""
        try:
            scheduled = int(self.settings["schedule.scheduled_steps"])
            stages = [int(n) for key, n in self.settings.items() if re.fullmatch(r"schedule\.stages\.\d+\.tokens", key)]
            bounds = [scheduled * i // len(stages) for i in range(len(stages) + 1)]
            extension = int(self.settings["schedule.extension.tokens"]) if step > scheduled else 0
        except (KeyError, ValueError, ZeroDivisionError):
            return None
        spans = zip(stages, bounds, bounds[1:], strict=False)
        return sum(n * max(min(step, b) - a, 0) for n, a, b in spans) + extension * max(step - scheduled, 0)


def parse_log(path: str | Path) -> Log:
    """Read one log. Raises LogError where it cannot be read, is not text, or has an event line that does not parse."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LogError(f"{path}: not text (byte {error.start} is not UTF-8): is it a log?") from error
    separators = list(SEPARATOR.finditer(text))
    source = text[: separators[0].start()] if separators else ""
    environment = text[separators[0].end() : separators[-1].start()] if len(separators) > 1 else ""
    begin = separators[-1].end() if separators else 0
    events, notes, data = [], [], {}
    for number, line in enumerate(text[begin:].split("\n"), start=text.count("\n", 0, begin) + 1):
        if EVENT.match(line):
            try:
                events.append(parse_event(line, number))
            except ValueError as error:
                raise LogError(f"{path}, line {number}: {error}: {line.strip()[:120]!r}") from None
        elif (match := DATA.fullmatch(line.strip())) and match[1] not in data:
            data[match[1]] = int(match[2]), match[3]
        elif line.strip():
            notes.append(line.strip())
    settings = dict(match.groups() for match in re.finditer(r"^(\w[\w.]*): (.*?)\s*$", environment, re.MULTILINE))
    return Log(path, source if source.strip() else None, environment, settings, events, notes, data)


def read_logs(paths: list[Path]) -> tuple[list[Log], list[Path]]:
    """The logs and those in folders, and the files of folders that have no line of a run, such as notes.

    Raises LogError where a file cannot be read, or where none is a log.
    """
    logs, passed_over = [], []
    for path in paths:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise LogError(f"{path}: no *.txt in this folder")
        found = [parse_log(file) for file in files]
        if not any(log.events for log in found):
            raise LogError(f"{path}: no line such as 'step:250/1765 val_loss:4.1234 train_time:12345ms': is it a log?")
        logs += [log for log in found if log.events]
        passed_over += [log.path for log in found if not log.events]
    return logs, passed_over


def parse_event(line: str, number: int) -> Event:
    """One event line. Raises ValueError, saying what does not parse."""
    words = [word.partition(":") for word in line.split()]
    values = {key: value for key, _, value in words if value}
    if len(values) < len(words):
        raise ValueError("expected key:value, each key once")
    step = STEP.fullmatch(values.get("step", values.get("s", "")))
    if not step:
        raise ValueError("the step is not a number, or number/total")
    numbers = [number_of(values, keys, SECONDS) for keys in (("train_time",), ("step_avg",))]
    numbers += [number_of(values, keys, NATS) for keys in (VAL_LOSS, TRAIN_LOSS)]
    return Event(number, int(step[1]), int(step[2]) if step[2] else None, *numbers)


def number_of(values: dict[str, str], keys: tuple[str, ...], units: dict[str | None, float]) -> float | None:
    """The value of the first of these keys that is there, by its unit; None where there is none."""
    if not (key := next((key for key in keys if key in values), None)):
        return None
    match = NUMBER.fullmatch(values[key])
    if not match or match[2] not in units:
        raise ValueError(f"{key} is not a {'time such as 12345ms' if units is SECONDS else 'number'}")
    return float(match[1]) * units[match[2]]


def finite(events: list[Event], name: str) -> list[tuple[Event, float]]:
    """(event, value) of all events whose "val_loss", "train_loss" or "seconds" is a finite number."""
    pairs = [(event, getattr(event, name)) for event in events]
    return [(event, value) for event, value in pairs if value is not None and math.isfinite(value)]
