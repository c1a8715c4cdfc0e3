"""Judges the logs of runs: is the mean validation loss below the target, how long did they take, are the rules kept?

    python records/check.py LOG…                          # exit code 0: p < 0.01 and all rules kept; 1: not; 2: no log
    python records/check.py LOG… --against LOG…           # and faster than those, at p < 0.01 (Welch's t-test)
    python records/check.py LOG… --track small --no-rules # statistics alone, for the logs of other programs
    python records/check.py --accept WHY                  # from now on train_gpt.py's data code is accepted as well

A LOG may also be a folder: all *.txt in it that have steps. The rules look at what a log says and at the source text
that it begins with. What is official stands in accepted.json (see accepted.py), and nowhere in a log or beside it. They
catch slips and simple forgeries; a record still wants a person who reads its source.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

from scipy import stats

from accepted import Accepted, Competition, accept, unaccepted
from runlogs import Log, LogError, finite, read_logs

P_MAX = 0.01  # for "below the target" and for "faster"
MAX_REASONS = 10  # per rule and log
MAX_NAMES = 2  # of the logs that share an offence
SAME_LOSS_P = 0.05  # two-sided; below it two sets of losses differ
LAST_NOTE = re.compile(r"peak memory allocated: \d+ MiB reserved: \d+ MiB")
COORDINATE_DESCENT = "coordinate_descent_tuning"
AT_THE_END = "inductor at the end: "
COMPILE_OPTION = re.compile(  # in a text
    r"\b_inductor\b|\binductor\.\w|TORCHINDUCTOR"
    r"|(?<!\bre)\.compile\s*[(,](?:[^()]|\([^()]*\)){0,400}?\b(?:mode|options|backend)\s*="
)
TUNING = (  # what train_gpt.py had before its logs said which options are set: off, but on `medium`
    "from torch._inductor import config as inductor",
    f"inductor.{COORDINATE_DESCENT} = track.{COORDINATE_DESCENT}",
)
Broken = dict[str, str]  # "file", "rule" and "reason": a rule that a log breaks


# ---- statistics ----


def t_test(ours: list[float], other: float | list[float], alternative: str) -> tuple[float | None, list | None]:
    """t-test of mean(ours) against a number, or Welch's against mean(other): p and the 95 % interval of the difference.

    `alternative` is "less" or "two-sided". Both results are None for fewer than 2 values on a side.
    """
    if min(len(values) for values in (ours, other) if isinstance(values, list)) < 2:
        return None, None
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # equal values; they are rounded
        if isinstance(other, list):
            result = stats.ttest_ind(ours, other, equal_var=False, alternative=alternative)
        else:
            result = stats.ttest_1samp(ours, other, alternative=alternative)
        interval = [float(x) if math.isfinite(x) else None for x in result.confidence_interval(0.95)]  # for JSON
    return 1.0 if math.isnan(result.pvalue) else float(result.pvalue), interval  # NaN: all values are the same


def summary(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, median and standard deviation (ddof = 1), as far as there are enough values."""
    if not values:
        return None, None, None
    return statistics.fmean(values), statistics.median(values), statistics.stdev(values) if len(values) > 1 else None


def final_values(logs: list[Log]) -> tuple[list[float], list[float]]:
    """Losses of the last validation and training times in seconds there, of the logs that have them."""
    finals = [log.final for log in logs if log.final is not None]
    return [loss for _, loss in finite(finals, "val_loss")], [seconds for _, seconds in finite(finals, "seconds")]


def compare(losses: list[float], times: list[float], against: list[Log]) -> dict[str, object]:
    """Times and losses of our runs against those of others."""
    their_losses, their_times = final_values(against)
    mean, their_mean = summary(times)[0], summary(their_times)[0]
    known = None not in (mean, their_mean)
    return {
        "n": len(against),
        "losses": their_losses,
        "mean": summary(their_losses)[0],
        "times": their_times,
        "time_mean": their_mean,
        "time_difference": mean - their_mean if known else None,
        "time_interval": t_test(times, their_times, "two-sided")[1],
        "ratio": their_mean / mean if known and mean > 0 else None,
        "time_p": t_test(times, their_times, "less")[0],
        "loss_p": t_test(losses, their_losses, "two-sided")[0],
    }


