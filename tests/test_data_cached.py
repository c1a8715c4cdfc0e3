"""data/cached_fineweb10B.py as a user starts it, against a hub on 127.0.0.1 that fails on demand."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple

import pytest
from hub_server import Fault, HubServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cached_fineweb10B as script

SCRIPT = Path(script.__file__).resolve()
REPO = "kjj0/fineweb10B-gpt2"
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(1, 104)]
ONE, TWO = TRAIN[:2]
# Starts the script with shorter waits between its tries, and with a line of its own before.
SHORT_WAITS = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import cached_fineweb10B as script
script.FIRST_WAIT = 0.02
{{}}
script.main()
"""


def shard(num_tokens: int, seed: int = 0) -> bytes:
    """A shard file with random tokens: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens."""
    header = struct.pack("<256i", 20240520, 1, num_tokens, *[0] * 253)
    return header + random.Random(seed).randbytes(2 * num_tokens)


FILES = {name: shard(50_000 + 10_000 * i, seed=i) for i, name in enumerate([VAL, *TRAIN[:9]])}


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Site:
    """A folder for shards and the hub that they come from."""

    def __init__(self, folder: Path, repo: str = REPO, files: dict[str, bytes] = FILES):
        self.folder, self.out, self.home = folder, folder / "out", folder / "home"
        self.hub = HubServer(repo, files)
        drop = ("HF_", "HUGGING", "http_", "https_", "all_", "no_")
        self.env = {k: v for k, v in os.environ.items() if not k.lower().startswith(tuple(d.lower() for d in drop))}
        self.env |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home)}

    def start(self, *args: object, line: str = "", out: bool = True, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", SHORT_WAITS.format(line), *map(str, args)]
        command += ["--out", str(self.out)] if out else []
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, stdout=pipe, stderr=pipe, text=True, **options)

    def run(self, *args: object, code: int = 0, line: str = "", out: bool = True) -> Result:
        """Runs the script in a process of its own and expects this exit code."""
        process = self.start(*args, line=line, out=out)
        stdout, stderr = process.communicate(timeout=60)
        return self.checked(Result(process.returncode, stdout, stderr), code)

    def call(self, *args: object, code: int = 0, first_wait: float = 0.02) -> Result:
        """The same in this process, which is ten times quicker."""
        from huggingface_hub import constants

        result, stdout, stderr = 0, io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", self.env["HF_ENDPOINT"])
            template = self.env["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_TOKEN_PATH", str(self.home / "token"))
            for name in [name for name in os.environ if name not in self.env]:
                patch.delenv(name)
            for name, value in self.env.items():
                patch.setenv(name, value)
            patch.setattr(script, "FIRST_WAIT", first_wait)
            patch.setattr(sys, "argv", [str(SCRIPT), *map(str, args), "--out", str(self.out)])
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    script.main()
                except SystemExit as exit_:
                    print(exit_.code, file=sys.stderr)
                    result = exit_.code if isinstance(exit_.code, int) else 1
        return self.checked(Result(result, stdout.getvalue(), stderr.getvalue()), code)

    def checked(self, result: Result, code: int) -> Result:
        assert result.code == code, result
        assert "Traceback" not in result.stderr
        assert code != 1 or "\ndata/cached_fineweb10B.py: error: " in "\n" + result.stderr
        return result

    def has(self, *names: str) -> None:
        """Exactly these files have final names, bit-identical with the hub's."""
        assert sorted(path.name for path in self.out.glob("*.bin") if not path.name.startswith(".")) == sorted(names)
        for name in names:
            assert (self.out / name).read_bytes() == self.hub.files[name], name

    def refused(self, name: str) -> None:
        """This file has no final name, and those that have are right."""
        assert not (self.out / name).exists()
        self.has(*(path.name for path in self.out.glob("*.bin") if not path.name.startswith(".")))

    def sidecar(self) -> dict:
        return json.loads((self.out / "sha256.json").read_text())["shards"]

    def put(self, *names: str) -> None:
        """Copies files into the folder, as from elsewhere."""
        self.out.mkdir(exist_ok=True)
        for name in names:
            (self.out / name).write_bytes(self.hub.files[name])


