"""Judges the logs of runs: is the mean validation loss below the target, how long did they take, are the rules kept?

    python records/check.py LOG…                          # exit code 0: p < 0.01 and all rules kept; 1: not; 2: no log
    python records/check.py LOG… --against LOG…           # and faster than those, at p < 0.01 (Welch's t-test)
    python records/check.py LOG… --track small --no-rules # statistics alone, for the logs of other programs

A LOG may also be a folder: all *.txt in it. The rules look at what a log says and at the source text it begins with, as
a syntax tree. They catch slips and simple forgeries; a record still wants a person who reads its source.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from runlogs import Log, LogError, parse_log, parse_source

if TYPE_CHECKING:
    from train_gpt import Track

REPO = Path(__file__).resolve().parents[1]
P_MAX = 0.01  # for "below the target" and for "faster"
MAX_REASONS = 10  # per rule and log
SAME_LOSS_P = 0.05  # two-sided; below it two sets of losses differ
LAST_NOTE = re.compile(r"peak memory allocated: \d+ MiB reserved: \d+ MiB")
BANNER = re.compile(r"^# -+\n# (.*)\n# -+$", re.MULTILINE)
GPU_NAME = re.compile(r"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", re.MULTILINE)  # in the table of nvidia-smi

INDUCTOR_NAME = re.compile(r"[\w.]*\b_inductor\b[\w.]*|TORCHINDUCTOR\w*")
TAKES_CODE = {"exec", "eval"}
TAKES_MODULE = {"import_module", "__import__"}
TAKES_NAME = {"getattr", "setattr", "delattr", "attrgetter", "putenv", "setdefault", "update", "patch"}
COORDINATE_DESCENT = "torch._inductor.config.coordinate_descent_tuning"
COMPILE_KEYWORDS = {"dynamic", "fullgraph"}
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ASSIGNMENT = ast.Assign | ast.AnnAssign | ast.NamedExpr
PLACE = ast.Name | ast.Attribute


@dataclass(frozen=True)
class Broken:
    """A rule that a log breaks."""

    file: str
    rule: str
    reason: str


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def p_below(losses: list[float], target: float) -> float | None:
    """One-sided one-sample t-test: p of the hypothesis that the mean is not below target. None for fewer than 2."""
    from scipy import stats

    if len(losses) < 2:
        return None
    if len(set(losses)) == 1:  # no variance, for which scipy has no number
        return 0.0 if losses[0] < target else 1.0
    return finite(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def welch(a: list[float], b: list[float], alternative: str) -> tuple[float | None, list[float] | None]:
    """Welch's t-test of mean(a) against mean(b): p and, for "two-sided", the 95 % interval of mean(a) - mean(b).

    `alternative` is "less" or "two-sided". Both results are None for fewer than 2 values on a side.
    """
    from scipy import stats

    if min(len(a), len(b)) < 2:
        return None, None
    if len(set(a)) == len(set(b)) == 1:
        difference = a[0] - b[0]
        certain = difference < 0 if alternative == "less" else difference != 0
        return (0.0 if certain else 1.0), [difference, difference]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of "nearly identical" values; they are rounded, not noise
        result = stats.ttest_ind(a, b, equal_var=False, alternative=alternative)
        interval = result.confidence_interval(0.95) if alternative == "two-sided" else None
    return finite(result.pvalue), interval and [finite(interval.low), finite(interval.high)]


def finite(value: float) -> float | None:
    """None in place of NaN and infinity, which JSON lacks."""
    return float(value) if math.isfinite(value) else None


def summary(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, median and standard deviation (ddof = 1), as far as there are enough values."""
    if not values:
        return None, None, None
    return statistics.fmean(values), statistics.median(values), statistics.stdev(values) if len(values) > 1 else None


def final_values(logs: list[Log]) -> tuple[list[float], list[float]]:
    """Losses of the last validation and training times in seconds there, of the logs that have them."""
    finals = [log.final for log in logs if log.final is not None]
    losses = [event.val_loss for event in finals if math.isfinite(event.val_loss)]
    return losses, [event.seconds for event in finals if event.seconds is not None and math.isfinite(event.seconds)]


