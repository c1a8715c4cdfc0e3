"""data/cached_fineweb10B.py as a user starts it, against a hub on 127.0.0.1 that fails on demand."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tiktoken
from conftest import run_process, tiny_options, write_shard
from hub_server import Fault, HubServer

import cached_fineweb10B as script
import train_gpt

SCRIPT = Path(script.__file__).resolve()
REPO = "kjj0/fineweb10B-gpt2"
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(1, 104)]
ONE, TWO = TRAIN[:2]
# Starts the script with a line of its own before.
START = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import cached_fineweb10B as script
script.TOKEN_BYTES_SHA256 = {{!r}}
{{}}
script.main()
"""


def shard(num_tokens: int, seed: int = 0) -> bytes:
    """A shard file with random tokens: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens."""
    header = struct.pack("<256i", 20240520, 1, num_tokens, *[0] * 253)
    return header + random.Random(seed).randbytes(2 * num_tokens)


def vocabulary() -> tuple[bytes, list[bytes]]:
    """An invented vocab.json of GPT-2's size and format, and the bytes of its tokens, of the last, BOS, none.

    In the file a byte has the character that Latin-1 has for it where that can be seen, the others those from 256 on.
    """
    seen = [chr(i).isprintable() and not chr(i).isspace() for i in range(256)]
    printed = [chr(i) if seen[i] else chr(256 + seen[:i].count(False)) for i in range(256)]
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(200) for j in range(250)]
    vocab = {"".join(printed[byte] for byte in token): i for i, token in enumerate(tokens)} | {"<|endoftext|>": 50256}
    shuffled = random.Random(0).sample(sorted(vocab.items()), len(vocab))
    return json.dumps(dict(shuffled)).encode(), [*tokens, b""]


VOCABULARY, SPELLED = vocabulary()
NUMBERS = [*map(len, SPELLED), *b"".join(SPELLED)]
TOKEN_BYTES = struct.pack(f"<256i{len(NUMBERS)}H", 20240520, 1, len(NUMBERS), *[0] * 253, *NUMBERS)
TOKEN_BYTES_SHA256 = hashlib.sha256(TOKEN_BYTES).hexdigest()
FILES = {name: shard(50_000 + 10_000 * i, seed=i) for i, name in enumerate([VAL, *TRAIN[:9]])}


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Site:
    """A folder for shards and the hub that they come from."""

    def __init__(self, folder: Path, repo: str = REPO, files: dict[str, bytes] = FILES):
        self.folder, self.out = folder, folder / "out"
        self.hub = HubServer(repo, files, VOCABULARY)
        drop = ("hf_", "hugging", "http_", "https_", "all_", "no_")
        self.env = {k: v for k, v in os.environ.items() if not k.lower().startswith(drop)}
        self.env |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(folder / "home")}

    def start(self, *args: object, line: str = "") -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            START.format(TOKEN_BYTES_SHA256, line),
            *map(str, args),
            "--out",
            str(self.out),
        ]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def run(self, *args: object, code: int = 0, line: str = "") -> Result:
        """Runs the script in a process of its own and expects this exit code."""
        process = self.start(*args, line=line)
        stdout, stderr = process.communicate(timeout=60)
        return self.checked(Result(process.returncode, stdout, stderr), code)

    def call(self, *args: object, code: int = 0) -> Result:
        """The same in this process, which is ten times quicker."""
        from huggingface_hub import constants

        result, stdout, stderr = 0, io.StringIO(), io.StringIO()
        endpoint = self.env["HF_ENDPOINT"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "TOKEN_BYTES_SHA256", TOKEN_BYTES_SHA256)
            patch.setattr(constants, "HF_HUB_CACHE", self.env["HF_HOME"])
            patch.setattr(constants, "ENDPOINT", endpoint)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setenv("HF_ENDPOINT", endpoint)
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

    def named(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("fineweb*.bin"))

    def has(self, *names: str) -> None:
        """Exactly these files have final names, bit-identical with the hub's."""
        assert self.named() == sorted(names)
        for name in names:
            assert (self.out / name).read_bytes() == FILES[name], name

    def sidecar(self) -> dict:
        return json.loads((self.out / "sha256.json").read_text())["shards"]

    def put(self, *names: str) -> None:
        """Copies files into the folder, as from elsewhere."""
        self.out.mkdir(exist_ok=True)
        for name in names:
            (self.out / name).write_bytes(FILES[name])


