"""Downloads FineWeb shards, already tokenized with the GPT-2 tokenizer, from the Hugging Face hub.

    python data/cached_fineweb10B.py          # the validation shard and the first 9 train shards: enough for `small`
    python data/cached_fineweb10B.py 20       # the first 20 train shards
    python data/cached_fineweb10B.py 99 --dataset finewebedu10B --out /shards      # all of another one

A shard holds 100M tokens (200 MB). huggingface_hub fetches it, by Xet where the hub and the machine have it, which is
the fastest way to these files, else by plain HTTP, which alone the tests know.
A shard has its name only once its SHA-256 is the hub's. An interrupted call goes on shard by shard. sha256.json beside
the shards says which were compared: the next call believes it for every file of the same size and time of change, and
uses no network. Of other files it asks the hub for the SHA-256, and fetches those that have another one.
tokens.bin has the bytes of GPT-2's tokens, by the vocabulary of openai-community/gpt2 or, where that fails, tiktoken.

HF_ENDPOINT names a mirror of the hub, HF_TOKEN an account with a higher rate limit, HF_XET_HIGH_PERFORMANCE=1 gives
Xet all cores and the whole line.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import shards
from shards import ShardError

IN_FLIGHT = 4  # files
SIDECAR, STAGING = "sha256.json", ".download"
TOKEN_BYTES_SHA256 = "c04286c99c18bd36cec8edea167f61d00879b3d90091e46f5e5c26e31ed86154"

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


def read_sidecar(out: Path, repo: str) -> dict[str, dict]:
    """For each shard whose SHA-256 was compared: {"sha256", "tokens", "size", "mtime_ns"}.

    Raises ShardError if the folder holds shards of another repo: they have the same names.
    """
    sidecar = shards.read_json(out / SIDECAR)
    if (found := sidecar.get("repo", repo)) != repo:
        raise ShardError(f"{out} holds shards of {found}, not of {repo}: name another folder with --out")
    return sidecar.get("shards", {})


def record(out: Path, repo: str, name: str, sha256: str) -> None:
    """Notes that this shard was compared. The folder must be held with `exclusive`."""
    path = out / name
    entry = {"sha256": sha256, "tokens": shards.read_shard_header(path), **shards.fingerprint(path)}
    sidecar = {"dataset": repo.split("/")[1].removesuffix("-gpt2"), "repo": repo}
    sidecar |= {"bos": shards.GPT2_BOS, "vocab_size": shards.GPT2_VOCAB_SIZE}
    sidecar["shards"] = dict(sorted((read_sidecar(out, repo) | {name: entry}).items()))
    shards.write_json(out / SIDECAR, sidecar)


def unknown(out: Path, repo: str, names: list[str]) -> list[str]:
    """Those of the names whose file is not there, or is not the one that the sidecar knows."""
    known = read_sidecar(out, repo)
    same = lambda path: path.exists() and known.get(path.name, {}).items() >= shards.fingerprint(path).items()
    return [name for name in names if not same(out / name)]


@contextlib.contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Has the body, which asks the hub by a client that tries again by itself, end with a ShardError."""
    try:
        yield
    except Exception as error:  # hub, HTTP client, TLS and Xet each have their own
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise ShardError(f"no {what} from {endpoint}: {error or type(error).__name__}\n{WAYS_OUT}") from error


def fetch(out: Path, repo: str, name: str, expected: str) -> None:
    """Fetches one file, verifies it, gives it its name. Raises ShardError."""
    with asking_hub(f"{repo}/{name}"):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(repo, name, repo_type="dataset", local_dir=out / STAGING, force_download=True)
        if (found := shards.sha256_of(path)) != expected:
            raise ValueError(f"it arrived with wrong bytes: SHA-256 {found}, expected {expected}")
        shards.read_shard_header(Path(path))
    shards.publish(path, out / name)


