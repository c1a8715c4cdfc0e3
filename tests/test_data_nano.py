"""data/nano.py as a user starts it: on small made-up packages, and on the installed ones."""

import hashlib
import importlib.metadata
import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from conftest import REPO, kill_before_rename, run_process

import shards
from data import nano
from train_gpt import NANO

SCRIPT = Path(nano.__file__).resolve()
VAL, TRAIN = "nano_val_000000.bin", "nano_train_000001.bin"
TUNING_VAL, TUNING_TRAIN = "tuning_val_000000.bin", "tuning_train_000001.bin"
PINNED = {"sympy": "1.14.0", "networkx": "3.6.1"}


# The rule of the track, naively


def key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")


def long_lines(text: bytes) -> set[bytes]:
    return {line.strip() for line in text.split(b"\n") if len(line.strip()) >= 20}


def cut(text: bytes) -> list[bytes]:
    """Line by line: a piece takes lines for as long as they fit; a line longer than a piece is chopped."""
    found = [b""]
    for line in text.splitlines(keepends=True):
        for chunk in (line[i : i + 8192] for i in range(0, len(line), 8192)):
            if len(found[-1] + chunk) > 8192:
                found.append(b"")
            found[-1] += chunk
    return found


def in_order(files: dict[str, bytes]) -> list[bytes]:
    named = [(f"{name}:{i}", piece) for name, text in files.items() for i, piece in enumerate(cut(text))]
    return [piece for _, piece in sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())]


def rule(files: dict[str, bytes]) -> tuple[dict[str, list[bytes]], list[str]]:
    """Documents of all four shards from the text by name of every file, and the near copies that are left out."""
    files = {name: text for name, text in files.items() if name.endswith(".py") and text}
    val = {name: text for name, text in files.items() if key(name) % 20 == 0}
    of_validation = [long_lines(text) for text in val.values()]
    train, left_out = {}, []
    for name in sorted(files.keys() - val.keys()):
        lines = long_lines(files[name])
        if any(theirs and len(lines & theirs) / len(theirs) >= 0.5 for theirs in of_validation):
            left_out.append(name)
        else:
            train[name] = files[name]
    tuning_val = {name: text for name, text in train.items() if key(name) % 20 == 1}
    tuning_train = {name: text for name, text in train.items() if key(name) % 20 > 1}
    splits = {VAL: val, TRAIN: train, TUNING_VAL: tuning_val, TUNING_TRAIN: tuning_train}
    return {name: in_order(split) for name, split in splits.items()}, left_out


def plain_shard(documents: list[bytes]) -> bytes:
    """The shard format, token by token."""
    tokens = [token for text in documents for token in (256, *text)]
    return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def read_documents(shard: Path) -> list[bytes]:
    """Documents of a shard, split at the BOS token."""
    content = shard.read_bytes()
    magic, version, count = struct.unpack("<3i", content[:12])
    assert (magic, version) == (20240520, 1)
    assert len(content) == 1024 + 2 * count
    low, high = content[1024::2], content[1025::2]
    starts = [i for i, byte in enumerate(high) if byte]
    assert all(high[i] == 1 and low[i] == 0 for i in starts)
    return [low[a + 1 : b] for a, b in zip(starts, [*starts[1:], count], strict=True)]


# Made-up packages


def made_up_files() -> dict[str, bytes]:
    """What a site-packages folder holds of both packages: small files, and everything the rule has a word about."""
    rng = random.Random(0)
    line = lambda: b"    " * rng.randrange(3) + b"value_%d = compute(%d)" % (rng.randrange(10**6), rng.randrange(10**6))
    files = {}
    for package in PINNED:
        for i in range(60):
            lines = [line() for _ in range(rng.randrange(2, 30))] + [b"else:", b"# \xc3\xa9"] * rng.randrange(4)
            files[f"{package}/part{i % 3}/module_{i:02d}.py"] = b"\n".join(lines) + b"\n" * rng.randrange(2)
    files |= {"sympy/empty.py": b"", "sympy/data.txt": b"no source\n", "networkx/lib.so": b"\x7fELF"}
    files |= {f"{package}/__init__.py": b"raise SystemExit('it was imported')\n" for package in PINNED}

    long = b"\n".join(line() for _ in range(2000))
    files["sympy/long.py"] = long + b"\n" + b"y" * 20_000 + b"\n" + long[:3000]  # with a line longer than two pieces
    files["sympy/exact.py"] = b"z" * 8191 + b"\n"
    files["networkx/one_more.py"] = b"z" * 8191 + b"\n" + b"\n"
    files["networkx/without_line_ends.py"] = b"w" * 8193

    # Of `original`, in validation, one file holds half of the lines, one a line less, one only lines that are too
    # short. A validation file with no line that counts must not make a copy of every file.
    val, train = names("sympy/val_{}.py", lambda k: k % 20 == 0), names("networkx/copy_{}.py", lambda k: k % 20 > 1)
    original, counts_nothing = next(val), next(val)
    distinct = [b"the line of number %d of ten" % i for i in range(10)]
    short = [b"x = %d" % i for i in range(50)]
    files[original] = b"\n".join([*distinct, *distinct[:9], *short])
    files[counts_nothing] = b"\n".join([*short, b"the end"])
    files[next(train)] = b"\n".join([b"\t" + text + b"  " for text in distinct[5:]] + [b"and a line of its own"] * 50)
    files[next(train)] = b"\n".join([*distinct[:4], *distinct[:4], *short])
    files[next(train)] = b"\n".join(short)
    return files


