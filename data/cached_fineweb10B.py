"""Downloads the FineWeb shards of the `small` and `medium` tracks, already tokenized with the GPT-2 tokenizer.

    python data/cached_fineweb10B.py [N]   # the validation shard and the first N of 103 train shards (default 9)

A shard holds 100M tokens (200 MB); 9 are enough for a run of `small`. Those already in data/fineweb10B/ are kept.
HF_ENDPOINT names a mirror of the Hugging Face hub, HF_TOKEN an account with a higher rate limit.
"""

import argparse
import os
import struct
import sys
from pathlib import Path

from tqdm import tqdm

REPO = "kjj0/fineweb10B-gpt2"
OUT = Path(__file__).resolve().parent / "fineweb10B"
NUM_TRAIN_SHARDS = 103
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024

WAYS_OUT = """Three ways out:
  1. try again: shards that are complete are kept
  2. use a mirror of the hub: HF_ENDPOINT=https://… python data/cached_fineweb10B.py
  3. train without network: ./run.sh nano"""


class ShardError(Exception):
    """A shard is not what its header or the format says."""


def check_shard(path: Path) -> int:
    """Returns the token count of a shard (256 little-endian int32 of header, then uint16 tokens).

    Raises ShardError with what is wrong if magic, version or length differ from the format.
    """
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise ShardError(f"{path} has {len(header)} bytes, fewer than the header's {HEADER_BYTES}")
    magic, version, tokens = struct.unpack("<3i", header[:12])
    if (magic, version) != (MAGIC, VERSION):
        raise ShardError(f"{path} starts with magic {magic}, version {version}; expected {MAGIC}, {VERSION}")
    expected, size = HEADER_BYTES + 2 * tokens, path.stat().st_size
    if size != expected:
        raise ShardError(f"{path} has {size:,} bytes, but {expected:,} by its header of {tokens:,} tokens")
    return tokens


def is_complete(path: Path) -> bool:
    """Whether the shard is there in full; one that is not is removed, so that it is downloaded again."""
    if not path.exists():
        return False
    try:
        check_shard(path)
    except ShardError as error:
        print(f"{error}: downloading it again")
        path.unlink()
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Downloads tokenized FineWeb shards into data/fineweb10B/.")
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help="train shards (default 9)")
    count = parser.parse_args().shards
    if not 0 <= count <= NUM_TRAIN_SHARDS:
        parser.error(f"N is {count}, but there are {NUM_TRAIN_SHARDS} train shards")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]
    missing = [name for name in names if not is_complete(OUT / name)]
    if not missing:
        print(f"fineweb10B data: found the validation shard and {count} train shards in {OUT}")
        return

    from huggingface_hub import hf_hub_download  # here: its import would slow down every start that has its data

    for name in tqdm(missing, desc="fineweb10B", unit="shard"):
        try:
            check_shard(Path(hf_hub_download(REPO, name, repo_type="dataset", local_dir=OUT)))
        except Exception as error:  # hub, HTTP client, TLS and disk each have their own; the ways out are the same
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            sys.exit(f"data/cached_fineweb10B.py: error: no {name} from {endpoint}: {error}\n{WAYS_OUT}")
    print(f"fineweb10B data: the validation shard and {count} train shards are in {OUT}")


if __name__ == "__main__":
    main()