@pytest.fixture
def site(tmp_path: Path):
    site = Site(tmp_path)
    yield site
    site.hub.shutdown()
    site.hub.server_close()


# ---- what is fetched ----


def test_fetches_the_validation_shard_then_nine(site: Site):
    """Catches a wrong default, names, order or place; the second call must not use the network at all."""
    result = site.run()
    site.has(VAL, *TRAIN[:9])
    assert "fetched 10; the validation shard and 9 train shards are in" in result.stdout
    first_four = [r.name for r in site.hub.requests if r.method == "GET" and r.kind == "hub"][:4]
    assert VAL in first_four, "the validation shard is among the first in flight"
    assert site.sidecar()[ONE] == {
        "sha256": hashlib.sha256(FILES[ONE]).hexdigest(),
        "tokens": 60_000,
        "size": 121_024,
        "mtime_ns": (site.out / ONE).stat().st_mtime_ns,
    }
    whole = json.loads((site.out / "sha256.json").read_text())
    assert (whole["repo"], whole["bos"], whole["vocab_size"]) == (REPO, 50256, 50257)
    assert list(whole["shards"]) == sorted(FILES)

    asked = len(site.hub.requests)
    site.hub.shutdown()
    site.hub.server_close()
    assert "found the validation shard and 9 train shards" in site.run().stdout
    assert "found the validation shard and 3 train shards" in site.run(3).stdout
    assert len(site.hub.requests) == asked
    assert [path.name for path in site.out.iterdir() if path.name.startswith(".")] == [".lock"], "nothing else is left"


def test_all_and_the_other_datasets(tmp_path: Path):
    """Catches a wrong repo, prefix or number of shards of a dataset."""
    tiny = shard(10)
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)]
    site = Site(tmp_path, "kjj0/finewebedu10B-gpt2", dict.fromkeys(names, tiny))
    site.call("--all", "--dataset", "finewebedu10B")
    site.has(*names)
    assert script.DATASETS["fineweb10B"].shard_names(103) == [VAL, *TRAIN]
    assert script.DATASETS["fineweb100B"].shard_names(1030)[::1030] == [VAL, "fineweb_train_001030.bin"]
    assert [script.DATASETS[name].num_train for name in ("fineweb10B", "fineweb100B")] == [103, 1030]


def test_the_script_itself_writes_beside_itself(site: Site):
    """As run.sh calls it; train_gpt.py looks for the shards in data/fineweb10B."""
    data = site.folder / "data"
    data.mkdir()
    for name in ("cached_fineweb10B.py", "shards.py"):
        shutil.copy(SCRIPT.with_name(name), data)
    command = [sys.executable, "data/cached_fineweb10B.py"]
    subprocess.run(command, env=site.env, cwd=site.folder, check=True, capture_output=True, timeout=60)
    site.out = data / "fineweb10B"
    site.has(VAL, *TRAIN[:9])

    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", *command[1:]]
    result = subprocess.run(command, env=site.env, cwd=site.folder, check=True, capture_output=True, text=True)
    print(f"second call: {time.perf_counter() - start:.2f} s")
    for slow in ("huggingface_hub", "tqdm", "numpy", "filelock", "httpx2"):
        assert f" {slow}\n" not in result.stderr, "a call that finds everything must not import it"


@pytest.mark.parametrize(
    "arguments",
    [["104"], ["-1"], ["3", "--all"], ["x"], ["--dataset", "nothing"], ["100", "--dataset", "finewebedu10B"]],
)
def test_wrong_usage_is_refused_at_once(arguments: list[str]):
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and "usage" in result.stderr and "Traceback" not in result.stderr