@pytest.fixture
def site(tmp_path: Path):
    site = Site(tmp_path)
    yield site
    site.hub.close()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# ---- what is fetched ----


def test_fetches_the_validation_shard_then_nine(site: Site):
    """Catches a wrong default, names, order or place; the second call must not use the network at all."""
    result = site.run()
    site.has(VAL, *TRAIN[:9])
    assert "fetched 10; the validation shard and 9 train shards are in" in result.stdout
    assert site.sidecar()[ONE] == {
        "sha256": hashlib.sha256(FILES[ONE]).hexdigest(),
        "tokens": 60_000,
        "size": 121_024,
        "mtime_ns": (site.out / ONE).stat().st_mtime_ns,
    }
    whole = json.loads((site.out / "sha256.json").read_text())
    assert [whole[key] for key in ("dataset", "repo", "bos", "vocab_size")] == ["fineweb10B", REPO, 50256, 50257]
    assert list(whole["shards"]) == sorted(FILES)

    asked = len(site.hub.requests)
    site.hub.close()
    assert "found the validation shard and 9 train shards" in site.run().stdout
    assert "found the validation shard and 3 train shards" in site.run(3).stdout
    assert len(site.hub.requests) == asked
    assert {path.name for path in site.out.iterdir()} == {".lock", "sha256.json", "tokens.bin", *FILES}


def test_the_other_datasets(tmp_path: Path):
    """Catches a wrong repo, prefix or number of shards of a dataset."""
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)]
    site = Site(tmp_path, "kjj0/finewebedu10B-gpt2", dict.fromkeys(names, shard(10)))
    site.call(99, "--dataset", "finewebedu10B")
    assert site.named() == sorted(names)
    assert script.DATASETS["fineweb10B"].shard_names(103) == [VAL, *TRAIN]
    assert script.DATASETS["fineweb100B"].shard_names(1030)[::1030] == [VAL, "fineweb_train_001030.bin"]
    assert [script.DATASETS[name].num_train for name in ("fineweb10B", "fineweb100B")] == [103, 1030]
    site.hub.close()


def test_the_script_itself_writes_beside_itself(site: Site):
    """As run.sh calls it; train_gpt.py looks for the shards in data/fineweb10B."""
    data = site.folder / "data"
    data.mkdir()
    for name in ("cached_fineweb10B.py", "shards.py"):
        source = SCRIPT.with_name(name).read_text().replace(script.TOKEN_BYTES_SHA256, TOKEN_BYTES_SHA256)
        (data / name).write_text(source)
    command = [sys.executable, "data/cached_fineweb10B.py", "1"]
    subprocess.run(command, env=site.env, cwd=site.folder, check=True, capture_output=True, timeout=60)
    site.out = data / "fineweb10B"
    site.has(VAL, ONE)

    command = [sys.executable, "-X", "importtime", *command[1:]]
    result = subprocess.run(command, env=site.env, cwd=site.folder, check=True, capture_output=True, text=True)
    for slow in ("huggingface_hub", "tqdm", "numpy", "filelock", "httpx2"):
        assert f" {slow}\n" not in result.stderr, "a call that finds everything must not import it"


