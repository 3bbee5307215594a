"""Tiles around the rule's: compiled for a chip, some dropped, the others ranked by the model."""

import itertools
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from unittest.mock import patch

import triton

from benchmarks.tune.prediction import CHIPS, Chip, Resources, demand, predicted, sides
from mae_kernels import inspect, kernels
from mae_kernels.inspect import BF16, F32, U8, Specimen
from mae_kernels.kernels import chips, tuned
from mae_kernels.kernels.tuned import BlockTiles, CropTiles, GemmTiles, LossTiles, RowTiles, Tiles

COMPILED = 12  # candidates of a class beside the rule's tiles, the model's favourites before registers are known
MOST_REGISTERS = 220  # of 255: compilers of other versions of Triton take up to 35 more, or spill
# A model that leaves out as much as this one says nothing about differences of less than 5 %.
UNCERTAINTY = 0.05


@dataclass(frozen=True)
class Search:
    """A shape class with its survivors and their predicted seconds, the rule's tiles first, then ranked."""

    specimen: Specimen
    key: tuple
    survivors: list[tuple[Tiles, float]]


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


def guessed(specimen: Specimen, tiles: Tiles) -> Resources:
    """Resources before anything is compiled: good enough to choose what to compile."""
    if not isinstance(tiles, GemmTiles):
        return Resources(48, 0, 2048, "", 128, 128, 0)
    m, n, depth = sides(specimen, tiles)
    itemsize = specimen.args[8 if specimen.kernel == "patch_embed" else 7].itemsize
    registers = min(m * n // (32 * tiles.num_warps) + 90, 255)
    return Resources(registers, 0, (tiles.num_stages - 1) * depth * (m + n) * itemsize, "", 128, 128, 0)


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