def test_a_folder_of_another_dataset_is_refused(site: Site):
    """fineweb100B has shards of the same names: they must not be taken for those of fineweb10B."""
    site.call(1)
    result = site.call(1, "--dataset", "fineweb100B", code=1)
    assert "holds shards of kjj0/fineweb10B-gpt2" in result.stderr and "--out" in result.stderr
    site.has(VAL, ONE)


# ---- a bad line ----


def test_goes_on_after_cut_connections(site: Site):
    """Catches a download that starts again or gives up: a closed connection, a reset one, 503 and a useless answer."""
    site.hub.faults["GET", ONE] = [Fault(cut_after=30_000), Fault(cut_after=30_000, reset=True), Fault(status=503)]
    site.hub.faults["GET", ONE] += [Fault(cut_after=0)] * 3 + [Fault(cut_after=30_000)]
    site.hub.faults["HEAD", VAL] = [Fault(status=500), Fault(cut_after=0), Fault(cut_after=0, reset=True)]
    result = site.call(1)
    site.has(VAL, ONE)
    starts = [request.start for request in site.hub.gets(ONE)]
    assert starts == [0, 30_000, *[60_000] * 5, 90_000]
    assert site.hub.sent == len(FILES[VAL]) + len(FILES[ONE]), "no byte was sent twice"
    assert "trying again in" in result.stderr and "HTTP 503" in result.stderr


def test_more_cuts_than_tries_are_no_matter_while_bytes_come(site: Site):
    """The tries are counted in a row without progress, else a long file on a bad line would never end."""
    site.hub.always["GET", ONE] = Fault(cut_after=8_000)
    site.call(1)
    site.has(VAL, ONE)
    assert len(site.hub.gets(ONE)) > 2 * script.TRIES


def test_backs_off_exponentially_and_gives_up(site: Site):
    site.hub.always["GET", ONE] = Fault(status=503)
    result = site.call(1, code=1, first_wait=0.05)
    site.has(VAL)
    times = [request.at for request in site.hub.gets(ONE)]
    assert len(times) == 6 == script.TRIES, "the docstring says six"
    waits = [b - a for a, b in itertools.pairwise(times)]
    for i, wait in enumerate(waits):
        assert 0.05 * 2**i <= wait < 0.05 * 2**i + 0.4
    assert "Gave up after 6 tries" in result.stderr and "HTTP 503" in result.stderr
    for way in ("try again", "HF_ENDPOINT=", "./run.sh nano"):
        assert way in result.stderr
    del site.hub.always["GET", ONE]
    site.call(1)
    assert len(site.hub.gets(VAL)) == 1, "what is complete is kept"


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"Retry-After": "1"}),
        (503, {"Retry-After": "1"}),
        (429, {"RateLimit": '"resolvers";r=0;t=1', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}),
        (429, {"Retry-After": "date"}),
    ],
)
def test_waits_as_long_as_the_server_asks(site: Site, status: int, headers: dict[str, str]):
    headers = {
        key: formatdate(time.time() + 3, usegmt=True) if value == "date" else value for key, value in headers.items()
    }
    method = "HEAD" if status == 503 else "GET"
    site.hub.faults[method, VAL] = [Fault(status=status, headers=headers)]
    result = site.call(0)
    site.has(VAL)
    kind = "hub" if method == "HEAD" else "cdn"
    first, second = [r.at for r in site.hub.requests if (r.method, r.kind) == (method, kind)]
    assert 0.9 < second - first < 4
    assert "as it asks" in result.stderr and f"HTTP {status}" in result.stderr


def test_a_server_without_ranges_gives_the_whole_file(site: Site):
    """Catches a whole file appended to the half that is there."""
    site.hub.faults["GET", ONE] = [Fault(cut_after=50_000), Fault(no_range=True)]
    site.call(1)
    site.has(VAL, ONE)
    assert [request.start for request in site.hub.gets(ONE)] == [0, 50_000]
    assert len(site.hub.gets(ONE)) == 2, "and not once more after a wrong hash"


