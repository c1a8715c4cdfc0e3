"""run.sh as a user starts it, in a copy of the repository whose Python scripts are stubs that note their arguments."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_options

from train_gpt import TRACKS

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="run.sh needs a POSIX shell")

# Stands in for the interpreter: notes its arguments, then runs the script, for torchrun once and without torch.
PYTHON = """#!{python} -S
import json, os, sys
names = ("OMP_NUM_THREADS", "TRAIN_GPT_LOG_PATH_FILE")
names += ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
if sys.argv[1] == "-c" and len(sys.argv) == 3:  # which packages are missing: none
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in names}}, os.getcwd()]) + "\\n")
arguments = sys.argv[1:]
if arguments[0] == "-c":
    arguments = arguments[[a.endswith(".py") for a in arguments].index(True):]
os.execv({python!r}, [{python!r}, "-S", *arguments])
"""

TRAIN_GPT = """
import os, signal, sys, time
if os.environ.get("LOG"):
    open(os.environ["TRAIN_GPT_LOG_PATH_FILE"], "w").write(os.environ["LOG"])
if os.environ.get("SLEEP"):
    try:
        print("training", flush=True)
        time.sleep(float(os.environ["SLEEP"]))
    finally:
        time.sleep(0.3)
        print("cleaned up", flush=True)
print("trained", flush=True)
sys.exit(int(os.environ.get("CODE", 0)))
"""

DATA = """
import os, sys
print(end=os.environ.get("DATA_SAYS", ""))
sys.exit(int(os.environ.get("DATA_CODE", 0)))
"""

PLOT = """
import os, sys
print(f"plot: {sys.argv[1][:-4]}.png")
sys.exit(int(os.environ.get("PLOT_CODE", 0)))
"""


def default_signals() -> None:
    """In the child: under nohup or as a background job the tests inherit ignored signals, which bash could not trap."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Call:
    """One start of the interpreter."""

    def __init__(self, argv: list[str], env: dict[str, str | None], cwd: str):
        self.argv, self.env, self.cwd = argv, env, cwd
        self.script_at = next(i for i, argument in enumerate(argv) if argument.endswith(".py"))
        self.launcher, self.arguments = argv[: self.script_at], argv[self.script_at + 1 :]
        self.script = Path(argv[self.script_at]).name

    @property
    def processes(self) -> int:
        return int(self.launcher[self.launcher.index("--nproc-per-node") + 1]) if self.launcher else 1


