"""Tiles timed against those of the rules, on this GPU: ``python -m benchmarks.race --record FILE``.

Each race is a line of the file, written when it ends. Nothing else changes: a rule takes a winner over by hand, with
the line that shows it. Tiles that do not compile, or whose results differ from the rule's, are dropped.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

import mae_kernels
from benchmarks import measure, record
from benchmarks.inspect import launches
from benchmarks.work import BASE, CASES, OP_SHAPES, Work
from mae_kernels import kernels, use_backend
from mae_kernels.kernels import tiles

Tiles = tiles.BlockTiles | tiles.RowTiles | tiles.LossTiles | tiles.CropTiles
Rule = tuple[str, str]  # module and name
_FINALISTS = 6


def rules() -> list[Rule]:
    """Where launchers find the functions that choose their tiles."""
    modules = [m for m in sorted(sys.modules) if m.startswith(f"{kernels.__name__}.")]
    return [
        (module, name)
        for module in modules
        for name, value in vars(sys.modules[module]).items()
        if getattr(value, "__annotations__", {}).get("return") in Tiles.__args__
    ]


def consulted(op: Callable, args: tuple) -> dict[Rule, Tiles]:
    """The rules that a call of an op asks, with their answers."""
    found = {}

    def spy(rule: Rule, answer: Callable, *args):
        found[rule] = answer(*args)
        return found[rule]

    with ExitStack() as stack:
        for module, name in rules():
            home = sys.modules[module]
            answer = getattr(home, name)
            stack.enter_context(patch.object(home, name, partial(spy, (module, name), answer)))
        op(*args)
    return found


def call(op: Callable, args: tuple, rule: Rule, chosen: Tiles):
    with patch.object(importlib.import_module(rule[0]), rule[1], lambda *_: chosen):
        return op(*args)


def neighbours(own: Tiles) -> list[Tiles]:
    """Tiles that differ in one or two fields by a factor of two."""
    moves = [(f.name, move) for f in fields(own) for move in (-1, 1)]
    found = []
    for some in [*itertools.combinations(moves, 1), *itertools.combinations(moves, 2)]:
        values = asdict(own)
        for name, move in some:
            values[name] = int(values[name] * 2.0**move)
        if min(values.values()) >= 1 and values["num_warps"] <= 16:
            found.append(replace(own, **values))
    return [chosen for chosen in dict.fromkeys(found) if chosen != own]


def compiles(op: str, args: list, rule: Rule, chosen: Tiles, target: GPUTarget) -> bool:
    """Put a launch into Triton's cache."""
    try:
        for launch in call(lambda *args: launches(op, args, target), args, rule, chosen):
            launch.compiled()
    except Exception:  # of any pass of the compiler
        return False
    return True