# ---- wrong bytes ----


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_wrong_bytes_are_fetched_again(site: Site):
    """Right length, right header, one bit wrong: only the hash can tell."""
    site.hub.faults["GET", ONE] = [Fault(content=flipped(FILES[ONE], 70_000))] * 2
    result = site.call(1)
    site.has(VAL, ONE)
    assert result.stderr.count("wrong bytes") == 2


def test_wrong_bytes_again_and_again_are_an_error_with_both_hashes(site: Site):
    wrong = flipped(FILES[ONE], 70_000)
    site.hub.always["GET", ONE] = Fault(content=wrong)
    result = site.call(1, code=1)
    site.refused(ONE)
    assert len(site.hub.gets(ONE)) == 3
    assert (
        hashlib.sha256(wrong).hexdigest() in result.stderr and hashlib.sha256(FILES[ONE]).hexdigest() in result.stderr
    )
    assert not list(site.out.glob(".*.part")), "wrong bytes are removed"


@pytest.mark.parametrize("wrong", ["truncated", "longer"])
def test_a_file_of_another_length_than_promised_is_refused(site: Site, wrong: str):
    """HTTP itself sees nothing wrong here: Content-Length is that of what is sent."""
    content = FILES[ONE][:-500] if wrong == "truncated" else FILES[ONE] + bytes(40_000_000)
    site.hub.always["GET", ONE] = Fault(content=content)
    site.call(1, code=1)
    site.refused(ONE)
    assert site.hub.sent < 80_000_000, "what has no end must not fill the disk: three fetches, none to its end"
    del site.hub.always["GET", ONE]
    site.call(1)
    site.has(VAL, ONE)


@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_file_with_a_bad_header_gets_no_name_though_its_hash_is_right(tmp_path: Path, at: int):
    """The hub's own file is no shard: magic, version or count are wrong."""
    site = Site(tmp_path, files={VAL: flipped(FILES[VAL], at)})
    result = site.call(0, code=1)
    site.has()
    assert "no shard" in result.stderr and VAL in result.stderr
    assert len(site.hub.gets(VAL)) == 1, "it would be the same again"


# ---- what may be in the folder already ----


def test_touched_shards_are_hashed_again_without_network(site: Site):
    """Same bytes with another time are fine; other bytes of the same length are not."""
    site.call(1)
    asked = len(site.hub.requests)
    os.utime(site.out / ONE)
    assert "found" in site.call(1).stdout
    assert site.sidecar()[ONE]["mtime_ns"] == (site.out / ONE).stat().st_mtime_ns, "and not at every call"
    assert len(site.hub.requests) == asked
    (site.out / ONE).write_bytes(flipped(FILES[ONE], 60_000))
    result = site.call(1)
    site.has(VAL, ONE)
    assert "expected" in result.stderr and "fetching it again" in result.stderr


def test_a_sidecar_of_an_older_version_is_brought_up_to_date_without_network(site: Site):
    """It lacks what a run reads: catches a file believed, and its entry left as it is, for size and time alone."""
    site.call(1)
    wanted, asked = (site.out / "sha256.json").read_bytes(), len(site.hub.requests)
    old = {name: {k: v for k, v in entry.items() if k != "tokens"} for name, entry in site.sidecar().items()}
    (site.out / "sha256.json").write_text(json.dumps({"repo": REPO, "shards": old}))
    assert "found" in site.call(1).stdout
    assert (site.out / "sha256.json").read_bytes() == wanted and len(site.hub.requests) == asked


def test_copied_shards_are_compared_with_the_hub(site: Site):
    """Catches copies believed unseen, and right ones fetched again."""
    site.put(VAL, ONE, TWO)
    (site.out / ONE).write_bytes(flipped(FILES[ONE], 60_000))
    (site.out / TWO).write_bytes(FILES[TWO][:-2])
    site.call(2)
    site.has(VAL, ONE, TWO)
    assert [len(site.hub.gets(name)) for name in (VAL, ONE, TWO)] == [0, 1, 1]
    assert set(site.sidecar()) == {VAL, ONE, TWO}


