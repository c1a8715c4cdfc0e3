"""Data: shards -> rows, against the naive reading of the stream that NaiveStream is."""

import hashlib
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import BOS, cpu, documents, mutated, text_like, write_shard, write_token_bytes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    NANO,
    Loader,
    LoaderPosition,
    Options,
    Shard,
    SpeedrunError,
    Stage,
    Track,
    check_numbers,
    of_each,
    prefix_tokens,
    read_token_bytes,
    require_rows,
    require_tokens,
    shard_identity,
    validation_rows,
    validation_tokens,
)

# The layout of `nano` with n-grams that collide, and signs.
MODEL = replace(NANO.model, ngrams=(1, 2, 5), ngram_rows=97, ngram_signs=7)


class NaiveStream:
    """The training stream, one list operation at a time."""

    def __init__(self, shards: list[list[int]]):
        self.shards = [self.documents(tokens) for tokens in shards]

    @staticmethod
    def documents(tokens: list[int]) -> list[list[int]]:
        found: list[list[int]] = []
        for token in tokens:
            if token == BOS:
                found.append([])
            if found:  # tokens before the first BOS belong to no document
                found[-1].append(token)
        return found

    def step(self, num_rows: int, row_tokens: int, max_doc_len: int) -> list[list[list[int]]]:
        """The rows of the next step, each a list of pieces. Raises EOFError where the shards run out."""
        while self.shards:
            left, rows = list(self.shards[0]), []
            while left and len(rows) < num_rows:
                pieces, need = [], row_tokens + 1
                while need and left:
                    piece = left.pop(0)[: min(max_doc_len, need)]
                    pieces.append(piece)
                    need -= len(piece)
                if need == 0:
                    rows.append(pieces)
            if len(rows) == num_rows:
                self.shards[0] = left
                return rows
            self.shards.pop(0)
        raise EOFError


def track_with(
    stages: list[tuple[int, int]], steps_each: int, rows: int = 8, val_tokens: int = 64, val_row=16
) -> Track:
    """A track whose stages, each of `steps_each` steps, have these (tokens per row, max_doc_len)."""
    stages = tuple(Stage(rows * n, (4, 8), 1.0, ((1.0, 1.0),), max_doc_len) for n, max_doc_len in stages)
    schedule = replace(
        NANO.schedule, scheduled_steps=steps_each * len(stages), extension_steps=99, stages=stages, extension=stages[-1]
    )
    data = replace(NANO.data, bos=BOS, rows_per_step=rows, val_tokens=val_tokens, val_row_tokens=val_row)
    return replace(NANO, data=data, schedule=schedule, model=MODEL)


def write_shards(folder: Path, shards: list[list[int]], split: str = "train") -> Path:
    for i, tokens in enumerate(shards):
        write_shard(folder / f"x_{split}_{i:06}.bin", tokens)
    return folder


def as_tuple(row: train_gpt.Row) -> tuple:
    return tuple(str(value.tolist()) if isinstance(value, torch.Tensor) else value for value in row)


def check_ngrams(row: train_gpt.Row, pieces: list[list[int]], n: int) -> None:
    """The n-grams of a row are hashed as in a loop over its documents, each alone."""
    for size, rows, signs in zip(MODEL.ngrams, row.ngram_rows.tolist(), row.sign_rows.tolist(), strict=True):
        keys = []
        for piece in pieces:
            for t in range(len(piece)):
                key = piece[t]
                for back in range(1, size):
                    key = (48271 * key + (piece[t - back] + 1 if t >= back else 0)) % (2**31 - 1)
                keys.append(key)
        assert rows == [key % 97 for key in keys[:n]] and signs == [key // 97 % 7 for key in keys[:n]]


def check_row(row: train_gpt.Row, pieces: list[list[int]], n: int, max_doc_len: int) -> None:
    """A row of the loader says what the naive pieces say."""
    tokens = [token for piece in pieces for token in piece]
    assert row.inputs.tolist() == tokens[:n] and row.inputs.dtype == torch.int64
    assert row.targets.tolist() == tokens[1:] and row.targets.dtype == torch.int64
    starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]]).tolist()
    padding = [n] * (len(row.cu_seqlens) - len(starts))
    assert padding, "cu_seqlens must end with n, or the last document has no end"
    assert row.cu_seqlens.tolist() == starts + padding and row.cu_seqlens.dtype == torch.int32
    assert max(np.diff(row.cu_seqlens.tolist())) <= row.max_seqlen <= max(max_doc_len, 1)
    check_ngrams(row, pieces, n)


