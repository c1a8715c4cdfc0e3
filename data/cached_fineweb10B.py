"""Downloads FineWeb shards, already tokenized with the GPT-2 tokenizer, from the Hugging Face hub.

    python data/cached_fineweb10B.py          # the validation shard and the first 9 train shards: enough for `small`
    python data/cached_fineweb10B.py 20       # the first 20 train shards
    python data/cached_fineweb10B.py --all --dataset finewebedu10B --out /shards

A shard holds 100M tokens (200 MB). It has its name only once its SHA-256 is the hub's; until then it is `.NAME.part`,
from whose end an interrupted download goes on. sha256.json beside the shards says which were compared: the next call
believes it for every file of the same size and time of change, and uses no network.

HF_ENDPOINT names a mirror of the hub, HF_TOKEN an account with a higher rate limit. A lost connection, HTTP 429 or 5xx
is tried again after 1, 2, 4 … s or as Retry-After says, until 6 tries in a row brought no new byte; a file with a wrong
SHA-256 is fetched three times. Where there is no network at all, the first try is the last.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from shards import (
    GPT2_BOS,
    GPT2_VOCAB_SIZE,
    ShardError,
    exclusive,
    fingerprint,
    new_file,
    publish,
    read_shard_header,
    require_space,
    sha256_of,
)

IN_FLIGHT = 4  # files
TRIES = 6  # in a row without a new byte
FIRST_WAIT = 1.0  # seconds, doubled after every failure: half a minute in all, unless the server names its own
FETCHES = 3  # of a file that arrives with a wrong SHA-256
SIDECAR = "sha256.json"
SHA256 = re.compile("[0-9a-f]{64}")

WAYS_OUT = """Three ways out:
  1. try again: shards that are complete are kept, and the others go on from where they stopped
  2. use a mirror of the hub: HF_ENDPOINT=https://… python data/cached_fineweb10B.py
  3. train without network: ./run.sh nano (its data comes from data/nano.py)"""

T = TypeVar("T")


class HubError(ShardError):
    """The hub does not give what is asked of it."""


class Stopped(Exception):
    """Ends a thread whose work nobody waits for any more."""


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


def say(message: str) -> None:
    """Prints to stderr, above the progress bars if there are any."""
    from tqdm import tqdm  # here: a call that finds everything has nothing to say and should not wait for it

    tqdm.write(message, file=sys.stderr)


# ---- what is in the folder ----


def part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def described(path: Path) -> dict[str, int]:
    """What the sidecar has of a shard beside its SHA-256. Raises ShardError where header and length do not fit."""
    return {"tokens": read_shard_header(path)} | fingerprint(path)


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


def compared(known: dict[str, dict]) -> dict[str, dict]:
    return {name: entry for name, entry in sorted(known.items()) if "sha256" in entry}


def write_sidecar(out: Path, repo: str, known: dict[str, dict]) -> None:
    """Atomic; the folder must be held with `exclusive`."""
    with new_file(out / SIDECAR) as file:
        names = [name for name, dataset in DATASETS.items() if dataset.repo == repo]
        sidecar = {
            "dataset": (names or [repo])[0],
            "repo": repo,
            "bos": GPT2_BOS,
            "vocab_size": GPT2_VOCAB_SIZE,
            "shards": compared(known),
        }
        file.write((json.dumps(sidecar, indent=1) + "\n").encode())


def missing_shards(out: Path, names: Iterable[str], known: dict[str, dict], hub: "Hub") -> dict[str, str]:
    """Which shards have to be fetched, and why ("" for those that are not there). Brings `known` up to date.

    A file that is not as `known` has it is hashed. What it should be, the hub says where `known` does not; if the hub
    cannot be asked, header and length have to do, and that is not recorded.
    """
    missing, changed = {}, []
    for name in names:
        path = out / name
        if not path.exists():
            missing[name] = ""
            continue
        try:
            if any(known.get(name, {}).get(key) != value for key, value in described(path).items()):
                changed.append(name)
        except ShardError as error:
            missing[name] = str(error)
    expected = {name: known[name]["sha256"] for name in changed if "sha256" in known.get(name, {})}
    strangers = [name for name in changed if name not in expected]
    if strangers:
        try:
            expected |= {name: remote.sha256 for name, remote in hub.remotes(strangers).items()}
        except HubError as error:
            say(f"notice: {len(strangers)} shards are accepted by header and length, without their SHA-256: {error}")
            known.update({name: described(out / name) for name in strangers})
    if expected:
        say(f"computing the SHA-256 of what is new or was touched in {out}: {len(expected)} shards")

    def compare(name: str) -> dict:
        return {"sha256": sha256_of(out / name)} | described(out / name)

    def note(name: str, entry: dict) -> None:
        if entry["sha256"] == expected[name]:
            known[name] = entry
        else:
            missing[name] = f"{out / name} has SHA-256 {entry['sha256']}, expected {expected[name]}"

    hub.in_flight(compare, expected, note)
    return {name: missing[name] for name in names if name in missing}


# ---- what is on the hub ----


@dataclass(frozen=True)
class Remote:
    size: int
    sha256: str


def seconds_to_wait(headers: Any) -> float | None:
    """What a server asks for in Retry-After (seconds or a date) or, as the hub does, in RateLimit."""
    from huggingface_hub.utils import parse_ratelimit_headers

    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    with contextlib.suppress(ValueError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


@dataclass
class Hub:
    """The files of one dataset repo. Plain HTTP, whatever the hub stores them in: it can go on from any byte."""

    repo: str
    reached: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    asked: dict[str, Remote] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Before its import: else huggingface_hub would first ask the hub for a list of AI agents, for its User-Agent.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    def url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, repo_type="dataset")

    def in_flight(self, work: Callable[[str], T], names: Iterable[str], done: Callable[[str, T], None]) -> None:
        """Runs `work` on all names, in their order, and `done` here with what it returns as soon as it does.

        The first error, or Ctrl-C, ends the rest.
        """
        self.stop.clear()
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            futures = {pool.submit(work, name): name for name in names}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def persist(self, name: str, action: Callable[[], T], have: Callable[[], int] = lambda: 0) -> T:
        """Calls `action` until it returns.

        Raises HubError after TRIES failures in a row during which `have`, the bytes so far, did not grow; at once where
        trying again cannot help, which includes a hub that this process has never reached.
        """
        import httpx2  # of huggingface_hub
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        from huggingface_hub.utils import get_token

        failures, most = 0, have()
        while True:
            asked_for = None
            try:
                result = action()
                self.reached = True
                return result
            except HfHubHTTPError as error:
                self.reached = True
                status = error.response.status_code
                problem = f"{ENDPOINT} answers HTTP {status} for {self.repo}/{name}"
                if status in (401, 403):
                    token = "the one that is set is not accepted" if get_token() else "none is set"
                    raise HubError(f"{problem}: HF_TOKEN has to be of an account that may read it; {token}") from error
                if status == 404:
                    raise HubError(f"{problem}: it has no such file; is HF_ENDPOINT a mirror of the hub?") from error
                if status < 500 and status not in (408, 416, 429):
                    raise HubError(problem) from error
                asked_for = seconds_to_wait(error.response.headers)
            except (httpx2.RequestError, httpx2.InvalidURL, OfflineModeIsEnabled) as error:
                problem = f"no {name} from {ENDPOINT}: {str(error) or type(error).__name__}"
                dropped = (httpx2.ReadTimeout, httpx2.ReadError, httpx2.RemoteProtocolError)
                if not self.reached and not isinstance(error, dropped):
                    raise HubError(problem) from error
            failures, most = (1, have()) if have() > most else (failures + 1, most)
            if failures == TRIES:
                raise HubError(f"{problem}. Gave up after {TRIES} tries without a new byte")
            wait = FIRST_WAIT * 2 ** (failures - 1) if asked_for is None else asked_for
            say(f"{problem}; trying again in {wait:.0f} s{' as it asks' if asked_for is not None else ''}")
            if self.stop.wait(wait):
                raise Stopped

    def remotes(self, names: Iterable[str]) -> dict[str, Remote]:
        """Sizes and hashes of these files. Raises HubError."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.constants import ENDPOINT
        from tqdm import tqdm

        def head(name: str) -> Remote:
            found = self.persist(name, lambda: get_hf_file_metadata(self.url(name)))
            if not found.size or not SHA256.fullmatch(found.etag or ""):
                raise HubError(f"{ENDPOINT} gave no size and SHA-256 of {self.repo}/{name}: is it a mirror of the hub?")
            return Remote(found.size, found.etag)

        names = list(names)
        with tqdm(total=len(names), desc="sizes and hashes", unit="file", leave=False, disable=None) as bar:

            def note(name: str, remote: Remote) -> None:
                self.asked[name] = remote
                bar.update()

            self.in_flight(head, [name for name in names if name not in self.asked], note)
        return {name: self.asked[name] for name in names}

    def get_rest(self, name: str, size: int, part: Path, advance: Callable[[int], None]) -> None:
        """Appends to `part` what it lacks. Raises what `persist` handles; what came before that is kept."""
        import httpx2
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        have = size_of(part)
        if have >= size:
            return
        headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        with get_session().stream("GET", self.url(name), headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # the whole file
                advance(-have)
                have = 0
            with open(part, "ab" if have else "wb") as file:
                for chunk in response.iter_bytes():
                    if self.stop.is_set():
                        raise Stopped
                    file.write(chunk)
                    advance(len(chunk))
                    have += len(chunk)
                    if have > size:
                        return  # the hash will say that it is wrong
        if have < size:
            raise httpx2.RemoteProtocolError(f"it ended after {have:,} of {size:,} bytes")

    def download(self, name: str, path: Path, advance: Callable[[int], None]) -> dict:
        """Fetches one file, verifies it, gives it its name; returns its entry of the sidecar."""
        remote, part = self.asked[name], part_of(path)
        for fetch in range(1, FETCHES + 1):
            self.persist(name, lambda: self.get_rest(name, remote.size, part, advance), lambda: size_of(part))
            found = sha256_of(part)
            if found == remote.sha256:
                break
            advance(-size_of(part))
            part.unlink()
            problem = f"{name} arrived with wrong bytes and was removed"
            problem += f"\n  SHA-256    {found}\n  expected   {remote.sha256}"
            if fetch == FETCHES:
                raise HubError(f"{problem}\nGave up after {FETCHES} fetches")
            say(f"{problem}\nfetching it again")
        try:
            read_shard_header(part)
        except ShardError as error:
            part.unlink()
            raise HubError(f"{self.repo}/{name} is as the hub has it, but no shard: {error}") from error
        publish(part, path)
        return {"sha256": found} | described(path)


def download(hub: Hub, out: Path, names: list[str], known: dict[str, dict]) -> None:
    """Fetches these shards into the folder, which must be held with `exclusive`. Raises ShardError."""
    from tqdm import tqdm

    remotes = hub.remotes(names)
    staged = {name: size_of(part_of(out / name)) for name in names}
    total = sum(remote.size for remote in remotes.values())
    require_space(out, total - sum(staged.values()))
    unit = {"unit": "B", "unit_scale": True}
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds: a log file needs no animation
    with tqdm(total=total, initial=sum(staged.values()), desc="all", mininterval=interval, **unit) as all_bar:

        def work(name: str) -> dict:
            size, initial = remotes[name].size, staged[name]
            with tqdm(total=size, initial=initial, desc=name, leave=False, disable=None, **unit) as bar:

                def advance(num_bytes: int) -> None:
                    bar.update(num_bytes)
                    with all_bar.get_lock():
                        all_bar.update(num_bytes)

                try:
                    return hub.download(name, out / name, advance)
                except OSError as error:
                    raise ShardError(
                        f"{out / name} was not written: {error.strerror}. What has come is kept: mend that (free "
                        "space, say) and run the same command again"
                    ) from error

        def note(name: str, entry: dict) -> None:
            known[name] = entry
            write_sidecar(out, hub.repo, known)

        hub.in_flight(work, names, note)


def provide(out: Path, names: list[str], repo: str) -> int:
    """Sees that these shards are in the folder; returns how many had to be fetched. Raises ShardError."""
    hub, known = Hub(repo), read_sidecar(out, repo)
    before = compared(known)
    # First without the lock: a complete folder may be read-only.
    if missing_shards(out, names, known, hub):
        with exclusive(out):
            known |= read_sidecar(out, repo) | compared(known)  # another process may have fetched them meanwhile
            missing = missing_shards(out, names, known, hub)
            for reason in filter(None, missing.values()):
                say(f"{reason}: fetching it again")
            if missing:
                download(hub, out, list(missing), known)
            return len(missing)
    if compared(known) != before:
        with contextlib.suppress(ShardError), exclusive(out):
            write_sidecar(out, repo, read_sidecar(out, repo) | compared(known))
    return 0


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
    try:
        fetched = provide(out, dataset.shard_names(count), dataset.repo)
    except (ShardError, OSError) as error:
        ways_out = f"\n{WAYS_OUT}" if isinstance(error, HubError) else ""
        sys.exit(f"data/cached_fineweb10B.py: error: {error}{ways_out}")
    except KeyboardInterrupt:
        print("interrupted: what has come is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    what = f"the validation shard and {count:,} train shards"
    print(f"{args.dataset} data: " + (f"fetched {fetched:,}; {what} are in" if fetched else f"found {what} in"), out)


if __name__ == "__main__":
    main()
