"""records/check.py on made and forged logs: statistics against scipy, each rule broken in several ways."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import run_process, tiny_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

import accepted
import cached_fineweb10B
import nano
import train_gpt
from accepted import Accepted, Competition, Form
from records import check
from runlogs import Log, LogError, parse_log
from train_gpt import NANO

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "records" / "check.py"
OFFICIAL = accepted.ACCEPTED
TRAIN_GPT = REPO / "train_gpt.py"
REAL_SOURCE = TRAIN_GPT.read_text(encoding="utf-8")
# The numbers below are chosen for a target of 1.22, whatever the track's is.
SOURCE = REAL_SOURCE.replace(
    f'name="nano",\n    target_loss={NANO.target_loss},', 'name="nano",\n    target_loss=1.22,'
)
TRACKS = SOURCE[SOURCE.index("SMALL = Track(") : SOURCE.index("# Hot operations")]
BAR = f"# {'-' * 118}"
EXCERPT = "\n".join(  # the parts that rules are about: judged four times as fast as the whole
    (
        TRACKS,
        BAR,
        SOURCE[SOURCE.index("# Data: ") : SOURCE.index("LOSS_EVERY = ")],
        f"{BAR}\n# Run\n{BAR}",
        SOURCE[SOURCE.index("class Trainer:") : SOURCE.index("def train(track: Track")],
    )
)
LINE = "=" * 100
CPU = "CPU: AMD EPYC, 2 threads, AVX512"
PINS = {"nano_val_000000.bin": "a" * 64, "nano_train_000001.bin": "b" * 64}
OLD_PINS = {"nano_val_000000.bin": "c" * 64, "nano_train_000001.bin": "d" * 64}
NANO_NOW = Competition("nano", "nano", 1.22, 524288, 256, "nano", PINS)
CLOSED = replace(NANO_NOW, name="nano, until 2026-01-01: other bytes", shards=OLD_PINS)
FIRST = replace(
    NANO_NOW, name="nano, until 2025-01-01: another target", target_loss=1.4, shards={"nano_val_000000.bin": "e" * 64}
)
SMALL = Competition("small", "small", 3.28, 10485760, 50256, "fineweb10B")
LOSSES = (1.0812, 1.0790, 1.0835)
SLOW, FAST = (20.0, 20.2, 20.1), (10.0, 10.3, 10.1)


@pytest.fixture(scope="module", autouse=True)
def official(tmp_path_factory) -> Iterator[Path]:
    """An accepted.json of fixed numbers with the data code of train_gpt.py as it is."""
    path = tmp_path_factory.mktemp("official") / "accepted.json"
    form = Form("2026-02-03", "that of this moment", accepted.data_code(TRAIN_GPT))
    path.write_text(json.dumps(asdict(Accepted([SMALL, NANO_NOW, CLOSED, FIRST], [form]))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accepted, "ACCEPTED", path)
        yield path


def event_lines(loss: float, seconds: float, steps: int = 12) -> list[str]:
    """The lines of train_gpt.RunLog, at an even pace."""
    lines = []
    for step in range(1, steps + 1):
        at = seconds * step / steps
        clock = f"train_time:{1000 * at:.0f}ms step_avg:{1000 * at / step:.2f}ms"
        lines.append(f"step:{step}/{steps} {clock}")
        if step % 10 == 0 or step == steps:
            lines.append(f"step:{step}/{steps} train_loss:{loss + 0.5:.4f} {clock}")
    return [*lines, f"step:{steps}/{steps} val_loss:{loss:.4f} {clock}"]


def make_log(
    path, seed=0, loss=1.08, seconds=10.0, source=EXCERPT, lines=None, environment=CPU, data=PINS, **changes
) -> Path:
    """A log as train_gpt.py writes it. `changes` replaces settings ("data__bos" for data.bos); None drops one."""
    values = {
        "name": "nano",
        "target_loss": 1.22,
        "data.bos": 256,
        "data.val_tokens": 524288,
        "schedule.scheduled_steps": 10,
        "schedule.extension_steps": 2,
        "inductor": "{}",
        "seed": seed,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    header = ["Running Python 3.11", "Device: cpu x 1, dtype float32, compile False", environment]
    header += [f"{key}: {value}" for key, value in values.items() if value is not None]
    lines = event_lines(loss, seconds) if lines is None else lines
    end = [f"data: {name} 100 tokens sha256 {sha256}" for name, sha256 in data.items()]
    end.append("peak memory allocated: 100 MiB reserved: 200 MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([source, LINE, *header, LINE, *lines, *end]) + "\n", encoding="utf-8")
    return path


def make_set(folder: Path, losses=LOSSES, times=FAST, first_seed=0, **changes) -> list[Path]:
    pairs = enumerate(zip(losses, times, strict=True), first_seed)
    return [make_log(folder / f"{seed}.txt", seed, loss, seconds, **changes) for seed, (loss, seconds) in pairs]


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line, in this process."""
    try:
        code = check.main([str(argument) for argument in arguments])
    except SystemExit as end:  # of argparse
        code = end.code
    return code, *capsys.readouterr()


