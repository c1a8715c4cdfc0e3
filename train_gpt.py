"""The NanoGPT speedrun: train a GPT to a target validation loss in the least wall-clock time, in one file.

    python train_gpt.py nano            sources of two Python packages to 1.36 nats/byte; 1.35, mean of 10 seeds,
                                        in 3.3 s on two cores of an AMD EPYC, torch 2.13.0
    ./run.sh small                      FineWeb to 3.28 nats/token, 1 to 8 GPUs of one or more nodes

The file reads in the order in which data flows: tracks -> hot operations, kernels -> optimizer -> model -> data -> run.
What one asks of a track or a trained model beside the race (a text, HellaSwag, a plan, siblings) is in evals/.
State is weights, optimizer state, loader position, random generator, clock, and the scales of FP8. All else (windows,
learning rate, momentum, rotary frequencies, whether the embedding is tied, ...) is a pure function of (track, step):
`Track.at(step)` returns it as `Settings`. The log starts with this file's text, so that it is a complete record.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

try:  # comes with torch's CUDA wheels for Linux
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None
jit = triton.jit if triton else lambda kernel: kernel

# torch 2.13 renamed two collectives.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SpeedrunError(Exception):
    """Something the user can mend. The message says what was found, what was expected and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Tracks: what is run. Every number below can be overridden from the command line (see --help).
# ----------------------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """A coefficient of the layout, which `GPT.hidden` asks for by role and layer."""

    role: str
    layer: int
    initial: float
    width: int = 1
    """1, or a number per head, or per half of the heads."""
    source: str = ""
    """The stream that it weighs, where its role is to add one."""


@dataclass(frozen=True)
class Network:
    """What computes coefficients: for each token scale * (W2 gelu(W1 x) + b), or b alone, the same for all tokens."""

    name: str
    outputs: tuple[Output, ...]
    reads: str | None = None
    """The stream x, not normed; None: b alone."""
    scale: float | None = 1.0
    """None: learned, one number for all such networks."""


class Layer(NamedTuple):
    """One layer of the layout, as GPT reads it."""

    attention: int | None  # slot in the banks of attention
    paired: bool
    long: bool
    table: int | None  # of value embeddings
    value_gate: int | None  # slot of the gate of that table, where no network computes it
    late: bool  # attention reads the output of the layer `late_input`


@dataclass(frozen=True)
class ModelConfig:
    """Layout of the network. Layers count from 0; entries that name a layer beyond num_layers are ignored.

    Streams have names: x0, the normed embedding; ngram, that of n-grams; first and last, what the first and the last
    layer are given; outI, the output of layer I; valueI, its value embedding.
    """

    vocab_size: int
    """Number of tokens; the embedding and the head are padded to a multiple of vocab_multiple."""
    num_layers: int
    """Layers, each with an MLP and, but for `without_attention`, attention."""
    num_heads: int
    """Attention heads of a layer."""
    head_dim: int
    """Width of one head, a multiple of 4. The model is num_heads * head_dim wide."""
    without_attention: tuple[int, ...] = ()
    """Layers that have only an MLP."""
    paired_layers: tuple[int, ...] = ()
    """Layers in which head h and head h + H/2 attend as one sequence of twice the length."""
    long_layers: tuple[int, ...] = ()
    """Layers with the long attention window and the partial key offset; the others have the short window."""
    key_offset: bool = True
    """In layers with the long window, half of each key comes from the token before."""
    gated_layers: tuple[int, ...] = ()
    """Layers that multiply each head by a gate."""
    xsa_layers: tuple[int, ...] = ()
    """Layers that take from each head some of its part along the token's own value (arXiv:2603.09078)."""
    dc_layers: tuple[int, ...] = ()
    """Layers that add to each head a composition of all heads' attention over the last dc_window tokens."""
    dc_window: int = 112
    """The token itself included."""
    value_layers: tuple[int, ...] = ()
    """Layers that add, gated, an embedding of the token to their values, each of a table of its own."""
    value_std: float = 0.01
    """Standard deviation of these tables at the start."""
    skips: tuple[tuple[int, int], ...] = ()
    """Pairs (from, to): the output of layer `from` is added, gated, to the input of layer `to`."""
    late_input: int | None = None
    """Attention of all later layers reads the output of this one."""
    gate_networks: bool = True
    """Networks compute gates and weights for each token, from x0; else they are learned numbers."""
    second_gates: int | None = None
    """From this layer on, from what this layer is given."""
    network_width: int = 64
    """Hidden width of these networks."""
    mix_in: tuple[str, ...] = ()
    """Streams that a network mixes into the last layer's values and input; it has all weights of that layer then."""
    mix_out: tuple[tuple[str, float], ...] = ()
    """Streams that a network mixes into the output of the last layer, each with its weight at the start."""
    smear: bool = True
    """Add, gated, the embedding of the token before to each embedding."""
    ngrams: tuple[int, ...] = ()
    """The stream ngram is the sum, over these n, of an embedding of the last n tokens."""
    ngram_rows: int = 1 << 16
    """Rows of their table, which they are hashed into."""
    ngram_signs: int = 0
    """Rows of a table of random signs that multiply these embeddings; 0: none."""
    ngram_norm: bool = False
    """Norm the sum."""
    ngram_std: float = 0.0
    """Standard deviation of the table at the start."""
    ngram_weight: float = 0.05
    """Weight of the stream ngram in each layer, at the start."""
    gate_dim: int = 12
    """How many dims the gates of the smear and of value embeddings read, an even number."""
    mlp_ratio: int = 4
    """Hidden width of the MLP in multiples of the width."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this."""
    sampled_vocab: int = 0
    """Columns of the head in the training loss of a row: all targets, the others drawn at random; 0: the whole head."""
    equal_qk_init: bool = False
    """Start with Wk equal to Wq in every layer: each position attends first to those that are like it."""
    zero_wo: bool = False
    """Start with Wo zero in every layer: attention adds nothing at first."""
    qk_heads: int = 2
    """Adjacent heads whose part of Wq or Wk is one matrix to the optimizer."""

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def training_vocab(self) -> int:
        """Columns of the head that the training loss takes."""
        return self.sampled_vocab or self.padded_vocab

    @property
    def attention_layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if i not in self.without_attention]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layout, layer by layer."""
        attention = self.attention_layers
        tables = [i for i in self.value_layers if i in attention]
        gated = [i for i in tables if i != self.mixing_layer]
        slot = lambda layers, i: layers.index(i) if i in layers else None
        return tuple(
            Layer(
                attention=slot(attention, i),
                paired=i in self.paired_layers,
                long=i in self.long_layers,
                table=slot(tables, i),
                value_gate=slot(gated, i),
                late=self.late_input is not None and i > self.late_input,
            )
            for i in range(self.num_layers)
        )

    @property
    def mixing_layer(self) -> int | None:
        """The last layer, where a network of its own computes its weights."""
        last = self.num_layers - 1
        return last if self.mix_in and last > 0 and last in self.attention_layers else None

    @property
    def networks(self) -> tuple[Network, ...]:
        """All coefficients of the layout, by the network that computes them."""
        last, mixing, heads = self.num_layers - 1, self.mixing_layer, self.num_heads
        attention = self.attention_layers
        usual = [i for i in attention if i != mixing]

        gates = [Output("xsa", i, 0.0, heads) for i in self.xsa_layers if i in attention]
        gates += [Output("gate", i, 0.25, heads) for i in self.gated_layers if i in attention]
        for i in range(self.num_layers):
            gates += [Output("inject", i, 0.0, source="x0")] if i in usual else []
            # Into layer 0 before its attention, which sees n-grams as well; into the others after it.
            place = "inject" if i else "input"
            gates += [Output(place, i, self.ngram_weight, source="ngram")] if i in usual or i == 0 else []
        gates += [Output("skip", target, 0.5, source=f"out{i}") for i, target in self.skips if target <= last]
        for i in self.dc_layers:
            gates += [Output("dc_in", i, 1.0, heads), Output("dc_out", i, 0.0, heads)] if i in attention else []
        # The second network reads the output of the layer before `split`, so that there must be one.
        split = last + 1 if self.second_gates is None else max(self.second_gates, 1)
        pre, post = [o for o in gates if o.layer < split], [o for o in gates if o.layer >= split]

        resid, branch = math.sqrt(1.1), 1.0  # weights of the residual stream, and of what attention or MLP adds to it
        mixed_in = [Output("values", last, 0.0, source=source) for source in self.mix_in]
        mixed_in += [Output("input", last, 0.0, source=source) for source in self.mix_in]
        mixed_in += [Output("value_gate", last, 2.0, 2)] if last in self.value_layers else []
        mixed_in += [Output("attention_resid", last, resid), Output("attention_branch", last, branch)]
        mixed_in.append(Output("inject", last, 0.0, source="first"))
        mixed_in.append(Output("inject", last, self.ngram_weight, source="ngram"))
        mixed_in += [Output("mlp_resid", last, resid), Output("mlp_branch", last, branch)]
        mixed_out = [Output("end", last, weight, source=source) for source, weight in self.mix_out]

        parts = [("attention", i) for i in usual] + [("mlp", i) for i in range(self.num_layers) if i != mixing]
        networks = [
            Network("pre", pre, "x0", scale=None) if self.gate_networks else Network("gates", gates),
            Network("post", post if self.gate_networks else [], f"out{split - 1}", scale=None),
            Network("mix_in", [] if mixing is None else mixed_in, "last", scale=0.1),
            Network("mix_out", mixed_out, f"out{last}", scale=0.1),
            Network("resid", [Output(f"{part}_resid", i, resid) for part, i in parts]),
            Network("branch", [Output(f"{part}_branch", i, branch) for part, i in parts]),
        ]
        known = {"", "x0", "first", *(f"out{i}" for i in range(last))}
        known |= {f"value{i}" for i in self.value_layers if i in attention}
        known |= {"last"} if last else set()
        known |= {"ngram"} if self.ngrams else set()
        networks = [replace(n, outputs=tuple(o for o in n.outputs if o.source in known)) for n in networks]
        return tuple(network for network in networks if network.outputs)

    def refuse_impossible(self) -> None:
        """Raise SpeedrunError where the numbers make no network."""
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise SpeedrunError(f"model.{name} {value}: expected no entry twice.")
        pairs = 2 if self.mix_in or any(i < self.num_layers for i in self.paired_layers) else 1
        if self.num_layers < 1 or self.head_dim % 4 or self.num_heads % self.qk_heads or self.num_heads % pairs:
            raise SpeedrunError(
                f"model: num_layers {self.num_layers} must be positive, head_dim {self.head_dim} a multiple of 4, and "
                f"num_heads {self.num_heads} a multiple of qk_heads {self.qk_heads} and of {pairs}."
            )
        if any(source >= target for source, target in self.skips):
            raise SpeedrunError(f"model.skips {self.skips}: a skip must lead to a later layer.")
        if set(self.dc_layers) & set(self.paired_layers) & set(self.attention_layers):
            raise SpeedrunError(f"model.dc_layers {self.dc_layers}: heads in pairs cannot be composed.")
        if self.gate_dim > self.width or self.gate_dim % 2:
            raise SpeedrunError(
                f"model.gate_dim {self.gate_dim}: expected an even number up to the width {self.width}."
            )
        for stream in (*self.mix_in, *(name for name, _ in self.mix_out)):
            if not re.fullmatch(r"x0|ngram|first|last|(out|value)\d+", stream):
                raise SpeedrunError(
                    f"model: unknown stream {stream!r}: expected x0, ngram, first, last, outI or valueI."
                )

    def stretched(self, num_layers: int) -> ModelConfig:
        """The same layout of another depth: each layer with a role keeps its place in proportion."""
        place = lambda i: round(i * (num_layers - 1) / max(self.num_layers - 1, 1)) if i < self.num_layers else i
        places = lambda layers: tuple(dict.fromkeys(map(place, layers)))
        stream = lambda name: re.sub(r"(?<=out|lue)\d+", lambda number: str(place(int(number[0]))), name)
        skips = dict.fromkeys((place(a), place(b)) for a, b in self.skips)
        lists = ("without_attention", "paired_layers", "long_layers", "gated_layers", "xsa_layers", "dc_layers")
        layers = {name: places(getattr(self, name)) for name in (*lists, "value_layers")}
        # Where roles meet in a layer: heads in pairs cannot be composed, and the last layer keeps its attention.
        layers["paired_layers"] = tuple(i for i in layers["paired_layers"] if i not in layers["dc_layers"])
        layers["without_attention"] = tuple(i for i in layers["without_attention"] if i != num_layers - 1)
        mix_out: dict[str, float] = {}
        for name, weight in self.mix_out:
            mix_out[stream(name)] = mix_out.get(stream(name), 0.0) + weight
        return replace(
            self,
            num_layers=num_layers,
            **layers,
            skips=tuple((a, b) for a, b in skips if a < b),
            late_input=None if self.late_input is None else place(self.late_input),
            second_gates=None if self.second_gates is None else place(self.second_gates),
            mix_in=tuple(dict.fromkeys(map(stream, self.mix_in))),
            mix_out=tuple(mix_out.items()),
        )


@dataclass(frozen=True)
class Rule:
    """How one parameter is updated and communicated."""

    kind: Literal["adam", "normuon", "muon", "adagrad"]
    """normuon: for banks of matrices, muon: without its second moment; adagrad: for the table of n-grams, of which it
    updates the rows that have a gradient; adam: for everything."""
    sharded: bool
    """Sharded: reduce-scatter, update of the rank's part, all-gather. Else: all-reduce, full update on every rank."""
    lr_mul: tuple[float, ...] = (1.0,)
    """Multiplies the learning rate; in a bank several values repeat along its matrices (fc, proj, fc, proj, ...)."""
    wd_mul: float = 1.0
    """Multiplies the weight decay, of which Adagrad has none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates of the running mean and mean square of the gradient."""
    eps: float = 1e-10
    """Guard of Adam and Adagrad against division by zero."""

    @property
    def is_of_matrices(self) -> bool:
        """These are updated at every step, all others at odd ones."""
        return self.kind in ("normuon", "muon")


LAMBDA = Rule("adam", sharded=False, lr_mul=(5.0,), wd_mul=0.0)
TABLE = Rule("adam", sharded=True, lr_mul=(75.0,), wd_mul=5.0, betas=(0.75, 0.95))
HEAD = Rule("adam", sharded=True, wd_mul=150.0, betas=(0.5, 0.95))
NETWORK = Rule("adam", sharded=False, lr_mul=(0.1,))


@dataclass(frozen=True)
class Rules:
    """The table of the optimizer: a rule per parameter, or per network of the layout, whose biases do not decay."""

    qk_bank: Rule = Rule("normuon", sharded=True)
    vo_bank: Rule = Rule("normuon", sharded=True)
    mlp_bank: Rule = Rule("normuon", sharded=True, lr_mul=(1.0, 2.0))
    sa_lambda: Rule = LAMBDA
    smear_lambda: Rule = LAMBDA
    skip_lambda: Rule = LAMBDA
    smear_gate: Rule = Rule("adam", sharded=False, lr_mul=(0.01,), wd_mul=0.0)
    value_gates: Rule = Rule("adam", sharded=False)
    gate_scale: Rule = replace(NETWORK, wd_mul=0.0)
    pre: Rule = NETWORK
    post: Rule = NETWORK
    gates: Rule = replace(LAMBDA, betas=(0.65, 0.95))
    mix_in: Rule = replace(NETWORK, lr_mul=(0.25,))
    mix_out: Rule = replace(NETWORK, lr_mul=(0.25,))
    resid: Rule = replace(LAMBDA, betas=(0.9, 0.95))
    branch: Rule = replace(LAMBDA, lr_mul=(1.0,), betas=(0.9, 0.95))
    value_embeds: Rule = TABLE
    ngram_embed: Rule = TABLE
    head: Rule = HEAD
    embed: Rule = HEAD

    def of(self, parameter: str) -> Rule | None:
        """The rule of a parameter; None: there is none."""
        name, _, part = parameter.partition(".")
        rule = getattr(self, name, None)
        return replace(rule, wd_mul=0.0) if rule and part == "bias" else rule


@dataclass(frozen=True)
class OptimizerConfig:
    adam_lr: float = 0.008
    """Learning rate of Adam, before the schedule's factor and lr_mul."""
    adam_decay: float = 0.005
    """Cautious weight decay of Adam."""
    muon_lr: float = 0.023
    """Learning rate of NorMuon, before the schedule's factor and lr_mul."""
    muon_decay: float = 1.2
    """Cautious weight decay of NorMuon."""
    muon_beta2: float = 0.9
    """Of the running mean square by which NorMuon divides the rows of an orthogonalized update."""
    polar_express_rounds: Literal[1, 2, 3, 4, 5] = 5
    """Rounds of the orthogonalization."""
    cautious: bool = True
    """Decay a weight only where the update shrinks it anyway."""
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class Stage:
    """Part of the schedule with one batch size, one pair of windows and one peak learning rate."""

    tokens: int
    """Tokens per step, over all ranks."""
    windows: tuple[int, int]
    """Short and long attention window, in tokens."""
    lr: float
    """Multiplies every learning rate."""
    prediction_weights: tuple[tuple[float, float], ...]
    """Weight of the prediction of token t+1, t+2, ...: its value at the start and at the end of the stage."""
    max_doc_len: int = 2048
    """Tokens taken from one document."""
    prefix_weight: tuple[float, float] = (0.0, 0.0)
    """Weight of the prediction of the longest other token that the next one begins with, likewise."""


@dataclass(frozen=True)
class Schedule:
    scheduled_steps: int
    """Steps of the stages together."""
    extension_steps: int
    """Steps after the scheduled ones, at the final learning rate."""
    stages: tuple[Stage, ...]
    """Equal parts of the scheduled steps."""
    extension: Stage
    """The stage of the extension steps; its learning rate does not cool."""
    final_long_window: int
    """Long window of the final validation, in tokens; it changes neither frequencies nor scale."""
    yarn_max_window: int = 1 << 30
    """YaRN follows the growth of the long window only up to here."""
    attn_scale: float = 0.1
    """Scale of the attention scores in the first stage."""
    cooldown: float = 0.6
    """Last part of the scheduled steps, in which the learning rate falls linearly to final_lr."""
    final_lr: float = 0.15
    """Learning-rate factor at the end of the cooldown."""
    momentum: tuple[float, float] = (0.85, 0.95)
    """Muon's momentum at both ends of the run, and between."""
    momentum_steps: tuple[int, int] = (300, 50)
    """Steps of its rise and of its fall."""
    untie: float = 2 / 3
    """After this part of the scheduled steps the embedding leaves the head and goes on alone."""

    @property
    def total_steps(self) -> int:
        return self.scheduled_steps + self.extension_steps

    @property
    def untie_step(self) -> int:
        """Odd, because Adam steps on odd steps."""
        return round(self.untie * self.scheduled_steps) | 1

    def parts(self) -> list[tuple[Stage, range]]:
        """The stages and the extension, each with its steps."""
        count = len(self.stages)
        ends = [*(round(self.scheduled_steps * i / count) for i in range(count + 1)), self.total_steps]
        return list(zip((*self.stages, self.extension), map(range, ends, ends[1:]), strict=True))

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps before this one train on."""
        return sum(stage.tokens * len(range(steps.start, min(steps.stop, step))) for stage, steps in self.parts())

    def lr_at(self, step: int, stage: Stage) -> float:
        """What multiplies the learning rates."""
        if stage is self.extension:
            return stage.lr
        cooldown_steps = self.cooldown * self.scheduled_steps
        cooled = 0.0
        if cooldown_steps > 0:
            cooled = min(max((step - (1 - self.cooldown) * self.scheduled_steps) / cooldown_steps, 0), 1)
        return stage.lr * (1 - cooled) + self.final_lr * cooled

    def momentum_at(self, step: int) -> float:
        """NorMuon's: it rises at the start and falls at the end."""
        rise, fall = self.momentum_steps
        ramp = min(step / max(rise, 1), (self.total_steps - step) / max(fall, 1), 1.0)
        return self.momentum[0] + (self.momentum[1] - self.momentum[0]) * ramp

    def rotary_at(self, step: int, head_dim: int) -> tuple[tuple[float, ...], float]:
        """Frequencies and attention scale after all growth of the long window up to this step."""
        frequencies, attn_scale = base_frequencies(head_dim), self.attn_scale
        windows = [min(stage.windows[1], self.yarn_max_window) for stage, steps in self.parts() if steps.start <= step]
        for before, after in itertools.pairwise(windows):
            frequencies, attn_scale = yarn(frequencies, attn_scale, before, after)
        return frequencies, attn_scale


@dataclass(frozen=True)
class DataConfig:
    dataset: str
    """Folder of the shards below data/."""
    fetch: str
    """The command that makes or fetches them."""
    bos: int
    """Token that starts every document."""
    rows_per_step: int
    """Rows that the processes share; the number of processes must divide it."""
    val_tokens: int
    """The first so many tokens of the validation shards are predicted, all of them."""
    val_row_tokens: int
    """Tokens per row of the validation stream."""
    rows_at_once: int = 1
    """Rows that a process on a CPU computes at the same time, each from end to end on one of its threads, of a step no
    more than it has. At 1 torch shares each operation among its threads, and waits for them a thousand times per step.
    """
    epochs: int = 1
    """How many times the training shards are read, one after the other; records read them once."""


@dataclass(frozen=True)
class Settings:
    """All that depends on the step, and nothing else: a pure function of (track, step)."""

    step: int
    stage: Stage
    windows: tuple[int, int]  # short and long, tokens
    frequencies: tuple[float, ...]  # (D/4,) radians per position
    attn_scale: float
    lr: float  # multiplies the learning rates of both rules
    momentum: float  # NorMuon's
    prediction_weights: tuple[float, ...]
    prefix_weight: float
    tied: bool  # the embedding mirrors the head
    unties: bool  # at the end of this step the embedding takes over the head's optimizer state

    @property
    def adam_steps(self) -> bool:
        """Adam steps on odd steps; the gradients of two steps add up."""
        return self.step % 2 == 1


@dataclass(frozen=True)
class Track:
    """One competition: model, data, schedule, optimizer and target."""

    name: tyro.conf.Suppress[str]
    target_loss: float | None
    """Validation loss to reach, in nats per token; None: none, as on other data than the track's own."""
    model: ModelConfig
    data: DataConfig
    schedule: Schedule
    optimizer: OptimizerConfig
    val_every: int = 250
    """Steps between validations; 0: only at the end."""
    prefix_loss: bool = True
    """Predict prefixes of tokens as well, where the stages say so; takes tokens.bin, which is beside the shards."""
    coordinate_descent_tuning: bool = False
    """Let inductor tune its kernels by coordinate descent, which takes long; the rules allow it on `medium` alone."""

    def at(self, step: int) -> Settings:
        """The settings of a training step, 0 <= step < schedule.total_steps."""
        schedule = self.schedule
        stage, steps = [part for part in schedule.parts() if part[1].start <= step][-1]
        done = (step - steps.start) / max(len(steps), 1)
        prefix0, prefix1 = stage.prefix_weight if self.prefix_loss else (0.0, 0.0)
        frequencies, attn_scale = schedule.rotary_at(step, self.model.head_dim)
        return Settings(
            step=step,
            stage=stage,
            windows=stage.windows,
            frequencies=frequencies,
            attn_scale=attn_scale,
            lr=schedule.lr_at(step, stage),
            momentum=schedule.momentum_at(step),
            prediction_weights=tuple(w0 + (w1 - w0) * done for w0, w1 in stage.prediction_weights),
            prefix_weight=prefix0 + (prefix1 - prefix0) * done,
            tied=step <= schedule.untie_step,
            unties=step == schedule.untie_step,
        )

    def validation_at(self, step: int) -> Settings:
        """Settings of the validation before training step `step`; the final one widens the long window."""
        settings = self.at(min(step, self.schedule.total_steps - 1))
        if step < self.schedule.total_steps:
            return settings
        return replace(settings, windows=(settings.windows[0], self.schedule.final_long_window))


def base_frequencies(head_dim: int) -> tuple[float, ...]:
    """D/4 rotary frequencies, (1/1024)^linspace(0, 1), in radians per position."""
    count = head_dim // 4
    return tuple((1 / 1024) ** (j / max(count - 1, 1)) for j in range(count))


def yarn(frequencies: tuple[float, ...], attn_scale: float, a: int, b: int) -> tuple[tuple[float, ...], float]:
    """Frequencies and softmax scale after the long window grew from a to b tokens (YaRN, arXiv:2309.00071).

    Frequencies that turn more than 32 times inside the old window stay; those below one turn are stretched by b/a.
    """
    if b <= a:
        return frequencies, attn_scale
    stretched = []
    for f in frequencies:
        rotations = a * f / (2 * math.pi)
        keep = min(max((rotations - 1) / 31, 0.0), 1.0)
        stretched.append(f * (a / b + keep * (1 - a / b)))
    return tuple(stretched), attn_scale * (1 + 0.2 * math.log(b / a))


SMALL = Track(
    name="small",
    target_loss=3.28,
    model=ModelConfig(
        vocab_size=50257,
        num_layers=11,
        num_heads=6,
        head_dim=128,
        without_attention=(6,),
        paired_layers=(0, 2, 5, 9),
        long_layers=(3, 10),
        gated_layers=(3, 10),
        xsa_layers=(1, 3, 4, 7),
        dc_layers=(10,),
        value_layers=(1, 2, 8, 9, 10),
        skips=((3, 6),),
        late_input=7,
        second_gates=4,
        mix_in=("first", "out7", "last"),
        mix_out=(("first", 0.0), ("out7", -0.5), ("last", 0.0), ("value1", 0.0), ("out3", 0.0)),  # -0.5: the backout
        ngrams=(2,),
        ngram_rows=377_280,
        ngram_signs=8192,
    ),
    data=DataConfig(
        dataset="fineweb10B",
        fetch="python data/cached_fineweb10B.py",
        bos=50256,
        rows_per_step=8,
        val_tokens=10_485_760,
        val_row_tokens=262_144,
    ),
    schedule=Schedule(
        scheduled_steps=1270,
        extension_steps=15,
        stages=(
            Stage(8 * 16384, (128, 3 * 128), 1.0, ((1.0, 1.0), (0.5, 0.5), (0.25, 0.0)), 896, (0.25, 0.25)),
            Stage(16 * 16384, (3 * 128, 7 * 128), 1.52, ((1.0, 1.0), (0.5, 0.0)), prefix_weight=(0.25, 0.0)),
            Stage(24 * 16384, (5 * 128, 11 * 128), 1.73, ((1.0, 1.0),)),
        ),
        extension=Stage(24 * 16384, (6 * 128, 13 * 128), 0.15, ((1.0, 1.0),)),
        final_long_window=20 * 128,
    ),
    optimizer=OptimizerConfig(),
)