class FakeRepo:
    """A copy of run.sh among stubs, in a folder with a space in its name; a machine with `gpus` GPUs."""

    def __init__(self, root: Path):
        self.root, self.calls_file, self.cwd = root / "my repo", root / "calls", root / "elsewhere"
        self.tmp = root / "tmp files"
        (self.root / "data").mkdir(parents=True)
        (self.root / "records").mkdir()
        (root / "bin").mkdir()
        self.cwd.mkdir()
        self.tmp.mkdir()
        shutil.copy(REPO / "run.sh", self.root)
        (self.root / "train_gpt.py").write_text(TRAIN_GPT)
        (self.root / "data/nano.py").write_text(DATA)
        (self.root / "data/cached_fineweb10B.py").write_text(DATA)
        (self.root / "records/plot.py").write_text(PLOT)
        self.write_program(root / "bin/python3", PYTHON.format(python=sys.executable))
        unwanted = (
            "PYTHON|NPROC|NNODES|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|SLURM_.*|MASTER_.*|RANK|WORLD_SIZE|LOCAL_RANK"
        )
        self.env = {k: v for k, v in os.environ.items() if not re.fullmatch(unwanted, k)}
        self.env |= {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.calls_file)}
        self.env["TMPDIR"] = str(self.tmp)
        self.set_gpus(0)

    def write_program(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def set_gpus(self, count: int) -> None:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}a)'\n" for i in range(count))
        broken = "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9\n"
        self.write_program(self.calls_file.parent / "bin/nvidia-smi", "#!/bin/sh\n" + (lines or broken))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        command = ["bash", str(self.root / "run.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": self.cwd}
        return subprocess.Popen(command, env=self.env | env, preexec_fn=default_signals, **pipes)

    def run(self, *arguments: str, code: int = 0, **env: str) -> tuple[str, str]:
        """Standard output and error of `run.sh arguments`, which must end with this exit code."""
        self.calls_file.unlink(missing_ok=True)
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        assert self.leftovers == []
        return out, err

    @property
    def leftovers(self) -> list[Path]:
        """Temporary files of run.sh (torchrun leaves an empty folder of its own)."""
        return list(self.tmp.glob("train_gpt*"))

    @property
    def calls(self) -> list[Call]:
        return [Call(*json.loads(line)) for line in self.calls_file.read_text().splitlines()]

    @property
    def train(self) -> Call:
        (call,) = [call for call in self.calls if call.script == "train_gpt.py"]
        return call

    @property
    def scripts(self) -> list[str]:
        return [call.script for call in self.calls]


@pytest.fixture
def repo(tmp_path: Path) -> FakeRepo:
    return FakeRepo(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "track", "processes"),
    [(0, "nano", 1), *[(n, "small", w) for n, w in {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 7: 4, 8: 8, 10: 8}.items()]],
)
def test_track_and_processes_follow_the_gpus(repo: FakeRepo, gpus: int, track: str, processes: int):
    """Catches a wrong default track and process counts that do not divide the 8 rows."""
    repo.set_gpus(gpus)
    _, err = repo.run()
    assert repo.train.processes == processes
    assert repo.train.arguments == [track]
    assert bool(repo.train.launcher) == (processes > 1), "one process needs no torchrun"
    assert ("--standalone" in repo.train.launcher) == (processes > 1)
    assert (f"{gpus} GPUs found, using {processes}" in err) == (gpus not in (0, 1, 2, 4, 8))


@pytest.mark.parametrize(
    ("visible", "processes"),
    [("", None), ("-1", None), ("2", 1), ("0,1", 2), ("0, 1,2,3", 4), ("0,-1,1", 1), ("0,9", 1), ("GPU-0a,GPU-1a", 2)],
)
def test_cuda_visible_devices_is_honoured(repo: FakeRepo, visible: str, processes: int | None):
    repo.set_gpus(8)
    _, err = repo.run(CUDA_VISIBLE_DEVICES=visible)
    assert (repo.train.arguments, repo.train.processes) == ((["small"], processes) if processes else (["nano"], 1))
    assert "integer expression" not in err


def test_nproc_overrides(repo: FakeRepo):
    repo.set_gpus(8)
    repo.run("small", NPROC="2")
    assert repo.train.processes == 2
    repo.run("small", NPROC="1")
    assert repo.train.launcher == []
    repo.set_gpus(0)
    repo.run("nano", NPROC="4")
    assert repo.train.processes == 4
    for wrong in ("0", "two", "-1"):
        _, err = repo.run(code=2, NPROC=wrong)
        assert f"NPROC is '{wrong}'" in err


def test_nano_and_cpu_take_one_process_whatever_the_gpus(repo: FakeRepo):
    repo.set_gpus(8)
    repo.run("nano")
    assert (repo.train.processes, repo.train.arguments) == (1, ["nano"])
    for options in (["--device", "cpu"], ["--device=cpu"]):
        repo.run(*options)
        assert (repo.train.processes, repo.train.arguments) == (1, ["nano", *options])
        repo.run("small", *options)
        assert (repo.train.processes, repo.train.arguments) == (1, ["small", *options])
    repo.run("small", "--device", "cuda")
    assert repo.train.processes == 8


def test_options_arrive_unchanged(repo: FakeRepo):
    """Catches word splitting, globbing and a changed folder: relative paths are relative to the user's."""
    options = ["--seed", "3", "--log-dir", "my logs/*", "--run-id=a 'b' \"c\" $HOME", "", "ü"]
    for gpus in (0, 2):
        repo.set_gpus(gpus)
        repo.run("small", *options)
        assert repo.train.arguments == ["small", *options]
        assert Path(repo.train.cwd) == repo.cwd
        repo.run(*options)
        assert repo.train.arguments == [("nano", "small")[gpus > 0], *options]


