"""data/shards.py: the shard format, on which train_gpt.py has to agree, and files that are whole or not there."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import write_shard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import shards
import train_gpt
from shards import ShardError

FOLDER = Path(shards.__file__).resolve().parent
WHOLE = struct.pack("<256i", 20240520, 1, 40, *[0] * 253) + bytes(80)


def python(code: str, *args: object, stderr: int = subprocess.PIPE) -> subprocess.Popen:
    """A process that runs this code with `shards` imported and `path` the first argument."""
    start = f"import os, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(FOLDER)!r})\n"
    start += "import shards\npath = Path(sys.argv[1])\n"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, args)], stdin=pipe, stdout=pipe, stderr=stderr, text=True
    )


# ---- the header ----


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


int32 = st.integers(-(2**31), 2**31 - 1)
# Headers that are nearly right: each of the three fields is so or is any int32, and the length fits or nearly does.
nearly = st.builds(
    lambda magic, version, count, extra: (
        (ints(magic, version, count).ljust(1024, b"\0") + bytes(max(2 * count, 0)))[
            : 1024 + 2 * count + extra if extra < 0 else None
        ]
        + bytes(max(extra, 0))
    ),
    st.just(20240520) | int32,
    st.just(1) | int32,
    st.integers(0, 60),
    st.sampled_from([0, 0, 0, 1, -1, 2, -2, 2048]),
)
damaged = st.builds(
    lambda flips, end, tail: (
        bytes(byte ^ dict(flips).get(i, 0) for i, byte in enumerate(WHOLE))[: len(WHOLE) - end] + tail
    ),
    st.lists(st.tuples(st.integers(0, 15) | st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3),
    st.just(0) | st.integers(0, len(WHOLE)),
    st.just(b"") | st.binary(max_size=100),
)
negative = st.builds(lambda count: ints(20240520, 1, -count).ljust(1024, b"\0"), st.integers(1, 2**31))


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@example(content=WHOLE)
@example(content=b"")
@example(content=ints(20240520, 1, 0).ljust(1024, b"\0"))
@example(content=ints(20240520, 1, -1).ljust(1022, b"\0"))
@given(content=nearly | damaged | negative | st.binary(max_size=1100))
def test_both_readers_accept_exactly_the_whole_shards(tmp_path: Path, content: bytes):
    """Catches a reader that skips magic, version or length, and two readers that do not agree."""
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    count = None
    if len(content) >= 1024 and content[:8] == (20240520 + (1 << 32)).to_bytes(8, "little"):
        said = int.from_bytes(content[8:12], "little", signed=True)
        if said >= 0 and len(content) == 1024 + 2 * said:
            count = said
    if count is None:
        with pytest.raises(ShardError, match=r"a\.bin"):
            shards.read_shard_header(path)
        with pytest.raises(train_gpt.SpeedrunError, match=r"a\.bin"):
            train_gpt.read_shard_header(path)
    else:
        assert shards.read_shard_header(path) == train_gpt.read_shard_header(path) == count


def test_a_shard_that_is_not_there_is_an_error_with_its_name(tmp_path: Path):
    for path in (tmp_path / "nothing.bin", tmp_path):
        with pytest.raises(ShardError, match=path.name):
            shards.read_shard_header(path)
        with pytest.raises(train_gpt.SpeedrunError, match=path.name):
            train_gpt.read_shard_header(path)


def test_the_header_is_that_of_the_format(tmp_path: Path):
    """Against the writer of the other tests, which goes through NumPy."""
    for count in (0, 1, 100_000):
        path = write_shard(tmp_path / "a.bin", [1] * count)
        assert shards.shard_header(count) == path.read_bytes()[:1024]
        assert shards.read_shard_header(path) == count
    assert shards.shard_header(2**31 - 1)[8:12] == b"\xff\xff\xff\x7f"
    with pytest.raises(ShardError, match="header"):
        shards.shard_header(2**31)


# ---- new_file ----


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_has_its_name_once_it_is_complete(tmp_path: Path):
    path = tmp_path / "x_train_1.bin"
    path.write_bytes(b"old")
    with shards.new_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert not any(name.endswith(".bin") for name in names(tmp_path) if name != path.name)
    assert path.read_bytes() == b"new" and names(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), shards.new_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a rename without or before fsync: after a power cut a final name would hold zeros."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def seen_replace(*paths: Path) -> None:
        calls.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    with shards.new_file(tmp_path / "a.bin") as file:
        file.write(b"12345")
    assert calls[:2] == [("fsync", (tmp_path / "a.bin").stat().st_ino, 5), "replace"]
    if os.name == "posix":
        assert calls[2][:2] == ("fsync", tmp_path.stat().st_ino), "then the folder, which holds the name"


FULL = """
try:
    with shards.new_file(path) as file:
        for _ in range(64):
            file.write(bytes(4096))