def compare(losses: list[float], times: list[float], against: list[Log]) -> dict[str, object]:
    """Times and losses of our runs against those of others."""
    their_losses, their_times = final_values(against)
    (mean, *_), (their_mean, *_) = summary(times), summary(their_times)
    known = mean is not None and their_mean is not None
    return {
        "n": len(against),
        "losses": their_losses,
        "mean": summary(their_losses)[0],
        "times": their_times,
        "time_mean": their_mean,
        "time_difference": mean - their_mean if known else None,
        "time_interval": welch(times, their_times, "two-sided")[1],
        "ratio": their_mean / mean if known and mean > 0 else None,
        "time_p": welch(times, their_times, "less")[0],
        "loss_p": welch(losses, their_losses, "two-sided")[0],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Rules: each yields the reasons why a log breaks it.
# ----------------------------------------------------------------------------------------------------------------------


def complete(log: Log) -> Iterator[str]:
    """The log is that of a whole run, from its source to its end."""
    if log.source is None:
        yield "does not begin with the text of the program that wrote it"
    if not log.environment.strip():
        yield "has no environment between two lines of ="
    totals = {event.total for event in log.events}
    total = log.total_steps
    if len(totals) > 1 or total is None:
        yield f"the lines do not agree on one total of steps: {', '.join(sorted(map(str, totals)))}"
    elif log.final is None or log.final.step != total:
        last = f"the last one is of step {log.final.step}" if log.final else "there is none"
        yield f"no final validation at step {total}: {last}"
    if total is not None and (last := max(event.step for event in log.events)) > total:
        yield f"step {last} is beyond its last step, {total}"
    for before, after in pairwise(log.events):
        if after.step < before.step:
            yield f"line {after.line}: step {after.step} after step {before.step}"
    if total is not None and any(event.val_loss is None and event.train_loss is None for event in log.events):
        expected = 1
        for step in sorted({event.step for event in log.events if event.val_loss is None}):
            expected += step == expected
        if expected <= total:
            yield f"no line of step {expected} of {total}"
    for event in log.val:
        if not math.isfinite(event.val_loss):
            yield f"line {event.line}: the validation loss is {event.val_loss}"
    for note in log.notes:
        if "incomplete run" in note or "--force" in note:
            yield f"it says: {note}"
    if log.track is None:
        return  # another program's
    if not log.notes or not LAST_NOTE.fullmatch(log.notes[-1]):
        yield "it is cut off: the last line should be 'peak memory allocated: ... MiB reserved: ... MiB'"
    steps = [log.settings.get(f"schedule.{kind}_steps", "") for kind in ("scheduled", "extension")]
    if all(steps) and (not all(re.fullmatch(r"[0-9]{1,18}", n) for n in steps) or sum(map(int, steps)) != total):
        yield f"{total} steps, but the settings say {' + '.join(steps)}"


def clock(log: Log) -> Iterator[str]:
    """Every line has a time, times never fall, and each average is the time over the steps.

    Old public runs begin their clock anew after 10 steps, until which averages are NaN.
    """
    averages = [event.average for event in log.events]
    untimed = 10 if any(average is not None and math.isnan(average) for average in averages) else 0
    before = 0.0
    for event in log.events:
        at = f"line {event.line}"
        if event.seconds is None or not math.isfinite(event.seconds):
            yield f"{at}: no training time"
            continue
        if event.average is None:
            if any(average is not None for average in averages) or log.track is not None:
                yield f"{at}: no average"
        elif math.isnan(event.average):
            if event.step > untimed + 1:
                yield f"{at}: the average is NaN at step {event.step}"
            continue
        else:
            steps = max(event.step - untimed, 1)
            expected = event.average * steps
            if not abs(expected - event.seconds) <= 1e-3 + 6e-6 * steps + 1e-4 * event.seconds:  # rounding
                yield f"{at}: {event.seconds:.3f} s, but its average over {steps} steps gives {expected:.3f} s"
        if event.seconds < before:
            yield f"{at}: the clock falls from {before:.3f} to {event.seconds:.3f} s"
        before = event.seconds


def options(log: Log, tree: ast.Module, track: str) -> Iterator[str]:
    """No option of inductor and none of torch.compile but `dynamic` and `fullgraph`.

    Inductor's coordinate descent tuning is free on `medium`; elsewhere it may be switched, but has to be off.
    """
    aliases = find_aliases(tree)
    off = log.settings.get("coordinate_descent_tuning") == "False"
    free = set()  # targets that may be assigned
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            is_on = isinstance(node.value, ast.Constant) and bool(node.value.value)
            if track == "medium" or (off and not is_on):
                free |= {id(t) for t in node.targets if dotted(t, aliases) == COORDINATE_DESCENT}
    uses = [*inductor_uses(tree, aliases, free), *inductor_strings(tree), *compile_uses(tree, aliases)]
    for line, use in dict.fromkeys(sorted(uses)):
        yield f"line {line} of its source: {use}"


def inductor_uses(tree: ast.Module, aliases: dict[str, str], free: set[int]) -> Iterator[tuple[int, str]]:
    """(line, what) of imports and attributes that reach torch._inductor, but for the targets in `free`."""
    passed_over = free | {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            paths = [prefix + alias.name for alias in node.names]
            if free:  # for whose sake the module may be imported
                paths = [path for path in paths if path not in ("torch._inductor", "torch._inductor.config")]
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in passed_over:
            paths = [dotted(node, aliases)]
        else:
            continue
        yield from ((node.lineno, path) for path in paths if "_inductor" in path.split("."))


def inductor_strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of strings by which inductor is reached or its environment variables set; messages do not count."""
    for node in ast.walk(tree):
        texts, pattern = [], INDUCTOR_NAME.fullmatch
        if isinstance(node, ast.Subscript):
            texts = [node.slice]
        elif isinstance(node, ast.Dict):
            texts = [key for key in node.keys if key]
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, k.arg) for k in node.keywords if k.arg and k.arg.startswith("TORCHINDUCTOR"))
            name, arguments = last_name(node.func), [*node.args, *(k.value for k in node.keywords)]
            if name in TAKES_MODULE or (isinstance(node.func, ast.Name) and name in TAKES_CODE):
                texts, pattern = arguments, INDUCTOR_NAME.search
                if not all(isinstance(text, ast.Constant) for text in arguments[:1]):
                    yield node.lineno, f"{name} of what is not written out"
            elif name in TAKES_NAME:
                texts = arguments
        for part in (part for text in texts for part in ast.walk(text) if isinstance(part, ast.Constant)):
            if isinstance(part.value, str) and pattern(part.value):
                yield part.lineno, repr(part.value)


def compile_uses(tree: ast.Module, aliases: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(line, what) of torch.compile with a forbidden keyword, or passed on to where its keywords cannot be seen."""
    plain = set()  # uses whose keywords are in sight
    for node in ast.walk(tree):
        if isinstance(node, DEFINITION):
            plain |= {id(decorator) for decorator in node.decorator_list}
        elif isinstance(node, ASSIGNMENT) and node.value and all(isinstance(t, PLACE) for t in targets(node)):
            plain.add(id(node.value))
        elif isinstance(node, ast.Call):
            forbidden = [k.arg or "**" for k in node.keywords if k.arg not in COMPILE_KEYWORDS]
            function = dotted(node.func, aliases)
            if function.split(".")[-1] == "partial" and node.args:
                plain.add(id(node.args[0]))
                function = dotted(node.args[0], aliases)
            plain.add(id(node.func))
            if forbidden and function == "torch.compile":
                yield node.lineno, f"torch.compile with {', '.join(forbidden)}"
            elif function.endswith(".compile") and {"mode", "options", "backend"} & set(forbidden):  # nn.Module's
                yield node.lineno, f"compile with {', '.join(forbidden)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | PLACE) and id(node) not in plain and dotted(node, aliases) == "torch.compile":
            if isinstance(getattr(node, "ctx", None), ast.Store):
                continue
            yield node.lineno, "torch.compile is passed on, its keywords out of sight: call it by its name"


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """The dotted path that an expression stands for, such as torch.compile; "?" where it is something else.

    Looks through aliases, getattr, functools.partial and importlib.import_module.
    """
    path = "?"
    if isinstance(node, ast.Name):
        path = node.id
    elif isinstance(node, ast.Attribute):
        path = f"{dotted(node.value, aliases)}.{node.attr}"
    elif isinstance(node, ast.NamedExpr):
        path = dotted(node.value, aliases)
    elif isinstance(node, ast.Call) and node.args:
        name = dotted(node.func, aliases).split(".")[-1]
        texts = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]
        if name == "partial":
            path = dotted(node.args[0], aliases)
        elif name in TAKES_MODULE and isinstance(texts[0], str):
            path = texts[0]
        elif name == "getattr" and len(texts) > 1 and isinstance(texts[1], str):
            path = f"{dotted(node.args[0], aliases)}.{texts[1]}"
    return aliases.get(path, path)


def last_name(node: ast.AST) -> str:
    """The part after the last dot."""
    return dotted(node, {}).split(".")[-1]


def targets(node: ast.AST) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def find_aliases(tree: ast.Module) -> dict[str, str]:
    """Other names of modules, torch.compile and partial: {"t": "torch", "self.compile": "torch.compile", ...}.

    Scopes are not told apart: a name that is torch.compile anywhere counts as that everywhere.
    """
    aliases: dict[str, str] = {}

    def add(name: str, path: str) -> None:
        if path == "torch.compile" or "_inductor" in path or name not in aliases:
            aliases[name] = path

    assignments = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                add(alias.asname or first, alias.name if alias.asname else first)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = "compile" if alias.name == "*" and node.module == "torch" else alias.name
                add(alias.asname or name, f"{node.module}.{name}")
        elif isinstance(node, ASSIGNMENT) and node.value:
            assignments.append(node)
    for _ in range(4):  # an alias of an alias of ...
        for node in assignments:
            if (path := dotted(node.value, aliases)) in ("torch", "torch.compile", "functools", "functools.partial"):
                for target in targets(node):
                    if isinstance(target, PLACE):
                        add(dotted(target, {}), path)
    return aliases


@dataclass(frozen=True)
class Reference:
    """Data and validation code, as canonical text."""

    statements: dict[str, str]  # of the section "# Data: ...", by name
    validate: str  # Trainer.validate

    @staticmethod
    def read(path: Path) -> Reference:
        """Raises LogError where the file cannot be read or lacks them."""
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError) as error:
            raise LogError(f"--reference {path}: cannot be read as Python ({error})") from error
        banners = [(text.count("\n", 0, m.start()) + 1, m[1]) for m in BANNER.finditer(text)]
        begin = next((line for line, title in banners if title.startswith("Data: ")), math.inf)
        end = next((line for line, _ in banners if line > begin), math.inf)
        section = [statement for statement in tree.body if begin < statement.lineno < end]
        statements = {name: canonical(statement) for statement in section for name in bound_names(statement)}
        trainers = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer"]
        validates = [part for node in trainers for part in node.body if "validate" in bound_names(part)]
        if not statements or len(validates) != 1:
            raise LogError(f"--reference {path}: expected a section '# Data: ...' and one Trainer.validate, as in ours")
        return Reference(statements, canonical(validates[0]))


