"""Downloads FineWeb shards, already tokenized with the GPT-2 tokenizer, from the Hugging Face hub.

    python data/cached_fineweb10B.py          # the validation shard and the first 9 train shards: enough for `small`
    python data/cached_fineweb10B.py 20       # the first 20 train shards
    python data/cached_fineweb10B.py --all --dataset finewebedu10B --out /shards

A shard holds 100M tokens (200 MB). huggingface_hub fetches it, by Xet where the hub and the machine have it, which is
the fastest way to these files, else by plain HTTP; the tests, which have no hub but their own, know the latter alone.
A shard has its name only once its SHA-256 is the hub's. An interrupted call goes on shard by shard. sha256.json beside
the shards says which were compared: the next call believes it for every file of the same size and time of change, and
uses no network.

HF_ENDPOINT names a mirror of the hub, HF_TOKEN an account with a higher rate limit, HF_XET_HIGH_PERFORMANCE=1 gives
Xet all cores and the whole line.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import shards
from shards import HubError, ShardError

IN_FLIGHT = 4  # files
SIDECAR = "sha256.json"
SHA256 = re.compile("[0-9a-f]{64}")

WAYS_OUT = """Three ways out:
  1. try again: shards that are complete are kept
  2. use a mirror of the hub: HF_ENDPOINT=https://… python data/cached_fineweb10B.py
  3. train without network: ./run.sh nano (its data comes from data/nano.py)"""


@dataclass(frozen=True)
class Dataset:
    repo: str
    prefix: str
    num_train: int

    def shard_names(self, num_train: int) -> list[str]:
        """The validation shard, then the first `num_train` train shards, which count from 1."""
        return [f"{self.prefix}_val_000000.bin"] + [f"{self.prefix}_train_{i + 1:06d}.bin" for i in range(num_train)]


DATASETS = {
    "fineweb10B": Dataset("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": Dataset("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": Dataset("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def described(path: Path) -> dict[str, int]:
    """What the sidecar has of a shard beside its SHA-256. Raises ShardError where header and length do not fit."""
    return {"tokens": shards.read_shard_header(path)} | shards.fingerprint(path)


def read_sidecar(out: Path, repo: str) -> dict[str, dict]:
    """For each shard whose SHA-256 was compared: {"sha256", "tokens", "size", "mtime_ns"}. Of a damaged one, nothing.

    Raises ShardError if the folder holds shards of another repo: they have the same names.
    """
    try:
        sidecar = json.loads((out / SIDECAR).read_text())
        found, entries = sidecar["repo"], sidecar["shards"].items()
        known = {name: entry for name, entry in entries if SHA256.fullmatch(entry["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if found != repo:
        raise ShardError(f"{out} holds shards of {found}, not of {repo}: name another folder with --out")
    return known


def write_sidecar(out: Path, repo: str, known: dict[str, dict]) -> None:
    """The folder must be held with `exclusive`."""
    sidecar = {"dataset": repo.split("/")[1].removesuffix("-gpt2"), "repo": repo}
    sidecar |= {"bos": shards.GPT2_BOS, "vocab_size": shards.GPT2_VOCAB_SIZE, "shards": dict(sorted(known.items()))}
    shards.write_json(out / SIDECAR, sidecar)


def on_hub(repo: str, names: list[str]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of these files of a dataset repo. Raises HubError."""

    def ask() -> list:
        from huggingface_hub import HfApi

        batches = (names[begin : begin + 500] for begin in range(0, len(names), 500))
        return [file for batch in batches for file in HfApi().get_paths_info(repo, batch, repo_type="dataset")]

    found = {file.path: file for file in shards.hub_call(f"sizes and hashes of {repo}", ask, waits=())}
    for name in names:
        if name not in found or not found[name].lfs:
            raise HubError(f"the hub has no file {name} with a SHA-256 in {repo}: is HF_ENDPOINT a mirror of it?")
    return {name: (found[name].size, found[name].lfs.sha256) for name in names}


