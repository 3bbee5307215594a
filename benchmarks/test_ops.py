"""Each op against the same step of the published pipeline; head and loss in one also against the two ops."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from statistics import median, quantiles

import pytest
import torch
from torch import Tensor

import mae_kernels
from benchmarks import measure
from benchmarks.ceilings import floor_seconds
from benchmarks.measure import COMPILED, DEVICE, OURS, REFERENCE, as_double, assert_accurate, rotated
from benchmarks.shapes import Shape
from benchmarks.work import CASES, STAGES, Work
from mae_kernels import use_backend

pytestmark = pytest.mark.benchmark(timer=measure.clock)


@pytest.mark.parametrize("backend", [REFERENCE, COMPILED, *OURS])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_op(case, stage, backend, op_shape, ceilings, show, request):
    if stage not in CASES[case](op_shape).stages:
        pytest.skip("this op has no such pass of its own")
    options = request.config.option
    compiled = bool(options.compiled) and options.compiled in op_shape.id
    if backend == COMPILED and not compiled:
        pytest.skip("compiled only where --compiled says so")
    rows, samples = _measured(case, op_shape, compiled, options.rounds)
    row = rows[stage, backend]
    floor = floor_seconds(row["logical_bytes"], row["flops"], CASES[case](op_shape).compute, ceilings)
    row |= {"floor_ms": floor * 1e3, "of_floor": floor * 1e3 / row["median_ms"]}
    show(f"{op_shape.id}, {case}, {stage}", backend, row, samples[stage, backend])


@cache
def _measured(case: str, s: Shape, compiled: bool, rounds: int) -> tuple[dict, dict[tuple[str, str], list[float]]]:
    """Rows and times of all passes and contenders, which take turns: a drift of the machine then meets all alike."""
    torch.manual_seed(0)
    torch.compiler.reset()
    work = CASES[case](s)
    inputs = rotated(partial(_arguments, work))
    ops: dict[str, Callable] = {REFERENCE: work.reference}
    if compiled:
        # CUDA graphs would copy every input to a place of their own, which costs more than they save here.
        mode = "max-autotune-no-cudagraphs" if DEVICE.type == "cuda" else "default"
        ops[COMPILED] = torch.compile(work.reference, mode=mode, dynamic=False)
    ops |= dict.fromkeys(OURS, getattr(mae_kernels, work.op))
    contenders = {name: _Contender(name, op, work) for name, op in ops.items()}
    _assert_accurate(contenders, next(inputs))
    once = 0.0
    for _ in range(2):  # the first warms up
        once = sum(sum(contender.seconds(next(inputs))) for contender in contenders.values())
    rounds = max(rounds, min(int(2 / once), 500), 2)
    forward, backward = ({name: [] for name in contenders} for _ in range(2))
    for _ in range(rounds):
        for name, contender in contenders.items():
            times = contender.seconds(next(inputs))
            forward[name].append(times[0])
            backward[name].append(sum(times[1:]))
    both = {name: [sum(x) for x in zip(forward[name], backward[name], strict=True)] for name in contenders}
    samples = dict(zip(STAGES, (forward, backward, both), strict=True))
    rows = {}
    for stage in work.stages:
        first, last = {"forward": (0, 1), "backward": (1, 2), "forward+backward": (0, 2)}[stage]
        for name, contender in contenders.items():
            values = samples[stage][name]
            row = {
                "shape": s.id,
                "op": case,
                "pass": stage,
                "backend": name,
                "dtype": work.dtype,
                "rounds": rounds,
                **_statistics(values),
                "logical_bytes": sum(work.bytes[first:last]),
                "flops": sum(work.flops[first:last]),
                "images_per_s": s.batch / median(values),
                "gb_per_s": sum(work.bytes[first:last]) / median(values) / 1e9,
            }
            if stage != "backward":
                row |= contender.costs(inputs, backward=stage != "forward")
            if name != REFERENCE:
                row |= _against(rows, row, REFERENCE)
                row["speedup"] = row["reference_ms"] / row["median_ms"]
            if compiled and name in OURS:
                row |= _against(rows, row, COMPILED)
            rows[stage, name] = row
    return rows, {(stage, name): values for stage, lists in samples.items() for name, values in lists.items()}


class _Contender:
    """One implementation of an op: its passes, and what they cost besides time."""

    def __init__(self, name: str, op: Callable, work: Work):
        self._name, self._op, self._work = name, op, work

    def forward(self, arguments: dict):
        with self._backend(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=_autocast(self._work)):
            return self._op(**{name: x for name, x in arguments.items() if name != "grad"})

    def backward(self, arguments: dict, out: Tensor) -> dict[str, Tensor]:
        leaves = {k: x for k, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
        with self._backend():
            grads = torch.autograd.grad(out, [*leaves.values()], arguments["grad"])
        return {f"the gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}

    def both(self, arguments: dict) -> None:
        self.backward(arguments, self.forward(arguments))

    def seconds(self, arguments: dict) -> list[float]:
        """Of the forward and, where there is one, the backward."""
        if not self._work.differentiable:
            return [measure.seconds(lambda: self.forward(arguments))]
        kept = []
        return measure.seconds(
            lambda: kept.append(self.forward(arguments)), lambda: self.backward(arguments, kept.pop())
        )

    def outputs(self, arguments: dict) -> dict[str, Tensor]:
        out = self.forward(arguments)
        found = {"the result": out} if isinstance(out, Tensor) else out._asdict()
        return found | self.backward(arguments, out) if self._work.differentiable else found

    def costs(self, inputs, backward: bool) -> dict[str, float]:
        """Peak memory; of our ops also a call's time with its launches: of the function, and of the dispatcher's op."""
        run = self.both if backward else self.forward
        costs = {"peak_mib": measure.peak_mib(lambda: run(next(inputs)))}
        if self._name in OURS:
            recorder = measure.OpRecorder()
            with recorder:
                run(next(inputs))
            with self._backend():
                costs["operator_ms"] = measure.wall_seconds(recorder.replay) * 1e3
            costs["wrapper_ms"] = measure.wall_seconds(lambda: run(next(inputs))) * 1e3
        return costs

    def _backend(self):
        return use_backend(self._name) if self._name in OURS else nullcontext()


def _arguments(work: Work) -> dict:
    arguments = work.arguments(DEVICE)
    if not work.differentiable:
        return arguments
    with torch.no_grad():
        return {**arguments, "grad": torch.randn_like(_Contender(REFERENCE, work.reference, work).forward(arguments))}


def _autocast(work: Work) -> bool:
    return work.compute == torch.bfloat16


def _assert_accurate(contenders: dict[str, _Contender], arguments: dict) -> None:
    """A contender that is wrong has no speed."""
    peer = contenders[REFERENCE].outputs(arguments)
    gold = contenders[REFERENCE].outputs(as_double(arguments))
    for name in OURS:
        assert_accurate(contenders[name].outputs(arguments), peer, gold)


def _statistics(values: list[float]) -> dict[str, float]:
    p20, *_, p80 = quantiles(values, n=5)
    return {"median_ms": median(values) * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}


def _against(rows: dict, row: dict, other: str) -> dict[str, float]:
    theirs = rows[row["pass"], other]
    return {
        f"{other}_{name}": theirs[key] for name, key in (("ms", "median_ms"), ("peak_mib", "peak_mib")) if key in theirs
    }
