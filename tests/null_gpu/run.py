#!/usr/bin/env python3
"""Runs the CUDA path of train_gpt.py on a machine without a GPU: everything but the arithmetic.

    python tests/null_gpu/run.py [--cases whole sm_80 ...] [--verbose] [--write-budget] [-- options of the trainer]

Wants torch's CUDA build and a C compiler, on Linux. nullcuda.c, preloaded as libcuda.so.1, describes an H100 (or
another GPU), gives out addresses as memory up to its 80 GB, and its kernels do nothing. To all else it is a GPU:
PyTorch's own C++ checks its arguments, allocates from its caching allocator and launches; Dynamo, AOTAutograd, Inductor
and Triton compile for it down to machine code, and the generated code asserts sizes, strides and alignment of what
operators return. The trainer runs unmodified: warm-up of all stages, training loop, checkpoints, validation, a text.

What fails: any exception of the run; a launch, a tensor map (TMA) or an FP8 product that CUDA would refuse; a graph
break; a compilation, a new kernel or a wait for the device once the clock runs; a kernel that spills on sm_90, and a
hand-written one that does on sm_80 or sm_100; more kernels, bytes or memory than budget.json has for sm_90 and its
torch, or so much less that it should be written anew (--write-budget).
What it cannot say: whether numbers are right, how long anything takes, whether collectives of ranks match in order.

What it lacks: cuDNN, FlashAttention-3 and -4 (whose runtime wants more of a driver), CUDA graphs, expandable segments.
Their use fails loudly.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
TRAINER = HERE.parents[1] / "train_gpt.py"
BUDGET = HERE / "budget.json"
TOLERANCE = 0.02  # of each number of the budget

# driver_types.h includes crt/host_defines.h, which the wheels lack: this is all that it needs of it.
HOST_DEFINES = """
#define __device_builtin__
#define __host__
#define __device__
#define __cudart_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
#define __CUDACC_RTC__
"""

# Every stage of `small` with two steps, an even and an odd one, and validations.
SHORT = ["small", "--schedule.scheduled-steps", "6", "--schedule.extension-steps", "2", "--sample-tokens", "20"]
# As on eight GPUs: each rank has one row.
ROW_EACH = ["--data.rows-per-step", "2", "--schedule.extension.tokens", "98304"]
ROW_EACH += [word for i in range(3) for word in (f"--schedule.stages.{i}.tokens", str(32768 * (i + 1)))]
FIRST_STAGE = [*SHORT, "--max-steps", "2", "--val-every", "0"]
CASES: dict[str, tuple[int, int, list[str]]] = {  # compute capability, ranks, the trainer's command line
    "whole": (90, 1, [*SHORT, "--save-every", "4"]),
    "sm_80": (80, 1, FIRST_STAGE),
    "sm_89": (89, 1, FIRST_STAGE),
    "sm_100": (100, 1, FIRST_STAGE),
    "sm_120": (120, 1, FIRST_STAGE),
    "ranks_2": (90, 2, [*SHORT, *ROW_EACH]),
    "sampled": (90, 1, [*FIRST_STAGE, "--model.sampled-vocab", "16384"]),
    "heads_of_96": (90, 1, [*FIRST_STAGE, "--model.head-dim", "96"]),
}


def headers() -> list[Path]:
    """Folders of packages that have the CUDA runtime's driver_types.h: none without torch's CUDA build."""
    return [p.parent for d in map(Path, sys.path) if d.is_dir() for p in d.glob("nvidia/*/include/driver_types.h")]


def missing() -> str | None:
    """What this machine lacks to run the null device."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "Linux on x86-64"
    if not shutil.which(compiler()):
        return f"a C compiler ({compiler()})"
    return None if headers() else "torch's CUDA build"


def compiler() -> str:
    return os.environ.get("CC", "cc")


def build(folder: Path) -> Path:
    """Compile the null device. Returns libcuda.so.1."""
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    library = folder / "libcuda.so.1"
    options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", str(folder), "-I", str(headers()[0])]
    subprocess.run(
        [compiler(), str(HERE / "nullcuda.c"), "-o", str(library), *options, "-ldl", "-lpthread"], check=True
    )
    return library


