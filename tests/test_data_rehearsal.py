"""data/rehearsal.py: tokens and numbers against a plain model of the source, and the script as a user starts it."""

import hashlib
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, kill_before_rename, run_process, tiny_options
from scipy import stats

import train_gpt
from data import rehearsal

SCRIPT = Path(rehearsal.__file__).resolve()
VAL = "rehearsal_val_000000.bin"
SIDECAR = "rehearsal.json"

# Six shards, all but the last of several blocks (see `make`), made in a second or two.
SMALL = {
    "tokens": 90_000,
    "shard-tokens": 20_000,
    "val-tokens": 15_001,
    "vocab-size": 300,
    "median-length": 60,
    "max-length": 500,
    "classes": 16,
    "branches": 6,
    "copy-distance": 12,
    "copy-length": 8,
    "marker-one-in": 16,
}


def command(out: Path, settings: dict, before: str = "", block_tokens: int = 6000) -> list[str]:
    """The script with blocks of 6,000 tokens, so that small shards have several of them, each of one lane.

    Settings that are no options of the script take the place of its defaults.
    """
    options = {name: value for name, value in settings.items() if name in ("seed", "tokens") or "-tokens" in name}
    source = {name.replace("-", "_"): value for name, value in settings.items() if name not in options}
    lines = ["import os, signal, sys", f"sys.path.insert(0, {str(SCRIPT.parent)!r})", "import rehearsal"]
    lines += [f"rehearsal.DEFAULTS = rehearsal.Settings(**{source!r})"]
    lines += [f"rehearsal.BLOCK_TOKENS, rehearsal.SCORE_TOKENS = {block_tokens}, 2000", before]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-c", "\n".join([*lines, "rehearsal.main()"]), "--out", str(out), *words]


def make(out: Path, settings: dict, code: int = 0, **how) -> subprocess.CompletedProcess:
    result = subprocess.run(command(out, settings, **how), capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def described(folder: Path) -> dict:
    """The sidecar, with the order of its shards, less their times, which have to be those of the files."""
    sidecar = json.loads((folder / SIDECAR).read_text())
    for name, entry in sidecar["shards"].items():
        assert entry.pop("mtime_ns") == (folder / name).stat().st_mtime_ns
    return sidecar | {"order": list(sidecar["shards"])}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("rehearsal_*.bin"))}


def tokens_of(path: Path) -> np.ndarray:
    """Tokens of a shard: 256 int32 (magic, version, number of tokens, zeros), then the tokens as uint16."""
    header = np.fromfile(path, "<i4", 256)
    tokens = np.fromfile(path, "<u2", offset=1024)
    assert header.tolist() == [20240520, 1, len(tokens), *[0] * 253]
    return tokens


def documents_of(folder: Path, pattern: str = "*_train_*.bin") -> list[list[int]]:
    """Whole documents, each with its BOS, of all shards: the last one of a shard is cut, so it is left out."""
    found = []
    for path in sorted(folder.glob(pattern)):
        tokens = tokens_of(path)
        starts = np.flatnonzero(tokens == json.loads((folder / SIDECAR).read_text())["bos"])
        found += [tokens[a:b].tolist() for a, b in pairwise(starts)]
    return found


def settings_of(sidecar: dict) -> rehearsal.Settings:
    return rehearsal.Settings(**sidecar["settings"])