# The length and width of GPT-2 medium. In neither this layout nor the next has anyone trained yet.
MEDIUM = Track(
    name="medium",
    target_loss=2.92,
    model=replace(
        SMALL.model.stretched(16),
        num_heads=8,
        long_layers=(4, 10, 15),
        gated_layers=(4, 10, 15),
        ngram_rows=201_216,
    ),
    data=replace(SMALL.data, fetch="python data/cached_fineweb10B.py 30"),
    schedule=Schedule(
        scheduled_steps=4700,
        extension_steps=40,
        stages=tuple(
            Stage(
                tokens=16384 * min(8 * (i + 1), 32),
                windows=(128 * min(long // 2, 11), 128 * long),
                lr=(1.0, 1.52, 1.73, 2.0)[min(i, 3)],
                # Those of `small`, whose three stages are the first quarter here.
                prediction_weights=SMALL.schedule.stages[min(i, 2)].prediction_weights,
                max_doc_len=4096,
                prefix_weight=SMALL.schedule.stages[min(i, 2)].prefix_weight,
            )
            for i, long in enumerate((3, 7, 11, 13, 15, 17, 19, 21, 23, 23, 23, 23))
        ),
        extension=Stage(32 * 16384, (11 * 128, 23 * 128), 0.1, ((1.0, 1.0),), max_doc_len=4096),
        final_long_window=27 * 128,
        yarn_max_window=13 * 128,
        cooldown=0.7,
        final_lr=0.1,
        untie=1 / 6,
    ),
    coordinate_descent_tuning=True,
    optimizer=OptimizerConfig(adam_lr=0.004, muon_lr=0.015),
)

# The depth and width of GPT-2 XL, with larger batches.
XL = Track(
    name="xl",
    target_loss=2.77,
    model=replace(
        SMALL.model.stretched(52),
        num_heads=12,
        long_layers=(15, 33, 51),
        gated_layers=(15, 33, 51),
        ngram_rows=201_216,
    ),
    data=replace(
        SMALL.data,
        dataset="fineweb100B",
        fetch="python data/cached_fineweb10B.py 140 --dataset fineweb100B",
        rows_per_step=64,  # short rows: the activations of one at a time fit into 80 GB beside the weights
        val_row_tokens=16_384,
    ),
    schedule=replace(
        SMALL.schedule,
        scheduled_steps=20_304,
        extension_steps=40,
        stages=tuple(
            replace(stage, tokens=245_760 * (i + 1), max_doc_len=4096) for i, stage in enumerate(SMALL.schedule.stages)
        ),
        extension=replace(SMALL.schedule.extension, tokens=737_280, max_doc_len=4096),
    ),
    optimizer=OptimizerConfig(adam_lr=0.004, muon_lr=0.015),
)

# Bytes say little by themselves: n-grams have embeddings, and one layer is then enough. Queries that start equal to
# keys find earlier places with the same n-grams from the first step on. Small batches: a step costs little, of the
# table only the rows that it touches.
NANO = Track(
    name="nano",
    target_loss=1.36,
    val_every=0,
    model=ModelConfig(
        vocab_size=257,
        num_layers=1,
        num_heads=2,
        head_dim=64,
        long_layers=(0,),
        value_layers=(0,),
        value_std=0.0,
        gate_networks=False,
        smear=False,
        ngrams=(1, 2, 3, 4, 5, 6),
        ngram_rows=65_536,
        ngram_norm=True,
        ngram_std=0.005,
        ngram_weight=0.5,
        mlp_ratio=2,
        vocab_multiple=16,
        equal_qk_init=True,
    ),
    data=DataConfig(
        dataset="nano",
        fetch="python data/nano.py",
        bos=256,
        rows_per_step=2,
        rows_at_once=2,
        val_tokens=524_288,
        val_row_tokens=16_384,
    ),
    schedule=Schedule(
        scheduled_steps=106,
        extension_steps=4,
        stages=(
            Stage(768, (64, 192), 1.0, ((1.0, 1.0),)),
            Stage(1024, (64, 256), 1.0, ((1.0, 1.0),)),
            Stage(1536, (64, 320), 1.0, ((1.0, 1.0),)),
        ),
        extension=Stage(2048, (64, 384), 0.1, ((1.0, 1.0),)),
        final_long_window=512,
        attn_scale=0.15,  # heads half as wide as those of `small`
        cooldown=0.5,
        final_lr=0.2,
        momentum_steps=(60, 30),
    ),
    optimizer=OptimizerConfig(
        adam_lr=0.025,
        muon_lr=0.028,
        muon_beta2=0.95,
        polar_express_rounds=3,
        rules=Rules(mlp_bank=Rule("normuon", sharded=True), ngram_embed=Rule("adagrad", sharded=True, lr_mul=(7.0,))),
    ),
)

TRACKS = {track.name: track for track in (NANO, SMALL, MEDIUM, XL)}


# ----------------------------------------------------------------------------------------------------------------------
# Hot operations: each is one small function in plain PyTorch, which a fused kernel can replace.
# ----------------------------------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """For sums and optimizer state: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, no learned weight, epsilon of the dtype in which it computes."""
    return F.rms_norm(x, (x.size(-1),))


def add_weighted(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """x + weight * y, which broadcast. Compiled, addcmul would keep each of the two times 1, by a kernel of its own."""
    return x + weight * y if torch.compiler.is_compiling() else torch.addcmul(x, weight, y)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent dim pairs: x_2j <- x_2j cos + x_2j+1 sin, x_2j+1 <- x_2j+1 cos - x_2j sin.

    x (..., D); cos and sin (with its signs, see `rotary_tables`) broadcast against it.
    """
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin


def normed_and_rotated(
    qk: Tensor,  # (T, 2, H, D) queries and keys
    cos: Tensor,  # (T, G, D) of the positions; G: how many heads attend as one sequence, 2 where they are paired
    sin: Tensor,
    offset: bool,  # partial key offset: the dims of a key that rotary embedding lets stand come from the token before
    fused: bool = False,
) -> tuple[Tensor, Tensor]:  # (T, H, D) each
    """RMSNorm of each query and key, and rotary embedding: head h turns by the (h G / H)-th of a token's positions."""
    if fused:
        return torch.ops.speedrun.norm_rotary(qk, cos, sin, offset)[:2]
    (T, _, H, D), G = qk.shape, cos.size(1)
    # Each by itself: as one slab their gradients would be put together and taken apart again.
    q, k = (rotate(norm(x).view(T, G, H // G, D), cos[:, :, None], sin[:, :, None]) for x in qk.unbind(1))
    if offset:
        still = k[..., D // 2 :]
        k = torch.cat((k[..., : D // 2], torch.cat((still[:1], still[:-1]))), dim=-1)
    return q.reshape(T, H, D), k.reshape(T, H, D)


def attention(
    q: Tensor,  # (T, heads, D)
    k: Tensor,  # (T, heads, D)
    v: Tensor,  # (T, heads, D)
    cu_seqlens: Tensor,  # int32, starts of the documents, padded with T
    max_seqlen: int,  # longest document
    scale: float,
    window: int,
) -> Tensor:  # (T, heads, D)
    """Causal attention inside documents, at most `window` tokens back."""
    if q.is_cuda:
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, window)
    return block_local_attention(q, k, v, cu_seqlens, scale, window)


def varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, window):
    """Attention of CUDA, torch's varlen_attn: its own FlashAttention-2, or version 3 or 4 where one was activated."""
    return torch.nn.attention.varlen.varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(window, 0)
    )


def first_keys(position: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """The first key that each position of a row sees: `window` tokens back, and not before its document."""
    document_start = cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]
    return torch.maximum(document_start, position - window)


def block_local_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> Tensor:
    """Attention of the CPU: each block of queries sees its own block of keys and those that the window reaches.

    Costs O(T * (window + block)) time and memory. Arguments as for `attention`. In batched products, in bfloat16
    half the time that torch's scaled_dot_product_attention takes with the same mask; in float32 a sixth more.
    """
    queries, keys, values, mask = local_blocks(q * scale, k, v, cu_seqlens, window)
    out = MaskedAttention.apply(queries, keys, values, torch.where(mask, 0.0, -math.inf).to(q.dtype))
    return out.flatten(1, 2)[:, : len(q)].transpose(0, 1)


def composed_attention(
    q: Tensor,  # (T, heads, D)
    k: Tensor,  # (T, heads, D)
    v: Tensor,  # (T, heads, D)
    mix: Tensor,  # (T, heads) weights of the heads' attention
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    fused: bool = False,
) -> Tensor:  # (T, heads, D)
    """Dynamically composed heads (arXiv:2405.08553), of rank 1: a mix of all heads' attention, on each one's values."""
    if fused and window <= COMPOSED_WINDOW:
        position = torch.arange(len(q), dtype=cu_seqlens.dtype, device=q.device)
        first = first_keys(position, cu_seqlens, window)
        return torch.ops.speedrun.composed_attention(q, k, v, mix, first, scale, window)[0]
    queries, keys, values, mask = local_blocks(q, k, v, cu_seqlens, window)
    scores = (queries * scale @ keys.mT).to(wide(q.dtype)).masked_fill(~mask, -math.inf)
    num_blocks, block = mask.shape[:2]
    mix = F.pad(mix.T, (0, num_blocks * block - len(q))).unflatten(1, (num_blocks, block))  # (heads, num_blocks, block)
    composed = (scores.softmax(-1) * mix[..., None]).sum(0).to(v.dtype)
    return (composed @ values).flatten(1, 2)[:, : len(q)].transpose(0, 1)


def local_blocks(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of queries (heads, num_blocks, block, D), for each the keys and values (heads, num_blocks, keys, D) that
    its window reaches, and which of them each query sees (num_blocks, block, keys)."""
    T = q.size(0)
    block = min(64, T)
    num_blocks = -(-T // block)
    back = block * min(-(-window // block), num_blocks - 1)  # keys before its own block that a query block can see
    end = num_blocks * block - T  # padding after the row

    position = torch.arange(T + end, dtype=cu_seqlens.dtype, device=q.device)
    first_key = first_keys(position, cu_seqlens, window).view(num_blocks, block, 1)
    key = F.pad(position, (back, 0), value=-1).unfold(0, back + block, block)[:, None]  # (num_blocks, 1, keys)
    mask = (key >= first_key) & (key <= position.view(num_blocks, block, 1))

    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    queries = F.pad(q, (0, 0, 0, end)).unflatten(1, (num_blocks, block))
    keys, values = (OverlappingBlocks.apply(x, block, back, end) for x in (k, v))
    return queries, keys, values, mask


class MaskedAttention(torch.autograd.Function):
    """softmax(q k^T + bias) v. q (*, queries, D); k, v (*, keys, D); bias (*, queries, keys) has no gradient.

    Autograd's own gradient of k is a transposed one, which the backward pass of `OverlappingBlocks` adds up slowly.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (q @ k.mT).add_(bias).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        scores_grad = torch.ops.aten._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)
        return scores_grad @ k, scores_grad.mT @ q, p.mT @ grad, None


class OverlappingBlocks(torch.autograd.Function):
    """Blocks of keys with the `back` keys before each: (heads, T, D) -> a view (heads, num_blocks, back + block, D).

    The backward pass of unfold itself adds element by element, which took a seventh of a step of `nano`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, block: int, back: int, end: int) -> Tensor:
        ctx.block, ctx.back, ctx.size = block, back, x.size(1)
        return F.pad(x, (0, 0, back, end)).unfold(1, back + block, block).mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        heads, num_blocks, _, D = grad.shape
        total = grad.new_zeros(heads, num_blocks + ctx.back // ctx.block, ctx.block, D)
        for i, part in enumerate(grad.split(ctx.block, dim=2)):
            total[:, i : i + num_blocks] += part
        return total.flatten(1, 2)[:, ctx.back : ctx.back + ctx.size], None, None, None


def relu_squared_mlp(h: Tensor, fc: Tensor, proj: Tensor, fused: bool = False) -> Tensor:
    """relu(h fc^T)^2 proj (ReLU^2, arXiv:2109.08668). h (T, d); fc, proj (4d, d)."""
    return torch.ops.speedrun.relu_squared_mlp(h, fc, proj, *(None,) * 6, fused)[0]


E4M3_MAX = 448.0  # the largest number of FP8 e4m3


def to_fp8(x: Tensor, largest: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """x / scale in FP8 e4m3, and the scale, 0-dim float32. No magnitude is above `largest`; None: it is looked for.

    Of a normed vector none is above the root of its length: the format keeps its precision over 4 orders of magnitude,
    so that the true maximum would gain nothing, and cost a pass over the tensor.
    """
    largest = x.abs().amax().float() if largest is None else x.new_full((), largest, dtype=torch.float32)
    scale = largest.clamp_min(1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def linear(x: Tensor, weight: Tensor, fp8: bool, largest: float | None = None) -> Tensor:
    """x weight^T, forward in FP8 where that is wanted; backward never. x (T, k), weight (n, k); `largest`: of x."""
    if not fp8 or not torch.is_grad_enabled():
        return F.linear(x, weight)
    operands = (*to_fp8(x.detach(), largest), *to_fp8(weight.detach()))
    return torch.ops.speedrun.linear_fp8(x, weight, *operands)


def softcapped(logits: Tensor) -> Tensor:
    """The asymmetric soft-cap, 23 sigmoid((z + 5) / 7.5), in at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return 23 * torch.sigmoid((logits + 5) / 7.5)


def softcapped_cross_entropy(
    logits: Tensor,  # (T, V), before the soft-cap
    targets: Tensor,  # (K, T) int64, negative where there is none
    weights: Tensor,  # (K,)
    num_targets: Tensor | None = None,  # int64, 0-dim; None: the logits are those of the whole head
    vocab: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-token cross-entropy and its gradient. The kernel `_cross_entropy` computes the same in one pass.

    Returns, by position: sum over k of weights[k] * CE(softcap(logits), targets[k]) (T,), the same of k = 0 alone with
    weight 1 (T,), and the gradient of the former with respect to the logits (T, V), at least float32.

    Sampled softmax (arXiv:1412.2007): where the logits are the num_targets columns of a head of `vocab` that must be
    there and V - num_targets drawn from its others, each of these stands for (vocab - num_targets) / (V - num_targets)
    in the sum of exponentials, which is then right in the mean. Its logarithm is too low, by a term of order 1/V.
    """
    z = weighed = softcapped(logits)
    if num_targets is not None:
        n, column = num_targets.to(z.dtype), torch.arange(z.size(1), device=z.device)
        weighed = z + torch.where(column < num_targets, 0, ((vocab - n) / (len(column) - n)).log())
    log_sum = weighed.logsumexp(1, keepdim=True)
    has_target = (targets >= 0).T  # (T, K)
    targets = targets.clamp_min(0).T
    losses = (log_sum - z.gather(1, targets)) * has_target
    weighted = has_target * weights
    grad = (weighed - log_sum).exp_().mul_(weighted.sum(1, keepdim=True)).scatter_add_(1, targets, -weighted)
    grad *= z * (1 - z / 23) / 7.5
    return losses @ weights, losses[:, 0], grad


def symmetric_product(X: Tensor, fused: bool = False) -> Tensor:
    """X X^T of each matrix. X (n, r, c) -> (n, r, r)."""
    return torch.ops.speedrun.symmetric_product(X) if fused else X @ X.mT


def quintic(X: Tensor, a: float, b: float, c: float, fused: bool = False) -> Tensor:
    """aX + bAX + cA^2X of each matrix, A = X X^T. X (n, r, c)."""
    A = symmetric_product(X, fused)
    if fused:  # a goes onto the diagonal of the matrix that X is multiplied by: baddbmm would copy X first
        return torch.ops.speedrun.quadratic(A, a, b, c) @ X
    return torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: what replaces the hot operations on a GPU. To torch.compile each is one operator.
# ----------------------------------------------------------------------------------------------------------------------


def operator(name: str, fake):
    """Register a function as torch.ops.speedrun.<name>; `fake` gives results of the same shapes, without data.

    torch.library.custom_op would do the same, but import torch._dynamo: 3 s that a run which never compiles can save.
    """

    def register(function):
        qualified = f"speedrun::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "CompositeExplicitAutograd", function)
        torch.library.register_fake(qualified, fake)
        return function

    return register


@dataclass(frozen=True)
class Tiles:
    """Shapes of a matrix product in Triton: (m, k) x (k, n) tiles, `stages` of which are in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    descriptors: bool
    """Load and store through the tensor memory accelerator of Hopper and Blackwell."""


BIG_TILES = Tiles(128, 256, 64, warps=8, stages=4, descriptors=True)  # for 227 KB of shared memory
SMALL_TILES = Tiles(128, 128, 32, warps=8, stages=4, descriptors=False)  # for 99 KB
INTERPRETED_TILES = Tiles(32, 32, 32, warps=4, stages=1, descriptors=False)


@functools.cache
def tiles(device: torch.device) -> Tiles:
    """Big ones on the Hopper and Blackwell of data centers, small ones on all others since Ampere."""
    if device.type != "cuda":  # Triton's interpreter
        return INTERPRETED_TILES
    big = torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 * 1024
    return BIG_TILES if big else SMALL_TILES


@jit
def _symmetric(
    X,  # (n, r, c) contiguous
    Y,  # (n, r, r) contiguous: alpha X X^T, plus beta X + gamma I if ADD (then r = c)
    r,
    c,
    alpha,
    beta,
    gamma,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile on or below the diagonal of one matrix, stored twice: as it is, and mirrored."""
    # Row i of the tiles on or below the diagonal begins with number i(i+1)/2; the root may be off by one.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32) - (i * (i + 1) // 2 > tile).to(tl.int32)
    j = tile - i * (i + 1) // 2
    n = tl.program_id(1).to(tl.int64)
    X += n * r * c
    Y += n * r * r
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, c, BLOCK_K):
        ks = begin + tl.arange(0, BLOCK_K)
        a = tl.load(X + rows[:, None] * c + ks[None, :], mask=(rows[:, None] < r) & (ks[None, :] < c), other=0.0)
        b = tl.load(X + cols[:, None] * c + ks[None, :], mask=(cols[:, None] < r) & (ks[None, :] < c), other=0.0)
        acc = tl.dot(a, b.T, acc)
    inside = (rows[:, None] < r) & (cols[None, :] < r)
    acc *= alpha
    if ADD:
        acc += beta * tl.load(X + rows[:, None] * c + cols[None, :], mask=inside, other=0.0)
        acc += tl.where(rows[:, None] == cols[None, :], gamma, 0.0)
    y = acc.to(Y.dtype.element_ty)
    tl.store(Y + rows[:, None] * r + cols[None, :], y, mask=inside)
    if i != j:
        tl.store(Y + cols[None, :] * r + rows[:, None], y, mask=inside)


def _launch_symmetric(X: Tensor, alpha: float, beta: float, gamma: float, add: bool) -> Tensor:
    X = X.contiguous()
    n, r, c = X.shape
    tile = tiles(X.device)
    block = min(tile.m, tile.n)
    Y = torch.empty(n, r, r, dtype=X.dtype, device=X.device)
    rows = triton.cdiv(r, block)
    sizes = {"ADD": add, "BLOCK": block, "BLOCK_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages}
    _symmetric[rows * (rows + 1) // 2, n](X, Y, r, c, alpha, beta, gamma, **sizes)
    return Y


@operator("symmetric_product", fake=lambda X: X.new_empty(X.size(0), X.size(1), X.size(1)))
def _symmetric_product_op(X: Tensor) -> Tensor:
    return _launch_symmetric(X, 1.0, 0.0, 0.0, add=False)


@operator("quadratic", fake=lambda A, a, b, c: torch.empty_like(A, memory_format=torch.contiguous_format))
def _quadratic_op(A: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + bA + cA^2 of each symmetric matrix. A (n, r, r)."""
    return _launch_symmetric(A, c, b, a, add=True)


@jit
def _norm_rotary(
    QK,  # (T, 2, H, D) queries and keys, or backward where their gradient goes
    Q,  # (T, H, D) contiguous, as all others: the results, or backward their gradients
    K,
    Q_OUT,  # (T, H, D) of backward: the results
    K_OUT,
    RSTD,  # (T, 2, H) float32, over the root mean square of each
    LAST,  # (H, D / 2): under OFFSET what the last token would give the next
    COS,  # (T, G, D)
    SIN,
    T,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    OFFSET: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some tokens, the queries or the keys of one group of heads. Only the first half of the dims turns.

    Of y = R x / rms the gradient is R^T (g - y mean(g y)) / rms: backward wants no x, and attention keeps y anyway.
    """
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    is_key = tl.program_id(1) // G
    group = tl.program_id(1) % G
    cols = tl.arange(0, D // 2)[None, :]
    other = cols ^ 1  # of the pair of dims
    inside = t < T
    still = t + is_key * OFFSET  # the token to which the dims that stand go
    whole = inside & (still < T)
    own = inside & (t == 0) & (still > t)  # the first token keeps its own, too
    lost = inside & (still == T)
    cos = tl.load(COS + (t * G + group) * D + cols, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + (t * G + group) * D + cols, mask=inside, other=0.0).to(tl.float32)
    if is_key:
        X, Y = K, K_OUT
    else:
        X, Y = Q, Q_OUT
    for i in range(H // G):
        head = group * (H // G) + i
        slab = QK + ((t * 2 + is_key) * H + head) * D
        rstd_at = RSTD + (t * 2 + is_key) * H + head
        at = (t * H + head) * D
        stand = (still * H + head) * D + D // 2 + cols
        last = LAST + ((t + 1 - T) * H + head) * (D // 2) + cols
        if FORWARD:
            a = tl.load(slab + cols, mask=inside, other=0.0).to(tl.float32)
            a_other = tl.load(slab + other, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(slab + D // 2 + cols, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
            tl.store(rstd_at, rstd, mask=t < T)
            tl.store(X + at + cols, ((a * cos + a_other * sin) * rstd).to(X.dtype.element_ty), mask=inside)
            b = (b * rstd).to(X.dtype.element_ty)
            tl.store(X + stand, b, mask=whole)
            if OFFSET:
                tl.store(X + at + D // 2 + cols, b, mask=own)
                tl.store(last, b, mask=lost)
        else:
            g = tl.load(X + at + cols, mask=inside, other=0.0).to(tl.float32)
            g_other = tl.load(X + at + other, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(Y + at + cols, mask=inside, other=0.0).to(tl.float32)
            y_other = tl.load(Y + at + other, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(X + stand, mask=whole, other=0.0).to(tl.float32)
            z = tl.load(Y + stand, mask=whole, other=0.0).to(tl.float32)
            if OFFSET:
                h += tl.load(X + at + D // 2 + cols, mask=own, other=0.0).to(tl.float32)
                z += tl.load(last, mask=lost, other=0.0).to(tl.float32)
            mean = ((tl.sum(g * y, axis=1) + tl.sum(h * z, axis=1)) / D)[:, None]
            rstd = tl.load(rstd_at, mask=t < T, other=0.0)
            turned = (g - y * mean) * cos - (g_other - y_other * mean) * sin
            tl.store(slab + cols, (turned * rstd).to(QK.dtype.element_ty), mask=inside)
            tl.store(slab + D // 2 + cols, ((h - z * mean) * rstd).to(QK.dtype.element_ty), mask=inside)


def _launch_norm_rotary(qk, q, k, q_out, k_out, rstd, last, cos, sin, offset: bool, forward: bool) -> None:
    (T, _, H, D), G = qk.shape, cos.size(1)
    sizes = {"H": H, "D": D, "G": G, "OFFSET": offset, "FORWARD": forward, "BLOCK": 16, "num_warps": 4}
    eps = torch.finfo(wide(qk.dtype)).eps
    _norm_rotary[triton.cdiv(T, 16), 2 * G](qk, q, k, q_out, k_out, rstd, last, cos, sin, T, eps, **sizes)


def _norm_rotary_fake(qk, cos, sin, offset):
    T, _, H, D = qk.shape
    rstd, last = qk.new_empty(T, 2, H, dtype=torch.float32), qk.new_empty(H, D // 2)
    return qk.new_empty(T, H, D), qk.new_empty(T, H, D), rstd, last


@operator("norm_rotary", fake=_norm_rotary_fake)
def _norm_rotary_op(qk: Tensor, cos: Tensor, sin: Tensor, offset: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qk = qk.contiguous()
    q, k, rstd, last = _norm_rotary_fake(qk, cos, sin, offset)
    _launch_norm_rotary(qk, q, k, q, k, rstd, last, cos, sin, offset, forward=True)
    return q, k, rstd, last


@operator("norm_rotary_backward", fake=lambda q_grad, k_grad, q, *_: q.new_empty(q.size(0), 2, *q.shape[1:]))
def _norm_rotary_backward_op(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    last: Tensor,
    cos: Tensor,
    sin: Tensor,
    offset: bool,
) -> Tensor:
    qk_grad = q.new_empty(q.size(0), 2, *q.shape[1:])
    grads = q_grad.contiguous(), k_grad.contiguous()
    _launch_norm_rotary(qk_grad, *grads, q, k, rstd, last, cos, sin, offset, forward=False)
    return qk_grad


def _norm_rotary_setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    _, cos, sin, ctx.offset = inputs
    ctx.save_for_backward(*output, cos, sin)


def _norm_rotary_backward(ctx, q_grad: Tensor, k_grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return torch.ops.speedrun.norm_rotary_backward(q_grad, k_grad, *ctx.saved_tensors, ctx.offset), None, None, None


torch.library.register_autograd(
    "speedrun::norm_rotary", _norm_rotary_backward, setup_context=_norm_rotary_setup_context
)


# A program of the composed heads has 32 queries and the 256 keys up to its last, or 64 keys and, step by step, the
# queries that see them. With a window of 111 a key and its value are read 143 / 32 times from the L2 cache, a query
# 175 / 64 times; 16 queries on 128 keys would compute half as much, but read 8 times, which by count takes longer on an
# H100. 64 queries on 256 keys do not fit the registers, and 512 keys not the shared memory.
COMPOSED_QUERIES, COMPOSED_KEYS = 32, 64
COMPOSED_WINDOW = 256 - COMPOSED_QUERIES  # the longest that is possible


@jit
def _composed_heads(
    Q,  # (T, H, D) contiguous, as K, V, OUT and Q_GRAD
    K,
    V,
    MIX,  # (T, H) contiguous, weights of the heads' attention
    FIRST,  # (T,) int32, the first key that each query sees; it never decreases
    LSE,  # (T, H) float32, log of the sum of exponentials
    BAND,  # (T, TILE) the mix of all heads' attention, or backward its gradient; key s is in column s % TILE
    OUT,  # the result, or backward its gradient
    Q_GRAD,
    MIX_GRAD,  # (T, H) float32
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some queries, the keys up to the last of them, all heads twice: the sum over heads is complete before its use.

    The band is stored, so that the side of the keys, head by head, needs neither the sum again nor the values.
    """
    begin = tl.program_id(0) * BLOCK
    t = begin + tl.arange(0, BLOCK)
    keys = begin + BLOCK - TILE + tl.arange(0, TILE)
    dims = tl.arange(0, D)[None, :]
    first = tl.load(FIRST + t, mask=t < T, other=T)  # past the row a query sees zeros past the row: no NaN
    seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= t[:, None])
    near = (keys[:, None] >= tl.load(FIRST + begin)) & (keys[:, None] < T)
    inside = t[:, None] < T
    # Pointers to the first row, and 32-bit offsets from there: with 64-bit ones registers would spill.
    start = begin.to(tl.int64) * (H * D)
    Q += start
    OUT += start
    Q_GRAD += start
    K += start + (BLOCK - TILE) * H * D
    V += start + (BLOCK - TILE) * H * D
    rows = tl.arange(0, BLOCK)[:, None] * (H * D) + dims
    cols = tl.arange(0, TILE)[:, None] * (H * D) + dims
    band = tl.zeros((BLOCK, TILE), tl.float32)
    for h in range(H):
        if FORWARD:
            X, Y = Q, K
        else:
            X, Y = OUT, V
        x = tl.load(X + rows + h * D, mask=inside, other=0.0)
        y = tl.load(Y + cols + h * D, mask=near, other=0.0)
        if FORWARD:
            scores = tl.where(seen, tl.dot(x, y.T) * scale, -float("inf"))
            largest = tl.max(scores, axis=1)
            p = tl.exp(scores - largest[:, None])
            sums = tl.sum(p, axis=1)
            tl.store(LSE + t * H + h, largest + tl.log(sums), mask=t < T)
            mix = tl.load(MIX + t * H + h, mask=t < T, other=0.0).to(tl.float32)
            band += p * (mix / sums)[:, None]
        else:
            band = tl.dot(x, y.T, band)
    low = band.to(BAND.dtype.element_ty)
    cells = t.to(tl.int64)[:, None] * TILE + (keys[None, :] + TILE) % TILE  # of no negative remainder
    tl.store(BAND + cells, low, mask=inside)
    for h in range(H):
        if FORWARD:
            v = tl.load(V + cols + h * D, mask=near, other=0.0)
            tl.store(OUT + rows + h * D, tl.dot(low, v).to(OUT.dtype.element_ty), mask=inside)
        else:
            q = tl.load(Q + rows + h * D, mask=inside, other=0.0)
            k = tl.load(K + cols + h * D, mask=near, other=0.0)
            lse = tl.load(LSE + t * H + h, mask=t < T, other=0.0)
            mix = tl.load(MIX + t * H + h, mask=t < T, other=0.0).to(tl.float32)
            p = tl.where(seen, tl.exp(tl.dot(q, k.T) * scale - lse[:, None]), 0.0)
            g = low.to(tl.float32)
            mean = tl.sum(p * g, axis=1)
            tl.store(MIX_GRAD + t * H + h, mean, mask=t < T)
            s_grad = (p * (g - mean[:, None]) * mix[:, None]).to(k.dtype)
            tl.store(Q_GRAD + rows + h * D, (tl.dot(s_grad, k) * scale).to(Q_GRAD.dtype.element_ty), mask=inside)


@jit
def _composed_heads_keys(
    Q,  # (T, H, D) contiguous, as K, OUT_GRAD, K_GRAD and V_GRAD
    K,
    MIX,  # (T, H) contiguous
    FIRST,  # (T,) int32
    LSE,  # (T, H) float32
    BAND,  # (T, TILE), as the next and MIX_GRAD of `_composed_heads`
    BAND_GRAD,
    OUT_GRAD,
    MIX_GRAD,  # (T, H) float32
    K_GRAD,
    V_GRAD,
    T,
    scale,
    window,
    H: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some keys of one head, BLOCK by BLOCK with the queries that can see any of them. Tiles are (keys, queries)."""
    h = tl.program_id(1)
    begin = tl.program_id(0) * KEYS
    keys = begin + tl.arange(0, KEYS)
    dims = tl.arange(0, D)[None, :]
    cols = keys.to(tl.int64)[:, None] * (H * D) + h * D + dims
    inside = keys[:, None] < T
    k = tl.load(K + cols, mask=inside, other=0.0)
    k_grad = tl.zeros((KEYS, D), tl.float32)
    v_grad = tl.zeros((KEYS, D), tl.float32)
    for step in range(tl.cdiv(window + KEYS, BLOCK)):
        t = begin + step * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(FIRST + t, mask=t < T, other=T)
        near = (t < T) & (first < begin + KEYS)
        seen = (keys[:, None] >= first[None, :]) & (keys[:, None] <= t[None, :])
        rows = t.to(tl.int64)[:, None] * (H * D) + h * D + dims
        at = t.to(tl.int64)[None, :] * TILE + keys[:, None] % TILE  # where not seen, another key's
        out_grad = tl.load(OUT_GRAD + rows, mask=near[:, None], other=0.0)
        band = tl.where(seen, tl.load(BAND + at, mask=near[None, :], other=0.0), 0.0)
        v_grad = tl.dot(band, out_grad, v_grad)
        q = tl.load(Q + rows, mask=near[:, None], other=0.0)
        lse = tl.load(LSE + t * H + h, mask=near, other=0.0)
        mix = tl.load(MIX + t * H + h, mask=near, other=0.0).to(tl.float32)
        mean = tl.load(MIX_GRAD + t * H + h, mask=near, other=0.0)
        p = tl.where(seen, tl.exp(tl.dot(k, q.T) * scale - lse[None, :]), 0.0)
        g = tl.load(BAND_GRAD + at, mask=near[None, :], other=0.0).to(tl.float32)
        s_grad = (p * (g - mean[None, :]) * mix[None, :]).to(q.dtype)
        k_grad = tl.dot(s_grad, q, k_grad)
    tl.store(K_GRAD + cols, (k_grad * scale).to(K_GRAD.dtype.element_ty), mask=inside)
    tl.store(V_GRAD + cols, v_grad.to(V_GRAD.dtype.element_ty), mask=inside)


def _composed_sizes(q: Tensor, window: int) -> dict[str, int]:
    tile = 1 << (window + COMPOSED_QUERIES - 1).bit_length()  # a power of two
    stages = 3 if tiles(q.device) is BIG_TILES else 2  # of 72 KB, where D is 128, beside the first
    sizes = {"H": q.size(1), "D": q.size(2), "BLOCK": COMPOSED_QUERIES, "TILE": tile}
    return sizes | {"num_warps": 8, "num_stages": stages}


def _composed_fake(q, k, v, mix, first, scale, window):
    band = q.new_empty(q.size(0), _composed_sizes(q, window)["TILE"])
    return q.new_empty(q.shape), band, mix.new_empty(mix.shape, dtype=torch.float32)


@operator("composed_attention", fake=_composed_fake)
def _composed_op(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, H, D)
    v: Tensor,  # (T, H, D)
    mix: Tensor,  # (T, H)
    first: Tensor,  # (T,) int32, the first key that each query sees
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, H, D); the band and LSE of `_composed_heads`
    """Forward moves 4 times the bytes of q, backward 5 times for queries and 6 times for keys, a band a third. What
    Inductor makes of the plain twin moves them about 55 times."""
    q, k, v, mix = (x.contiguous() for x in (q, k, v, mix))
    out, band, lse = _composed_fake(q, k, v, mix, first, scale, window)
    sizes = _composed_sizes(q, window)
    _composed_heads[(triton.cdiv(len(q), COMPOSED_QUERIES),)](
        q, k, v, mix, first, lse, band, out, out, lse, len(q), scale, FORWARD=True, **sizes
    )
    return out, band, lse


@operator(
    "composed_attention_backward",
    fake=lambda grad, q, k, v, mix, *_: tuple(x.new_empty(x.shape) for x in (q, k, v, mix)),
)
def _composed_backward_op(
    grad: Tensor,  # (T, H, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor,
    first: Tensor,
    band: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, q, k, v, mix = (x.contiguous() for x in (grad, q, k, v, mix))
    q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q, k, v))
    band_grad, mix_grad = torch.empty_like(band), torch.empty_like(lse)
    T, H, sizes = q.size(0), q.size(1), _composed_sizes(q, window)
    _composed_heads[(triton.cdiv(T, COMPOSED_QUERIES),)](
        q, k, v, mix, first, lse, band_grad, grad, q_grad, mix_grad, T, scale, FORWARD=False, **sizes
    )
    operands = q, k, mix, first, lse, band, band_grad, grad, mix_grad, k_grad, v_grad
    programs = triton.cdiv(T, COMPOSED_KEYS), H
    _composed_heads_keys[programs](*operands, T, scale, window, KEYS=COMPOSED_KEYS, **sizes)
    return q_grad, k_grad, v_grad, mix_grad.to(mix.dtype)


def _composed_setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.window = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _composed_backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    operands = grad, *ctx.saved_tensors, ctx.scale, ctx.window
    return *torch.ops.speedrun.composed_attention_backward(*operands), None, None, None


torch.library.register_autograd(
    "speedrun::composed_attention", _composed_backward, setup_context=_composed_setup_context
)


@jit
def _linear_relu_square(
    a,  # (M, K) contiguous
    b,  # (N, K) contiguous
    out,  # (M, N) contiguous: forward relu(a b^T)^2, backward 2 sqrt(post) (a b^T)
    post,  # (M, N) contiguous: backward what forward gave, and is read; forward in FP8 `out` in FP8
    scale_ab,  # 0-dim float32, of FP8: that of a b^T
    scale_post,  # 0-dim float32, of FP8: that of the result
    largest,  # (programs,) of FP8: the largest result of each
    M,
    N,
    K,
    FORWARD: tl.constexpr,
    FP8: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # a, b, out and, of FP8, post are tensor descriptors, not pointers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A matrix product by persistent programs, one per multiprocessor, with the MLP's nonlinearity at its end."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    peaks = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # Programs that run together work on GROUP rows of tiles, column by column: they share operands in the L2 cache.
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(GROUP, tiles_m - first)
        within = tile % (GROUP * tiles_n)
        m = (first + within % height) * BLOCK_M
        n = within // height * BLOCK_N
        rows = m + tl.arange(0, BLOCK_M)
        cols = n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if DESCRIPTORS:
                x = a.load([m, k])
                y = b.load([n, k])
            else:
                ks = k + tl.arange(0, BLOCK_K)
                x_mask = (rows[:, None] < M) & (ks[None, :] < K)
                y_mask = (cols[:, None] < N) & (ks[None, :] < K)
                x = tl.load(a + rows[:, None].to(tl.int64) * K + ks[None, :], mask=x_mask, other=0.0)
                y = tl.load(b + cols[:, None].to(tl.int64) * K + ks[None, :], mask=y_mask, other=0.0)
            acc = tl.dot(x, y.T, acc)
        # In two halves, which take half the shared memory.
        halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            y = halves[half]
            begin = n + half * (BLOCK_N // 2)
            some = begin + tl.arange(0, BLOCK_N // 2)
            offsets = rows[:, None].to(tl.int64) * N + some[None, :]
            inside = (rows[:, None] < M) & (some[None, :] < N)
            if FORWARD:
                if FP8:  # pre-activations are rounded as any product in FP8 rounds them
                    y = (y * tl.load(scale_ab)).to(tl.bfloat16).to(tl.float32)
                y = tl.maximum(y, 0.0)
                y = y * y
                if FP8:
                    peaks = tl.maximum(peaks, tl.max(y, axis=1))
                    y8 = tl.minimum(y.to(tl.bfloat16).to(tl.float32) * (1.0 / tl.load(scale_post)), 448.0)
                    if DESCRIPTORS:
                        post.store([m, begin], y8.to(post.dtype))
                    else:
                        tl.store(post + offsets, y8.to(post.dtype.element_ty), mask=inside)
            else:  # relu(z) = sqrt(post), so the pre-activations z need not be kept
                y = y * 2.0 * tl.sqrt(tl.load(post + offsets, mask=inside, other=0.0).to(tl.float32))
            if DESCRIPTORS:
                out.store([m, begin], y.to(out.dtype))
            else:
                tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)
    if FP8:
        tl.store(largest + tl.program_id(0), tl.max(peaks))


def _launch_linear_relu_square(
    a: Tensor, b: Tensor, post: Tensor | None, scales: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """relu(a b^T)^2, or, where that is given as `post` (contiguous), 2 sqrt(post) (a b^T).

    scales, of operands in FP8: that of a b^T, and that of the result in FP8, which comes second, then its maxima.
    """
    a, b = a.contiguous(), b.contiguous()
    (M, K), N = a.shape, b.size(0)
    fp8, forward = scales is not None, post is None
    tile = tiles(a.device)
    programs = mlp_programs(M, N, a.device)
    out = torch.empty(M, N, dtype=torch.bfloat16 if fp8 else a.dtype, device=a.device)
    post = torch.empty_like(out, dtype=a.dtype) if fp8 else post
    largest = torch.empty(programs, dtype=torch.float32, device=a.device) if fp8 else None
    block_k = 2 * tile.k if fp8 else tile.k  # as many bytes
    operands, blocks = [a, b, out], [[tile.m, block_k], [tile.n, block_k], [tile.m, tile.n // 2]]
    if fp8:
        operands, blocks = [*operands, post], [*blocks, blocks[2]]
    descriptors = tile.descriptors and all(x.size(1) * x.element_size() % 16 == 0 for x in operands)
    if descriptors:
        operands = [TensorDescriptor.from_tensor(x, block) for x, block in zip(operands, blocks, strict=True)]
    _linear_relu_square[(programs,)](
        *operands,
        *(() if fp8 else (out if forward else post,)),
        *((*scales, largest) if fp8 else (out, out, out)),
        M,
        N,
        K,
        FORWARD=forward,
        FP8=fp8,
        DESCRIPTORS=descriptors,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=tile.warps,
        # Backward post takes shared memory as well, in FP8 the second result.
        num_stages=tile.stages if forward and not fp8 else tile.stages - 1,
    )
    return out, post if fp8 else None, largest


def mlp_programs(M: int, N: int, device: torch.device) -> int:
    """Programs of `_linear_relu_square`: one per multiprocessor."""
    tile = tiles(device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    return min(-(-M // tile.m) * -(-N // tile.n), multiprocessors)


def _mlp_fake(h, fc, proj, h8, fc8, proj8_T, scale_up, scale_post, scale_proj, fused):
    programs = 0 if h8 is None else mlp_programs(len(h), len(fc), h.device) if fused else 1
    return torch.empty_like(h), h.new_empty(h.size(0), fc.size(0)), h.new_empty(programs, dtype=torch.float32)


@operator("relu_squared_mlp", fake=_mlp_fake)
def _mlp_op(
    h: Tensor,  # (T, d)
    fc: Tensor,  # (4d, d)
    proj: Tensor,  # (4d, d)
    h8: Tensor | None,  # (T, d) h in FP8; None: nothing is
    fc8: Tensor | None,  # (4d, d)
    proj8_T: Tensor | None,  # (d, 4d)
    scale_up: Tensor | None,  # 0-dim float32, as the next: that of h8 times that of fc8
    scale_post: Tensor | None,  # of the hidden activations
    scale_proj: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, d), (T, 4d) what backward needs, maxima of the hidden activations in FP8
    if h8 is not None:
        if fused:
            kept, post8, largest = _launch_linear_relu_square(h8, fc8, None, (scale_up, scale_post))
        else:
            kept = torch._scaled_mm(h8, fc8.T, scale_up, torch.ones_like(scale_up), out_dtype=h.dtype).relu_()
            post = kept.square()
            post8 = (post.float() * scale_post.reciprocal()).clamp_max(E4M3_MAX).to(h8.dtype)
            largest = post.amax().float().view(1)
        out = torch._scaled_mm(post8, proj8_T.T, scale_post, scale_proj, out_dtype=h.dtype, use_fast_accum=True)
        return out, kept, largest
    nothing = h.new_empty(0, dtype=torch.float32)
    if fused:
        post, _, _ = _launch_linear_relu_square(h, fc, None)
        return post @ proj, post, nothing
    relu = F.linear(h, fc).relu_()
    return relu.square() @ proj, relu, nothing


@operator(
    "relu_squared_mlp_backward",
    fake=lambda grad, h, fc, proj, kept, fused: tuple(torch.empty_like(x) for x in (h, fc, proj)),
)
def _mlp_backward_op(
    grad: Tensor,  # (T, d)
    h: Tensor,  # (T, d)
    fc: Tensor,  # (4d, d)
    proj: Tensor,  # (4d, d)
    kept: Tensor,  # (T, 4d) what forward kept: relu(h fc^T)^2 if fused (its kernel takes the root again), else the root
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    pre_grad = _launch_linear_relu_square(grad, proj, kept)[0] if fused else F.linear(2 * grad, proj).mul_(kept)
    post = kept if fused else kept.square()
    return pre_grad @ fc, pre_grad.T @ h, post.T @ grad


def _mlp_setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.fused = inputs[-1]
    ctx.save_for_backward(*inputs[:3], output[1])


def _mlp_backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *torch.ops.speedrun.relu_squared_mlp_backward(grad, *ctx.saved_tensors, ctx.fused), *(None,) * 7


torch.library.register_autograd("speedrun::relu_squared_mlp", _mlp_backward, setup_context=_mlp_setup_context)


@operator("linear_fp8", fake=lambda x, w, x8, scale_x, w8, scale_w: x.new_empty(x.size(0), w.size(0)))
def _linear_fp8_op(x: Tensor, w: Tensor, x8: Tensor, scale_x: Tensor, w8: Tensor, scale_w: Tensor) -> Tensor:
    """x w^T from x8 (T, k) and w8 (n, k), these in FP8 e4m3; backward from x and w themselves."""
    return torch._scaled_mm(x8, w8.T, scale_x, scale_w, out_dtype=x.dtype, use_fast_accum=True)


def _linear_fp8_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w = ctx.saved_tensors
    return grad @ w, grad.T @ x, *(None,) * 4


torch.library.register_autograd(
    "speedrun::linear_fp8",
    _linear_fp8_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


@jit
def _cross_entropy(
    logits,  # (T, V) contiguous, before the soft-cap
    targets,  # (K, T) int64, negative where there is none
    weights,  # (K,) float32
    losses,  # (T,) float32, weighted sum over the K predictions
    nlls,  # (T,) float32, of the first prediction
    grad,  # (T, V) contiguous, of the losses with respect to the logits, divided by grad_scale; may be the logits
    num_targets,  # int64, see `softcapped_cross_entropy`; not read unless SAMPLED
    T,
    V,
    vocab,
    grad_scale,
    K: tl.constexpr,
    GRAD: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One position: the sum of exponentials, then the gradient, while the logits are still in the L2 cache.

    The soft-capped logits z are below 23, so exp(z - 23) needs no running maximum.
    """
    t = tl.program_id(0)
    logits += t.to(tl.int64) * V
    grad += t.to(tl.int64) * V
    if SAMPLED:
        first = tl.load(num_targets)  # of the columns that stand for others as well
        others = (vocab - first).to(tl.float32) / (V - first).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        z = 23.0 * tl.sigmoid((tl.load(logits + cols, mask=cols < V, other=0.0).to(tl.float32) + 5.0) / 7.5)
        exp = tl.exp(z - 23.0)
        if SAMPLED:
            exp *= tl.where(cols < first, 1.0, others)
        sums += tl.where(cols < V, exp, 0.0)
    log_sum = 23.0 + tl.log(tl.sum(sums))
    loss = 0.0
    weight_sum = 0.0
    for k in tl.static_range(K):
        target = tl.load(targets + k * T + t)
        weight = tl.where(target >= 0, tl.load(weights + k), 0.0)
        picked = 23.0 * tl.sigmoid((tl.load(logits + tl.maximum(target, 0)).to(tl.float32) + 5.0) / 7.5)
        loss += weight * (log_sum - picked)
        weight_sum += weight
        if k == 0:
            tl.store(nlls + t, tl.where(target >= 0, log_sum - picked, 0.0))
    tl.store(losses + t, loss)
    if GRAD:
        tl.debug_barrier()  # the gradient may be written over logits, of which all warps have read those of the targets
        for begin in range(0, V, BLOCK):
            cols = begin + tl.arange(0, BLOCK)
            z = 23.0 * tl.sigmoid((tl.load(logits + cols, mask=cols < V, other=0.0).to(tl.float32) + 5.0) / 7.5)
            dz = weight_sum * tl.exp(z - log_sum)
            if SAMPLED:
                dz *= tl.where(cols < first, 1.0, others)
            for k in tl.static_range(K):
                dz -= tl.where(cols == tl.load(targets + k * T + t), tl.load(weights + k), 0.0)
            dz *= z * (1.0 - z / 23.0) / 7.5 / grad_scale
            tl.store(grad + cols, dz.to(grad.dtype.element_ty), mask=cols < V)


def fused_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    grad: Tensor | None,
    grad_scale: float = 1.0,
    num_targets: Tensor | None = None,
    vocab: int = 0,
) -> tuple[Tensor, Tensor]:
    """`softcapped_cross_entropy` with the gradient, divided by `grad_scale`, written into `grad`, in the dtype of that.

    `grad` (T, V) may be the logits themselves; None: no gradient.
    """
    T, V = logits.shape
    losses, nlls = torch.empty(2, T, dtype=torch.float32, device=logits.device).unbind()
    block = 4096 if logits.is_cuda else 64
    pointers = logits, targets, weights, losses, nlls, logits if grad is None else grad, num_targets
    sizes = {"K": len(weights), "GRAD": grad is not None, "SAMPLED": num_targets is not None, "BLOCK": block}
    _cross_entropy[(T,)](*pointers, T, V, vocab, grad_scale, **sizes, num_warps=8)
    return losses, nlls


# Scales of the FP8 head: the largest magnitudes expected, over the largest number of the format.
FP8_SCALES = FP8_X, FP8_HEAD, FP8_GRAD = 100 / E4M3_MAX, 1.6 / E4M3_MAX, 0.75 / E4M3_MAX


@functools.cache
def fp8_scales(device: torch.device) -> tuple[Tensor, ...]:
    """FP8_SCALES, 0-dim float32 each."""
    return tuple(torch.full((), scale, dtype=torch.float32, device=device) for scale in FP8_SCALES)


@jit
def _cast_transposed(
    X,  # (R, C) contiguous
    Y,  # (R, C) X / scale, clamped and rounded to the dtype of Y; not written unless CAST
    Y_T,  # (C, R) its transpose
    R,
    C,
    scale,
    CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile, whose transpose is written row by row: a strided copy writes byte by byte, each to another sector."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (rows[:, None] < R) & (cols[None, :] < C)
    y = tl.load(X + rows[:, None] * C + cols[None, :], mask=inside, other=0)
    if CAST:
        y = tl.clamp(y.to(tl.float32) / scale, -448.0, 448.0).to(Y.dtype.element_ty)
        tl.store(Y + rows[:, None] * C + cols[None, :], y, mask=inside)
    tl.store(Y_T + cols[:, None] * R + rows[None, :], y.T, mask=inside.T)


def fp8_and_transpose(x: Tensor, scale: float | None, fused: bool) -> tuple[Tensor, Tensor]:
    """x / scale in FP8 e4m3 (R, C), or x itself where scale is None, and its transpose (C, R), both contiguous."""
    if not fused:
        y = x if scale is None else (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return y, y.T.contiguous()
    x = x.contiguous()
    y = x if scale is None else torch.empty_like(x, dtype=torch.float8_e4m3fn)
    y_T = y.new_empty(y.shape[::-1])
    operands = (x, y, y_T) if scale else (each.view(torch.uint8) for each in (x, y, y_T))
    block = 128 if x.is_cuda else 32
    grid = triton.cdiv(x.size(0), block), triton.cdiv(x.size(1), block)
    _cast_transposed[grid](*operands, *x.shape, scale or 1.0, CAST=scale is not None, BLOCK=block, num_warps=8)
    return y, y_T


def _fp8_fake(x: Tensor, scale: float, fused: bool) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in (x.shape, x.shape[::-1]))


@operator("fp8_and_transpose", fake=_fp8_fake)
def _fp8_op(x: Tensor, scale: float, fused: bool) -> tuple[Tensor, Tensor]:
    return fp8_and_transpose(x, scale, fused)


def head_matmul(
    a: Tensor, b: Tensor, *scales: Tensor | None, fast_accum: bool = False, out: Tensor | None = None
) -> Tensor:
    """a (m, k) times b (k, n). Operands in FP8 have scales, and must be contiguous along the summed dimension k."""
    if a.dtype.itemsize > 1:
        return torch.mm(a, b, out=out)
    return torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast_accum, out=out)


def head_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, need_grad: bool, fused: bool, fp8: bool, *sample: Tensor | int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`softcapped_cross_entropy`, with the gradient in FP8 over FP8_GRAD, or as the logits (if fused, over them)."""
    if not fused:
        losses, nlls, grad = softcapped_cross_entropy(logits, targets, weights, *sample)
        return losses, nlls, (grad / FP8_GRAD).to(torch.float8_e5m2) if fp8 else grad.to(logits.dtype)
    grad = None
    if need_grad:
        grad = torch.empty_like(logits, dtype=torch.float8_e5m2) if fp8 else logits
    return *fused_cross_entropy(logits, targets, weights, grad, FP8_GRAD if fp8 else 1.0, *sample), grad


def _head_loss_fake(x, head, targets, weights, chunk, need_grad, fused, head8, head8_T, sampled=None, num_targets=None):
    loss = x.new_empty((), dtype=wide(x.dtype))
    gradients = (x, head if sampled is None else head[:, : len(sampled)])
    gradients = (g.new_empty(g.shape if need_grad else (0, g.size(1))) for g in gradients)
    return loss, torch.empty_like(loss), *gradients


@operator("head_loss", fake=_head_loss_fake)
def _head_loss_op(
    x: Tensor,  # (T, d)
    head: Tensor,  # (d, V)
    targets: Tensor,  # (K, T) int64
    weights: Tensor,  # (K,)
    chunk: int,  # positions whose logits exist at a time
    need_grad: bool,
    fused: bool,
    head8: Tensor | None,  # (d, V) and (V, d) of `Weights8`; None: no FP8
    head8_T: Tensor | None,
    sampled: Tensor | None = None,  # (S,) int64 and 0-dim, as in a Row: V is S from here on; None: the whole head
    num_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss and next-token loss, 0-dim; gradients of the loss: (T, d), (d, V)
    sums: list[tuple[Tensor, Tensor]] = []  # of each chunk: loss, next-token loss
    x_grad = torch.empty_like(x if need_grad else x[:0])
    chunks = range(0, x.size(0), chunk)
    adds_up = need_grad and len(chunks) > 1
    fp8, sample = head8 is not None, ()
    if sampled is not None:
        sample = num_targets, head.size(1)
        place = sampled.new_full((head.size(1) + 1,), -1)  # the last for those that are -1 already
        place[sampled] = torch.arange(len(sampled), device=x.device)
        targets = place[targets]
        if fp8:  # byte by byte: indexing knows no FP8
            head8_T = head8_T.view(torch.uint8)[sampled].view(head8_T.dtype)
            head8 = fp8_and_transpose(head8_T, None, fused)[1]
        else:
            head = head[:, sampled]
    forward_head, backward_head = (head8_T.T, head8.T) if fp8 else (head, head.T)  # (d, V), (V, d)
    head_grad = x.new_zeros((len(forward_head) if adds_up else 0, forward_head.size(1)), dtype=wide(x.dtype))
    scale_x, scale_head, scale_grad = fp8_scales(x.device) if fp8 else (None,) * 3
    for begin in chunks:
        positions = slice(begin, begin + chunk)
        ts, xs = targets[:, positions].contiguous(), x[positions]
        xs, xs_T = fp8_and_transpose(xs, FP8_X, fused) if fp8 else (xs, xs.T)
        logits = head_matmul(xs, forward_head, scale_x, scale_head, fast_accum=True)
        losses, nlls, grad = head_cross_entropy(logits, ts, weights, need_grad, fused, fp8, *sample)
        sums.append((losses.sum(), nlls.sum()))
        del logits  # in FP8 the gradient is elsewhere, and its transpose takes as much again
        if need_grad:
            head_matmul(grad, backward_head, scale_grad, scale_head, out=x_grad[positions])
            grad_T = fp8_and_transpose(grad, None, fused)[1] if fp8 else grad.T
            part = head_matmul(xs_T, grad_T.T, scale_x, scale_grad)
            head_grad = part if len(chunks) == 1 else head_grad.add_(part)
    loss, nll = (functools.reduce(torch.add, some) for some in zip(*sums, strict=True))
    return loss, nll, x_grad, head_grad.to(head.dtype)


def _head_loss_setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.vocab = inputs[1].size(1)
    ctx.save_for_backward(*output[2:], inputs[9])


def _head_loss_backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *gradients, sampled = ctx.saved_tensors
    x_grad, head_grad = ((g * grad).to(g.dtype) for g in gradients)
    if sampled is not None:
        head_grad = head_grad.new_zeros(len(head_grad), ctx.vocab).index_copy_(1, sampled, head_grad)
    return x_grad, head_grad, *(None,) * 9


torch.library.register_autograd("speedrun::head_loss", _head_loss_backward, setup_context=_head_loss_setup_context)


def activate_flash_attention(wanted: str = "auto") -> str:
    """Let varlen_attn run FlashAttention-3 or -4 where one is installed and works; returns which one runs.

    Raises SpeedrunError if the `wanted` one cannot run.
    """
    import torch.nn.attention.varlen  # here, because it takes 1.4 s that a CPU run need not wait for

    major, errors = torch.cuda.get_device_capability()[0], []
    expected = try_attention() if wanted != "FA2" and major in (9, 10) else None
    for version, majors in (("FA3", (9,)), ("FA4", (9, 10))):
        if wanted not in ("auto", version):
            continue
        try:
            if major not in majors:
                raise RuntimeError(f"for compute capability {majors}, this GPU has {major}")
            if version == "FA3":
                provide_flash_attention_3()
            torch.nn.attention.activate_flash_attention_impl(version)
            found = try_attention()
            if not all((a - b).norm() < 2e-2 * b.norm() for a, b in zip(found, expected, strict=True)):
                raise RuntimeError("its results are not those of FlashAttention-2")
            return version
        except Exception as error:  # not installed, not for this torch, broken: a foreign package can raise anything
            errors.append(f"{version}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    if wanted in ("FA3", "FA4"):
        raise SpeedrunError(f"--attention {wanted}: {'; '.join(errors)}. Install it, or drop the option.")
    if wanted == "auto" and major in (9, 10):
        return f"FA2 of torch, SLOW ON THIS GPU: pip install -r requirements-gpu.txt ({'; '.join(errors)})"
    return "FA2 of torch"


def try_attention() -> list[Tensor]:
    """Results and gradients of a small attention as the model has it, by the FlashAttention that is active."""
    values = torch.rand(4, 256, 2, 128, generator=torch.Generator().manual_seed(0)).sub(0.5).cuda().bfloat16()
    q, k, v = (x.requires_grad_() for x in values[:3].clone())
    starts = torch.tensor([0, 100, 256, 256], dtype=torch.int32, device="cuda")
    out = varlen_attention(q, k, v, starts, 156, 0.1, 64)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, (q, k, v), values[3]))]


def provide_flash_attention_3() -> None:
    """Where it was not built from source, take FlashAttention-3 from the package `kernels`, which fetches it built.

    torch looks for the module flash_attn_interface and the operators flash_attn_3. Raises ImportError without either.
    """
    if importlib.util.find_spec("flash_attn_interface"):
        return
    from kernels import get_kernel

    kernel = get_kernel("kernels-community/flash-attn3", version=1)
    sys.modules["flash_attn_interface"] = kernel
    torch.ops.flash_attn_3 = kernel._ops.ops


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer: NorMuon for the banks, Adam for the rest, sharded over the ranks.
# ----------------------------------------------------------------------------------------------------------------------

# Minimax-optimal quintics of Polar Express (arXiv:2505.16932) for five rounds in bfloat16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: Tensor, fused: bool = False, rounds: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix U V^T of each matrix of G (n, r, c), approximately; in the dtype of G."""
    X = G.mT if G.size(-2) > G.size(-1) else G  # the Gram matrix on the shorter side
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)).contiguous()
    for a, b, c in POLAR_EXPRESS[:rounds]:
        X = quintic(X, a, b, c, fused)
    return X.mT if G.size(-2) > G.size(-1) else X


def normalize_rows(update: Tensor, mean_square: Tensor, beta2: float) -> Tensor:
    """NorMuon (arXiv:2510.05491): even out the neurons of an update (n, r, c), keeping each matrix's Frobenius norm.

    mean_square, (n, r, 1) or (n, 1, c), is the running mean square of the rows (columns where r < c), updated in place.
    """
    dim = -1 if mean_square.size(-1) == 1 else -2
    mean_square.lerp_(update.square().mean(dim, keepdim=True), 1 - beta2)
    scaled = update * mean_square.clamp_min(1e-10).rsqrt()
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, scaled))
    return scaled * (before / after.clamp_min(1e-10))


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The float32 master whose upper 16 bits are the bfloat16 `high` and whose lower 16 bits are the int16 `low`."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_halves(master: Tensor, high: Tensor, low: Tensor) -> None:
    """Store a float32 master as bfloat16 `high` (truncated) and int16 `low`; `join_halves` restores it bit for bit."""
    bits = master.view(torch.int32)
    high.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
    low.copy_(bits)  # keeps the low 16 bits


def read_master(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Weights in full precision: of bfloat16, joined with the lower halves that the state keeps."""
    return join_halves(p, state["low"]) if "low" in state else p


def write_master(master: Tensor, p: Tensor, state: dict[str, Tensor]) -> None:
    if "low" in state:
        split_halves(master, p, state["low"])
    elif master is not p:
        p.copy_(master)


def normuon_update(
    p: Tensor,  # (n, r, c) weights; in bfloat16 the upper halves of the master
    grad: Tensor,  # (n, r, c)
    state: dict[str, Tensor],  # momentum (n, r, c), mean_square (n, r, 1) or, where r < c, (n, 1, c), low
    *,
    lr: float | Tensor,  # of this step
    lr_mul: Tensor,  # (n, 1, 1) multiplier of each matrix
    momentum: float | Tensor,
    rule: Rule,
    config: OptimizerConfig,
    fused: bool,
) -> None:
    """Nesterov momentum -> orthogonalize -> even out rows -> cautious decay and step; all in place."""
    master, average = read_master(p, state), state["momentum"]
    grad = grad.to(master.dtype)
    average.add_((grad - average) * (1 - momentum))
    update = grad + (average - grad) * momentum
    update = polar_express(update.to(p.dtype), fused, config.polar_express_rounds).to(master.dtype)
    if rule.kind == "normuon":
        update = normalize_rows(update, state["mean_square"], config.muon_beta2)
    step = lr_mul * lr * math.sqrt(max(1, p.size(1) / p.size(2)))
    # Cautious decay (arXiv:2510.12402): only where the step shrinks the weight anyway.
    decayed = master * (update * master >= 0) if config.cautious else master
    write_master(master - (update + decayed * (lr * (config.muon_decay * rule.wd_mul))) * step, p, state)


def adam_update(
    p: Tensor,  # (n,) weights; in bfloat16 the upper halves of the master
    grad: Tensor,  # (n,)
    state: dict[str, Tensor],  # exp_avg, exp_avg_sq and low, (n,)
    *,
    step_size: float | Tensor,  # the learning rate times the bias correction
    decay: float | Tensor,
    rule: Rule,
    config: OptimizerConfig,
) -> None:
    """Adam with cautious decay, in place."""
    master, exp_avg, exp_avg_sq = read_master(p, state), state["exp_avg"], state["exp_avg_sq"]
    grad, (beta1, beta2) = grad.to(master.dtype), rule.betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # In place: fewer passes over memory take a quarter less time on a CPU, which does not fuse them.
    update = exp_avg_sq.sqrt().add_(rule.eps).reciprocal_().mul_(exp_avg).mul_(step_size)
    decayed = (update * master).gt_(0).mul_(master) if config.cautious else master.clone()
    write_master(master.sub_(update.add_(decayed.mul_(decay))), p, state)


def adagrad_update(
    p: Tensor,  # (rows, d) weights; in bfloat16 the upper halves of the master
    grad: Tensor,  # (rows, d), or a sparse tensor of touched rows
    state: dict[str, Tensor],  # square_sum (rows, 1) and low (rows, d)
    *,
    lr: float,
    rule: Rule,
) -> None:
    """Adagrad (Duchi et al. 2011) with one step size for each row of a table, in place; without momentum and decay.

    So a row without a gradient stays as it is, and a step costs only the rows that it has touched.
    """
    grad = (grad if grad.is_sparse else grad.view(p.shape).to_sparse(1)).coalesce()
    rows, grad = grad.indices()[0], grad.values().to(wide(p.dtype))
    state["square_sum"].index_add_(0, rows, grad.square().mean(1, keepdim=True))
    update = grad.mul_(lr / state["square_sum"][rows].sqrt_().add_(rule.eps))
    touched, halves = p[rows], {"low": state["low"][rows]} if "low" in state else {}
    write_master(read_master(touched, halves) - update, touched, halves)
    p[rows] = touched
    if halves:
        state["low"][rows] = halves["low"]


class Optimizer:
    """NorMuon and Adam in one object, by the track's table of rules.

    Sharded parameters: rank r of W owns the r-th of W equal pieces of the parameter's memory, and the optimizer state
    of that piece alone. `step` starts the sums of all gradients over the ranks (the loss is already divided by the
    rows), then updates and gathers parameter by parameter, in the order of `self.order`, while the other sums and
    gathers are under way. A compiled backward pass gives out all gradients at its end: no sum could start earlier.

    While the embedding is tied to the head, its gradient is added to the head's, transposed (`_start_sum`), and after
    the update it takes over the head's weights; at the step that unties them also the head's state (`step`).
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        config: OptimizerConfig,
        runtime: Runtime,
        pool: ThreadPoolExecutor | None = None,
    ):
        """pool: threads that update parameters at the same time."""
        self.params, self.config, self.runtime = params, config, runtime
        self._map = pool.map if pool else map
        rules = {name: config.rules.of(name) for name in params}
        if missing := [name for name, rule in rules.items() if rule is None]:
            raise SpeedrunError(f"the parameter {missing[0]} has no rule: add a line for it to the class Rules.")
        self.rules: dict[str, Rule] = rules
        # Small replicated parameters first (nothing waits for them), then the largest, whose gathers take longest.
        self.order = sorted(params, key=lambda name: (rules[name].sharded, -params[name].numel()))
        self.state: dict[str, dict[str, Tensor]] = {}
        self.lr_mul: dict[str, Tensor] = {}  # of banks: (n, 1, 1), one per matrix of this rank's piece
        for name, p in params.items():
            self._check_rule(name, p)
            self.state[name] = self.initial_state(name, p)
            if rules[name].is_of_matrices:
                cycle = rules[name].lr_mul
                lr_mul = torch.tensor([cycle[i % len(cycle)] for i in range(len(p))], dtype=wide(p.dtype))
                self.lr_mul[name] = self.piece(name, lr_mul.view(-1, 1, 1)).to(runtime.device)
        self._touched: dict[str, np.ndarray] = {}  # rows of a table in some rank's gradient, (W, rows)
        self._normuon_update, self._adam_update = runtime.compiled(normuon_update), runtime.compiled(adam_update)

    def initial_state(self, name: str, p: Tensor) -> dict[str, Tensor]:
        """The state of this rank's piece of a parameter, zeros: first and second moment, lower halves of bfloat16."""
        shape, kind = self.piece(name, p).shape, self.rules[name].kind
        shapes = {"exp_avg": shape, "exp_avg_sq": shape} if kind == "adam" else {"momentum": shape}
        if kind == "adagrad":
            shapes = {"square_sum": (shape[0], 1)}
        if kind == "normuon":
            n, r, c = shape
            shapes["mean_square"] = (n, r, 1) if r >= c else (n, 1, c)
        state = {key: torch.zeros(size, dtype=wide(p.dtype), device=p.device) for key, size in shapes.items()}
        if p.dtype == torch.bfloat16:
            state["low"] = torch.zeros(shape, dtype=torch.int16, device=p.device)
        return state

    def _check_rule(self, name: str, p: nn.Parameter) -> None:
        """Raise SpeedrunError where a parameter cannot be updated by its rule."""
        rule, world = self.rules[name], self.runtime.world_size
        option = f"--optimizer.rules.{name.partition('.')[0].replace('_', '-')}"
        adam = rule.kind == "adam"
        if rule.is_of_matrices and not name.endswith("bank"):
            raise SpeedrunError(
                f"{option}.kind {rule.kind} is for banks of matrices, and {name} {tuple(p.shape)} is none: use adam."
            )
        if rule.kind == "adagrad" and name != "ngram_embed":
            raise SpeedrunError(f"{option}.kind adagrad is for the table of n-grams alone: use adam.")
        if not rule.lr_mul or (not rule.is_of_matrices and len(rule.lr_mul) > 1):
            raise SpeedrunError(
                f"{option}.lr-mul {rule.lr_mul}: expected one number (of a bank under NorMuon, one or more)."
            )
        if rule.sharded and (p.numel() if adam else len(p)) % world:
            other = (
                "another width or vocabulary padding (--model.vocab-multiple)" if adam else "other --model.ngram-rows"
            )
            raise SpeedrunError(
                f"{world} processes cannot cut {name} {tuple(p.shape)} into equal pieces: use fewer, {other}, or "
                f"{option}.no-sharded."
            )

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a parameter-shaped tensor that this rank updates, as a view: whole matrices, or flat memory."""
        world, rank = (self.runtime.world_size, self.runtime.rank) if self.rules[name].sharded else (1, 0)
        if self.rules[name].kind != "adam":
            return tensor.unflatten(0, (world, -1))[rank]
        return tensor.view(world, -1)[rank]

    def _updates(self, settings: Settings) -> dict[str, tuple[str, ...]]:
        """The parameters that a step updates, in order, each with those that mirror it, transposed.

        A mirror adds its gradient to that of the parameter and takes over the updated weights: so does the embedding
        while it is tied to the head. Parameters of Adam wait for odd steps.
        """
        if not settings.adam_steps:
            return {name: () for name in self.order if self.rules[name].is_of_matrices}
        updates = {name: () for name in self.order}
        if settings.tied:
            del updates["embed"]
            updates["head"] = ("embed",)
        return updates

    def _start_sum(self, name: str, mirrors: tuple[str, ...]) -> Callable[[], Tensor]:
        """Start the sum of a gradient over the ranks. Returns what waits for it, and gives this rank's piece of it."""
        grad, world = self.params[name].grad, self.runtime.world_size
        for mirror in mirrors:
            grad += self.params[mirror].grad.T
            self.params[mirror].grad = None
        if name in self._touched:
            return self._exchange_rows(grad, self._touched.pop(name))
        piece, work = grad if grad.is_sparse else self.piece(name, grad), None
        if world > 1 and self.rules[name].sharded:
            piece = torch.empty_like(piece)
            work = reduce_scatter_single(piece.view(-1), grad.view(-1), async_op=True)
        elif world > 1:
            work = dist.all_reduce(grad, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return piece

        return wait

    def _exchange_rows(self, grad: Tensor, touched: np.ndarray) -> Callable[[], Tensor]:
        """As a reduce-scatter of the gradient of a table (rows, d), of which only touched rows travel.

        touched (W, rows): those of each rank's gradient that are not zero. All ranks know them, from the tokens.
        """
        world, rank = touched.shape[0], self.runtime.rank
        indices = lambda rows: self.runtime.to_device(torch.from_numpy(rows))
        by_owner = touched.reshape(world, world, -1).copy()  # (rank, owner, row of its piece)
        by_owner[range(world), range(world)] = False  # its own stay
        sent, come = by_owner[rank], [np.flatnonzero(rows) for rows in by_owner[:, rank]]
        values = grad[indices(np.flatnonzero(sent))]
        sizes, sent_sizes = [len(rows) for rows in come], sent.sum(1).tolist()
        received = values.new_empty(sum(sizes), *grad.shape[1:])
        work = dist.all_to_all_single(received, values, sizes, sent_sizes, async_op=True)
        piece, rows = grad.unflatten(0, (world, -1))[rank], indices(np.concatenate(come))

        def wait() -> Tensor:
            work.wait()
            for some, theirs in zip(rows.split(sizes), received.split(sizes), strict=True):
                piece.index_add_(0, some, theirs)  # a rank's rows are different ones: the order of sums is fixed
            return piece.view(-1)

        return wait

    @torch.no_grad()
    def step(self, settings: Settings, touched: dict[str, np.ndarray | None] | None = None) -> None:
        """Apply the gradients in `.grad` and clear those; Adam's parameters wait for odd steps and accumulate.

        touched: of tables, the rows that each rank's gradient of this step has, (W, rows), None: any.
        """
        p, updates = self.params, self._updates(settings)
        for name, rows in (touched or {}).items():
            if rows is not None and self.rules[name].sharded and len(rows[0]) % len(rows) == 0:
                self._touched[name] = rows | self._touched.get(name, False)
        sums = {name: self._start_sum(name, mirrors) for name, mirrors in updates.items()}
        pieces = {name: self.piece(name, p[name].data) for name in updates}
        update = lambda name: self._update(name, pieces[name], sums.pop(name)(), settings)
        gathers = []
        for name, _ in zip(updates, self._map(update, updates), strict=True):
            piece, p[name].grad = pieces[name], None
            if self.rules[name].sharded and self.runtime.world_size > 1:
                gathers.append(all_gather_single(p[name].data.view(-1), piece.flatten().clone(), async_op=True))
        for work in gathers:
            work.wait()
        for name, mirrors in updates.items():
            for mirror in mirrors:
                p[mirror].data.copy_(p[name].data.T)
                if settings.unties:
                    self._hand_over_state(name, mirror)

    def drop_gradients(self) -> None:
        """Forget those of steps so far, whose parameters were not updated."""
        self._touched.clear()
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()  # which holds for one thread
    def _update(self, name: str, piece: Tensor, grad: Tensor, settings: Settings) -> None:
        """Update this rank's piece of a parameter by its rule."""
        rule, config, state = self.rules[name], self.config, self.state[name]
        if rule.kind == "adam":
            count = (settings.step + 1) // 2  # Adam steps so far, this one included
            lr = config.adam_lr * settings.lr * rule.lr_mul[0]
            step_size = self._changing(lr * math.sqrt(1 - rule.betas[1] ** count) / (1 - rule.betas[0] ** count))
            decay = self._changing(lr**2 * config.adam_decay * rule.wd_mul)
            self._adam_update(piece, grad, state, step_size=step_size, decay=decay, rule=rule, config=config)
        elif rule.kind == "adagrad":
            lr = config.adam_lr * settings.lr * rule.lr_mul[0]
            adagrad_update(piece, grad, state, lr=lr, rule=rule)
        else:
            lr, momentum = self._changing(config.muon_lr * settings.lr), self._changing(settings.momentum)
            lr_mul, fused = self.lr_mul[name], self.runtime.fused
            self._normuon_update(
                piece, grad, state, lr=lr, lr_mul=lr_mul, momentum=momentum, rule=rule, config=config, fused=fused
            )

    def _changing(self, value: float) -> float | Tensor:
        """What changes from step to step goes to a compiled function as a tensor: a new float would recompile it."""
        return torch.tensor(value, dtype=torch.float32) if self.runtime.compile else value

    def _hand_over_state(self, name: str, mirror: str) -> None:
        """Give a mirror (V, d) the optimizer state of its parameter (d, V), transposed and cut anew over the ranks."""
        shape, world = self.params[name].shape, self.runtime.world_size
        for key, piece in self.state[name].items():
            whole = piece
            if world > 1 and self.rules[name].sharded:
                whole = torch.empty(piece.numel() * world, dtype=piece.dtype, device=piece.device)
                all_gather_single(whole.view(torch.uint8), piece.view(torch.uint8))  # bytes: no backend knows int16
            self.state[mirror][key].copy_(self.piece(mirror, whole.view(shape).T.contiguous()))


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One packed row of T tokens, the unit of every forward pass."""

    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the token after each input
    cu_seqlens: Tensor  # int32, starts of the documents in the row, padded with T
    max_seqlen: int  # no document is longer
    ngram_rows: Tensor  # (N, T) int64, rows of the table of n-grams, for each n of the layout
    sign_rows: Tensor  # (N, T) int64, rows of the table of signs
    # Of rows to train on, where the loss samples the vocabulary: columns of the head (S,), first the targets'.
    sampled: Tensor | None = None
    num_targets: Tensor | None = None  # int64, 0-dim: how many those are

    def to(self, runtime: Runtime) -> Row:
        """The row on the device."""
        return Row(*(runtime.to_device(value) if isinstance(value, Tensor) else value for value in self))


class Weights8(NamedTuple):
    """Weights in FP8 e4m3, made once for all rows of a step; None: those products are not in FP8."""

    head: Tensor | None = None  # (d, V)
    head_T: Tensor | None = None  # (V, d)
    fc: Tensor | None = None  # (L, 4d, d)
    proj_T: Tensor | None = None  # (L, d, 4d)
    scale_up: Tensor | None = None  # (L,) of fc times that of its normed input
    scale_proj: Tensor | None = None  # (L,)


NO_FP8 = Weights8()


def mlp_in_fp8(bank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fc, proj_T, scale_up and scale_proj of `Weights8`. bank (2L, 4d, d)."""
    scales = bank.abs().amax((1, 2)).float().clamp_min(1e-12) / E4M3_MAX
    bank8 = (bank.float() / scales[:, None, None]).to(torch.float8_e4m3fn)
    scale_up = scales[0::2] * (math.sqrt(bank.size(-1)) / E4M3_MAX)
    return bank8[0::2].contiguous(), bank8[1::2].mT.contiguous(), scale_up, scales[1::2].contiguous()


class Context(NamedTuple):
    """What the layers have to know of the step."""

    windows: tuple[int, int]  # short and long, tokens
    rotary: Tables
    attn_scale: float


class Lookup(torch.autograd.Function):
    """Rows of an embedding table. The backward pass adds their gradient to `total`, in place: the table gets none.

    Autograd's own writes a whole table for every row of tokens, casts it, and adds it to the sum of the rows before:
    0.6 GB per table and row of `small`. For compiled code, where it is part of the kernel that computes the gradient.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, table: Tensor, total: Tensor) -> Tensor:  # (*) int64, (V, d), (V, d) -> (*, d)
        ctx.save_for_backward(tokens, total)
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        tokens, total = ctx.saved_tensors
        total.index_put_((tokens,), grad.to(total.dtype), accumulate=True)
        return None, None, None


class Accumulated(torch.autograd.Function):
    """Matrices as they are. The backward pass adds their gradients to `totals`, in place, as `Lookup` does.

    Autograd's own copies the gradients of a bank's matrices into one tensor, and adds that to the sum: 0.5 GB per row
    of `small`, in 23 kernels.
    """

    @staticmethod
    def forward(ctx, *matrices_and_totals: Tensor) -> tuple[Tensor, ...]:
        half = len(matrices_and_totals) // 2
        ctx.save_for_backward(*matrices_and_totals[half:])
        return tuple(matrix.view_as(matrix) for matrix in matrices_and_totals[:half])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, ...]:
        torch._foreach_add_(ctx.saved_tensors, grads)
        return (None,) * (2 * len(grads))


GATE_SCALE = 0.1  # of the networks whose scale is learned, at the start


class Coefficients(nn.Module):
    """A network of the layout with its weights."""

    def __init__(self, network: Network, width: int, hidden: int, runtime: Runtime, generator: torch.Generator):
        super().__init__()
        self.layout = network
        scale, count = network.scale or GATE_SCALE, sum(output.width for output in network.outputs)
        initial = torch.tensor([output.initial for output in network.outputs for _ in range(output.width)])
        weights, dtype = {"bias": initial / scale}, wide(runtime.dtype)
        if network.reads is not None:
            weights["w1"] = (torch.rand(hidden, width, generator=generator) * 2 - 1) * width**-0.5
            weights["w2"], dtype = torch.zeros(count, hidden), runtime.dtype
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.to(runtime.device, dtype)))

    def forward(self, x: Tensor, gate_scale: Tensor | None) -> Iterable[tuple[Output, Tensor]]:
        """Coefficients (T, width), or where nothing is read perhaps (width,). x (T, d) is the stream that is read."""
        values, scale = self.bias.to(x.dtype), self.layout.scale
        if self.layout.reads is None and torch.compiler.is_compiling():
            # The gradients of all tokens are put side by side, and summed by one kernel instead of one for each number.
            values = values.expand(len(x), -1)
        if self.layout.reads is not None:
            values = F.linear(F.gelu(F.linear(x, self.w1)), self.w2, values)
            values = values * (gate_scale.to(x.dtype) if scale is None else scale)
        widths = [output.width for output in self.layout.outputs]
        return zip(self.layout.outputs, values.split(widths, dim=-1), strict=True)


class Streams(dict[str, Tensor]):
    """The streams (T, d) of one forward pass by name, and the coefficients, which networks compute from them."""

    def __init__(self, model: GPT, x0: Tensor):
        super().__init__()
        self.model = model
        self.coefficients: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}  # by role and layer, with the source
        self._compute(None, x0)
        self["x0"] = x0

    def __setitem__(self, name: str, x: Tensor) -> None:
        """A stream is there: the networks that read it compute their coefficients."""
        super().__setitem__(name, x)
        self._compute(name, x)

    def _compute(self, name: str | None, x: Tensor) -> None:
        for network in self.model.networks:
            if network.layout.reads == name:
                for output, value in network(x, getattr(self.model, "gate_scale", None)):
                    self.coefficients.setdefault((output.role, output.layer), []).append((output.source, value))

    def coefficient(self, role: str, layer: int) -> Tensor | None:
        """(T, width), or (width,) for all tokens; None where the layout has none."""
        found = self.coefficients.get((role, layer))
        return found and found[0][1]

    def merge(self, x: Tensor, y: Tensor, part: str, layer: int) -> Tensor:
        """The stream x and what attention or the MLP makes of it, weighed. (T, d)"""
        resid, branch = (self.coefficient(f"{part}_{what}", layer) for what in ("resid", "branch"))
        return add_weighted(resid * x, branch, y)

    def add(self, x: Tensor, role: str, layer: int, factor: Tensor | float = 1.0) -> Tensor:
        """x and all streams that have this role in the layer, each times its coefficient and the factor."""
        for source, weight in self.coefficients.get((role, layer), ()):
            x = add_weighted(x, factor * weight, self[source])
        return x


class GPT(nn.Module):
    """The network, from tokens to loss. All matrices live in banks, which the optimizer shards and updates in place."""

    sparse_table = ""  # the parameter whose gradient is to be a sparse tensor, where nothing is compiled
    attention = staticmethod(attention)
    composed_attention = staticmethod(composed_attention)

    def __init__(self, config: ModelConfig, runtime: Runtime, seed: int = 0):
        """Initialize on the CPU from `seed` alone, so that every device and every number of ranks starts the same."""
        super().__init__()
        config.refuse_impossible()
        self.config, self.runtime, self.layers = config, runtime, config.layers
        d, V, L, H = config.width, config.padded_vocab, config.num_layers, config.num_heads
        hidden, gate = config.mlp_ratio * d, config.gate_dim
        num_attention = len(config.attention_layers)
        num_tables = sum(layer.table is not None for layer in self.layers)
        num_gates = sum(layer.value_gate is not None for layer in self.layers)
        generator = torch.Generator().manual_seed(seed)
        padded = lambda n: -(-n // runtime.world_size) * runtime.world_size  # the optimizer cuts a bank into W pieces
        uniform = lambda *shape: (torch.rand(shape, generator=generator) * 2 - 1) * (0.5 * math.sqrt(3 / d))
        normal = lambda std, *shape: torch.randn(shape, generator=generator) * std if std else torch.zeros(shape)

        self.qk_each = 2 * H // config.qk_heads  # matrices of a layer: of Wq, then of Wk
        qk_bank = torch.zeros(padded(self.qk_each * num_attention), config.qk_heads * config.head_dim, d)
        vo_bank = torch.zeros(padded(2 * num_attention), d, d)  # Wv, Wo of each layer with attention
        mlp_bank = torch.zeros(padded(2 * L), hidden, d)  # fc, proj of each layer
        for i in range(num_attention):
            wq, wk, wv, wo = uniform(4, d, d)
            qk = torch.cat((wq, wq if config.equal_qk_init else wk))
            qk_bank[self.qk_each * i : self.qk_each * (i + 1)] = qk.view(self.qk_each, -1, d)
            vo_bank[2 * i : 2 * i + 2] = torch.stack((wv, torch.zeros_like(wo) if config.zero_wo else wo))
        for i in range(L):
            mlp_bank[2 * i] = uniform(hidden, d)
        head = normal(0.005, d, V)
        weights = {
            "embed": head.T.contiguous(),
            "head": head,
            "qk_bank": qk_bank,
            "vo_bank": vo_bank,
            "mlp_bank": mlp_bank,
            "value_embeds": normal(config.value_std, num_tables, V, d),
            "value_gates": torch.zeros(num_gates, H, gate),
            "smear_gate": torch.zeros(gate if config.smear else 0),
            "ngram_embed": normal(config.ngram_std, config.ngram_rows if config.ngrams else 0, d),
        }
        scalars = {"sa_lambda": torch.tensor([0.5, 1.0]).repeat(L if num_attention else 0, 1)}  # of qkv, of the output
        if config.smear:
            scalars["smear_lambda"] = torch.zeros(())
        if any(output.role == "skip" for network in config.networks for output in network.outputs):
            scalars["skip_lambda"] = torch.full((), -1.5)
        if any(network.scale is None for network in config.networks):
            scalars["gate_scale"] = torch.full((), GATE_SCALE)
        for values, dtype in ((weights, runtime.dtype), (scalars, wide(runtime.dtype))):
            for name, value in values.items():
                if value.numel():  # a layout without, say, value embeddings has no parameters for them
                    self.register_parameter(name, nn.Parameter(value.to(runtime.device, dtype)))
        for network in config.networks:
            self.add_module(network.name, Coefficients(network, d, config.network_width, runtime, generator))
        self.networks = tuple(self.children())
        if config.ngrams and config.ngram_signs:
            # Not trained and in no checkpoint: whatever the seed, from a generator that numpy never changes.
            signs = torch.from_numpy(np.random.RandomState(0).randint(2, size=(config.ngram_signs, d)) * 2 - 1)
            self.register_buffer("ngram_sign", signs.to(runtime.device, runtime.dtype), persistent=False)
        # The longest other token that each token begins with, -1: none; see `set_prefixes`.
        no_prefix = torch.full((V,), -1)
        self.register_buffer("prefix", no_prefix.to(runtime.device), persistent=False)
        # Scales of the MLP's hidden activations in FP8, 1.8 times what those of the row before would have needed; they
        # are found in the product that the scale is for.
        self.register_buffer("mlp_scale", torch.ones(L, device=runtime.device), persistent=False)
        self._row_loss, self._mlp_in_fp8 = runtime.compiled(self._row_loss), runtime.compiled(mlp_in_fp8)
        # What `Lookup` and `Accumulated` add the gradients of a step to, where compiled: one sum for each matrix.
        self.gradient_sums: dict[str, list[Tensor]] = {}
        for name, dtype in (
            ("embed", wide(runtime.dtype)),
            ("value_embeds", wide(runtime.dtype)),
            ("ngram_embed", wide(runtime.dtype)),
            ("mlp_bank", runtime.dtype),
            ("head", runtime.dtype),
        ):
            if runtime.compile and hasattr(self, name):
                self.gradient_sums[name] = [torch.zeros_like(p, dtype=dtype) for p in self.matrices(name)]

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """The matrices of a parameter, one or several, without those that pad a bank."""
        p = getattr(self, name)
        count = 2 * self.config.num_layers if name == "mlp_bank" else None
        return p.unbind()[:count] if p.dim() == 3 else (p,)

    def accumulated(self, name: str) -> tuple[Tensor, ...]:
        """The matrices of a parameter, for products."""
        sums = self.gradient_sums.get(name)
        training = sums is not None and torch.is_grad_enabled()
        return Accumulated.apply(*self.matrices(name), *sums) if training else self.matrices(name)

    def lookup(self, name: str, tokens: Tensor) -> list[Tensor]:
        """Rows `tokens` (*) of each table of a parameter (V, d) or (tables, V, d): (*, d) of each."""
        if sums := self.gradient_sums.get(name):
            return [Lookup.apply(tokens, *pair) for pair in zip(self.matrices(name), sums, strict=True)]
        return [F.embedding(tokens, table, sparse=name == self.sparse_table) for table in self.matrices(name)]

    @torch.no_grad()
    def hand_over_gradients(self, is_due: Callable[[str], bool] = lambda name: True) -> None:
        """Make `.grad` of parameters that have sums what was added to these since the last call."""
        for name, sums in self.gradient_sums.items():
            if is_due(name):
                p = getattr(self, name)
                p.grad = torch.empty_like(p)
                grads = p.grad.view(-1, *p.shape[-2:])
                grads[len(sums) :].zero_()  # padding
                torch._foreach_copy_(list(grads[: len(sums)]), sums)
                torch._foreach_zero_(sums)

    @torch.no_grad()
    def in_fp8(self) -> Weights8:
        """The weights of what training does in FP8: for `forward`, anew after each update."""
        found, runtime = NO_FP8, self.runtime
        if "head" in runtime.fp8:
            head, head_T = torch.ops.speedrun.fp8_and_transpose(self.head, FP8_HEAD, runtime.fused)
            found = found._replace(head=head, head_T=head_T)
        if "mlp" in runtime.fp8:
            found = Weights8(*found[:2], *self._mlp_in_fp8(self.mlp_bank[: 2 * self.config.num_layers]))
        return found

    def forward(
        self,
        row: Row,
        settings: Settings,
        weights: Tensor,
        prefix_weight: Tensor | None = None,
        weights8: Weights8 | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Training loss of a row summed over its tokens, and the plain next-token loss summed likewise (detached).

        With gradients both are estimates where the row has a sample of the vocabulary; without they never are.
        weights (K,): of the predictions of token t+1 ... t+K. prefix_weight (1,): of that of the prefix of token t+1.
        weights8: of `in_fp8`; None: made here.
        """
        if weights8 is None:
            weights8 = self.in_fp8() if torch.is_grad_enabled() else NO_FP8
        return self._row_loss(row, self._context(row, settings), weights, prefix_weight, weights8)

    def _context(self, row: Row, settings: Settings, begin: int = 0) -> Context:
        end = begin + len(row.inputs)
        rotary = rotary_tables(settings.frequencies, begin, end, self.embed.device, self.embed.dtype)
        return Context(settings.windows, rotary, settings.attn_scale)

    def _row_loss(
        self, row: Row, context: Context, weights: Tensor, prefix_weight: Tensor | None, weights8: Weights8
    ) -> tuple[Tensor, Tensor]:
        x = self.hidden(row, context, weights8)
        ahead = [F.pad(row.targets[k:], (0, k), value=-1) for k in range(len(weights))]
        if prefix_weight is not None:
            ahead.append(self.prefix[row.targets])
            weights = torch.cat((weights, prefix_weight))
        training, runtime = torch.is_grad_enabled(), self.runtime
        sample = (row.sampled, row.num_targets) if training else (None, None)
        chunk = runtime.loss_chunk(len(x), self.config.padded_vocab if sample[0] is None else len(row.sampled))
        how = chunk, training, runtime.fused, weights8.head, weights8.head_T, *sample
        (head,) = self.accumulated("head")
        loss, nll, _, _ = torch.ops.speedrun.head_loss(x, head, torch.stack(ahead), weights, *how)
        return loss, nll.detach()

    def hidden(self, row: Row, context: Context, weights8: Weights8 = NO_FP8) -> Tensor:  # (T, d)
        """The normed stream from which the head predicts."""
        c, last = self.config, self.config.num_layers - 1
        # The banks are taken apart once: indexing them layer by layer would make each backward write a whole bank.
        attention_weights, mlp_bank = self._attention_weights(), self.accumulated("mlp_bank")
        values = self.lookup("value_embeds", row.inputs) if hasattr(self, "value_embeds") else ()

        x = x0 = norm(self._smeared_embedding(row.inputs))
        streams, late_input, largest = Streams(self, x0), None, []
        if c.ngrams:
            streams["ngram"] = self._ngram_embedding(row)
        for i, layer in enumerate(self.layers):
            if layer.table is not None:
                streams[f"value{i}"] = values[layer.table]
        skip = torch.sigmoid(self.skip_lambda) if hasattr(self, "skip_lambda") else 1.0
        for i, layer in enumerate(self.layers):
            if i == last:
                streams["last"] = x
            x = streams.add(x, "input", i)
            x = streams.add(x, "skip", i, skip)
            if i == 0:
                streams["first"] = x
            if layer.attention is not None:
                a, weights = late_input if layer.late else norm(x), attention_weights[layer.attention]
                x = streams.merge(x, self._attention_layer(i, a, *weights, row, context, streams), "attention", i)
                x = streams.add(x, "inject", i)
            mlp = self._mlp(i, norm(x), mlp_bank[2 * i], mlp_bank[2 * i + 1], weights8, largest)
            x = streams.merge(x, mlp, "mlp", i)
            streams[f"out{i}"] = x
            if i == c.late_input:
                late_input = norm(x)
        if largest:
            # In groups: stacks of more than 8 are made by a copy for each.
            groups = [torch.stack(largest[i : i + 8]).amax(1) for i in range(0, len(largest), 8)]
            self.mlp_scale.copy_(torch.cat(groups).clamp_min(1e-12) * (1.8 / E4M3_MAX))
        return norm(streams.add(x, "end", last))

    def _mlp(
        self,
        i: int,
        h: Tensor,  # (T, d) normed input
        fc: Tensor,  # (4d, d)
        proj: Tensor,  # (4d, d)
        weights8: Weights8,
        largest: list[Tensor],
    ) -> Tensor:  # (T, d)
        """What the MLP of layer i makes of its input. In FP8 it adds the maxima of the hidden activations to a list."""
        if weights8.fc is None:
            return relu_squared_mlp(h, fc, proj, self.runtime.fused)
        h8, _ = to_fp8(h.detach(), math.sqrt(h.size(-1)))
        scales = weights8.scale_up[i], self.mlp_scale[i], weights8.scale_proj[i]
        operands = h8, weights8.fc[i], weights8.proj_T[i], *scales
        out, _, found = torch.ops.speedrun.relu_squared_mlp(h, fc, proj, *operands, self.runtime.fused)
        largest.append(found.detach())
        return out

    def _attention_weights(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Wq over Wk (2d, d), Wv and Wo (d, d) of each attention layer, times its lambdas: all in a few kernels."""
        layers, d = self.config.attention_layers, self.config.width
        if not layers:
            return []
        lambdas = torch.stack([self.sa_lambda[i] for i in layers])[..., None, None]  # (layers, 2, 1, 1)
        qk = self.qk_bank[: self.qk_each * len(layers)].view(-1, 2 * d, d)
        vo = self.vo_bank[: 2 * len(layers)].view(-1, 2, d, d)
        qk, vo = (lambdas[:, 0] * qk).to(qk.dtype).unbind(), (lambdas * vo).to(vo.dtype).flatten(0, 1).unbind()
        return list(zip(qk, vo[0::2], vo[1::2], strict=True))

    def _smeared_embedding(self, tokens: Tensor) -> Tensor:
        """Embeddings of the tokens (T, d), each with a part of the one before."""
        (e,) = self.lookup("embed", tokens)
        if not self.config.smear:
            return e
        smear = self.smear_lambda * torch.sigmoid(e[1:, : self.config.gate_dim] @ self.smear_gate)
        return torch.cat((e[:1], e[1:] + smear[:, None] * e[:-1]))

    def _ngram_embedding(self, row: Row) -> Tensor:
        """Sum over all n of the layout of the embeddings of the last n tokens. (T, d)"""
        (found,) = self.lookup("ngram_embed", row.ngram_rows)
        if self.config.ngram_signs:
            found = found * self.ngram_sign[row.sign_rows]
        return norm(found.sum(0)) if self.config.ngram_norm else found.sum(0)

    def _attention_layer(
        self,
        i: int,
        a: Tensor,  # (T, d) normed input
        w_qk: Tensor,  # (2d, d)
        w_v: Tensor,  # (d, d)
        w_o: Tensor,  # (d, d)
        row: Row,
        context: Context,
        streams: Streams,
    ) -> Tensor:  # (T, d)
        """What the attention of layer i adds to the stream, before its weight."""
        c, layer, T, fp8 = self.config, self.layers[i], len(a), "attention" in self.runtime.fp8
        qk = linear(a, w_qk, fp8, math.sqrt(c.width)).view(T, 2, c.num_heads, c.head_dim)
        v = streams.add(linear(a, w_v, fp8, math.sqrt(c.width)), "values", i).view(T, c.num_heads, c.head_dim)
        if layer.table is not None:
            ve = streams[f"value{i}"]
            if layer.value_gate is None:
                gate = streams.coefficient("value_gate", i).repeat_interleave(c.num_heads // 2, -1)
            else:
                seen = torch.cat((a[:, : c.gate_dim // 2], ve[:, : c.gate_dim // 2]), dim=1)
                gate = 2 * torch.sigmoid(F.linear(seen, self.value_gates[layer.value_gate]))
            v = add_weighted(v, gate[..., None], ve.view_as(v))
        y = self._heads(layer, qk, v, streams.coefficient("dc_in", i), streams.coefficient("dc_out", i), row, context)
        if (strength := streams.coefficient("xsa", i)) is not None:
            unit = F.normalize(v, dim=-1, eps=1e-4)
            y = y - (torch.tanh(strength) * (y * unit).sum(-1))[..., None] * unit
        if (gate := streams.coefficient("gate", i)) is not None:
            y = gate[..., None] * y
        return linear(y.flatten(1), w_o, fp8)

    def _heads(
        self,
        layer: Layer,
        qk: Tensor,  # (T, 2, H, D)
        v: Tensor,  # (T, H, D)
        dc_in: Tensor | None,  # (T, H) or (H,), weights of the heads in what they compose
        dc_out: Tensor | None,  # likewise, of what they compose in each head
        row: Row,
        context: Context,
    ) -> Tensor:  # (T, H, D)
        """QK-norm, rotary embedding, key offset, paired heads, attention, and its composition."""
        T, H, D = v.shape
        # Paired heads: (T, H, D) is read as 2T positions of H/2 heads, head h at 2t and head h + H/2 at 2t + 1.
        G = 2 if layer.paired else 1
        cos, sin = (table.view(T, G, D) for table in context.rotary[G - 1])
        fused = self.runtime.fused and D & (D - 1) == 0  # blocks of Triton are powers of two
        q, k = normed_and_rotated(qk, cos, sin, layer.long and self.config.key_offset, fused)
        q, k, v = (x.reshape(G * T, H // G, D) for x in (q, k, v))
        cu_seqlens, max_seqlen = G * row.cu_seqlens, G * row.max_seqlen
        window = context.windows[1] if layer.long else context.windows[0]
        y = self.attention(q, k, v, cu_seqlens, max_seqlen, context.attn_scale, window).reshape(T, H, D)
        if dc_in is not None:
            mix = F.rms_norm(dc_in.to(wide(dc_in.dtype)), (H,), eps=1e-6).to(dc_in.dtype).expand(T, H)
            # Its products take at least 16 dims, and of 256 the shared memory has no room.
            arguments = cu_seqlens, context.attn_scale, self.config.dc_window - 1, fused and 16 <= D <= 128
            composed = self.composed_attention(q, k, v, mix, *arguments)
            y = add_weighted(y, dc_out[..., None], composed)
        return y

    @torch.no_grad()
    def set_prefixes(self, tokens: list[bytes]) -> np.ndarray:
        """Find and return the longest other token that each token of the vocabulary begins with, given their bytes."""
        found = np.array(prefix_tokens(tokens))
        self.prefix[: len(tokens)] = torch.from_numpy(found).to(self.prefix)
        return found

    @torch.no_grad()
    def logits(self, row: Row, settings: Settings) -> Tensor:
        """Logits (T, V) of a row after the soft-cap, at least float32."""
        return softcapped(self.stream(row, settings) @ self.head)

    def stream(self, row: Row, settings: Settings, begin: int = 0) -> Tensor:
        """What `hidden` makes of a row (T, d); rotary embedding counts its positions from `begin`."""
        return self.hidden(row, self._context(row, settings, begin))


# cos and signed sin for `rotate`, each (positions, D): of T tokens, and of their 2T positions where heads are paired.
Tables = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.lru_cache(maxsize=2)  # a training and a validation row; recomputed inside the graph they cost more
def rotary_tables(
    frequencies: tuple[float, ...], begin: int, end: int, device: torch.device, dtype: torch.dtype
) -> Tables:
    """Tables of the tokens from `begin` to `end`: D/4 frequencies turn the first half, the rest stands still.

    Angles are float64: in float32 they are 0.03 rad off at position 500,000.
    """
    turns = torch.tensor(frequencies, dtype=torch.float64).repeat_interleave(2)
    both = torch.stack((F.pad(turns, (0, len(turns))), torch.tensor([1.0, -1.0]).double().repeat(len(turns))))
    # Pinned, because a copy from other memory waits for the device.
    turns, sign = (both.pin_memory() if device.type == "cuda" else both).to(device, non_blocking=True)

    def table(begin: int, end: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(begin, end, device=device, dtype=torch.float64)[:, None] * turns
        return angles.cos().to(dtype), (angles.sin() * sign).to(dtype)

    return table(begin, end), table(2 * begin, 2 * end)


# ----------------------------------------------------------------------------------------------------------------------
# Data: shard files -> rows
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
TOKEN_BYTES = "tokens.bin"  # see `read_token_bytes`


def read_shard_header(path: Path) -> int:
    """Number of tokens of a shard file. Raises SpeedrunError where the file is not a whole shard."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise SpeedrunError(f"{path}: cannot be read ({error.strerror}).") from error
    mend = "Delete it and fetch it again."
    if len(header) < HEADER_INTS or header[0] != SHARD_MAGIC:
        found = header[0] if len(header) else "an empty file"
        raise SpeedrunError(f"{path}: not a token shard (first integer {found}, expected {SHARD_MAGIC}). {mend}")
    if header[1] != SHARD_VERSION:
        raise SpeedrunError(f"{path}: shard version {header[1]}, expected {SHARD_VERSION}. {mend}")
    count, expected = int(header[2]), 4 * HEADER_INTS + 2 * int(header[2])
    if count < 0 or size != expected:
        raise SpeedrunError(f"{path}: {size} bytes, but its header says {count} tokens = {expected} bytes. {mend}")
    return count


def check_tokens(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Raise SpeedrunError where the first tokens of a shard are not all of the vocabulary."""
    if len(tokens) and (largest := int(tokens.max())) >= vocab_size:
        raise SpeedrunError(
            f"{path}: token {largest} at position {int(tokens.argmax())}, but the vocabulary has {vocab_size} tokens. "
            "The shard is damaged or made for another track."
        )


def sidecars(data_dir: Path) -> Iterator[dict]:
    """What the scripts that wrote the shards of a folder have recorded beside them, as JSON."""
    for path in sorted(data_dir.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
                yield found


def shard_identity(path: Path) -> str:
    """`N tokens sha256 HEX`, by which log and checkpoint know a shard.

    The SHA-256 is the one on record where the file has not changed since (size and time of change), else computed.
    """
    status = path.stat()
    for sidecar in sidecars(path.parent):
        with contextlib.suppress(KeyError, TypeError):
            entry = sidecar["shards"][path.name]
            if (entry["size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
                return f"{read_shard_header(path)} tokens sha256 {entry['sha256']}"
    return f"{read_shard_header(path)} tokens sha256 {digest(path)}"


@dataclass(frozen=True)
class Shard:
    """A shard file in memory."""

    tokens: np.ndarray  # (count,) uint16
    bounds: np.ndarray  # (documents + 1,) int64: document i is tokens[bounds[i] : bounds[i + 1]]
    identity: str

    @staticmethod
    def read(path: Path, vocab_size: int, bos: int) -> Shard:
        """Raises SpeedrunError where it is damaged."""
        count = read_shard_header(path)
        tokens = np.fromfile(path, "<u2", count, offset=4 * HEADER_INTS)
        if len(tokens) < count:
            raise SpeedrunError(f"{path}: ended while it was read; was it overwritten?")
        check_tokens(path, tokens, vocab_size)
        return Shard(tokens, np.append(np.flatnonzero(tokens == bos), count), shard_identity(path))

    def take_row(self, document: int, need: int, max_doc_len: int) -> tuple[list[slice], int] | None:
        """Pieces of the documents from `document` on that fill a row of `need` tokens, and the first document after it.

        None where the shard ends before the row is full.
        """
        count = 8 + need // 256  # documents to look at: enough for most rows
        while True:
            bounds = self.bounds[document : document + count + 1]
            lengths = np.minimum(np.diff(bounds), max_doc_len)
            filled = np.cumsum(lengths)
            last = int(np.searchsorted(filled, need))
            if last < len(filled):
                break
            if len(lengths) < count:
                return None
            count *= 4
        starts = bounds[: last + 1]
        stops = starts + lengths[: last + 1]
        stops[-1] -= filled[last] - need
        return [slice(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)], document + last + 1


@dataclass(frozen=True)
class LoaderPosition:
    """Where the next training row begins: the loader's only state."""

    shard: int = 0
    document: int = 0


class Loader:
    """Training rows of this rank, step by step. The next step's rows are made in the background.

    A row is filled from documents in the order of the files. Each gives at most max_doc_len tokens from its BOS on and
    no more than the row still needs; the rest of it is skipped. All rows of a step come from one shard: what cannot
    fill them is dropped.

    The rows of a step are the same for every number of ranks; rank r of W takes the r-th of W equal runs of them.
    So are the samples of the vocabulary that go with them, by `seed`.
    """

    def __init__(self, track: Track, data_dir: Path, runtime: Runtime, seed: int = 0):
        self.track, self.runtime, self.seed = track, runtime, seed
        self.prefix: np.ndarray | None = None  # of `GPT.set_prefixes`, whose results are then targets as well
        self.identities: dict[str, str] = {}  # of the shards read so far, by name
        self.paths = find_shards(data_dir, "train", track.data) * track.data.epochs
        self.position = LoaderPosition()
        # Of the step last given out, which rows of the table of n-grams each rank's row reads: (W, rows).
        self.touched: np.ndarray | None = None
        self._shards: dict[int, Future[Shard]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._prefetched: tuple[int, LoaderPosition, Future] | None = None

    def next(self, step: int) -> list[Row]:
        """This rank's rows of a step, on the device. Raises SpeedrunError where the shards run out or are damaged."""
        key = (step, self.position)
        if self._prefetched is not None and self._prefetched[:2] == key:
            future = self._prefetched[2]
        else:
            future = self._worker.submit(self._make, *key)
        rows, self.touched, self.position = future.result()
        self._prefetched = None
        if step + 1 < self.track.schedule.total_steps:
            ahead = (step + 1, self.position)
            self._prefetched = (*ahead, self._worker.submit(self._make, *ahead))
        return rows

    def _shard(self, index: int) -> Shard:
        """The shard and, already under way, the one after it; all others are let go."""
        if index >= len(self.paths):
            raise OutOfData(
                f"the training shards in {self.paths[0].parent} have run out. No data is repeated unless asked for "
                f"(--data.epochs): {more_data(self.paths[0].parent, self.track.data)}, or train fewer steps."
            )
        for i in range(index, min(index + 2, len(self.paths))):
            if i not in self._shards:
                what = self.paths[i], self.track.model.vocab_size, self.track.data.bos
                self._shards[i] = self._reader.submit(Shard.read, *what)
        self._shards = {i: shard for i, shard in self._shards.items() if i in (index, index + 1)}
        shard = self._shards[index].result()
        self.identities[self.paths[index].name] = shard.identity
        return shard

    def _make(self, step: int, position: LoaderPosition) -> tuple[list[Row], np.ndarray | None, LoaderPosition]:
        """The rank's rows of a step that begins at `position`, on the device, what is `touched`, the position after."""
        shard, rows, after = self.take_step(step, position)
        stage, model, runtime = self.track.at(step).stage, self.track.model, self.runtime
        each, touched = len(rows) // runtime.world_size, None
        if model.ngrams and each == 1 < runtime.world_size:
            touched = np.zeros((len(rows), model.ngram_rows), bool)
            for some, pieces in zip(touched, rows, strict=True):
                tokens, starts = self._tokens(shard, pieces)
                some[ngram_keys(tokens[:-1], starts, model.ngrams) % model.ngram_rows] = True
        made, longest = [], min(stage.max_doc_len, stage.tokens // len(rows))
        for i in range(runtime.rank * each, (runtime.rank + 1) * each):
            row = make_row(*self._tokens(shard, rows[i]), longest, model)
            row = self._with_sample(row, step, i) if model.sampled_vocab else row
            made.append(row.to(runtime))
        return made, touched, after

    def _with_sample(self, row: Row, step: int, i: int) -> Row:
        """Row i of a step, with a sample of the vocabulary."""
        targets = row.targets.numpy()
        if self.prefix is not None and self.track.at(step).prefix_weight > 0:
            targets = np.concatenate((targets, self.prefix[targets]))
        is_target = np.zeros(self.track.model.padded_vocab, bool)
        is_target[targets[targets >= 0]] = True
        sampled, num_targets = sample_vocab(is_target, self.track.model.sampled_vocab, self.seed, step, i)
        return row._replace(sampled=sampled, num_targets=num_targets)

    def take_step(self, step: int, position: LoaderPosition) -> tuple[Shard, list[list[slice]], LoaderPosition]:
        """All rows of a step that begins at `position`, each in pieces of one shard, and the position after it.

        Raises OutOfData where the shards cannot fill them.
        """
        stage, rows_per_step = self.track.at(step).stage, self.track.data.rows_per_step
        n = stage.tokens // rows_per_step
        shard_index, document = position.shard, position.document
        while True:
            shard = self._shard(shard_index)
            rows, after = [], document
            while len(rows) < rows_per_step and (taken := shard.take_row(after, n + 1, stage.max_doc_len)):
                pieces, after = taken
                rows.append(pieces)
            if len(rows) == rows_per_step:
                return shard, rows, LoaderPosition(shard_index, after)
            shard_index, document = shard_index + 1, 0  # the remainder of this shard cannot fill the step: drop it

    def _tokens(self, shard: Shard, pieces: list[slice]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row, one more than it has positions, and where its documents start."""
        starts = np.cumsum([0, *(piece.stop - piece.start for piece in pieces[:-1])])
        return np.concatenate([shard.tokens[piece] for piece in pieces], dtype=np.int64), starts


def read_token_bytes(data_dir: Path, vocab_size: int) -> list[bytes]:
    """The bytes of every token, none of BOS, from tokens.bin beside the shards.

    In the format of a shard it has the length of each token, then the bytes of all. Raises SpeedrunError where it is
    missing or damaged.
    """
    path = data_dir / TOKEN_BYTES
    mend = "Call the script that wrote the shards once more, or train with --no-prefix-loss."
    if not path.exists():
        raise SpeedrunError(f"{path} is missing: prefixes of tokens are predicted, see --help-all. {mend}")
    numbers = np.fromfile(path, "<u2", read_shard_header(path), offset=4 * HEADER_INTS)
    ends, spelled = np.cumsum(numbers[:vocab_size], dtype=np.int64), numbers[vocab_size:].astype(np.uint8).tobytes()
    if len(ends) < vocab_size or ends[-1] != len(spelled):
        raise SpeedrunError(f"{path}: not the bytes of {vocab_size} tokens. {mend}")
    return [spelled[begin:end] for begin, end in itertools.pairwise([0, *ends.tolist()])]


def prefix_tokens(tokens: list[bytes]) -> list[int]:
    """For each token, given the bytes of all, the longest other one that it begins with; -1 where there is none."""
    found, begun = [-1] * len(tokens), []  # the tokens that the last one in the alphabet begins with, and itself
    for i in sorted(range(len(tokens)), key=tokens.__getitem__):
        while begun and not (tokens[i].startswith(tokens[begun[-1]]) and tokens[i] != tokens[begun[-1]]):
            begun.pop()
        if tokens[i]:
            found[i] = begun[-1] if begun else -1
            begun.append(i)
    return found


class OutOfData(SpeedrunError):
    """The training shards cannot fill another step."""


def default_data_dir(data: DataConfig) -> Path:
    return Path(__file__).resolve().parent / "data" / data.dataset


def foreign_data(data_dir: Path, data: DataConfig) -> bool:
    """Whether the shards are, by what is recorded beside them, of other data than the track's."""
    return any(sidecar.get("dataset", data.dataset) != data.dataset for sidecar in sidecars(data_dir))


def fetch_command(data_dir: Path, data: DataConfig) -> str:
    """What writes the track's own shards into a folder."""
    return data.fetch if data_dir.resolve() == default_data_dir(data) else f"{data.fetch} --out {data_dir}"


def more_data(data_dir: Path, data: DataConfig) -> str:
    """How to get more shards into a folder."""
    if foreign_data(data_dir, data):
        return "write more of your text into it (`python data/fineweb.py --help`)"
    return f"fetch more (`{fetch_command(data_dir, data)}`)"


def find_shards(data_dir: Path, split: Literal["train", "val"], data: DataConfig) -> list[Path]:
    """The shards `*_train_*.bin` or `*_val_*.bin` of a folder, in order. Raises SpeedrunError where there is none."""
    paths = sorted(data_dir.glob(f"*_{split}_*.bin"))
    if not paths:
        command = fetch_command(data_dir, data)
        raise SpeedrunError(f"no shard *_{split}_*.bin in {data_dir}. Make them with `{command}`, or see --data-dir.")
    return paths


def adapted(track: Track, data_dir: Path) -> Track:
    """The track for other data than its own: it validates on what there is, where that is less than its val_tokens.

    Raises SpeedrunError where the tokens are not those of the track.
    """
    have = sum(read_shard_header(path) for path in find_shards(data_dir, "val", track.data))
    for sidecar in sidecars(data_dir):
        vocabulary = sidecar.get("bos", track.data.bos), sidecar.get("vocab_size", track.model.vocab_size)
        if vocabulary != (track.data.bos, track.model.vocab_size):
            bos, vocab_size = vocabulary
            raise SpeedrunError(
                f"{data_dir} has {vocab_size} tokens, {bos} starts a document; the track has "
                f"{track.model.vocab_size} and {track.data.bos}. Add --model.vocab-size {vocab_size} --data.bos {bos}."
            )
    return replace(track, data=replace(track.data, val_tokens=max(min(track.data.val_tokens, have - 1), 1)))


def require_tokens(track: Track, data_dir: Path, stop: int) -> None:
    """Raise SpeedrunError where the training shards have, by their headers, too few tokens for `stop` steps."""
    # The last target of a row is one token more.
    need = track.schedule.tokens_before(stop) + stop * track.data.rows_per_step
    paths = find_shards(data_dir, "train", track.data)
    have = sum(read_shard_header(path) for path in paths)
    if have * track.data.epochs < need:
        raise SpeedrunError(
            f"too few tokens: the {len(paths)} train shards in {data_dir} hold {have:,}, but {stop} steps take "
            f"at least {need:,}: {more_data(data_dir, track.data)}, or train fewer steps."
        )


def require_rows(track: Track, data_dir: Path, runtime: Runtime, stop: int) -> None:
    """Raise SpeedrunError where the training shards cannot fill the rows of `stop` steps. Reads them all once."""
    epochs, most = track.data.epochs, 1000
    loader = Loader(replace(track, data=replace(track.data, epochs=most)), data_dir, runtime)
    position, filled, shards = LoaderPosition(), 0, len(loader.paths) // most
    with contextlib.suppress(OutOfData):
        for step in range(stop):
            *_, position = loader.take_step(step, position)
            filled += position.shard < epochs * shards
    if filled < stop:
        repeat = f", repeat it with --data.epochs {position.shard // shards + 1}" if filled else ""
        tokens = sum(read_shard_header(path) for path in loader.paths[:shards])
        raise SpeedrunError(
            f"the training shards in {data_dir} hold {tokens:,} tokens, which fill {filled} of {stop} steps (a "
            f"document gives a row at most {track.at(0).stage.max_doc_len:,} tokens, the rest of it is skipped): "
            f"{more_data(data_dir, track.data)}{repeat}, or train fewer steps."
        )


def document_capacity(tokens: int) -> int:
    """Entries of cu_seqlens of a row. Attention launches blocks for each; more documents (none in FineWeb) double it.

    A new length has the model compiled again, which the log tells.
    """
    return 32 + tokens // 512


def make_row(tokens: np.ndarray, starts: np.ndarray, max_seqlen: int, model: ModelConfig) -> Row:
    """A row of n tokens from n + 1 of them and the positions at which its documents start."""
    n = len(tokens) - 1
    capacity = document_capacity(n)
    while capacity <= len(starts):
        capacity *= 2
    cu_seqlens = np.full(capacity, n, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts
    keys = ngram_keys(tokens[:-1], starts, model.ngrams)
    sign_rows = keys // model.ngram_rows % max(model.ngram_signs, 1)
    arrays = tokens.astype(np.int64, copy=False), cu_seqlens, keys % model.ngram_rows, sign_rows
    packed, cu, ngram_rows, sign_rows = map(torch.from_numpy, arrays)
    return Row(packed[:-1], packed[1:], cu, max_seqlen, ngram_rows, sign_rows)


def sample_vocab(is_target: np.ndarray, count: int, seed: int, step: int, row: int) -> tuple[Tensor, Tensor]:
    """`count` columns of the head, int64, and how many of them, the first, are the targets' (columns,): all of these.

    The others are drawn uniformly and without replacement, padding included, which the whole loss counts as well.
    Raises SpeedrunError where the targets leave no place for others.
    """
    targets, others = np.flatnonzero(is_target), np.flatnonzero(~is_target)
    if len(targets) >= count < len(is_target):
        raise SpeedrunError(
            f"--model.sampled-vocab {count}: row {row} of step {step} has {len(targets)} different targets, and a "
            "sample needs others as well. Raise it well above that, or take the whole vocabulary with 0."
        )
    generator = np.random.RandomState((seed % (1 << 32), seed >> 32, step, row))  # which numpy never changes
    drawn = generator.choice(others, count - len(targets), replace=False)
    return torch.from_numpy(np.concatenate((targets, np.sort(drawn)))), torch.tensor(len(targets))


def ngram_keys(tokens: np.ndarray, starts: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Hashes (len(sizes), T) of the last n tokens at each position, for each n. Before a document's start is nothing.

    The polynomial hash of Karp and Rabin; 48271 generates the integers modulo the prime 2^31 - 1.
    """
    position, found = np.arange(len(tokens)), {}
    place = position - np.asarray(starts)[np.searchsorted(starts, position, side="right") - 1]
    key = before = tokens.astype(np.int64)
    for n in range(1, max(sizes, default=0) + 1):
        found[n] = key
        before = np.concatenate(([0], before[:-1]))
        key = (48271 * key + np.where(place >= n, before + 1, 0)) % (2**31 - 1)
    return np.stack([found[n] for n in sizes]) if sizes else np.zeros((0, len(tokens)), np.int64)


def validation_tokens(track: Track, data_dir: Path) -> tuple[np.ndarray, dict[str, str]]:
    """The validation stream and the token after it, uint16, and the identities of its shards.

    Raises SpeedrunError if a shard is missing or damaged.
    """
    parts, identities, have, need = [], {}, 0, track.data.val_tokens + 1
    for path in find_shards(data_dir, "val", track.data):
        count = min(read_shard_header(path), need - have)
        if count:
            identities[path.name] = shard_identity(path)
            parts.append(np.fromfile(path, "<u2", count, offset=4 * HEADER_INTS))
            check_tokens(path, parts[-1], track.model.vocab_size)
            have += count
    if have < need:
        raise SpeedrunError(
            f"too few tokens: the val shards in {data_dir} hold {have:,}, but validation reads {need:,}: "
            f"{more_data(data_dir, track.data)}."
        )
    return np.concatenate(parts), identities


def validation_rows(track: Track, tokens: np.ndarray, runtime: Runtime) -> Iterator[Row]:
    """Yield this rank's rows of the validation stream `tokens`: every W-th one, on the device."""
    data = track.data
    n = data.val_row_tokens
    bounds = np.concatenate(([0], np.flatnonzero(tokens[:-1] == data.bos), [data.val_tokens]))
    longest = min(int(np.diff(bounds).max()), n)  # the same for all rows, which share a graph
    for begin in range(runtime.rank * n, data.val_tokens, runtime.world_size * n):
        row = tokens[begin : begin + n + 1]
        starts = np.union1d(0, np.flatnonzero(row[:-1] == data.bos))
        yield make_row(row, starts, longest, track.model).to(runtime)


def of_each(
    rows: Iterable[Row], function: Callable, pool: ThreadPoolExecutor | None = None, at_once: int = 1
) -> Iterator:
    """Yield `function(row)` of each row, in their order; with a pool of threads, so many of them are begun at once."""
    if pool is None:
        yield from map(function, rows)
        return
    begun: list[Future] = []
    for row in rows:
        begun.append(pool.submit(function, row))
        if len(begun) == at_once:
            yield begun.pop(0).result()
    yield from (future.result() for future in begun)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: state -> files -> state of any number of ranks
# ----------------------------------------------------------------------------------------------------------------------
#
# <folder>/<run id>/step_000500/rank_0_of_2.safetensors and beside it its SHA-256, as `sha256sum -c` reads it. Every
# rank writes what it owns: its pieces of sharded parameters and of their optimizer state; rank 0 also what is
# replicated. Nothing in a checkpoint can execute code: tensors, and numbers as JSON.


@dataclass(frozen=True)
class Progress:
    """All of a checkpoint that is not a tensor."""

    run_id: str
    step: int  # steps done
    seconds: float  # on the clock
    loader: LoaderPosition
    data: dict[str, str]  # identities of the shards read so far, by name
    log_bytes: int  # length of the log and of its metrics so far: what comes later is written again
    metrics_bytes: int
    event: dict[str, float]  # the numbers of the last step so far, which its validation is added to
    source: str  # SHA-256 of train_gpt.py
    settings: dict[str, object]  # of the track, flat, with seed and dtype
    world_size: int

    @staticmethod
    def parse(text: str) -> Progress:
        """From JSON. Raises ValueError, KeyError or TypeError where it is not one."""
        values = json.loads(text)
        values["loader"] = LoaderPosition(**values["loader"])
        progress = Progress(**values)
        if not re.fullmatch(r"[\w-]+", progress.run_id):  # it becomes part of a path
            raise ValueError(f"run id {progress.run_id!r}")
        return progress


class CheckpointError(SpeedrunError):
    """A checkpoint is torn, damaged or foreign."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name; after a crash it is there whole or not at all."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_checkpoint(folder: Path, rank: int, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write this rank's file into the folder of a step. Raises OSError; no half-written file has a final name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}_of_{progress.world_size}.safetensors"
    parts = [path.with_suffix(suffix + ".part") for suffix in (".safetensors", ".sha256")]
    try:
        metadata = {"progress": json.dumps(dataclasses.asdict(progress))}
        safetensors.torch.save_file(tensors, parts[0], metadata)
        parts[1].write_text(f"{digest(parts[0])}  {path.name}\n")
        publish(parts[1], path.with_suffix(".sha256"))
        publish(parts[0], path)
    except safetensors.SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


class Checkpoint:
    """A complete checkpoint on disk, of all ranks that wrote it. Raises CheckpointError where it is not."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.changed: list[str] = []  # in what another run resumes it, as find_checkpoint has found
        files = sorted(folder.glob("rank_*_of_*.safetensors"))
        if not files:
            raise CheckpointError(no_checkpoint(folder))
        match = re.fullmatch(r"rank_0_of_([1-9]\d{0,3})\.safetensors", files[0].name)
        if match is None:
            raise CheckpointError(f"{folder}: not complete, rank_0_of_….safetensors is missing")
        world_size = int(match[1])
        self.files = [folder / f"rank_{rank}_of_{world_size}.safetensors" for rank in range(world_size)]
        if missing := [file.name for file in self.files if not file.exists()]:
            raise CheckpointError(f"{folder}: not complete, {missing[0]} is missing")
        parsed = [self._verified(file) for file in self.files]
        self.progress = first = parsed[0]
        same = (first.run_id, first.step, first.source, first.settings, world_size)
        if any((p.run_id, p.step, p.source, p.settings, p.world_size) != same for p in parsed):
            raise CheckpointError(f"{folder}: its files belong to different checkpoints")

    def _verified(self, path: Path) -> Progress:
        """Compare a file with its digest, and read its numbers."""
        try:
            expected = path.with_suffix(".sha256").read_text().split()[:1]
            if expected != [digest(path)]:
                raise CheckpointError(f"{path}: damaged: its SHA-256 is not that of {path.with_suffix('.sha256').name}")
            with safetensors.safe_open(path, framework="pt") as file:
                return Progress.parse((file.metadata() or {})["progress"])
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a checkpoint of train_gpt.py ({error!r})") from error

    def changes(self, track: Track, options: Options, runtime: Runtime, data_dir: Path) -> list[str]:
        """What is another than when the checkpoint was written."""
        before, now = self.progress.settings, identity(track, options, runtime)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        found = [f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed[:5]]
        if len(changed) > 5:
            found.append(f"and {len(changed) - 5} more")
        if self.progress.source != digest(Path(__file__)):
            found.append("train_gpt.py has changed")
        for name, was in self.progress.data.items():
            path = data_dir / name
            is_now = shard_identity(path) if path.exists() else "missing"
            if is_now != was:
                found.append(f"the data has changed: {path} was {was}, is {is_now}")
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, on the CPU; those in pieces are joined along their first dimension, rank by rank."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safetensors.safe_open(path, framework="pt")) for path in self.files]
            names = [set(file.keys()) for file in files]
            for name in sorted(names[0]):
                pieces = [file.get_tensor(name) for file, has in zip(files, names, strict=True) if name in has]
                yield name, torch.cat(pieces) if len(pieces) > 1 else pieces[0]


class Saver:
    """Writes the checkpoints of a run in the background, one at a time, and removes old ones."""

    def __init__(self, track: Track, options: Options, log: RunLog, runtime: Runtime):
        self.every, self.final, self.keep = options.save_every, options.save_final, options.keep_checkpoints
        self.log, self.runtime = log, runtime
        self.folder = options.checkpoint_dir / log.run_id
        self.source, self.settings = digest(Path(__file__)), identity(track, options, runtime)
        self.latest: Path | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    @property
    def on(self) -> bool:
        return bool(self.every or self.final)

    def due(self, step: int, stop: int) -> bool:
        """Whether a checkpoint is to be written after so many steps, at least one."""
        return (self.every > 0 and step % self.every == 0) or (self.final and step == stop)

    def save(self, trainer: Trainer, step: int, seconds: float) -> None:
        """Copy the state and start to write it. Waits for the checkpoint before, if that is not done."""
        self.wait()
        progress = Progress(
            run_id=self.log.run_id,
            step=step,
            seconds=seconds,
            loader=trainer.loader.position,
            data=trainer.identities(),
            log_bytes=self.log.file.size if self.log.file else 0,
            metrics_bytes=self.log.metrics.size if self.log.file else 0,
            event=dict(self.log.event),
            source=self.source,
            settings=self.settings,
            world_size=self.runtime.world_size,
        )
        self._writing = self._worker.submit(self._write, trainer.owned(), progress)

    def wait(self) -> bool:
        """Until nothing is being written. A failure is said; returns whether there was none."""
        if self._writing is None:
            return True
        error, self._writing = self._writing.exception(), None
        if isinstance(error, OSError):
            tqdm.write(f"warning: no checkpoint in {self.folder}: {error}. The run goes on.", file=sys.stderr)
        elif error is not None:
            raise error
        return error is None

    def _write(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        folder = self.folder / f"step_{progress.step:06}"
        write_checkpoint(folder, self.runtime.rank, tensors, progress)
        self.latest = folder
        if self.runtime.rank == 0:
            for stale in folder.glob("rank_*"):  # of the same step, before the run went on with other ranks
                if f"_of_{progress.world_size}." not in stale.name:
                    stale.unlink()
            folders = checkpoint_folders(self.folder)
            complete = [f for f in folders if len(list(f.glob("*.safetensors"))) == progress.world_size]
            for old in folders if len(complete) >= self.keep else ():
                if old < complete[-self.keep]:
                    shutil.rmtree(old, ignore_errors=True)

    def close(self, complete: bool) -> None:
        """Mark a complete run, which `--resume auto` passes over. Raises SpeedrunError if its last save failed."""
        if not self.wait() and self.final:
            raise SpeedrunError(f"the final checkpoint could not be written to {self.folder}. Log: {self.log.path}")
        if complete and self.runtime.rank == 0 and self.folder.exists():
            (self.folder / "finished").touch()


def no_checkpoint(folder: Path) -> str:
    return f"{folder}: {'no checkpoint in this folder' if folder.is_dir() else 'no such folder'}"


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first."""
    return sorted(folder for folder in run.glob("step_*") if folder.is_dir())


def find_checkpoint(track: Track, options: Options, runtime: Runtime, data_dir: Path) -> Checkpoint | None:
    """What --resume names: a step's folder, or the newest good one of a run's folder or (auto) of the newest run.

    Those that are damaged are named and passed over. None, with `auto` only: there is nothing to resume, and it is said
    why. Raises SpeedrunError where nothing can be resumed, or where source or settings have changed without --force.
    """
    if options.resume is None:
        return None
    auto = options.resume == "auto"
    if auto:
        folders, why = [], f"no run of {track.name} in {options.checkpoint_dir}"
        if runs := sorted(options.checkpoint_dir.glob(f"*-{track.name}-*")):
            finished = (runs[-1] / "finished").exists()
            folders = [] if finished else checkpoint_folders(runs[-1])
            why = f"the newest run, {runs[-1]}, {'is finished' if finished else 'has no good checkpoint'}"
    else:
        path = Path(options.resume)
        folders = checkpoint_folders(path) or [path]
        if folders == [path] and not any(path.glob("rank_*")):  # neither the folder of a run nor that of a step
            runs = {step.parent for step in path.glob("*/step_*")}
            runs = sorted(runs or {step.parent for step in options.checkpoint_dir.glob("*/step_*")}, reverse=True)
            named = f"Name a run, such as {', '.join(map(str, runs[:3]))}" if runs else "There is no run to go on with"
            raise CheckpointError(f"--resume {no_checkpoint(path)}. {named}.")
    for folder in reversed(folders):
        try:
            found = Checkpoint(folder)
            if found.progress.step % 2 and found.progress.step < track.schedule.total_steps:
                raise CheckpointError(f"{folder}: an odd number of steps: Adam's gradients wait for the next")
        except CheckpointError as error:
            if len(folders) == 1 and not auto:
                raise
            if runtime.rank == 0:
                tqdm.write(f"passed over: {error}", file=sys.stderr)
            continue
        found.changed = found.changes(track, options, runtime, data_dir)
        if found.changed and not options.force:
            raise SpeedrunError(
                f"{folder} is of another run: {'; '.join(found.changed)}. Resume it as it was, or add --force: the log "
                "will say so, and is no record any more."
            )
        return found
    if not auto:
        raise CheckpointError(f"--resume {options.resume}: no good checkpoint in it.")
    if runtime.rank == 0:
        tqdm.write(f"nothing to resume: {why}. A new run begins.")
    return None


def identity(track: Track, options: Options, runtime: Runtime) -> dict[str, object]:
    """What must not change between the parts of a run, as JSON gives it back."""
    values = flatten(track) | {"seed": options.seed, "dtype": str(runtime.dtype)}
    return json.loads(json.dumps(values))


# ----------------------------------------------------------------------------------------------------------------------
# Run
# ----------------------------------------------------------------------------------------------------------------------

LOSS_EVERY = 10  # steps between reads of the training loss: each makes the host wait for the device


FP8 = ("head", "mlp")  # what is in FP8 where nothing else is asked for


@dataclass(frozen=True)
class Options:
    """What belongs to one run, and not to the track."""

    seed: int = 0
    """Of the initial weights."""
    max_steps: int | None = None
    """Stop after so many steps; the log is marked as that of an incomplete run."""
    data_dir: Path | None = None
    """Folder of the shards. Default: data/<dataset> beside this file."""
    log_dir: Path = Path("logs")
    """Folder of the logs."""
    track_with: Literal["tensorboard", "wandb"] | None = None
    """Give the numbers of each step to TensorBoard (files beside the log) or Weights & Biases as well."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """Of weights and activations. auto: bfloat16 on CUDA and on CPUs that multiply it in hardware, else float32."""
    attention: Literal["auto", "FA2", "FA3", "FA4"] = "auto"
    """FlashAttention on CUDA: FA2 is torch's own, the others have to be installed. auto: the best that is there."""
    kernels: Literal["auto", "triton", "plain"] = "auto"
    """The hot operations: Triton kernels, or plain PyTorch. auto: Triton on CUDA where it is installed."""
    fp8: tuple[Literal["head", "mlp", "attention"], ...] | None = None
    """Forward products in FP8 while training, of the head backward as well; --fp8 alone: none. Default: head mlp, where
    the GPU has it and weights are bfloat16."""
    loss_chunk: int | None = None
    """Positions of a row whose logits exist at a time; the loss is the same. Default: what an eighth of the GPU's
    memory holds. Lower it where memory runs out."""
    save_every: int = 0
    """Steps between checkpoints, an even number; 0: none."""
    save_final: bool = False
    """Write a checkpoint at the end."""
    keep_checkpoints: int = 2
    """How many of them stay."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder of the checkpoints, a folder in it per run."""
    resume: str | None = None
    """Go on from a checkpoint: the folder of a step or of a run, or `auto`: the newest run of this track, if it is
    not finished, else a new one."""
    force: bool = False
    """Resume although source or settings have changed."""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Compile the model with torch.compile. Default: where there is CUDA; with it, --device cpu never compiles."""
    warmup: bool = True
    """Run the shapes of all stages once before the clock starts, then restore everything."""
    sample_tokens: int = 200
    """Length of the text sample at the end; 0: none."""
    export: Path | None = None
    """Folder into which to write the weights at the end, for the commands of evals/."""


def launcher_ranks() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of this process; 0, 1, 0 without a launcher. Raises SpeedrunError."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    found = {name: os.environ.get(name, default) for name, default in alone.items()}
    rank, world_size, local_rank, _, port = (int(word) if word.isdecimal() else -1 for word in found.values())
    if not 0 <= rank < world_size or local_rank < 0 or (world_size > 1 and (port < 0 or not found["MASTER_ADDR"])):
        said = " ".join(f"{name}={word}" for name, word in found.items())
        raise SpeedrunError(f"the environment says {said}, which no launcher does: unset these, or use ./run.sh.")
    return rank, world_size, local_rank


@dataclass(frozen=True)
class Runtime:
    """Where a run happens: device, place among the processes, precision."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    compile: bool = False
    attention: str = "block-local"
    fused: bool = False
    """Triton kernels for the hot operations."""
    fp8: tuple[str, ...] = ()
    """Products in FP8 while training: head, mlp, attention."""
    threads: int = field(default_factory=torch.get_num_threads)
    """What torch has of the CPU when the process begins; see `DataConfig.rows_at_once` for what becomes of them."""
    max_loss_chunk: int | None = None
    """--loss-chunk"""
    logits_memory: int = 10**9
    """Bytes that logits and their gradient may take where that is not given."""

    def loss_chunk(self, positions: int, vocab_size: int) -> int:
        """Positions of a row whose logits are to exist at a time: equal parts, multiples of 16 as FP8 wants them."""
        bytes_each = vocab_size * (4 if self.fused else 24)  # bfloat16, in place or FP8 and its transpose; or float32
        most = self.max_loss_chunk or max(self.logits_memory // bytes_each, 16)
        parts = -(-positions // most)
        return min(-(-positions // parts // 16) * 16, positions)

    def compiled(self, function: Callable) -> Callable:
        """The function, compiled where this runtime compiles, once for each shape."""
        if not self.compile:
            return function
        # A graph per stage, with and without gradients, and one for the final validation: 9 for `small`, 1 over the
        # limit of torch.
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(function, dynamic=False, fullgraph=True)

    @staticmethod
    def create(options: Options) -> Runtime:
        """Join the processes that torchrun started, if any, and choose device and precision."""
        rank, world_size, local_rank = launcher_ranks()
        device = choose_device(options, local_rank)
        cuda = device.type == "cuda"
        has_triton = bool(cuda and triton)
        dtype = choose_dtype(options, cuda)
        has_fp8 = cuda and torch.cuda.get_device_capability() >= (8, 9) and dtype == torch.bfloat16
        for name, wanted, present, least in (
            (f"--attention {options.attention}", options.attention != "auto", cuda, "CUDA"),
            ("--kernels triton", options.kernels == "triton", has_triton, "CUDA and the package triton"),
            (
                f"--fp8 {' '.join(options.fp8 or ())}",
                bool(options.fp8),
                has_fp8,
                "a GPU of compute capability 8.9 (Ada, Hopper) or newer, and bfloat16",
            ),
        ):
            if wanted and not present:
                raise SpeedrunError(f"{name} needs {least}. Drop it: the default is what works here.")
        join_ranks(device, world_size)
        return Runtime(
            device=device,
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            compile=options.compile and cuda == torch.cuda.is_available(),
            attention=activate_flash_attention(options.attention) if cuda else "block-local",
            fused=has_triton and options.kernels != "plain",
            fp8=(FP8 if options.fp8 is None else options.fp8) if has_fp8 else (),
            max_loss_chunk=options.loss_chunk,
            logits_memory=torch.cuda.get_device_properties(device).total_memory // 8 if cuda else 10**9,
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device, by way of pinned memory: from other memory the host would wait for the device."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def describe(self) -> str:
        """The head of the log: versions, hardware, backends."""
        lines = [
            f"Running Python {sys.version}",
            f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}, numpy {np.__version__}",
            f"Platform: {platform.platform()}",
            f"Device: {self.device.type} x {self.world_size}, dtype {str(self.dtype).removeprefix('torch.')}, "
            f"compile {self.compile}, attention {self.attention}, FP8 {' '.join(self.fp8) or 'none'}, "
            f"kernels {f'Triton {triton.__version__}' if self.fused else 'plain PyTorch'}",
        ]
        if self.device.type == "cuda":
            try:
                lines.append(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout)
            except (OSError, subprocess.TimeoutExpired) as error:
                lines.append(f"nvidia-smi: {error}")
        else:
            lines.append(f"CPU: {cpu_name()}, {self.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
        return "\n".join([*lines, f"inductor: {inductor_options()}"])


def inductor_options() -> str:
    """What of inductor is not as by default ("torch.compile: NAME": given there), as JSON, for records/check.py."""
    found = {k: v for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_") and k != "TORCHINDUCTOR_CACHE_DIR"}
    if "torch._inductor.config" in sys.modules:
        config = torch._inductor.config
        found |= {k: v for k, v in config._get_dict(skip_default=True).items() if v != config._config[k].default}
    if "torch._dynamo" in sys.modules:
        backends = getattr(torch._dynamo.eval_frame, "cached_backends", {})  # one for each torch.compile
        for backend in filter(None, backends.values()):
            name = getattr(backend, "compiler_name", repr(backend))
            given = backend.config if name == "inductor" else {"backend": name}
            found |= {f"torch.compile: {k}": v for k, v in given.items()}
    return json.dumps(found, default=repr)


def report_error(error: Exception) -> None:
    """Show it, and leave it to torchrun as its ErrorHandler does, with the message in place of a traceback."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))


def choose_device(options: Options, local_rank: int) -> torch.device:
    """The CPU or this process's GPU, made ready. Raises SpeedrunError where --device or --dtype cannot be had."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SpeedrunError(
            "--device cuda, but PyTorch finds no CUDA device. Check `nvidia-smi` and that this PyTorch is a CUDA "
            f"build (it is {torch.__version__}), or use --device cpu."
        )
    if options.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        # The mean squares of embeddings that are rarely seen decay to denormal numbers, with which CPUs are slow.
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SpeedrunError(
            f"process {local_rank} of this node has no GPU of its own: {torch.cuda.device_count()} found. "
            "Start one process per GPU (NPROC=...)."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if torch.cuda.get_device_capability() < (8, 0) or options.dtype not in ("auto", "bfloat16"):
        raise SpeedrunError(
            f"attention on CUDA runs in bfloat16 on Ampere or newer (compute capability 8.0), but this is "
            f"{torch.cuda.get_device_name()} (capability {torch.cuda.get_device_capability()}) with --dtype "
            f"{options.dtype}. Use --device cpu, or drop --dtype."
        )
    return device


def choose_dtype(options: Options, cuda: bool) -> torch.dtype:
    """Of weights and activations."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    fast_bfloat16 = cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast_bfloat16 else torch.float32


def join_ranks(device: torch.device, world_size: int) -> None:
    """Make the process group, where there are several ranks. Raises SpeedrunError where they do not meet."""
    if world_size == 1:
        return
    cuda = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    except dist.DistError as error:
        raise SpeedrunError(
            f"the processes do not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]}). Is that node 0, and the port free there (MASTER_PORT=...)?"
        ) from error


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks: by default each activation is mapped anew, page fault by page fault."""
    if sys.platform == "linux":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Clock:
    """Training time: runs only between start() and stop(), both of which wait for the device."""

    LONG = 600  # seconds that ranks wait for another that may compile, or write to a busy disk

    def __init__(self, runtime: Runtime, elapsed: float = 0.0, row_seconds: float | None = None):
        """row_seconds: what the slowest row of the warm-up took; None: there was none."""
        self.runtime, self.elapsed, self._began = runtime, elapsed, None
        self._patience = 45 if runtime.device.type == "cuda" else max(60, 20 * (row_seconds or 0))
        if row_seconds is None:
            self._patience = self.LONG

    def start(self) -> None:
        if self._began is not None:
            return
        self.runtime.synchronize()
        if self.runtime.world_size > 1:
            dist.barrier()
            self._limit_waiting(self._patience)
        self._began = time.perf_counter()

    def stop(self) -> None:
        if self._began is None:
            return
        self.runtime.synchronize()
        self.elapsed, self._began = self.read(), None
        if self.runtime.world_size > 1:
            self._limit_waiting(self.LONG)

    def _limit_waiting(self, seconds: float) -> None:
        """End the run where a collective waits for some rank for so long."""
        # Of torch 2.14 on, and its name before.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(datetime.timedelta(seconds=seconds))

    def read(self) -> float:
        """Seconds so far, without waiting for the device: exact after stop(), else as far as the host has come."""
        return self.elapsed + (time.perf_counter() - self._began if self._began is not None else 0.0)


class LineFile:
    """A text file that grows line by line. On a full disk lines wait in memory, the run goes on and tries again."""

    def __init__(self, path: Path, size: int | None = None):
        """A new file, or an existing one cut to `size` bytes. Raises OSError, also where another process writes it."""
        self.path, self.size, self.pending = path, size or 0, b""
        self._file = open(path, "xb" if size is None else "ab", buffering=0)  # noqa: SIM115 - for the whole run
        try:
            import fcntl  # not on Windows

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except (ImportError, OSError):  # some network file systems know no locks
            pass
        self._file.truncate(self.size)

    def write(self, line: str) -> None:
        data, waiting = (line + "\n").encode(), bool(self.pending)
        self.size += len(data)
        self.pending += data
        if (error := self._flush()) and not waiting:
            said = f"warning: {self.path}: cannot be written ({error.strerror}); the run goes on and tries again"
            tqdm.write(said, file=sys.stderr)

    def _flush(self) -> OSError | None:
        """Write what waits; returns what stands in the way."""
        try:
            while self.pending:
                self.pending = self.pending[self._file.write(self.pending) :]
        except OSError as error:
            return error

    def close(self) -> None:
        """Close the file. Raises SpeedrunError, with the last lines in it, where there is still no room for them."""
        if error := self._flush():
            lines = self.pending.decode(errors="replace").splitlines()
            raise SpeedrunError(
                f"{self.path}: not complete, its last {len(lines)} lines cannot be written ({error.strerror}). "
                "They end with:\n" + "\n".join(lines[-20:])
            )
        self._file.close()


class RunLog:
    """logs/<run_id>.txt, written by rank 0 alone: source, environment and settings, then one line per event.

    Beside it <run_id>.jsonl has all numbers of a step in one JSON object per line, for other tools; `track_with` gets
    the same. A resumed run goes on in its files, from where they were when the checkpoint was written.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        source: str,
        settings: dict[str, object],
        log_dir: Path,
        runtime: Runtime,
        track_with: str | None = None,
        resumed: Progress | None = None,
    ):
        self.file, self.tracker, self.total_steps = None, None, total_steps
        self.written = ""  # before a resume, and what is to be written once
        self.event = dict(resumed.event) if resumed else {}
        self.run_id = resumed.run_id if resumed else new_run_id(name, runtime)
        self.path = log_dir / f"{self.run_id}.txt"
        if runtime.rank != 0:
            self.path = None
            return
        metrics = self.path.with_suffix(".jsonl")
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            if resumed:
                for path, size in ((self.path, resumed.log_bytes), (metrics, resumed.metrics_bytes)):
                    if path.stat().st_size < size:
                        raise SpeedrunError(f"{path}: shorter than when the checkpoint was written: lines are missing.")
            if track_with:  # first: where it refuses, no empty log stays behind
                self.tracker = open_tracker(track_with, log_dir, self.run_id, settings)
            self.file = LineFile(self.path, resumed and resumed.log_bytes)
            self.metrics = LineFile(metrics, resumed and resumed.metrics_bytes)
            self.written = self.path.read_text(encoding="utf-8") if resumed else ""
        except OSError as error:
            raise SpeedrunError(f"{self.path}: cannot write the log ({error.strerror}); see --log-dir.") from error
        if os.environ.get("TRAIN_GPT_LOG_PATH_FILE"):
            Path(os.environ["TRAIN_GPT_LOG_PATH_FILE"]).write_text(str(self.path))
        if resumed is None:
            self.write(source)
            self.write("=" * 100)
            self.write(runtime.describe())
            self.write("\n".join(f"{key}: {value}" for key, value in settings.items()))
            self.write("=" * 100)

    def write(self, line: str) -> None:
        if self.file is not None:
            self.file.write(line)

    def write_once(self, what: str, how: str) -> None:
        """A line that the log does not have yet, which the part before a resume may have written."""
        if f"\n{what}: " not in self.written:
            self.written += f"\n{what}: "
            self.write(f"{what}: {how}")

    def say(self, line: str) -> None:
        """A line for the terminal, from rank 0, above the progress bar."""
        if self.file is not None:
            tqdm.write(line)

    def step(self, step: int, seconds: float, metrics: dict[str, float] | None = None, **losses: float) -> str:
        """Write `step:S/N [val_loss:X] train_time:Tms step_avg:Ams` and return it; `metrics` go to other tools only.

        These get the numbers of several lines of a step together, with the first line of the next.
        """
        values = "".join(f"{key}:{value:.4f} " for key, value in losses.items())
        average = 1000 * seconds / max(step, 1)
        line = f"step:{step}/{self.total_steps} {values}train_time:{1000 * seconds:.0f}ms step_avg:{average:.2f}ms"
        self.write(line)
        if self.file is not None:
            if self.event.get("step") != step:
                self._write_event()
            self.event |= {"step": step} | losses | {"train_time": round(seconds, 6)} | (metrics or {})
        return line

    def _write_event(self) -> None:
        if self.event:
            self.metrics.write(json.dumps(self.event))
            step = self.event.pop("step")
            if self.tracker:
                self.tracker.log(self.event, step=step)
        self.event = {}

    def close(self, exit_code: int = 0) -> None:
        """Close the files. Raises SpeedrunError where there is no room for their last lines."""
        if self.file is not None:
            self._write_event()
            self.file.close()  # first: its lines are those to be shown
            self.metrics.close()
            if self.tracker:
                self.tracker.finish(exit_code=exit_code)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close it, with a line that says why where an error or a signal ends the run."""
        if error is not None:
            self.write((str(error) or repr(error)).splitlines()[0])
        self.close(exit_code=int(error is not None))


def new_run_id(name: str, runtime: Runtime) -> str:
    """Date, time, track and the fraction of the second in hex: in the order of time, and the same on all ranks."""
    now = time.time()
    made = [f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{name}-{int(now % 1 * 16**6):06x}"]
    if runtime.world_size > 1:
        dist.broadcast_object_list(made, device=runtime.device)
    return made[0]


def open_tracker(name: str, log_dir: Path, run_id: str, settings: dict[str, object]):
    """What takes the numbers of steps as a run of wandb does. Raises SpeedrunError where wandb cannot begin."""
    if name == "tensorboard":
        return TensorBoard(log_dir / run_id)
    import wandb

    try:
        return wandb.init(dir=log_dir, id=run_id, name=run_id, config=settings, resume="allow")
    except wandb.Error as error:
        raise SpeedrunError(f"--track-with wandb (WANDB_MODE=offline needs no account or network): {error}") from error


class TensorBoard:
    """TensorBoard's files, with the two methods of wandb's runs."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, exit_code: int) -> None:
        self._writer.close()


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Fields of nested dataclasses (and tuples of them) as {"schedule.stages.0.tokens": ...}."""
    if dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for name, item in items for k, v in flatten(item, f"{prefix}.{name}" if prefix else name).items()}


def add_gradients(params: Iterable[nn.Parameter], grads: Iterable[Tensor | None]) -> None:
    """Add to `.grad`, in one kernel for each dtype instead of one for each parameter."""
    sums: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for p, grad in zip(params, grads, strict=True):
        if grad is not None and p.grad is not None:
            for some, one in zip(sums.setdefault((grad.dtype, grad.layout), ([], [])), (p.grad, grad), strict=True):
                some.append(one)
        elif grad is not None:
            p.grad = grad if grad.is_sparse else grad.contiguous()
    for some in sums.values():
        torch._foreach_add_(*some)


class Trainer:
    """The state of a run (weights, optimizer state, loader position, RNG; the loop has the clock) and its two moves."""

    def __init__(self, track: Track, runtime: Runtime, data_dir: Path, seed: int):
        self.track, self.runtime = track, runtime
        torch.manual_seed(seed)
        self.model = GPT(track.model, runtime, seed)
        if track.optimizer.rules.ngram_embed.kind == "adagrad" and runtime.world_size == 1:
            self.model.sparse_table = "ngram_embed"
        self.params = dict(self.model.named_parameters())
        in_turn = runtime.device.type != "cpu" or runtime.world_size > 1 or runtime.compile
        self.at_once = 1 if in_turn else min(track.data.rows_at_once, track.data.rows_per_step, runtime.threads)
        self.pool: ThreadPoolExecutor | None = None  # where rows are computed at the same time
        if self.at_once > 1:
            torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(self.at_once, "rows", torch.set_flush_denormal, (True,))
        self.optimizer = Optimizer(self.params, track.optimizer, runtime, self.pool)
        self.loader = Loader(track, data_dir, runtime, seed)
        self.validation_tokens, self.other_data = validation_tokens(track, data_dir)
        self.token_bytes: list[bytes] | None = None
        if track.prefix_loss and any(max(stage.prefix_weight) > 0 for stage, _ in track.schedule.parts()):
            self.token_bytes = read_token_bytes(data_dir, track.model.vocab_size)
            self.other_data[TOKEN_BYTES] = shard_identity(data_dir / TOKEN_BYTES)

    def identities(self) -> dict[str, str]:
        """Of the data that were read so far, by the names of the files."""
        return dict(sorted((self.other_data | self.loader.identities).items()))

    def find_prefixes(self) -> None:
        """What the prediction of prefixes takes; to call when the clock runs."""
        if self.token_bytes is not None:
            self.loader.prefix = self.model.set_prefixes(self.token_bytes)

    def train_step(self, step: int) -> Tensor:
        """One step. Returns this rank's part of the mean next-token loss, 0-dim on the device: see `GPT.forward`."""
        settings, num_rows = self.track.at(step), self.track.data.rows_per_step
        weights = self._weights(settings.prediction_weights)
        prefix_weight = self._weights((settings.prefix_weight,)) if settings.prefix_weight > 0 else None
        rows, weights8, nlls = self.loader.next(step), self.model.in_fp8(), []

        def gradients(row: Row) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss, nll = self.model(row, settings, weights, prefix_weight, weights8)
            return nll, torch.autograd.grad(loss / num_rows, self.params.values(), allow_unused=True)

        for nll, grads in of_each(rows, gradients, self.pool, self.at_once):
            nlls.append(nll)
            add_gradients(self.params.values(), grads)
        rules = self.optimizer.rules
        self.model.hand_over_gradients(lambda name: settings.adam_steps or rules[name].is_of_matrices)
        self.optimizer.step(settings, {"ngram_embed": self.loader.touched})
        return torch.stack(nlls).sum() / settings.stage.tokens

    @torch.no_grad()
    def mean_loss(self, losses: list[Tensor]) -> float:
        """Mean over steps and ranks of what `train_step` has returned; NaN where a loss or a weight is not finite.

        Waits for the device.
        """
        norms = torch.stack([p.detach().norm().to(losses[0].dtype) for p in self.params.values()])
        mean = torch.stack(losses).mean().double()
        mean = torch.where(norms.isfinite().all(), mean, math.nan)
        return self.runtime.sum(mean).item()

    @torch.no_grad()
    def what_is_not_finite(self, losses: list[Tensor], last_step: int) -> str:
        """In words, the first of these losses, up to that of `last_step`, or else a weight; on the rank that has it."""
        steps = range(last_step + 1 - len(losses), last_step + 1)
        bad_steps = [step for step, loss in zip(steps, losses, strict=True) if not loss.isfinite()]
        if not all(p.isfinite().all() for p in self.params.values()):
            bad_steps.append(last_step + 1)
        by_rank = [min(bad_steps, default=math.inf)] * self.runtime.world_size
        if self.runtime.world_size > 1:
            dist.all_gather_object(by_rank, by_rank[0])
        first = min(by_rank)
        what = f"the loss of step {first + 1}" if first <= last_step else "a weight"
        return f"{what} is not finite on rank {by_rank.index(first)} of {self.runtime.world_size}"

    @torch.no_grad()
    def validate(self, settings: Settings, max_rows: int | None = None, interrupt: Interrupt | None = None) -> float:
        """Mean next-token cross-entropy over the validation stream, in nats per token, the same on every rank.

        NaN where `interrupt`, asked before each row that all ranks have is added, says that a signal has come.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        weights, hidden = self._weights((1.0,)), self.runtime.rank > 0 or None
        rows = itertools.islice(validation_rows(self.track, self.validation_tokens, self.runtime), max_rows)
        nll_of = torch.no_grad()(lambda row: self.model(row, settings, weights)[1])  # each thread has its own mode
        nlls = of_each(rows, nll_of, self.pool, self.at_once)
        each = -(-self.track.data.val_tokens // self.track.data.val_row_tokens) / self.runtime.world_size
        bar = tqdm(nlls, "validation", math.ceil(each), unit="row", delay=5, leave=False, disable=hidden)
        for i, nll in enumerate(bar):
            if interrupt and i < math.floor(each) and interrupt.ask():
                return math.nan
            total += nll
        return self.runtime.sum(total).item() / self.track.data.val_tokens

    def _weights(self, values: tuple[float, ...]) -> Tensor:
        return self.runtime.to_device(torch.tensor(values, dtype=wide(self.runtime.dtype)))

    def state(self) -> dict[str, object]:
        """A copy of everything that training changes."""
        return {
            "weights": {name: p.detach().clone() for name, p in self.params.items()},
            "optimizer": {n: {k: t.clone() for k, t in s.items()} for n, s in self.optimizer.state.items()},
            "loader": self.loader.position,
            "mlp_scale": self.model.mlp_scale.clone(),
            "rng": torch.get_rng_state(),
        }

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """Put a copy made by `state` back, in place."""
        for total in itertools.chain(*self.model.gradient_sums.values()):
            total.zero_()
        self.optimizer.drop_gradients()
        for name, p in self.params.items():
            p.copy_(state["weights"][name])
            for key, tensor in self.optimizer.state[name].items():
                tensor.copy_(state["optimizer"][name][key])
        self.loader.position = state["loader"]
        self.model.mlp_scale.copy_(state["mlp_scale"])
        torch.set_rng_state(state["rng"])

    def owned(self) -> dict[str, Tensor]:
        """Copies on the CPU of what this rank writes into a checkpoint; to call after an even number of steps.

        These are its pieces of sharded parameters and of their optimizer state, and on rank 0 all that is replicated.
        After an odd number Adam's parameters have gradients that wait for the next step.
        """
        optimizer, found = self.optimizer, {}
        for name, p in self.params.items():
            if optimizer.rules[name].sharded or self.runtime.rank == 0:
                found[f"weights.{name}"] = optimizer.piece(name, p.data)
                found |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state[name].items()}
        found["mlp_scale"] = self.model.mlp_scale[None]  # each rank's own: they follow from the rows that it has had
        if self.runtime.rank == 0:
            found["rng"] = torch.get_rng_state()
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in found.items()}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of any number of ranks. Raises CheckpointError where it does not fit this model."""
        targets = {}  # what this rank needs of the whole tensors: where it goes, and its first row
        for name, p in self.params.items():
            rule = self.optimizer.rules[name]
            targets[f"weights.{name}"] = (p.data.view(-1) if rule.kind == "adam" else p.data), 0
            for key, tensor in self.optimizer.state[name].items():
                targets[f"optimizer.{name}.{key}"] = tensor, self.runtime.rank * len(tensor) if rule.sharded else 0
        for name, whole in checkpoint.tensors():
            if name == "rng":
                torch.set_rng_state(whole)
                continue
            if name == "mlp_scale":  # (ranks, L); at another number of them the largest of all
                if whole.size(1) != len(self.model.mlp_scale):
                    raise CheckpointError(f"{checkpoint.folder}: {name} does not fit this model.")
                same = len(whole) == self.runtime.world_size
                self.model.mlp_scale.copy_(whole[self.runtime.rank] if same else whole.amax(0))
                continue
            if name not in targets:
                raise CheckpointError(f"{checkpoint.folder}: {name} does not fit this model, which has none.")
            target, begin = targets.pop(name)
            piece = whole[begin : begin + len(target)]
            if target.dim() == 3:  # of a bank, padded with zero matrices to a multiple of the ranks
                piece = torch.cat((piece, whole.new_zeros(len(target) - len(piece), *whole.shape[1:])))
            if (target.shape, target.dtype) != (piece.shape, piece.dtype):
                raise CheckpointError(f"{checkpoint.folder}: {name} does not fit this model.")
            target.copy_(piece)
        if targets:
            raise CheckpointError(f"{checkpoint.folder}: {next(iter(targets))} is missing.")
        self.loader.position = checkpoint.progress.loader
        self.other_data = checkpoint.progress.data | self.other_data

    def warm_up(self, stop: int, start: int = 0) -> float:
        """Compile and run every shape of the steps from `start` to `stop` once, then restore everything.

        Returns the seconds that the slowest row took.
        """
        state, schedule, slowest = self.state(), self.track.schedule, 0.0
        starts = [max(steps.start, start) for _, steps in schedule.parts() if steps.start < stop and steps.stop > start]
        hidden = self.runtime.rank > 0 or None
        for first in tqdm(starts, "warm-up", unit="stage", delay=5, leave=False, disable=hidden):
            self.loader.position = state["loader"]
            for step in range(first, min(first + 2, stop)):  # an even and an odd step: Adam steps on odd ones
                began = time.perf_counter()
                self.train_step(step)
                slowest = max(slowest, time.perf_counter() - began)
            if self.runtime.compile and self.track.val_every:
                self.validate(self.track.validation_at(first), max_rows=1)
        if self.runtime.compile:
            self.validate(self.track.validation_at(stop), max_rows=1)
        self.load_state(state)
        return slowest * self.runtime.world_size / self.track.data.rows_per_step


def train(track: Track, options: Options, runtime: Runtime) -> float:
    """A whole run, or the rest of one. Returns the final validation loss."""
    data_dir = options.data_dir or default_data_dir(track.data)
    total_steps = track.schedule.total_steps
    stop = total_steps if options.max_steps is None else min(options.max_steps, total_steps)
    check_numbers(track, options, runtime)
    check_outputs(options, runtime)
    foreign = foreign_data(data_dir, track.data)
    if foreign:
        track = adapted(track, data_dir)
        require_rows(track, data_dir, runtime, stop)
    else:
        require_tokens(track, data_dir, stop)
    if foreign or track.data.epochs > 1:
        track = replace(track, target_loss=None)
    resumed = find_checkpoint(track, options, runtime, data_dir)
    start = resumed.progress.step if resumed else 0
    if resumed and (start > stop or (start == stop and (resumed.folder.parent / "finished").exists())):
        raise SpeedrunError(f"{resumed.folder} is of step {start}, and the run ends at {stop}: nothing is left to do.")
    if runtime.compile:
        from torch._inductor import config as inductor

        inductor.coordinate_descent_tuning = track.coordinate_descent_tuning
    trainer = Trainer(track, runtime, data_dir, options.seed)
    if resumed:
        trainer.load(resumed)
    log = RunLog(
        track.name,
        total_steps,
        Path(__file__).read_text(encoding="utf-8"),
        flatten(track) | flatten(options),
        options.log_dir,
        runtime,
        options.track_with,
        resumed.progress if resumed else None,
    )
    with log:
        saver = Saver(track, options, log, runtime)
        log.say(
            f"{track.name}: {sum(p.numel() for p in trainer.params.values()):,} parameters on {runtime.world_size} x "
            f"{runtime.device.type}, {runtime.dtype}, attention {runtime.attention}. log: {log.path}"
        )
        if track.target_loss is None:
            repeated = f", read {track.data.epochs} times" if track.data.epochs > 1 else ""
            log.say(
                f"data: {data_dir}{repeated}: its loss, over {track.data.val_tokens:,} tokens, compares with no record"
            )
        if resumed:
            how, ranks = f"resumed at step {start} from {resumed.folder}", resumed.progress.world_size
            how += f", by {runtime.world_size} processes instead of {ranks}" if ranks != runtime.world_size else ""
            log.write(how + (f" with --force: {'; '.join(resumed.changed)}" if resumed.changed else ""))
            log.say(how)
        row_seconds = None
        if options.warmup:
            log.say("warming up (not timed)")
            with Interrupt(runtime, at_once=True):
                row_seconds = trainer.warm_up(stop, start)
            if runtime.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()

        clock, graphs = Clock(runtime, resumed.progress.seconds if resumed else 0.0, row_seconds), compilations()
        val_loss = Loop(trainer, clock, log, saver, range(start, stop)).run()
        if runtime.compile:
            log.write(f"compilations after the clock started: {compilations() - graphs}")
        log.write(f"inductor at the end: {inductor_options()}")
        conclude(trainer, log, options, clock.elapsed, val_loss, stop)
        saver.close(complete=stop == total_steps)
    return val_loss


@dataclass
class Loop:
    """The steps of a run from the first to the last: train, tell, and between the steps save, validate, stop."""

    trainer: Trainer
    clock: Clock
    log: RunLog
    saver: Saver
    steps: range
    losses: list[Tensor] = field(default_factory=list, init=False)  # since they were last read

    def run(self) -> float:
        """Returns the last validation loss."""
        trainer, runtime = self.trainer, self.trainer.runtime
        self.tokens_seen = trainer.track.schedule.tokens_before(self.steps.start)
        self.compilations = compilations()
        bar = tqdm(total=self.steps.stop, initial=self.steps.start, unit="step", disable=runtime.rank > 0 or None)
        with Interrupt(runtime) as self.interrupt, bar as self.bar:
            self.clock.start()
            trainer.find_prefixes()
            for step in self.steps:
                self.between_steps(step)
                self.clock.start()
                self.losses.append(trainer.train_step(step))
                self.after_step(step)
            return self.between_steps(self.steps.stop)

    def between_steps(self, step: int) -> float | None:
        """Before a step, off the clock: save, validate, stop, each where it is due. Returns the validation loss."""
        track, interrupt = self.trainer.track, self.interrupt
        last = step == self.steps.stop
        saves = step > self.steps.start and self.saver.due(step, self.steps.stop)
        validates = last or (track.val_every > 0 and step % track.val_every == 0)
        if not (saves or validates or interrupt.agreed):
            return None
        self.clock.stop()
        if saves:
            self.saver.save(self.trainer, step, self.clock.elapsed)
        if validates and not interrupt.agreed:
            val_loss = self.trainer.validate(track.validation_at(step), interrupt=interrupt)
        if interrupt.agreed:
            self.end_for_signal(step, saved=saves)
        if not validates:
            return None
        self.log.say(self.log.step(step, self.clock.elapsed, {"tokens": self.tokens_seen}, val_loss=val_loss))
        if track.target_loss is not None and val_loss <= track.target_loss:
            self.log.write_once(f"target {track.target_loss} reached", f"in {self.clock.elapsed:.3f} s at step {step}")
        if not math.isfinite(val_loss):
            self.give_up(f"the validation loss is {val_loss} after {step} steps")
        return val_loss

    def after_step(self, step: int) -> None:
        """Write down a step that is done. Now and then the ranks agree on the loss, and on a signal that came."""
        trainer, runtime, settings = self.trainer, self.trainer.runtime, self.trainer.track.at(step)
        done, last, seconds = step + 1, step + 1 == self.steps.stop, self.clock.read()
        if compilations() > self.compilations:
            self.compilations = compilations()
            self.log.write(f"compiled again in step {done}: a row with more documents than `document_capacity` allows?")
        self.tokens_seen += settings.stage.tokens
        metrics = {"tokens": self.tokens_seen, "lr": settings.lr, "momentum": settings.momentum}
        self.log.step(done, seconds, metrics)
        self.bar.update()
        sent = self.interrupt.signal if runtime.world_size == 1 else 0  # several ranks have to agree on the step
        if not (done % LOSS_EVERY == 0 or last or self.saver.due(done, self.steps.stop) or sent):
            return
        train_loss = trainer.mean_loss(self.losses)
        if not math.isfinite(train_loss):
            self.give_up(f"{trainer.what_is_not_finite(self.losses, step)}, after {done} steps")
        self.losses.clear()
        line = self.log.step(done, seconds, metrics, train_loss=train_loss)
        self.bar.set_postfix_str(f"loss {train_loss:.4f}, {self.tokens_seen / self.clock.read():,.0f} tokens/s")
        if self.bar.disable and done % (10 * LOSS_EVERY) == 0:
            self.log.say(line)  # where no bar can be drawn
        if settings.adam_steps or not self.saver.on:  # a checkpoint is of an even number of steps
            self.interrupt.ask()

    def end_for_signal(self, step: int, saved: bool) -> NoReturn:
        """End the run for a signal, with a checkpoint where there can be one: raises Interrupted."""
        if self.saver.on and not saved and step > self.steps.start and step % 2 == 0:
            self.saver.save(self.trainer, step, self.clock.elapsed)
        self.saver.wait()
        if self.trainer.runtime.world_size > 1:
            dist.barrier()  # when one rank is gone the launcher ends the others, in the midst of their writing
        raise Interrupted(self.interrupt.agreed, f"after {step} steps", self.saver.latest)

    def give_up(self, reason: str) -> NoReturn:
        """End the run for numbers that are not finite: raises SpeedrunError."""
        self.saver.wait()
        kept = f"The last finite state is {self.saver.latest}. " if self.saver.latest else ""
        raise SpeedrunError(f"{reason}: the run stops. {kept}Lower the learning rates. Log: {self.log.path}")


class Interrupt:
    """Takes SIGINT and SIGTERM, which the loop asks for after a step and between the rows of a validation.

    A second one ends the run at once; so does the first where there is nothing to save, `at_once`.
    """

    def __init__(self, runtime: Runtime, at_once: bool = False):
        self.signal = self.agreed = 0
        self._runtime, self._at_once = runtime, at_once

    def ask(self) -> int:
        """The signal that some rank was sent, 0 for none, kept in `agreed`. All ranks ask at the same places."""
        self.agreed = self.signal
        if self._runtime.world_size > 1:
            number = torch.tensor(self.signal, device=self._runtime.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.agreed = int(number)
        return self.agreed

    def __enter__(self) -> Interrupt:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # With several ranks an error ends the process: the launcher's SIGTERM must not come before its message.
        ends = kind is not None and self._runtime.world_size > 1
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler)

    def _take(self, number: int, _: object) -> None:
        if self._at_once:
            raise Interrupted(number, "in the warm-up")
        if not self.signal:
            self.signal, self._came = number, time.monotonic()
        elif time.monotonic() > self._came + 1:  # else a launcher only passes on what this rank was sent as well
            raise KeyboardInterrupt


class Interrupted(BaseException):  # which no `except Exception` of a compiler on the way takes
    """The run was ended by a signal, with all that it has done so far on disk."""

    def __init__(self, number: int, when: str, saved: Path | None = None):
        how = f"; go on with --resume {saved}" if saved else ", what the log holds so far is kept"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}{how}")
        self.code = 128 + number


def compilations() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def out_of_memory(error: torch.OutOfMemoryError, track: Track, runtime: Runtime) -> SpeedrunError:
    """What to do about it: lower the one number that trades memory for nothing but a little time."""
    longest = max(stage.tokens for stage in (*track.schedule.stages, track.schedule.extension))
    chunk = runtime.loss_chunk(longest // track.data.rows_per_step, track.model.training_vocab)
    return SpeedrunError(
        f"the GPU of process {runtime.rank} ran out of memory: {str(error).split('. ')[0]}. --loss-chunk (now {chunk}; "
        f"try {max(chunk // 4, 16)}) leaves more room with the same loss."
    )


def check_numbers(track: Track, options: Options, runtime: Runtime) -> None:
    """Refuse at once what cannot work: raises SpeedrunError for numbers that do not fit."""
    data, schedule, model, rows = track.data, track.schedule, track.model, track.data.rows_per_step
    world, short, final = runtime.world_size, schedule.extension.windows[0], schedule.final_long_window
    fp8, takes = 16 if runtime.fp8 else 1, "FP8 takes multiples of 16; see --fp8."
    stages = {f"--schedule.stages.{i}": stage for i, stage in enumerate(schedule.stages)}
    stages["--schedule.extension"] = schedule.extension
    refusals = [
        (options.save_every % 2, f"--save-every {options.save_every}: not even, and Adam steps every other step."),
        (data.bos >= model.vocab_size, f"--data.bos {data.bos}: the last token is {model.vocab_size - 1}."),
        (
            rows % world,
            f"{world} processes cannot share the {rows} rows of a step: change NPROC or --data.rows-per-step.",
        ),
        (short > final, f"--schedule.final-long-window {final}: shorter than the short window {short}."),
        (model.width % fp8, f"the width of the model is {model.width}: {takes}"),
        (model.padded_vocab % fp8, f"--model.vocab-multiple makes {model.padded_vocab} of the vocabulary: {takes}"),
        (model.sampled_vocab % fp8, f"--model.sampled-vocab {model.sampled_vocab}: {takes}"),
        (
            model.sampled_vocab > model.padded_vocab,
            f"--model.sampled-vocab {model.sampled_vocab}: the head has {model.padded_vocab} columns; 0 takes all.",
        ),
    ]
    for name, stage in stages.items():
        length, weights = stage.tokens // rows, stage.prediction_weights
        refusals += [
            (stage.tokens % rows, f"{name}.tokens {stage.tokens}: a step cannot be cut into {rows} equal rows."),
            (length % fp8, f"{name}.tokens {stage.tokens} are rows of {length}: {takes}"),
            (stage.windows[0] > stage.windows[1], f"{name}.windows {stage.windows}: expected the short one first."),
            (not weights or min(weights[0]) == 0, f"{name}.prediction-weights {weights}: the first must be above 0."),
            (len(weights) > length, f"{name}.prediction-weights: {len(weights)} tokens ahead in rows of {length}."),
        ]
    for wrong, said in refusals:
        if wrong:
            raise SpeedrunError(said)


def check_outputs(options: Options, runtime: Runtime) -> None:
    """Refuse at once what would fail after the last step: raises SpeedrunError. RunLog does the same for --log-dir."""
    if options.track_with and importlib.util.find_spec(options.track_with) is None:
        raise SpeedrunError(f"--track-with {options.track_with} needs a package: pip install {options.track_with}")
    saves = options.save_every or options.save_final
    exports = options.export and runtime.rank == 0
    for name, folder in (("checkpoint-dir", saves and options.checkpoint_dir), ("export", exports and options.export)):
        if folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise SpeedrunError(
                    f"--{name} {folder}: cannot be written ({error.strerror}); name another."
                ) from error


def conclude(trainer: Trainer, log: RunLog, options: Options, seconds: float, val_loss: float, stop: int) -> None:
    """The end of the log and the verdict on the terminal."""
    track, runtime = trainer.track, trainer.runtime
    total_steps = track.schedule.total_steps
    if stop < total_steps:
        log.write(f"incomplete run: stopped after {stop} of {total_steps} steps by --max-steps")
        verdict = f"incomplete, {stop} of {total_steps} steps"
    elif track.target_loss is None:
        verdict = "no target on other or repeated data; trained"
    else:
        verdict = f"{'reached' if val_loss <= track.target_loss else 'missed'} {track.target_loss}"
    if runtime.device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        allocated = reserved = peak_rss()
    mib = 1024 * 1024
    for name, shard in trainer.identities().items():
        log.write(f"data: {name} {shard}")
    log.write(f"peak memory allocated: {allocated // mib} MiB reserved: {reserved // mib} MiB")
    log.say(f"{verdict} in {seconds:.1f} s: validation loss {val_loss:.4f}\nlog: {log.path}")
    if runtime.rank == 0 and options.export:
        export(options.export, trainer.model, track, stop)
        log.say(f"exported to {options.export}: python evals/sample.py {options.export}")
    if runtime.rank == 0 and options.sample_tokens:
        # No tiktoken, no network for it, other tokens.
        with contextlib.suppress(ImportError, OSError, KeyError, ValueError):
            log.say(f"sample:\n{text_sample(trainer.model, track, stop, options.sample_tokens, options.seed)}\n")


def peak_rss() -> int:
    """Largest memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def export(folder: Path, model: GPT, track: Track, step: int) -> None:
    """Write model.safetensors (weights by name, banks without padding) and config.json (the track) into a folder."""
    with torch.device("meta"):
        whole = dict(GPT(track.model, Runtime(torch.device("meta"))).named_parameters())
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    tensors = {name: (t[: len(whole[name])] if t.dim() else t).contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "model.safetensors", folder / "config.json"
    parts = [path.with_name(path.name + ".part") for path in paths]
    safetensors.torch.save_file(tensors, parts[0])
    parts[1].write_text(json.dumps({"step": step, **flatten(track)}, indent=1))
    for part, path in zip(parts, paths, strict=True):
        publish(part, path)


@torch.no_grad()
def text_sample(model: GPT, track: Track, step: int, num_tokens: int, seed: int) -> str:
    """What a model says from nothing until it ends the document, a whole forward pass for each token.

    Raises ImportError or OSError where tiktoken or its vocabulary is missing, KeyError where a token is not in it.
    """
    bos, vocab_size, settings = track.data.bos, track.model.vocab_size, track.validation_at(step)
    decode = lambda tokens: bytes(tokens).decode(errors="replace")
    if vocab_size != 257:
        import tiktoken

        decode = tiktoken.get_encoding("gpt2").decode
    generator, tokens = torch.Generator().manual_seed(seed), [bos]
    while len(tokens) <= num_tokens:
        length = 64 << (len(tokens) // 64).bit_length()  # of few lengths; nothing sees the rest of the row
        padded = np.array(tokens + [bos] * (length + 1 - len(tokens)))
        row = make_row(padded, np.array([0]), length, track.model).to(model.runtime)
        last = model.stream(row, settings)[len(tokens) - 1]
        probabilities = softcapped(last @ model.head)[:vocab_size].double().softmax(0).cpu()
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if tokens[-1] == bos:
            break
    return decode([token for token in tokens if token != bos])


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


# Where the numbers of these fields lie: from, below, in words. Those of all others are at least 0.
RANGES = (
    (
        "num_layers num_heads head_dim qk_heads network_width dc_window ngram_rows gate_dim mlp_ratio",
        1,
        math.inf,
        "at least 1",
    ),
    ("rows_per_step rows_at_once val_tokens val_row_tokens epochs", 1, math.inf, "at least 1"),
    ("scheduled_steps tokens max_doc_len loss_chunk keep_checkpoints", 1, math.inf, "at least 1"),
    ("windows final_long_window", 1, 1 << 31, "from 1 to 2,147,483,647"),
    ("vocab_size vocab_multiple", 1, (1 << 16) + 1, "from 1 to 65,536: shards hold 16 bits per token"),
    ("ngrams", 1, 1025, "from 1 to 1,024"),
    ("seed", 0, 1 << 63, "from 0 to 2^63 - 1"),
    ("attn_scale eps", sys.float_info.min, math.inf, "above 0"),
    ("momentum muon_beta2 betas", 0, 1, "at least 0 and below 1"),
    ("cooldown", 0, math.nextafter(1, 2), "from 0 to 1"),
    ("ngram_weight mix_out", -math.inf, math.inf, "any number"),
)


def check_ranges(values: dict[str, object]) -> None:
    """Raise SpeedrunError for a number, of those by option, that is not finite or out of its range."""
    ranges = {field: some for fields, *some in RANGES for field in fields.split()}
    leaves = lambda value: [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else [value]
    for option, value in values.items():
        low, end, words = ranges.get(option.rpartition(".")[2], (0, math.inf, "at least 0"))
        numbers = [number for number in leaves(value) if isinstance(number, (int, float))]
        finite = all(abs(number) < math.inf for number in numbers)
        if not finite or not all(low <= number < end for number in numbers):
            words = words if finite else "a finite number"
            raise SpeedrunError(f"--{option.replace('_', '-')}: found {value}, expected {words}.")


def parse_command(
    argv: list[str], quiet: bool = False, change: Callable[[Track], Track] = lambda track: track
) -> tuple[Track, Options]:
    """`[TRACK] [--option value ...]`: the track, with its overridden numbers, and the options of the run.

    change: makes another track of the one named before its numbers are overridden.
    """
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("nano", argv)
    if name not in TRACKS:
        near = "".join(f" (did you mean {other}?)" for other in difflib.get_close_matches(name, TRACKS, 1))
        raise SpeedrunError(
            f"unknown track '{name}'{near}; there are: {', '.join(TRACKS)}. What is no run is in evals/."
        )

    @dataclass(frozen=True)
    class Command:
        options: Annotated[Options, tyro.conf.arg(name="")]
        track: Annotated[Track, tyro.conf.arg(name="")]

    track = change(TRACKS[name])
    if {"--help", "-h"} & set(rest):
        print("" if quiet else short_help(track), end="")
        sys.exit()
    command = tyro.cli(
        Command,
        args=["--help" if word == "--help-all" else word for word in rest],
        default=Command(Options(), track),
        prog=f"train_gpt.py {name}",
        description=f"Track {name}. Every number of it can be overridden.",
        console_outputs=not quiet,
        config=(tyro.conf.HelptextFromCommentsOff,),  # help is in docstrings; to look for comments costs 0.3 s
    )
    check_ranges(flatten(command.track) | flatten(command.options))
    return command.track, command.options


def spans(numbers: list[int]) -> str:
    """Ascending numbers as `0-3,5`."""
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def short_help(track: Track) -> str:
    """The options of a run, a line each, and the numbers of the track with their values."""
    spelled = lambda name: name.replace("_", "-")
    lines = [f"usage: train_gpt.py [{'|'.join(TRACKS)}] [--option value ...], here for {track.name}", ""]
    for item, docstring in itertools.pairwise(ast.parse(inspect.getsource(Options)).body[0].body):
        if isinstance(item, ast.AnnAssign):
            said = " ".join(docstring.value.value.split())
            lines.append(f"  --{spelled(item.target.id):17} {textwrap.shorten(said, 98, placeholder=' …')}")

    groups: dict[str, dict[str, list[str]]] = {}  # by their numbers, which have several values where I counts them
    for name, value in flatten(track).items():
        group, dot, number = spelled(name).rpartition(".")
        if not group.startswith("optimizer.rules") and name != "name":
            numbers = groups.setdefault(re.sub(r"\.\d+", ".I", f"--{group}{dot}"), {})
            numbers.setdefault(number, []).append(str(value).replace(", ", ","))
    rules, rule = ([spelled(item.name) for item in dataclasses.fields(kind)] for kind in (Rules, Rule))
    groups["--optimizer.rules.PARAMETER."] = {key: [] for key in rule} | {"PARAMETER is": rules}
    lines += [
        "",
        "Numbers of the track, options as well (--model.num-layers 4 --schedule.stages.0.lr 0.9 --no-model.smear):",
    ]
    said = lambda name, values: " ".join([name, *(values[:1] if len(set(values)) == 1 else values)])
    paragraphs = [f"{group} " + ", ".join(map(said, numbers, numbers.values())) for group, numbers in groups.items()]
    for network in track.model.networks:
        layers: dict[str, list[int]] = {}
        for output in network.outputs:
            layers.setdefault(f"{output.role} {output.source}".strip(), []).append(output.layer)
        roles = "; ".join(f"{role} {spans(some)}" for role, some in layers.items())
        paragraphs.append(f"coefficients {network.name}{' of ' + network.reads if network.reads else ''}: {roles}")
    for words in paragraphs:
        lines += textwrap.wrap(words, 132, initial_indent="  ", subsequent_indent=" " * 8, break_on_hyphens=False)
    lines += [
        "",
        "--help-all explains all of them. What is no run: evals/plan.py, sibling.py, sample.py and hellaswag.py,",
    ]
    return "\n".join([*lines, "records/check.py and plot.py, data/*.py.", ""])


def run(argv: list[str], change: Callable[[Track], Track] = lambda track: track) -> None:
    """Train as `parse_command` understands the words; errors that have a remedy become SpeedrunErrors."""
    track, options = parse_command(argv, launcher_ranks()[0] != 0, change)
    runtime = Runtime.create(options)
    try:
        train(track, options, runtime)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, track, runtime) from error
    except RuntimeError as error:  # a collective, if another rank has died
        if "can't allocate memory" in str(error):
            raise SpeedrunError("out of memory: the model is too large for this machine, see evals/plan.py.") from error
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise SpeedrunError(
            f"rank {runtime.rank} of {runtime.world_size} waited in vain for another: {str(error).splitlines()[0]}. "
            "The run ends; see --save-every and --resume."
        ) from error


def main(command: Callable[[list[str]], None] = run) -> None:
    """Run a command with the words of the command line; errors of the user end with one message and exit code 1."""
    sys.stdout.reconfigure(line_buffering=True)  # lines show at once where the output is piped
    rank, world_size = 0, 1
    # Most mistakes are met by all ranks: rank 0 speaks, and torchrun ends the others before their turn comes.
    let_rank_0_speak = lambda: time.sleep(5 if rank else 0)
    code = 0
    try:
        rank, world_size, _ = launcher_ranks()
        command(sys.argv[1:])
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as end:  # of --help or a wrong option
        let_rank_0_speak()
        code = end.code or 0
    except SpeedrunError as error:
        let_rank_0_speak()
        report_error(error)
        code = 1
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain about it at its end
        code = 141
    except Interrupted as end:
        if rank == 0:
            print(end, file=sys.stderr)
        code = end.code
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted: what the log holds so far is kept", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    # At once: threads would end their rows first, and the process group could wait for ranks that never come.
    if code and (world_size > 1 or code == 130):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