def make_shards(folder: Path) -> None:
    """Random tokens in documents of random lengths, as long as those of FineWeb."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("val", 10_485_761), ("train", 12_000_000)):
        tokens = random.integers(0, 50256, count, dtype=np.uint16)
        starts = np.cumsum(np.exp(random.normal(6, 1, count // 300)).astype(int) + 8)
        tokens[[0, *starts[starts < count]]] = 50256
        write_shard(folder / f"null_{name}_000001.bin", tokens)
    spelled = [b"%x" % token for token in range(50256)] + [b""]
    write_shard(folder / "tokens.bin", np.array([*map(len, spelled), *b"".join(spelled)]))


def write_shard(path: Path, numbers: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(numbers)
    path.write_bytes(header.tobytes() + numbers.astype("<u2").tobytes())


# ---- in the process that trains ----


def inside(trainer: Path, results: Path, arguments: list[str]) -> None:
    """Run the trainer's main() with marks in the trace, then write what torch counted."""
    sys.path.insert(0, str(trainer.parent))
    import torch
    import torch.distributed as dist
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.jit import JITFunction

    import train_gpt

    mark = ctypes.CDLL(None).nullcuda_mark
    world = int(os.environ.get("WORLD_SIZE", "1"))
    current: list[str] = []
    peak: dict[str, int] = {}
    gigabytes: dict[str, float] = defaultdict(float)

    def marked(owner: object, name: str, label) -> None:
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            what = label(*args)
            mark(f"begin {what}".encode())
            current.append(what)
            torch.cuda.reset_peak_memory_stats()
            try:
                return function(*args, **kwargs)
            finally:
                current.pop()
                mark(f"end {what}".encode())
                peak[what] = torch.cuda.max_memory_allocated() >> 20

        setattr(owner, name, wrapper)

    def phase(owner: object, name: str, what: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            mark(f"begin {what}".encode())
            try:
                return function(*args, **kwargs)
            finally:
                mark(f"end {what}".encode())

        setattr(owner, name, wrapper)

    marked(train_gpt.Trainer, "train_step", lambda trainer, step: f"step {step}")
    marked(train_gpt.Trainer, "validate", lambda trainer, settings, *rest, **more: f"validation {settings.step}")
    phase(train_gpt.GPT, "forward", "forward")
    phase(torch.autograd, "grad", "backward")
    phase(train_gpt.Optimizer, "step", "optimizer")
    loop = train_gpt.Loop.run

    def timed(self):
        mark(b"begin loop 0")
        gigabytes.clear()
        return loop(self)

    train_gpt.Loop.run = timed
    run = CachingAutotuner.run

    def counted(self, *args, **kwargs):
        gb = self.inductor_meta.get("kernel_num_gb", 0.0)
        if current:
            gigabytes[current[-1]] += gb
        mark(f"launch {gb * 1e9:.0f}".encode())
        return run(self, *args, **kwargs)

    CachingAutotuner.run = counted
    run_ours = JITFunction.run

    def described(self, *args, **kwargs):
        """Of the trainer's kernels: bytes of all that they are given, shapes, each with the bytes of an element."""
        tensors = [getattr(x, "base", x) for x in args if hasattr(x, "shape")]
        found = {x.data_ptr(): x.numel() * x.element_size() for x in tensors}
        shapes = [f"{'x'.join(map(str, x.shape))}/{x.element_size()}" for x in tensors]
        mark(f"launch {sum(found.values())} {' '.join(shapes)}".encode())
        return run_ours(self, *args, **kwargs)

    JITFunction.run = described

    # The words of tokens take a download, and probabilities that no kernel has computed may be no numbers.
    sys.modules["tiktoken"] = SimpleNamespace(get_encoding=lambda name: SimpleNamespace(decode=str))
    torch.multinomial = lambda weights, count, generator: torch.zeros(1, dtype=torch.int64)
    mean_loss, validate = train_gpt.Trainer.mean_loss, train_gpt.Trainer.validate

    def finite_loss(*args):
        """Whether numbers that no kernel has computed are finite means nothing."""
        mean_loss(*args)
        return 0.0

    def validated(*args, **kwargs):
        validate(*args, **kwargs)
        return 0.0

    train_gpt.Trainer.mean_loss, train_gpt.Trainer.validate = finite_loss, validated
    if world > 1:  # collectives return at once: keep the ranks together as real ones would
        dist.broadcast_object_list = lambda *args, **kwargs: None
        step, calls = train_gpt.Trainer.train_step, iter(range(10**9))

        def together(self, number):
            result = step(self, number)
            store, key = dist.distributed_c10d._get_default_store(), f"null/{next(calls)}"
            store.add(key, 1)
            while store.add(key, 0) < world:
                time.sleep(0.05)
            return result

        train_gpt.Trainer.train_step = together
    sys.argv = [str(trainer), *arguments]
    try:
        train_gpt.main()
    finally:
        counters = {name: dict(values) for name, values in torch._dynamo.utils.counters.items()}
        found = {"counters": counters, "peak": peak, "gigabytes": gigabytes, "torch": torch.__version__}
        results.write_text(json.dumps(found))


# ---- outside ----


class Case:
    """One run of the trainer on the null device, of one or more ranks, in a folder of its own below `work`."""

    def __init__(self, name: str, work: Path, cache: str | None = None, more: list[str] | None = None):
        self.name, self.work, self.folder = name, work, work / name
        self.arch, self.ranks, arguments = CASES[name]
        self.arguments = [*arguments, *(more or [])]
        self.cache = work / f"cache_{cache or name}"  # perhaps of another case, whose graphs are the same
        self.seconds, self.codes = 0.0, []

    def environment(self, library: Path, rank: int) -> dict[str, str]:
        variables = {
            "LD_PRELOAD": str(library),
            "TRITON_LIBCUDA_PATH": str(library.parent),
            "NULLCUDA_ARCH": str(self.arch),
            "NULLCUDA_TRACE": str(self.folder / f"trace_{rank}.txt"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TORCHINDUCTOR_BENCHMARK_KERNEL": "1",  # the generated code says how many bytes a kernel moves
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        if self.ranks > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 1000)}
            # Each rank has a device of its own and calls it cuda:0, so that all find the same compiled graphs.
            variables |= address | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(self.ranks)}
        without = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        return {k: v for k, v in os.environ.items() if k not in without} | variables

    def run(self, trainer: Path = TRAINER) -> Case:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        library = build(self.work / "nullcuda")
        if not (self.work / "data").exists():
            make_shards(self.work / "data")
        places = ["--data-dir", str(self.work / "data"), "--log-dir", str(self.folder / "logs")]
        places += ["--checkpoint-dir", str(self.folder / "checkpoints")]
        began, processes = time.time(), []
        for rank in range(self.ranks):
            command = [sys.executable, str(HERE / "run.py"), "--inside", str(trainer)]
            command += [str(self.folder / f"results_{rank}.json"), *self.arguments, *places]
            with open(self.folder / f"output_{rank}.txt", "w") as output:
                environment = self.environment(library, rank)
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        self.codes = [process.wait() for process in processes]
        self.seconds = time.time() - began
        return self

    def trace(self, rank: int) -> list[list[str]]:
        path = self.folder / f"trace_{rank}.txt"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return [line.split("\t") for line in lines if line]

    def results(self, rank: int) -> dict:
        path = self.folder / f"results_{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def problems(self) -> list[str]:
        """All that CUDA would not take, or that should not be, in words; without what the budget says."""
        found = []
        for rank, code in enumerate(self.codes):
            if code:
                lines = (self.folder / f"output_{rank}.txt").read_text(errors="replace").splitlines()
                found.append(f"rank {rank} ended with code {code}: " + " | ".join(lines[-3:])[-600:])
            found += trace_problems(self.trace(rank), self.arch)
            if breaks := self.results(rank).get("counters", {}).get("graph_break"):
                found.append(f"graph breaks: {breaks}")
        for log in (self.folder / "logs").glob("*.txt"):
            counts = re.findall(r"^compilations after the clock started: (\d+)$", log.read_text(), re.M)
            if counts != ["0"]:
                found.append(f"compilations after the clock started: {counts or 'not said'}")
        return list(dict.fromkeys(found))

    def budget(self) -> dict[str, dict[str, float]]:
        """By step and validation what rank 0 had the device do."""
        results = self.results(0)
        found = {}
        for what, lines in timed(self.trace(0)).items():
            found[what] = count(lines)
            found[what]["GB in kernels of Inductor"] = round(results["gigabytes"].get(what, 0.0), 2)
            found[what]["peak MiB"] = results["peak"][what]
        return found

    def differences(self) -> list[str]:
        """From budget.json, where there is one for this torch: another Inductor makes other kernels."""
        budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        return compare(self.budget(), budget["small"]) if budget.get("torch") == self.results(0)["torch"] else []

    def describe(self, verbose: bool) -> str:
        trace, results = self.trace(0), self.results(0)
        graphs = results.get("counters", {}).get("stats", {}).get("unique_graphs")
        text = [
            f"{self.name}: sm_{self.arch}, {self.ranks} rank(s), torch {results.get('torch')}: {self.seconds:.0f} s, "
            f"{graphs} graphs, {len({line[1] for line in trace if line[0] == 'loaded'})} names of Triton kernels, "
            f"peak {max(results.get('peak', {}).values(), default=0):,} MiB"
        ]
        for what, numbers in self.budget().items() if results else ():
            text.append(f"  {what}: " + ", ".join(f"{value:,} {name}" for name, value in numbers.items()))
            if verbose:
                lines = [line for line in timed(trace)[what] if line[0] != "mark"]
                names = Counter(" ".join(line[:3])[:150] if line[0] != "triton" else line[1] for line in lines)
                text += [f"      {number:5} {name}" for name, number in names.most_common()]
        return "\n".join(text)