def data(tree: ast.Module, reference: Reference) -> Iterator[str]:
    """The code that reads data and validates is that of the reference, wherever it stands, and defined once."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in bound_names(statement):
            found.setdefault(name, []).append(statement)
    if not found.keys() & {*reference.statements, "Trainer"}:
        yield "not this repository's train_gpt.py: cannot be judged by rule; use --no-rules for its statistics"
        return
    for name, wanted in reference.statements.items():
        yield from compare_definitions(name, found.get(name, []), wanted)
    trainers = found.get("Trainer", [])
    if len(trainers) == 1 and isinstance(trainers[0], ast.ClassDef):
        validates = [node for node in trainers[0].body if "validate" in bound_names(node)]
        yield from compare_definitions("Trainer.validate", validates, reference.validate)
    else:
        yield f"Trainer is defined {len(trainers)} times at top level, expected one class"
    yield from replaced(tree, {*reference.statements})


def compare_definitions(name: str, found: list[ast.stmt], wanted: str) -> Iterator[str]:
    if len(found) != 1:
        yield f"{name} is defined {len(found)} times at top level, expected once"
    elif canonical(found[0]) != wanted:
        yield f"{name} (line {found[0].lineno} of its source) differs from the reference"


def replaced(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Other ways to replace what `names` or Trainer.validate stand for: attributes, `global`, derived classes."""
    for node in ast.walk(tree):
        reason = ""
        if isinstance(node, ast.Global) and names & set(node.names):
            reason = f"global {', '.join(node.names)}"
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if last_name(node.value) in names or node.attr == "validate":
                reason = f"{dotted(node, {})} is assigned"
        elif isinstance(node, ast.Call) and dotted(node.func, {}) == "setattr" and node.args:
            constants = {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
            if last_name(node.args[0]) in names or "validate" in constants:
                reason = "setattr"
        elif isinstance(node, ast.ClassDef):
            bases = [last_name(base) for base in node.bases]
            if names & set(bases):
                reason = f"class {node.name} derives from {', '.join(bases)}"
            elif node.name != "Trainer" and any("validate" in bound_names(part) for part in node.body):
                reason = f"class {node.name} has its own validate"
        if reason:
            yield f"line {node.lineno} of its source: {reason}, which replaces data or validation code"


def bound_names(statement: ast.stmt) -> list[str]:
    """Names that a statement binds: definitions, assignments, imports, also inside if, try, with and for."""
    if isinstance(statement, DEFINITION):
        return [statement.name]
    names = []
    for node in ast.walk(statement):
        if isinstance(node, DEFINITION):
            names.append(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.append(node.id)
        elif isinstance(node, ast.alias):
            names.append((node.asname or node.name).split(".")[0])
    return names


def canonical(statement: ast.stmt) -> str:
    """Text of a syntax tree without docstrings, comments, layout and positions."""
    statement = ast.parse(ast.unparse(statement))
    for node in ast.walk(statement):
        if isinstance(node, DEFINITION) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(statement)


def validation(log: Log, tree: ast.Module, track: Track) -> Iterator[str]:
    """Validation tokens, their separator and the target are the official ones, in the settings and in the source."""
    official = {"val_tokens": track.data.val_tokens, "bos": track.data.bos, "target_loss": track.target_loss}
    for name, value in official.items():
        key = name if name == "target_loss" else f"data.{name}"
        if not equals(log.settings.get(key), value):
            yield f"settings: {key} is {log.settings.get(key)}, officially {value}"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and last_name(node.func) == "Track"]
    calls = [c for c in calls if any(k.arg == "name" and ast.unparse(k.value) == repr(track.name) for k in c.keywords)]
    if len(calls) != 1:
        yield f"its source has {len(calls)} calls Track(name='{track.name}', ...), expected one"
    keywords = [node for call in calls for node in ast.walk(call) if isinstance(node, ast.keyword)]
    if calls and not any(keyword.arg == "val_tokens" for keyword in keywords):
        yield f"its Track(name='{track.name}', ...) does not spell out val_tokens"
    for keyword in keywords:
        if keyword.arg in official and not equals(ast.unparse(keyword.value), official[keyword.arg]):
            yield f"line {keyword.lineno} of its source: {keyword.arg} is not {official[keyword.arg]}, the official one"


def equals(text: str | None, number: float) -> bool:
    try:
        return text is not None and float(text) == number
    except ValueError:
        return False


def source(logs: list[Log]) -> Iterator[tuple[Log, str]]:
    """All logs begin with the same text."""
    for log in logs[1:]:
        if log.source != logs[0].source:
            pairs = zip((log.source or "").split("\n"), (logs[0].source or "").split("\n"), strict=False)
            line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), "its end")
            yield log, f"its source differs from that of {logs[0].path}, first at line {line}"


