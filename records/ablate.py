"""What is each technique worth? Trains a track with one switched off, or one that it lacks on, several seeds each.

    python records/ablate.py                          # nano, all variants, seeds 0 to 2, into records/nano/ablation
    python records/ablate.py nano --seeds 5 --only "no smear" "no key offset" --out mine
    python records/ablate.py --table                  # no training: the table of ablation.csv
    python records/ablate.py small                    # of a sibling, a quarter as wide, of the whole depth, on a CPU

Every variant is the track with a few numbers changed on the command line, printed in the table, so that each run can be
repeated alone. The result is ablation.csv, a line per run, and ablation.md, the table: change of
the validation loss after equally many steps, paired by seed with the full recipe, p of the paired t-test, and time to
the target.

A run is written down as soon as it is complete, and what is there is not trained again: interrupt it and call it again.
All rows are of one train_gpt.py: where ablation.csv has those of another, nothing is trained before you say --out
FOLDER, for a table of your own, or delete it. Times are shown of runs on the same CPU as the full recipe's.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from threading import Lock

from scipy import stats
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from runlogs import Log, LogError, parse_log

REPO = Path(__file__).resolve().parents[1]
FULL = "full recipe"


def per_stage(name: str, *values: object) -> str:
    """Options that give a field of the three stages these values."""
    return " ".join(f"--schedule.stages.{i}.{name} {value}" for i, value in enumerate(values))


# Of all runs of a track. Validate often, to see when the target is met, hence on the first eighth of the bytes only.
COMMON = {
    "nano": "--val-every 20 --data.val-tokens 65536 --sample-tokens 0",
    # A sibling on what tests/benchmarks/bpe_data.py writes, with windows and documents a quarter as long as well.
    "small": f"""
        --width 0.25 --model.vocab-size 4096 --data.bos 0 --model.ngram-rows 30720 --model.dc-window 28
        --schedule.scheduled-steps 120 --schedule.extension-steps 4 --schedule.momentum-steps 28 5
        {per_stage("tokens", 1024, 2048, 3072)} --schedule.extension.tokens 3072 --data.rows-per-step 1
        {per_stage("max-doc-len", 224, 512, 512)} --schedule.extension.max-doc-len 512
        {per_stage("windows", "32 96", "96 224", "160 352")} --schedule.extension.windows 192 416
        --schedule.final-long-window 640 --val-every 20 --data.val-tokens 131072 --data.val-row-tokens 4096
        --sample-tokens 0 --no-warmup""",
}
DATA = {"small": ["--data-dir", str(REPO / "data" / "nano_bpe")]}
SCRIPT = {"nano": "train_gpt.py", "small": "evals/sibling.py"}

RULES = "--optimizer.rules"
ADAM = " ".join(
    f"{RULES}.{bank}.kind adam {RULES}.{bank}.lr-mul 0.125 {RULES}.{bank}.betas 0.9 0.99"  # lr 2e-3, the baseline's
    for bank in ("qk-bank", "vo-bank", "mlp-bank")
)
MUON = " ".join(f"{RULES}.{bank}.kind muon" for bank in ("qk-bank", "vo-bank", "mlp-bank"))

VARIANTS: dict[str, dict[str, str]] = {
    "nano": {
        FULL: "",
        "Adam instead of NorMuon": ADAM,
        "Muon: no second moment": MUON,
        "5 rounds of Polar Express": "--optimizer.polar-express-rounds 5",
        "decay of all weights, not cautious": "--optimizer.no-cautious",
        "always tied": "--schedule.untie 2",  # never reached
        "never tied": "--schedule.untie 0",
        "no n-grams": "--model.ngrams",
        "n-grams of two bytes only": "--model.ngrams 2",
        "Adam for the table of n-grams": f"{RULES}.ngram-embed.kind adam {RULES}.ngram-embed.betas 0.75 0.95",
        "no growth of windows": per_stage("windows", *3 * ("64 384",)),
        "no YaRN": "--schedule.yarn-max-window 0",
        "queries and keys start different": "--model.no-equal-qk-init",
        "no key offset": "--model.no-key-offset",
        "no value embeddings": "--model.value-layers",
        "each head one matrix in NorMuon": "--model.qk-heads 1",
        "with a smear": "--model.smear",
        "with gate networks": "--model.gate-networks",
        "with gates of heads": "--model.gate-networks --model.gated-layers 0",
        "with exclusive self-attention": "--model.gate-networks --model.xsa-layers 0",
        "with composed heads": "--model.gate-networks --model.dc-layers 0",
        "with paired heads": "--model.paired-layers 0",
        "with a mix into the output": "--model.mix-out first 0 ngram 0",
        "with multi-token prediction": per_stage("prediction-weights", "1 1 0.5 0.5 0.25 0", "1 1 0.5 0", "1 1"),
        "no growth of the batch": per_stage("tokens", *3 * ("1110",)),
        "one row per step": "--data.rows-per-step 1",
        "with a second layer": "--model.num-layers 2 --model.long-layers 1 --model.value-layers 0 1",
        "with a wider MLP": "--model.mlp-ratio 4",
    },
    "small": {
        FULL: "",
        "no n-grams": "--model.ngrams",
        "no signs": "--model.ngram-signs 0",
        "no value embeddings": "--model.value-layers",
        "Wo zero at the start": "--model.zero-wo",
        "no exclusive self-attention": "--model.xsa-layers",
        "no composed heads": "--model.dc-layers",
        "no gate networks, learned numbers": "--model.no-gate-networks",
        "no mix into the last layer": "--model.mix-in",
        "no mix into the output": "--model.mix-out",
        "late layers read their own input": "--model.late-input None",
        "each head one matrix in NorMuon": "--model.qk-heads 1",
        "no prefix loss": "--no-prefix-loss",
        "cooldown to 0.1": "--schedule.final-lr 0.1 --schedule.extension.lr 0.1",
        "with n-grams of three tokens": "--model.ngrams 2 3",
        "with four times the rows for n-grams": "--model.ngram-rows 122880",
        "with a sample of 1,024 tokens in the loss": "--model.sampled-vocab 1024",
    },
}


@dataclass(frozen=True)
class Result:
    """One run, as a line of ablation.csv."""

    variant: str
    seed: int
    loss: float  # final validation
    seconds: float  # of training
    to_target: float | None  # seconds until the validation loss crosses the target; None: it does not
    source: str = ""  # digest of train_gpt.py; rows that are older than this column do not say it
    cpu: str = ""


def seconds_to_target(log: Log) -> float | None:
    """Training time at which the validation loss crosses the target, interpolated linearly between validations."""
    for before, after in pairwise(log.val):
        if log.target is not None and before.val_loss > log.target >= after.val_loss:
            part = (before.val_loss - log.target) / (before.val_loss - after.val_loss)
            return before.seconds + part * (after.seconds - before.seconds)
    return None


def digest(source: str) -> str:
    return hashlib.sha256(source.strip().encode()).hexdigest()[:12]


def launch(track: str, words: list[str], folder: Path, jobs: int, script: str = "train_gpt.py") -> Log:
    """The log, in this folder, of `script TRACK` with these options, one of `jobs` that share the cores.

    Raises RuntimeError, with the end of what it printed, where it fails or ends before its last step.
    """
    command = [sys.executable, str(REPO / script), track, *words, "--log-dir", str(folder)]
    env = os.environ | ({"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))} if jobs > 1 else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{track} {' '.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    log = parse_log(max(folder.glob("*.txt")))  # others are of runs that were interrupted
    if log.final is None or log.final.step != log.total_steps:
        raise RuntimeError(f"{track} {' '.join(words)}: {log.path} is incomplete")
    return log


def train_all(train: Callable, tasks: list[tuple], path: Path, jobs: int, desc: str | None = None) -> list:
    """Calls `train` for each task, `jobs` at a time, and appends the row that it returns to a CSV file at once.

    A run that fails is said and left out. Returns the rows.
    """
    lock = Lock()

    def attempt(task: tuple) -> object:
        try:
            row = train(*task)
        except RuntimeError as error:
            tqdm.write(str(error), file=sys.stderr)
            return None
        with lock:
            append(row, path)
        return row

    return [row for row in thread_map(attempt, tasks, max_workers=jobs, desc=desc, unit="run") if row]


def append(row: object, path: Path) -> None:
    """Writes a dataclass as a line of a CSV file, which begins with the names of its fields."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([f.name for f in fields(row)])
        writer.writerow([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in astuple(row)])


