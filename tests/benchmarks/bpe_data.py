"""Real text for siblings of `small`: the files of `nano`'s data in tokens of a byte-level BPE trained on them.

python data/nano.py && python tests/benchmarks/bpe_data.py    # writes data/nano_bpe, 11M tokens, in half a minute
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from train_gpt import NANO, Shard  # noqa: E402


def texts(path: Path) -> Iterator[str]:
    """The documents of a shard of bytes."""
    shard = Shard.read(path, NANO.model.vocab_size, NANO.data.bos)
    for begin, end in zip(shard.bounds, shard.bounds[1:], strict=False):
        yield shard.tokens[begin + 1 : end].astype(np.uint8).tobytes().decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="default: 4,096, BOS is token 0")
    parser.add_argument("--out", type=Path, default=REPO / "data" / "nano_bpe", help="default: data/nano_bpe")
    options = parser.parse_args()
    found = [text for path in sorted((REPO / "data/nano").glob("*_train_*.bin")) for text in texts(path)]
    if not found:
        sys.exit("data/nano has no shards: python data/nano.py")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    initial = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(found, trainers.BpeTrainer(vocab_size=options.vocab_size, **initial))
    with tempfile.TemporaryDirectory() as folder:
        bpe, lines = Path(folder) / "bpe.json", Path(folder) / "text.jsonl"
        tokenizer.save(str(bpe))
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
        command = [sys.executable, REPO / "data/fineweb.py", "--out", options.out, "--input", lines, "--tokenizer", bpe]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