def duplicates(logs: list[Log]) -> Iterator[tuple[Log, str]]:
    """No run counts twice."""
    runs: dict[object, Log] = {}
    for log in logs:
        run = tuple((event.step, event.seconds, event.val_loss, event.train_loss) for event in log.events)
        if (first := runs.setdefault(run, log)) is not log:
            yield log, f"the same run as {first.path}: all lines are equal"
        elif "seed" in log.settings and (first := runs.setdefault(log.settings["seed"], log)) is not log:
            yield log, f"seed {log.settings['seed']}, as in {first.path}"


def hardware(logs: list[Log]) -> Iterator[tuple[Log, str]]:
    """All logs name the same hardware, as far as they name it."""
    first = describe_hardware(logs[0])
    for log in logs[1:]:
        for kind, name in describe_hardware(log).items():
            if name != first.get(kind, name):
                yield log, f"{kind} {name}, but {logs[0].path} has {first[kind]}"


def describe_hardware(log: Log) -> dict[str, str]:
    """What the environment says of "Device" (kind and number), "CPU" and "GPU"."""
    found = {"Device": log.settings.get("Device", "").split(",")[0], "CPU": log.settings.get("CPU", "")}
    found["GPU"] = ", ".join(GPU_NAME.findall(log.environment))
    return {kind: name for kind, name in found.items() if name}


