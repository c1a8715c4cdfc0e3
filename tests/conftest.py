"""Helpers shared by the tests: shard files, a tiny track, processes as a user starts them."""

import functools
import inspect
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of tests, each with a core of its own; read by `import torch`
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:  # for scripts in tests/; pytest itself has it from pyproject.toml
    sys.path.insert(0, str(REPO))

if not torch.cuda.is_available():  # read when kernels are defined: they run on the CPU, statement by statement
    os.environ["TRITON_INTERPRET"] = "1"

# tyro reads and parses the source of all classes for every command line: a second that only the first has to take.
inspect.getsource = functools.cache(inspect.getsource)

# A shell that runs the tests in the background has them ignore Ctrl-C, which the processes they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

import train_gpt  # noqa: E402 - only now is it on the path
from train_gpt import NANO, Runtime, Track  # noqa: E402

BOS = 256
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRAIN_GPT_LOG_PATH_FILE", "TORCHELASTIC_ERROR_FILE")


@pytest.fixture(autouse=True)
def no_backend_of_another_test():
    """A run logs with which backends its process has compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.eval_frame.cached_backends.clear()


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """A shard file: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens. Its header can lie."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def write_token_bytes(folder: Path, vocab_size: int = 257, bos: int = BOS) -> Path:
    """tokens.bin of an invented vocabulary: a token is its number in decimals, so 123 begins with 12; BOS is empty."""
    tokens = [b"" if i == bos else str(i).encode() for i in range(vocab_size)]
    return write_shard(folder / "tokens.bin", [*map(len, tokens), *b"".join(tokens)])


def documents(lengths, bos: int = BOS) -> list[int]:
    """Documents of these lengths, one after the other: BOS, then tokens that count on across documents."""
    tokens: list[int] = []
    for length in lengths:
        tokens += [bos, *((len(tokens) + i) % 251 for i in range(length - 1))]
    return tokens


def text_like(num_tokens: int, seed: int, longest: int = 60) -> np.ndarray:
    """Random documents of 1 to `longest` tokens whose tokens partly follow from the one before: there is a lesson."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, num_tokens)
    repeat = rng.random(num_tokens) < 0.5
    tokens[1:] = np.where(repeat[1:], (3 * tokens[:-1] + 1) % 32, tokens[1:])
    starts = np.cumsum(rng.integers(1, longest + 1, num_tokens))
    tokens[starts[starts < num_tokens]] = BOS
    tokens[0] = BOS
    return tokens


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One random change: bytes flipped, cut out, put in, the end cut off."""
    data = bytearray(content)
    place = rng.choice([rng.randrange(len(data)), rng.randrange(min(2000, len(data)))])  # the header often
    match rng.randrange(4):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            del data[place : place + rng.randrange(1, 50)]
        case 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 50))
        case 3:
            del data[place:]
    return bytes(data)


def write_tiny_data(folder: Path) -> Path:
    """Two training shards, two validation shards and the bytes of the tokens, enough for `tiny_track`."""
    for i in (1, 2):
        write_shard(folder / f"tiny_train_{i:06}.bin", text_like(6000, seed=i))
        write_shard(folder / f"tiny_val_{i:06}.bin", text_like(400, seed=10 + i))
    write_token_bytes(folder)
    return folder


def tiny_options() -> list[str]:
    """`nano` made tiny on the command line: 20 steps of 8 rows with every technique, stages of growing size.

    Stages begin at steps 0, 6 and 12 (for three stages), the extension at 18; the embedding unties at step 13.
    """
    numbers: dict[str, object] = {
        "model.num-layers": 5,
        "model.num-heads": 2,
        "model.head-dim": 8,
        "model.gate-dim": 12,
        "model.without-attention": (3,),
        "model.paired-layers": (0, 2),
        "model.long-layers": (1, 4),
        "model.gated-layers": (1, 4),
        "model.xsa-layers": (1, 2),
        "model.dc-layers": (4,),
        "model.dc-window": 12,
        "model.value-layers": (0, 1, 4),
        "model.skips": (1, 3),
        "model.late-input": 2,
        "model.second-gates": 2,
        "model.network-width": 8,
        "model.mix-in": ("first", "out2", "last"),
        "model.mix-out": ("first", 0.0, "out2", -0.5, "value1", 0.0),
        "model.ngrams": (2, 3),
        "model.ngram-rows": 320,
        "model.ngram-signs": 16,
        "data.rows-per-step": 8,
        "data.val-tokens": 700,
        "data.val-row-tokens": 96,
        "schedule.scheduled-steps": 18,
        "schedule.extension-steps": 2,
        "schedule.final-long-window": 24,
        "schedule.momentum-steps": (6, 3),
        "val-every": 0,
        "schedule.extension.tokens": 8 * 24,
        "schedule.extension.windows": (6, 20),
        "schedule.extension.max-doc-len": 20,
    }
    for i in range(len(NANO.schedule.stages)):
        numbers[f"schedule.stages.{i}.tokens"] = 8 * (12 + 6 * i)
        numbers[f"schedule.stages.{i}.windows"] = (4 + i, 8 + 4 * i)
        numbers[f"schedule.stages.{i}.max-doc-len"] = 12 + 4 * i
        numbers[f"schedule.stages.{i}.prediction-weights"] = ((1, 1, 0.5, 0.5, 0.25, 0), (1, 1, 0.5, 0), (1, 1))[i]
        numbers[f"schedule.stages.{i}.prefix-weight"] = ((0.25, 0.25), (0.25, 0), (0, 0))[i]
    words = ["--model.gate-networks", "--model.smear"]
    for name, value in numbers.items():
        words += [f"--{name}", *(str(v) for v in (value if isinstance(value, tuple) else (value,)))]
    return words


@functools.cache
def parsed_tiny_options() -> Track:
    return train_gpt.parse_command(["nano", *tiny_options()])[0]


def tiny_track(val_every: int = 0, **data_or_schedule) -> Track:
    """The track of `tiny_options`, with further fields of its schedule or data replaced."""
    track = replace(parsed_tiny_options(), val_every=val_every)
    schedule = {k: v for k, v in data_or_schedule.items() if hasattr(track.schedule, k)}
    data = {k: v for k, v in data_or_schedule.items() if k not in schedule}
    return replace(track, schedule=replace(track.schedule, **schedule), data=replace(track.data, **data))


def cpu(dtype: torch.dtype = torch.float32, rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), rank, world_size, dtype)


def kill_before_rename(number: int) -> str:
    """Code by which a process gets SIGKILL right before its n-th new file gets its name; 0: never."""
    return f"""
import os, signal
rename, calls = os.replace, 0
def replace(*args):
    global calls
    calls += 1
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.replace = replace
"""


def run_process(command: list, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a command on one thread, outside any process group of the tests; its output is captured as text."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, env=env)


def torchrun(num_processes: int, *command, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script in `num_processes` CPU processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
    return run_process([*launcher, *command], timeout=timeout)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def alone(monkeypatch) -> None:
    """As a plain `python train_gpt.py` sees the environment: no launcher around it."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
