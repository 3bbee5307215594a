"""Tiles timed against each other on a GPU, until one is ahead outside the noise."""

import math
import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from benchmarks.tune.prediction import patches_of
from benchmarks.tune.search import Search
from mae_kernels import kernels
from mae_kernels.inspect import U8, Specimen
from mae_kernels.kernels import tuned
from mae_kernels.kernels.tuned import Tiles

MEASURED = 6


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
