"""Judges the logs of runs: is the mean validation loss below the target, how long did they take, are the rules kept?

    python records/check.py LOG…                          # exit code 0: p < 0.01 and all rules kept; 1: not; 2: no log
    python records/check.py LOG… --against LOG…           # and faster than those, at p < 0.01 (Welch's t-test)
    python records/check.py LOG… --track small --no-rules # statistics alone, for the logs of other programs
    python records/check.py --accept WHY                  # from now on train_gpt.py's data code is accepted as well

A LOG may also be a folder: all *.txt in it that have steps. The rules look at what a log says and at the source text
that it begins with, as a syntax tree. What is official stands in accepted.json (see accepted.py), and nowhere in a log
or beside it. They catch slips and simple forgeries; a record still wants a person who reads its source.
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

from accepted import DEFINITION, Accepted, Competition, Form, accept, bound_names, digest, equals, validates_of
from runlogs import Log, LogError, parse_log, parse_source

P_MAX = 0.01  # for "below the target" and for "faster"
MAX_REASONS = 10  # per rule and log
MAX_NAMES = 2  # of the logs that share an offence
SAME_LOSS_P = 0.05  # two-sided; below it two sets of losses differ
LAST_NOTE = re.compile(r"peak memory allocated: \d+ MiB reserved: \d+ MiB")
GPU_NAME = re.compile(r"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", re.MULTILINE)  # in the table of nvidia-smi

INDUCTOR_NAME = re.compile(r"[\w.]*\b_inductor\b[\w.]*|TORCHINDUCTOR\w*")
TAKES_CODE = {"exec", "eval"}
TAKES_MODULE = {"import_module", "__import__"}
TAKES_NAME = {"getattr", "setattr", "delattr", "attrgetter", "putenv", "setdefault", "update", "patch"}
COORDINATE_DESCENT = "torch._inductor.config.coordinate_descent_tuning"
COMPILE_KEYWORDS = {"dynamic", "fullgraph"}
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


def data(tree: ast.Module, forms: list[Form]) -> Iterator[str]:
    """The code that reads data and validates has one of the accepted forms, wherever it stands, and is defined once."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in bound_names(statement):
            found.setdefault(name, []).append(statement)
    names = {name for form in forms for name in form.digests}
    if not found.keys() & {*names, "Trainer"}:
        yield "not this repository's train_gpt.py: cannot be judged by rule; use --no-rules for its statistics"
        return
    trainers = found.get("Trainer", [])
    if len(trainers) != 1 or not isinstance(trainers[0], ast.ClassDef):
        yield f"Trainer is defined {len(trainers)} times at top level, expected one class"
    found["Trainer.validate"] = validates_of(trainers)
    digests = {name: digest(found[name][0]) for name in names if len(found.get(name, [])) == 1}
    compared = [(list(compare_definitions(form, found, digests)), form) for form in reversed(forms)]
    differences, closest = min(compared, key=lambda pair: len(pair[0]))  # of several the latest
    yield from differences
    yield from replaced(tree, {*closest.digests} - {"Trainer.validate"})


def compare_definitions(form: Form, found: dict[str, list[ast.stmt]], digests: dict[str, str]) -> Iterator[str]:
    for name, wanted in form.digests.items():
        statements = found.get(name, [])
        if len(statements) != 1:
            yield f"{name} is defined {len(statements)} times at top level, expected once"
        elif digests[name] != wanted:
            line = statements[0].lineno
            yield f"{name} (line {line} of its source) differs from the form accepted on {form.date}: {form.why}"


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