def test_copied_shards_without_network_are_accepted_with_a_notice(site: Site):
    site.put(VAL, ONE)
    site.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    result = site.call(1)
    assert "found" in result.stdout and "notice: 2 shards are accepted" in result.stderr and "SHA-256" in result.stderr
    assert not (site.out / "sha256.json").exists(), "what was not compared must not be recorded as if it were"
    site.env["HF_ENDPOINT"] = site.hub.endpoint
    site.call(1)
    assert set(site.sidecar()) == {VAL, ONE}
    assert not site.hub.gets(VAL)


def test_a_copied_shard_that_is_cut_is_no_shard_without_network(site: Site):
    site.put(VAL)
    (site.out / VAL).write_bytes(FILES[VAL][:-2])
    site.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    result = site.call(0, code=1)
    assert f"{len(FILES[VAL]) - 2:,} bytes" in result.stderr and "Three ways out" in result.stderr


@pytest.mark.parametrize(
    "content", ["", "{", "[]", json.dumps({"repo": REPO}), json.dumps({"repo": REPO, "shards": {VAL: 3}}), "\0\xff"]
)
def test_a_damaged_sidecar_knows_nothing(site: Site, content: str):
    site.put(VAL)
    (site.out / "sha256.json").write_bytes(content.encode("latin-1"))
    site.call(0)
    assert site.sidecar()[VAL]["sha256"] == hashlib.sha256(FILES[VAL]).hexdigest()
    assert not site.hub.gets(VAL)


def read_only(command: str, folder: Path) -> list[str]:
    """The command with the folder mounted read-only: for root, which the tests may run as, modes mean nothing."""
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" && {command}'
    return ["unshare", "-rm", "sh", "-c", mount]


can_mount = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode


@pytest.mark.skipif(not can_mount, reason="needs user namespaces")
@pytest.mark.parametrize("recorded", [True, False])
def test_a_read_only_folder_that_is_complete_is_enough(site: Site, recorded: bool):
    if recorded:
        site.run(1)
    else:
        site.put(VAL, ONE)
    command = f'"{sys.executable}" "{SCRIPT}" {{}} --out "{site.out}"'
    result = subprocess.run(read_only(command.format(1), site.out), env=site.env, capture_output=True, text=True)
    assert result.returncode == 0 and "found" in result.stdout, result.stderr
    result = subprocess.run(read_only(command.format(2), site.out), env=site.env, capture_output=True, text=True)
    assert result.returncode == 1 and "cannot write into" in result.stderr and "Traceback" not in result.stderr


# ---- who is asked, and as whom ----


def test_the_token_goes_to_the_hub_only_and_is_not_printed(site: Site):
    """HF_TOKEN, and the login in HF_HOME. The CDN of another origin must not see it."""
    site.hub.token = "hf_secretsecret"
    site.env["HF_TOKEN"] = site.hub.token
    site.hub.faults["GET", VAL] = [Fault(cut_after=5), Fault(status=503)]
    site.hub.faults["HEAD", VAL] = [Fault(status=503)]
    result = site.run(0)
    site.has(VAL)
    assert {request.token for request in site.hub.requests if request.kind == "hub"} == {site.hub.token}
    assert {request.token for request in site.hub.requests if request.kind == "cdn"} == {None}
    del site.env["HF_TOKEN"]
    site.home.mkdir(exist_ok=True)
    (site.home / "token").write_text(site.hub.token)
    stderr = result.stderr + site.run(1).stderr
    site.has(VAL, ONE)
    assert site.hub.token not in result.stdout + stderr
    assert {request.kind for request in site.hub.requests} == {"hub", "cdn"}, "nothing but the files is asked for"


@pytest.mark.parametrize("token", [None, "hf_wrongwrong"])
def test_401_has_its_own_sentence(site: Site, token: str | None):
    site.hub.token = "hf_secretsecret"
    if token:
        site.env["HF_TOKEN"] = token
    result = site.call(0, code=1)
    assert "HTTP 401" in result.stderr and "HF_TOKEN" in result.stderr and REPO in result.stderr
    assert ("none is set" in result.stderr) == (token is None)
    assert "wrongwrong" not in result.stderr
    assert len(site.hub.requests) == 1, "trying again cannot help"


