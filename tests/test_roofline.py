"""tests/benchmarks/roofline.py: FLOPs, bytes and parts of a made-up trace, and the tiles of attention."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train_gpt import SMALL, Row

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import roofline

TRACE = [
    "mark\tbegin loop 0",
    "mark\tbegin step 0",
    "triton\ttriton_poi_fused_fp8_head\t1\t1\t0\t0",
    "mark\tbegin forward",
    "mark\tlaunch 3000000000",
    "triton\ttriton_poi_fused_mul\t1\t1\t0\t0",
    "gemm\tGemmEx\tTN\t1536,49152,768\t1\t14,14,14",
    "mark\tlaunch 1000 49152x768/2 3072x768/2 49152x3072/2",
    "triton\t_linear_relu_square\t1\t1\t0\t0",
    "mark\tlaunch 1000 49152x768/1 3072x768/1 49152x3072/2 /4",
    "triton\t_linear_relu_square\t1\t1\t0\t0",
    "kernel\t_ZN13pytorch_flash16flash_fwd_kernelI23Flash\t1,1,1\t1,1,1\t0\t0",
    "gemm\tltmatmul\tTN\t50304,49152,768\t1\t28,28,14",
    "mark\tlaunch 500",
    "triton\t_cross_entropy\t1\t1\t0\t0",
    "mark\tend forward",
    "mark\tbegin backward",
    "gemm\tGemmEx\tNN\t64,49152,768\t1\t14,14,14",
    "gemm\tGemmEx\tNN\t128,64,128\t768\t14,14,14",
    "memcpy\tDtoD\t1000",
    "memcpy\tHtoD\t1000",
    "mark\tend backward",
    "mark\tbegin optimizer",
    "mark\tlaunch 64 10x768x3072/2 10x768x768/2",
    "triton\t_symmetric\t1\t1\t0\t0",
    "mark\tend optimizer",
    "mark\tend step 0",
    "triton\tafter_the_step\t1\t1\t0\t0",
]


def test_a_trace_is_sorted_into_parts():
    steps = roofline.null.timed([line.split("\t") for line in TRACE])
    kernels = roofline.Reader(SMALL.model, {"forward": 5.0, "backward": 7.0}).read(steps["step 0"])
    found = {key: (kernel.launches, kernel.flops, kernel.bytes, kernel.rate) for key, kernel in kernels.items()}
    assert found == {
        ("elementwise, rest", "triton_poi_fused_fp8_head"): (1, 0, 0, "bf16"),
        ("elementwise, forward", "triton_poi_fused_mul"): (1, 0, 3e9, "bf16"),
        ("attention's projections", "matmul 1536,49152,768"): (
            1,
            2 * 1536 * 49152 * 768,
            2 * (1536 * 768 + 49152 * 768 + 1536 * 49152),
            "bf16",
        ),
        ("MLP", "_linear_relu_square"): (1, 2 * 49152 * 768 * 3072, 1000, "bf16"),
        ("MLP", "_linear_relu_square FP8"): (1, 2 * 49152 * 768 * 3072, 1000, "fp8"),
        ("attention", "flash_fwd_kernel"): (1, 5, 0, "attention"),
        ("head", "matmul 50304,49152,768 FP8"): (
            1,
            2 * 50304 * 49152 * 768,
            50304 * 768 + 49152 * 768 + 2 * 50304 * 49152,
            "fp8",
        ),
        ("head", "_cross_entropy"): (1, 0, 500, "bf16"),
        ("networks and gates", "matmul 64,49152,768"): (
            1,
            2 * 64 * 49152 * 768,
            2 * (64 * 768 + 49152 * 768 + 64 * 49152),
            "bf16",
        ),
        ("attention", "matmul 128,64,128 x 768"): (
            1,
            2 * 768 * 128 * 64 * 128,
            2 * 768 * (128 * 128 + 64 * 128 + 128 * 64),
            "bf16",
        ),
        ("elementwise, backward", "DtoD"): (1, 0, 2000, "bf16"),
        ("optimizer", "_symmetric"): (1, 10 * 768 * 768 * 3072, 64, "bf16"),
    }


def test_a_kernel_takes_what_limits_it():
    kernel = roofline.Kernel("MLP", "product", "bf16", 1, flops=800e12, bytes=1.5e12)
    h100 = roofline.GPUS["H100"]
    assert h100.seconds(kernel, 0.5) == pytest.approx(1.0)
    assert h100.seconds(replace(kernel, rate="fp8"), 0.5) == pytest.approx(800 / 1500)
    assert h100.seconds(replace(kernel, rate="attention"), 0.5) == pytest.approx(2.0)
    assert h100.seconds(replace(kernel, bytes=6e12), 0.5) == pytest.approx(2.0)


@pytest.mark.parametrize("window", [1, 63, 64, 200, 10_000])
def test_tiles_of_attention(window):
    """Against the mask itself, tile by tile."""
    lengths, total = np.array([1, 64, 128, 129, 500]), 0
    for length in lengths:
        i, j = np.ogrid[:length, :length]
        mask = (j <= i) & (j >= i - window)
        for a in range(0, length, 128):
            for b in range(0, length, 64):
                total += 128 * 64 * mask[a : a + 128, b : b + 64].any()
    assert roofline.tiles_seen(lengths, window) == total


def test_attention_of_a_step():
    """One document in a row: paired layers have half the heads and twice the positions."""
    import torch

    cu_seqlens = torch.tensor([0, 512, 512], dtype=torch.int32)
    row = Row(None, None, cu_seqlens, 512, None, None)
    track = replace(SMALL, model=replace(SMALL.model, num_layers=2, paired_layers=(1,), without_attention=()))
    settings = replace(track.at(0), windows=(10_000, 10_000))
    causal = lambda n: sum(128 * 64 * (2 * i + 2) for i in range(n // 128))
    pairs = causal(512) * 6 + causal(1024) * 3
    assert roofline.attention_flops(track, settings, [row]) == {"forward": 512.0 * pairs, "backward": 1280.0 * pairs}


def test_a_timeline_by_hand():
    """The link is busy until 5; the second update waits for the first, its gather for the first's."""
    some = [roofline.Parameter("a", 2, 4, 3), roofline.Parameter("b", 3, 1, 2), roofline.Parameter("c", 0, 0, 0)]
    rows, end = roofline.timeline(some)
    assert rows == [("a", 2, 6, 9), ("b", 5, 7, 11), ("c", 5, 7, 11)] and end == 11


def test_what_8_gpus_send_after_the_backward_pass():
    """At an odd, tied step: bfloat16 of all but the mirror; of n-grams only the rows that the step's tokens touch."""
    some = {each.name: each for each in roofline.parameters(SMALL, 1, update=1.0)}
    even = {each.name for each in roofline.parameters(SMALL, 0, update=1.0)}
    assert even == {"qk_bank", "vo_bank", "mlp_bank"} and "embed" not in some
    assert some["head"].sum == pytest.approx(2 * 768 * 50304 * 7 / 8 / 450e9) == some["head"].gather
    rows = SMALL.schedule.stages[0].tokens
    assert some["ngram_embed"].sum == pytest.approx(2 * 768 * rows * 7 / 8 / 450e9)
    assert some["ngram_embed"].gather > 2 * some["ngram_embed"].sum
    assert some["sa_lambda"].gather == 0 and some["sa_lambda"].sum > 0
    assert sum(each.update for each in some.values()) == pytest.approx(1 / 8, rel=0.01)