@pytest.mark.parametrize(
    "arguments",
    [["104"], ["-1"], ["x"], ["--dataset", "nothing"], ["100", "--dataset", "finewebedu10B"]],
)
def test_wrong_usage_is_refused_at_once(arguments: list[str], monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "usage" in capsys.readouterr().err


def test_a_folder_of_another_dataset_is_refused(site: Site):
    """fineweb100B has shards of the same names: they must not be taken for those of fineweb10B."""
    site.call(1)
    result = site.call(1, "--dataset", "fineweb100B", code=1)
    assert "holds shards of kjj0/fineweb10B-gpt2" in result.stderr and "--out" in result.stderr
    site.has(VAL, ONE)


# ---- how tokens are spelled ----


def test_tokens_bin_comes_to_shards_that_are_there(site: Site):
    """Fetched by a former version, say, or damaged; no shard is fetched again, and once it is there no one is asked."""
    site.call(1)
    path, gets = site.out / "tokens.bin", site.hub.gets(ONE)
    assert path.read_bytes() == TOKEN_BYTES and train_gpt.read_token_bytes(site.out, 50257) == SPELLED
    for damage in (path.unlink, lambda: path.write_bytes(TOKEN_BYTES[:-2]), lambda: path.write_bytes(b"")):
        damage()
        assert "found" in site.call(1).stdout
        assert path.read_bytes() == TOKEN_BYTES
    asked = len(site.hub.requests)
    site.call(1)
    assert len(site.hub.requests) == asked and site.hub.gets(ONE) == gets


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY.replace(b'"!a"', b'"!!a"'), b"{}", b"<html>"])
def test_without_a_vocabulary_there_are_shards_to_train_on(site: Site, vocabulary: bytes | None, monkeypatch):
    """`./run.sh small --no-prefix-loss` has to get to its run: catches an exit code, and tokens of other bytes."""
    site.hub.vocabulary = vocabulary
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    result = site.call(1)
    site.has(VAL, ONE)
    assert not (site.out / "tokens.bin").exists()
    for said in (f"notice: no {site.out / 'tokens.bin'}", "--no-prefix-loss", "by_hub: ", "by_tiktoken: "):
        assert said in result.stderr

    encoding = SimpleNamespace(decode_single_token_bytes=SPELLED.__getitem__)
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding={"gpt2": encoding}.get))
    assert "notice" not in site.call(1).stderr
    assert (site.out / "tokens.bin").read_bytes() == TOKEN_BYTES


def test_complete_shards_without_network(site: Site):
    """As on a node of a cluster: a notice soon, and the run can begin."""
    site.call(1)
    (site.out / "tokens.bin").unlink()
    shutil.rmtree(site.env["HF_HOME"])
    site.env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    start = time.perf_counter()
    result = site.run(1)
    assert "found" in result.stdout and "--no-prefix-loss" in result.stderr
    assert time.perf_counter() - start < 8


def test_the_digest_is_that_of_gpt2(tmp_path: Path):
    """By tiktoken, which verifies GPT-2's files itself."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"needs network or the cache of tiktoken: {error}")
    spelled = [*map(gpt2.decode_single_token_bytes, range(50256)), b""]
    numbers = np.array([*map(len, spelled), *b"".join(spelled)])
    path = write_shard(tmp_path / "tokens.bin", numbers)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == script.TOKEN_BYTES_SHA256


def test_small_trains_on_it(tmp_path: Path):
    """A tiny `small`, with GPT-2's vocabulary and BOS, and its prediction of prefixes."""
    rng = random.Random(0)
    tokens = [50256 if i % 30 == 0 else rng.randrange(50256) for i in range(20_000)]
    content = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)
    site = Site(tmp_path, files={VAL: content, ONE: content})
    site.call(1)
    options = ["--data-dir", site.out, "--log-dir", site.folder / "logs", "--device", "cpu", "--sample-tokens", "0"]
    command = [sys.executable, Path(train_gpt.__file__), "small", *tiny_options(), *options]
    result = run_process([*command, "--max-steps", "3", "--no-warmup"])
    assert result.returncode == 0, result.stderr
    (site.out / "tokens.bin").unlink()
    result = run_process([*command, "--max-steps", "1", "--no-warmup"])
    assert result.returncode == 1 and "tokens.bin is missing" in result.stderr, "it was read"
    site.hub.close()


# ---- a bad line ----


