"""What a call of each op costs the host, whatever its shape, against a call of ``F.linear``."""

from statistics import median

import pytest
import torch

import mae_kernels
from benchmarks import measure
from benchmarks.measure import DEVICE, OURS
from benchmarks.work import CASES, OP_SHAPES
from mae_kernels import use_backend

(SHAPE,) = OP_SHAPES["tiny"]
# One of each op; dtypes do not change what the host does.
OPS = {work.op: name for name, work in ((name, make(SHAPE)) for name, make in reversed(CASES.items())) if not work.peer}


@pytest.mark.parametrize("stage", ["forward", "forward+backward"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_host(op, stage, ceilings, hand_over):
    work, backward = CASES[OPS[op]](SHAPE), stage != "forward"
    if backward and not work.differentiable:
        pytest.skip("nothing to differentiate")
    arguments = work.arguments(DEVICE)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    function, grad = getattr(mae_kernels, op), None

    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=work.is_autocast):
            out = function(**arguments)
        if backward:
            torch.autograd.grad(out, leaves, grad)

    with use_backend(OURS[-1]), measure.no_kernels():
        if backward:
            grad = torch.ones_like(function(**arguments))
        recorder = measure.OpRecorder()
        with recorder:
            call()
        samples = measure.host_samples(call)
        of_op = median(measure.host_samples(recorder.replay))
    us, linear_us = median(samples) * 1e6, ceilings["linear_host_us"][int(backward)]
    row = {"op": op, "pass": stage, "backend": OURS[-1], "host_us": us, "operator_host_us": of_op * 1e6}
    row |= {"linear_host_us": linear_us, "of_linear": us / linear_us}
    hand_over(f"host, {op}", stage, samples, row)
