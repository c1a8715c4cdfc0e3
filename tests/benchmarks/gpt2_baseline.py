"""The GPT-2 that `nano` is measured against: nanoGPT's CPU recipe on the same shards, validation bytes and clock.

    python tests/benchmarks/gpt2_baseline.py [--seed S] [--steps N] [--lr X] …        (--help lists every number)

GPT-2 (Radford et al. 2019) with learned positions, LayerNorm, GELU and a tied head, in torch's own modules; AdamW,
warm-up, cosine, gradient clipping, random crops of the training stream. Shards, validation, clock and log are those of
`train_gpt.py`, so that `records/` reads both alike; the log starts with the text of both files.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # instead of this folder, whose profile.py would stand in for Python's own
import train_gpt  # noqa: E402


@dataclass(frozen=True)
class Recipe:
    """The numbers of nanoGPT's recipe for bytes on a CPU; steps and lr are those that reach the target soonest."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    """Tokens that the model can see: rows in training, and at most so many in validation."""
    batch: int = 12
    """Rows of a step."""
    steps: int = 5000
    lr: float = 4e-3
    """Peak learning rate of AdamW, after the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup: int = 100
    """Steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    """Of matrices and embeddings."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together."""
    val_stride: int | None = None
    """Validation windows of `context` tokens start every so many tokens, and each scores those that the one before it
    has not: smaller means more context per prediction. Default: half the context."""
    val_every: int = 0
    """Steps between validations; 0: only at the end."""
    compile: bool = False
    """torch.compile, outside the clock."""
    seed: int = 0
    """Of the weights and of the crops."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations (autocast)."""
    data_dir: Path = REPO / "data" / "nano"
    log_dir: Path = Path("logs")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine from lr to min_lr over the remaining steps."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (self.lr - self.min_lr)


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.mlp_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.attn_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc, self.mlp_out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        q, k, v = self.qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.fc(self.mlp_norm(x))))


class GPT2(nn.Module):
    """GPT-2 over bytes. Initialized as GPT-2: normal with std 0.02, outputs of blocks smaller by (2 L)^-1/2."""

    def __init__(self, recipe: Recipe, vocab_size: int):
        super().__init__()
        self.context, self.stride = recipe.context, recipe.val_stride or recipe.context // 2
        self.tokens, self.positions = nn.Embedding(vocab_size, recipe.width), nn.Embedding(recipe.context, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe.width, recipe.heads) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * recipe.layers) if "_out" in name else 0.02)

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each position. inputs, targets, and the result: (B, T) with T at most the context."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)

    def forward(self, row: train_gpt.Row, settings: object, weights: object) -> tuple[Tensor, Tensor]:
        """Loss of a validation row, summed over all its tokens, as `Trainer.validate` wants it: twice.

        Every token is predicted once, from those before it in its window.
        """
        inputs, targets = (x.unfold(0, self.context, self.stride) for x in (row.inputs, row.targets))
        if (len(row.inputs) - self.context) % self.stride:
            raise train_gpt.SpeedrunError(
                f"--val-stride {self.stride} does not tile a row of {len(row.inputs)} tokens."
            )
        windows = [self.losses(*pair) for pair in zip(inputs.split(16), targets.split(16), strict=True)]
        losses = torch.cat(windows)
        total = losses[0].sum() + losses[1:, self.context - self.stride :].sum()
        return total, total