# ---- rules: each yields the reasons why a log breaks it. ----


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
        trained = {event.step for event in log.events if event.val_loss is None}
        if missing := next((step for step in range(1, total + 1) if step not in trained), None):
            yield f"no line of step {missing} of {total}"
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

    Logs of other programs may have no averages at all.
    """
    averaged = log.track is not None or any(event.average is not None for event in log.events)
    before = 0.0
    for event in log.events:
        at = f"line {event.line}"
        if event.seconds is None or not math.isfinite(event.seconds):
            yield f"{at}: no training time"
            continue
        steps = max(event.step, 1)
        if event.average is None and averaged:
            yield f"{at}: no average"
        elif averaged:
            expected = event.average * steps
            if not abs(expected - event.seconds) <= 1e-3 + 6e-6 * steps + 1e-4 * event.seconds:  # rounding
                yield f"{at}: {event.seconds:.3f} s, but its average over {steps} steps gives {expected:.3f} s"
        if event.seconds < before:
            yield f"{at}: the clock falls from {before:.3f} to {event.seconds:.3f} s"
        before = event.seconds


def options(log: Log, track: str) -> Iterator[str]:
    """Nothing of inductor but its defaults, and of torch.compile only `dynamic` and `fullgraph`.

    `medium` may tune by coordinate descent. Our logs say what was set at both ends of the run; for those that do not,
    ours of before and other programs', their source is searched as plain text: comments count, and aliases hide what
    they stand for.
    """
    if "inductor" in log.settings:
        at_the_end = [note.removeprefix(AT_THE_END) for note in log.notes if note.startswith(AT_THE_END)]
        found = {}
        for said in (log.settings["inductor"], *at_the_end):
            try:
                found |= dict(json.loads(said))
            except (ValueError, TypeError):
                yield f"settings: inductor is {said[:120]!r}, expected its options as JSON"
        for name, value in found.items():
            if track != "medium" or name != COORDINATE_DESCENT:
                yield f"settings: inductor has {name} = {value}"
        return
    source = log.source or ""
    may_tune = track == "medium" or log.settings.get(COORDINATE_DESCENT) == "False"
    for number in sorted({source.count("\n", 0, match.start()) for match in COMPILE_OPTION.finditer(source)}):
        line = source.split("\n")[number].strip()
        tunes = line in TUNING or line.startswith(f"torch._inductor.config.{COORDINATE_DESCENT} = ")
        if not (tunes and may_tune):
            yield f"line {number + 1} of its source, found by a search of its text: {line[:100]}"


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


def data_state(logs: list[Log], competition: Competition, broken: list[Broken]) -> str:
    """Whether the shards that the logs read are known to be the official ones: "verified", or why not."""
    if any(b["rule"] == "data" for b in broken):
        return "not verified: see the offences"
    if not all(log.data for log in logs):
        return "unverified: the logs do not say which shards they read"
    official = competition.official_shards()
    unknown = {name for log in logs for name in log.data if official[name] is None}
    if unknown:
        return f"unverified: {len(unknown)} SHA-256 are not known here: python data/cached_fineweb10B.py asks the hub"
    return "verified"


def alike(logs: list[Log]) -> Iterator[tuple[str, Log, str]]:
    """(rule, log, reason) where logs of a set do not begin with the same text or did not read the same shards."""
    first = logs[0]
    for log in logs[1:]:
        if log.source != first.source:
            pairs = zip((log.source or "").split("\n"), (first.source or "").split("\n"), strict=False)
            line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), "its end")
            yield "source", log, f"its source differs from that of {first.path}, first at line {line}"
        if [*log.data.items()] != [*first.data.items()]:
            yield "data", log, f"its data lines differ from those of {first.path}"


def duplicates(logs: list[Log]) -> Iterator[tuple[str, Log, str]]:
    """No run counts twice."""
    runs: dict[object, Log] = {}
    for log in logs:
        run = tuple((event.step, event.seconds, event.val_loss, event.train_loss) for event in log.events)
        if (first := runs.setdefault(run, log)) is not log:
            yield "duplicates", log, f"the same run as {first.path}: all lines are equal"
        elif "seed" in log.settings and (first := runs.setdefault(log.settings["seed"], log)) is not log:
            yield "duplicates", log, f"seed {log.settings['seed']}, as in {first.path}"


def hardware(logs: list[Log]) -> Iterator[tuple[str, Log, str]]:
    """All logs name the same hardware, as far as they name it."""
    first = logs[0].hardware
    for log in logs[1:]:
        for kind, name in log.hardware.items():
            if name != first.get(kind, name):
                yield "hardware", log, f"{kind} {name}, but {logs[0].path} has {first[kind]}"


def named_track(logs: list[Log], of: Competition, given: bool, accepted: Accepted) -> Iterator[tuple[str, Log, str]]:
    """All logs are of this competition; without --track they have to name their track."""
    for log in logs:
        if log.track != of.track and (log.track is not None or not given):
            reason = f"its track is {log.track}, not {of.track}" if log.track else "does not name its track"
            yield "track", log, reason
        elif (other := accepted.competition_of(log, of.track)) not in (None, of):
            yield "track", log, f"its competition is '{other.name}', not '{of.name}'"


# ---- verdict ----


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
        broken.extend({"file": str(log.path), "rule": rule, "reason": reason} for reason in reasons)

    parse = functools.cache(ast.parse)  # most logs of a set begin with the same text
    official, everyone = competition.official_shards(), [*logs, *against]
    for log in everyone:
        add("complete", log, complete(log))
        add("clock", log, clock(log))
    for log in logs:
        add("data", log, shards(log, official))
        add("options", log, options(log, competition.track))
        if log.source is None:
            continue
        try:
            tree = parse(log.source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            add("source", log, [f"the source at its top is not Python ({error})"])
            continue
        add("data", log, unaccepted(tree, accepted.data_code))
        add("validation", log, chain(competition.unofficial(log), competition.unofficial_in(tree)))
    of_track, of_machine = named_track(everyone, competition, given, accepted), hardware(everyone) if against else ()
    for rule, log, reason in chain(of_track, alike(logs), duplicates(logs), of_machine):
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
    competition = accepted.competition_of_set(logs, name)
    lacking = [log for log in logs if not finite(log.val[-1:], "val_loss")]
    if lacking and (command.no_rules or len(lacking) == len(logs)):
        raise LogError(f"{lacking[0].path}: no finite loss of a last validation, so there is nothing to judge")
    given, rules = command.track is not None, not command.no_rules
    broken = broken_rules(logs, against, competition, given, accepted) if rules else []
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
        "p": t_test(losses, competition.target_loss, "less")[0],
        "times": times,
        "time_mean": time_mean,
        "time_median": time_median,
        "time_std": time_std,
        "against": compare(losses, times, against) if against else None,
        "data": data_state(logs, competition, broken) if rules else None,
        "broken": broken,
    }
    if not rules:
        return result | {"verdict": "statistics only", "passed": None}
    found = shortcomings(result, command.systems_only)
    verdict = f"fail: {'; '.join(found)}" if found else "pass"
    verdict += ", data unverified" if result["data"].startswith("unverified") else ""
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