def read_csv(path: Path, kind: type) -> list:
    """The rows as `kind`, a dataclass whose fields are the columns, empty where one is missing; none without a file."""
    if not path.exists():
        return []
    read = {"int": int, "float": float, "float | None": lambda text: float(text) if text else None}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [kind(*(read.get(f.type, str)(row.get(f.name) or "") for f in fields(kind))) for row in rows]


def run(track: str, variant: str, seed: int, out: Path, jobs: int, extra: list[str]) -> Result:
    """Trains one variant. Raises what `launch` raises."""
    words = [
        "--seed",
        str(seed),
        *DATA.get(track, []),
        *COMMON[track].split(),
        *VARIANTS[track][variant].split(),
        *extra,
    ]
    log = launch(track, words, out / "logs" / re.sub(r"\W", "_", f"{variant} {seed}"), jobs, SCRIPT[track])
    numbers = log.final.val_loss, log.final.seconds, seconds_to_target(log)
    return Result(variant, seed, *numbers, digest(log.source), log.settings.get("CPU", ""))


def own_rows(path: Path) -> list[Result]:
    """The rows of ablation.csv. Raises LogError where there are some of another train_gpt.py."""
    rows, ours = read_csv(path, Result), digest((REPO / "train_gpt.py").read_text(encoding="utf-8"))
    if others := [row for row in rows if row.source != ours]:
        raise LogError(
            f"{path} has {len(others)} rows of another train_gpt.py ({others[0].source or 'unknown'}, ours is {ours}), "
            "which do not mix. Add --out FOLDER for a table of your own, or delete the file to begin anew."
        )
    return rows


