"""Tiles of every kernel, searched for a chip and written into the library's table: ``python -m benchmarks.tune``.

Each launch of the inspector, and a few more of other models, is a shape class. Tiles around the rule's are compiled for
the chip, without a GPU; what spills, does not fit or loses tensor cores or wide accesses is dropped, and a model ranks
the rest. On a GPU the best few are timed against the rule's tiles, which stay unless others are faster outside the
noise. Without one ``--predict`` writes what the model says, marked as such, and never over a measured entry.

Predict under the oldest Triton that the library supports: of 3.6 to 3.9 its compiler takes the most registers.
"""

import argparse
import datetime
import itertools
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import measure, record
from mae_kernels import inspect, kernels
from mae_kernels.inspect import BF16, F32, U8, Specimen
from mae_kernels.kernels import chips, tuned
from mae_kernels.kernels.tuned import BlockTiles, CropTiles, GemmTiles, LossTiles, RowTiles, Tiles

PREDICTED = "predicted"
COMPILED = 12  # candidates of a class beside the rule's tiles, the model's favourites before registers are known
MEASURED = 6
MOST_REGISTERS = 220  # of 255: compilers of other versions of Triton take up to 35 more, or spill
# A model that leaves out as much as this one says nothing about differences of less than 5 %.
UNCERTAINTY = 0.05


@dataclass(frozen=True)
class Chip:
    """Multiprocessors, KiB of shared memory of each, GB/s, dense bf16 TFLOP/s and GHz.

    Shared memory: CUDA C++ programming guide, technical specifications per compute capability; so are the limits that
    all three have in common. The rest: data sheets of A100 SXM 80 GB, H200 SXM and B200; the clock is the one that
    gives the data sheet's FLOPs.
    """

    multiprocessors: int
    shared: int
    bandwidth: float
    tflops: float
    clock: float


CHIPS = {
    "sm_80": Chip(108, 164, 2039, 312, 1.41),
    "sm_90": Chip(132, 228, inspect.BANDWIDTH, inspect.TFLOPS, 1.83),
    "sm_100": Chip(148, 228, 8000, 2250, 1.86),
}
WARPS, REGISTERS, PROGRAMS = 64, 65536, 32  # of a multiprocessor