def validation(log: Log, tree: ast.Module, competition: Competition) -> Iterator[str]:
    """Validation tokens, their separator and the target are the official ones, in the settings and in the source.

    A track may take its data from another: `data=replace(SMALL.data, ...)`.
    """
    yield from competition.unofficial(log)
    track, official = competition.track, competition.numbers()
    tracks = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and last_name(node.func) == "Track"]
    calls = [c for c in tracks if any(k.arg == "name" and ast.unparse(k.value) == repr(track) for k in c.keywords)]
    if len(calls) != 1:
        yield f"its source has {len(calls)} calls Track(name='{track}', ...), expected one"
    parts = [node for call in calls for node in ast.walk(call)]
    keywords = [node for node in parts if isinstance(node, ast.keyword)]
    others = {last_name(node.value) for node in parts if isinstance(node, ast.Attribute) and node.attr == "data"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.value in tracks and {last_name(t) for t in node.targets} & others:
            found = (part for part in ast.walk(node.value) if isinstance(part, ast.keyword))
            keywords += [keyword for keyword in found if keyword.arg != "target_loss"]
    if calls and not any(keyword.arg == "val_tokens" for keyword in keywords):
        yield f"its Track(name='{track}', ...) does not spell out val_tokens"
    for keyword in keywords:
        if keyword.arg in official and not equals(ast.unparse(keyword.value), official[keyword.arg]):
            yield f"line {keyword.lineno} of its source: {keyword.arg} is not {official[keyword.arg]}, the official one"


def shards(log: Log, official: dict[str, str | None]) -> Iterator[str]:
    """The shards that a log names are the official ones: for training the first, in order, each read once.

    A log that names none is from before they did, and breaks nothing.
    """
    if log.settings.get("data.epochs", "1") != "1":
        yield f"settings: data.epochs is {log.settings['data.epochs']}: what repeats its data does not compare"
    for note in log.notes:
        if note.startswith("data:"):
            yield f"expected 'data: NAME TOKENS tokens sha256 HEX', each shard once, found {note[:120]!r}"
    if not log.data:
        return
    strangers = [name for name in log.data if name not in official]
    if strangers:
        yield f"it read {', '.join(strangers)}: not of the official data, which begin with {next(iter(official))}"
    for kind in ("train", "val"):
        read, wanted = ([name for name in names if f"_{kind}_" in name] for names in (log.data, official))
        if not strangers and (not read or read != wanted[: len(read)]):
            yield f"its {kind} shards are {', '.join(read) or 'none'}, expected {wanted[0]} and what follows, in order"
    for name, (_, sha256) in log.data.items():
        if official.get(name) not in (None, sha256):
            yield f"{name} has SHA-256 {sha256}, officially {official[name]}"


def same_shards(logs: list[Log]) -> Iterator[tuple[Log, str]]:
    """All logs read the same."""
    for log in logs[1:]:
        if list(log.data.items()) != list(logs[0].data.items()):
            yield log, f"its data lines differ from those of {logs[0].path}"


def data_state(logs: list[Log], competition: Competition, broken: list[Broken]) -> str:
    """Whether the shards that the logs read are known to be the official ones: "verified", or why not."""
    if any(b.rule == "data" for b in broken):
        return "not verified: see the offences"
    if not all(log.data for log in logs):
        return "unverified: the logs do not say which shards they read"
    official = competition.official_shards()
    unknown = {name for log in logs for name in log.data if official[name] is None}
    if unknown:
        return f"unverified: {len(unknown)} SHA-256 are not known here: python data/cached_fineweb10B.py asks the hub"
    return "verified"


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


def named_track(
    logs: list[Log], competition: Competition, given: bool, accepted: Accepted
) -> Iterator[tuple[Log, str]]:
    """All logs are of this competition; without --track they have to name their track."""
    name = competition.track
    for log in logs:
        if log.track != name and (log.track is not None or not given):
            yield log, f"its track is {log.track}, not {name}" if log.track else "does not name its track"
        elif (other := accepted.competition_of(log, name)) not in (None, competition):
            yield log, f"its competition is '{other.name}', not '{competition.name}'"


# ----------------------------------------------------------------------------------------------------------------------
# Verdict
# ----------------------------------------------------------------------------------------------------------------------


def broken_rules(
    logs: list[Log], against: list[Log], competition: Competition, given: bool, accepted: Accepted
) -> list[Broken]:
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
    official = competition.official_shards()
    for log in [*logs, *against]:
        add("complete", log, complete(log))
        add("clock", log, clock(log))
    for log in logs:
        add("data", log, shards(log, official))
        if log.source is None:
            continue
        try:
            tree = trees.get(log.source) or trees.setdefault(log.source, parse_source(log))
        except LogError as error:
            add("source", log, [str(error)])
            continue
        add("options", log, options(log, tree, competition.track))
        add("data", log, data(tree, accepted.data_code))
        add("validation", log, validation(log, tree, competition))
    found = {"track": named_track([*logs, *against], competition, given, accepted), "source": source(logs)}
    found |= {"data": same_shards(logs), "duplicates": duplicates(logs)}
    found |= {"hardware": hardware([*logs, *against]) if against else ()}
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
    accepted = Accepted.read()
    present = {c.track: c for c in reversed(accepted.competitions)}
    if name not in present:
        raise LogError(f"unknown track '{name}'; there are: {', '.join(sorted(present))}")
    lacking = [log for log in logs if log.final is None or not math.isfinite(log.final.val_loss)]
    if lacking and (command.no_rules or len(lacking) == len(logs)):
        raise LogError(f"{lacking[0].path}: no finite loss of a last validation, so there is nothing to judge")
    belonging = (accepted.competition_of(log, name) for log in logs)
    competition = next((c for c in belonging if c is not None), present[name])
    broken, state = [], None
    if not command.no_rules:
        broken = broken_rules(logs, against, competition, command.track is not None, accepted)
        state = data_state(logs, competition, broken)
    losses, times = final_values(logs)
    (mean, _, std), (time_mean, time_median, time_std) = summary(losses), summary(times)
    result = {
        "track": name,
        "competition": competition.name,
        "target": competition.target_loss,
        "n": len(logs),
        "losses": losses,
        "mean": mean,
        "std": std,
        "p": p_below(losses, competition.target_loss),
        "times": times,
        "time_mean": time_mean,
        "time_median": time_median,
        "time_std": time_std,
        "against": compare(losses, times, against) if against else None,
        "data": state,
        "broken": [asdict(b) for b in broken],
    }
    found = shortcomings(result, command.systems_only)
    if command.no_rules:
        return result | {"verdict": "statistics only", "passed": None}
    verdict = f"fail: {'; '.join(found)}" if found else "pass"
    if state.startswith("unverified"):
        verdict += ", data unverified"
    return result | {"verdict": verdict, "passed": not found}


def number(value: float | None, form: str = ".3g") -> str:
    return "unknown" if value is None else f"{value:{form}}"


def report(result: dict) -> Iterator[str]:
    """The lines for the terminal."""
    join = lambda values, form: " ".join(f"{value:{form}}" for value in values) or "unknown"
    if result["passed_over"]:
        yield f"passed over, they have no steps: {', '.join(result['passed_over'])}"
    yield f"track {result['track']}, target {result['target']}, n = {result['n']}"
    if result["competition"] != result["track"]:
        yield f"a competition that is closed: {result['competition']}"
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
    if result["data"]:
        yield f"data {result['data']}"
    offenders: dict[tuple[str, str], list[str]] = {}
    for broken in result["broken"]:
        offenders.setdefault((broken["rule"], broken["reason"]), []).append(broken["file"])
    for (rule, reason), files in offenders.items():
        names = ", ".join(files[:MAX_NAMES])
        if len(files) > 1:
            names = f"{len(files)} logs ({names}{', …' if len(files) > MAX_NAMES else ''})"
        yield f"[{rule}] {names}: {reason}"
    yield result["verdict"]


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


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 pass (or --no-rules, --accept), 1 fail, 2 nothing to judge."""
    parser = argparse.ArgumentParser(prog="records/check.py", description="Judges the logs of runs.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="logs/<run_id>.txt, or a folder of them")
    parser.add_argument("--track", help="track of the runs, where the logs do not say it")
    parser.add_argument("--against", nargs="+", type=Path, metavar="LOG", default=[], help="runs to be faster than")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.add_argument("--systems-only", action="store_true", help="faster at the same loss: no p of the loss")
    parser.add_argument("--no-rules", action="store_true", help="statistics only, for other programs")
    parser.add_argument("--accept", metavar="WHY", help="add the data code of train_gpt.py to accepted.json, and end")
    command = parser.parse_args(argv)
    if not command.logs and command.accept is None:
        parser.error("expected logs, or a folder of them")
    if command.systems_only and not command.against:
        parser.error("--systems-only needs --against: the runs of the record that this one speeds up")
    try:
        if command.accept is not None:
            print(accept(command.accept))
            return 0
        (logs, passed_over), (against, _) = read_logs(command.logs), read_logs(command.against)
        result = judge(logs, against, command) | {"passed_over": [str(path) for path in passed_over]}
    except (LogError, ImportError, OSError) as error:
        print(f"records/check.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2, allow_nan=False) if command.json else "\n".join(report(result)))
    return 0 if result["passed"] is not False else 1


if __name__ == "__main__":
    sys.exit(main())