def shards_of(fewest: int) -> st.SearchStrategy[list[int]]:
    """Tokens of a shard of this many documents and more."""
    lengths = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 40)), min_size=fewest, max_size=90)
    return st.builds(lambda junk, docs: [7] * junk + documents(docs), st.integers(0, 5), lengths)


shard_tokens = shards_of(0)
stage_shapes = st.tuples(st.integers(1, 14), st.integers(1, 20))


@settings(max_examples=120, deadline=None)
@given(
    shards=st.lists(shard_tokens, min_size=1, max_size=4),
    stages=st.lists(stage_shapes, min_size=1, max_size=3),
    steps_each=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 4, 8]),
)
def test_the_ranks_rows_together_are_the_naive_stream(shards, stages, steps_each, world_size):
    """Catches: a rule of the stream broken (piece length, skipped rest, one shard per step, dropped remainder), rows
    dealt to the wrong rank or twice, a stage's batch size or max_doc_len applied a step late, wrong cu_seqlens,
    n-grams that reach across a document's start or into what was cut off."""
    track, naive = track_with(stages, steps_each), NaiveStream(shards)
    with TemporaryDirectory() as folder:
        write_shards(Path(folder), shards)
        loaders = [Loader(track, Path(folder), cpu(rank=r, world_size=world_size)) for r in range(world_size)]
        for step in range(track.schedule.total_steps):
            n, max_doc_len = stages[min(step // steps_each, len(stages) - 1)]
            try:
                expected = naive.step(8, n, max_doc_len)
            except EOFError:
                for loader in loaders:
                    with pytest.raises(SpeedrunError, match="run out"):
                        loader.next(step)
                break
            rows = [row for loader in loaders for row in loader.next(step)]
            assert len(rows) == 8
            for row, pieces in zip(rows, expected, strict=True):
                check_row(row, pieces, n, max_doc_len)
            assert len({loader.position for loader in loaders}) == 1


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(shard_tokens, min_size=2, max_size=3),
    before=st.integers(0, 4),
    after=st.integers(1, 5),
    first=st.integers(0, 6),
)
def test_a_restored_position_replays_the_same_rows(shards, before, after, first):
    """Catches: rows of a prefetch that began elsewhere, or state of the loader besides its position (a shard let go,
    a document counter). Steps after the restore may differ from those before it, as they do around a warm-up."""
    track = track_with([(6, 5), (3, 9)], steps_each=3)

    def take(loader: Loader, begin: int, count: int) -> list:
        taken = []
        try:
            for step in range(begin, begin + count):
                taken.append([as_tuple(row) for row in loader.next(step)])
        except SpeedrunError:
            taken.append("run out")
        return taken

    with TemporaryDirectory() as folder:
        data_dir = write_shards(Path(folder), shards)
        loader = Loader(track, data_dir, cpu())
        take(loader, first, before)
        position = loader.position
        expected = take(loader, before, after)
        loader.position = position
        assert take(loader, before, after) == expected
        loader.position = LoaderPosition()  # as after a warm-up; the last prefetch is stale
        fresh = Loader(track, data_dir, cpu())
        assert take(loader, 0, after) == take(fresh, 0, after)
        elsewhere = Loader(track, data_dir, cpu())
        elsewhere.position = position  # as after a resume
        assert take(elsewhere, before, after) == expected


def test_a_prefetch_for_another_step_or_place_is_not_used(tmp_path):
    """Catches: a prefetch recognized by its position alone, while the stage has changed, or by its step alone, while
    the position was restored."""
    data_dir = write_shards(tmp_path, [documents([10] * 400)])
    track = track_with([(6, 100), (12, 100)], steps_each=2)
    loader = Loader(track, data_dir, cpu())
    first = loader.next(0)  # prefetches step 1, of the first stage
    assert loader.next(2)[0].inputs.numel() == 12
    loader.position = LoaderPosition()
    loader.next(0)
    loader.position = LoaderPosition()
    assert as_tuple(loader.next(1)[0]) == as_tuple(first[0])


def test_row_shapes_are_static_within_a_stage(tmp_path):
    """Catches: a cu_seqlens or max_seqlen that depends on the documents, which would recompile the model."""
    data_dir = write_shards(tmp_path, [text_like(20_000, seed=0).tolist()])
    loader = Loader(track_with([(64, 32), (48, 500)], steps_each=4), data_dir, cpu())
    for steps in (range(4), range(4, 8)):
        shapes = {(row.inputs.shape, row.cu_seqlens.shape, row.max_seqlen) for s in steps for row in loader.next(s)}
        assert len(shapes) == 1


@pytest.mark.parametrize(
    ("tokens", "longest"), [(16_384, 2048), (32_768, 2048), (49_152, 2048), (16_384, 4096), (262_144, 10**9)]
)
def test_rows_like_those_of_fineweb_fit_the_capacity(tokens, longest):
    """Catches: a capacity that real rows exceed, each with a compilation while the clock runs, or one that is mostly
    empty, for which attention launches blocks. Lengths: log-normal, median 400 tokens, mean 660."""
    rng, capacity = np.random.default_rng(0), train_gpt.document_capacity(tokens)
    for _ in range(300):
        lengths = np.minimum(rng.lognormal(np.log(400), 1, 4 * capacity).astype(int) + 1, longest)
        documents = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
        assert capacity / 6 < documents < capacity


@pytest.mark.parametrize("world_size", [2, 4])
def test_touched_are_the_ngrams_that_each_ranks_row_reads(tmp_path, world_size):
    """Catches: rows of the table left out, whose gradient would be lost, those of the step in the background, a rank's
    own rows alone; an exchange where ranks add up the gradients of several rows."""
    data_dir = write_shards(tmp_path, [text_like(3000, seed=0).tolist()])
    track = track_with([(6, 9), (20, 9)], steps_each=3, rows=world_size)
    loaders = [Loader(track, data_dir, cpu(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step in range(6):
        read = [set(row.ngram_rows.flatten().tolist()) for loader in loaders for row in loader.next(step)]
        for loader in loaders:
            assert loader.touched.shape == (world_size, MODEL.ngram_rows)
            assert [set(np.flatnonzero(rows).tolist()) for rows in loader.touched] == read
    several = track_with([(6, 9)], steps_each=3, rows=2 * world_size)
    without = replace(track, model=replace(MODEL, ngrams=()))
    for track, ranks in ((several, world_size), (without, world_size), (track_with([(6, 9)], 3, rows=1), 1)):
        loader = Loader(track, data_dir, cpu(world_size=ranks))
        loader.next(0)
        assert loader.touched is None


def sampling(count: int, rows: int = 8) -> Track:
    """Two stages of three steps; prefixes are predicted in the first."""
    track = track_with([(30, 20), (50, 20)], steps_each=3, rows=rows)
    first, second = track.schedule.stages
    first = replace(first, prefix_weight=(0.25, 0.25))
    schedule = replace(track.schedule, stages=(first, second), extension=second)
    return replace(track, model=replace(MODEL, sampled_vocab=count), schedule=schedule)


def drawn(track: Track, data_dir: Path, steps: range, seed: int = 0, world_size: int = 1) -> list[list[tuple]]:
    """Rows of the steps by all ranks, targets, sampled columns and how many of them are targets."""
    loaders = [Loader(track, data_dir, cpu(rank=rank, world_size=world_size), seed) for rank in range(world_size)]
    found = []
    for loader in loaders:
        loader.prefix = np.arange(257) // 10 - 1
    for step in steps:
        rows = [row for loader in loaders for row in loader.next(step)]
        found.append([(row.targets.tolist(), row.sampled.tolist(), int(row.num_targets)) for row in rows])
    return found


def test_a_row_has_a_sample_of_all_its_targets_and_of_others(tmp_path):
    """Catches: a target or prefix left out, a column twice, columns that are no others, a shape that depends on the
    data, padding that is never drawn, prefixes where none are predicted."""
    data_dir, track = write_shards(tmp_path, [text_like(6000, seed=0).tolist()]), sampling(128)
    others = set()
    for step, rows in enumerate(drawn(track, data_dir, range(6))):
        for targets, sampled, num_targets in rows:
            wanted = set(targets) | ({target // 10 - 1 for target in targets} - {-1} if step < 3 else set())
            assert sampled[:num_targets] == sorted(wanted) and len(sampled) == len(set(sampled)) == 128
            others |= set(sampled[num_targets:])
    assert others == set(range(track.model.padded_vocab)) - {BOS} and track.model.padded_vocab > 257


@pytest.mark.parametrize("world_size", [2, 4])
def test_samples_are_a_function_of_seed_step_and_row(tmp_path, world_size):
    """Catches: a draw that depends on the process or on the steps before, the same draw in all rows or steps."""
    data_dir, track = write_shards(tmp_path, [text_like(6000, seed=0).tolist()]), sampling(128)
    steps = drawn(track, data_dir, range(4))
    assert drawn(track, data_dir, range(4), world_size=world_size) == steps
    assert drawn(track, data_dir, range(1), seed=1)[0] != steps[0]
    numbers = [*product((0, 1, 1 << 32, (1 << 63) - 1), range(3), range(3))]  # seed, step, row
    of_the_same = [train_gpt.sample_vocab(np.arange(300) < 9, 64, *some)[0].tolist() for some in numbers]
    assert len(set(map(str, of_the_same))) == len(numbers)
    resumed = Loader(track, data_dir, cpu())
    for step in range(2):
        resumed.next(step)
    later = Loader(track, data_dir, cpu())
    later.position = resumed.position
    assert [row.sampled.tolist() for row in later.next(3)] == [row.sampled.tolist() for row in resumed.next(3)]


def test_a_sample_of_everything_and_one_too_small(tmp_path):
    """Catches: an error for a sample that needs no others, or a division by zero for one that has none."""
    data_dir = write_shards(tmp_path, [text_like(6000, seed=0).tolist()])
    everything = sampling(MODEL.padded_vocab)
    for targets, sampled, n in drawn(everything, data_dir, range(1))[0]:
        assert set(targets) <= set(sampled[:n]) and sorted(sampled) == list(range(MODEL.padded_vocab))
    distinct = max(n for *_, n in drawn(everything, data_dir, range(1))[0])
    assert drawn(sampling(distinct + 1), data_dir, range(1))
    said = f"sampled-vocab {distinct}: row . of step 0 has {distinct} different targets.* whole vocabulary with 0"
    with pytest.raises(SpeedrunError, match=said):
        drawn(sampling(distinct), data_dir, range(1))


def test_more_documents_than_the_static_capacity_still_make_a_right_row(tmp_path):
    """Catches: document starts cut off (attention across documents) or an index error, in rows of BOS alone."""
    data_dir = write_shards(tmp_path, [documents([1] * 9000)])
    row = Loader(track_with([(1000, 9)], steps_each=1), data_dir, cpu()).next(0)[0]
    check_row(row, [[BOS]] * 1001, 1000, 9)


@pytest.mark.parametrize("num_documents", [127, 128, 129, 130])
def test_a_row_that_fills_the_static_capacity_still_ends_its_last_document(tmp_path, num_documents):
    """Catches: a last document without an end, where the starts leave no room for the padding. The capacity is 129."""
    lengths = [1] * (num_documents - 1) + [300]
    data_dir = write_shards(tmp_path, [documents(lengths * 8)])
    row = Loader(track_with([(200, 999)], steps_each=1), data_dir, cpu()).next(0)[0]
    pieces = [[BOS]] * (num_documents - 1) + [documents(lengths)[num_documents - 1 : 201]]
    check_row(row, pieces, 200, 999)


def test_tokens_before_the_first_bos_are_never_trained_on(tmp_path):
    """Catches: the head of a shard taken for a document."""
    data_dir = write_shards(tmp_path, [[7] * 500 + documents([30] * 20)])
    rows = Loader(track_with([(29, 99)], steps_each=1), data_dir, cpu()).next(0)
    assert rows[0].inputs.tolist() == documents([30])[:29]


def test_the_next_shard_is_read_before_it_is_needed(tmp_path):
    """Catches: a stall of a whole shard's reading at every shard end."""
    data_dir = write_shards(tmp_path, [documents([10] * 200)] * 3)
    loader = Loader(track_with([(6, 9)], steps_each=1), data_dir, cpu())
    loader.next(0)
    assert set(loader._shards) == {0, 1}
    assert loader._shards[1].result().bounds[-1] == 2000  # comes without any row asked of it


def test_running_out_of_shards_is_said_and_nothing_is_repeated(tmp_path):
    """Catches: a silent second epoch, or a StopIteration that tells nothing."""
    data_dir = write_shards(tmp_path, [documents([10] * 20), documents([10] * 20)])
    loader = Loader(track_with([(9, 99)], steps_each=9), data_dir, cpu())
    for step in range(4):
        loader.next(step)
    with pytest.raises(SpeedrunError, match=r"2 training shards in .* have run out.*fetch more|train fewer") as error:
        loader.next(4)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(SpeedrunError, match="run out"):  # and again, instead of hanging on a dead prefetch
        loader.next(4)


GOOD = documents([10] * 100)


def damaged(path: Path, how: str) -> None:
    write_shard(path, GOOD)
    whole = path.read_bytes()
    if how == "magic":
        write_shard(path, GOOD, magic=20240801)
    elif how == "version":
        write_shard(path, GOOD, version=7)
    elif how == "truncated":
        path.write_bytes(whole[:-20])
    elif how == "odd":
        path.write_bytes(whole[:-1])
    elif how == "too long":
        path.write_bytes(whole + b"\0\0")
    elif how == "header only half":
        path.write_bytes(whole[:500])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "negative":
        write_shard(path, [], count=-1)
    elif how == "token":
        write_shard(path, [*GOOD[:-1], 257])


DAMAGE = {
    "magic": r"20240801.*expected 20240520",
    "version": r"version 7, expected 1",
    "truncated": r"3004 bytes.*1000 tokens = 3024 bytes",
    "odd": r"3023 bytes.*1000 tokens = 3024 bytes",
    "too long": r"3026 bytes.*1000 tokens = 3024 bytes",
    "header only half": r"not a token shard",
    "empty": r"not a token shard.*empty",
    "negative": r"-1 tokens",
    "token": r"token 257.*257 tokens",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_refused_with_its_name_and_what_is_wrong(tmp_path, how):
    """Catches: training on garbage, or a message that leaves open which of 103 files to fetch again."""
    damaged(tmp_path / "x_train_000001.bin", how)
    with pytest.raises(SpeedrunError, match=re.escape("x_train_000001.bin") + ".*" + DAMAGE[how]):
        loader = Loader(track_with([(6, 9)], steps_each=50), tmp_path, cpu())
        for step in range(20):
            loader.next(step)
    damaged(tmp_path / "x_val_000001.bin", how)
    with pytest.raises(SpeedrunError, match=re.escape("x_val_000001.bin") + ".*" + DAMAGE[how]):
        validation_tokens(track_with([(6, 9)], 1, val_tokens=len(GOOD) - 1), tmp_path)


def test_a_damaged_later_shard_stops_the_run_only_when_its_turn_comes(tmp_path):
    """Catches: an error of the background reading that is lost, or that hits steps it has nothing to do with."""
    write_shards(tmp_path, [documents([10] * 20)])
    damaged(tmp_path / "x_train_000001.bin", "token")
    loader = Loader(track_with([(9, 99)], steps_each=9), tmp_path, cpu())
    loader.next(0)
    loader.next(1)
    with pytest.raises(SpeedrunError, match=r"x_train_000001\.bin.*token 257"):
        loader.next(2)


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Catches: uninitialized memory trained on when a shard is overwritten during the run."""
    path = write_shard(tmp_path / "x_train_000001.bin", GOOD)
    monkeypatch.setattr(train_gpt, "read_shard_header", lambda path: 1100)
    with pytest.raises(SpeedrunError, match=r"x_train_000001\.bin.*ended while it was read"):
        Shard.read(path, 257, BOS)


def test_a_missing_folder_names_the_folder_and_the_command(tmp_path):
    """Catches: an empty glob that ends as an IndexError."""
    track = track_with([(6, 9)], steps_each=1)
    folder = tmp_path / "no_such"
    for call in (lambda: Loader(track, folder, cpu()), lambda: validation_tokens(track, folder)):
        with pytest.raises(SpeedrunError, match=f"no_such\\. .*{re.escape(f'{track.data.fetch} --out {folder}')}"):
            call()


def test_processes_that_cannot_share_the_rows_are_refused(tmp_path):
    """Catches: rows left out silently, and another stream than that of W = 1."""
    write_shards(tmp_path, [GOOD])
    write_shards(tmp_path, [GOOD], split="val")
    track = track_with([(6, 9)], steps_each=1)
    check_numbers(track, Options(), cpu(rank=1, world_size=4))
    with pytest.raises(SpeedrunError, match="3 processes cannot share the 8 rows"):
        check_numbers(track, Options(), cpu(rank=1, world_size=3))


def test_a_run_needs_the_tokens_of_its_steps_and_no_more(tmp_path):
    """Catches: a run that finds out at its end that its data do not suffice. 2 steps of 8 rows take 7 tokens each."""
    write_shards(tmp_path, [GOOD[:100], GOOD[:12]])
    write_shards(tmp_path, [GOOD], split="val")
    track = track_with([(6, 9)], steps_each=50)
    require_tokens(track, tmp_path, stop=2)
    with pytest.raises(SpeedrunError, match=r"too few tokens.*112.*3 steps.*168"):
        require_tokens(track, tmp_path, stop=3)
    require_tokens(replace(track, data=replace(track.data, epochs=2)), tmp_path, stop=3)


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(shard_tokens, max_size=1),
    shard=shards_of(56),  # which fill a step of 8 rows of 7 tokens, however short they are
    after=st.lists(shard_tokens, max_size=1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    stop=st.integers(1, 12),
    epochs=st.integers(1, 3),
)
def test_the_rows_that_data_fill_are_counted_before_the_run(before, shard, after, shape, stop, epochs):
    """Catches: tokens counted that rows skip (what is left of a document, or of a shard), data refused that suffice, a
    number of epochs named that does not. One epoch after the other is the naive stream of the shards as often."""
    shards = [*before, shard, *after]

    def filled(epochs: int) -> int:
        naive, count = NaiveStream(shards * epochs), 0
        while count < stop:
            try:
                naive.step(8, *shape)
            except EOFError:
                break
            count += 1
        return count

    track = track_with([shape], steps_each=99)
    track = replace(track, data=replace(track.data, epochs=epochs))
    with TemporaryDirectory() as folder:
        data_dir = write_shards(Path(folder), shards)
        if filled(epochs) == stop:
            require_rows(track, data_dir, cpu(), stop)
            loader, naive = Loader(track, data_dir, cpu()), NaiveStream(shards * epochs)
            for step in range(stop):
                for row, pieces in zip(loader.next(step), naive.step(8, *shape), strict=True):
                    check_row(row, pieces, *shape)
            return
        with pytest.raises(SpeedrunError) as error:
            require_rows(track, data_dir, cpu(), stop)
        found = re.search(r"hold ([\d,]+) tokens, which fill (\d+) of (\d+) steps", str(error.value))
        assert [int(n.replace(",", "")) for n in found.groups()] == [sum(map(len, shards)), filled(epochs), stop]
        needed = int(re.search(r"--data.epochs (\d+)", str(error.value))[1])
        assert filled(needed) == stop > filled(needed - 1)


def test_no_number_of_epochs_is_named_for_shards_that_fill_no_step(tmp_path):
    """Catches: a search for it without end, or the advice to repeat what fills nothing however often it is read."""
    data_dir = write_shards(tmp_path, [GOOD[:20]])
    with pytest.raises(SpeedrunError, match="hold 20 tokens, which fill 0 of 2 steps") as error:
        require_rows(track_with([(6, 9)], steps_each=9), data_dir, cpu(), stop=2)
    assert "--data.epochs" not in str(error.value)


def test_a_shard_is_known_by_what_is_recorded_until_it_changes(tmp_path):
    """Catches: a SHA-256 believed of a file that was changed or replaced since, or computed though it is on record."""
    path = write_shard(tmp_path / "x_train_000001.bin", GOOD)
    actual = f"{len(GOOD)} tokens sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert shard_identity(path) == actual
    status = path.stat()
    entry = {"sha256": "0" * 64, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    (tmp_path / "a.json").write_text("[not json")
    (tmp_path / "b.json").write_text(json.dumps({"shards": {path.name: entry}}))
    assert shard_identity(path) == f"{len(GOOD)} tokens sha256 {'0' * 64}"
    write_shard(path, GOOD[::-1])
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    assert shard_identity(path) != f"{len(GOOD)} tokens sha256 {'0' * 64}"


@settings(max_examples=80, deadline=None)
@given(
    shards=st.lists(shard_tokens.filter(len), min_size=1, max_size=3),
    part=st.floats(0.01, 1, allow_subnormal=False),
    val_row=st.integers(1, 100),
    world_size=st.sampled_from([1, 2, 4, 8]),
)
def test_validation_predicts_the_first_val_tokens_once_each(shards, part, val_row, world_size):
    """Catches: tokens left out or counted twice at row or shard ends, rows aligned to BOS, a last row dropped, ranks
    that see the same rows, attention across documents, a target taken from the wrong place, a max_seqlen that differs
    between rows (a graph each), or that is the length of a row (attention launches blocks for all of it), n-grams
    that reach before the first token of a row or document."""
    stream = [token for tokens in shards for token in tokens]
    assume(len(stream) > 1)
    val_tokens = max(1, int(part * (len(stream) - 1)))
    track = track_with([(6, 9)], steps_each=1, val_tokens=val_tokens, val_row=val_row)
    with TemporaryDirectory() as folder:
        data_dir = write_shards(Path(folder), shards, split="val")
        runtimes = [cpu(rank=rank, world_size=world_size) for rank in range(world_size)]
        tokens, _ = validation_tokens(track, data_dir)
        per_rank = [list(validation_rows(track, tokens, runtime)) for runtime in runtimes]
    num_rows = -(-val_tokens // val_row)
    rows = [per_rank[i % world_size][i // world_size] for i in range(num_rows)]
    assert sum(len(rank) for rank in per_rank) == num_rows
    assert [t for row in rows for t in row.inputs.tolist()] == stream[:val_tokens]
    assert [t for row in rows for t in row.targets.tolist()] == stream[1 : val_tokens + 1]
    lengths = [0]
    for token in stream[:val_tokens]:
        lengths = [*lengths, 1] if token == BOS else [*lengths[:-1], lengths[-1] + 1]
    assert {row.max_seqlen for row in rows} == {min(max(lengths), val_row)}
    for row in rows:
        n = row.inputs.numel()
        starts = [0] + [i for i, t in enumerate(row.inputs.tolist()) if t == BOS and i > 0]
        cu = row.cu_seqlens.tolist()
        assert cu[: len(starts)] == starts and set(cu[len(starts) :]) == {n}
        assert max(np.diff(cu)) <= row.max_seqlen
        check_ngrams(row, [row.inputs[a:b].tolist() for a, b in pairwise([*starts, n])], n)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_rows_on_threads_come_in_their_order_and_so_many_are_begun(at_once):
    """Catches: the order in which threads are done, a row that is left out, and hundreds of rows of a long validation
    that would all be begun, and have to end, before a signal is seen."""
    made = []
    rows = (made.append(i) or i for i in range(7))
    with ThreadPoolExecutor(at_once) as pool:
        found = of_each(rows, lambda i: (time.sleep((7 - i) / 200), 10 * i)[1], pool, at_once)
        for i in range(7):
            assert next(found) == 10 * i
            assert len(made) <= i + at_once
    assert list(found) == [] and list(of_each(range(3), str)) == ["0", "1", "2"]


def test_too_few_validation_tokens_are_counted_in_the_message(tmp_path):
    """Catches: a mean over fewer tokens than the track says. The last of val_tokens inputs needs one token more."""
    write_shards(tmp_path, [GOOD])
    write_shards(tmp_path, [GOOD[:40], GOOD[:25]], split="val")
    assert len(validation_tokens(track_with([(6, 9)], 1, val_tokens=64), tmp_path)[0]) == 65
    with pytest.raises(SpeedrunError, match=r"too few tokens: the val shards.*hold 65.* 66"):
        validation_tokens(track_with([(6, 9)], 1, val_tokens=65), tmp_path)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_shard_is_refused_or_still_a_shard(tmp_path, count):
    """Catches: a crash, a message that names no file, tokens that are not those of the file.

    What the format cannot show, other tokens of the vocabulary, the SHA-256 of data/nano.py and of
    data/cached_fineweb10B.py finds.
    """
    path, rng, refused = write_shard(tmp_path / "a_train_000001.bin", text_like(3000, seed=0)), random.Random(0), 0
    original = path.read_bytes()
    for _ in range(count):
        content = mutated(original, rng)
        path.write_bytes(content)
        try:
            bounds = Shard.read(path, 257, BOS).bounds
        except SpeedrunError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        header, tokens = np.frombuffer(content[:12], "<i4"), np.frombuffer(content[1024:], "<u2")
        assert header.tolist() == [20240520, 1, len(tokens)] and tokens.max() < 257
        assert bounds.tolist() == [*np.flatnonzero(tokens == BOS), len(tokens)]
    assert refused > count // 2


@given(st.lists(st.text("ab", max_size=5).map(str.encode), max_size=12))
def test_the_prefix_of_a_token_is_the_longest_other_that_it_begins_with(tokens):
    """Catches: a token that is its own prefix, an empty one (BOS) that all begin with, the shortest instead of the
    longest. Of several tokens with the same bytes, none of which is a prefix of the other, the last counts."""
    expected = []
    for token in tokens:
        longest = -1
        for i, other in enumerate(tokens):
            proper = 0 < len(other) < len(token) and token.startswith(other)
            if proper and (longest < 0 or len(other) >= len(tokens[longest])):
                longest = i
        expected.append(longest)
    assert prefix_tokens(tokens) == expected


def test_the_bytes_of_tokens_are_read_and_their_prefixes_put_into_the_model(tmp_path):
    """Catches: lengths read as offsets, a prefix for BOS or for the padding of the vocabulary."""
    write_token_bytes(tmp_path)
    tokens = read_token_bytes(tmp_path, 257)
    assert tokens == [*(str(i).encode() for i in range(256)), b""]
    model = train_gpt.GPT(replace(MODEL, num_heads=2, head_dim=8), cpu())
    model.set_prefixes(tokens)
    assert model.prefix.tolist() == [-1] * 10 + [i // 10 for i in range(10, 256)] + [-1] * 16