@pytest.mark.parametrize("arguments", [["--help"], ["nano", "--help"], ["small", "-h"], ["--seed", "1", "--help-all"]])
def test_help_goes_straight_to_train_gpt(repo: FakeRepo, arguments: list[str]):
    repo.set_gpus(8)
    repo.run(*arguments)
    assert [(call.launcher, call.script, call.arguments) for call in repo.calls] == [([], "train_gpt.py", arguments)]


@pytest.mark.parametrize("words", [["--plan"], ["--scale", "width=0.5"], ["--eval=hellaswag"]])
def test_what_has_moved_is_named_before_data_is_fetched(repo: FakeRepo, words: list[str]):
    """Catches: 28 GB fetched for an option that is none any more."""
    _, err = repo.run("xl", *words, code=2)
    assert not repo.calls_file.exists() and "evals/plan.py" in err and "evals/sibling.py" in err


def test_data_is_made_unless_a_folder_is_given(repo: FakeRepo):
    repo.run("nano")
    assert repo.scripts == ["nano.py", "train_gpt.py"]
    for track in TRACKS.values():
        repo.run(track.name)
        data, run = repo.calls
        assert ["python", f"data/{data.script}", *data.arguments] == track.data.fetch.split()
        assert run.script == "train_gpt.py"
    for options in (["--data-dir", "x"], ["--data-dir=x"], ["--data_dir", "x"]):
        for track in ("nano", "small"):
            repo.run(track, *options)
            assert repo.scripts == ["train_gpt.py"]
    repo.run("large", code=7, CODE="7")
    assert repo.scripts == ["train_gpt.py"], "an unknown track: train_gpt.py says so"


def test_without_data_there_is_no_run(repo: FakeRepo):
    repo.run("nano", code=4, DATA_CODE="4")
    assert repo.scripts == ["nano.py"]


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_that_of_the_run(repo: FakeRepo, gpus: int, code: int):
    repo.set_gpus(gpus)
    out, _ = repo.run(code=code, CODE=str(code), LOG="logs/my run.txt")
    assert ("plot.py" in repo.scripts) == (code == 0)
    if code == 0:
        assert repo.calls[-1].arguments == ["logs/my run.txt"]
        assert out.endswith("plot: logs/my run.png\n")


def test_a_failing_plot_says_so_and_changes_nothing(repo: FakeRepo):
    _, err = repo.run(LOG="logs/run.txt", PLOT_CODE="1")
    assert "the loss plot could not be drawn" in err


def test_without_a_log_there_is_no_plot(repo: FakeRepo):
    repo.run()
    assert "plot.py" not in repo.scripts


def test_several_nodes(repo: FakeRepo):
    repo.set_gpus(8)
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    repo.run("small", **nodes)
    joined = " ".join(repo.train.launcher)
    assert "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 1234" in joined
    assert repo.train.processes == 8 and "--standalone" not in joined
    repo.run("small", **nodes, NPROC="1")
    assert repo.train.processes == 1 and repo.train.launcher, "one process on each node is still a torchrun"
    for name in ("NODE_RANK", "MASTER_ADDR"):
        _, err = repo.run("small", code=2, **(nodes | {name: ""}))
        assert f"{name} is not set" in err
    for wrong in ("2", "-1", "first"):
        _, err = repo.run("small", code=2, **(nodes | {"NODE_RANK": wrong}))
        assert f"NODE_RANK is '{wrong}', expected 0 to 1" in err
    _, err = repo.run("small", code=2, NNODES="many")
    assert "NNODES is 'many'" in err


# ---- Slurm ----