def names(pattern: str, wanted: Callable[[int], bool]) -> Iterator[str]:
    """Names of this pattern whose key is wanted."""
    return (name for name in map(pattern.format, range(1000)) if wanted(key(name)))


FILES = made_up_files()
DOCUMENTS, LEFT_OUT = rule(FILES)
SHARDS = {name: plain_shard(documents) for name, documents in DOCUMENTS.items()}


class Site:
    """A site-packages folder with a sympy and a networkx that cannot be imported, only read."""

    def __init__(self, site: Path):
        self.site = site
        for name, text in FILES.items():
            self.write(name, text)
        for package in PINNED:
            self.set_version(package, "9.9")

    def write(self, name: str, text: bytes) -> None:
        (self.site / name).parent.mkdir(parents=True, exist_ok=True)
        (self.site / name).write_bytes(text)

    def set_version(self, package: str, version: str) -> None:
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        self.write(f"{package}-9.dist-info/METADATA", metadata.encode())

    def pin(self) -> None:
        for package, version in PINNED.items():
            self.set_version(package, version)

    def start(self, out: Path, *more: str) -> subprocess.Popen:
        """The script on these two packages and no other ones."""
        command = [sys.executable, str(SCRIPT), "--out", str(out), *more]
        pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(self.site)}
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def build(self, out: Path, *more: str, code: int = 0) -> str:
        """Output of the script, which has to end with this exit code."""
        process = self.start(out, *more)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stdout + stderr
        assert "Traceback" not in stderr
        return stdout + stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site packages")


def content(folder: Path) -> dict[str, bytes]:
    """All files but the sidecar and the lock, which stays and is empty."""
    paths = folder.iterdir() if folder.exists() else ()
    return {path.name: path.read_bytes() for path in paths if path.name not in (".lock", "nano.json")}


def holds(folder: Path, *wanted: str) -> bool:
    """Whether the folder has these shards, as the rule has them, and nothing else; without a diff of megabytes."""
    return content(folder) == {name: SHARDS[name] for name in wanted}


def test_the_made_up_packages_have_a_case_of_everything():
    """Guards the other tests: an oracle that is never asked the hard question proves nothing."""
    assert all(len(documents) >= 3 for documents in DOCUMENTS.values())
    assert len(LEFT_OUT) == 1 and LEFT_OUT[0].startswith("networkx/copy_")
    assert sum(name.startswith("networkx/copy_") for name in FILES) == 3
    assert len(cut(FILES["sympy/long.py"])) > 10 and 8192 in map(len, cut(FILES["sympy/long.py"]))
    assert [len(cut(FILES[f"{name}.py"])) for name in ("sympy/exact", "networkx/one_more")] == [1, 2]
    assert any(not long_lines(FILES[name]) and key(name) % 20 == 0 for name in FILES if FILES[name])


def test_shards_hold_the_sources_as_the_rule_says(site: Site, tmp_path: Path):
    """Catches a wrong split, cut, order, BOS, header or byte order, empty files let in, a near copy kept or lost."""
    output = site.build(tmp_path / "out")
    assert holds(tmp_path / "out", VAL, TRAIN)
    assert "notice" in output and "sympy 9.9 and networkx 9.9 are not comparable" in output
    assert "sympy==1.14.0 networkx==3.6.1" in output