def timed(trace: list[list[str]]) -> dict[str, list[list[str]]]:
    """What happened in each step and validation after the clock had started, with the marks inside."""
    found, current, started = {}, None, False
    for line in trace:
        if line[0] == "mark":
            begins, _, what = line[1].partition(" ")
            started |= what == "loop 0"
            if started and what.startswith(("step", "validation")):
                current = found.setdefault(what, []) if begins == "begin" else None
                continue
        if current is not None:
            current.append(line)
    return found


def spills(trace: list[list[str]]) -> list[tuple[str, int]]:
    """Name and bytes of stack of kernels of Triton that were launched and have not enough registers.

    Inductor compiles more variants of a kernel than it considers: what spills above 16 registers it never launches.
    """
    return sorted({(line[1], int(line[5])) for line in trace if line[0] == "triton" and line[5] != "0"})


def trace_problems(trace: list[list[str]], arch: int) -> list[str]:
    """What a trace shows that CUDA would refuse, kernels that spill, and disturbances of the timed steps."""
    bad = Counter(" ".join(line[:3]) for line in trace if line[-1] == "INVALID" or line[0] == "UNSUPPORTED")
    found = [f"CUDA would refuse, {number} times: {what}" for what, number in bad.items()]
    for name, stack in spills(trace):
        if arch == 90 or (arch in (80, 100) and name.startswith("_")):
            found.append(f"kernel {name} spills: {stack} bytes of stack")
    for what, lines in timed(trace).items():
        if what.startswith("step"):
            waits = Counter(line[1] for line in lines if waits_for_device(line))
            found += [f"{what} waits for the device, {number} times: {name}" for name, number in waits.items()]
            found += [f"{what} loads the kernel {line[1]}" for line in lines if line[0] == "loaded"]
    return found