# Assumed, of any chip: what a launch adds; a round trip to memory under load, and under that of a product; the shares
# of the data sheet's bandwidth and FLOPs that a good kernel gets; bytes that a multiprocessor gets out of L2 and out of
# shared memory in a cycle; cycles between instructions of a warp that has a multiprocessor to itself, and from a step
# of a product to the next besides its operations.
LAUNCH, LATENCY, IDLE_LATENCY = 2e-6, 0.7e-6, 0.4e-6
BANDWIDTH_SHARE, FLOPS_SHARE = 0.9, 0.75
L2_BYTES, SHARED_BYTES, PER_INSTRUCTION, BARRIER = 32, 128, 2, 64


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: of a thread, a program, and as instructions that a warp issues."""

    registers: int
    spills: int
    shared: int
    mma: str
    load_bits: int
    store_bits: int
    instructions: int


@dataclass(frozen=True)
class Demand:
    """What a program of a launch does, and all of them together."""

    trips: float  # round trips to memory that a program waits for one after the other
    repeats: float  # how often it runs through its code
    moved: float  # bytes from and to memory, of all programs
    through_l2: float = 0  # bytes, read by several programs
    through_shared: float = 0  # bytes that feed tensor cores
    flops: float = 0  # on tensor cores, padding included, in units of bf16
    lanes: float = 0  # other operations of a thread, where repeats does not count them
    exposed: float = 0  # trips of a program that its product does not overlap
    steps: float = 0  # of a program's product


def resident(resources: Resources, num_warps: int, chip: Chip) -> int:
    """Programs that a multiprocessor holds: registers come 256 to a warp, each program takes 1 KiB more to itself."""
    per_warp = max(math.ceil(resources.registers * 32 / 256) * 256, 256)
    shared = chip.shared * 1024 // (resources.shared + 1024)
    return min(WARPS // num_warps, REGISTERS // (per_warp * num_warps), shared, PROGRAMS)


def predicted(demand: Demand, resources: Resources, num_warps: int, programs: int, chip: Chip) -> float:
    """Seconds of a launch.

    time = launch + max(memory, l2, compute + waves (exposed latency + steps barrier), waves life)
    memory = bytes / (0.9 bandwidth)
    life = trips latency + repeats instructions 2 cycles;  waves = ceil(programs / (multiprocessors resident))
    compute = fullest max(flops / (0.75 rate), shared bytes / rate, lanes / 128 a cycle, instructions / 4 a cycle)
    fullest = ceil(programs / multiprocessors) / (programs / multiprocessors)

    ``waves life`` is Little's law: what is in flight is resident programs times the bytes of one of their trips.
    """
    multiprocessors, cycles = chip.multiprocessors, chip.multiprocessors * chip.clock * 1e9
    fullest = math.ceil(programs / multiprocessors) / (programs / multiprocessors)
    waves = math.ceil(programs / (multiprocessors * max(resident(resources, num_warps, chip), 1)))
    instructions, cycle = demand.repeats * resources.instructions, 1e-9 / chip.clock
    latency = IDLE_LATENCY if demand.flops else LATENCY
    compute = fullest * max(
        demand.flops / (FLOPS_SHARE * chip.tflops * 1e12),
        demand.through_shared / (SHARED_BYTES * cycles),
        demand.lanes / (128 * cycles),
        programs * num_warps * instructions / (4 * cycles),
    )
    return LAUNCH + max(
        demand.moved / (BANDWIDTH_SHARE * chip.bandwidth * 1e9),
        demand.through_l2 / (L2_BYTES * cycles),
        compute + waves * (demand.exposed * latency + demand.steps * BARRIER * cycle),
        waves * (demand.trips * latency + instructions * PER_INSTRUCTION * cycle),
    )


def demand(specimen: Specimen, tiles: Tiles, grid: tuple[int, ...]) -> Demand:
    """What the kernels do with these tiles, counted by hand from their code."""
    args, programs, moved = specimen.args, math.prod(grid), specimen.bytes
    if isinstance(tiles, BlockTiles):
        return Demand(1, 1, moved)
    if isinstance(tiles, LossTiles):
        pred, (_, c, _, _), (ph, _) = args[0], args[1].shape, args[4]
        turns = math.ceil(pred.shape[0] * pred.shape[1] / (programs * tiles.patches))
        passes = math.ceil(c * ph / tiles.rows)
        return Demand(turns * (3 if passes == 1 else 1 + 3 * passes), turns, moved)
    if isinstance(tiles, CropTiles):
        # Boxes of 290 x 390 pixels to 224 x 224: 8 taps to a pixel, about 15 operations each; 4 rows of a margin.
        lines = 290 / 224 * (tiles.rows + 4) / tiles.lines + 0.5  # the last of them are half full
        taps = lines * tiles.lines * tiles.cols * 8
        lanes = programs * (15 * taps + lines * tiles.lines * tiles.rows * tiles.cols)
        return Demand(lines * 3, 1, moved, lanes=lanes)
    if isinstance(tiles, RowTiles):
        d = args[0].shape[-1]
        if len(grid) == 1:
            return Demand(1 + math.ceil(d / tiles.width), 1, moved)
        samples = math.ceil(args[0].shape[0] / grid[2])
        # Partial sums are written and read once more.
        rows = patches_of(specimen) if specimen.kernel == "position_gradient" else grid[0] + args[4]
        return Demand(2 * samples, samples, moved + 2 * 4 * grid[2] * rows * d)
    return product_demand(specimen, tiles, grid)


def product_demand(specimen: Specimen, tiles: GemmTiles, grid: tuple[int, ...]) -> Demand:
    """A product of m x n values to a program, ``depth`` at a time: operands of a step come through L2 once a program.

    float32 is three products of TF32, at half the rate, of halves that are split in registers.
    """
    args, programs, moved = specimen.args, math.prod(grid), specimen.bytes
    forward = specimen.kernel == "patch_embed"
    images, weight, dtype = (args[0], args[1], args[8]) if forward else (args[1], args[2], args[7])
    d, c, ph, pw = weight.shape
    m, n, depth = sides(specimen, tiles)
    pixels, grads, trips = images.itemsize * pw / tiles.cols, args[0].itemsize, 1
    if forward:
        a, b, steps = pixels, dtype.itemsize, math.ceil(c * ph / tiles.rows)
    elif specimen.kernel == "weight_gradient":
        a, b, steps = grads, pixels, math.ceil(math.ceil(args[3].numel() / grid[2]) / depth)
        moved += 2 * 4 * grid[2] * weight.numel()  # of partial sums
        trips = 2  # the places of patches are read on the way
    else:
        a, b, steps = grads, dtype.itemsize, math.ceil(d / depth)
    work = 6 if dtype == F32 else 1
    # Conversions of a value: 8-bit pixels are scaled and normalised, other dtypes rounded, float32 split into halves.
    converted = 6 if images.dtype == U8 else 2 if images.dtype != dtype else 0
    on_m = converted if forward else 2 * (args[0].dtype != dtype)
    on_n = converted if specimen.kernel == "weight_gradient" else 0
    split = 6 * (dtype == F32)
    everything = programs * steps * depth
    operands = everything * (m + n * max(tiles.num_warps // 4, 1)) * (3 if split else 1)  # four warps share the n side
    return Demand(
        trips=2 + trips * steps / (tiles.num_stages - 1),
        repeats=1,
        moved=moved,
        through_l2=everything * (m * a + n * b),
        through_shared=operands * dtype.itemsize,
        flops=2 * everything * m * n * work,
        lanes=everything * (m * (on_m + split) + n * (on_n + split)),
        exposed=3,
        steps=steps,
    )


def specimens() -> list[Specimen]:
    """The launches to tune for: the inspector's, and those of other widths, patches and recipes."""
    found = [specimen for specimen in inspect.specimens() if specimen.kernel != "loss_and_scale"]
    for model, width in (("ViT-S/16", 384), ("ViT-L/16", 1024)):
        more = [make(t, width) for make in (inspect.gather_tokens, inspect.gather_tokens_backward) for t in (BF16, F32)]
        for dtypes in ((U8, BF16, F32), (F32, BF16, F32), (BF16, BF16, BF16)):
            more.append(inspect.patch_embed(*dtypes, width=width))
            more.append(inspect.patch_embed_backward("weight_gradient", *dtypes, width=width))
        found += [replace(specimen, variant=f"{model} {specimen.variant}") for specimen in more]
    # Images in float32 under autocast.
    found += [inspect.patch_embed(F32, BF16, F32), inspect.patch_embed_backward("weight_gradient", F32, BF16, F32)]
    huge = [inspect.masked_mse(*dtypes, "pqc", "ids_mask", patch=14) for dtypes in ((U8, BF16), (F32, F32))]
    huge.append(inspect.patch_embed(U8, BF16, F32, patch=14, width=1280))
    huge += [
        inspect.patch_embed_backward("weight_gradient", *dtypes, patch=14, width=1280)
        for dtypes in ((U8, BF16, F32), (BF16, BF16, BF16))
    ]
    return found + [replace(specimen, variant=f"ViT-H/14 {specimen.variant}") for specimen in huge]