def run_json(capsys, *arguments: str | Path) -> dict:
    code, out, err = run(capsys, *arguments, "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == (1 if result["passed"] is False else 0) and not err
    return result


def rules(result: dict) -> set[str]:
    return {broken["rule"] for broken in result["broken"]}


def log_of(tmp_path: Path, **changes) -> Log:
    return parse_log(make_log(tmp_path / "run.txt", **{"source": "pass", **changes}))


# Statistics


def test_p_matches_scipy_and_a_table():
    # By hand: losses 1, 2, 3 against 4 are t = (2 - 4) / (1 / sqrt(3)) = -3.4641 with 2 degrees of freedom, whose
    # distribution function is 1/2 + t / (2 sqrt(2 + t^2)).
    p = check.t_test([1.0, 2.0, 3.0], 4.0, "less")[0]
    assert p == pytest.approx(0.5 - 3.4641016 / (2 * 14**0.5), abs=1e-7)
    losses = [3.2791, 3.2786, 3.2779, 3.2795, 3.2788]
    assert check.t_test(losses, 3.28, "less")[0] == stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert check.t_test(losses, 3.27, "less")[0] > 0.99


@pytest.mark.filterwarnings("error")
def test_p_without_variance_or_enough_values():
    assert check.t_test([1.08] * 3, 1.22, "less")[0] == 0.0
    assert check.t_test([1.22] * 3, 1.22, "less")[0] == check.t_test([1.3] * 3, 1.22, "less")[0] == 1.0
    assert check.t_test([1.08], 1.22, "less")[0] is None
    assert check.t_test([1.0, 1.0], [2.0, 2.0], "less")[0] == 0.0
    assert check.t_test([2.0, 2.0], [1.0, 1.0], "less")[0] == 1.0
    assert check.t_test([1.0, 1.0], [1.0, 1.0], "two-sided") == (1.0, [0.0, 0.0])
    assert check.t_test([1.0, 1.0], [2.0, 2.0], "two-sided") == (0.0, [-1.0, -1.0])
    assert check.t_test([1.0], [2.0, 2.0], "less") == (None, None)


def test_welch_matches_scipy_and_a_table():
    # By hand: means 2 and 7, variances of the means 1/3 and 4/3: t = -5 / sqrt(5/3) = -3.8730,
    # (5/3)^2 / ((1/9 + 16/9) / 2) = 2.9412 degrees of freedom.
    a, b = [1.0, 2.0, 3.0], [5.0, 7.0, 9.0]
    p, _ = check.t_test(a, b, "less")
    assert p == pytest.approx(stats.t.cdf(-5 / (5 / 3) ** 0.5, 2.9411765), rel=1e-6)
    assert p != pytest.approx(stats.ttest_ind(a, b, alternative="less").pvalue, rel=1e-2)  # Student's
    p, interval = check.t_test(a, b, "two-sided")
    half = stats.t.ppf(0.975, 2.9411765) * (5 / 3) ** 0.5
    assert interval == pytest.approx([-5 - half, -5 + half], rel=1e-6)
    assert p == stats.ttest_ind(a, b, equal_var=False).pvalue


def test_statistics_of_a_set(tmp_path, capsys):
    """A set with the repository's file as source passes, with the figures of its last lines."""
    make_set(tmp_path, source=SOURCE)
    result = run_json(capsys, tmp_path)
    assert result["passed"] is True and result["verdict"] == "pass" and result["broken"] == []
    assert (result["track"], result["competition"], result["target"], result["n"]) == ("nano", "nano", 1.22, 3)
    assert result["data"] == "verified"
    assert result["losses"] == list(LOSSES) and result["times"] == list(FAST)
    assert result["mean"] == pytest.approx(1.0812333333)
    assert result["std"] == pytest.approx(0.0022502, abs=1e-6)  # ddof = 1
    assert (result["time_mean"], result["time_median"]) == (pytest.approx(10.1333333), 10.1)
    assert result["time_std"] == pytest.approx(0.1527525)
    assert result["p"] == stats.ttest_1samp(LOSSES, 1.22, alternative="less").pvalue
    assert result["against"] is None
    code, out, _ = run(capsys, tmp_path)
    assert code == 0 and out.endswith("\npass\n") and "1.0812 1.0790 1.0835" in out and "median 10.100" in out


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ((1.23, 1.24, 1.25), "mean loss is not below"),
        ((1.0, 1.2, 1.4), "p of the loss"),  # mean 1.2, but too uncertain
        ((1.3, 1.3, 1.3), "p of the loss 1 "),
        ((1.08,), "at least 2 runs"),
    ],
)
def test_statistics_that_fail(tmp_path, capsys, losses, reason):
    paths = make_set(tmp_path, losses, FAST[: len(losses)])
    code, out, err = run(capsys, *paths)
    assert code == 1 and "\nfail: " in out and reason in out and not err


# --against


def test_against(tmp_path, capsys):
    ours, theirs = make_set(tmp_path / "ours"), make_set(tmp_path / "theirs", times=SLOW)
    result = run_json(capsys, *ours, "--against", tmp_path / "theirs")
    a = result["against"]
    assert result["passed"] and a["n"] == 3 and a["times"] == list(SLOW)
    assert a["time_difference"] == pytest.approx(-9.9666667) and a["ratio"] == pytest.approx(20.1 / 10.1333333)
    assert a["time_p"] == stats.ttest_ind(FAST, SLOW, equal_var=False, alternative="less").pvalue < 0.01
    low, high = stats.ttest_ind(FAST, SLOW, equal_var=False).confidence_interval(0.95)
    assert a["time_interval"] == [low, high] and low < -9.9666667 < high
    assert a["loss_p"] == pytest.approx(1.0)
    code, out, _ = run(capsys, *theirs, "--against", *ours)
    assert code == 1 and "fail: not faster" in out and "0.504 x as fast" in out
    code, out, _ = run(capsys, *ours, "--against", theirs[0])
    assert code == 1 and "at least 2 runs" in out


def test_against_wants_one_hardware_but_not_one_source(tmp_path, capsys):
    """The other runs need neither our source nor our seeds; the machine has to be the same."""
    ours = make_set(tmp_path / "ours")
    theirs = make_set(tmp_path / "theirs", times=SLOW, source="import torch._inductor", data__val_tokens=7)
    assert run_json(capsys, *ours, "--against", *theirs)["passed"]
    others = make_set(tmp_path / "others", times=SLOW, environment="CPU: Intel Xeon, 2 threads, AVX512")
    result = run_json(capsys, *ours, "--against", *others)
    assert rules(result) == {"hardware"} and "Intel Xeon" in result["broken"][0]["reason"] and not result["passed"]
    unnamed = make_set(tmp_path / "unnamed", times=SLOW, environment="")
    assert run_json(capsys, *ours, "--against", *unnamed)["passed"]


def test_hardware_reads_nvidia_smi():
    row = "|   {}  NVIDIA {}          On  |   00000000:19:00.0 Off |                    0 |\n| N/A   34C    P0   ..."
    logs = [
        Log(Path(name), None, "\n".join(row.format(i, name) for i in range(n)), {"Device": f"cuda x {n}, x"}, [])
        for name, n in (("H100 80GB HBM3", 2), ("H100 80GB HBM3", 2), ("H200", 2), ("H100 80GB HBM3", 1))
    ]
    assert logs[0].hardware["GPU"] == "2 x NVIDIA H100 80GB HBM3"
    assert [log for _, log, _ in check.hardware(logs)] == [logs[2], logs[3], logs[3]]


def test_against_broken_logs_are_refused(tmp_path, capsys):
    ours = make_set(tmp_path / "ours")
    theirs = make_set(tmp_path / "theirs", times=SLOW)
    text = theirs[0].read_text()
    theirs[0].write_text(text.replace("train_time:20000ms", "train_time:30000ms"))
    theirs[1].write_text(theirs[1].read_text().replace("peak memory", "incomplete run"))
    assert rules(run_json(capsys, *ours, "--against", *theirs)) == {"clock", "complete"}
    theirs[0].write_text(text.replace("name: nano", "name: small"))
    assert "track" in rules(run_json(capsys, *ours, "--against", *theirs))