def test_404_has_its_own_sentence(site: Site):
    result = site.call(10, code=1)
    assert f"HTTP 404 for {REPO}/{TRAIN[9]}" in result.stderr and "no such file" in result.stderr
    assert [r.name for r in site.hub.requests].count(TRAIN[9]) == 1


def test_something_that_is_no_hub_is_refused(site: Site):
    """A captive portal or a plain file server: without a SHA-256 nothing can be verified."""
    site.hub.hashes[VAL] = "a1b2c3"
    result = site.call(0, code=1)
    assert "gave no size and SHA-256" in result.stderr
    site.has()


@pytest.mark.parametrize("kind", ["xet", "direct"])
def test_other_ways_to_be_served(site: Site, kind: str):
    """A file in Xet storage resumes like any other; a mirror may serve the file without a redirect."""
    setattr(site.hub, kind, True)
    site.hub.faults["GET", ONE] = [Fault(cut_after=40_000), Fault(content=flipped(FILES[ONE], 80_000))]
    site.call(1)
    site.has(VAL, ONE)
    kinds = {request.kind for request in site.hub.requests}
    assert kinds == ({"hub"} if kind == "direct" else {"hub", "cdn"})


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "https://nowhere.invalid", "nowhere.invalid"])
def test_no_network_is_one_message_at_once(site: Site, endpoint: str):
    site.env["HF_ENDPOINT"] = endpoint
    start = time.perf_counter()
    result = site.run(code=1, line="script.FIRST_WAIT = 1.0")  # as it is without the line
    assert time.perf_counter() - start < 8
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and endpoint in lines[0]
    assert "try again" in lines[2] and "HF_ENDPOINT=" in lines[3] and "./run.sh nano" in lines[4]