def named_track(logs: list[Log], name: str, given: bool) -> Iterator[tuple[Log, str]]:
    """All logs are of the track `name`; without --track they have to say so."""
    for log in logs:
        if log.track != name and (log.track is not None or not given):
            yield log, f"its track is {log.track}, not {name}" if log.track else "does not name its track"


# ----------------------------------------------------------------------------------------------------------------------
# Verdict
# ----------------------------------------------------------------------------------------------------------------------


def broken_rules(logs: list[Log], against: list[Log], track: Track, given: bool, reference: Reference) -> list[Broken]:
    """All rules that the logs break. Of those in `against` only completeness, clock, track and hardware count."""
    broken: list[Broken] = []

    def add(rule: str, log: Log, reasons: Iterable[str]) -> None:
        try:
            reasons = list(reasons)
        except (RecursionError, OverflowError) as error:
            reasons = [f"cannot be judged ({error})"]
        if len(reasons) > MAX_REASONS:
            reasons[MAX_REASONS - 1 :] = [f"and {len(reasons) - MAX_REASONS + 1} more like these"]
        broken.extend(Broken(str(log.path), rule, reason) for reason in reasons)

    trees: dict[str, ast.Module] = {}
    for log in [*logs, *against]:
        add("complete", log, complete(log))
        add("clock", log, clock(log))
    for log in logs:
        if log.source is None:
            continue
        try:
            tree = trees.get(log.source) or trees.setdefault(log.source, parse_source(log))
        except LogError as error:
            add("source", log, [str(error)])
            continue
        add("options", log, options(log, tree, track.name))
        add("data", log, data(tree, reference))
        add("validation", log, validation(log, tree, track))
    found = {"track": named_track([*logs, *against], track.name, given), "source": source(logs)}
    found |= {"duplicates": duplicates(logs), "hardware": hardware([*logs, *against]) if against else ()}
    for rule, pairs in found.items():
        for log, reason in pairs:
            add(rule, log, [reason])
    return broken


