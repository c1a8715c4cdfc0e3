"""data/nano.py as a user starts it: on small made-up torch packages, and on the installed one."""

import base64
import hashlib
import importlib.metadata
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, run_process

from data import nano

SCRIPT = Path(nano.__file__).resolve()
VAL, TRAIN = "nano_val_000000.bin", "nano_train_000001.bin"
SOURCES = {f"pkg{i % 3}/module_{i:02d}.py": f"x = {i}\n# é\n".encode() * (i + 1) for i in range(60)}


def is_val(name: str) -> bool:
    """SPEC section 8, from the raw digest."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 20 == 0


def is_tuning_val(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 20 == 1


def plain_shard(documents: list[bytes]) -> bytes:
    """The shard format of SPEC section 2, token by token."""
    tokens = [token for text in documents for token in (256, *text)]
    return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def read_documents(shard: Path) -> list[bytes]:
    """Documents of a shard, split at the BOS token."""
    return read_from(shard.read_bytes())


def read_from(content: bytes) -> list[bytes]:
    magic, version, count = struct.unpack("<3i", content[:12])
    assert (magic, version) == (20240520, 1)
    assert len(content) == 1024 + 2 * count
    low, high = content[1024::2], content[1025::2]
    starts = [i for i, byte in enumerate(high) if byte]
    assert all(high[i] == 1 and low[i] == 0 for i in starts)
    return [low[a + 1 : b] for a, b in zip(starts, [*starts[1:], count], strict=True)]


class FakeTorch:
    """A site-packages folder with a torch that cannot be imported, only read."""

    def __init__(
        self, site: Path, version: str = "9.9.0+cpu", sources: dict[str, bytes] = SOURCES, record: bool = True
    ):
        self.site, self.folder, self.info = site, site / "torch", site / "torch-9.9.0.dist-info"
        self.info.mkdir(parents=True)
        self.set_version(version)
        files = {**sources, "__init__.py": b"raise SystemExit('torch was imported')\n", "version.py": b"differs = 1\n"}
        files |= {"utils/version.py": b"the same everywhere\n", "empty.py": b"", "lib/libtorch.so": b"\x7fELF"}
        for name, text in files.items():
            self.write(name, text)
        if record:
            lines = ["torch-9.9.0.dist-info/METADATA,,", "functorch/__init__.py,sha256=abc,3", "../../bin/torchrun,,"]
            for name, text in reversed(files.items()):  # the order of a RECORD means nothing
                digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
                lines.append(f"torch/{name},sha256={digest},{len(text)}")
            (self.info / "RECORD").write_text("\n".join(lines) + "\n")
        kept = {k: v for k, v in files.items() if k.endswith(".py") and k not in ("version.py", "empty.py")}
        self.val = plain_shard([kept[name] for name in sorted(kept) if is_val(name)])
        self.train = plain_shard([kept[name] for name in sorted(kept) if not is_val(name)])

    def write(self, name: str, text: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(text)

    def set_version(self, version: str) -> None:
        (self.info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def build(self, out: Path, code: int = 0, *more: str) -> subprocess.CompletedProcess:
        """Runs the script on this torch, and on nothing else, and expects this exit code."""
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        command = [sys.executable, str(SCRIPT), "--out", str(out), *more]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture
def torch_tree(tmp_path: Path) -> FakeTorch:
    return FakeTorch(tmp_path / "site packages")


def names(folder: Path) -> list[str]:
    """All files but the lock, which stays and is empty."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def test_shards_hold_the_sources_as_the_spec_says(torch_tree: FakeTorch, tmp_path: Path):
    """Catches a wrong order, split, BOS, header or byte order, and empty files or version.py let in."""
    result = torch_tree.build(tmp_path / "out")
    assert (tmp_path / "out" / VAL).read_bytes() == torch_tree.val
    assert (tmp_path / "out" / TRAIN).read_bytes() == torch_tree.train
    assert len(torch_tree.val) > 1024 and len(torch_tree.train) > 1024, "the made-up tree must have both kinds"
    assert b"the same everywhere\n" in read_documents(tmp_path / "out" / TRAIN) + read_documents(tmp_path / "out" / VAL)
    assert names(tmp_path / "out") == ["nano.json", TRAIN, VAL]
    assert "notice" in result.stdout and "9.9.0" in result.stdout and "not comparable" in result.stdout