class PlainModel:
    """What the docstring of the script says, one token at a time, from the probabilities of the source."""

    def __init__(self, folder: Path):
        self.sidecar = json.loads((folder / SIDECAR).read_text())
        s = self.sidecar["settings"]
        self.bos, self.marker = s["vocab_size"] - 1, s["vocab_size"] - 2
        self.distance, self.length, self.one_in = s["copy_distance"], s["copy_length"], s["marker_one_in"]
        source = rehearsal.Source(settings_of(self.sidecar))
        self.lengths = source.length_counts.tolist()
        self.first = (source.first_counts / source.first_counts.sum()).tolist()
        self.branches = (source.branch_counts / source.branch_counts.sum()).tolist()
        self.lists = source.lists.tolist()
        self.at_least = np.cumsum(self.lengths[::-1])[::-1].tolist()

    def next(self, document: list[int]) -> dict[int, float]:
        """Probabilities of the token after `document`, which begins with its BOS."""
        t = len(document) - 1
        end = self.lengths[t] / self.at_least[t]
        if t == 0:
            inside = dict(enumerate(self.first))
        else:
            last = t
            while document[last] not in (self.bos, self.marker):
                last -= 1
            if document[last] == self.marker and t - last < self.length:
                inside = {document[t + 1 - self.distance]: 1.0}
            else:
                marker = 1 / self.one_in if t + 1 - last >= self.distance else 0.0
                successors = self.lists[document[-1] % len(self.lists)]
                inside = {x: (1 - marker) * p for x, p in zip(successors, self.branches, strict=True)}
                inside[self.marker] = marker
        return {self.bos: end, **{x: (1 - end) * p for x, p in inside.items()}}

    def surprises(self, tokens: list[int]) -> list[float]:
        """-log p of all tokens but the first, which is a BOS."""
        document, costs = [tokens[0]], []
        for token in tokens[1:]:
            costs.append(-math.log(self.next(document)[token]))
            document = [token] if token == self.bos else [*document, token]
        return costs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of SMALL."""
    out = tmp_path_factory.mktemp("rehearsal") / "shards"
    result = make(out, SMALL)
    assert "wrote 90,000 train and 15,001 val tokens" in result.stdout
    return out


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A million tokens, in blocks of many lanes, of a source with more of everything to count."""
    out = tmp_path_factory.mktemp("rehearsal") / "sample"
    settings = {"tokens": "1M", "shard-tokens": "0.5M", "val-tokens": "60k", "vocab-size": 4000, "classes": 40}
    settings |= {"branches": 12, "copy-distance": 30, "copy-length": 20, "marker-one-in": 32}
    make(out, settings, block_tokens=rehearsal.BLOCK_TOKENS)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The numbers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["small", "sample"])
def test_floor_is_the_loss_of_the_plain_model(folder: str, request: pytest.FixtureRequest):
    """Catches a wrong probability, errors at seams of blocks, lanes and scored pieces, and impossible tokens."""
    folder = request.getfixturevalue(folder)
    model, tokens = PlainModel(folder), tokens_of(folder / VAL).tolist()
    costs = model.surprises(tokens)
    assert model.sidecar["predictions"] == len(costs) == model.sidecar["settings"]["val_tokens"] - 1
    assert model.sidecar["floor"] == pytest.approx(math.fsum(costs) / len(costs), rel=1e-10)
    settings = settings_of(model.sidecar)
    np.testing.assert_allclose(
        rehearsal.Source(settings).surprises(np.array(tokens, "<u2")), costs, rtol=1e-9, atol=1e-9
    )


def test_train_shards_come_from_the_same_source(small: Path):
    """Catches a train stream with rules of its own: every token is possible, and the mean cost is near the floor."""
    model = PlainModel(small)
    means = [np.mean(model.surprises(tokens_of(path).tolist())) for path in sorted(small.glob("*_train_*.bin"))]
    assert len(means) == 5
    assert abs(np.mean(means) - model.sidecar["floor"]) < 6 * np.std(means, ddof=1)


def test_surprises_of_impossible_tokens_are_infinite(small: Path):
    """Catches a floor that silently takes a wrong successor, copy, marker or end for possible."""
    model, tokens = PlainModel(small), tokens_of(small / VAL)
    source = rehearsal.Source(settings_of(model.sidecar))
    costs, tokens = source.surprises(tokens), tokens.copy()
    marker = int(np.flatnonzero(tokens == model.marker)[0])
    for at, token in (
        (1, model.bos),  # no document is empty
        (2, model.marker),  # nothing to copy yet
        (marker + 2, (tokens[marker + 2] + 1) % 298),  # no copy
        (int(np.flatnonzero(costs > 1)[5]) + 1, 297),  # see below: not in the list
    ):
        changed = tokens.copy()
        changed[at] = token
        past = changed[:at].tolist()
        past = past[len(past) - 1 - past[::-1].index(model.bos) :]
        assert model.next(past).get(int(token), 0) == 0, "the test needs an impossible token"
        assert source.surprises(changed[: at + 1])[-1] == math.inf