def test_systems_only(tmp_path, capsys):
    """The p of the loss may be large; the mean, the speed and the equal losses may not be missing."""
    noisy = (1.19, 1.20, 1.25)
    ours, theirs = make_set(tmp_path / "ours", noisy), make_set(tmp_path / "theirs", noisy, SLOW)
    assert not run_json(capsys, *ours, "--against", *theirs)["passed"]
    assert run_json(capsys, *ours, "--against", *theirs, "--systems-only")["passed"]
    assert not run_json(capsys, *theirs, "--against", *ours, "--systems-only")["passed"]
    better = make_set(tmp_path / "better", (1.10, 1.101, 1.102), SLOW)
    close = make_set(tmp_path / "close", (1.11, 1.111, 1.112), FAST)
    code, out, _ = run(capsys, *close, "--against", *better, "--systems-only")
    assert code == 1 and "fail: the losses differ" in out
    bad = [make_set(tmp_path / f"bad{i}", (1.23, 1.24, 1.25), times) for i, times in enumerate((FAST, SLOW))]
    code, out, _ = run(capsys, *bad[0], "--against", *bad[1], "--systems-only")
    assert code == 1 and "mean loss" in out
    code, out, err = run(capsys, *ours, "--systems-only")
    assert code == 2 and "--systems-only needs --against" in err


# Rules of a log: complete, clock, validation, duplicates, source, track


def replace_lines(*pairs: tuple[str, str]):
    def forge(lines: list[str]) -> list[str]:
        text = "\n".join(lines)
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new, 1)
        return text.split("\n")

    return forge


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda lines: lines[:-1], "no final validation at step 12: there is none"),
        (replace_lines(("step:12/12 val_loss", "step:11/12 val_loss")), "the last one is of step 11"),
        (replace_lines(("step:3/12", "step:3/13")), "one total of steps: 12, 13"),
        (lambda lines: lines[:4] + lines[5:], "no line of step 5"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "step 1 after step 2"),
        (replace_lines(("val_loss:1.0800", "val_loss:nan")), "validation loss is nan"),
        (lambda lines: [*lines, "incomplete run: stopped after 12 of 20 steps by --max-steps"], "incomplete run"),
        (lambda lines: ["resumed with --force from another source", *lines], "--force"),
        (lambda lines: [line.replace("/12", "/13") for line in lines], "no final validation at step 13"),
        (lambda lines: [line.replace("/12", "") for line in lines], "one total of steps: None"),
        (lambda lines: [*lines, "step:13/12 train_time:11000ms step_avg:846.15ms"], "beyond its last step"),
    ],
)
def test_complete_is_broken(tmp_path, forge, reason):
    assert list(check.complete(log_of(tmp_path))) == []
    forged = log_of(tmp_path, lines=forge(event_lines(1.08, 10.0)))
    assert any(reason in found for found in check.complete(forged)), list(check.complete(forged))


def test_complete_of_header_and_end(tmp_path):
    wrong = log_of(tmp_path, schedule__scheduled_steps=20)
    assert list(check.complete(wrong)) == ["12 steps, but the settings say 20 + 2"]
    wrong = log_of(tmp_path, schedule__scheduled_steps="many")
    assert list(check.complete(wrong)) == ["12 steps, but the settings say many + 2"]
    assert "begin with the text" in next(check.complete(log_of(tmp_path, source="")))
    path = make_log(tmp_path / "run.txt", source="pass")
    text = path.read_text()
    for end in ("MiB\n", " reserved: 200 MiB\n", "peak memory allocated: 100 MiB reserved: 200 MiB\n"):
        path.write_text(text.removesuffix(end))
        assert "cut off" in next(check.complete(parse_log(path)))
    head, _, lines = text.split(LINE)
    path.write_text(f"{head}{LINE}\n{LINE}{lines}")
    assert "no environment" in next(check.complete(parse_log(path)))


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (replace_lines(("train_time:2500ms ", "train_time:2400ms ")), "its average over 3 steps gives 2.500 s"),
        (lambda lines: [lines[4], *lines], "the clock falls"),
        (replace_lines(("train_time:2500ms step_avg", "step_avg")), "no training time"),
        (replace_lines(("train_time:2500ms step_avg:833.33ms", "train_time:2500ms")), "no average"),
        (lambda lines: [line.split(" step_avg")[0] for line in lines], "no average"),
        (
            lambda lines: [*lines[:-1], lines[-1].replace("step_avg:833.33ms", "step_avg:nanms")],
            "over 12 steps gives nan s",
        ),
        (replace_lines(("step_avg:833.33ms", "step_avg:nanms")), "average over"),  # the other averages count all steps
    ],
)
def test_clock_is_broken(tmp_path, forge, reason):
    assert list(check.clock(log_of(tmp_path))) == []
    forged = log_of(tmp_path, lines=forge(event_lines(1.08, 10.0)))
    assert any(reason in found for found in check.clock(forged)), list(check.clock(forged))


def test_clock_allows_rounding(tmp_path):
    """Times rounded to 1 ms and averages to 0.01 ms do not break it: 6000 steps of 15.3791 ms."""
    lines = [f"step:{i}/6000 train_time:{i * 15.3791:.0f}ms step_avg:15.38ms" for i in range(1, 6001)]
    assert list(check.clock(log_of(tmp_path, lines=lines))) == []
    lines[2999] = lines[2999].replace("train_time:46137ms", "train_time:46197ms")
    assert len(list(check.clock(log_of(tmp_path, lines=lines)))) == 2  # its average, and the fall after it


def test_clock_of_public_logs_without_averages(tmp_path):
    """Catches: the logs of other programs, to be faster than, refused for what they never had."""
    lines = [line.split(" step_avg")[0] for line in event_lines(1.08, 10.0)]
    assert list(check.clock(log_of(tmp_path, name=None, lines=lines))) == []


@pytest.mark.parametrize(
    ("old", "new", "changes", "reason"),
    [
        ("", "", {"data__val_tokens": 1024}, "data.val_tokens is 1024, officially 524288"),
        ("", "", {"data__val_tokens": None}, "data.val_tokens is None"),
        ("", "", {"target_loss": 1.5}, "target_loss is 1.5, officially 1.22"),
        ("val_tokens=524_288", "val_tokens=1024", {}, "val_tokens is not 524288"),
        ("val_tokens=524_288", "val_tokens=int('1024')", {}, "val_tokens is not 524288"),
        ("val_tokens=524_288,", "", {}, "does not spell out val_tokens"),
        ('name="nano"', 'name="mini"', {}, "0 calls Track(name='nano'"),
        ("NANO = Track(", 'OTHER = Track(name="nano", data=DataConfig(val_tokens=1))\nNANO = Track(', {}, "2 calls"),
    ],
)
def test_validation_is_broken(tmp_path, old, new, changes, reason):
    assert TRACKS.count(old) == 1 or not old
    log = log_of(tmp_path, source=TRACKS.replace(old, new) if old else TRACKS, **changes)
    found = [*NANO_NOW.unofficial(log), *NANO_NOW.unofficial_in(ast.parse(log.source))]
    assert any(reason in text for text in found), found
    honest = log_of(tmp_path, source=TRACKS)
    assert [*NANO_NOW.unofficial(honest), *NANO_NOW.unofficial_in(ast.parse(TRACKS))] == []