def waits_for_device(line: list[str]) -> bool:
    return line[0] == "sync" or "pageable" in line[1]


def count(lines: list[list[str]]) -> dict[str, float]:
    """Numbers for the budget: launches by kind, bytes, waits."""
    kind = lambda line: line[0] if line[0] != "triton" else "ours" if line[1].startswith("_") else "inductor"
    kinds = Counter(kind(line) for line in lines)
    attention = [line for line in lines if line[0] == "kernel" and "flash" in line[1]]
    copied = sum(int(line[2]) for line in lines if line[0] in ("memcpy", "memset"))
    return {
        "kernels of Inductor": kinds["inductor"],
        "kernels of the trainer": kinds["ours"],
        "kernels of libraries": kinds["kernel"],
        "matrix products": kinds["gemm"],
        "copies and fills": kinds["memcpy"] + kinds["memset"],
        "collectives": kinds["nccl"],
        "waits": sum(waits_for_device(line) for line in lines),
        "million blocks of attention": round(sum(blocks(line) for line in attention) / 1e6, 3),
        "GB copied or filled": round(copied / 1e9, 2),
        "GB in elementwise kernels of libraries": round(sum(map(elementwise_bytes, lines)) / 1e9, 2),
    }


def blocks(line: list[str]) -> int:
    x, y, z = map(int, line[2].split(","))
    return x * y * z