def test_offline_mode_is_said(site: Site):
    site.env["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE" in site.run(0, code=1).stderr
    assert not site.hub.requests


def test_a_network_that_goes_away_is_waited_for(site: Site):
    """A refused connection is final only before the hub was ever reached."""
    site.hub.faults["HEAD", VAL] = [Fault(status=503)]
    process = site.start(0, line="script.FIRST_WAIT = 0.6")
    until(lambda: site.hub.requests)
    port = site.hub.server_port
    site.hub.shutdown()
    site.hub.server_close()
    time.sleep(1.2)  # the second try finds no server, the third, after 1.8 s, does
    again = HubServer(REPO, FILES, port)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "refused" in stderr and "trying again" in stderr
    again.shutdown()
    again.server_close()


# ---- kills, full disks, others ----


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def kill_at_random_moments(site: Site, kills: int, seed: int) -> None:
    """Ten files at a rate that no such number of kills lets end; then one call without a kill."""
    site.hub.bytes_per_second = 20_000
    rng = random.Random(seed)
    for _ in range(kills):
        asked = len(site.hub.requests)
        process = site.start()
        until(lambda: len(site.hub.requests) > asked)  # noqa: B023
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the kill fell inside"
        for path in site.out.glob("*_*.bin"):
            if not path.name.startswith("."):
                assert path.read_bytes() == FILES[path.name], "half written under a final name"
        for found in [p.name for pattern in ("*_train_*.bin", "*_val_*.bin") for p in site.out.glob(pattern)]:
            assert not found.startswith("."), "a loader's glob would see it"
        if (site.out / "sha256.json").exists():
            site.sidecar()
    site.hub.bytes_per_second = None
    site.run()
    site.has(*FILES)
    starts = [request.start for name in FILES for request in site.hub.gets(name)]
    resumed, total = sum(start > 0 for start in starts), sum(map(len, FILES.values()))
    print(f"{kills} kills, {resumed} of {len(starts)} GETs resumed, {site.hub.sent:,} bytes sent of {total:,}")
    assert resumed >= kills
    # Sent again is what the buffers of four connections and files held at each kill.
    assert site.hub.sent < total + 4 * kills * 16_384
    assert [path.name for path in site.out.iterdir() if path.name.startswith(".")] == [".lock"]


def test_killed_downloads_go_on(site: Site):
    kill_at_random_moments(site, 4, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_moments(site: Site):
    kill_at_random_moments(site, 20, seed=2)


def test_kills_right_before_renames(site: Site):
    """Before a shard or the sidecar gets its name; each call finds what the one before it left."""
    hook = """
rename, calls = os.replace, []
def replace(*args):
    calls.append(args)
    if len(calls) == {}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.replace = replace
"""
    gets: dict[str, int] = {}
    for kill_at in (1, 2, 1, 3):
        site.run(2, line=hook.format(kill_at), code=-signal.SIGKILL)
        complete = [path.name for path in site.out.glob("*.bin") if not path.name.startswith(".")]
        site.has(*complete)
        for name in complete:
            assert len(site.hub.gets(name)) == gets.setdefault(name, len(site.hub.gets(name))), "fetched again"
        if (site.out / "sha256.json").exists():
            assert set(site.sidecar()) <= {VAL, ONE, TWO}
    site.run(2)
    site.has(VAL, ONE, TWO)
    assert set(site.sidecar()) == {VAL, ONE, TWO}
    assert all(len(site.hub.gets(name)) == count for name, count in gets.items()), "fetched again"
    assert [path.name for path in site.out.iterdir() if path.name.startswith(".")] == [".lock"]


def test_ctrl_c_ends_it_at_once_and_keeps_what_came(site: Site):
    site.hub.bytes_per_second = 30_000
    process = site.start(3)
    until(lambda: site.hub.sent > 100_000)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert time.perf_counter() - start < 3
    site.hub.bytes_per_second = None
    site.run(3)
    site.has(VAL, *TRAIN[:3])
    assert any(request.start for request in site.hub.gets(VAL))


def test_two_processes_share_a_folder(site: Site):
    """Catches two writers in one file; the second waits, then finds everything."""
    site.hub.bytes_per_second = 100_000
    processes = [site.start(2), site.start(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    site.has(VAL, ONE, TWO)
    assert sorted("found" in stdout for stdout, _ in results) == [False, True]
    assert sum("waiting for another process" in stderr for _, stderr in results) == 1
    assert [len(site.hub.gets(name)) for name in (VAL, ONE, TWO)] == [1, 1, 1]


def test_a_full_disk_is_said_before_the_first_byte(site: Site):
    """What is staged counts as there."""
    free = "import collections, shutil; shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')({})"
    total = len(FILES[VAL]) + len(FILES[ONE])
    result = site.run(1, line=free.format(total - 1), code=1)
    assert "make room" in result.stderr and "Three ways" not in result.stderr
    assert not site.hub.gets(VAL) and not site.hub.gets(ONE)
    site.out.mkdir(exist_ok=True)
    (site.out / f".{ONE}.part").write_bytes(FILES[ONE][:1000])
    site.run(1, line=free.format(total - 1000))
    site.has(VAL, ONE)
    assert site.hub.gets(ONE)[0].start == 1000


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_disk_that_fills_up_meanwhile_keeps_what_came(site: Site):
    limit = "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, 110_000))"
    result = site.run(1, line=limit, code=1)
    assert "was not written" in result.stderr and "What has come is kept" in result.stderr
    site.refused(ONE)
    site.run(1)
    site.has(VAL, ONE)
    assert site.hub.gets(ONE)[-1].start > 50_000


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_a_terminal_has_a_bar_for_all_and_one_per_file(site: Site):
    import fcntl
    import pty
    import termios

    site.hub.bytes_per_second = 100_000
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, str(SCRIPT), "1", "--out", str(site.out)]
    process = subprocess.Popen(command, env=site.env, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: EIO once the other end is closed
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert process.wait() == 0
    total = len(FILES[VAL]) + len(FILES[ONE])
    text = shown.decode()
    assert f"{VAL}: " in text and f"{ONE}: " in text and "B/s" in text
    last_line_of_all = [line for line in text.replace("\r", "\n").split("\n") if "all:" in line][-1]
    assert "100%" in last_line_of_all and f"{total / 1000:.0f}k/{total / 1000:.0f}k" in last_line_of_all


# ---- any damage ----


damage = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1100), st.integers(1, 255)),
    st.tuples(st.just("flip"), st.integers(0, 11), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 1100), st.just(0)),
    st.tuples(st.just("extend"), st.integers(1, 50), st.integers(0, 255)),
)
SMALL = shard(40)