def missing_shards(out: Path, names: list[str], known: dict[str, dict], repo: str) -> list[str]:
    """Which shards have to be fetched. Brings `known` up to date.

    A file that is not as `known` has it is hashed. What it should be, the hub says where `known` does not; if the hub
    cannot be asked, header and length have to do, and that is not recorded.
    """
    strangers = [name for name in names if name not in known and (out / name).exists()]
    try:
        remote = on_hub(repo, strangers) if strangers else {}
    except HubError as error:
        print(f"notice: {len(strangers)} shards are accepted by header and length alone: {error}", file=sys.stderr)
        remote = {}
    missing = []
    for name in names:
        path = out / name
        if not path.exists():
            missing.append(name)
            continue
        try:
            entry, found = known.get(name, {}), described(path)
            expected = entry.get("sha256") or remote.get(name, (0, None))[1]
            if expected and not entry.items() >= found.items():
                print(f"comparing the SHA-256 of {path}, which is new or was touched", file=sys.stderr)
                if (sha256 := shards.sha256_of(path)) != expected:
                    raise ShardError(f"{path} has SHA-256 {sha256}, expected {expected}")
                known[name] = {"sha256": sha256} | found
        except ShardError as error:
            print(f"{error}: fetching it again", file=sys.stderr)
            missing.append(name)
    return missing


def fetch(out: Path, staging: Path, repo: str, name: str, expected: str) -> dict:
    """Fetches one file, verifies it, gives it its name; returns its entry of the sidecar. Raises ShardError."""

    def verified() -> Path:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(repo, name, repo_type="dataset", local_dir=staging, force_download=True)
        if (found := shards.sha256_of(path)) != expected:
            raise OSError(f"it arrived with wrong bytes: SHA-256 {found}, expected {expected}")
        return Path(path)

    path = shards.hub_call(f"{repo}/{name}", verified, shards.HUB_WAITS)
    try:
        shards.read_shard_header(path)
    except ShardError as error:
        raise HubError(f"{repo}/{name} is as the hub has it, but no shard: {error}") from error
    shards.publish(path, out / name)
    return {"sha256": expected} | described(out / name)


def download(out: Path, names: list[str], known: dict[str, dict], repo: str) -> None:
    """Fetches these shards into the folder, which must be held with `exclusive`. Raises ShardError."""
    from tqdm import tqdm

    remote = on_hub(repo, names)
    shards.require_space(out, sum(size for size, _ in remote.values()))
    staging = out / ".download"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed call has left
    pool = ThreadPoolExecutor(IN_FLIGHT)  # not by `with`, which would have Ctrl-C wait for what is in flight
    entries = pool.map(lambda name: fetch(out, staging, repo, name, remote[name][1]), names)
    try:
        for name, entry in zip(names, tqdm(entries, repo, len(names), unit="shard"), strict=True):
            known[name] = entry
            write_sidecar(out, repo, known)
    except (ShardError, OSError):
        pool.shutdown(cancel_futures=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def provide(out: Path, names: list[str], repo: str) -> int:
    """Sees that these shards are in the folder; returns how many had to be fetched. Raises ShardError."""
    known = read_sidecar(out, repo)
    before = dict(known)
    missing = missing_shards(out, names, known, repo)  # without the lock: a complete folder may be read-only
    if missing:
        with shards.exclusive(out):
            known |= read_sidecar(out, repo)  # another process may have fetched them meanwhile
            missing = missing_shards(out, names, known, repo)
            if missing:
                download(out, missing, known, repo)
    elif known != before:
        with contextlib.suppress(ShardError), shards.exclusive(out):
            write_sidecar(out, repo, known)
    return len(missing)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Downloads FineWeb shards of GPT-2 tokens, 200 MB each.")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help="train shards (default 9)")
    amount.add_argument("--all", action="store_true", help="all train shards of the dataset")
    parser.add_argument("--dataset", choices=DATASETS, default="fineweb10B", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default: data/DATASET)")
    args = parser.parse_args()
    dataset, out = DATASETS[args.dataset], args.out or here / args.dataset
    count = dataset.num_train if args.all else args.shards
    if not 0 <= count <= dataset.num_train:
        parser.error(f"N is {count}, but {args.dataset} has {dataset.num_train:,} train shards")
    with shards.messages("cached_fineweb10B.py", WAYS_OUT):
        fetched = provide(out, dataset.shard_names(count), dataset.repo)
    what = f"the validation shard and {count:,} train shards"
    print(f"{args.dataset} data: " + (f"fetched {fetched:,}; {what} are in" if fetched else f"found {what} in"), out)


if __name__ == "__main__":
    main()
