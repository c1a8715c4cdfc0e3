"""What is each technique worth? Trains `nano` with one switched off, or one that it lacks on, several seeds each.

    python records/ablate.py                          # all variants, seeds 0 to 2, into records/nano/ablation
    python records/ablate.py --seeds 5 --only "no smear" "no key offset" --out mine
    python records/ablate.py --table                  # no training: the table of ablation.csv

Every variant is the track with a few numbers changed on the command line, printed in the table, so that each run can be
repeated alone with `./run.sh nano …`. Runs that are complete are kept: interrupt it and call it again. The result is
ablation.csv, a line per run, and ablation.md, the table: change of the validation loss after equally many steps, paired
by seed with the full recipe, p of the paired t-test, and time to the target.

A call writes the rows of the variants and seeds that it ran and keeps the others. All rows are of one train_gpt.py:
where ablation.csv has those of another, nothing is trained before you say --out FOLDER, for a table of your own, or
--force, which drops them. Times are shown of runs on the same CPU as the full recipe's.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

from scipy import stats
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from runlogs import Log, LogError, parse_log

REPO = Path(__file__).resolve().parents[1]
TRAIN_GPT = REPO / "train_gpt.py"
PUBLISHED = REPO / "records" / "nano" / "ablation"
FULL = "full recipe"
# Validate often, to see when the target is met, hence on the first eighth of the validation bytes only.
COMMON = ("--val-every", "20", "--data.val-tokens", "65536", "--sample-tokens", "0")


def per_stage(name: str, *values: object) -> str:
    """Options that give a field of the three stages these values."""
    return " ".join(f"--schedule.stages.{i}.{name} {value}" for i, value in enumerate(values))


RULES = "--optimizer.rules"
ADAM = " ".join(
    f"{RULES}.{bank}.kind adam {RULES}.{bank}.lr-mul 0.125 {RULES}.{bank}.betas 0.9 0.99"  # lr 2e-3, the baseline's
    for bank in ("attn-bank", "mlp-bank")
)
MUON = f"{RULES}.attn-bank.kind muon {RULES}.mlp-bank.kind muon"

VARIANTS: dict[str, str] = {
    FULL: "",
    "Adam instead of NorMuon": ADAM,
    "Muon: no second moment": MUON,
    "3 rounds of Polar Express": "--optimizer.polar-express-rounds 3",
    "decay of all weights, not cautious": "--optimizer.no-cautious",
    "always tied": "--schedule.untie 2",  # never reached
    "never tied": "--schedule.untie 0",
    "no second embedding": "--model.second-embed",
    "second embedding of bytes, not n-grams": "--model.second-embed 1",
    "no growth of windows": per_stage("windows", *3 * ("64 384",)),
    "no YaRN": "--schedule.yarn-max-window 0",
    "queries and keys start different": "--model.no-equal-qk-init",
    "no paired heads": "--model.paired-layers",
    "no key offset": "--model.no-key-offset",
    "no attention gates": "--model.no-attention-gates",
    "no value embeddings": "--model.value-embeds",
    "no smear": "--model.no-smear",
    "no x0 in later layers": "--optimizer.rules.x0-lambda.lr-mul 0",
    "with a skip": "--model.skips 0 1",
    "with a backout": "--model.backout-layer 0",
    "with multi-token prediction": per_stage("prediction-weights", "1 1 0.5 0.5 0.25 0", "1 1 0.5 0", "1 1"),
    "with growth of the batch": per_stage("tokens", "1024", "2048", "3072"),
    "with a third layer": "--model.num-layers 3",
    "with a wider MLP": "--model.mlp-ratio 4",
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
        if before.val_loss > log.target >= after.val_loss:
            part = (before.val_loss - log.target) / (before.val_loss - after.val_loss)
            return before.seconds + part * (after.seconds - before.seconds)
    return None


def read_result(variant: str, path: Path, source: str) -> Result | None:
    """The result of a log; None where it is not complete. Raises LogError for a log of another train_gpt.py."""
    log = parse_log(path)
    if log.source is not None and log.source.strip() != source.strip():
        raise LogError(f"{path} is of another train_gpt.py: name another folder with --out, or delete it.")
    if log.final is None or log.final.step != log.final.total or not log.notes or "peak" not in log.notes[-1]:
        return None
    numbers = log.final.val_loss, log.final.seconds, seconds_to_target(log)
    return Result(variant, int(log.settings["seed"]), *numbers, digest(source), log.settings.get("CPU", ""))


def digest(source: str) -> str:
    return hashlib.sha256(source.strip().encode()).hexdigest()[:12]


def folder_of(variant: str, out: Path) -> Path:
    return out / "logs" / "".join(c if c.isalnum() else "_" for c in variant)


def find_results(out: Path) -> list[Result]:
    """All complete runs, by variant and seed. Raises LogError for a log of another train_gpt.py."""
    source, found = TRAIN_GPT.read_text(encoding="utf-8"), {}
    for variant in VARIANTS:
        for path in sorted(folder_of(variant, out).glob("*.txt")):
            if (result := read_result(variant, path, source)) is not None:
                found[variant, result.seed] = result
    return list(found.values())


def run(variant: str, seed: int, out: Path, jobs: int, extra: list[str]) -> None:
    """Train one variant. Raises RuntimeError, with the end of what it printed, where that fails."""
    words = ["--seed", str(seed), *COMMON, *VARIANTS[variant].split(), "--log-dir", str(folder_of(variant, out))]
    launch([*words, *extra], jobs)


def launch(words: list[str], jobs: int, script: str = "train_gpt.py") -> None:
    """`train_gpt.py nano` with these options, as one of several `jobs` at a time, which share the cores.

    Raises RuntimeError, with the end of what it printed, where it fails.
    """
    command = [sys.executable, str(REPO / script), "nano", *words]
    env = os.environ | ({"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))} if jobs > 1 else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"nano {' '.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}")


def run_all(variants: list[str], seeds: int, out: Path, jobs: int, extra: list[str]) -> list[str]:
    """Train what is missing, all variants of a seed before the next seed. Returns what failed."""
    have = {(result.variant, result.seed) for result in find_results(out)}
    missing = [(variant, seed) for seed in range(seeds) for variant in variants if (variant, seed) not in have]

    def attempt(task: tuple[str, int]) -> str | None:
        try:
            run(*task, out, jobs, extra)
        except RuntimeError as error:
            tqdm.write(str(error), file=sys.stderr)
            return str(error)

    return [failure for failure in thread_map(attempt, missing, max_workers=jobs, unit="run") if failure]


def comparable(rows: list[Result], path: Path, force: bool) -> list[Result]:
    """The rows of our train_gpt.py. Raises LogError where there are others, unless they are to be dropped."""
    ours = digest(TRAIN_GPT.read_text(encoding="utf-8"))
    others = [row for row in rows if row.source != ours]
    if others and not force:
        raise LogError(
            f"{path} has {len(others)} rows of another train_gpt.py ({others[0].source or 'unknown'}, ours is {ours}), "
            "which do not mix. Add --out FOLDER for a table of your own, or --force to drop them."
        )
    return [row for row in rows if row.source == ours]


def merge(rows: list[Result], new: list[Result]) -> list[Result]:
    """All rows, the new ones in the places of those of the same variant and seed."""
    merged, order = {(row.variant, row.seed): row for row in [*rows, *new]}, list(VARIANTS)
    rank = lambda row: order.index(row.variant) if row.variant in order else len(order)
    return sorted(merged.values(), key=lambda row: (rank(row), row.variant, row.seed))


def write_csv(results: list[Result], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Result.__annotations__)
        for r in results:
            to_target = "" if r.to_target is None else f"{r.to_target:.1f}"
            writer.writerow([r.variant, r.seed, f"{r.loss:.4f}", f"{r.seconds:.1f}", to_target, r.source, r.cpu])


def read_csv(path: Path, kind: type = Result) -> list:
    """The rows as `kind`, a dataclass whose fields are the columns, empty where one is missing; none without a file."""
    if not path.exists():
        return []
    read = {"int": int, "float": float, "float | None": lambda text: float(text) if text else None}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [kind(*(read.get(f.type, str)(row.get(f.name) or "") for f in fields(kind))) for row in rows]


def paired(runs: dict[int, Result], full: dict[int, Result]) -> tuple[list[int], float, float, str]:
    """(seeds, mean loss, mean change, p) of two sets of runs by seed; p of the paired t-test, where there is one."""
    seeds = sorted(runs.keys() & full.keys())
    change = [runs[s].loss - full[s].loss for s in seeds]
    p = f"{stats.ttest_1samp(change, 0).pvalue:.2g}" if len(seeds) > 1 and runs is not full else ""
    return seeds, statistics.mean(runs[s].loss for s in seeds), statistics.mean(change), p


def markdown(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def table(results: list[Result]) -> str:
    """Markdown: a row per variant, the most harmful first."""
    names = dict.fromkeys([FULL, *(r.variant for r in results)])
    by_variant = {name: {r.seed: r for r in results if r.variant == name} for name in names}
    full = by_variant[FULL]
    rows = []
    for variant, runs in by_variant.items():
        if not runs.keys() & full.keys():
            continue
        seeds, loss, change, p = paired(runs, full)
        timed = [s for s in seeds if runs[s].cpu == full[s].cpu]
        speed = f"{statistics.median(runs[s].seconds / full[s].seconds for s in timed):.2f}" if timed else "–"
        met = [runs[s].to_target for s in timed if runs[s].to_target is not None]
        to_target = f"{statistics.mean(met):.0f} s" if met else "–"
        if len(met) < len(timed):
            to_target += f" ({len(met)} of {len(timed)} runs)"
        delta = f"{change:+.4f}" if variant != FULL else ""
        rows.append((variant != FULL, -change, (variant, len(seeds), f"{loss:.4f}", delta, p, to_target, speed)))
    head = ("variant", "n", "loss", "change", "p", "to the target", "training time, × full")
    return markdown(head, [cells for *_, cells in sorted(rows)])


def report(results: list[Result]) -> str:
    """The table with the command of each variant."""
    ran = [v for v in VARIANTS if any(r.variant == v for r in results)]
    commands = "\n".join(f"- {v}: `./run.sh nano {VARIANTS[v]}`" for v in ran if VARIANTS[v])
    return f"{table(results)}\n\n{commands}\n"


def main() -> None:
    explained = __doc__.strip().rpartition("\n\n")[2]
    parser = argparse.ArgumentParser(description="Trains nano, one technique switched off at a time.", epilog=explained)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 of each variant")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=list(VARIANTS), help="besides the full recipe")
    parser.add_argument("--out", type=Path, default=PUBLISHED, metavar="FOLDER", help="default: the published table")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--table", action="store_true", help="no training: only the table of ablation.csv")
    parser.add_argument("--force", action="store_true", help="drop rows of another train_gpt.py")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further options of train_gpt.py; last")
    options = parser.parse_args()
    variants = [FULL, *(v for v in VARIANTS if v != FULL and (options.only is None or v in options.only))]
    path, failures = options.out / "ablation.csv", []
    try:
        rows = read_csv(path)
        if options.table and not rows:
            raise LogError(f"{path} has no rows: train first, without --table")
        if not options.table:
            if options.extra and options.out.resolve() == PUBLISHED:
                raise LogError("runs with --extra are not of the published table: add --out FOLDER")
            rows = comparable(rows, path, options.force)
            options.out.mkdir(parents=True, exist_ok=True)
            try:
                failures = run_all(variants, options.seeds, options.out, options.jobs, options.extra)
            finally:  # what is complete counts, whatever ended the rest
                if new := find_results(options.out):
                    write_csv(merge(rows, new), path)
            rows = read_csv(path)
        (options.out / "ablation.md").write_text(report(rows), encoding="utf-8")
        print(table(rows))
    except KeyboardInterrupt:
        sys.exit("interrupted: complete runs are kept; call it again to go on")
    except (LogError, OSError) as error:
        sys.exit(f"records/ablate.py: error: {error}")
    if failures:
        sys.exit(f"{len(failures)} runs failed, see above; the table has the others.")


if __name__ == "__main__":
    main()
