"""records/tables.py: the tables in the README files are those of the logs and CSV files that lie there."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from scipy import stats

import tables

LINE = "=" * 100


def write_record(folder: Path, text: str, losses: list[float], seconds: list[float]) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(text)
    for i, (loss, time) in enumerate(zip(losses, seconds, strict=True)):
        log = ["source", LINE, "CPU: Some CPU @ 2 GHz, 2 threads, AVX2", "name: nano", "target_loss: 1.22", LINE]
        log.append(f"step:10/10 val_loss:{loss:.4f} train_time:{1000 * time:.0f}ms step_avg:{100 * time:.2f}ms")
        (folder / f"{i}.txt").write_text("\n".join(log) + "\n")


def test_the_tables_of_the_repository_are_current():
    """Catches: a number in a README that was typed, or a record that was added without its row."""
    check = subprocess.run([sys.executable, REPO / "records" / "tables.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, f"{check.stdout}{check.stderr} run: python records/tables.py"


def test_a_table_that_is_not_current_is_named(tmp_path, monkeypatch, capsys):
    """Catches: a check that cannot fail, a rewrite that is not the same twice or that touches text around the table."""
    page = tmp_path / "README.md"
    page.write_text("Before\n\n<!-- table: history medium -->\nold\n<!-- end of table -->\n\nAfter\n")
    monkeypatch.setattr(tables, "FILES", (page,))

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        with pytest.raises(SystemExit) as end:
            tables.main()
        return end.value.code

    assert run("--check") == 1 and "not current" in capsys.readouterr().out and "old" in page.read_text()
    assert run() == 0 and run("--check") == 0
    text = page.read_text()
    assert text.startswith("Before\n\n<!-- table: history medium -->\n| # | seconds |") and text.endswith("\n\nAfter\n")
    assert text.count("\n| ") == 2 + 18
    page.write_text(text.replace("| 1041 |", "| 1040 |"))
    assert run("--check") == 1


def test_what_is_no_record_has_no_number_in_the_table():
    """Catches: a merged or open submission that reads as a record of the race."""
    rows = [row.split(" | ") for row in tables.history("small").splitlines()[2:]]
    records = [row for row in rows if row[0].removeprefix("| ").isdigit()]
    assert [int(row[0][2:]) for row in records] == list(range(89, 0, -1))
    assert {row[0]: row[1] for row in rows if row not in records} == {
        "| #360, open submission": "39.9",
        "| #344, merged after record 89": "70",
    }


LINKS = (
    "https://github.com/KellerJordan/modded-nanogpt",
    "https://github.com/karpathy/llm.c",
    "https://github.com/karpathy/nanoGPT",
    "https://github.com/karpathy/nanochat",
    "https://kellerjordan.github.io/posts/muon/",
    "https://arxiv.org/abs/2510.05491",
    "https://arxiv.org/abs/2505.16932",
)


@pytest.mark.parametrize("page", ["README.md", "records/README.md", "LICENSE"])
def test_sources_are_credited(page):
    """Catches: a rewrite that loses where the race and its techniques come from."""
    text = (REPO / page).read_text(encoding="utf-8")
    assert [link for link in LINKS if link not in text] == []


def test_the_leaderboard_is_made_of_logs(tmp_path):
    """Against scipy and plain means, from records that are made up. Only what was timed together is compared."""
    first, second = [1.20, 1.21, 1.19], [1.10, 1.12, 1.11]
    against = "python records/check.py records/nano/2026-02-03_muon --against records/nano/2026-01-02_baseline"
    write_record(tmp_path / "nano" / "2026-01-02_baseline", "# The baseline\n\nText.", first, [300.0, 320.0, 280.0])
    write_record(tmp_path / "nano" / "2026-01-03_aside", "# On another machine", first, [30.0, 32.0, 28.0])
    write_record(tmp_path / "nano" / "2026-02-03_muon", f"# Muon\n\n{against}\n", second, [100.0, 90.0, 110.0])
    (tmp_path / "nano" / "ablation").mkdir()  # no record
    (tmp_path / "nano" / "2026-02-03_muon" / "notes.txt").write_text("no log\n")
    *_, a, b, c = tables.leaderboard(tmp_path).splitlines()
    p, q = (stats.ttest_1samp(losses, 1.22, alternative="less").pvalue for losses in (first, second))
    cpu = "Some CPU @ 2 GHz, 2 threads"
    link = "[The baseline](nano/2026-01-02_baseline)"
    assert a == f"| nano | 2026-01-02 | {link} | 3 | 1.2000 ± 0.0100 | {p:.2g} | 300.0 (300.0) | {cpu} |  |"
    link = "[On another machine](nano/2026-01-03_aside)"
    assert b == f"| nano | 2026-01-03 | {link} | 3 | 1.2000 ± 0.0100 | {p:.2g} | 30.0 (30.0) | {cpu} |  |"
    link = "[Muon](nano/2026-02-03_muon)"
    assert c == f"| nano | 2026-02-03 | {link} | 3 | 1.1100 ± 0.0100 | {q:.2g} | 100.0 (100.0) | {cpu} | 3.00 × |"
