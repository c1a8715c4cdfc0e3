"""Makes the golden numbers, with which tests compare train_gpt.py: `python tests/make_golden.py`.

They are what the naive float64 formulas of reference.py make of the weights, tokens and gradients that are made here.
After a change of reference.py make them again; test_reference.py fails until then.

On one machine the same code writes the same bytes. On others what goes in is the same too, as the numbers of
RandomState are those of its seed for good; what comes out may differ in the last digits of float64 (sums in another
order, another exp), and the files in how they are compressed.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reference import (
    SMALL,
    TABLE,
    Layout,
    ReferenceOptimizer,
    forward,
    initial_frequencies,
    train_loss,
    val_loss,
    yarn,
)
from torch import Tensor

HERE = Path(__file__).parent
Arrays = dict[str, np.ndarray]

# ---- the model ----

LAYOUT = replace(SMALL, num_heads=4, head_dim=8)  # with fewer heads, h with h + H/2 would be paired as 2j with 2j + 1
VOCAB, TOKENS = 128, 96
STARTS = (0, 1, 18, 23)  # of documents; the last one is longer than all windows but one
WINDOWS = ((8, 24), (24, 56), (40, 88))  # of three stages, short and long, in tokens
PREDICTION_WEIGHTS = ((1.0, 0.5, 0.2), (1.0, 0.25), (1.0,))
WHOLE = 500  # gradients of no more numbers are kept as they are


def grid(random: np.random.RandomState, shape: tuple[int, ...], spacing: float, most: int = 4) -> np.ndarray:
    """Multiples of the spacing, a power of two, up to `most` times it: exact in bfloat16, and compressed to little."""
    return (spacing * random.randint(-most, most + 1, shape)).astype(np.float32)


def model_inputs() -> Arrays:
    """One row of tokens and the weights of LAYOUT, named as in reference.forward: no zero switches anything off."""
    random = np.random.RandomState(7)  # one with which no λ's gradient cancels to nearly nothing
    layers, heads, d, gate = LAYOUT.num_layers, LAYOUT.num_heads, LAYOUT.num_heads * LAYOUT.head_dim, LAYOUT.gate_width
    attention_layers = layers - len(LAYOUT.no_attention)
    tokens = random.randint(1, VOCAB, TOKENS + 1)
    tokens[list(STARTS)] = 0
    return {
        "tokens": tokens[:-1].astype(np.int32),  # (T,)
        "targets": tokens[1:].astype(np.int64),  # (T,)
        "cu_seqlens": np.array([*STARTS, *[TOKENS] * 4], np.int32),  # (8,) padded with T
        "embed": grid(random, (VOCAB, d), 1 / 8),
        "head": grid(random, (d, VOCAB), 1 / 8),
        "attn_bank": grid(random, (4 * attention_layers, d, d), 1 / 16),
        "mlp_bank": grid(random, (2 * layers, 4 * d, d), 1 / 16),
        "value_embeds": grid(random, (len(set(LAYOUT.value_embed.values())), VOCAB, d), 1 / 8),
        "attn_gates": grid(random, (attention_layers, heads, gate), 1 / 4),
        "value_gates": grid(random, (len(LAYOUT.value_embed), heads, gate), 1 / 4),
        "smear_gate": grid(random, (gate,), 1 / 4),
        "skip_gate": grid(random, (gate,), 1 / 4),
        "resid_lambda": 1.125 + grid(random, (layers,), 1 / 32),
        "sa_lambda": np.float32([0.5, 1.0]) + grid(random, (layers, 2), 1 / 16),
        "x0_lambda": 1 / 16 + grid(random, (layers,), 1 / 8),
        "smear_lambda": np.float32(0.3125),
        "skip_lambda": np.float32(-1.25),
        "backout_lambda": np.float32(0.375),
    }


def model_results(inputs: Arrays, layout: Layout, windows: tuple, prediction_weights: tuple) -> Arrays:
    """For each stage N, with a YaRN step from the one before: what it is run with, and what comes out.

    caseN_windows, _prediction_weights, _frequencies, _attn_scale; caseN_logits (T, V) after the soft-cap, in float32;
    caseN_loss_sum, the training loss; caseN_val_loss, the mean next-token loss; and the gradients of the training loss,
    caseN_grad_NAME, or of larger parameters, per leading index, the norm and the first 8 numbers: caseN_gradnorm_NAME
    and caseN_gradhead_NAME. (The first row of a table is that of token 0, which begins the documents.)
    """
    data = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    tokens, targets, cu_seqlens = (data.pop(name) for name in ("tokens", "targets", "cu_seqlens"))
    frequencies, attn_scale = initial_frequencies(layout.head_dim), 0.1
    results: dict[str, object] = {}
    for case, (short, long) in enumerate(windows):
        if case:
            frequencies, attn_scale = yarn(frequencies, attn_scale, windows[case - 1][1], long)
        weights = {name: weight.double().requires_grad_() for name, weight in data.items()}
        logits = forward(weights, layout, tokens, cu_seqlens, (short, long), frequencies, attn_scale)
        loss = train_loss(logits, targets, prediction_weights[case])
        loss.backward()
        found = {
            "windows": np.array((short, long)),
            "prediction_weights": np.array(prediction_weights[case]),
            "frequencies": frequencies,
            "attn_scale": np.float64(attn_scale),
            "logits": logits.detach().float(),
            "loss_sum": loss.detach(),
            "val_loss": val_loss(logits, targets).detach(),
        }
        for name, weight in weights.items():
            if weight.numel() <= WHOLE:
                found[f"grad_{name}"] = weight.grad
            else:
                rows = weight.grad.flatten(1)
                found |= {f"gradnorm_{name}": rows.norm(dim=1), f"gradhead_{name}": rows[:, :8]}
        results |= {f"case{case}_{name}": value for name, value in found.items()}
    return {name: np.asarray(value) for name, value in results.items()}


def model_numbers() -> Arrays:
    """All of golden_model.npz."""
    inputs = model_inputs()
    return inputs | model_results(inputs, LAYOUT, WINDOWS, PREDICTION_WEIGHTS)


# ---- the optimizer ----

STEPS, SCHEDULED = 12, 9
SPLIT_STEP = 7  # the last one with embed tied to the head
AFTER = (0, 1, SPLIT_STEP, STEPS - 1)  # the steps after which the parameters are kept
SHAPES = {
    "attn_bank": (8, 8, 8),
    "mlp_bank": (4, 32, 8),  # fc, proj, fc, proj
    "scalars": (9,),  # all λ but x0_lambda: they share a rule
    "x0_lambda": (3,),
    "smear_gate": (12,),
    "skip_gate": (12,),
    "attn_gates": (2, 2, 12),
    "value_gates": (1, 2, 12),
    "value_embeds": (2, 16, 8),
    "head": (8, 16),
    "embed": (16, 8),
}


def lr_factor(step: int) -> float:
    """The schedule of `small` in 9 + 3 steps: 1, 1.52, 1.73, from half of the 9 on linearly to 0.1, which stays."""
    if step >= SCHEDULED:
        return 0.1
    cooled = max(0.0, step / SCHEDULED - 0.5) / 0.5
    return (1.0, 1.52, 1.73)[3 * step // SCHEDULED] * (1 - cooled) + 0.1 * cooled


def momentum(step: int) -> float:
    """It rises from 0.85 to 0.95 over 6 steps and falls back over the last 3."""
    return 0.85 + 0.1 * min(step / 6, 1, (STEPS - step) / 3)


def optimizer_inputs() -> Arrays:
    """start_NAME, the parameters, and gradT_NAME: what the backward pass of step T adds to a parameter's gradient.

    The largest number of a gradient is 0.16 to 20, differently in each step and for each parameter. The fourth row of
    the value embeddings never gets one, as that of a token that does not occur.
    """
    random = np.random.RandomState(2)
    inputs = {
        "lr": np.array([lr_factor(step) for step in range(STEPS)]),
        "momentum": np.array([momentum(step) for step in range(STEPS)]),
        "split_step": np.int64(SPLIT_STEP),
    }
    for name, shape in SHAPES.items():
        inputs[f"start_{name}"] = grid(random, shape, 1 / 128, most=40)
        for step in range(STEPS):
            inputs[f"grad{step}_{name}"] = grid(random, shape, 2.0 ** random.randint(-8, 0), most=40)
            if name == "value_embeds":
                inputs[f"grad{step}_{name}"][:, 3] = 0
    inputs["start_embed"] = inputs["start_head"].T.copy()
    return inputs


def optimizer_results(inputs: Arrays) -> Arrays:
    """afterT_NAME: the parameters after the steps T of AFTER, with Polar Express in float64."""
    data = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    names = [name.removeprefix("start_") for name in data if name.startswith("start_")]
    optimizer = ReferenceOptimizer({name: data[f"start_{name}"] for name in names}, TABLE)
    results: dict[str, Tensor] = {}
    for step in range(STEPS):
        gradients = {name: data[f"grad{step}_{name}"] for name in names}
        lr, momentum = data["lr"][step].item(), data["momentum"][step].item()
        optimizer.step(gradients, step, lr, momentum, int(data["split_step"]))
        if step in AFTER:
            results |= {f"after{step}_{name}": p.clone() for name, p in optimizer.params.items()}
    return {name: value.numpy() for name, value in results.items()}


def optimizer_numbers() -> Arrays:
    """All of golden_optimizer.npz."""
    inputs = optimizer_inputs()
    return inputs | optimizer_results(inputs)


FILES = {"golden_model.npz": model_numbers, "golden_optimizer.npz": optimizer_numbers}


def main() -> None:
    torch.set_num_threads(1)  # sums are then always in the same order
    for name, make in FILES.items():
        np.savez_compressed(HERE / name, **make())
        print(f"{HERE / name}: {(HERE / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