def compared(rows: list, name: str, base: str) -> Iterator[tuple[list[tuple], float, float, str]]:
    """(pairs, mean loss, mean change, p) for each value of the field `name`, against the rows in which it is `base`.

    A pair is a row and one of the base with the same seed; values without one are left out. p is of the paired t-test.
    """
    groups: dict[str, dict[int, object]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), {})[row.seed] = row
    full = groups.get(base, {})
    for value, runs in groups.items():
        if pairs := [(runs[seed], full[seed]) for seed in sorted(runs.keys() & full.keys())]:
            change = [run.loss - other.loss for run, other in pairs]
            p = f"{stats.ttest_1samp(change, 0).pvalue:.2g}" if len(pairs) > 1 and value != base else ""
            yield pairs, statistics.mean(run.loss for run, _ in pairs), statistics.mean(change), p


def markdown(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def table(results: list[Result]) -> str:
    """Markdown: a row per variant, the most harmful first."""
    rows = []
    for pairs, loss, change, p in compared(results, "variant", FULL):
        timed = [(run, full) for run, full in pairs if run.cpu == full.cpu]
        speed = f"{statistics.median(run.seconds / full.seconds for run, full in timed):.2f}" if timed else "–"
        met = [run.to_target for run, _ in timed if run.to_target is not None]
        to_target = f"{statistics.mean(met):.0f} s" if met else "–"
        if len(met) < len(timed):
            to_target += f" ({len(met)} of {len(timed)} runs)"
        variant = pairs[0][0].variant
        delta = f"{change:+.4f}" if variant != FULL else ""
        rows.append((variant != FULL, -change, (variant, len(pairs), f"{loss:.4f}", delta, p, to_target, speed)))
    lines = [("variant", "n", "loss", "change", "p", "to the target", "training time, × full")]
    lines += [cells for *_, cells in sorted(rows)]
    if not any(result.to_target for result in results):  # a sibling: no target, and its time says nothing of the track
        lines = [cells[:5] for cells in lines]
    return markdown(lines[0], lines[1:])


def report(track: str, results: list[Result]) -> str:
    """The table with the command of each variant."""
    start = f"./run.sh {track}" if SCRIPT[track] == "train_gpt.py" else f"python {SCRIPT[track]} {track} …"
    ran = {r.variant for r in results}
    commands = [f"- {v}: `{start} {words}`" for v, words in VARIANTS[track].items() if words and v in ran]
    return "\n".join([table(results), "", *commands, ""])


def main() -> None:
    explained = __doc__.strip().rpartition("\n\n")[2]
    parser = argparse.ArgumentParser(description="Trains a track, one technique off at a time.", epilog=explained)
    parser.add_argument("track", nargs="?", default="nano", choices=list(VARIANTS), help="default: nano")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 of each variant")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these, besides the full recipe")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: records/TRACK/ablation, the published one")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--table", action="store_true", help="no training: only the table of ablation.csv")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further options of train_gpt.py; last")
    options = parser.parse_args()
    variants, published = VARIANTS[options.track], REPO / "records" / options.track / "ablation"
    if unknown := [v for v in options.only or () if v not in variants]:
        parser.error(f"--only {unknown[0]!r}: expected some of {', '.join(map(repr, variants))}")
    out = options.out or published
    path, failed = out / "ablation.csv", 0
    try:
        if options.table:
            if not (rows := read_csv(path, Result)):
                raise LogError(f"{path} has no rows: train first, without --table")
        else:
            if options.extra and out.resolve() == published:
                raise LogError("runs with --extra are not of the published table: add --out FOLDER")
            have = {(row.variant, row.seed) for row in own_rows(path)}
            chosen = [v for v in variants if v == FULL or options.only is None or v in options.only]
            tasks = [(v, seed) for seed in range(options.seeds) for v in chosen if (v, seed) not in have]
            out.mkdir(parents=True, exist_ok=True)
            train = lambda variant, seed: run(options.track, variant, seed, out, options.jobs, options.extra)
            failed = len(tasks) - len(train_all(train, tasks, path, options.jobs))
            rows = own_rows(path)
        (out / "ablation.md").write_text(report(options.track, rows), encoding="utf-8")
        print(table(rows))
    except KeyboardInterrupt:
        sys.exit("interrupted: complete runs are kept; call it again to go on")
    except (LogError, OSError) as error:
        sys.exit(f"records/ablate.py: error: {error}")
    if failed:
        sys.exit(f"{failed} runs failed, see above; the table has the others.")


if __name__ == "__main__":
    main()