@pytest.mark.parametrize(("name", "target"), [("small", 3.28), ("medium", 2.92), ("xl", 2.77)])
def test_validation_of_tracks_that_share_their_data(tmp_path, name, target):
    """Catches: `medium` and `xl`, whose data are replace(SMALL.data, ...), never pass; or pass with other numbers."""
    competition = replace(SMALL, name=name, track=name, target_loss=target)
    settings = {"name": name, "target_loss": target, "data__bos": 50256, "data__val_tokens": 10485760}
    log = log_of(tmp_path, source=TRACKS, **settings)
    assert [*competition.unofficial(log), *competition.unofficial_in(ast.parse(TRACKS))] == []
    forged = TRACKS.replace("val_tokens=10_485_760", "val_tokens=1024")
    assert any("val_tokens is not 10485760" in r for r in competition.unofficial_in(ast.parse(forged)))


def test_duplicates(tmp_path, capsys):
    a, b, c = make_set(tmp_path)
    assert rules(run_json(capsys, a, b, c, a)) == {"duplicates"}
    copy = make_log(tmp_path / "copy" / "x.txt", 99, LOSSES[0], FAST[0])  # another seed in the header
    result = run_json(capsys, a, b, c, copy)
    assert result["broken"] == [{"file": str(copy), "rule": "duplicates", "reason": result["broken"][0]["reason"]}]
    assert "all lines are equal" in result["broken"][0]["reason"]
    again = make_log(tmp_path / "again" / "x.txt", 1, 1.07, 9.9)
    result = run_json(capsys, a, b, c, again)
    assert [broken["reason"] for broken in result["broken"]] == [f"seed 1, as in {b}"]


def test_source_and_track_have_to_agree(tmp_path, capsys):
    paths = make_set(tmp_path)
    paths[1].write_text(paths[1].read_text().replace("n = data.val_row_tokens", "n =  data.val_row_tokens"))
    result = run_json(capsys, *paths)
    line = EXCERPT[: EXCERPT.index("n = data.val_row_tokens")].count("\n") + 1
    assert rules(result) == {"source"} and result["broken"][0]["reason"].endswith(f"first at line {line}")
    paths = make_set(tmp_path)
    paths[2].write_text(paths[2].read_text().replace("name: nano", "name: small"))
    assert "track" in rules(run_json(capsys, *paths))
    assert "track" in rules(run_json(capsys, paths[2], paths[0], paths[1], "--track", "nano"))
    paths[2].write_text(paths[2].read_text().replace("name: small\n", ""))
    assert "track" in rules(run_json(capsys, *paths))


def test_source_that_is_not_python(tmp_path, capsys):
    paths = make_set(tmp_path, source="int main() { return 0; }")
    result = run_json(capsys, *paths)
    assert rules(result) == {"source"} and "not Python" in result["broken"][0]["reason"]
    deep = f"{EXCERPT}\na{'.b' * 1500} = 1"  # parses, but is too deep for functions that follow it
    result = run_json(capsys, *make_set(tmp_path, source=deep))
    assert rules(result) & {"data", "source"} and not result["passed"]


# Rule: options

SETS = """
    config = torch._inductor.config
    config.max_autotune, config.triton.cudagraphs, config.coordinate_descent_tuning = True, False, True
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    compiled(abs), compiled(abs, mode="max-autotune-no-cudagraphs"), torch.compile(abs, backend="eager")
    os.environ["TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE"] = "1"
"""


def test_a_run_says_what_it_set_of_inductor(tiny_data, tmp_path):
    """Catches: an option that a run sets under any name, in inductor or in torch.compile, and that the judge misses."""
    begin = "    trainer = Trainer(track, runtime, data_dir, options.seed)\n"
    assert REAL_SOURCE.count(begin) == 1
    forged = "import torch._inductor.config" + SETS
    (tmp_path / "train_gpt.py").write_text(REAL_SOURCE.replace(begin, f"    {forged}{begin}"))
    words = [*tiny_options(), "--data-dir", tiny_data, "--log-dir", tmp_path, "--device", "cpu", "--max-steps", 1]
    done = run_process([sys.executable, tmp_path / "train_gpt.py", "nano", *words, "--no-warmup"])
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.txt")
    found = [*check.options(parse_log(path), "nano")]
    assert sorted(reason.removeprefix("settings: inductor has ") for reason in found) == [
        "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE = 1",
        "coordinate_descent_tuning = True",
        "max_autotune = True",
        "torch.compile: backend = eager",
        "torch.compile: coordinate_descent_tuning = True",
        "torch.compile: max_autotune = True",
    ]
    assert len([*check.options(parse_log(path), "medium")]) == 5


@pytest.mark.parametrize(
    ("said", "nano", "medium"),
    [
        ("{}", True, True),
        ('{"coordinate_descent_tuning": true}', False, True),
        ('{"torch.compile: coordinate_descent_tuning": true}', False, False),
        ('{"epilogue_fusion": NaN}', False, False),
        ("", False, False),
        ("[1]", False, False),
    ],
)
def test_what_a_run_says_counts_and_not_its_source(tmp_path, capsys, said, nano, medium):
    """Catches: `medium` without its tuning, or another track with it; a line that is no JSON taken for "nothing"."""
    log = log_of(tmp_path, inductor=said, source="import torch._inductor")
    assert [not [*check.options(log, track)] for track in ("nano", "medium")] == [nano, medium]
    result = run_json(capsys, *make_set(tmp_path / "set", inductor=said))
    assert rules(result) == (set() if nano else {"options"}) and result["passed"] == nano


TUNES = "from torch._inductor import config as inductor\ninductor.coordinate_descent_tuning = track."


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch._inductor.config.max_autotune = True", [1]),
        ("import torch._inductor.config as c\nc.max_autotune = True", [1]),
        (TUNES + "coordinate_descent_tuning\ninductor.max_autotune = True", [3]),
        (TUNES + "tuned", [2]),
        ("\nos.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'", [2]),
        ("f = torch.compile(f, mode='max-autotune')", [1]),
        ("@torch.compile(options={'x': 1})\ndef f(): pass\n\nmodel.compile(backend='eager')", [1, 4]),
        ("f = functools.partial(torch.compile, dynamic=False, mode='max-autotune')(f)", [1]),
        ("f = torch.compile(\n    make(f),\n    mode='max-autotune',\n)", [1]),
        (TUNES + "coordinate_descent_tuning", []),
        ("f = torch.compile(f, dynamic=False, fullgraph=True)\nrun(f, mode='fast')", []),
        ("torch._dynamo.config.recompile_limit = 64\nre.compile('x', options='y')", []),
    ],
)
def test_without_that_line_the_source_is_searched_as_text(tmp_path, source, lines):
    """Catches: logs of other programs, or ours of before, whose options nobody looks at; their own tuning forbidden."""
    found = [*check.options(log_of(tmp_path, source=source, inductor=None, coordinate_descent_tuning=False), "nano")]
    assert [int(re.match(r"line (\d+) of its source, found by a search of its text: ", f)[1]) for f in found] == lines