def test_goes_on_after_cut_connections_and_a_busy_hub(site: Site):
    """Catches a file given up after one failure: the client of the hub has to try again, and to go on where it was."""
    site.hub.faults[ONE] = [Fault(status=429), Fault(cut_after=0)]
    site.hub.faults[VAL] = [Fault(cut_after=30_000)]
    site.call(1)
    site.has(VAL, ONE)
    assert not site.hub.faults[ONE] and not site.hub.faults[VAL], "all were met"


@pytest.mark.parametrize("content", ["flipped", "cut", "longer"])
def test_wrong_bytes_are_an_error(site: Site, content: str):
    """Catches one bit wrong under a right length and header, an endless loop, and shards lost that were right."""
    right = FILES[ONE]
    wrong = {"flipped": flipped(right, 70_000), "cut": right[:-500], "longer": right + bytes(500)}[content]
    site.hub.always[ONE] = Fault(content=wrong)
    result = site.call(1, code=1)
    site.has(VAL)
    assert content != "flipped" or all(hashlib.sha256(c).hexdigest() in result.stderr for c in (wrong, right))
    for way in ("try again", "HF_ENDPOINT=", "./run.sh nano"):
        assert way in result.stderr
    del site.hub.always[ONE]
    site.call(1)
    site.has(VAL, ONE)
    assert site.hub.gets(VAL) == 1, "what is complete is kept"


@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_file_with_a_bad_header_gets_no_name_though_its_hash_is_right(tmp_path: Path, at: int):
    """The hub's own file is no shard: magic, version or count are wrong."""
    site = Site(tmp_path, files={VAL: flipped(FILES[VAL], at)})
    result = site.call(0, code=1)
    site.has()
    assert VAL in result.stderr and re.search("starts with magic|but its header of", result.stderr)
    assert site.hub.gets(VAL) == 1, "it would be the same again"
    site.hub.close()


def test_what_the_hub_lacks_is_said_at_once(site: Site):
    result = site.call(10, code=1)
    assert f"it has no file {TRAIN[9]}" in result.stderr and REPO in result.stderr
    assert site.named() == []


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "https://nowhere.invalid", "nowhere.invalid"])
def test_no_network_is_one_message_at_once(site: Site, endpoint: str):
    site.env["HF_ENDPOINT"] = endpoint
    start = time.perf_counter()
    result = site.run(code=1)
    assert time.perf_counter() - start < 8
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and endpoint in lines[0]
    assert "try again" in lines[2] and "HF_ENDPOINT=" in lines[3] and "./run.sh nano" in lines[4]


def test_offline_mode_is_said(site: Site):
    site.env["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE" in site.run(0, code=1).stderr
    assert not site.hub.requests


# ---- what may be in the folder already ----


def test_touched_shards_are_compared_again(site: Site):
    """Same bytes with another time are fine; other bytes of the same length are not."""
    site.call(1)
    gets = site.hub.gets(ONE)
    os.utime(site.out / ONE)
    assert "found" in site.call(1).stdout
    assert site.sidecar()[ONE]["mtime_ns"] == (site.out / ONE).stat().st_mtime_ns, "and not at every call"
    assert site.hub.gets(ONE) == gets
    (site.out / ONE).write_bytes(flipped(FILES[ONE], 60_000))
    assert f"{site.out / ONE} is not the hub's: fetching it again" in site.call(1).stderr
    site.has(VAL, ONE)


def test_copied_shards_are_compared_with_the_hub(site: Site):
    """Catches copies believed unseen, and right ones fetched again."""
    site.put(VAL, ONE, TWO)
    (site.out / ONE).write_bytes(flipped(FILES[ONE], 60_000))
    (site.out / TWO).write_bytes(FILES[TWO][:-2])
    site.call(2)
    site.has(VAL, ONE, TWO)
    assert [site.hub.gets(name) for name in (VAL, ONE, TWO)] == [0, 1, 1]
    assert set(site.sidecar()) == {VAL, ONE, TWO}


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"repo": REPO}), "\0\xff"])
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
def test_a_read_only_folder_that_is_complete_is_enough(site: Site):
    site.call(1)
    command = f'"{sys.executable}" "{SCRIPT}" {{}} --out "{site.out}"'
    result = subprocess.run(read_only(command.format(1), site.out), env=site.env, capture_output=True, text=True)
    assert result.returncode == 0 and "found" in result.stdout, result.stderr
    result = subprocess.run(read_only(command.format(2), site.out), env=site.env, capture_output=True, text=True)
    assert result.returncode == 1 and "cannot write into" in result.stderr and "Traceback" not in result.stderr
    (site.out / "tokens.bin").unlink()
    result = subprocess.run(read_only(command.format(1), site.out), env=site.env, capture_output=True, text=True)
    assert result.returncode == 0 and "found" in result.stdout and "--no-prefix-loss" in result.stderr, result.stderr