def test_the_sidecar_describes_the_shards(site: Site, tmp_path: Path):
    """By it a run says what data it read: catches a hash, a count or a time of another file than the published one."""
    site.build(tmp_path / "out")
    sidecar = json.loads((tmp_path / "out" / "nano.json").read_text())
    assert (sidecar["bos"], sidecar["vocab_size"]) == (256, 257)
    assert (sidecar["packages"], sidecar["left_out"]) == ({"sympy": "9.9", "networkx": "9.9"}, LEFT_OUT)
    assert list(sidecar["shards"]) == [VAL, TRAIN]
    for name, entry in sidecar["shards"].items():
        assert entry == {
            "sha256": hashlib.sha256(SHARDS[name]).hexdigest(),
            "tokens": (len(SHARDS[name]) - 1024) // 2,
            "documents": len(DOCUMENTS[name]),
            "size": len(SHARDS[name]),
            "mtime_ns": (tmp_path / "out" / name).stat().st_mtime_ns,
        }


def test_tuning_never_sees_what_is_judged(site: Site, tmp_path: Path):
    """Catches: a validation document of the track in either shard, one of tuning in both, and a folder with both."""
    out = tmp_path / "out"
    site.build(out, "--tuning")
    assert holds(out, TUNING_VAL, TUNING_TRAIN)
    val, train = (set(read_documents(out / name)) for name in (TUNING_VAL, TUNING_TRAIN))
    judged = set(DOCUMENTS[VAL])
    assert [len(judged & val), len(judged & train), len(val & train)] == [0, 0, 0]
    assert val | train == set(DOCUMENTS[TRAIN])
    assert "found" in site.build(out, "--tuning")
    assert f"{out} holds {TUNING_TRAIN}, which a run would read as well" in site.build(out, code=1)


def test_files_outside_the_packages_do_not_count(site: Site, tmp_path: Path):
    site.write("networkx/__pycache__/module_00.cpython-311.pyc", b"generated\n")
    site.write("isympy.py", b"of the wheel, but not of the package\n")
    site.build(tmp_path / "out")
    assert holds(tmp_path / "out", VAL, TRAIN)


def test_second_call_does_nothing(site: Site, tmp_path: Path):
    out = tmp_path / "out"
    site.build(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    output = site.build(out)
    assert "found" in output and "wrote" not in output
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("damage", ["flipped byte", "truncated shard", "missing shard", "broken sidecar", "no sidecar"])
def test_damage_is_repaired(site: Site, tmp_path: Path, damage: str):
    """Catches a check by name, size or sidecar alone."""
    out = tmp_path / "out"
    site.build(out)
    match damage:
        case "flipped byte":
            flipped = bytearray(SHARDS[TRAIN])
            flipped[2000] ^= 1
            (out / TRAIN).write_bytes(flipped)
        case "truncated shard":
            (out / VAL).write_bytes(SHARDS[VAL][:-2])
        case "missing shard":
            (out / VAL).unlink()
        case "broken sidecar":
            (out / "nano.json").write_text('{"packages": {"sympy": "9.9"}, "shards": []}')
        case "no sidecar":
            (out / "nano.json").unlink()
    assert "wrote" in site.build(out)
    assert holds(out, VAL, TRAIN)


def test_another_version_is_noticed(site: Site, tmp_path: Path):
    """Catches shards of an old package kept after an upgrade of either one."""
    out = tmp_path / "out"
    site.build(out)
    for package in PINNED:
        site.set_version(package, "9.10")
        assert "wrote" in site.build(out)
        assert json.loads((out / "nano.json").read_text())["packages"][package] == "9.10"
    assert "found" in site.build(out)
    sidecar = json.loads((out / "nano.json").read_text())
    (out / "nano.json").write_text(json.dumps(sidecar | {"packages": PINNED}))
    site.pin()
    assert "is not the pinned one" in site.build(out, code=1), "as those of an earlier rule are"


def test_the_pinned_versions_with_other_sources_are_refused(site: Site, tmp_path: Path):
    """Sources edited, lost or added must not pass for the track's data; the message gives both hashes."""
    site.pin()
    output = site.build(tmp_path / "out", code=1)
    assert f"{VAL} made from sympy and networkx is not the pinned one" in output
    assert hashlib.sha256(SHARDS[VAL]).hexdigest() in output and nano.PINNED_SHA256[VAL] in output
    assert "pip install --force-reinstall --no-deps sympy==1.14.0 networkx==3.6.1" in output
    assert content(tmp_path / "out") == {}


def test_without_a_package_the_message_says_what_to_install(tmp_path: Path):
    """Of the two, it names the one which is missing."""
    site = tmp_path / "site"
    site.mkdir()
    for path in Path(numpy.__file__).parents[1].glob("numpy*"):
        (site / path.name).symlink_to(path)
    main = f"import sys; sys.path.append({str(SCRIPT.parent)!r}); import nano; nano.main()"
    command = [sys.executable, "-S", "-c", main, "--out", str(tmp_path / "out")]
    for missing in PINNED:
        result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
        assert result.returncode == 1
        assert f"{missing} is not installed for {sys.executable}" in result.stderr
        assert "pip install -r requirements.txt" in result.stderr
        (site / f"{missing}-9.dist-info").mkdir()
        (site / f"{missing}-9.dist-info/METADATA").write_text(f"Name: {missing}\nVersion: 9.9\n")


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_leaves_no_half_written_shard(site: Site, tmp_path: Path, kill_at: int):
    """SIGKILL right before the k-th file gets its name: only complete files have names, and the next call finishes."""
    site.write("sitecustomize.py", kill_before_rename(kill_at).encode())
    out = tmp_path / "out"
    site.build(out, code=-signal.SIGKILL)
    found = content(out)
    complete = {name: found[name] for name in found if not name.startswith(".")}
    assert complete == {name: SHARDS[name] for name in [VAL, TRAIN][: kill_at - 1]}
    leftovers = found.keys() - complete.keys()
    assert leftovers and not any(name.endswith(".bin") for name in leftovers), "the loader's glob must not see them"

    (site.site / "sitecustomize.py").unlink()
    assert "wrote" in site.build(out)
    assert holds(out, VAL, TRAIN), "leftovers are swept"


def test_of_two_at_once_one_writes(site: Site, tmp_path: Path):
    """Catches two writers in one folder, and one who waited and then writes what he should find."""
    out = tmp_path / "out"
    with shards.exclusive(out):
        processes = [site.start(out) for _ in range(2)]
        for process in processes:
            assert "waiting for another process" in process.stderr.readline()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output.split()[2] for output in outputs) == ["found", "wrote"]
    assert holds(out, VAL, TRAIN)