def test_unigram_entropy(small: Path):
    tokens = tokens_of(small / VAL)[1:].tolist()
    expected = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())
    assert json.loads((small / SIDECAR).read_text())["unigram"] == pytest.approx(expected, rel=1e-12)


def test_defaults_are_near_fineweb():
    """The floor below the target of `small`, not far; about as many tokens a document as FineWeb has."""
    source = rehearsal.Source(rehearsal.Settings())
    assert 2.5 < source.surprises(source.block(1, 0, 200_000)).mean() < 3.0
    assert source.length_counts @ np.arange(len(source.length_counts)) / 2**32 == pytest.approx(
        400 * math.exp(1.1**2 / 2), rel=0.03
    )


# ----------------------------------------------------------------------------------------------------------------------
# The tokens
# ----------------------------------------------------------------------------------------------------------------------


def same_distribution(observed, expected) -> float:
    """p-value of a χ² test of counts against probabilities; cells that are expected less than 10 times are joined."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    expected = expected / expected.sum() * observed.sum()
    rare = expected < 10
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed, expected).pvalue


def test_probabilities_are_those_of_the_formulas(sample: Path):
    """Catches a wrong median, sigma, rounding or exponent: the integers of the source against scipy and 1/j."""
    model = PlainModel(sample)
    below = stats.lognorm(s=1.1, scale=400).cdf(np.arange(16_385) + 0.5)
    below[0], below[-1] = 0, 1  # no document is empty; longer ones end at the longest
    np.testing.assert_allclose(np.cumsum(model.lengths) / 2**32, below, atol=2**-32)
    for found, bits in ((model.branches, 16), (model.first, 32)):
        weights = 1 / np.arange(1, len(found) + 1)
        np.testing.assert_allclose(found, weights / weights.sum(), atol=2.0**-bits)
    assert len(model.first) == 3998 and len(model.branches) == 12
    lists = np.array(model.lists)
    assert lists.shape == (40, 12) and all(len(set(row)) == 12 for row in lists.tolist()) and lists.max() < 3998
    default = rehearsal.Source(rehearsal.Settings())
    first_of_lists = np.bincount(default.lists[:, 0], minlength=50_255)
    assert same_distribution(first_of_lists, default.first_counts) > 1e-4, "the first drawn are Zipf's"


def test_lengths_and_first_tokens(sample: Path):
    """Catches lengths off by one, documents lost at seams, and first tokens that depend on anything."""
    model, documents = PlainModel(sample), documents_of(sample)
    lengths = np.array([len(document) - 1 for document in documents])
    assert len(lengths) > 1200
    bins = np.searchsorted(np.cumsum(model.lengths) / 2**32, np.linspace(0, 1, 21)[1:-1])
    cells = np.bincount(np.searchsorted(bins, lengths, side="left"), minlength=20)
    expected = np.diff(np.cumsum(model.lengths)[np.append(bins, 16_384)] / 2**32, prepend=0)
    assert same_distribution(cells, expected) > 1e-4
    assert abs(np.median(lengths) / 400 - 1) < 0.15  # its standard error is 4%
    assert same_distribution(np.bincount([d[1] for d in documents], minlength=3998), model.first) > 1e-4
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.12


def test_branches_copies_and_markers(sample: Path):
    """Catches copies from a wrong distance or of a wrong length, markers too early or often, and biased branches."""
    model, documents = PlainModel(sample), documents_of(sample)
    branches, of_first_class, after_each = Counter(), Counter(), Counter()
    may, marked = 0, 0
    for document in documents:
        last, copying = 0, 0
        for t in range(1, len(document)):
            token = document[t]
            if copying:
                assert token == document[t - 30]
                copying -= 1
                continue
            may += (open := t - last >= 30 and t > 1)
            if token == model.marker:
                assert open
                last, copying, marked = t, 20, marked + 1
            elif t > 1:
                row = document[t - 1] % 40
                j = model.lists[row].index(token)
                branches[j] += 1
                of_first_class[j] += row == 0
                after_each[j, t % 2] += 1
    assert marked > 8_000
    assert stats.binomtest(marked, may, 1 / 32).pvalue > 1e-4
    for counter in (branches, of_first_class):
        assert same_distribution([counter[j] for j in range(12)], model.branches) > 1e-4
    parity = np.array([[after_each[j, k] for j in range(12)] for k in (0, 1)])
    assert stats.chi2_contingency(parity).pvalue > 1e-4


def test_frequencies_fall_as_in_zipfs_law():
    """With the default settings: a slope near -1 in the middle of the ranks, a most frequent token of a few percent."""
    tokens = rehearsal.Source(rehearsal.Settings()).block(1, 0, 2_000_000)
    frequencies = np.sort(np.bincount(tokens) / len(tokens))[::-1]
    ranks = np.geomspace(5, 2000, 30).astype(int)
    slope = np.polyfit(np.log(ranks), np.log(frequencies[ranks - 1]), 1)[0]
    assert -1.25 < slope < -0.8, slope
    assert 0.02 < frequencies[0] < 0.1
    assert np.count_nonzero(frequencies) > 15_000 and tokens.max() == 50_256


# numpy keeps the
# stream of PCG64 and SeedSequence; no float but the probabilities, which are rounded to integers, plays a part.
PINNED = "0b4ceb785a79d8e5d95f8b85fd920f1d3d4384ec36a0f4af2c0a84d038762f01"


def test_pinned_tokens():
    tokens = rehearsal.Source(rehearsal.Settings()).block(2, 3, 100_000)
    assert hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest() == PINNED


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def test_sidecar_describes_the_shards(small: Path):
    sidecar = json.loads((small / SIDECAR).read_text())
    assert [*sidecar["shards"]] == [VAL, *(f"rehearsal_train_{i:06d}.bin" for i in range(1, 6))]
    assert set(sidecar["shards"]) == set(shards(small))
    for name, entry in sidecar["shards"].items():
        content, tokens = (small / name).read_bytes(), tokens_of(small / name)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["tokens"] == len(tokens) and entry["documents"] == np.count_nonzero(tokens == sidecar["bos"])
        assert (entry["size"], entry["mtime_ns"]) == (len(content), (small / name).stat().st_mtime_ns)
        assert tokens[0] == 299
    sizes = [entry["tokens"] for entry in sidecar["shards"].values()]
    assert sizes == [15_001, 20_000, 20_000, 20_000, 20_000, 10_000]
    assert (sidecar["dataset"], sidecar["settings"]["seed"]) == ("rehearsal", 0)
    assert (sidecar["bos"], sidecar["vocab_size"]) == (299, 300)


def test_tokens_begin_with_more_frequent_ones(small: Path, tmp_path: Path):
    """Their bytes are invented, but not by chance, and come to shards that are there; catches BOS among them."""
    out = copy(small, tmp_path / "out")
    spelled = train_gpt.read_token_bytes(out, 300)
    assert [spelled[i] for i in (0, 9, 123, 298, 299)] == [b"0", b"9", b"123", b"298", b""]
    prefixes = train_gpt.prefix_tokens(spelled)
    assert prefixes[:10] == [-1] * 10 and prefixes[10:299] == [i // 10 for i in range(10, 299)] and prefixes[299] == -1
    (out / "tokens.bin").unlink()
    assert "found 90,000 train" in make(out, SMALL).stdout
    assert (out / "tokens.bin").read_bytes() == (small / "tokens.bin").read_bytes()


def test_seeds_shards_and_blocks_differ(small: Path, tmp_path: Path):
    """Catches a stream that repeats itself."""
    make(tmp_path, {**SMALL, "seed": 1})
    one, other = shards(small), shards(tmp_path)
    assert all(one[name] != other[name] for name in one)
    documents = [tuple(d) for out in (small, tmp_path) for d in documents_of(out, "rehearsal_*.bin") if len(d) > 30]
    assert len(set(documents)) == len(documents) > 1000


def test_second_call_does_nothing(small: Path):
    before = {path.name: path.stat().st_mtime_ns for path in small.iterdir()}
    assert "found 90,000 train" in make(small, SMALL).stdout
    assert {path.name: path.stat().st_mtime_ns for path in small.iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "no floor"])
def test_damage_is_repaired(small: Path, tmp_path: Path, damage: str):
    """Catches a resume that looks at names only, or that makes again what is whole and stands before."""
    out = copy(small, tmp_path / "out")
    victim = out / "rehearsal_train_000003.bin"
    match damage:
        case "truncated":
            victim.write_bytes(victim.read_bytes()[:-2])
        case "missing":
            victim.unlink()
        case "no floor":
            sidecar = json.loads((out / SIDECAR).read_text())
            del sidecar["floor"]
            (out / SIDECAR).write_text(json.dumps(sidecar))
    whole = {path: path.stat().st_mtime_ns for path in out.glob("*.bin") if damage.startswith("no") or path < victim}
    assert "wrote" in make(out, SMALL).stdout
    assert shards(out) == shards(small)
    assert described(out) == described(small)
    assert all(path.stat().st_mtime_ns == then for path, then in whole.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed is 0, now 1"),
        ({"tokens": 70_000}, "tokens is 90000, now 70000"),
        ("foreign shard", "fineweb_train_000001.bin"),
        ("no sidecar", "nothing beside it says what it is"),
        ("broken sidecar", SIDECAR),
        ("older sidecar", "rehearsal.json is not a record of this version of the script"),
    ],
)
def test_a_folder_of_other_origin_is_refused(small: Path, tmp_path: Path, change: dict | str, said: str):
    """Catches shards of two settings, or of two sources, mixed in one folder; nothing may change in it."""
    out, settings = copy(small, tmp_path / "out"), SMALL
    match change:
        case "foreign shard":
            (out / "fineweb_train_000001.bin").write_bytes(b"not ours")
        case "no sidecar":
            (out / SIDECAR).unlink()
        case "broken sidecar":
            (out / SIDECAR).write_text("[]")
        case "older sidecar":
            old = (out / SIDECAR).read_text().replace('"vocab_size": 300,\n "floor"', '"floor"')
            (out / SIDECAR).write_text(old)
        case _:
            settings = {**SMALL, **change}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    error = make(out, settings, code=1).stderr
    assert said in error and "--out" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def finish_after_kill(out: Path, reference: Path) -> None:
    """What a killed call left is whole, and the next call makes it complete without doing that again."""
    left = shards(out) if out.exists() else {}
    assert all(content == shards(reference)[name] for name, content in left.items())
    make(out, SMALL)
    assert shards(out) == shards(reference)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in reference.iterdir())
    assert described(out) == described(reference)


@pytest.mark.parametrize("kill_at", [1, 2, 3, 14])
def test_a_kill_before_a_file_has_its_name(small: Path, tmp_path: Path, kill_at: int):
    """SIGKILL right before the k-th file gets its name: sidecar, then shards and the sidecar after each."""
    make(tmp_path / "out", SMALL, code=-signal.SIGKILL, before=kill_before_rename(kill_at))
    finish_after_kill(tmp_path / "out", small)


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_a_random_moment(small: Path, tmp_path: Path, seed: int):
    """SIGKILL some time after a random number of shards is there, so that it falls into the writing on any machine.

    Catches a state of the folder from which it does not recover.
    """
    rng, out = random.Random(seed), tmp_path / "out"
    process = subprocess.Popen(command(out, SMALL), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    number = rng.randrange(6)
    while process.poll() is None and len([*out.glob("*.bin")]) < number:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05 if number else 1))
    process.kill()
    process.wait()
    finish_after_kill(out, small)


def test_ctrl_c_leaves_a_message_and_no_traceback(small: Path, tmp_path: Path):
    hook = """