STEP = {"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}
STEP |= {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_JOB_NODELIST": "node3,node7"}
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] || exit 9
case $3 in 'node[03-04]') printf 'node03\\nnode04\\n' ;; *) printf '%s\\n' "$3" | tr , '\\n' ;; esac
"""


def test_tasks_of_srun_are_the_processes_of_one_run(repo: FakeRepo):
    """Catches: as many runs as tasks; ranks, or the place where they meet, that differ from task to task; 16 reports
    of the same data."""
    repo.set_gpus(8)
    said = {"DATA_SAYS": "data is there\n"}
    out, _ = repo.run("small", **STEP, **said)
    assert repo.train.launcher == [] and repo.scripts == ["cached_fineweb10B.py", "train_gpt.py"] and out == ""
    env = repo.train.env
    assert [env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == ["11", "16", "3", "node3"]
    assert env["OMP_NUM_THREADS"] is None
    out, _ = repo.run("small", **STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "LOG": "run.txt"}, **said)
    assert out.splitlines() == ["data is there", "trained", "plot: run.png"]
    assert repo.train.env["RANK"] == "0" and repo.train.env["MASTER_PORT"] == env["MASTER_PORT"]
    repo.run("small", **STEP | {"SLURM_STEP_NUM_TASKS": ""})
    assert repo.train.env["WORLD_SIZE"] == "16"
    _, err = repo.run("small", code=2, NPROC="8", **STEP)
    assert "NPROC is '8', but srun started 16 tasks" in err


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"SLURM_NTASKS": "8"}, 8),  # the shell of salloc
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 8),  # the script of sbatch
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 8),  # a shell as a step
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 8),  # srun --ntasks=1
        (STEP | {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node3", "NPROC": "4"}, 4),  # a torchrun in each task
    ],
)
def test_what_is_no_task_beside_others_runs_as_without_slurm(repo: FakeRepo, environment: dict, processes: int):
    """Catches: a lone process in an interactive shell that waits for seven others, which nobody started."""
    repo.set_gpus(8)
    repo.run("small", **environment)
    assert repo.train.launcher and repo.train.processes == processes
    assert repo.train.env["RANK"] is None


@pytest.mark.parametrize(
    ("nodes", "scontrol", "first"),
    [
        ("node[03-04]", True, "node03"),
        ("node7,node[1-4]", False, "node7"),
        ("node7", False, "node7"),
        ("node[03-04]", False, None),
        ("node[03,07]", False, None),
        ("", False, None),
    ],
)
def test_the_tasks_meet_on_the_first_node(repo: FakeRepo, nodes: str, scontrol: bool, first: str | None):
    """Catches: a list of nodes taken for a host; a task that goes on without knowing where to meet."""
    if scontrol:
        repo.write_program(repo.root.parent / "bin/scontrol", SCONTROL)
    environment = STEP | {"SLURM_JOB_NODELIST": nodes}
    if first:
        repo.run("small", **environment)
        assert repo.train.env["MASTER_ADDR"] == first
        repo.run("small", **environment, SLURM_STEP_NODELIST="node9")  # of this step, on part of the job's nodes
        assert repo.train.env["MASTER_ADDR"] == "node9"
    else:
        _, err = repo.run("small", code=2, **environment)
        assert f"no scontrol to expand the nodes '{nodes}': set MASTER_ADDR to the first of them" in err
    repo.run("small", **environment, MASTER_ADDR="10.0.0.1", MASTER_PORT="4321")
    assert (repo.train.env["MASTER_ADDR"], repo.train.env["MASTER_PORT"]) == ("10.0.0.1", "4321")


def test_steps_on_one_node_do_not_share_a_port(repo: FakeRepo):
    """Catches: two jobs that sit on one node and join each other's run. Below 32768 no system hands out ports."""
    ports = set()
    for job, step in ((1234, 0), (1234, 1), (1235, 0), (99_999_999, 0)):
        repo.run("nano", **STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        ports.add(int(repo.train.env["MASTER_PORT"]))
    assert len(ports) == 4 and min(ports) > 1024 and max(ports) < 32768


def test_a_task_that_sees_one_gpu_takes_that(repo: FakeRepo):
    """Catches: `srun --gpus-per-task=1`, where every task's only GPU is number 0, refused for want of a GPU 3."""
    repo.set_gpus(8)
    repo.run("small", **STEP, CUDA_VISIBLE_DEVICES="5")
    assert repo.train.env["LOCAL_RANK"] == "0"
    repo.set_gpus(1)
    repo.run("small", **STEP)
    assert repo.train.env["LOCAL_RANK"] == "0"


def test_two_real_tasks_end_with_the_same_run(tiny_data: Path, tmp_path: Path):
    """Catches: tasks that never meet, or write two logs: run.sh and train_gpt.py as they are, on this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    repo = FakeRepo(tmp_path)
    options = ["--data-dir", tiny_data, "--log-dir", tmp_path / "logs", "--device", "cpu", "--sample-tokens", "5"]
    command = ["bash", REPO / "run.sh", "nano", *tiny_options(), *options]
    environment = repo.env | STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
    environment |= {"MASTER_PORT": port, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    tasks = [
        subprocess.Popen(
            list(map(str, command)), env=environment | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}, **pipes
        )
        for rank in ("0", "1")
    ]
    said = [task.communicate(timeout=600) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert said[1] == ("", "")
    assert "parameters on 2 x cpu" in said[0][0] and said[0][0].count("sample:") == said[0][0].count("plot:") == 1
    assert sorted(path.suffix for path in (tmp_path / "logs").iterdir()) == [".jsonl", ".png", ".txt"]


def test_threads_of_several_cpu_processes(repo: FakeRepo):
    """torchrun's default of one thread each would leave cores idle; one process and a user's choice stay as is."""
    cores = int(subprocess.run(["nproc"], capture_output=True, text=True, env=repo.env).stdout or 1)
    for processes in (2, 2 * cores):
        repo.run("nano", NPROC=str(processes))
        assert repo.train.env["OMP_NUM_THREADS"] == str(max(1, cores // processes))
    repo.run("nano", NPROC="2", OMP_NUM_THREADS="7")
    assert repo.train.env["OMP_NUM_THREADS"] == "7"
    repo.run("nano")
    assert repo.train.env["OMP_NUM_THREADS"] is None
    repo.set_gpus(2)
    repo.run("small")
    assert repo.train.env["OMP_NUM_THREADS"] is None


def test_python_names_the_interpreter(repo: FakeRepo):
    other = repo.root.parent / "other python"
    repo.write_program(other, PYTHON.format(python=sys.executable))
    (repo.root.parent / "bin/python3").write_text("#!/bin/sh\nexit 99\n")
    repo.run("nano", PYTHON=str(other), LOG="run.txt")
    assert repo.scripts == ["nano.py", "train_gpt.py", "plot.py"]
    _, err = repo.run("nano", code=2, PYTHON="no-such-python")
    assert "no-such-python" in err


def test_an_interpreter_that_cannot_do_it_is_refused(repo: FakeRepo):
    """Catches: a traceback, or another program's complaint, before one word on what to do."""
    wrong = repo.root.parent / "wrong"
    fake_old = "import sys; sys.version_info = (3, 9, 0); exec(sys.argv[2])"
    for program, said in (
        (
            f'exec "{sys.executable}" -S "$@"',
            "lacks numpy, safetensors, torch, tqdm, tyro: .* -m pip install -r requirements",
        ),
        (f'exec "{sys.executable}" -c \'{fake_old}\' "$@"', "is Python 3.9, expected 3.11 or newer"),
        ("exit 9", "is no Python interpreter"),
    ):
        repo.write_program(wrong, f"#!/bin/sh\n{program}\n")
        for arguments in (["nano"], ["--help"]):
            process = repo.start(*arguments, PYTHON=str(wrong))
            out, err = process.communicate(timeout=60)
            assert (
                process.returncode == 2 and out == "" and re.search(f"^run.sh: error: .*{said}", err.splitlines()[-1])
            )
            assert "Traceback" not in err
    _, err = repo.run("nano", code=2, PYTHON=str(repo.root))
    assert "no Python interpreter" in err


def test_the_packages_that_run_sh_looks_for_are_those_that_train_gpt_imports():
    """Catches: a new import whose absence is a traceback."""
    tree = ast.parse((REPO / "train_gpt.py").read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    needed = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    (listed,) = re.findall(r"for name in \((.*)\) if find_spec", (REPO / "run.sh").read_text())
    assert set(re.findall(r"\w+", listed)) == needed


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_ends_the_run_in_order(repo: FakeRepo, gpus: int, name: str):
    """Sent to run.sh alone, it reaches the run, whose clean-up is waited for; a run that ignores it goes on."""
    number = getattr(signal, f"SIG{name}")
    handler = "signal.signal(signal.SIGTERM, sys.exit); signal.signal(signal.SIGHUP, sys.exit)"
    train_gpt = TRAIN_GPT.replace("import os, signal, sys, time", f"import os, signal, sys, time\n{handler}")
    (repo.root / "train_gpt.py").write_text(train_gpt.replace("sys.exit)", "lambda *_: sys.exit(1))"))
    repo.set_gpus(gpus)
    process = repo.start(SLEEP="30", LOG="run.txt")
    assert process.stdout.readline() == "training\n"
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == "cleaned up\n"
    assert process.returncode == 128 + number, err
    assert time.monotonic() - start < 10
    assert repo.leftovers == []
    assert "plot.py" not in repo.scripts


def test_a_run_that_outlives_signals_keeps_its_exit_code(repo: FakeRepo):
    """Twice Ctrl-C on a run that finishes its work all the same."""
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + TRAIN_GPT
    (repo.root / "train_gpt.py").write_text(ignoring)
    process = repo.start(SLEEP="1.5", LOG="run.txt")
    assert process.stdout.readline() == "training\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == "cleaned up\ntrained\nplot: run.png\n"


def test_ctrl_c_on_a_terminal_reaches_python(repo: FakeRepo):
    """The kernel signals the foreground group of a terminal, in which the run is not: run.sh has to pass it on."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        default_signals()
        os.chdir(repo.cwd)
        os.execvpe("bash", ["bash", str(repo.root / "run.sh"), "nano"], repo.env | {"SLEEP": "30"})
    output = b""
    try:
        while b"training" not in output:
            output += os.read(terminal, 1024)
        os.write(terminal, b"\x03")
        while True:
            output += os.read(terminal, 1024)
    except OSError:  # the terminal's other end is closed
        pass
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"cleaned up" in output and b"KeyboardInterrupt" in output
    assert os.waitstatus_to_exitcode(status) == 130


RANKS = """
import os, signal, sys, time
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
rank, fails = os.environ["RANK"], os.environ.get("FAIL")
line = f"rank {rank} of {os.environ['WORLD_SIZE']}: {sys.argv[1:]}\\n"
os.write(1, line.encode())  # in one piece: both ranks write to the same pipe
if fails == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if fails:
    time.sleep(1.5 if rank == "0" else 0)
    ErrorHandler().record_exception(ValueError(f"what rank {rank} found"))
    sys.exit(1)
"""


def test_the_real_torchrun(repo: FakeRepo):
    """Two ranks through torch's own launcher: ranks, arguments, a non-zero exit; last stands what was wrong first, and
    no page of torchrun's. Catches: a rank that was killed hidden by the errors of those that lost it."""
    (repo.root / "train_gpt.py").write_text(RANKS)
    out, _ = repo.run("nano", "--seed", "1", NPROC="2", PYTHON=sys.executable)
    assert sorted(out.splitlines()) == [f"rank {rank} of 2: ['nano', '--seed', '1']" for rank in (0, 1)]
    _, err = repo.run("nano", code=1, NPROC="2", PYTHON=sys.executable, FAIL="both")
    assert err.splitlines()[-1] == "error: ValueError: what rank 1 found" and "Root Cause" not in err
    _, err = repo.run("nano", code=1, NPROC="2", PYTHON=sys.executable, FAIL="killed")
    assert err.splitlines()[-1] == "error: rank 1 was killed by SIGKILL. See --save-every and --resume."