def test_tuning_never_sees_what_is_judged(torch_tree: FakeTorch, tmp_path: Path):
    """Catches: a validation document of the track in either shard, or one of tuning in both."""
    out = tmp_path / "out"
    torch_tree.build(out, 0, "--tuning")
    val, train = (read_documents(out / f"tuning_{name}.bin") for name in ("val_000000", "train_000001"))
    kept = [SOURCES[name] for name in sorted(SOURCES) if not is_val(name)]
    assert val == [SOURCES[name] for name in sorted(SOURCES) if is_tuning_val(name)] and val
    assert [text for text in kept if text not in val] == [text for text in train if text in SOURCES.values()]
    assert not set(read_from(torch_tree.val)) & {*val, *train}
    assert "found" in torch_tree.build(out, 0, "--tuning").stdout
    assert names(out) == ["nano.json", "tuning_train_000001.bin", "tuning_val_000000.bin"]


def test_windows_line_ends_give_the_same_shards(torch_tree: FakeTorch, tmp_path: Path):
    """The Windows wheel has \\r\\n in its sources; the track is the same everywhere."""
    for name, text in SOURCES.items():
        torch_tree.write(name, text.replace(b"\n", b"\r\n"))
    torch_tree.build(tmp_path / "out")
    assert (tmp_path / "out" / VAL).read_bytes() == torch_tree.val
    assert (tmp_path / "out" / TRAIN).read_bytes() == torch_tree.train


def test_files_outside_the_wheel_do_not_count(torch_tree: FakeTorch, tmp_path: Path):
    torch_tree.write("stray.py", b"print('dropped in by a user')\n")
    torch_tree.write("pkg0/__pycache__/module_00.cpython-311.py", b"generated\n")
    torch_tree.build(tmp_path / "out")
    assert (tmp_path / "out" / TRAIN).read_bytes() == torch_tree.train
    assert (tmp_path / "out" / VAL).read_bytes() == torch_tree.val


def test_without_record_the_folder_is_walked(tmp_path: Path):
    torch_tree = FakeTorch(tmp_path / "site", record=False)
    torch_tree.build(tmp_path / "out")
    assert (tmp_path / "out" / TRAIN).read_bytes() == torch_tree.train
    assert (tmp_path / "out" / VAL).read_bytes() == torch_tree.val


def test_second_call_does_nothing(torch_tree: FakeTorch, tmp_path: Path):
    out = tmp_path / "out"
    torch_tree.build(out)
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    result = torch_tree.build(out)
    assert "found" in result.stdout and "wrote" not in result.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in names(out)} == before


@pytest.mark.parametrize("damage", ["flipped byte", "truncated shard", "missing shard", "broken sidecar", "no sidecar"])
def test_damage_is_repaired(torch_tree: FakeTorch, tmp_path: Path, damage: str):
    """Catches a check by name, size or sidecar alone."""
    out = tmp_path / "out"
    torch_tree.build(out)
    match damage:
        case "flipped byte":
            content = bytearray((out / TRAIN).read_bytes())
            content[2000] ^= 1
            (out / TRAIN).write_bytes(content)
        case "truncated shard":
            (out / VAL).write_bytes(torch_tree.val[:-2])
        case "missing shard":
            (out / VAL).unlink()
        case "broken sidecar":
            (out / "nano.json").write_text('{"torch": "9.9.0", "shards": []}')
        case "no sidecar":
            (out / "nano.json").unlink()
    assert "wrote" in torch_tree.build(out).stdout
    assert (out / TRAIN).read_bytes() == torch_tree.train and (out / VAL).read_bytes() == torch_tree.val


def test_another_torch_version_is_noticed(torch_tree: FakeTorch, tmp_path: Path):
    """Catches shards of an old torch kept after an upgrade; another build of the same version is not an upgrade."""
    torch_tree.build(tmp_path / "out")
    torch_tree.set_version("9.9.0+cu130")
    assert "found" in torch_tree.build(tmp_path / "out").stdout
    torch_tree.set_version("9.10.0")
    torch_tree.write("pkg0/module_00.py", b"x = 'new'\n")
    assert "wrote" in torch_tree.build(tmp_path / "out").stdout
    assert (tmp_path / "out" / TRAIN).read_bytes() != torch_tree.train
    assert json.loads((tmp_path / "out" / "nano.json").read_text())["torch"] == "9.10.0"