def test_tuning_in_a_text_is_free_on_medium_or_where_it_is_off(tmp_path):
    ours, theirs = TUNES + "coordinate_descent_tuning", "torch._inductor.config.coordinate_descent_tuning = True"
    for source, setting, track, offences in (
        (ours, True, "nano", 2),
        (ours, None, "nano", 2),
        (ours, True, "medium", 0),
        (theirs, True, "nano", 1),
        (theirs, None, "medium", 0),
    ):
        log = log_of(tmp_path, source=source, inductor=None, coordinate_descent_tuning=setting)
        assert len([*check.options(log, track)]) == offences, (source, setting, track)


# Rule: data


def data_reasons(source: str) -> list[str]:
    return list(accepted.unaccepted(ast.parse(source), Accepted.read().data_code))


def test_data_of_the_real_source():
    """The file, and the file followed by the baseline's: what its log starts with."""
    baseline = (REPO / "tests" / "benchmarks" / "gpt2_baseline.py").read_text(encoding="utf-8")
    assert data_reasons(SOURCE) == data_reasons(f"{SOURCE}\n{baseline}") == data_reasons(EXCERPT) == []
    names = Accepted.read().data_code[0].digests.keys()
    assert {"Shard", "Loader", "make_row", "validation_rows", "SHARD_MAGIC", "HEADER_INTS", "Trainer.validate"} <= names
    assert "Trainer" not in names


def test_data_may_move_and_change_its_comments():
    begin, end = SOURCE.index("def make_row("), SOURCE.index("def validation_tokens(")
    moved = SOURCE[:begin] + SOURCE[end:] + "\n# moved\n" + SOURCE[begin:end].replace('"""A row', '"""Some row')
    assert moved != SOURCE and data_reasons(moved) == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("n = data.val_row_tokens", "n = data.val_row_tokens // 2", "validation_rows (line"),
        ("need = [], {}, 0, track.data.val_tokens + 1", "need = [], {}, 0, 1000", "validation_tokens (line"),
        (".item() / self.track.data.val_tokens", ".item() / 2**20", "Trainer.validate (line"),
        ("    def validate(", "    def evaluate(", "Trainer.validate is defined 0 times"),
        ("class Trainer:", "class Coach:", "Trainer is defined 0 times"),
        ("    @torch.no_grad()\n    def validate(", "    def validate(", "Trainer.validate (line"),
        ("    def warm_up(", "    validate = cheat\n\n    def warm_up(", "Trainer.validate is defined 2 times"),
    ],
)
def test_data_is_changed(old, new, reason):
    assert SOURCE.count(old) == EXCERPT.count(old) == 1
    found = data_reasons(EXCERPT.replace(old, new))
    assert any(text.startswith(reason) for text in found), found


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("def make_row(*a): return 0", "make_row is defined 2 times"),
        ("HEADER_INTS += 1", "HEADER_INTS is defined 2 times"),
        ("from mine import make_row", "make_row is defined 2 times"),
        ("if True:\n    def make_row(): pass", "make_row is defined 2 times"),
        ("class Trainer(Trainer):\n    def validate(self, *a): return 1.0", "Trainer is defined 2 times"),
        ("def f():\n    global make_row\n    make_row = None", "global make_row"),
        ("Trainer.validate = lambda *a: 1.0", "Trainer.validate is assigned"),
        ("Loader._row = mine", "Loader._row is assigned"),
        ("setattr(Trainer, 'validate', f)", "setattr"),
        ("setattr(Shard, 'read', f)", "setattr"),
        ("setattr(sys.modules[__name__], 'Shard', f)", "setattr"),
        ("sys.modules[__name__].Shard = f", "sys.modules[__name__].Shard is assigned"),
        ("import __main__; __main__.Shard = f", "__main__.Shard is assigned"),
        ("globals()['Shard'] = f", "globals() is assigned to"),
        ("map = f", "map of Python is defined anew"),
        ("class Mine(Loader):\n    def next(self, step): return []", "class Mine derives from Loader"),
        ("class Mine(Trainer):\n    def validate(self): return 1.0", "class Mine has its own validate"),
    ],
)
def test_data_is_shadowed(extra, reason):
    """Also in the text of another program that follows."""
    found = data_reasons(f"{EXCERPT}\n{extra}\n")
    assert any(reason in text for text in found), found


def test_data_of_other_programs(tmp_path, capsys):
    assert data_reasons("print('hello')") == [
        "not this repository's train_gpt.py: cannot be judged by rule; use --no-rules for its statistics"
    ]
    result = run_json(capsys, *make_set(tmp_path, source="print('hello')"))
    assert rules(result) == {"data", "validation"}


def test_accept(tmp_path, capsys, monkeypatch):
    """Catches: old logs that fail after a change of the data code was accepted, new ones that pass before."""
    monkeypatch.setattr(accepted, "REPO", tmp_path)
    monkeypatch.setattr(accepted, "ACCEPTED", shutil.copy(accepted.ACCEPTED, tmp_path / "accepted.json"))
    changed = EXCERPT.replace("n = data.val_row_tokens", "n = 2 * data.val_row_tokens")
    (tmp_path / "train_gpt.py").write_text(changed)
    old, new = make_set(tmp_path / "old", source=EXCERPT), make_set(tmp_path / "new", source=changed)
    result = run_json(capsys, *new)
    assert rules(result) == {"data"}
    assert result["broken"][0]["reason"].endswith("differs from the form accepted on 2026-02-03: that of this moment")
    code, out, err = run(capsys, "--accept", "longer rows")
    assert code == 0 and out.startswith("accepted: ") and not err
    assert run_json(capsys, *old)["passed"] and run_json(capsys, *new)["passed"]
    assert [form.why for form in Accepted.read().data_code] == ["that of this moment", "longer rows"]
    code, out, _ = run(capsys, "--accept", "again")
    assert code == 0 and "already: longer rows" in out and len(Accepted.read().data_code) == 2

    mixed = changed.replace("count *= 4", "count *= 2")
    reasons = data_reasons(mixed)
    assert len(reasons) == 1 and "Shard (line" in reasons[0] and reasons[0].endswith(": longer rows")
    for text in ("pass", "def (", "\0"):
        (tmp_path / "train_gpt.py").write_text(text)
        code, _, err = run(capsys, "--accept", "nothing")
        assert code == 2 and "train_gpt.py" in err
    (tmp_path / "accepted.json").write_text("[]")
    code, _, err = run(capsys, *old)
    assert code == 2 and "accepted.json: cannot be read" in err
    code, _, err = run(capsys)
    assert code == 2 and "expected logs" in err