def patches_of(specimen: Specimen) -> int:
    """L of a launch whose arguments hold ids."""
    args = specimen.args
    return {
        "masking": lambda: args[0].shape[1],
        "gather_tokens": lambda: args[0].shape[1],
        "gather_tokens_backward": lambda: args[2],
        "scatter_mask_tokens": lambda: args[2].shape[1],
        "scatter_mask_tokens_backward": lambda: args[1].shape[1],
        "masked_mse": lambda: math.prod(args[1].shape[2:]) // math.prod(args[4]),
        "masked_mse_backward": lambda: 0,
        "patch_embed": lambda: math.prod(args[0].shape[2:]) // math.prod(args[1].shape[2:]),
        "patch_embed_backward": lambda: math.prod(args[1].shape[2:]) // math.prod(args[2].shape[2:]),
    }[specimen.op]()


def plan(specimen: Specimen, chip: str, chosen: Tiles | None = None) -> tuple[tuple, Tiles, tuple[int, ...]]:
    """Key of a launch, its tiles, by default the rule's, and its grid. Nothing is compiled."""
    found = {}

    def choose(key, rule, *args):
        if key[0] != specimen.kernel:
            return rule(*args)
        found["key"], found["tiles"] = key, chosen or rule(*args)
        return found["tiles"]

    def launch(kernel, *args, grid, **options):
        found.setdefault(kernel.__name__, grid)

    with patch.object(triton.JITFunction, "run", launch), patch.object(tuned, "tiles", choose), chips.assume(chip):
        getattr(kernels, specimen.op)(*specimen.args)
    return found["key"], found["tiles"], found[f"{specimen.kernel}_kernel"]