def shortcomings(result: dict, systems_only: bool) -> list[str]:
    """Why the runs fail, in words; none where they pass."""
    mean, target, p, against = (result[key] for key in ("mean", "target", "p", "against"))
    found = []
    if result["n"] < 2 or (against and against["n"] < 2):
        found.append("at least 2 runs are needed")
    if mean is None or mean > target:
        found.append(f"the mean loss is not below {target}")
    if not systems_only and (p is None or p >= P_MAX):
        found.append(f"p of the loss {number(p)} is not below {P_MAX}")
    if against and (against["time_p"] is None or against["time_p"] >= P_MAX):
        found.append(f"not faster: p of the time {number(against['time_p'])} is not below {P_MAX}")
    if systems_only and (against["loss_p"] is None or against["loss_p"] < SAME_LOSS_P):
        found.append(f"the losses differ: two-sided p {number(against['loss_p'])} is below {SAME_LOSS_P}")
    if rules := sorted({b["rule"] for b in result["broken"]}):
        found.append(f"{len(result['broken'])} offences against {', '.join(rules)}")
    return found


def judge(logs: list[Log], against: list[Log], command: argparse.Namespace) -> dict[str, object]:
    """Statistics, broken rules and verdict, as they go into JSON. Raises LogError where there is nothing to judge."""
    name = command.track or next((log.track for log in logs if log.track is not None), None)
    if name is None:
        raise LogError("the logs do not name their track: add --track")
    tracks = official_tracks()
    if name not in tracks:
        raise LogError(f"unknown track '{name}'; there are: {', '.join(sorted(tracks))}")
    lacking = [log for log in logs if log.final is None or not math.isfinite(log.final.val_loss)]
    if lacking and (command.no_rules or len(lacking) == len(logs)):
        raise LogError(f"{lacking[0].path}: no finite loss of a last validation, so there is nothing to judge")
    track, broken = tracks[name], []
    if not command.no_rules:
        broken = broken_rules(logs, against, track, command.track is not None, Reference.read(command.reference))
    losses, times = final_values(logs)
    (mean, _, std), (time_mean, time_median, time_std) = summary(losses), summary(times)
    result = {
        "track": name,
        "target": track.target_loss,
        "n": len(logs),
        "losses": losses,
        "mean": mean,
        "std": std,
        "p": p_below(losses, track.target_loss),
        "times": times,
        "time_mean": time_mean,
        "time_median": time_median,
        "time_std": time_std,
        "against": compare(losses, times, against) if against else None,
        "broken": [asdict(b) for b in broken],
    }
    found = shortcomings(result, command.systems_only)
    if command.no_rules:
        return result | {"verdict": "statistics only", "passed": None}
    return result | {"verdict": f"fail: {'; '.join(found)}" if found else "pass", "passed": not found}


