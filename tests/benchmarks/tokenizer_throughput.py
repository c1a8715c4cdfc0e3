"""Tokens/s of data/fineweb.py, end to end, against tiktoken's own encode_ordinary_batch, on two cores.

    python tests/benchmarks/tokenizer_throughput.py [--megabytes 100] [--pairs 5] [--vocabulary FILE]

The vocabulary is a byte-level BPE of GPT-2's size, trained on the Python sources of the installed packages (a minute,
unless FILE holds one from before), behind GPT-2's split pattern; so no network is needed. The text is those sources,
cut into documents of 3 kB, in a parquet file. A: tiktoken, 2 threads, texts and tokens in memory. B: the script as a
user starts it, 2 workers, from the start of its process to the last byte on disk. A and B take turns. The ratio of CPU
seconds is what others on the machine disturb least: 1.00 would be no work but tiktoken's.
"""

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tiktoken

REPO = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(REPO / "tests"), str(REPO), str(REPO / "data")]
from test_data_fineweb import install_encoding, mergeable_ranks, train_bpe  # noqa: E402

DOCUMENT_CHARS = 3000


def python_sources() -> list[str]:
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    return [text for path in paths if (text := path.read_text("utf-8", errors="ignore"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of text")
    parser.add_argument("--pairs", type=int, default=5, help="how often A and B take turns")
    parser.add_argument("--vocabulary", type=Path, help="file to keep the vocabulary in")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sources = python_sources()
        vocabulary = arguments.vocabulary or folder / "vocabulary.json"
        if not vocabulary.exists():
            began = time.perf_counter()
            train_bpe(sources, 50_256).save(str(vocabulary))
            print(f"vocabulary trained in {time.perf_counter() - began:.0f} s")
        name = install_encoding(mergeable_ranks(vocabulary), folder)
        sys.path.insert(0, str(folder))
        encoding = tiktoken.get_encoding(name)

        texts, size = [], 0
        for text in sources * (1 + arguments.megabytes * 10**6 // sum(map(len, sources))):
            texts += [text[i : i + DOCUMENT_CHARS] for i in range(0, len(text), DOCUMENT_CHARS)]
            size += len(text)
            if size > arguments.megabytes * 10**6:
                break
        table = pyarrow.table({"id": [str(i) for i in range(len(texts))], "text": texts})
        pyarrow.parquet.write_table(table, folder / "text.parquet", row_group_size=1000)  # FineWeb's row groups

        command = [sys.executable, REPO / "data" / "fineweb.py", "--input", folder / "text.parquet", "--workers", "2"]
        command += ["--tokenizer", name, "--shard-tokens", "10M"]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        ours, theirs, cpu_ratios = [], [], []
        for turn in range(arguments.pairs):
            began, cpu_began = time.perf_counter(), sum(os.times()[:4])
            tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=2))) + len(texts)
            theirs.append(tokens / (time.perf_counter() - began))
            cpu_between = sum(os.times()[:4])
            out = folder / f"out{turn}"
            began = time.perf_counter()
            subprocess.run([*command, "--out", out], env=environment, check=True, stdout=subprocess.DEVNULL)
            ours.append(tokens / (time.perf_counter() - began))
            cpu_ratios.append((cpu_between - cpu_began) / (sum(os.times()[:4]) - cpu_between))
            assert sum((path.stat().st_size - 1024) // 2 for path in out.glob("fineweb_*.bin")) == tokens
            load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
            print(
                f"pair {turn + 1}: tiktoken {theirs[-1]:,.0f} tokens/s, data/fineweb.py {ours[-1]:,.0f} tokens/s, "
                f"ratio {ours[-1] / theirs[-1]:.2f} (of CPU seconds {cpu_ratios[-1]:.2f}), load {load}"
            )
        ratio = statistics.median(b / a for a, b in zip(theirs, ours, strict=True))
        print(
            f"{size / 1e6:.0f} MB of text, {len(texts):,} documents, {tokens:,} tokens. Medians: tiktoken "
            f"{statistics.median(theirs):,.0f} tokens/s, data/fineweb.py {statistics.median(ours):,.0f} tokens/s; "
            f"median ratio of the pairs {ratio:.2f} (of CPU seconds {statistics.median(cpu_ratios):.2f})"
        )


if __name__ == "__main__":
    main()