def damaged(content: bytes, kind: str, amount: int, byte: int) -> bytes:
    match kind:
        case "cut":
            return content[: min(amount, len(content))]
        case "extend":
            return content + bytes([byte]) * amount
    at = amount % len(content)
    return content[:at] + bytes([content[at] ^ byte]) + content[at + 1 :]


@pytest.fixture(scope="module")
def in_process():
    """A hub of one small shard for calls of `provide` in this process, which are a hundred times quicker."""
    from huggingface_hub import constants

    hub = HubServer(REPO, {VAL: SMALL})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(script, "FIRST_WAIT", 0.0)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield hub
    hub.shutdown()
    hub.server_close()


def check_damage(hub: HubServer, folder: Path, how: tuple[str, int, int]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    wrong = damaged(SMALL, *how)
    magic, version, count = struct.unpack("<3i", wrong[:12].ljust(12, b"\0"))
    is_shard = len(wrong) >= 1024 and (magic, version, len(wrong)) == (20240520, 1, 1024 + 2 * count)

    # The line or the CDN damages it: the hub's hash is of the right file.
    hub.files, hub.hashes = {VAL: SMALL}, {VAL: hashlib.sha256(SMALL).hexdigest()}
    hub.always["GET", VAL] = Fault(content=wrong)
    if wrong == SMALL:
        script.provide(folder, [VAL], REPO)
    else:
        with pytest.raises(script.HubError):
            script.provide(folder, [VAL], REPO)
        assert not (folder / VAL).exists()
    hub.always.clear()
    script.provide(folder, [VAL], REPO)
    assert (folder / VAL).read_bytes() == SMALL

    # It is damaged on the disk: recorded, then as a copy that nobody recorded.
    for recorded in (True, False):
        (folder / VAL).write_bytes(wrong)
        if not recorded:
            (folder / "sha256.json").unlink()
        script.provide(folder, [VAL], REPO)
        assert (folder / VAL).read_bytes() == SMALL

    # The hub itself has it so: its hash is right, and only what is a shard gets a name.
    shutil.rmtree(folder)
    hub.files, hub.hashes = {VAL: wrong}, {VAL: hashlib.sha256(wrong).hexdigest()}
    if is_shard:
        script.provide(folder, [VAL], REPO)
        assert (folder / VAL).read_bytes() == wrong
    else:
        with pytest.raises(script.HubError):
            script.provide(folder, [VAL], REPO)
        assert not (folder / VAL).exists()


quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": True}


@settings(max_examples=40, **quiet)
@example(how=("flip", 8, 1))
@example(how=("cut", 0, 0))
@example(how=("cut", 1024, 0))
@example(how=("flip", 500, 7))
@given(how=damage)
def test_damage_is_refused_or_harmless(in_process: HubServer, tmp_path: Path, how: tuple[str, int, int]):
    check_damage(in_process, tmp_path / "out", how)


@pytest.mark.slow
@settings(max_examples=1000, **quiet)
@given(how=damage)
def test_a_thousand_damages_are_refused_or_harmless(in_process: HubServer, tmp_path: Path, how: tuple[str, int, int]):
    check_damage(in_process, tmp_path / "out", how)
