"""Each op against the same step of the published pipeline; head and loss in one also against the two ops."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median

import pytest
import torch
from torch import Tensor

import mae_kernels
from benchmarks import measure
from benchmarks.ceilings import floor_seconds
from benchmarks.measure import COMPILED, DEVICE, OURS, REFERENCE, as_double, assert_accurate, rotated
from benchmarks.work import CASES, PASSES, Work
from mae_kernels import use_backend

CLONE = "clone"  # a copy of as many bytes as the op has to move


@pytest.mark.parametrize("case", CASES)
def test_op(case, op_shape, ceilings, hand_over, request):
    options = request.config.option
    work = CASES[case](op_shape)
    torch.manual_seed(0)
    torch.compiler.reset()
    inputs = rotated(partial(_arguments, work))
    ops: dict[str, Callable] = {REFERENCE: work.reference}
    if options.compiled and options.compiled in op_shape.id and not work.loops:
        # CUDA graphs would copy every input to a place of their own, which costs more than they save here.
        mode = "max-autotune-no-cudagraphs" if DEVICE.type == "cuda" else "default"
        ops[COMPILED] = torch.compile(work.reference, mode=mode, dynamic=False)
    ops |= dict.fromkeys(OURS, getattr(mae_kernels, work.op))
    contenders = {name: _Contender(name, op, work) for name, op in ops.items()}
    _assert_accurate(contenders, next(inputs))

    run: dict[str, Callable[[], list[float]]] = {
        name: partial(lambda contender: contender.seconds(next(inputs)), contender)
        for name, contender in contenders.items()
    }
    run[CLONE] = _clone(work)
    for _ in range(2):  # the first warms up
        once = sum(sum(seconds()) for seconds in run.values())
    rounds = max(options.rounds, min(int(2 / once), options.max_rounds), 2)
    times: dict[str, list[list[float]]] = {name: [] for name in run}
    for _ in range(rounds):  # all take turns, so that a drift of the machine meets all alike
        for name, seconds in run.items():
            times[name].append(seconds())

    for stage in work.stages:
        part, rows = PASSES[stage], {}
        moved, flops = sum(work.bytes[part]), sum(work.flops[part])
        floor_ms = floor_seconds(moved, flops, work.compute, ceilings) * 1e3
        clone_ms = median(sum(passes[part]) for passes in times[CLONE]) * 1e3
        for name, contender in contenders.items():
            samples = [sum(passes[part]) for passes in times[name]]
            row = {"shape": op_shape.id, "op": case, "pass": stage, "backend": name, "dtype": work.dtype}
            row |= {"mask_ratio": op_shape.mask_ratio, "rounds": rounds, **measure.statistics(samples)}
            row |= {"logical_bytes": moved, "flops": flops}
            row |= {"images_per_s": op_shape.batch / median(samples), "gb_per_s": moved / median(samples) / 1e9}
            row |= {"floor_ms": floor_ms, "of_floor": floor_ms / row["median_ms"]}
            row |= {"clone_ms": clone_ms, "of_clone": clone_ms / row["median_ms"]}
            if stage != "backward":
                row |= contender.costs(inputs, backward=stage != "forward")
            for other in {REFERENCE, COMPILED} & rows.keys():
                keys = ("median_ms", "peak_mib") if "peak_mib" in rows[other] else ("median_ms",)
                row |= {f"{other}_{key.removeprefix('median_')}": rows[other][key] for key in keys}
            if name != REFERENCE:
                row["speedup"] = row["reference_ms"] / row["median_ms"]
            rows[name] = row
            hand_over(f"{op_shape.id}, {case}, {stage}", name, samples, row)


class _Contender:
    """One implementation of an op: its passes, and what they cost besides time."""

    def __init__(self, name: str, op: Callable, work: Work):
        self._name, self._op, self._work = name, op, work

    def forward(self, arguments: dict):
        with self._backend(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._work.is_autocast):
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
            return measure.seconds(lambda: self.forward(arguments))
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


def _clone(work: Work) -> Callable[[], list[float]]:
    """A function that times copies of as many bytes as each pass moves, half of them read and half of them written."""

    def buffers() -> dict:
        return {i: torch.empty(2, max(moved // 2, 1), dtype=torch.uint8, device=DEVICE)
                for i, moved in enumerate(work.bytes)}  # fmt: skip

    turns = rotated(buffers)

    def run() -> list[float]:
        return measure.seconds(*(partial(target.copy_, source) for target, source in next(turns).values()))

    return run


def _assert_accurate(contenders: dict[str, _Contender], arguments: dict) -> None:
    """A contender that is wrong has no speed."""
    peer = contenders[REFERENCE].outputs(arguments)
    gold = contenders[REFERENCE].outputs(as_double(arguments))
    for name in OURS:
        assert_accurate(contenders[name].outputs(arguments), peer, gold)
