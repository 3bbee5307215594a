"""Each op against the same step of the published pipeline; head and loss in one also against the two ops."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import mae_kernels
from benchmarks.measure import DEVICE, OURS, REFERENCE, as_double, assert_accurate, clock, rotated
from benchmarks.work import CASES
from mae_kernels import use_backend

pytestmark = pytest.mark.benchmark(timer=clock)


ROWS = [
    (case, stage)
    for case in CASES
    for stage in ("forward", "forward+backward")
    if case not in ("random_resized_crop", "random_masking") or stage == "forward"
]


@pytest.mark.parametrize("backend", [REFERENCE, *OURS])
@pytest.mark.parametrize(("case", "stage"), ROWS)
def test_op(race, op_shape, case, stage, backend):
    work = CASES[case](op_shape)
    backward = stage == "forward+backward"

    def make():
        arguments = work.arguments(DEVICE)
        if not backward:
            return arguments
        with torch.no_grad():
            return {**arguments, "grad": torch.randn_like(work.reference(**arguments))}

    def run(name, *, grad=None, **arguments):
        with nullcontext() if name == REFERENCE else use_backend(name):
            op = work.reference if name == REFERENCE else getattr(mae_kernels, work.op)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=work.compute == torch.bfloat16):
                out = op(**arguments)
            outputs = {"the result": out} if isinstance(out, Tensor) else out._asdict()
            if backward:
                leaves = {k: x for k, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
                grads = torch.autograd.grad(out, [*leaves.values()], grad)
                outputs |= {f"the gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
        return outputs

    inputs = rotated(make)
    if backend != REFERENCE:
        one = next(inputs)
        assert_accurate(run(backend, **one), run(REFERENCE, **one), run(REFERENCE, **as_double(one)))
    calls = {name: lambda name=name: run(name, **next(inputs)) for name in (REFERENCE, *OURS)}
    last = 2 if backward else 1
    race(
        op_shape, case, stage, backend, calls,
        dtype=work.dtype, logical_bytes=sum(work.bytes[:last]), flops=sum(work.flops[:last]),
    )  # fmt: skip