def test_the_form_of_the_moment_is_accepted():
    """Catches: a change of the data code, of a target or of the data without an entry in accepted.json."""
    found = json.loads(OFFICIAL.read_text())
    assert accepted.data_code(TRAIN_GPT) in [form["digests"] for form in found["data_code"]], (
        "look at the change, then: python records/check.py --accept WHY"
    )
    official = {entry["name"]: Competition(**entry) for entry in found["competitions"]}
    assert [*official][:4] == ["small", "medium", "xl", "nano"]
    for track in (train_gpt.SMALL, train_gpt.MEDIUM, train_gpt.XL, NANO):
        pins = [nano.VAL_SHARD, nano.TRAIN_SHARD] if track is NANO else []
        data = track.data
        numbers = (track.target_loss, data.val_tokens, data.bos, data.dataset)
        shards = {name: nano.PINNED_SHA256[name] for name in pins}
        assert official[track.name] == Competition(track.name, track.name, *numbers, shards)


PUBLISHED = sorted(path for path in (REPO / "records").rglob("20??-??-??_*") if path.is_dir())


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_published_records_keep_their_rules(folder, capsys, monkeypatch):
    """Catches: a published log that a change of train_gpt.py, of the judge or of Python's version makes an offender."""
    monkeypatch.setattr(accepted, "ACCEPTED", OFFICIAL)
    logs = sorted(folder.glob("*.txt"))[:2]
    # Their READMEs say why.
    known = {"2026-11-21_gpt2_tuned": {"options"}, "2026-11-24_gpt2_tuned": {"validation"}}
    assert rules(run_json(capsys, *logs)) == known.get(folder.name, set())


# What does not depend on the version of Python


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (
            "def f(a, b):\n    return a + b",
            "def f(\n    a,\n    b,\n):\n    'Adds.'\n    # both\n    return (a + b)",
            True,
        ),
        ("class A:\n    'Nothing.'", "class A:\n    pass", True),
        ("x = 'a' 'b'; y = u'c'", "x = \"ab\"; y = 'c'", True),
        ("x = f'{a!r:>{n}}b'", 'x = f"{a!r:>{n}}" "b"', True),
        ("x = f'{a}'", "x = f'{a:{b}}'", False),
        ("x = 1", "x = 1.0", False),
        ("x = 'None'", "x = None", False),
        ("x = {**a}", "x = {None: a}", False),
        ("def f(*, a=None, b): pass", "def f(*, a, b=None): pass", False),
        ("def f():\n    return", "def f():\n    return None", False),
    ],
)
def test_canonical_text(one, other, equal):
    texts = [accepted.canonical(ast.parse(source).body) for source in (one, other)]
    assert (texts[0] == texts[1]) == equal


def test_digests_are_those_of_other_versions_of_python():
    """Catches: a digest with fields that a version of Python adds. Compares as many versions as this machine has."""
    script = "import accepted, ast, sys; print(*map(accepted.digest, ast.parse(sys.stdin.read()).body))"
    text = f"{REAL_SOURCE}\nx = f'{{a:{{n}}}} {{b=!r:>{{n}}}}'\n"
    here = [accepted.digest(statement) for statement in ast.parse(text).body]
    others = [f"python3.{minor}" for minor in (11, 12, 13, 14) if minor != sys.version_info.minor]
    found = []
    for command in filter(shutil.which, others):
        done = subprocess.run(
            [command, "-X", "utf8", "-c", script],
            cwd=REPO / "records",
            input=text,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            found.append(done.stdout.split())
    if not found:
        pytest.skip("there is no other version of Python here")
    assert all(digests == here for digests in found)


# The shards that were read


def test_data_lines_are_read(tmp_path):
    lines = [*event_lines(1.08, 10.0), f"data: a.bin 7 tokens sha256 {'0' * 64}", "data: b.bin 7 tokens sha256 12"]
    log = parse_log(make_log(tmp_path / "run.txt", lines=[*lines, f"data: a.bin 7 tokens sha256 {'1' * 64}"]))
    assert [*log.data] == ["a.bin", *PINS] and log.data["a.bin"] == (7, "0" * 64)
    assert [note.split()[1] for note in log.notes[:-1]] == ["b.bin", "a.bin"]  # what is cut off, or a second time


TRAIN, VAL = "nano_train_000001.bin", "nano_val_000000.bin"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PINS | {TRAIN: "e" * 64}, f"{TRAIN} has SHA-256 {'e' * 64}, officially {'b' * 64}"),
        (PINS | {"nano_train_000002.bin": "b" * 64}, "read nano_train_000002.bin: not of the official data"),
        ({TRAIN: PINS[TRAIN]}, f"its val shards are none, expected {VAL}"),
        ({VAL: PINS[VAL]}, f"its train shards are none, expected {TRAIN}"),
        (PINS | {TRAIN: "b" * 60}, f"found 'data: {TRAIN} 100 tokens sha256 bbb"),
    ],
)
def test_shards_that_are_not_the_official_ones(tmp_path, capsys, data, reason):
    result = run_json(capsys, *make_set(tmp_path, data=data))
    assert rules(result) == {"data"} and any(reason in broken["reason"] for broken in result["broken"]), result[
        "broken"
    ]
    assert result["verdict"].startswith("fail: ") and result["data"].startswith("not verified")


def test_logs_of_a_set_read_the_same(tmp_path, capsys):
    paths = make_set(tmp_path)
    paths[1].write_text(paths[1].read_text().replace("100 tokens", "101 tokens"))
    result = run_json(capsys, *paths)
    assert [b["reason"] for b in result["broken"]] == [f"its data lines differ from those of {paths[0]}"]
    paths = [*make_set(tmp_path)[:2], make_log(tmp_path / "2.txt", 2, data={})]
    assert rules(run_json(capsys, *paths)) == {"data", "track"}  # the last one is of the closed competition


def test_repeated_data_do_not_compare(tmp_path, capsys):
    result = run_json(capsys, *make_set(tmp_path, data__epochs=2))
    assert rules(result) == {"data"} and "data.epochs is 2" in result["broken"][0]["reason"]
    assert run_json(capsys, *make_set(tmp_path, data__epochs=1))["passed"]


