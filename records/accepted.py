"""What logs are judged by, which no log can change: accepted.json. `check.py --accept WHY` adds to it.

It holds the competitions (target, validation tokens and, where they are pinned, the shards; closed ones stay, for the
logs of their time) and the digests of every form that the code which reads data and validates has had.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from runlogs import Log, LogError

REPO = Path(__file__).resolve().parents[1]
ACCEPTED = Path(__file__).with_suffix(".json")
DATA_SECTION = re.compile(r"^# -+\n# Data: [^\n]*\n# -+\n(.*?)^# -+\n# ", re.MULTILINE | re.DOTALL)
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Competition:
    """What the logs of a track are judged by."""

    name: str  # that of the track, or what it was, for one that is closed
    track: str
    target_loss: float
    val_tokens: int
    bos: int
    dataset: str
    shards: dict[str, str] = field(default_factory=dict)  # SHA-256 by name, in order; empty: those of the hub

    def numbers(self) -> dict[str, float]:
        return {"val_tokens": self.val_tokens, "bos": self.bos, "target_loss": self.target_loss}

    def unofficial(self, log: Log) -> Iterator[str]:
        """Which of the settings of a log are not the official ones."""
        for name, official in self.numbers().items():
            key = name if name == "target_loss" else f"data.{name}"
            if not equals(log.settings.get(key), official):
                yield f"settings: {key} is {log.settings.get(key)}, officially {official}"

    def unofficial_in(self, tree: ast.Module) -> Iterator[str]:
        """Which numbers of a program's call Track(name=...) are not the official ones.

        A track may take its data from another: `data=replace(SMALL.data, ...)`.
        """
        tracks = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and last_name(node.func) == "Track"]
        calls = [c for c in tracks if f"name={self.track!r}" in map(ast.unparse, c.keywords)]
        if len(calls) != 1:
            yield f"its source has {len(calls)} calls Track(name='{self.track}', ...), expected one"
        parts = [node for call in calls for node in ast.walk(call)]
        keywords = [node for node in parts if isinstance(node, ast.keyword)]
        others = {last_name(node.value) for node in parts if isinstance(node, ast.Attribute) and node.attr == "data"}
        for node in tree.body:
            if isinstance(node, ast.Assign) and node.value in tracks and {last_name(t) for t in node.targets} & others:
                found = (part for part in ast.walk(node.value) if isinstance(part, ast.keyword))
                keywords += [keyword for keyword in found if keyword.arg != "target_loss"]
        if calls and not any(keyword.arg == "val_tokens" for keyword in keywords):
            yield f"its Track(name='{self.track}', ...) does not spell out val_tokens"
        for keyword in keywords:
            official = self.numbers().get(keyword.arg)
            if official is not None and not equals(ast.unparse(keyword.value), official):
                yield f"line {keyword.lineno} of its source: {keyword.arg} is not {official}, the official one"

    def fits(self, log: Log) -> bool:
        """Whether a log has the official settings and, as far as it names its shards, one that is pinned."""
        pinned = any(sha256 == self.shards.get(name) for name, (_, sha256) in log.data.items())
        return not any(self.unofficial(log)) and (pinned or not self.shards or not log.data)

    def official_shards(self) -> dict[str, str | None]:
        """SHA-256 of all shards by name, in order; None where it is not known here.

        Those of FineWeb are in the sidecar that data/cached_fineweb10B.py writes after it compared them with the hub's.
        """
        if self.shards:
            return dict(self.shards)
        sys.path.append(str(REPO / "data"))
        from cached_fineweb10B import DATASETS, ShardError, read_sidecar

        dataset = DATASETS[self.dataset]
        try:
            known = read_sidecar(REPO / "data" / self.dataset, dataset.repo)
        except ShardError:  # the folder holds those of another dataset
            known = {}
        return {name: known.get(name, {}).get("sha256") for name in dataset.shard_names(dataset.num_train)}


@dataclass(frozen=True)
class Form:
    """A form that the code which reads data and validates has had in train_gpt.py."""

    date: str  # of its acceptance
    why: str
    digests: dict[str, str]  # by name, of `digest`


@dataclass(frozen=True)
class Accepted:
    """What accepted.json holds."""

    competitions: list[Competition]  # of each track the open one, then closed ones, the oldest last
    data_code: list[Form]  # the latest last

    @staticmethod
    def read() -> Accepted:
        """Raises LogError where the file is not as it should be."""
        try:
            found = json.loads(ACCEPTED.read_text(encoding="utf-8"))
            competitions = [Competition(**entry) for entry in found["competitions"]]
            return Accepted(competitions, [Form(**entry) for entry in found["data_code"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LogError(f"{ACCEPTED}: cannot be read ({error!r}): restore it") from error

    def competition_of(self, log: Log, track: str) -> Competition | None:
        """The oldest competition of this track that a log fits; None where it fits none.

        The oldest, because logs have named their shards since the first competition was closed: one that names none is
        not of a later one with the same target.
        """
        fitting = [c for c in self.competitions if c.track == track and c.fits(log)]
        return fitting[-1] if fitting else None

    def competition_of_set(self, logs: list[Log], track: str) -> Competition:
        """That of the first log that fits one, else the open one. Raises LogError for a track that there is not."""
        present = {c.track: c for c in reversed(self.competitions)}
        if track not in present:
            raise LogError(f"unknown track '{track}'; there are: {', '.join(sorted(present))}")
        return next((c for log in logs if (c := self.competition_of(log, track))), present[track])


def equals(text: str | None, number: float) -> bool:
    try:
        return text is not None and float(text) == number
    except ValueError:
        return False


def accept(why: str) -> str:
    """Adds the data code of the repository's train_gpt.py to accepted.json. Returns what to say."""
    digests, accepted = data_code(REPO / "train_gpt.py"), Accepted.read()
    for form in accepted.data_code:
        if form.digests == digests:
            return f"accepted on {form.date} already: {form.why}"
    accepted.data_code.append(Form(date.today().isoformat(), why, digests))
    ACCEPTED.write_text(json.dumps(asdict(accepted), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"accepted: the data code of train_gpt.py, as form {len(accepted.data_code)} in {ACCEPTED}"


# ---- the code that reads data and validates ----


def data_code(path: Path) -> dict[str, str]:
    """Digests of the section "# Data: ..." of a train_gpt.py, by name, and of Trainer.validate.

    Raises LogError where the file cannot be read or lacks them.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found, match = definitions(ast.parse(text)), DATA_SECTION.search(text)
    except (OSError, SyntaxError, ValueError) as error:
        raise LogError(f"{path}: cannot be read as Python ({error})") from error
    section = match and definitions(ast.parse(match[1]))
    if not section or len(found.get("Trainer.validate", [])) != 1:
        raise LogError(f"{path}: expected a section '# Data: ...' and one Trainer.validate")
    return {name: digest(found[name][0]) for name in (*section, "Trainer.validate")}


def definitions(tree: ast.Module) -> dict[str, list[ast.stmt]]:
    """What binds each name at top level, and "Trainer.validate" in the classes of the name Trainer."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in bound_names(statement):
            found.setdefault(name, []).append(statement)
    trainers = [node for node in found.get("Trainer", []) if isinstance(node, ast.ClassDef)]
    if validates := [part for node in trainers for part in node.body if "validate" in bound_names(part)]:
        found["Trainer.validate"] = validates
    return found


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


def last_name(node: ast.AST) -> str:
    """The part after the last dot."""
    return ast.unparse(node).split(".")[-1]


def unaccepted(tree: ast.Module, forms: list[Form]) -> Iterator[str]:
    """Why the code of a program that reads data and validates has none of the accepted forms.

    It may stand anywhere, once, and nothing else may replace it.
    """
    found = definitions(tree)
    names = {name for form in forms for name in form.digests}
    if not found.keys() & {*names, "Trainer"}:
        yield "not this repository's train_gpt.py: cannot be judged by rule; use --no-rules for its statistics"
        return
    digests = {name: digest(found[name][0]) for name in names if len(found.get(name, [])) == 1}

    def differences(form: Form) -> Iterator[str]:
        for name in ("Trainer", *form.digests):
            if (times := len(found.get(name, []))) != 1:
                yield f"{name} is defined {times} times at top level, expected once"
            elif name in form.digests and digests[name] != form.digests[name]:
                line = f"line {found[name][0].lineno} of its source"
                yield f"{name} ({line}) differs from the form accepted on {form.date}: {form.why}"

    closest = min(reversed(forms), key=lambda form: len([*differences(form)]))  # of several the latest
    yield from differences(closest)
    yield from (f"{name} of Python is defined anew" for name in sorted(found.keys() & {*dir(builtins)}))
    yield from replaced(tree, {*closest.digests})


def replaced(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Other ways to replace what `names`, Trainer.validate or Python's own names in them stand for.

    Attributes, also of modules, `global`, derived classes, globals(). Not every way: a person reads a submission.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Global() if names & {*node.names}:
                reason = f"global {', '.join(node.names)}"
            case ast.Attribute(ctx=ast.Store()) if (
                node.attr == "validate"
                or last_name(node.value) in names
                or (node.attr in names and ast.unparse(node.value) != "self")  # self.validation_tokens is a field
            ):
                reason = f"{ast.unparse(node)} is assigned"
            case ast.Call(func=ast.Name("setattr"), args=[owner, name, *_]) if last_name(owner) in names or getattr(
                name, "value", None
            ) in {*names, "validate"}:
                reason = "setattr"
            case ast.Subscript(ctx=ast.Store(), value=ast.Call(func=ast.Name("globals" | "vars" as place))):
                reason = f"{place}() is assigned to"
            case ast.ClassDef(bases=bases) if names & {*map(last_name, bases)}:
                reason = f"class {node.name} derives from {', '.join(map(last_name, bases))}"
            case ast.ClassDef(body=body) if node.name != "Trainer" and any("validate" in bound_names(s) for s in body):
                reason = f"class {node.name} has its own validate"
            case _:
                continue
        yield f"line {node.lineno} of its source: {reason}, which replaces data or validation code"


def digest(statement: ast.stmt) -> str:
    return hashlib.sha256(canonical(statement).encode()).hexdigest()


def canonical(value: object) -> str:
    """Text of a syntax tree without docstrings, comments, layout and positions.

    The same in all versions of Python: ast.dump and ast.unparse are not, they follow the fields that versions add.
    """
    if isinstance(value, list):
        return f"[{', '.join(map(canonical, value))}]"
    if not isinstance(value, ast.AST):
        return ascii(value)  # what repr escapes depends on Python's version of Unicode
    fields = dict(ast.iter_fields(value))
    if isinstance(value, DEFINITION) and ast.get_docstring(value) is not None:
        fields["body"] = value.body[1:] or [ast.Pass()]
    elif isinstance(value, ast.JoinedStr):  # early 3.12 ends f"{x:{n}}" with an empty string
        fields["values"] = [part for part in value.values if getattr(part, "value", None) != ""]
    given = {name: part for name, part in fields.items() if part is not None and part != [] and name != "kind"}
    return f"{type(value).__name__}({', '.join(f'{name}={canonical(part)}' for name, part in given.items())})"