# ---- kills, full disks, others ----


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def test_killed_downloads_go_on_shard_by_shard(site: Site):
    """Catches half a file under a final name, one that is complete fetched again, and a staging folder that grows."""
    site.hub.bytes_per_second = 200_000
    rng = random.Random(1)
    for _ in range(4):
        asked = len(site.hub.requests)
        process = site.start()
        until(lambda: len(site.hub.requests) > asked + 4)  # noqa: B023
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the kill fell inside"
        site.has(*site.named())
        left = [path for path in (site.out / ".download").rglob("*") if path.suffix in (".incomplete", ".bin")]
        assert len(left) <= script.IN_FLIGHT
    complete = {name: site.hub.gets(name) for name in site.named()}
    assert complete, "some were through"
    site.hub.bytes_per_second = None
    site.run()
    site.has(*FILES)
    assert {name: site.hub.gets(name) for name in complete} == complete, "fetched again"
    assert {path.name for path in site.out.iterdir()} == {".lock", "sha256.json", "tokens.bin", *FILES}


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_kills_right_before_shards_get_their_names(site: Site, kill_at: int):
    """Or the sidecar its own: catches an entry for what is not there, and a name for what was not verified."""
    hook = f"""
rename, calls = os.replace, []
def replace(source, target):
    calls.append(str(target).startswith({str(site.out)!r}) and ".download" not in str(target))
    if sum(calls) == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
"""
    site.run(2, line=hook, code=-signal.SIGKILL)
    site.has(*site.named())
    if (site.out / "sha256.json").exists():
        assert set(site.sidecar()) <= set(site.named())
    site.run(2)
    site.has(VAL, ONE, TWO)
    assert set(site.sidecar()) == {VAL, ONE, TWO}


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


def test_two_processes_share_a_folder(site: Site):
    """Catches two writers in one file; the second waits, then finds everything."""
    site.hub.bytes_per_second = 100_000
    processes = [site.start(2), site.start(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    site.has(VAL, ONE, TWO)
    assert sorted("found" in stdout for stdout, _ in results) == [False, True]
    # Both may wait, the one for the shards, the other then for tokens.bin.
    assert any("waiting for another process" in stderr for _, stderr in results)
    assert [site.hub.gets(name) for name in (VAL, ONE, TWO)] == [1, 1, 1]


def test_a_full_disk_is_said_before_the_first_byte(site: Site):
    free = "import collections, shutil; shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')({})"
    total = len(FILES[VAL]) + len(FILES[ONE])
    result = site.run(1, line=free.format(total - 1), code=1)
    assert "make room" in result.stderr and "Three ways" not in result.stderr
    assert not site.hub.gets(VAL) and not site.hub.gets(ONE)


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_disk_that_fills_up_meanwhile_keeps_what_is_complete(site: Site):
    limit = "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, 110_000))"
    result = site.run(1, line=limit, code=1)
    assert "File too large" in result.stderr and "Three ways" not in result.stderr
    site.has(VAL)
    assert site.hub.gets(ONE) == 1, "again would not help"
    site.run(1)
    site.has(VAL, ONE)
