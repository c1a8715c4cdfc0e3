"""Makes the golden numbers anew, with which tests compare train_gpt.py: `python tests/make_golden.py`.

golden_model.npz and golden_optimizer.npz hold inputs (weights, tokens, gradients), which stay, and what the naive
float64 formulas of reference.py make of them. Both came with the results of an implementation by other hands. Where the
reference makes other ones, they are named and nothing is written, unless `--moved` says that it was changed on purpose.
On one machine the same code writes the same bytes; on others the last digits may differ (sums in another order, another
exp), and how files are compressed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reference import (
    SMALL,
    TABLE,
    ReferenceOptimizer,
    forward,
    initial_frequencies,
    schedule,
    split_step,
    train_loss,
    val_loss,
    yarn,
)
from torch import Tensor

HERE = Path(__file__).parent
RTOL = 1e-11  # of the largest number of an array: gradients that nearly cancel are only as exact as their terms
LOGITS_ATOL = 2**-19  # they are stored in float32, below 23: one step of its spacing
Arrays = dict[str, np.ndarray]

# ---- the model ----

LAYOUT = replace(SMALL, head_dim=8)  # d = 48
CASES = 3  # stages, with YaRN steps between them
WHOLE = 2700  # gradients of no more numbers are kept as they are
NO_WEIGHTS = ("tokens", "targets", "cu_seqlens", "prefix", "bigram_rows", "sign_rows")  # hash_*: of another hash
CASE_INPUTS = ("windows", "prediction_weights", "prefix_weight")


def is_weight(name: str) -> bool:
    """Whether golden_model.npz has a weight under this name. The signs are fixed, but enter as weights do."""
    return name not in NO_WEIGHTS and not name.startswith(("case", "hash_"))


def model_results(data: dict[str, Tensor]) -> dict[str, object]:
    """What comes out of each stage N; `data`: the file.

    caseN_frequencies, _attn_scale; caseN_logits (T, V) after the soft-cap, in float32; caseN_loss_sum, the training
    loss with that of the prefixes; caseN_val_loss, the mean next-token loss; and the gradients of the training loss,
    caseN_grad_NAME, or of larger parameters, per leading index, the norm and the first 8 numbers: caseN_gradnorm_NAME
    and caseN_gradhead_NAME. (The first row of a table is that of token 0, which begins the documents.)
    """
    frequencies, attn_scale = initial_frequencies(LAYOUT.head_dim), 0.1
    bigram_rows = (data["bigram_rows"], data["sign_rows"])
    results: dict[str, object] = {}
    for case in range(CASES):
        short, long = data[f"case{case}_windows"].tolist()
        if case:
            frequencies, attn_scale = yarn(frequencies, attn_scale, data[f"case{case - 1}_windows"][1].item(), long)
        weights = {name: value.double().requires_grad_() for name, value in data.items() if is_weight(name)}
        weights["bigram_sign"].requires_grad_(False)
        arguments = (data["tokens"], data["cu_seqlens"], (short, long), frequencies, attn_scale)
        logits = forward(weights, LAYOUT, *arguments, bigram_rows=bigram_rows)
        prediction_weights, prefix_weight = (data[f"case{case}_{name}"] for name in CASE_INPUTS[1:])
        loss = train_loss(logits, data["targets"], prediction_weights, data["prefix"], prefix_weight)
        loss.backward()
        found = {
            "frequencies": frequencies,
            "attn_scale": np.float64(attn_scale),
            "logits": logits.detach().float(),
            "loss_sum": loss.detach(),
            "val_loss": val_loss(logits, data["targets"]).detach(),
        }
        for name, weight in weights.items():
            if not weight.requires_grad:
                continue
            if weight.numel() <= WHOLE:
                found[f"grad_{name}"] = weight.grad
            else:
                rows = weight.grad.flatten(1)
                found |= {f"gradnorm_{name}": rows.norm(dim=1), f"gradhead_{name}": rows[:, :8]}
        results |= {f"case{case}_{name}": value for name, value in found.items()}
    return results


# ---- the optimizer ----

STEPS = 12  # 9 scheduled ones and an extension of 3
AFTER = (0, 1, 7, STEPS - 1)  # the steps after which the parameters are kept; embed leaves the head after the 7th
SCHEDULED, EXTENSION = 1270, 15  # of the schedule that is kept whole


def optimizer_results(data: dict[str, Tensor]) -> dict[str, object]:
    """What comes out of the 12 steps, and the schedule; `data`: the file.

    afterT_NAME: the parameters after the steps T of AFTER, with Polar Express in float64; lr, split_step: of the steps;
    schedule_NAME: that of `small`, (steps + 1, ...), the last entry being that of the final validation.
    """
    names = [name.removeprefix("start_") for name in data if name.startswith("start_")]
    optimizer = ReferenceOptimizer({name: data[f"start_{name}"] for name in names}, TABLE)
    at = [schedule(step, 9, 3) for step in range(STEPS)]
    results: dict[str, object] = {"lr": [s["lr"] for s in at], "split_step": split_step(9)}
    for step in range(STEPS):
        gradients = {name: data[f"grad{step}_{name}"] for name in names}
        optimizer.step(gradients, step, at[step]["lr"], data["momentum"][step].item(), split_step(9))
        if step in AFTER:
            results |= {f"after{step}_{name}": p.clone() for name, p in optimizer.params.items()}

    at = [schedule(step, SCHEDULED, EXTENSION) for step in range(SCHEDULED + EXTENSION + 1)]
    for name in ("lr", "momentum", "prefix_weight"):
        results[f"schedule_{name}"] = [s[name] for s in at]
    results["schedule_prediction_weights"] = [(*s["prediction_weights"], 0, 0)[:3] for s in at]
    results["schedule_stage"] = np.array([s["stage"] for s in at], np.int8)
    return results | {"schedule_split_step": split_step(SCHEDULED)}


# ---- the files ----

FILES = {"golden_model.npz": model_results, "golden_optimizer.npz": optimizer_results}


def load(name: str) -> Arrays:
    with np.load(HERE / name) as file:
        return {key: file[key] for key in file.files}


def made_anew(name: str, kept: Arrays) -> Arrays:
    """The file with its results made by reference.py, in the order in which it has them."""
    results = FILES[name]({key: torch.from_numpy(np.asarray(value)) for key, value in kept.items()})
    return kept | {key: np.asarray(value) for key, value in results.items()}


def differences(kept: Arrays, made: Arrays) -> list[str]:
    """A line for each array that the reference makes otherwise than it is kept."""
    lines = [f"{key}: not kept" for key in made if key not in kept]
    for key, expected in kept.items():
        found = made[key]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            lines.append(f"{key}: {found.dtype} {found.shape} instead of {expected.dtype} {expected.shape}")
            continue
        size, off = np.abs(expected, dtype=float).max(), np.abs(found - expected, dtype=float).max()
        if not off <= (LOGITS_ATOL if key.endswith("_logits") else RTOL * size):
            lines.append(f"{key}: off by {off:.3g} where the largest number is {size:.3g}")
    return lines


def main() -> None:
    torch.set_num_threads(1)  # sums are then always in the same order
    made = {}
    for name in FILES:
        kept = load(name)
        made[name] = made_anew(name, kept)
        if (lines := differences(kept, made[name])) and sys.argv[1:] != ["--moved"]:
            sys.exit("\n  ".join([f"{name}: the reference makes other numbers; if it should, say --moved.", *lines]))
    for name, arrays in made.items():
        np.savez_compressed(HERE / name, **arrays)
        print(f"{HERE / name}: {(HERE / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
