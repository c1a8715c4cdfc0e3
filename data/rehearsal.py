"""Writes made-up shards for a rehearsal of the `small` track without FineWeb, and how low a loss on them can get.

    python data/rehearsal.py [--out DIR] [--tokens 700M] [--seed S]     # default: data/rehearsal/ beside this script
    python train_gpt.py small --data-dir data/rehearsal

The tokens are random, drawn from a source whose probabilities are all known, so that a loss can be read against the
floor that no model can pass. GPT-2's vocabulary; a document is BOS and 1 to `max_length` tokens, log-normal in number:

  first token   Zipf-distributed
  chain         a token's class, its number modulo `classes`, has a list of `branches` distinct tokens, drawn by Zipf's
                law; the next token is the j-th of them with a probability ∝ 1/j
  copy          where the last `copy_distance` tokens hold neither BOS nor marker, the next token is, once in
                `marker_one_in` steps, the marker; the `copy_length` tokens after a marker repeat those `copy_distance`
                tokens before them, and from the last one the chain goes on

With the defaults the floor is 2.87 nats/token. Who knows the lists, but no more of the past than one token, gets to
3.40: copies have to be attended to before `small`'s target of 3.28 is reached.

Beside the shards, `rehearsal.json` has the settings and, of the first `predictions` predictions of the validation
shard, `floor`, their mean -log p, which is the loss of a perfect model (a BOS is predicted like any other token; the
past is the whole document, even where a model is shown only part of it), and `unigram`, the entropy of the frequencies
of the tokens predicted there: what a model gets without any past.

The bytes that tokens.bin has of each token are the digits of its number.

The same settings give the same bytes on every machine. A call that was killed goes on with the first shard it did not
finish; a folder with other settings, or with shards of other origin, is refused and left as it is.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

import shards
from shards import GPT2_VOCAB_SIZE, SHARD_TOKENS, amount

SIDECAR = "rehearsal.json"
VAL_PREDICTIONS = 10_485_760  # of `small`'s validation: tokens 1 to 10,485,760 of the stream, each given those before

BLOCK_TOKENS = 1 << 23  # made at a time: 16 MB of tokens
LANE_TOKENS = 1 << 13  # a block is made in about 1,024 lanes side by side, long enough for whole documents
DRAW_BITS, LIST_BITS = 32, 16  # probabilities are integers / 2^32 for what is drawn once a document, else / 2^16
SCORE_TOKENS = 1 << 18  # scored at a time
CHAIN, COPY = 2**16 - 1, 2**16 - 2  # in the plan of a block, where no token can be said yet


@dataclass(frozen=True)
class Settings:
    """All that the tokens depend on. The command line changes the first four; others are for tests of the source."""

    seed: int = 0  # of everything random
    tokens: int = 700_000_000  # for training; a run of `small` takes 565M
    shard_tokens: int = SHARD_TOKENS  # of a train shard
    val_tokens: int = VAL_PREDICTIONS + 1
    vocab_size: int = GPT2_VOCAB_SIZE  # the last token is BOS, the one before it the marker
    median_length: float = 400.0  # of the tokens after a BOS
    sigma: float = 1.1  # standard deviation of the logarithm of their number
    max_length: int = 16_384  # tokens after a BOS
    classes: int = 2048  # lists
    branches: int = 64  # tokens of a list
    copy_distance: int = 256  # tokens between a token and its copy
    copy_length: int = 64  # tokens copied after a marker; less than copy_distance, as they come from before it
    marker_one_in: int = 64  # steps to a marker, on average, where one may stand; a power of two

    @property
    def bos(self) -> int:
        return self.vocab_size - 1

    @property
    def marker(self) -> int:
        return self.vocab_size - 2

    @property
    def shards(self) -> dict[str, int]:
        """Token count of each shard by its name. The n-th of them is shard n of the random stream."""
        sizes = {"rehearsal_val_000000.bin": self.val_tokens}
        for i, begin in enumerate(range(0, self.tokens, self.shard_tokens), start=1):
            sizes[f"rehearsal_train_{i:06d}.bin"] = min(self.shard_tokens, self.tokens - begin)
        return sizes


DEFAULTS = Settings()


def counts(cumulative: Iterable[float], bits: int) -> np.ndarray:
    """Probabilities as integers (n,) int64 that add up to 2^bits, from any cumulative weights (n,)."""
    cumulative = np.asarray(cumulative, dtype=np.float64)
    return np.diff(np.rint(cumulative / cumulative[-1] * 2**bits).astype(np.int64), prepend=0)


def zipf(n: int, bits: int) -> np.ndarray:
    """Counts (n,) ∝ 1/1, 1/2, ... 1/n that add up to 2^bits."""
    return counts(np.cumsum(1 / np.arange(1, n + 1)), bits)


def surprise(numerator: np.ndarray, denominator: np.ndarray | int) -> np.ndarray:
    """-log(numerator / denominator), in nats; infinite for the impossible."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log(np.asarray(numerator) / denominator)


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution of these counts."""
    positive = counts[counts > 0]
    return float(positive @ surprise(positive, counts.sum()) / counts.sum())


class Random:
    """Integers straight from the bit generator, whose stream numpy keeps from version to version."""

    def __init__(self, seed: int, *place: int):
        self.generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=place))

    def words(self, n: int) -> np.ndarray:
        """(n,) uniform below 2^16, uint16."""
        return self.generator.random_raw(-(-n // 4)).astype("<u8", copy=False).view("<u2")[:n]

    def draw(self, cumulative: np.ndarray, n: int) -> np.ndarray:
        """(n,) indices of a distribution whose counts, of 2^32, have these cumulative sums."""
        uniform = (self.generator.random_raw(n) >> (64 - DRAW_BITS)).astype(np.int64)
        return np.searchsorted(cumulative, uniform, side="right")


class Source:
    """The source itself: its probabilities, samples of it, and what they say of any tokens."""

    def __init__(self, settings: Settings):
        self.settings = s = settings
        within = lambda n: 0.5 * math.erfc(math.log(s.median_length / (n + 0.5)) / (s.sigma * math.sqrt(2)))
        self.length_counts = counts([0, *map(within, range(1, s.max_length)), 1.0], DRAW_BITS)  # of 0, 1, 2, ... tokens
        self.first_counts = zipf(s.marker, DRAW_BITS)
        self.branch_counts = zipf(s.branches, LIST_BITS)
        self.marker_count = 2**LIST_BITS // s.marker_one_in
        self.length_cumulative, self.first_cumulative = np.cumsum(self.length_counts), np.cumsum(self.first_counts)
        rng = Random(s.seed)
        self.lists = np.array([self._list(rng) for _ in range(s.classes)], dtype="<u2")  # (classes, branches)

    def _list(self, rng: Random) -> list[int]:
        """The first distinct tokens of a row of Zipf-distributed ones."""
        seen: dict[int, None] = {}
        while len(seen) < self.settings.branches:
            seen |= dict.fromkeys(rng.draw(self.first_cumulative, 4 * self.settings.branches).tolist())
        return list(seen)[: self.settings.branches]

    # Slots number the ways in which a token comes to stand where it stands: (class, branch) row by row, and then, for
    # those that no chain step chose, the token. From a slot follow its token and the first slot of that token's list.

    @cached_property
    def token_of_slot(self) -> np.ndarray:
        return np.concatenate((self.lists.ravel(), np.arange(self.settings.vocab_size, dtype="<u2")))

    @cached_property
    def list_of_slot(self) -> np.ndarray:
        return self.token_of_slot.astype(np.intp) % self.settings.classes * self.settings.branches

    @cached_property
    def branch_of_word(self) -> np.ndarray:
        """(2^16,) the branch that a uniform 16-bit number chooses."""
        smallest = np.min_scalar_type(self.settings.branches)  # so that it stays in the cache
        return np.repeat(np.arange(self.settings.branches, dtype=smallest), self.branch_counts)

    def block(self, shard: int, block: int, num_tokens: int) -> np.ndarray:
        """Whole documents, uint16, of `num_tokens` tokens or a few more; a function of settings and arguments only."""
        s, rng = self.settings, Random(self.settings.seed, shard, block)
        lengths = self._lengths(rng, num_tokens)
        starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())

        # Lanes are runs of whole documents, made side by side. Each is laid over rows of a grid, from a new row on. A
        # row is as long as the way from a token to its copy: what a row copies is in the row before.
        width = s.copy_distance
        first = np.unique(np.searchsorted(starts, np.arange(0, starts[-1] + 1, LANE_TOKENS)))  # documents
        lane_starts, lane_lengths = starts[first], np.diff(starts[first], append=total)
        rows = -(-lane_lengths // width)
        first_row = np.cumsum(rows) - rows
        grid = np.full((int(rows.sum()), width), CHAIN, dtype="<u2")
        starts += np.repeat(first_row * width - lane_starts, np.diff(first, append=len(starts)))

        # What can be said before any token is known.
        plan = grid.ravel()
        plan[starts] = s.bos
        plan[starts + 1] = rng.draw(self.first_cumulative, len(starts))
        for marker, end in self._markers(rng, starts, starts + lengths, plan.size):
            plan[marker] = s.marker
            copies = marker[:, None] + np.arange(1, s.copy_length + 1)
            plan[copies[copies < end[:, None]]] = COPY

        # A step makes one token of every lane: each goes on from the list that the token before it has.
        order = np.argsort(-rows, kind="stable")
        slots = np.zeros((width, len(order)), dtype=np.intp)
        for i in range(int(rows.max())):
            lanes = order[: np.count_nonzero(rows > i)]
            planned = np.ascontiguousarray(grid[first_row[lanes] + i].T)  # (width, lanes)
            chosen = self.branch_of_word.take(rng.words(planned.size)).reshape(planned.shape).astype(np.intp)
            fixed = np.flatnonzero(planned < COPY)
            chosen.ravel()[fixed] = self.lists.size + planned.ravel()[fixed].astype(np.intp)
            np.copyto(chosen, slots[:, : len(lanes)], where=planned == COPY)
            keep = -(planned == CHAIN).astype(np.intp)
            before, slots, state = slots[-1, : len(lanes)], chosen, np.empty(len(lanes), dtype=np.intp)
            for slot, kept in zip(slots, keep, strict=True):
                self.list_of_slot.take(before, out=state, mode="clip")  # the default mode would buffer `out`
                state &= kept
                slot += state
                before = slot
            grid[first_row[lanes] + i] = self.token_of_slot.take(slots).T
        pieces = zip(first_row * width, lane_lengths, strict=True)
        return np.concatenate([plan[begin : begin + length] for begin, length in pieces])

    def _lengths(self, rng: Random, num_tokens: int) -> np.ndarray:
        """Tokens, with BOS, of as many documents as fill `num_tokens`."""
        lengths = np.zeros(0, dtype=np.int64)
        while lengths.sum() < num_tokens:
            lengths = np.append(lengths, 1 + rng.draw(self.length_cumulative, max(4096, len(lengths))))
        return lengths[: np.searchsorted(np.cumsum(lengths), num_tokens) + 1]

    def _markers(
        self, rng: Random, starts: np.ndarray, ends: np.ndarray, size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields positions of the first, second, ... markers of all documents, and the ends of these documents."""
        candidates = np.append(np.flatnonzero(rng.words(size) < self.marker_count), size)
        last = starts
        while len(last):
            reach = np.searchsorted(candidates, np.minimum(last + self.settings.copy_distance, size))
            inside = candidates[reach] < ends
            last, ends = candidates[reach][inside], ends[inside]
            yield last, ends

    @cached_property
    def alive(self) -> np.ndarray:
        """(max_length + 1,) of 2^32 documents, how many have at least 0, 1, 2, ... tokens after BOS."""
        return np.cumsum(self.length_counts[::-1])[::-1]

    def surprises(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each token but the first, given those before it in its document, in nats.

        tokens (n + 1,) begin with a BOS; result (n,) float64, infinite for a token that the source never gives.
        """
        s, at = self.settings, np.arange(len(tokens) - 1)
        here, following = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        starts = np.maximum.accumulate(np.where(here == s.bos, at, 0))
        last = np.maximum.accumulate(np.where(here >= s.marker, at, 0))  # BOS or marker
        copying = (here[last] == s.marker) & (at - last < s.copy_length)
        may_mark = ~copying & (at - last >= s.copy_distance - 1)

        position = np.minimum(at - starts, s.max_length)
        ended = following == s.bos
        going_on, alive = self.alive - self.length_counts, np.maximum(self.alive, 1)
        result = np.where(ended, surprise(self.length_counts, alive)[position], surprise(going_on, alive)[position])
        first = (here == s.bos) & ~ended
        result[first] += np.append(surprise(self.first_counts, 2**DRAW_BITS), [np.inf, np.inf])[following[first]]

        copied = np.flatnonzero(copying & ~ended)
        result[copied[following[copied] != tokens[copied + 1 - s.copy_distance]]] = np.inf

        chain = np.flatnonzero(~copying & ~ended & (here != s.bos))
        p = np.where(may_mark[chain], 1 / s.marker_one_in, 0)
        marked = following[chain] == s.marker
        branch = self._branches(here[chain], following[chain])
        result[chain] += np.where(marked, surprise(p, 1), surprise(1 - p, 1) + branch)
        return result

    def _branches(self, here: np.ndarray, following: np.ndarray) -> np.ndarray:
        """-log p of chain steps; infinite where the list of `here` lacks `following`."""
        found = self.lists[here % self.settings.classes] == following[:, None]  # (n, branches)
        costs = surprise(self.branch_counts, 2**LIST_BITS)[found.argmax(axis=1)]
        return np.where(found.any(axis=1), costs, np.inf)

    def score(self, tokens: np.ndarray, predictions: int) -> dict[str, float]:
        """Floor and unigram entropy, as the sidecar has them, of the predictions in (predictions + 1,) tokens."""
        starts = np.append(np.flatnonzero(tokens[:-1] == self.settings.bos), predictions)
        # Cut where documents begin: no prediction needs more of the past.
        cuts = np.unique(starts[np.searchsorted(starts, np.arange(0, predictions, SCORE_TOKENS))])
        pieces = zip(cuts, [*cuts[1:], predictions], strict=True)
        floor = math.fsum(float(self.surprises(tokens[a : b + 1]).sum()) for a, b in pieces if a < b) / predictions
        if not math.isfinite(floor):
            raise RuntimeError("the shard holds a token that its source never gives")
        return {"floor": floor, "predictions": predictions, "unigram": entropy(np.bincount(tokens[1:]))}


def build(out: Path, settings: Settings) -> tuple[dict, bool]:
    """Writes what the folder, which must be held with `exclusive`, lacks; returns the sidecar, and whether it wrote."""
    sizes, sidecar = settings.shards, shards.read_sidecar(out / SIDECAR, asdict(settings))
    sidecar = sidecar or {"settings": asdict(settings), "dataset": "rehearsal", "shards": {}}
    sidecar |= {"bos": settings.bos, "vocab_size": settings.vocab_size}
    missing = [name for name in sizes if name not in sidecar["shards"]]
    if not missing and "floor" in sidecar:
        return sidecar, False
    from tqdm import tqdm  # here: its import would slow down every start that has its data

    shards.require_space(out, sum(shards.HEADER_BYTES + 2 * sizes[name] for name in missing) + 2**20)
    shards.write_json(out / SIDECAR, sidecar)  # first, so that no shard is ever of unknown settings
    source = Source(settings)
    for name in tqdm(missing, unit="shard", disable=None):
        # Blocks are a little longer than asked for: the last document of a shard is cut.
        number, size = list(sizes).index(name), sizes[name]
        begins = enumerate(range(0, size, BLOCK_TOKENS))
        blocks = (source.block(number, block, min(BLOCK_TOKENS, size - begin)) for block, begin in begins)
        sidecar["shards"][name] = shards.write_shard(out / name, blocks, settings.bos, size)
        shards.write_json(out / SIDECAR, sidecar)
    predictions = min(VAL_PREDICTIONS, settings.val_tokens - 1)
    val = np.fromfile(out / next(iter(sizes)), "<u2", count=predictions + 1, offset=shards.HEADER_BYTES)
    sidecar |= source.score(val, predictions)
    shards.write_json(out / SIDECAR, sidecar)
    return sidecar, True


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes made-up shards of known entropy for a rehearsal of the small track.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out, add = Path(__file__).resolve().parent / "rehearsal", parser.add_argument
    add("--out", type=Path, default=out, metavar="DIR", help="folder of the shards")
    add("--seed", type=int, default=DEFAULTS.seed, metavar="N", help="of everything random")
    add("--tokens", type=amount, default=DEFAULTS.tokens, metavar="N", help="train tokens; a run of `small` takes 565M")
    add("--shard-tokens", type=amount, default=DEFAULTS.shard_tokens, metavar="N", help="of a train shard")
    add("--val-tokens", type=amount, default=DEFAULTS.val_tokens, metavar="N", help="of the validation shard")
    options = vars(parser.parse_args())
    out, settings = options.pop("out"), replace(DEFAULTS, **options)
    if settings.seed < 0 or settings.val_tokens < 2:
        parser.error("expected a --seed from 0 on, and two --val-tokens or more")
    start = time.perf_counter()
    with shards.messages("rehearsal.py"), shards.exclusive(out):
        sidecar, wrote = build(out, settings)
        # A number begins with a smaller one, so a token with a more frequent one, as long words do with short ones.
        spelled = [b"%d" % token for token in range(settings.bos)] + [b""]
        shards.write(out / shards.TOKEN_BYTES, shards.token_bytes(spelled))
    print(
        f"rehearsal data: {'wrote' if wrote else 'found'} {settings.tokens:,} train and {settings.val_tokens:,} val "
        f"tokens in {out} ({time.perf_counter() - start:.1f} s)\n"
        f"nats/token: {sidecar['floor']:.4f} is the floor of the first {sidecar['predictions']:,} validation "
        f"predictions (unigram entropy {sidecar['unigram']:.4f})"
    )


if __name__ == "__main__":
    main()