def test_the_pinned_version_with_other_sources_is_refused(torch_tree: FakeTorch, tmp_path: Path):
    """A 2.13.0 whose files were edited must not pass for the track's data; the message says which, with both hashes."""
    torch_tree.set_version("2.13.0+cpu")
    edited, untouched = [name for name in SOURCES if not is_val(name)][:2]
    torch_tree.write(edited, b"edited = True\n")
    result = torch_tree.build(tmp_path / "out", code=1)
    assert VAL in result.stderr
    assert hashlib.sha256(torch_tree.val).hexdigest() in result.stderr, "found"
    assert nano.PINNED_SHA256[VAL] in result.stderr, "expected"
    assert f"torch/{edited}" in result.stderr and untouched not in result.stderr
    assert names(tmp_path / "out") == []


def test_a_missing_source_file_is_refused(torch_tree: FakeTorch, tmp_path: Path):
    (torch_tree.folder / "pkg1/module_07.py").unlink()
    assert "module_07.py belongs to the torch wheel but is gone" in torch_tree.build(tmp_path / "out", code=1).stderr
    assert names(tmp_path / "out") == []


def test_without_torch_the_message_says_what_to_install(tmp_path: Path):
    command = [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path.append({str(SCRIPT.parent)!r}); import nano; nano.main()",
    ]
    numpy_only = tmp_path / "site"
    numpy_only.mkdir()
    import numpy

    for path in Path(numpy.__file__).parents[1].glob("numpy*"):
        (numpy_only / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": str(numpy_only)}
    result = subprocess.run([*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "torch is not installed" in result.stderr and "pip install" in result.stderr


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_leaves_no_half_written_shard(torch_tree: FakeTorch, tmp_path: Path, kill_at: int):
    """SIGKILL right before the k-th file gets its name: only complete files have names, and the next call finishes."""
    hook = f"""
import os, signal
rename, calls = os.replace, 0
def replace(*args):
    global calls
    calls += 1
    if calls == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.replace = replace
"""
    (torch_tree.site / "sitecustomize.py").write_text(hook)
    out = tmp_path / "out"
    torch_tree.build(out, code=-signal.SIGKILL)
    complete = [name for name in names(out) if not name.startswith(".")]
    assert sorted(complete) == sorted([VAL, TRAIN][: kill_at - 1])
    assert all((out / name).read_bytes() == {VAL: torch_tree.val, TRAIN: torch_tree.train}[name] for name in complete)
    leftovers = [name for name in names(out) if name.startswith(".")]
    assert leftovers and not any(name.endswith(".bin") for name in leftovers), "the loader's glob must not see them"

    (torch_tree.site / "sitecustomize.py").unlink()
    assert "wrote" in torch_tree.build(out).stdout
    assert names(out) == ["nano.json", TRAIN, VAL], "leftovers are swept"


def test_a_folder_that_cannot_be_made_is_a_message(torch_tree: FakeTorch, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "error:" in torch_tree.build(tmp_path / "file" / "out", code=1).stderr


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the installed torch."""
    out = tmp_path_factory.mktemp("nano")
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout, f"{time.perf_counter() - start:.1f} s")
    return out


@pytest.mark.skipif(nano.torch_version() != nano.PINNED_TORCH, reason="the pins are those of another torch version")
def test_the_installed_torch_gives_the_pinned_shards(real_shards: Path):
    """The pins, the sizes that SPEC section 8 gives, and the split, against the files of the installed torch."""
    root = Path(importlib.metadata.distribution("torch").locate_file("torch"))
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    texts = {path: (root / path).read_bytes() for path in paths if path != "version.py"}
    for name, split, size in ((VAL, True, 1.6e6), (TRAIN, False, 45e6)):
        documents = [text for path, text in texts.items() if text and is_val(path) == split]
        assert read_documents(real_shards / name) == documents
        assert abs(sum(map(len, documents)) / size - 1) < 0.03
        assert hashlib.sha256((real_shards / name).read_bytes()).hexdigest() == nano.PINNED_SHA256[name]


@pytest.mark.skipif(nano.torch_version() != nano.PINNED_TORCH, reason="the target is that of other shards")
def test_nano_reaches_its_target(real_shards: Path, tmp_path: Path):
    """A whole run, judged on an eighth of the bytes. Catches: what no formula shows, a recipe that no longer learns."""
    words = ["--data-dir", real_shards, "--log-dir", tmp_path, "--data.val-tokens", 65536, "--sample-tokens", 0]
    done = run_process([sys.executable, REPO / "train_gpt.py", "nano", "--device", "cpu", *words])
    assert done.returncode == 0, done.stderr
    assert "reached 1.22" in done.stdout, done.stdout