except shards.ShardError as error:
    sys.exit(f"refused: {error}")
"""


def check_refused(process: subprocess.Popen, path: Path) -> None:
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1 and f"refused: {path} was not written" in stderr, stderr
    assert "Finished files are kept" in stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_limit_of_file_size_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    limit = "import resource\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    check_refused(python(limit + FULL, path), path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


can_mount = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode


@pytest.mark.skipif(not can_mount, reason="needs user namespaces")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    """ENOSPC of a real file system: a tmpfs of 100 kB."""
    script = tmp_path / "script.py"
    check = FULL.replace(
        "sys.exit(", "assert path.read_bytes() == b'old' and os.listdir(path.parent) == ['a.bin']; sys.exit("
    )
    script.write_text(
        f"import os, sys; from pathlib import Path; sys.path.insert(0, {str(FOLDER)!r}); import shards\n"
        f"path = Path(sys.argv[1]); path.write_bytes(b'old')\n{check}"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=100k none "{disk}" && "{sys.executable}" "{script}" "{disk}/a.bin"'
    process = subprocess.Popen(["unshare", "-rm", "sh", "-c", mount], stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1 and "No space left on device" in stderr and "refused" in stderr, stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("where", ["while writing", "before the rename", "after the rename"])
def test_a_kill_leaves_the_old_or_the_new_file(tmp_path: Path, where: str):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    hook = {
        "while writing": "",
        "before the rename": "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)",
        "after the rename": "rename = os.replace\n"
        "os.replace = lambda *paths: (rename(*paths), os.kill(os.getpid(), signal.SIGKILL))",
    }[where]
    kill = "file.flush(); os.kill(os.getpid(), signal.SIGKILL)" if where == "while writing" else "pass"
    process = python(f"{hook}\nwith shards.new_file(path) as file:\n    file.write(b'new'); {kill}", path)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"new" if where == "after the rename" else b"old")
    with shards.exclusive(tmp_path):
        assert [name for name in names(tmp_path) if name != ".lock"] == ["a.bin"], "leftovers are swept"


# ---- exclusive ----

HOLD = """
with shards.exclusive(path):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_second_writer_waits_for_the_first(tmp_path: Path):
    """Catches two writers at once, and one who waits without saying why."""
    folder = tmp_path / "new" / "folder"
    first = python(HOLD, folder)
    assert first.stdout.readline() == "held\n"
    (folder / ".a.bin.tmp").write_bytes(b"half")
    second = python(HOLD, folder, stderr=subprocess.STDOUT)
    assert "waiting for another process" in second.stdout.readline() and second.poll() is None
    assert (folder / ".a.bin.tmp").exists(), "one who waits must not sweep what the other writes"
    first.communicate("\n", timeout=30)
    assert second.stdout.readline() == "held\n"
    assert not (folder / ".a.bin.tmp").exists()
    second.communicate("\n", timeout=30)
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_writer_holds_nothing(tmp_path: Path):
    first = python(HOLD, tmp_path)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.communicate()
    start = time.perf_counter()
    with shards.exclusive(tmp_path):
        pass
    assert time.perf_counter() - start < 2


def test_only_leftovers_are_swept_and_the_lock_ends_with_an_error(tmp_path: Path):
    keep = ["a.bin", ".a.bin.part", "b.tmp", ".hidden"]
    for name in (*keep, ".a.bin.tmp"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="mine"), shards.exclusive(tmp_path):
        assert sorted({*names(tmp_path)} - {".lock"}) == sorted(keep)
        raise ValueError("mine")
    process = python("with shards.exclusive(path): print('held')", tmp_path)
    assert process.communicate(timeout=30)[0] == "held\n"


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ShardError, match="cannot write into"), shards.exclusive(tmp_path / "file" / "folder"):
        pass


# ---- require_space ----


def test_space_is_that_of_the_disk_the_folder_will_be_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a wrong sign or unit, and a folder that has to exist first."""
    asked = []

    def disk_usage(path: Path):
        asked.append(Path(path))
        return namedtuple("Usage", "free")(1_500_000_000)

    folder = tmp_path / "not" / "yet"
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    shards.require_space(folder, 1_500_000_000)
    shards.require_space(folder, -5)
    with pytest.raises(ShardError, match=r"2\.00 GB.*1\.50 GB free"):
        shards.require_space(folder, 2_000_000_000)
    assert set(asked) == {tmp_path} and not folder.exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    shards.require_space(Path("relative"), 1)
    with pytest.raises(ShardError, match="make room"):
        shards.require_space(Path("relative"), 10**18)