write, calls = rehearsal.shards.write_json, 0
def then_interrupt(*args):
    global calls
    write(*args)
    calls += 1
    if calls == 3:
        os.killpg(0, signal.SIGINT)
rehearsal.shards.write_json = then_interrupt
"""
    process = subprocess.run(
        command(tmp_path, SMALL, before=hook),
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert process.returncode == 130 and "interrupted" in process.stderr and "Traceback" not in process.stderr
    finish_after_kill(tmp_path, small)


def test_a_full_disk_is_a_message_and_spares_finished_shards(small: Path, tmp_path: Path):
    """RLIMIT_FSIZE stands for it: a write that fails in the middle of a file."""
    limit = 35_000  # bytes: room for the validation shard and its sidecar, but for no train shard
    assert (small / VAL).stat().st_size < limit < (small / "rehearsal_train_000001.bin").stat().st_size
    result = subprocess.run(
        command(tmp_path, SMALL),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error:" in result.stderr and "rehearsal_train_000001.bin was not written" in result.stderr
    assert shards(tmp_path) == {VAL: (small / VAL).read_bytes()}
    finish_after_kill(tmp_path, small)


def test_too_little_space_is_said_before_the_first_byte(tmp_path: Path):
    hook = "import shutil\nshutil.disk_usage = lambda path: type('', (), {'free': 1_200_000})()"
    error = make(tmp_path / "out", SMALL, code=1, before=hook).stderr
    assert "free" in error and "make room" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("option", "value", "code", "said"),
    [
        ("tokens", "many", 2, "is not a positive count"),
        ("tokens", "1.5", 2, "is not a positive count"),
        ("tokens", "infk", 2, "is not a positive count"),
        ("val-tokens", 1, 2, "two --val-tokens or more"),
        ("seed", -1, 2, "a --seed from 0 on"),
    ],
)
def test_wrong_options_are_messages(tmp_path: Path, option: str, value, code: int, said: str):
    assert said in make(tmp_path / "out", {**SMALL, option: value}, code=code).stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "error:" in make(tmp_path / "file" / "out", SMALL, code=1).stderr


def test_small_trains_on_it(tmp_path: Path):
    """`small` with a tiny model and short stages, but its own vocabulary and BOS, reads the shards as they are."""
    shards, logs = tmp_path / "shards", tmp_path / "logs"
    options = ["--out", shards, "--tokens", "40k", "--shard-tokens", "20k", "--val-tokens", "701"]
    made = run_process([sys.executable, SCRIPT, *options])
    assert made.returncode == 0, made.stderr
    options = [*tiny_options(), "--data-dir", shards, "--log-dir", logs, "--device", "cpu", "--sample-tokens", "0"]
    result = run_process([sys.executable, REPO / "train_gpt.py", "small", *options, "--max-steps", "3", "--no-warmup"])
    assert result.returncode == 0, result.stderr
    loss = float(result.stdout.split("validation loss ")[1].split()[0])
    assert json.loads((shards / SIDECAR).read_text())["floor"] < loss < 11.5


@pytest.mark.slow
def test_a_model_learns_from_it(tmp_path: Path):
    """A few hundred steps of `nano` end clearly below the unigram entropy, and above the floor."""
    shards = tmp_path / "shards"
    settings = {"vocab-size": 257, "classes": 64, "branches": 16, "tokens": "2M", "val-tokens": 524_289}
    make(shards, settings | {"copy-distance": 64, "copy-length": 32, "marker-one-in": 32}, block_tokens=1 << 23)
    words = [sys.executable, REPO / "train_gpt.py", "nano", "--data-dir", shards, "--log-dir", tmp_path / "logs"]
    words += ["--device", "cpu", "--sample-tokens", 0, "--schedule.scheduled-steps", 250]
    result = run_process(words, timeout=900)
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((shards / SIDECAR).read_text())
    loss = float(result.stdout.split("validation loss ")[1].split()[0])
    print(f"loss {loss}, floor {sidecar['floor']}, unigram {sidecar['unigram']}")
    assert sidecar["floor"] < loss < sidecar["unigram"] - 1