def test_a_folder_that_cannot_be_made_is_a_message(site: Site, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "error:" in site.build(tmp_path / "file" / "out", code=1)


# The installed packages


pinned_packages = pytest.mark.skipif(
    nano.installed_versions() != PINNED, reason="the pins are those of other versions of the packages"
)


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of the installed packages, and in it one with those of tuning."""
    out = tmp_path_factory.mktemp("nano")
    for options in (["--out", out], ["--out", out / "tuning", "--tuning"]):
        result = run_process([sys.executable, SCRIPT, *options], timeout=120)
        assert result.returncode == 0, result.stderr
        assert "notice" not in result.stdout
    return out


@pinned_packages
def test_the_installed_packages_give_the_pinned_shards(real_shards: Path):
    """The pins, and the numbers of files and bytes that define the track, against the installed files."""
    files = {}
    for package in PINNED:
        root = Path(importlib.metadata.distribution(package).locate_file(""))
        files |= {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / package).rglob("*.py")}
    files = {name: text for name, text in files.items() if text}
    assert sum(key(name) % 20 == 0 for name in files) == 98
    assert sum(key(name) % 20 != 0 for name in files) == 1910
    assert round(sum(map(len, files.values())) / 1e6, 1) == 32.6

    documents, left_out = rule(files)
    assert json.loads((real_shards / "nano.json").read_text())["left_out"] == left_out
    assert len(left_out) == 11
    for name in documents:
        path = (real_shards / "tuning" if name.startswith("tuning") else real_shards) / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == nano.PINNED_SHA256[name]
        assert read_documents(path) == documents[name]
    assert sum(len(text) + 1 for text in documents[VAL]) > NANO.data.val_tokens


@pinned_packages
def test_nano_reaches_its_target(real_shards: Path, tmp_path: Path):
    """A whole run. Catches: what no formula shows, a recipe that no longer learns."""
    words = ["--data-dir", real_shards, "--log-dir", tmp_path, "--sample-tokens", 0]
    done = run_process([sys.executable, REPO / "train_gpt.py", "nano", "--device", "cpu", *words])
    assert done.returncode == 0, done.stderr
    assert f"reached {NANO.target_loss}" in done.stdout, done.stdout