def elementwise_bytes(line: list[str]) -> int:
    """Roughly what an elementwise kernel of ATen reads and writes, from its name: 8 bytes for a double, and so on."""
    if line[0] != "kernel":
        return 0
    name = line[1]
    operands = re.search(r"arrayIPcLm(\d)E", name)
    sizes = (("[Ff]loat8", 1), (r"BFloat16|FunctorIs", 2), (r"Idd|UldE|UlmE|UllE|FunctorI[dml]E", 8))
    size = next((size for pattern, size in sizes if re.search(pattern, name)), 4)
    if lists := re.search(r"multi_tensor_apply.*MetadataILi(\d)E", name):  # a block for every 65,536 numbers
        return blocks(line) * 65536 * (int(lists[1]) + ("BinaryOpList" in name)) * size
    return int(line[5]) * (int(operands[1]) if operands else 2) * size


def compare(found: dict[str, dict[str, float]], budget: dict[str, dict[str, float]]) -> list[str]:
    """Where a run leaves the budget by more than the tolerance, in words: each number may neither grow nor shrink."""
    if found.keys() != budget.keys():
        return [f"the budget has {sorted(budget)}, the run {sorted(found)}"]
    differences = []
    for what, numbers in budget.items():
        for name, allowed in numbers.items():
            value = found[what].get(name, 0)
            if abs(value - allowed) > TOLERANCE * allowed:
                how = "more than" if value > allowed else "less (run.py --write-budget takes it over) than"
                differences.append(f"{what}: {value:,} {name}, {how} the budget's {allowed:,}")
    return differences


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return inside(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", type=Path, default=TRAINER)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["whole", "sm_80", "sm_100", "ranks_2"])
    parser.add_argument("--work", type=Path, help="folder for traces and caches; default: a temporary one")
    parser.add_argument("--verbose", action="store_true", help="every kernel of every step")
    parser.add_argument("--write-budget", action="store_true", help="take the numbers of `whole` over into budget.json")
    parser.add_argument("more", nargs="*", help="after --: options of the trainer")
    options = parser.parse_args()
    if lack := missing():
        sys.exit(f"the null device needs {lack}")

    failed = False
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nullcuda.")))
        for name in options.cases:
            shares = "whole" if name == "ranks_2" and "whole" in options.cases else None
            case = Case(name, work.resolve(), shares, options.more).run(options.trainer.resolve())
            print(case.describe(options.verbose), flush=True)
            problems = case.problems()
            if name == "whole" and options.write_budget and case.codes == [0]:
                version = case.results(0)["torch"]
                BUDGET.write_text(json.dumps({"torch": version, "small": case.budget()}, indent=1) + "\n")
            elif name == "whole" and case.codes == [0]:
                problems += case.differences()
            for problem in problems:
                failed = True
                print(f"  FAILED {problem}", flush=True)
    print("FAILED" if failed else "passed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
