"""Looks for better numbers of `nano`: successive halving at equal training time, on files held out for tuning.

    python records/search.py --candidates 27 --steps 90 --jobs 2     # into records/nano/search
    python records/search.py --table                                  # no training: what is there, ranked

Candidates are the track with one to three of the changes in SPACE, drawn at random. How long their steps take is
measured against those of the track, alternately, and a candidate gets as many steps as fit into the same time. All
train with one seed; the best third goes on with two more seeds, the best third of that with six more, and so on. The
track as it is goes through all rounds. Rounds use the shards of `python data/nano.py --tuning`, which leave out the
bytes that a record is judged on. Every run is a line of search.csv, so an interrupted search goes on where it was.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ablate import REPO, compared, launch, markdown, per_stage, read_csv, train_all

THIRD = 3  # of the candidates goes on to the next round, with three times as many seeds
DATA = REPO / "data" / "nano_tuning"
# Enough bytes to tell 0.01 nats apart, and 4 times as fast as all.
COMMON = ("--data-dir", str(DATA), "--data.val-tokens", "131072", "--sample-tokens", "0", "--val-every", "0")
STAGES = 3  # of the track


def option(name: str, *values: object) -> list[str]:
    """An alternative for each value of an option of train_gpt.py."""
    return [f"--{name} {value}".strip() for value in values]


def of_stages(name: str, *rows: tuple[object, ...]) -> list[str]:
    """An alternative for each row, which has a value per stage."""
    return [per_stage(name, *row) for row in rows]


def rule(names: str, name: str, *values: object) -> list[str]:
    """An alternative for each value of a field of the rules of some parameters."""
    return [" ".join(f"--optimizer.rules.{n}.{name} {value}" for n in names.split()) for value in values]


SPACE: dict[str, list[str]] = {
    "layers": option("model.num-layers", 2, 3),
    "heads": [
        "--model.num-heads 4 --model.head-dim 32",
        "--model.num-heads 4 --model.head-dim 24",
        "--model.num-heads 2 --model.head-dim 80",
        "--model.num-heads 4 --model.head-dim 48",
    ],
    "mlp ratio": option("model.mlp-ratio", 1, 3, 4),
    "paired layers": option("model.paired-layers", "0"),
    "long layers": option("model.long-layers", ""),
    "value embeddings": option("model.value-layers", ""),
    "n-grams": option("model.ngrams", "2 3 4 5 6", "1 2 3 4 5", "1 2 3 4 5 6 8", "1 2 4 6"),
    "rows for n-grams": option("model.ngram-rows", 32768, 49152, 98304),
    "weight of n-grams": option("model.ngram-weight", 0.25, 1.0),
    "a smear": ["--model.smear"],
    "gate networks": ["--model.gate-networks", "--model.gate-networks --model.gated-layers 0"],
    "exclusive self-attention": ["--model.xsa-layers 0", "--model.gate-networks --model.xsa-layers 0"],
    "Wo zero": ["--model.zero-wo"],
    "tokens": of_stages("tokens", (512, 1024, 1536), (1024, 1024, 1024), (1024, 1536, 2048)),
    "windows": of_stages("windows", ("64 192",) * 3, ("64 384",) * 3, ("64 512",) * 3, ("32 192", "32 256", "32 320")),
    "document length": of_stages("max-doc-len", (1024,) * 3, (4096,) * 3),
    "prediction weights": of_stages(
        "prediction-weights", ("1 1 0.5 0", "1 1", "1 1"), ("1 1 0.5 0.5", "1 1 0.5 0", "1 1")
    ),
    "peak lr": of_stages("lr", (1.0, 1.2, 1.4), (1.0, 0.9, 0.8)),
    "cooldown": option("schedule.cooldown", 0.35, 0.65, 0.8),
    "final lr": option("schedule.final-lr", 0.1, 0.3),
    "attention scale": option("schedule.attn-scale", 0.13, 0.17, 0.2),
    "momentum": option("schedule.momentum", "0.8 0.9", "0.85 0.92", "0.9 0.95"),
    "momentum steps": option("schedule.momentum-steps", "30 15", "100 20"),
    "untie": option("schedule.untie", 0.3, 0, 2),
    "Adam lr": option("optimizer.adam-lr", 0.018, 0.035),
    "Adam decay": option("optimizer.adam-decay", 0.0, 0.001),
    "Muon lr": option("optimizer.muon-lr", 0.02, 0.035, 0.045),
    "Muon decay": option("optimizer.muon-decay", 0.3, 0.6, 2.4),
    "Muon beta2": option("optimizer.muon-beta2", 0.9, 0.98),
    "rounds of Polar Express": option("optimizer.polar-express-rounds", 2, 4, 5),
    "n-gram lr": rule("ngram-embed", "lr-mul", 3.5, 5, 10),
    "value embedding lr": rule("value-embeds", "lr-mul", 20, 40, 150),
    "scalar lr": rule("resid sa-lambda gates branch", "lr-mul", 1, 2.5, 10),
    "gate lr": rule("value-gates", "lr-mul", 0.3, 3),
    "MLP projection lr": rule("mlp-bank", "lr-mul", "1 2", "2"),
}


@dataclass(frozen=True)
class Trial:
    """One run, as a line of search.csv."""

    change: str  # names in SPACE
    words: str  # options of train_gpt.py
    steps: int
    seed: int
    loss: float


Candidate = tuple[str, str]  # names and options, as in a Trial
TRACK: Candidate = ("track", "")


def draw(count: int, seed: int) -> list[Candidate]:
    """The track, and `count` different candidates: each has one to three changes to it."""
    generator, found = random.Random(seed), {"": TRACK}
    while len(found) <= count:
        names = sorted(generator.sample(list(SPACE), generator.choice((1, 1, 2, 3))))
        words = " ".join(generator.choice(SPACE[name]) for name in names)
        found.setdefault(words, (", ".join(names), words))
    return list(found.values())


def relative_cost(words: str) -> float:
    """Time of a step of a candidate over that of the track, mean over the stages, measured alternately.

    Raises SpeedrunError where the candidate is impossible.
    """
    sys.path.insert(0, str(REPO))
    import train_gpt

    trainers, seconds = [], np.zeros(2)
    for more in ([], words.split()):
        track, options = train_gpt.parse_command(["nano", *COMMON, *more], quiet=True)
        trainers.append(train_gpt.Trainer(track, train_gpt.Runtime.create(options), DATA, 0))

    def two_steps(trainer: train_gpt.Trainer, stage: int) -> float:
        start, began = trainer.track.schedule.parts()[stage][1].start // 2 * 2, time.perf_counter()
        for step in range(start, start + 2):  # Adam steps on odd ones
            trainer.train_step(step)
        return time.perf_counter() - began

    for stage in range(STAGES):
        for trainer in trainers:
            trainer.loader.position = train_gpt.LoaderPosition()
        taken = [[two_steps(trainer, stage) for trainer in trainers] for _ in range(4)]
        seconds += np.median(taken[1:], axis=0)  # the first is a warm-up
    return seconds[1] / seconds[0]


def train(candidate: Candidate, steps: int, seed: int, jobs: int) -> Trial:
    """Raises RuntimeError, with the end of what it printed, where the run fails."""
    name, words = candidate
    options = [*COMMON, "--schedule.scheduled-steps", str(steps), "--seed", str(seed), *words.split()]
    with tempfile.TemporaryDirectory() as folder:
        return Trial(name, words, steps, seed, launch("nano", options, Path(folder), jobs).final.val_loss)


def ranked(candidates: list[Candidate], trials: list[Trial], seeds: int) -> list[Candidate]:
    """Those that have run with all of the first `seeds` seeds, the best mean loss first."""
    losses = {c: [trial.loss for trial in trials if trial.words == c[1] and trial.seed < seeds] for c in candidates}
    return sorted((c for c in candidates if len(losses[c]) == seeds), key=lambda c: statistics.mean(losses[c]))


def search(options: argparse.Namespace, path: Path) -> None:
    """All rounds. A candidate that is impossible or fails is said and left out."""
    trials, alive = read_csv(path, Trial), draw(options.candidates, options.seed)
    steps = {"": options.steps} | {t.words: t.steps for t in trials}
    for _, words in tqdm(alive, desc="step times", unit="candidate"):
        try:
            if words not in steps:
                steps[words] = round(options.steps / relative_cost(words) / 2) * 2
        except Exception as error:
            tqdm.write(f"{words}: left out: {error}", file=sys.stderr)
    alive, seeds = [candidate for candidate in alive if candidate[1] in steps], 1
    while True:
        done = {(trial.words, trial.seed) for trial in trials}
        tasks = [(c, steps[c[1]], s, options.jobs) for s in range(seeds) for c in alive if (c[1], s) not in done]
        trials += train_all(train, tasks, path, options.jobs, desc=f"{seeds} seeds")
        if len(alive) <= THIRD:
            return
        best = ranked(alive, trials, seeds)
        alive = [TRACK, *(c for c in best[: max(len(best) // THIRD, 1)] if c != TRACK)]
        seeds *= THIRD


def table(trials: list[Trial]) -> str:
    """Markdown: a row per candidate, those with most seeds first, then by loss; the change is paired by seed."""
    rows = []
    for pairs, loss, change, p in compared(trials, "words", TRACK[1]):
        first, n = pairs[0][0], len(pairs)
        options, delta = (f"`{first.words}`", f"{change:+.4f}") if first.words else ("", "")
        rows.append((-n, loss, (first.change, options, first.steps, n, f"{loss:.4f}", delta, p)))
    head = ("change", "options", "steps", "n", "loss", "change", "p")
    return markdown(head, [cells for *_, cells in sorted(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Successive halving over changes of nano, at equal training time.")
    parser.add_argument("--candidates", type=int, default=27, metavar="N")
    parser.add_argument("--steps", type=int, default=90, metavar="N", help="scheduled steps of the track")
    parser.add_argument("--seed", type=int, default=0, help="of the candidates drawn")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--out", type=Path, default=REPO / "records" / "nano" / "search", metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="no training: only the table of what is there")
    options = parser.parse_args()
    path = options.out / "search.csv"
    try:
        if not options.table:
            options.out.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, str(REPO / "data" / "nano.py"), "--tuning"], check=True)
            search(options, path)
        print(table(read_csv(path, Trial)))
    except KeyboardInterrupt:
        sys.exit("interrupted: complete runs are kept; call it again to go on")
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"records/search.py: error: {error}")


if __name__ == "__main__":
    main()