def compiled(specimen: Specimen, chip: str, tiles: Tiles) -> Resources | None:
    """What the kernel takes with these tiles; None where Triton refuses them."""
    try:
        with tuned.forced(specimen.kernel, tiles):
            kernel, _ = inspect.compiled(specimen, chip)
        registers, spills, mma, load, store, instructions = inspect.read_cubin(kernel.asm["cubin"])
    except Exception as error:  # of any pass of the compiler
        print(f"{specimen.kernel} {tiles}: {type(error).__name__}", file=sys.stderr)
        return None
    return Resources(registers, spills, kernel.metadata.shared, min(mma, default=""), load, store, instructions)


def _compile_job(index: int, chip: str, tiles: Tiles) -> Resources | None:
    return compiled(specimens()[index], chip, tiles)


def why_not(candidate: Resources | None, rule: Resources, chip: Chip) -> str:
    """Why a candidate is dropped, in a word or two; empty if it is not."""
    if candidate is None:
        return "does not compile"
    reasons = {
        "spills": candidate.spills > 0,
        "shared memory": candidate.shared > (chip.shared - 1) * 1024,
        "tensor cores": candidate.mma != rule.mma,
        "registers": candidate.registers > max(MOST_REGISTERS, rule.registers),
        "narrow accesses": candidate.load_bits < rule.load_bits or candidate.store_bits < rule.store_bits,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def candidates(specimen: Specimen, rule: Tiles) -> list[Tiles]:
    """Tiles around the rule's, which are the first of them; between 4 and 64 values or 32 and 128 sums to a thread."""
    warps = (1, 2, 4, 8)
    if isinstance(rule, BlockTiles):
        sizes = [rule.values] if specimen.kernel == "masking" else [512, 1024, 2048, 4096, 8192]
        found = [BlockTiles(v, w) for v in sizes for w in warps if 2 <= v // (32 * w) <= 32]
    elif isinstance(rule, RowTiles):
        d = specimen.args[0].shape[-1]
        padded = math.ceil(d / rule.width) * rule.width
        widths = [w for w in (64, 128, 256, 512, 1024) if math.ceil(d / w) * w <= padded]
        found = [
            RowTiles(v // w, w, n)
            for w in widths
            for v in (512, 1024, 2048, 4096, 8192)
            for n in warps
            if v >= w and 4 <= v // (32 * n) <= 64
        ]
    elif isinstance(rule, LossTiles):
        found = [
            LossTiles(patches, rows, rule.cols, rule.turns * turns, n)
            for patches in (1, 2, 4)
            for rows in (rule.rows, rule.rows // 2, rule.rows // 4)
            for turns in (1, 2, 4)
            for n in warps
            if rows >= 4 and 8 <= patches * rows * rule.cols // (32 * n) <= 32
        ]
    elif isinstance(rule, CropTiles):
        found = [
            CropTiles(rows, cols, lines, n)
            for rows in (16, 32)
            for cols in (32, 64, 128)
            for lines in (16, 32)
            for n in (2, 4, 8)
            if max(rows, lines) * cols // (32 * n) <= 32
        ]
    else:
        found = list(_products(specimen, rule))
    return list(dict.fromkeys([rule, *found]))


def _products(specimen: Specimen, rule: GemmTiles) -> Iterator[GemmTiles]:
    sides, depths = (64, 128, 256), (16, 32, 64, 128)
    for m, n, depth, warps, stages in itertools.product(sides, sides, depths, (4, 8), (2, 3, 4, 5)):
        values = {"patch_embed": depth}.get(specimen.kernel, n)
        tokens, width = {
            "patch_embed": (m, n), "weight_gradient": (depth, m), "image_gradient": (m, depth)
        }[specimen.kernel]  # fmt: skip
        if 32 <= m * n // (32 * warps) <= 128 and values >= rule.cols:
            yield GemmTiles(tokens, width, values // rule.cols, rule.cols, warps, stages)


def sides(specimen: Specimen, tiles: GemmTiles) -> tuple[int, int, int]:
    """A program's product of m x depth with depth x n values."""
    values = tiles.rows * tiles.cols
    return {
        "patch_embed": (tiles.tokens, tiles.width, values),
        "weight_gradient": (tiles.width, values, tiles.tokens),
        "image_gradient": (tiles.tokens, values, tiles.width),
    }[specimen.kernel]


def guessed(specimen: Specimen, tiles: Tiles) -> Resources:
    """Resources before anything is compiled: good enough to choose what to compile."""
    if not isinstance(tiles, GemmTiles):
        return Resources(48, 0, 2048, "", 128, 128, 0)
    m, n, depth = sides(specimen, tiles)
    itemsize = specimen.args[8 if specimen.kernel == "patch_embed" else 7].itemsize
    registers = min(m * n // (32 * tiles.num_warps) + 90, 255)
    return Resources(registers, 0, (tiles.num_stages - 1) * depth * (m + n) * itemsize, "", 128, 128, 0)


@dataclass(frozen=True)
class Entry:
    """A line of the table, with what its comment says; times are microseconds."""

    key: tuple
    tiles: Tiles
    what: str
    time: float
    rule: float
    floor: float
    source: str  # the device of a measurement, or PREDICTED
    date: str

    def __str__(self) -> str:
        comment = f"{self.what}: {self.time:.1f} µs, rule {self.rule:.1f}, floor {self.floor:.1f}"
        tiles = f"{type(self.tiles).__name__}({', '.join(map(str, astuple(self.tiles)))})"
        return f"    # {comment}; {self.source}, {self.date}\n    ({', '.join(map(_code, self.key))}): {tiles},\n"


def _code(value) -> str:
    names = {BF16: "BF16", F32: "F32", U8: "U8", torch.float16: "F16"}
    return names[value] if isinstance(value, torch.dtype) else f'"{value}"' if isinstance(value, str) else str(value)


_OPENING = re.compile(r"^TABLE: [^\n]* = \{", re.M)
_COMMENT = re.compile(r"^    # (.*): ([\d.]+) µs, rule ([\d.]+), floor ([\d.]+); (.*), ([\d-]+)$", re.M)


def read_table(text: str) -> list[Entry]:
    body = text[_OPENING.search(text).end() - 1 :]
    comments = _COMMENT.findall(body)
    return [
        Entry(key, tiles, what, *map(float, times), source, date)
        for (key, tiles), (what, *times, source, date) in zip(eval(body, vars(tuned)).items(), comments, strict=True)
    ]


def rewritten(text: str, new: list[Entry]) -> str:
    """The file with new entries; predictions leave measured entries as they are."""
    entries = {entry.key: entry for entry in read_table(text)}
    for entry in new:
        if entry.source != PREDICTED or entry.key not in entries or entries[entry.key].source == PREDICTED:
            entries[entry.key] = entry
    lines = "".join(str(entry) for entry in sorted(entries.values(), key=lambda entry: list(map(_code, entry.key))))
    opening = _OPENING.search(text)
    return text[: opening.end()] + (f"\n{lines}" if lines else "") + "}\n"


def filled(specimen: Specimen, device: torch.device) -> list:
    """Arguments with values: random numbers, ids that exist, boxes inside their images."""
    args = specimen.args

    def real(x):
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.int64:
            return torch.rand(x.shape[0], patches, device=device).argsort(1)[:, : x.shape[1]].contiguous()
        count = x.untyped_storage().nbytes() // x.itemsize
        if x.dtype == U8:
            flat = torch.randint(256, (count,), dtype=U8, device=device)
        elif x.dtype == torch.bool:
            flat = torch.rand(count, device=device) < 0.75
        elif x.ndim > 1:
            flat = torch.randn(count, device=device).to(x.dtype)
        else:  # mean and std, biases and scales lie around 1
            flat = (torch.rand(count, device=device) + 0.5).to(x.dtype)
        return flat.as_strided(x.shape, x.stride(), x.storage_offset())

    if specimen.op == "random_resized_crop":
        images, starts, sizes, boxes, flips, size = args
        n, inside = boxes.shape[0], torch.tensor([290, 390], device=device)
        if sizes is None:
            room = torch.tensor(images.shape[2:], device=device) - inside + 1
            corners = (torch.rand(n, 2, device=device) * room).long()
        else:
            starts, sizes = torch.arange(n, device=device) * int(inside.prod()), inside.repeat(n, 1)
            corners = torch.zeros(n, 2, dtype=torch.int64, device=device)
        return [real(images), starts, sizes, torch.cat([corners, inside.repeat(n, 1)], 1), real(flips), size]
    patches = patches_of(specimen)
    return [real(x) for x in args]


def run(specimen: Specimen, tiles: Tiles, args: list):
    with tuned.forced(specimen.kernel, tiles):
        return getattr(kernels, specimen.op)(*args)


def same(ours, rules) -> bool:
    """Whether results agree: ids exactly, 8-bit pixels within a level, sums in another order within 0.1 % of the
    largest, or a few units in the last place."""
    for x, y in zip(tree_leaves(ours), tree_leaves(rules), strict=True):
        if x.shape != y.shape:
            return False
        if not x.dtype.is_floating_point:
            error, allowed = (x.to(torch.int64) - y.to(torch.int64)).abs(), int(x.dtype == U8)
        else:
            error, allowed = (x.double() - y.double()).abs(), max(1e-3, 4 * torch.finfo(x.dtype).eps)
            allowed *= y.double().abs().max().item() if y.numel() else 0
        # Not "any above": NaN is above nothing.
        if not (error <= allowed).all():
            return False
    return True


def rounds(specimen: Specimen, contenders: list[Tiles], device: torch.device) -> Callable[[], list[float]]:
    """A function that times one launch of each contender, in random order, on buffers that are not in the L2 cache."""
    inputs = measure.rotated(lambda: dict(enumerate(filled(specimen, device))))

    def one_round() -> list[float]:
        order = random.sample(range(len(contenders)), len(contenders))
        calls = [partial(run, specimen, contenders[i], list(next(inputs).values())) for i in order]
        times = measure.seconds(*calls)
        return [t for _, t in sorted(zip(order, times if len(calls) > 1 else [times], strict=True))]

    one_round()
    return one_round


def fastest(
    one_round: Callable[[], list[float]], seconds: float, clock: Callable[[], float] = time.monotonic, least: int = 10
) -> tuple[int, list[float]]:
    """The contender to take, of which the first is the rule's, and the median of each.

    Rounds go on until the leader is ahead of the second outside the noise, or the noise is below half a percent, or the
    time is up. The rule stays unless the leader is faster than it outside the noise.
    """
    samples: list[list[float]] = []
    end = clock() + seconds
    while True:
        samples.append(one_round())
        by_contender = list(zip(*samples, strict=True))
        medians = [median(times) for times in by_contender]
        noise = [_noise(times) for times in by_contender]
        leader, *others = sorted(range(len(medians)), key=medians.__getitem__)

        def ahead(i: int, of: int, medians=medians, noise=noise) -> bool:
            return medians[of] - medians[i] > 2 * math.hypot(noise[i], noise[of])

        settled = not others or ahead(leader, others[0]) or max(noise) < 0.005 * medians[leader]
        if (settled and len(samples) >= least) or clock() >= end:
            return leader if leader and ahead(leader, 0) else 0, medians


def _noise(times: tuple[float, ...]) -> float:
    """Standard error of the median of normal samples whose spread is that from p20 to p80."""
    if len(times) < 5:
        return math.inf
    p20, *_, p80 = quantiles(times, n=5)
    return 1.25 * (p80 - p20) / 1.68 / len(times) ** 0.5


@dataclass(frozen=True)
class Search:
    """A shape class with its survivors and their predicted seconds, the rule's tiles first, then ranked."""

    specimen: Specimen
    key: tuple
    survivors: list[tuple[Tiles, float]]


def searches(chosen: list[int], chip_name: str, workers: int) -> list[Search]:
    """Compile candidates for a chip and rank what is left of them."""
    chip, everything, jobs = CHIPS[chip_name], specimens(), []
    for index in chosen:
        specimen = everything[index]
        _, rule, _ = plan(specimen, chip_name)
        first, *others = candidates(specimen, rule)

        def guess(tiles, specimen=specimen) -> float:
            return modelled(specimen, tiles, guessed(specimen, tiles), chip_name)

        fitting = [(t, guess(t)) for t in others if guessed(specimen, t).shared <= (chip.shared - 1) * 1024]
        jobs.append((index, first))
        jobs += [(index, tiles) for tiles, _ in varied(specimen, ranked(fitting, first))[:COMPILED]]
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_compile_job, *zip(*((i, chip_name, t) for i, t in jobs), strict=True)))
    else:
        results = [_compile_job(i, chip_name, tiles) for i, tiles in jobs]
    found = []
    for index, group in itertools.groupby(zip(jobs, results, strict=True), key=lambda pair: pair[0][0]):
        specimen, members = everything[index], [(tiles, resources) for (_, tiles), resources in group]
        rule = members[0][1]
        survivors = [
            (tiles, modelled(specimen, tiles, resources, chip_name))
            for tiles, resources in members
            if resources is rule or not why_not(resources, rule, chip)
        ]
        survivors[1:] = ranked(survivors[1:], survivors[0][0])
        found.append(Search(specimen, plan(specimen, chip_name)[0], survivors))
    return found


def ranked(pairs: list[tuple[Tiles, float]], rule: Tiles) -> list[tuple[Tiles, float]]:
    """Tiles by predicted seconds; of those between which the model cannot tell, the closest to the rule's first."""

    def order(pair: tuple[Tiles, float]) -> tuple[int, float]:
        steps = (abs(math.log2(a / b)) for a, b in zip(astuple(pair[0]), astuple(rule), strict=True))
        return round(math.log(pair[1]) / UNCERTAINTY), sum(steps)

    return sorted(pairs, key=order)


def varied(specimen: Specimen, pairs: list[tuple[Tiles, float]]) -> list[tuple[Tiles, float]]:
    """At most three depths and stages of a product's shape: where one of them spills, the others do too."""
    counts = Counter()

    def is_new(tiles: Tiles) -> bool:
        if not isinstance(tiles, GemmTiles):
            return True
        m, n, _ = sides(specimen, tiles)
        counts[m, n, tiles.num_warps] += 1
        return counts[m, n, tiles.num_warps] <= 3

    return [pair for pair in pairs if is_new(pair[0])]


def modelled(specimen: Specimen, tiles: Tiles, resources: Resources, chip: str) -> float:
    _, _, grid = plan(specimen, chip, tiles)
    return predicted(demand(specimen, tiles, grid), resources, tiles.num_warps, math.prod(grid), CHIPS[chip])


def by_model(search: Search) -> tuple[Tiles, float, float]:
    """Tiles to take, their seconds and those of the rule's, as predicted."""
    (rule, rule_time), *others = search.survivors
    tiles, seconds = others[0] if others else (rule, rule_time)
    return (tiles, seconds, rule_time) if seconds < (1 - UNCERTAINTY) * rule_time else (rule, rule_time, rule_time)


def by_clock(search: Search, seconds: float) -> tuple[Tiles, float, float]:
    """The same, as measured. The tiles in the table compete too."""
    specimen, device = search.specimen, measure.DEVICE
    end = time.monotonic() + seconds
    contenders = [tiles for tiles, _ in search.survivors[: 1 + MEASURED]]
    if (current := tuned.TABLE.get(search.key)) in [tiles for tiles, _ in search.survivors[1 + MEASURED :]]:
        contenders.append(current)
    args = filled(specimen, device)
    expected = run(specimen, contenders[0], args)
    contenders[1:] = [tiles for tiles in contenders[1:] if same(run(specimen, tiles, args), expected)]
    del args, expected
    one_round = rounds(specimen, contenders, device)
    best, medians = fastest(one_round, end - time.monotonic())
    return contenders[best], medians[best], medians[0]


def main(argv: list[str] | None = None) -> None:
    names = list(dict.fromkeys(specimen.kernel for specimen in specimens()))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--predict", action="store_true", help="write what the model says, without a GPU")
    parser.add_argument("--chip", choices=CHIPS, help="chip to predict for; on a GPU it is the machine's own")
    parser.add_argument("--kernel", action="append", choices=names, metavar="NAME", help="only this; repeatable")
    parser.add_argument("--seconds", type=float, default=480, help="time on a GPU, by default %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, default=Path(tuned.__file__), help="the table, by default the library's")
    parser.add_argument("--json", type=Path, help="a result file as well")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.exit(1, "TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it\n")
    if not options.predict and not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU on this machine: nothing was tuned; --predict asks the model instead\n")
    chip = options.chip or ("sm_90" if options.predict else chips.chip_of(measure.DEVICE))
    if not options.predict and chip != chips.chip_of(measure.DEVICE):
        parser.error(f"--chip {chip} can only be predicted here: the GPU is tiled as {chips.chip_of(measure.DEVICE)}")
    if chip not in CHIPS:
        parser.exit(1, f"there is no model of {chip}: nothing was tuned\n")

    start = time.monotonic()
    wanted = [i for i, specimen in enumerate(specimens()) if specimen.kernel in (options.kernel or names)]
    found = searches(wanted, chip, options.workers)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    device = PREDICTED if options.predict else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entries, rows = [], []
    for i, search in enumerate(found):
        left = start + options.seconds - time.monotonic()
        if left <= 0 and not options.predict:
            print(f"the time is up: {len(found) - i} of {len(found)} classes stay as they are")
            break
        share = left / (len(found) - i)
        tiles, seconds, rule_seconds = by_model(search) if options.predict else by_clock(search, share)
        specimen, limits = search.specimen, CHIPS[chip]
        floor = max(specimen.bytes / (limits.bandwidth * 1e3), specimen.flops / (limits.tflops * 1e6))
        times = (seconds * 1e6, rule_seconds * 1e6, floor)
        entries.append(Entry(search.key, tiles, specimen.variant, *times, device, today))
        rule = search.survivors[0][0]
        rows.append({
            "kernel": specimen.kernel, "variant": specimen.variant, "chip": chip, "source": device,
            "tiles": vars(tiles), "rule_tiles": vars(rule), "us": times[0], "rule_us": times[1], "floor_us": floor,
        })  # fmt: skip
        said = "rule" if tiles == rule else f"rule: {astuple(rule)}"
        line = f"{specimen.kernel:29}{specimen.variant:43}{astuple(tiles)!s:28}"
        print(f"{line}{times[0]:8.1f}{times[1]:8.1f}{floor:8.1f}  {said}", flush=True)
    text = (options.out if options.out.exists() else Path(tuned.__file__)).read_text(encoding="utf-8")
    options.out.write_text(rewritten(text, entries), encoding="utf-8")
    print(f"wrote {options.out}: tiles, then µs, those of the rule's tiles, and the floor; {device}, {today}")
    if options.json:
        command = " ".join(["python -m benchmarks.tune", *(sys.argv[1:] if argv is None else argv)])
        kind = {"kind": "prediction" if options.predict else "tuning"}
        record.write(options.json, command=command, rows=rows, **kind)


if __name__ == "__main__":
    main()