def download(out: Path, repo: str, names: list[str]) -> int:
    """Sees that these shards are the hub's; returns how many had to be fetched. The folder is held with `exclusive`."""
    from tqdm import tqdm

    with asking_hub(f"sizes and hashes of {repo}"):
        from huggingface_hub import HfApi

        files = HfApi().dataset_info(repo, files_metadata=True).siblings
        found = {file.rfilename: (file.size, file.lfs.sha256) for file in files if file.lfs}
        if missing := [name for name in names if name not in found]:
            raise LookupError(f"it has no file {missing[0]} with a SHA-256: is it a mirror of the hub?")
    remote = {name: found[name] for name in names}
    for name in [name for name in names if (out / name).exists()]:
        if shards.sha256_of(out / name) == remote[name][1]:
            record(out, repo, name, remote.pop(name)[1])
        else:
            print(f"{out / name} is not the hub's: fetching it again", file=sys.stderr)
    shards.require_space(out, sum(size for size, _ in remote.values()))
    shutil.rmtree(out / STAGING, ignore_errors=True)  # what a killed call has left
    pool = ThreadPoolExecutor(IN_FLIGHT)  # not by `with`, which would have Ctrl-C wait for what is in flight
    fetched = pool.map(lambda name: fetch(out, repo, name, remote[name][1]), remote)
    try:
        for name, _ in zip(remote, tqdm(fetched, repo, len(remote), unit="shard"), strict=True):
            record(out, repo, name, remote[name][1])
    except (ShardError, OSError):
        pool.shutdown(cancel_futures=True)
        raise
    shutil.rmtree(out / STAGING, ignore_errors=True)
    return len(remote)


def provide(out: Path, repo: str, names: list[str]) -> int:
    """Sees that these shards are in the folder; returns how many had to be fetched. Raises ShardError."""
    if not unknown(out, repo, names):  # without the lock: a complete folder may be read-only
        return 0
    with shards.exclusive(out):
        missing = unknown(out, repo, names)  # another process may have fetched them meanwhile
        return download(out, repo, missing) if missing else 0


def by_hub() -> Iterable[bytes]:
    """The bytes of GPT-2's tokens but BOS, the last one, by the vocabulary of OpenAI's model."""
    from huggingface_hub import HfApi, hf_hub_download

    HfApi().model_info("openai-community/gpt2")  # without network an error at once, not after half a minute
    vocab = json.loads(Path(hf_hub_download("openai-community/gpt2", "vocab.json")).read_bytes())
    return map(shards.byte_level, sorted(vocab, key=vocab.get)[: shards.GPT2_BOS])


def by_tiktoken() -> Iterable[bytes]:
    """As `by_hub`."""
    import tiktoken

    return map(tiktoken.get_encoding("gpt2").decode_single_token_bytes, range(shards.GPT2_BOS))


def gpt2_token_bytes() -> bytes:
    """Content of tokens.bin. Raises ShardError where it cannot be had."""
    failures = ""
    for source in (by_hub, by_tiktoken):
        try:
            content = shards.token_bytes([*source(), b""])
            if (found := hashlib.sha256(content).hexdigest()) != TOKEN_BYTES_SHA256:
                raise ValueError(f"another vocabulary: SHA-256 {found}, expected {TOKEN_BYTES_SHA256}")
            return content
        except Exception as error:  # hub, HTTP client, TLS and tiktoken each have their own
            failures += f"\n  {source.__name__}: {error or type(error).__name__}"
    raise ShardError(f"GPT-2's vocabulary cannot be had:{failures}")


def provide_token_bytes(out: Path) -> None:
    """Sees that tokens.bin is in the folder, or says why not: one can train without it."""
    path = out / shards.TOKEN_BYTES
    is_right = lambda: path.exists() and shards.sha256_of(path) == TOKEN_BYTES_SHA256
    if is_right():
        return
    try:
        with shards.exclusive(out):
            if not is_right():  # another process may have written it meanwhile
                shards.write(path, gpt2_token_bytes())
    except ShardError as error:
        print(f"notice: no {path}, without which training takes --no-prefix-loss: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Downloads FineWeb shards of GPT-2 tokens, 200 MB each.")
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help="train shards (default 9)")
    parser.add_argument("--dataset", choices=DATASETS, default="fineweb10B", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default: data/DATASET)")
    args = parser.parse_args()
    dataset, out = DATASETS[args.dataset], args.out or Path(__file__).resolve().parent / args.dataset
    count = args.shards
    if not 0 <= count <= dataset.num_train:
        parser.error(f"N is {count}, but {args.dataset} has {dataset.num_train:,} train shards")
    with shards.messages("cached_fineweb10B.py"):
        fetched = provide(out, dataset.repo, dataset.shard_names(count))
        provide_token_bytes(out)
    what = f"the validation shard and {count:,} train shards"
    print(f"{args.dataset} data: " + (f"fetched {fetched:,}; {what} are in" if fetched else f"found {what} in"), out)


if __name__ == "__main__":
    main()
