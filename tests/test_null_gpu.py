"""The CUDA path without a GPU (tests/null_gpu/run.py), and that what looks for its faults finds them."""

from pathlib import Path

import pytest
from null_gpu import run as null_gpu

LACKING = null_gpu.missing()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    if LACKING:
        pytest.skip(f"the null device needs {LACKING}")
    return tmp_path_factory.mktemp("null_gpu")


@pytest.mark.null_gpu
@pytest.mark.slow
def test_all_stages_on_an_h100(work):
    """Catches all that run.py lists, and a kernel, a gigabyte or a block of attention more than the budget allows."""
    case = null_gpu.Case("whole", work).run()
    print(case.describe(verbose=False))
    assert case.problems() == []
    assert case.differences() == []


@pytest.mark.null_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in null_gpu.CASES if name != "whole"])
def test_other_gpus_and_two_ranks(work, name):
    """Catches a kernel that does not fit into the shared memory of another GPU, a rank that compiles something else."""
    case = null_gpu.Case(name, work, "whole" if name == "ranks_2" else None).run()
    print(case.describe(verbose=False))
    assert case.problems() == []


TRACE = """
kernel	warm_up	1,1,1	1,1,1	0	0
sync	cudaStreamSynchronize
loaded	triton_red_fused_1	255	136
loaded	triton_red_fused_1	255	24
loaded	_ours	255	16
triton	triton_red_fused_1	9,1,1	256,1,1	0	24
mark	begin loop 0
mark	begin validation 0
sync	cudaMemcpy DtoH	4
mark	end validation 0
mark	begin step 0
kernel	flash_fwd_kernel	64,94,6	128,1,1	0	0
kernel	vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EE	2,1,1	128,1,1	0	1000
kernel	elementwise_kernelIN3c108BFloat16EE	2,1,1	128,1,1	0	1000	INVALID
triton	_ours	132,1,1	256,1,1	0	16
triton	triton_red_fused_1	9,1,1	256,1,1	0	0
memcpy	HtoD	64
memcpy	HtoD pageable	64
memset		872
gemm	ltmatmul	TN	1,1,1	1	14,14,14
loaded	triton_red_fused_2	64	0
mark	end step 0
nccl	all_reduce	4	7
"""


def test_what_a_trace_shows():
    """Catches a fault that is overlooked: a made-up trace has one of each kind. Warm-up and validation may wait; a
    variant of a kernel that is compiled but never launched may spill."""
    trace = [line.split("\t") for line in TRACE.strip().splitlines()]
    assert null_gpu.trace_problems(trace, 90) == [
        "CUDA would refuse, 1 times: kernel elementwise_kernelIN3c108BFloat16EE 2,1,1",
        "kernel _ours spills: 16 bytes of stack",
        "kernel triton_red_fused_1 spills: 24 bytes of stack",
        "step 0 waits for the device, 1 times: HtoD pageable",
        "step 0 loads the kernel triton_red_fused_2",
    ]
    spills = {arch: sum("spills" in line for line in null_gpu.trace_problems(trace, arch)) for arch in (80, 90, 120)}
    assert spills == {80: 1, 90: 2, 120: 0}
    assert null_gpu.count(null_gpu.timed(trace)["step 0"]) == {
        "kernels of Inductor": 1,
        "kernels of the trainer": 1,
        "kernels of libraries": 3,
        "matrix products": 1,
        "copies and fills": 3,
        "collectives": 0,
        "waits": 1,
        "million blocks of attention": 0.036,
        "GB copied or filled": 0.0,
        "GB in elementwise kernels of libraries": 0.0,
    }
    add, copy = (line for line in trace if "elementwise" in line[1])
    assert null_gpu.elementwise_bytes(add) == 3 * 4 * 1000
    assert null_gpu.elementwise_bytes(copy) == 2 * 2 * 1000


def test_the_budget_may_neither_grow_nor_stay_behind():
    """Catches a comparison that only looks one way: what has been won must be written down, or is lost unseen."""
    budget = {"step 0": {"kernels": 1000, "waits": 0}}
    differ = lambda **numbers: null_gpu.compare({"step 0": budget["step 0"] | numbers}, budget)
    assert differ() == differ(kernels=1019) == differ(kernels=981) == []
    assert differ(kernels=1021) == ["step 0: 1,021 kernels, more than the budget's 1,000"]
    assert differ(kernels=979) == [
        "step 0: 979 kernels, less (run.py --write-budget takes it over) than the budget's 1,000"
    ]
    assert differ(waits=1) == ["step 0: 1 waits, more than the budget's 0"]
    assert null_gpu.compare({}, budget) == ["the budget has ['step 0'], the run []"]