def test_shards_of_fineweb_are_those_of_the_sidecar(tmp_path, monkeypatch):
    """Known ones have to be right; of others the verdict says that they are unverified; the order is the dataset's."""
    dataset = cached_fineweb10B.DATASETS["fineweb10B"]
    val, *train = names = dataset.shard_names(3)
    monkeypatch.setattr(accepted, "REPO", tmp_path)
    sha256 = {name: f"{i:064x}" for i, name in enumerate(names)}
    settings = {"name": "small", "target_loss": 3.28, "data__bos": 50256, "data__val_tokens": 10485760}

    def judged(*read: str, **other: str) -> tuple[list[str], str]:
        log = log_of(tmp_path, data={name: sha256[name] for name in read} | other, **settings)
        reasons = list(check.shards(log, SMALL.official_shards()))
        broken = [{"rule": "data", "reason": reason} for reason in reasons]
        return reasons, check.data_state([log], SMALL, broken).partition(":")[0]

    assert judged(val, *train) == ([], "unverified")  # nothing was downloaded here
    folder = tmp_path / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    shards = {name: {"sha256": sha256[name], "size": 1, "mtime_ns": 1} for name in names}
    sidecar = {"repo": dataset.repo, "shards": shards}
    (folder / "sha256.json").write_text(json.dumps(sidecar))
    assert judged(val, *train) == judged(*train[:2], val) == ([], "verified")
    assert judged() == ([], "unverified")
    assert judged(val, train[1], train[0])[0] == [
        f"its train shards are {train[1]}, {train[0]}, expected {train[0]} and what follows, in order"
    ]
    assert "expected fineweb_train_000001.bin" in judged(val, *train[1:])[0][0]
    reasons, state = judged(val, *train, **{"finewebedu_train_000004.bin": "0" * 64})
    assert "finewebedu_train_000004.bin: not of the official data" in reasons[0] and state == "not verified"
    assert judged(val, **{train[0]: "f" * 64})[0][0].startswith(f"{train[0]} has SHA-256 fff")
    assert judged(val, *train, **{"fineweb_train_000004.bin": "f" * 64}) == ([], "unverified")
    (folder / "sha256.json").write_text(json.dumps(sidecar | {"repo": "another"}))
    assert judged(val, *train) == ([], "unverified")


# Competitions that are closed


def test_a_log_is_judged_by_the_competition_of_its_time(tmp_path, capsys):
    """Catches: an old log that is held against today's target or data, or passes for one of today's."""
    old = {"target_loss": 1.4, "source": EXCERPT.replace("target_loss=1.22", "target_loss=1.4"), "data": {}}
    code, out, _ = run(capsys, *make_set(tmp_path / "first", (1.31, 1.32, 1.33), **old))
    assert code == 0 and out.endswith("\npass, data unverified\n") and "target 1.4" in out
    assert f"a competition that is closed: {FIRST.name}\n" in out
    result = run_json(capsys, *make_set(tmp_path / "closed", data={}))
    assert (result["competition"], result["data"][:10]) == (CLOSED.name, "unverified") and result["passed"]
    result = run_json(capsys, *make_set(tmp_path / "shards", data=OLD_PINS))
    assert (result["competition"], result["data"]) == (CLOSED.name, "verified") and result["passed"]
    assert run_json(capsys, *make_set(tmp_path / "now"))["competition"] == "nano"
    # Nothing beside a log changes what it is judged by.
    own = make_set(tmp_path / "own", (1.31, 1.32, 1.33), target_loss=1.5)
    (tmp_path / "own" / "accepted.json").write_text(json.dumps(asdict(replace(NANO_NOW, target_loss=1.5))))
    (tmp_path / "own" / "README.md").write_text("target_loss: 1.5")
    result = run_json(capsys, tmp_path / "own")
    assert result["target"] == 1.22 and not result["passed"] and "validation" in rules(result)
    assert len(own) == result["n"]


def test_competitions_are_not_mixed(tmp_path, capsys):
    ours, theirs = make_set(tmp_path / "ours"), make_set(tmp_path / "theirs", times=SLOW, data=OLD_PINS)
    result = run_json(capsys, *ours, "--against", *theirs)
    assert rules(result) == {"track"} and len(result["broken"]) == 3
    assert result["broken"][0]["reason"] == f"its competition is '{CLOSED.name}', not 'nano'"


# Logs of other programs, and what is no log

PUBLIC = {
    "without averages": [f"step:{i}/20 val_loss:{3.2 + i / 1000} train_time:{i * 100}ms" for i in (0, 10, 20)],
    "llm.c": ["s:0 tel:10.9", "s:250 tel:4.1", "s:500 trl:3.3", "s:500 tel:3.22"],
    "nan averages": [
        *(f"step:{i}/20 train_loss:5.0 train_time:{i}ms step_avg:nanms" for i in range(1, 12)),
        *(f"step:{i}/20 train_loss:5.0 train_time:{(i - 10) * 50}ms step_avg:50.00ms" for i in range(12, 21)),
        "step:20/20 val_loss:3.22 train_time:500ms step_avg:50.00ms",
    ],
    "seconds": ["step:10/20 train_loss:5.0 train_time:1.5s", "step:20/20 val_loss:3.22 train_time:3.0s"],
    "no totals": ["step:10 val_loss:4.0 train_time:10ms", "step:20 val_loss:3.22 train_time:20ms step_avg:1.00ms"],
}


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_logs(tmp_path, capsys, kind):
    paths = []
    for i, loss in enumerate((3.22, 3.2205, 3.221)):
        paths.append(tmp_path / f"{i}.log")
        lines = [*PUBLIC[kind][:-1], PUBLIC[kind][-1].replace("3.22", str(loss))]
        paths[-1].write_text("\n".join(["import torch", LINE, "Running PyTorch", LINE, *lines]))
    result = run_json(capsys, *paths, "--no-rules", "--track", "small")
    assert result["losses"] == [3.22, 3.2205, 3.221] and result["p"] < 0.01 and result["target"] == 3.28
    bad = tmp_path / "bad.log"  # would silently drop out of the mean
    bad.write_text(f"{LINE}\n{LINE}\nstep:20/20 val_loss:nan train_time:500ms")
    code, _, err = run(capsys, *paths, bad, "--no-rules", "--track", "small")
    assert code == 2 and "bad.log: no finite loss" in err
    assert result["passed"] is None and result["verdict"] == "statistics only" and result["broken"] == []
    assert len(result["times"]) == (0 if kind == "llm.c" else 3)
    code, out, _ = run(capsys, *paths, "--no-rules", "--track", "small", "--against", *paths)
    assert code == 0 and out.endswith("statistics only\n")
    code, _, err = run(capsys, *paths, "--no-rules")
    assert code == 2 and "add --track" in err
    result = run_json(capsys, *paths, "--track", "small")
    assert "data" in rules(result)
    assert any("use --no-rules" in broken["reason"] for broken in result["broken"])