class Baseline(train_gpt.Trainer):
    """A run of the baseline. Validation is inherited."""

    def __init__(self, recipe: Recipe, runtime: train_gpt.Runtime):
        self.recipe, self.track, self.runtime = recipe, train_gpt.NANO, runtime
        torch.manual_seed(recipe.seed)
        self.model = GPT2(recipe, self.track.model.vocab_size)
        self.losses = torch.compile(self.model.losses) if recipe.compile else self.model.losses
        shard = train_gpt.find_shards(recipe.data_dir, "train", self.track.data)[0]
        self.stream = np.memmap(shard, "<u2", "r", 4 * train_gpt.HEADER_INTS, train_gpt.read_shard_header(shard))
        self.validation_tokens, identities = train_gpt.validation_tokens(self.track, recipe.data_dir)
        self.identities = {shard.name: train_gpt.shard_identity(shard), **identities}
        self.reset()

    def reset(self) -> None:
        """A fresh optimizer and the first crop: with the weights, all that training changes."""
        decayed = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.recipe.lr, betas=self.recipe.betas, weight_decay=self.recipe.weight_decay, fused=True
        )
        self.crops = np.random.default_rng(self.recipe.seed)

    def warm_up(self) -> None:
        """Two steps, undone."""
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        for step in range(2):
            self.train_step(step)
        self.model.load_state_dict(weights)
        self.reset()

    def train_step(self, step: int) -> Tensor:
        """One step; returns its loss."""
        recipe = self.recipe
        starts = self.crops.integers(0, len(self.stream) - recipe.context, recipe.batch)
        rows = torch.from_numpy(np.stack([self.stream[i : i + recipe.context + 1] for i in starts]).astype(np.int64))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            loss = self.losses(rows[:, :-1], rows[:, 1:]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def train(recipe: Recipe) -> float:
    """Warm up, train, validate, log: as `train_gpt.train`, without its stages. Returns the final validation loss."""
    runtime = train_gpt.Runtime.create(train_gpt.Options(device="cpu", dtype="float32"))
    baseline, track = Baseline(recipe, runtime), train_gpt.NANO
    source = "\n".join(Path(path).read_text(encoding="utf-8") for path in (train_gpt.__file__, __file__))
    settings = {
        "name": track.name,
        "target_loss": track.target_loss,
        "coordinate_descent_tuning": track.coordinate_descent_tuning,  # records/check.py wants it off
        **train_gpt.flatten(track.data, "data"),
        "schedule.scheduled_steps": recipe.steps,
        "schedule.extension_steps": 0,
        "schedule.stages.0.tokens": recipe.batch * recipe.context,
        **train_gpt.flatten(recipe, "baseline"),
        "seed": recipe.seed,
    }
    log = train_gpt.RunLog(track.name, recipe.steps, source, settings, recipe.log_dir, runtime)
    parameters = sum(p.numel() for p in baseline.model.parameters())
    tqdm.write(f"GPT-2 baseline on {track.name}: {parameters:,} parameters. log: {log.path}")
    baseline.warm_up()
    clock = train_gpt.Clock(runtime)
    with tqdm(total=recipe.steps, unit="step") as bar:
        clock.start()
        for step in range(recipe.steps + 1):
            if step == recipe.steps or (recipe.val_every and step % recipe.val_every == 0):
                clock.stop()
                val_loss = baseline.validate(None)
                tqdm.write(log.step(step, clock.elapsed, val_loss=val_loss))
                if not math.isfinite(val_loss):
                    raise train_gpt.SpeedrunError(f"the validation loss is {val_loss} after {step} steps.")
                if step == recipe.steps:
                    break
                clock.start()
            loss = baseline.train_step(step)
            log.step(step + 1, clock.read())
            bar.update()
            if (step + 1) % 100 == 0:
                log.step(step + 1, clock.read(), train_loss=loss.item())
                bar.set_postfix_str(f"loss {loss.item():.4f}")
    for name, identity in sorted(baseline.identities.items()):
        log.write(f"data: {name} {identity}")
    log.write(f"peak memory allocated: {(peak := train_gpt.peak_rss() >> 20)} MiB reserved: {peak} MiB")
    log.close()
    return val_loss


if __name__ == "__main__":
    try:
        train(tyro.cli(Recipe, description=__doc__.splitlines()[0]))
    except train_gpt.SpeedrunError as error:
        sys.exit(f"error: {error}")
