"""Writes the tables of the README files from logs and CSV files, so that no number in them is typed by hand.

    python records/tables.py            # rewrite what stands between <!-- table: NAME --> and <!-- end of table -->
    python records/tables.py --check    # exit code 1 where a table is not current

Tables: `leaderboard` (folders records/TRACK/DATE_NAME/ with their logs), `history small` and `history medium`
(history.csv), `ablation TRACK` (TRACK/ablation/ablation.csv).
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
from runlogs import Log, LogError, read_logs

RECORDS = Path(__file__).resolve().parent
FILES = (RECORDS.parent / "README.md", RECORDS / "README.md")
TABLE = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
FOLDER = re.compile(r"\d{4}-\d{2}-\d{2}_\w+")
AGAINST = re.compile(r"--against records/\w+/([\w-]+)")


def leaderboard(folder: Path = RECORDS) -> str:
    """A row per record folder, by track, date and first log. Its README says which one it was timed `--against`."""
    rows = []
    for track in sorted(path for path in folder.iterdir() if path.is_dir()):
        records = {path.name: read_logs([path])[0] for path in track.iterdir() if FOLDER.fullmatch(path.name)}
        seconds = {name: statistics.mean(log.final.seconds for log in logs) for name, logs in records.items()}
        for name, logs in sorted(records.items(), key=lambda item: (item[0][:10], item[1][0].path.name)):
            text = (track / name / "README.md").read_text(encoding="utf-8")
            link = f"[{text.splitlines()[0].lstrip('# ')}]({track.name}/{name})"  # by the heading
            speedup = f"{seconds[other[1]] / seconds[name]:.2f} ×" if (other := AGAINST.search(text)) else ""
            rows.append((track.name, name.partition("_")[0], link, *row_of(logs), speedup))
    head = ("track", "date", "record", "n", "loss, mean ± std", "p", "seconds, mean (median)", "hardware", "faster by")
    return markdown(head, rows)


def row_of(logs: list[Log]) -> tuple[object, ...]:
    """n, loss, p, seconds and hardware of a record."""
    losses, seconds = [log.final.val_loss for log in logs], [log.final.seconds for log in logs]
    target = logs[-1].target  # the last, because runs from which a target is taken begin under the one before
    loss = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    p = f"{stats.ttest_1samp(losses, target, alternative='less').pvalue:.2g}"
    time = f"{statistics.mean(seconds):.1f} ({statistics.median(seconds):.1f})"
    hardware = logs[0].hardware.get("GPU") or logs[0].hardware.get("CPU", "").rpartition(", ")[0]  # without AVX
    return len(logs), loss, p, time, hardware


def history(track: str) -> str:
    """The public records of a track and what came after them, the newest first."""
    with open(RECORDS / "history.csv", newline="", encoding="utf-8") as file:
        records = [row for row in csv.DictReader(file) if row["track"] == track]
    rows = []
    for r in reversed(records):
        name = r["record"] if r["status"] == "record" else f"{r['record']}, {r['status']}"
        rows.append((name, f"{float(r['seconds']):g}", r["date"], r["change"], r["contributors"]))
    return markdown(("#", "seconds", "date", "change", "by"), rows)


def ablation(track: str) -> str:
    rows = ablate.read_csv(RECORDS / track / "ablation" / "ablation.csv", ablate.Result)
    return ablate.table(rows) if rows else f"Not measured yet: `python records/ablate.py {track}`."


TABLES = {
    "leaderboard": leaderboard,
    "history small": lambda: history("small"),
    "history medium": lambda: history("medium"),
    "ablation nano": lambda: ablation("nano"),
    "ablation small": lambda: ablation("small"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tables of the README files from logs and CSV files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is not current")
    options = parser.parse_args()
    stale = []
    try:
        for path in FILES:
            text = path.read_text(encoding="utf-8")
            if (new := TABLE.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}\n{match[3]}", text)) != text:
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
