"""What a call of each op costs the host, whatever its shape, against a call of ``F.linear``."""

from dataclasses import replace
from statistics import median

import pytest
import torch

import mae_kernels
from benchmarks import measure, shapes
from benchmarks.measure import DEVICE, OURS
from benchmarks.work import CASES
from mae_kernels import use_backend

pytestmark = pytest.mark.benchmark(timer=measure.clock)

SHAPE = replace(shapes.TINY, batch=2, image=64, embed_dim=64, decoder_dim=64)
# One of each op; dtypes do not change what the host does.
OPS = {work.op: name for name, work in ((name, make(SHAPE)) for name, make in reversed(CASES.items())) if not work.peer}


@pytest.mark.parametrize("stage", ["forward", "forward+backward"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_host(op, stage, ceilings, show):
    work, backward = CASES[OPS[op]](SHAPE), stage != "forward"
    if backward and not work.differentiable:
        pytest.skip("nothing to differentiate")
    arguments = work.arguments(DEVICE)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    function, grad = getattr(mae_kernels, op), None

    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=work.compute == torch.bfloat16):
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
        of_op = measure.host_seconds(recorder.replay)
    row = {
        "op": op,
        "pass": stage,
        "backend": OURS[-1],
        "host_us": median(samples) * 1e6,
        "operator_host_us": of_op * 1e6,
        "linear_host_us": ceilings["linear_host_us"][int(backward)],
    }
    show(f"host, {op}", stage, row, samples)
