"""Writes the tables of the README files from logs and CSV files, so that no number in them is typed by hand.

    python records/tables.py            # rewrite what stands between <!-- table: NAME --> and <!-- end of table -->
    python records/tables.py --check    # exit code 1 where a table is not current

Tables: `leaderboard` (folders records/TRACK/DATE_NAME/ with their logs), `history small` and `history medium`
(history.csv), `ablation` (nano/ablation/ablation.csv).
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path

from scipy import stats

import ablate
from ablate import markdown
from runlogs import Log, LogError, parse_log

RECORDS = Path(__file__).resolve().parent
FILES = (RECORDS.parent / "README.md", RECORDS / "README.md")
TABLE = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
FOLDER = re.compile(r"\d{4}-\d{2}-\d{2}_\w+")
AGAINST = re.compile(r"--against records/\w+/([\w-]+)")


def leaderboard(folder: Path = RECORDS) -> str:
    """A row per record folder, by track, date and first log. Its README says which one it was timed `--against`."""
    rows = []
    for track in sorted(path for path in folder.iterdir() if path.is_dir()):
        records = {
            record.name: [log for log in map(parse_log, sorted(record.glob("*.txt"))) if log.events]
            for record in track.iterdir()
            if FOLDER.fullmatch(record.name)
        }
        seconds = {name: statistics.mean(log.final.seconds for log in logs) for name, logs in records.items()}
        for name, logs in sorted(records.items(), key=lambda item: (item[0][:10], item[1][0].path.name)):
            against = AGAINST.search((track / name / "README.md").read_text(encoding="utf-8"))
            speedup = f"{seconds[against[1]] / seconds[name]:.2f} ×" if against else ""
            rows.append((track.name, name.partition("_")[0], title_of(track / name), *row_of(logs), speedup))
    head = ("track", "date", "record", "n", "loss, mean ± std", "p", "seconds, mean (median)", "hardware", "faster by")
    return markdown(head, rows)


def title_of(record: Path) -> str:
    """The heading of a record's README, as a link to its folder."""
    heading = (record / "README.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return f"[{heading}]({record.parent.name}/{record.name})"


def row_of(logs: list[Log]) -> tuple[str, ...]:
    losses, seconds = [log.final.val_loss for log in logs], [log.final.seconds for log in logs]
    target = logs[-1].target  # the last, because runs from which a target is taken begin under the one before
    p = stats.ttest_1samp(losses, target, alternative="less").pvalue
    hardware = logs[0].hardware
    return (
        str(len(logs)),
        f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}",
        f"{p:.2g}",
        f"{statistics.mean(seconds):.1f} ({statistics.median(seconds):.1f})",
        hardware.get("GPU") or hardware.get("CPU", "").rpartition(", ")[0],  # without its vector instructions
    )


def history(track: str) -> str:
    """The public records of a track and what came after them, the newest first."""
    with open(RECORDS / "history.csv", newline="", encoding="utf-8") as file:
        records = [row for row in csv.DictReader(file) if row["track"] == track]
    names = [r["record"] + ("" if r["status"] == "record" else f", {r['status']}") for r in records]
    cells = [(f"{float(r['seconds']):g}", r["date"], r["change"], r["contributors"]) for r in records]
    rows = [(name, *others) for name, others in zip(names, cells, strict=True)]
    return markdown(("#", "seconds", "date", "change", "by"), rows[::-1])


def ablation() -> str:
    path = RECORDS / "nano" / "ablation" / "ablation.csv"
    return ablate.table(ablate.read_csv(path)) if path.exists() else "Not measured yet: `python records/ablate.py`."


def table(name: str) -> str:
    """A table by its name in the text. Raises KeyError for a name that there is not."""
    return {
        "leaderboard": leaderboard,
        "history small": lambda: history("small"),
        "history medium": lambda: history("medium"),
        "ablation": ablation,
    }[name]()


def current(text: str) -> str:
    """The text with its tables written anew."""
    return TABLE.sub(lambda match: f"{match[1]}{table(match['name'])}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tables of the README files from logs and CSV files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is not current")
    options = parser.parse_args()
    stale = []
    try:
        for path in FILES:
            text = path.read_text(encoding="utf-8")
            if (new := current(text)) != text:
                stale.append(path)
                if not options.check:
                    path.write_text(new, encoding="utf-8")
    except (LogError, OSError, KeyError, ValueError) as error:
        sys.exit(f"records/tables.py: error: {error}")
    for path in stale:
        print(f"{'not current' if options.check else 'written'}: {path}")
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