def test_user_errors(tmp_path, capsys):
    """One message, exit code 2, no traceback."""
    good = make_log(tmp_path / "good.txt", source="pass")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "zeros.txt").write_bytes(bytes(99))
    (tmp_path / "text.txt").write_text("hello\n")
    for name, reason in {
        "missing.txt": "cannot read",
        "empty": "no *.txt in this folder",
        "empty.txt": "is it a log?",
        "binary.txt": "not text",
        "zeros.txt": "is it a log?",
        "text.txt": "is it a log?",
    }.items():
        for arguments in ([tmp_path / name], [good, tmp_path / name], [good, "--against", tmp_path / name]):
            code, out, err = run(capsys, *arguments)
            assert (code, out) == (2, "") and reason in err and name in err and err.count("\n") == 1
    code, _, err = run(capsys, good, "--track", "giant")
    assert code == 2 and "unknown track 'giant'; there are: nano, small" in err
    lines = event_lines(1.08, 10.0)[:-1]
    code, _, err = run(capsys, make_log(tmp_path / "short.txt", lines=lines, source="pass"))
    assert code == 2 and "short.txt: no finite loss" in err


def test_truncated_logs(tmp_path, capsys):
    """Cut at any place, a log never passes; cut inside an event, the message names the line if it does not parse."""
    whole = make_set(tmp_path, source="pass")
    text = whole[0].read_text()
    begin = text.rindex(LINE)
    outcomes = set()
    for end in [*range(0, begin, 97), *range(begin, len(text) - 1, 3)]:
        (tmp_path / "cut").write_text(text[:end])
        try:
            log = parse_log(tmp_path / "cut")
        except LogError as error:
            outcomes.add("unparseable")
            assert f"line {text[:end].count(chr(10)) + 1}:" in str(error)
        else:
            outcomes.add("incomplete")
            assert list(check.complete(log))
    assert outcomes == {"unparseable", "incomplete"}
    (tmp_path / "cut").write_text(text[: text.rindex("step_avg") + 4])
    code, out, err = run(capsys, tmp_path / "cut", *whole[1:])
    assert code == 2 and not out and f"line {text[: text.rindex('step_avg')].count(chr(10)) + 1}: " in err
    (tmp_path / "cut").write_text(text[: text.rindex("step:12")])  # just before the last validation
    result = run_json(capsys, tmp_path / "cut", *whole[1:])
    assert "complete" in rules(result) and len(result["losses"]) == 2


MINI = """SHARD_MAGIC, HEADER_INTS = 1, 256
class Trainer:
    def validate(self, settings):
        return 1.0
NANO = Track(name="nano", target_loss=1.22, data=DataConfig(bos=256, val_tokens=524_288))
run = torch.compile(train, dynamic=False)
"""


def judge_all(log: Log, other: Log) -> list:
    """Every rule, on a log that may be anything."""
    forms = [Form("2026-02-03", "", {"SHARD_MAGIC": "", "HEADER_INTS": "", "Trainer.validate": ""})]
    broken = check.broken_rules([log, other], [log, other], NANO_NOW, True, Accepted([NANO_NOW, CLOSED], forms))
    losses, times = check.final_values([log, other])
    check.t_test(losses, 1.22, "less")[0]
    check.compare(losses, times, [other, log])
    return broken


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_logs_never_crash(tmp_path, data):
    path = make_log(tmp_path / "whole.txt", source=MINI)
    whole, content = parse_log(path), bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(("replace", "insert", "delete", "cut", "swap")))
        if kind == "replace":
            content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "insert":
            content[at:at] = data.draw(
                st.sampled_from((b"\n", b"9", b"-", b"e999", b":", b" ", b"\xff", b"nan", b"0" * 400))
            )
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 200))]
        elif kind == "cut":
            del content[at:]
        else:
            content = content[at:] + content[:at]
    (tmp_path / "mutated.txt").write_bytes(content)
    try:
        log = parse_log(tmp_path / "mutated.txt")
    except LogError:
        return
    if log.events:
        json.dumps(judge_all(log, whole))


def test_files_of_a_folder_that_are_no_logs_are_passed_over(tmp_path, capsys):
    """Catches: notes beside logs that stop the judge; a folder without a log, or a file that is named, passed over."""
    make_set(tmp_path / "logs")
    notes = tmp_path / "logs" / "notes.txt"
    notes.write_text("seed 3 was slow\n")
    result = run_json(capsys, tmp_path / "logs")
    assert result["passed"] and result["n"] == 3 and result["passed_over"] == [str(notes)]
    code, out, _ = run(capsys, tmp_path / "logs")
    assert code == 0 and out.startswith(f"passed over, they have no steps: {notes}\n")
    code, out, err = run(capsys, tmp_path / "logs" / "0.txt", notes)
    assert code == 2 and not out and "notes.txt: no line such as" in err
    (tmp_path / "none").mkdir()
    shutil.copy(notes, tmp_path / "none" / "notes.txt")
    code, _, err = run(capsys, tmp_path / "none")
    assert code == 2 and "none: no line such as" in err


def test_an_offence_of_many_logs_is_one_line(tmp_path, capsys):
    """Catches: fifty lines about ten logs of another program."""
    for i in range(10):
        path = tmp_path / f"{i}.txt"
        make_log(path, i, 3.2 + i / 1000, 10.0 + i, source="import torch", name=None, environment="", data={})
    command = (tmp_path, "--track", "small")
    code, out, _ = run(capsys, *command)
    offences = [line for line in out.splitlines() if line.startswith("[")]
    assert code == 1 and len(offences) == len({*offences}) == 5
    assert all(f"] 10 logs ({tmp_path / '0.txt'}, {tmp_path / '1.txt'}, …): " in line for line in offences)
    result = run_json(capsys, *command)
    assert len(result["broken"]) == 50 and "50 offences against data, validation" in out


def test_as_a_user_starts_it(tmp_path):
    """From another folder, by the real accepted.json: exit codes 0 and 2, a message instead of a traceback."""
    target = NANO.target_loss
    pins = {name: nano.PINNED_SHA256[name] for name in (nano.VAL_SHARD, nano.TRAIN_SHARD)}
    losses = [target - 0.1, target - 0.11, target - 0.12]
    make_set(tmp_path / "logs", losses, source=REAL_SOURCE, target_loss=target, data=pins)
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run([*command, "logs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("data verified\npass\n") and not done.stderr
    (tmp_path / "logs" / "3.txt").write_text("no log")
    done = subprocess.run([*command, "logs/3.txt"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("records/check.py: error: ") and not done.stdout