def compiling(op: str, args: list, rule: Rule, candidates: list[Tiles], target: GPUTarget) -> list[Tiles]:
    """The candidates that compile, found by processes of their own, which the compiler may end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])  # imports once for the workers of all races

    def attempt(some: list[Tiles], workers: int) -> list[bool | None]:
        with ProcessPoolExecutor(workers, context) as pool:
            jobs = [pool.submit(compiles, op, args, rule, chosen, target) for chosen in some]
            return [None if job.exception() else job.result() for job in jobs]

    found = attempt(candidates, max((os.cpu_count() or 1) - 2, 1))
    # A compiler that ends its process takes those with it that still wait: each gets a process of its own.
    found = [
        attempt([c], 1)[0] if compiled is None else compiled for c, compiled in zip(candidates, found, strict=True)
    ]
    return [c for c, compiled in zip(candidates, found, strict=True) if compiled]


def same(ours, expected) -> bool:
    """Ids exactly, 8-bit pixels within a level, sums in another order within 0.1 % of the largest."""
    for x, y in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        x, y, exact = x.double(), y.double(), not x.dtype.is_floating_point
        allowed = (x.dtype == torch.uint8) if exact else 1e-3 * y.abs().max() if y.numel() else 0
        if not ((x - y).abs() <= allowed).all():  # not "any above": NaN is above nothing
            return False
    return True


def poisoned(like: Tensor, *args, new: Callable = Tensor.new_empty, **kwargs) -> Tensor:
    """New memory full of NaN or the largest integer: what tiles leave out is seen."""
    x = new(like, *args, **kwargs)
    return x.fill_(float("nan") if x.is_floating_point() else x.dtype == torch.bool or torch.iinfo(x.dtype).max)


def race(op: Callable, args: tuple, rule: Rule, own: Tiles, candidates: list[Tiles], rounds: int) -> dict:
    """Medians of the rule's own tiles and of the best. All take turns, in random order; the best few once more."""
    expected, racing = op(*args), [own]
    for chosen in candidates:
        try:
            with patch.object(Tensor, "new_empty", poisoned):
                racing += [chosen] * same(call(op, args, rule, chosen), expected)
        except (OutOfResources, RuntimeError):  # the chip refuses the launch
            continue
    del expected
    inputs = measure.rotated(lambda: dict(enumerate(x.clone() if isinstance(x, Tensor) else x for x in args)))

    def samples(racing: list[Tiles], rounds: int) -> dict[Tiles, list[float]]:
        found = {chosen: [] for chosen in racing}
        for _ in range(rounds):
            order = random.sample(racing, len(racing))
            calls = [partial(call, op, tuple(next(inputs).values()), rule, chosen) for chosen in order]
            for chosen, seconds in zip(order, measure.seconds(*calls), strict=True):
                found[chosen].append(seconds * 1e6)
        return found

    heats = samples(racing, max(rounds // 5, 2))
    finalists = sorted(heats, key=lambda chosen: median(heats[chosen]))[:_FINALISTS]
    final = samples(list(dict.fromkeys([own, *finalists])), rounds)
    best = min(final, key=lambda chosen: median(final[chosen]))
    return {
        "rule": f"{rule[0].rpartition('.')[2]}.{rule[1]}",
        "rule_tiles": asdict(own),
        "rule_us": median(final[own]),
        "best_tiles": asdict(best),
        "best_us": median(final[best]),
        "wins": quantiles(final[best], n=5)[-1] < quantiles(final[own], n=5)[0],  # p80 below p20
        "raced": len(racing),
        "dropped": 1 + len(candidates) - len(racing),
    }


def calls(work: Work) -> Iterator[tuple[Callable, tuple]]:
    """The dispatcher's ops that a forward and a backward call, with their arguments."""
    arguments, recorder = work.arguments(measure.DEVICE), measure.OpRecorder()
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    with recorder, torch.autocast(measure.DEVICE.type, torch.bfloat16, enabled=work.is_autocast):
        out = getattr(mae_kernels, work.op)(**arguments)
        if leaves:
            torch.autograd.grad(out, leaves, torch.randn_like(out))
    for op, args in recorder.calls:
        yield op, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True, metavar="FILE", help="result file to append to")
    parser.add_argument("--seconds", type=float, default=600, help="no race begins after them, by default %(default)s")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    options = parser.parse_args()
    if "triton" not in measure.OURS:
        parser.exit(1, "no kernel runs on this machine: nothing was raced\n")
    end, on_gpu = time.monotonic() + options.seconds, measure.DEVICE.type == "cuda"
    shape = replace(BASE, batch=256) if on_gpu else OP_SHAPES["tiny"][0]
    record.begin(options.record, record.command("python -m benchmarks.race"))
    use_backend("triton")
    cases = [name for name in CASES if options.only in name and "two ops" not in name]
    for case in sorted(cases, key=lambda name: "bfloat16" not in name):  # what people train in, first
        for op, args in calls(CASES[case](shape)):
            for rule, own in consulted(op, args).items():
                if time.monotonic() > end:
                    return
                candidates = neighbours(own)
                if on_gpu:
                    meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, list(args))
                    target = driver.active.get_current_target()
                    candidates = compiling(op.overloadpacket.__name__, meta, rule, candidates, target)
                found = race(op, args, rule, own, candidates, options.rounds)
                record.append(options.record, tiles={"shape": shape.id, "case": case, "op": op.name(), **found})
                print(f"{case}, {found['rule']}: {found['rule_us']:.1f} us, best {found['best_us']:.1f}", flush=True)


if __name__ == "__main__":
    main()