def official_tracks() -> dict[str, Track]:
    """The tracks of the repository's train_gpt.py, by name."""
    if str(REPO) not in sys.path:
        sys.path.insert(0, str(REPO))
    import train_gpt  # here, because it takes 3 s that a wrong option need not wait for

    return {value.name: value for value in vars(train_gpt).values() if isinstance(value, train_gpt.Track)}


def number(value: float | None, form: str = ".3g") -> str:
    return "unknown" if value is None else f"{value:{form}}"


def report(result: dict) -> Iterator[str]:
    """The lines for the terminal."""
    join = lambda values, form: " ".join(f"{value:{form}}" for value in values) or "unknown"
    yield f"track {result['track']}, target {result['target']}, n = {result['n']}"
    yield f"validation loss: {join(result['losses'], '.4f')}"
    yield f"  mean {number(result['mean'], '.5f')}, std {number(result['std'], '.5f')}, p {number(result['p'])}"
    yield f"training time (s): {join(result['times'], '.3f')}"
    mean, median, std = (number(result[f"time_{key}"], ".3f") for key in ("mean", "median", "std"))
    yield f"  mean {mean}, median {median}, std {std}"
    if a := result["against"]:
        yield f"against n = {a['n']}: {join(a['times'], '.3f')} s, validation loss {join(a['losses'], '.4f')}"
        yield (
            f"  time: {number(a['time_difference'], '+.3f')} s (95 % interval "
            f"{join((number(x, '+.3f') for x in a['time_interval'] or ()), '')}), {number(a['ratio'], '.3f')} x as "
            f"fast, p {number(a['time_p'])}"
        )
        yield f"  loss: mean {number(a['mean'], '.5f')}, two-sided p {number(a['loss_p'])}"
    for broken in result["broken"]:
        yield f"[{broken['rule']}] {broken['file']}: {broken['reason']}"
    yield result["verdict"]


def read_logs(paths: list[Path]) -> list[Log]:
    """The logs, and those in folders. Raises LogError where one cannot be read or has no line of a run."""
    files = []
    for path in paths:
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise LogError(f"{path}: no *.txt in this folder")
        files += found
    logs = [parse_log(path) for path in files]
    for log in logs:
        if not log.events:
            raise LogError(
                f"{log.path}: no line such as 'step:250/1765 val_loss:4.1234 train_time:12345ms': is it a log?"
            )
    return logs


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 pass (or --no-rules), 1 fail, 2 nothing to judge."""
    parser = argparse.ArgumentParser(prog="records/check.py", description="Judges the logs of runs.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs/<run_id>.txt, or a folder of them")
    parser.add_argument("--track", help="track of the runs, where the logs do not say it")
    parser.add_argument("--against", nargs="+", type=Path, metavar="LOG", default=[], help="runs to be faster than")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.add_argument("--systems-only", action="store_true", help="faster at the same loss: no p of the loss")
    parser.add_argument("--reference", type=Path, default=REPO / "train_gpt.py", help="data and validation code")
    parser.add_argument("--no-rules", action="store_true", help="statistics only, for other programs")
    command = parser.parse_args(argv)
    if command.systems_only and not command.against:
        parser.error("--systems-only needs --against: the runs of the record that this one speeds up")
    try:
        result = judge(read_logs(command.logs), read_logs(command.against), command)
    except (LogError, ImportError, OSError) as error:
        print(f"records/check.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2, allow_nan=False) if command.json else "\n".join(report(result)))
    return 0 if result["passed"] is not False else 1


if __name__ == "__main__":
    sys.exit(main())
