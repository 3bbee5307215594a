"""Which patches are hidden: random masks of several shapes, and masks that the user brings."""

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checks
from .patch_grid import Sizes, three_sides
from .registration import decomposed, in_onnx_export, register_op

# Of a hundred thousand masks of 14 x 14 at a ratio of 0.9 none needed more.
_RECTANGLES = 32
_LEAST_AREA, _LEAST_ASPECT = 16, 0.3  # of BEiT's rectangles: patches, and height / width or its inverse


class Masking(NamedTuple):
    """A mask of L patches per sample in the forms that the ops take: K places of visible patches, M of hidden ones.

    Where every sample has as many visible patches, K + M = L. Where the counts differ, K + M > L, and the places that a
    sample does not fill hold the id -1, which is no patch to any op: see :func:`masking_from_mask`.
    """

    ids_keep: Tensor  # [N, K] int64, the visible patches
    ids_mask: Tensor  # [N, M] int64, the hidden patches
    ids_restore: Tensor  # [N, L] int64, where in (ids_keep, ids_mask) each patch stands
    mask: Tensor  # [N, L] bool, True = removed


def random_masking(
    batch_size: int,
    num_patches: int,
    mask_ratio: float = 0.75,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    count: Literal["visible", "masked"] = "visible",
) -> Masking:
    """Hide a random part of the patches of every sample, independently per sample.

    ``ids_shuffle = argsort(noise)``; its first K ids stay visible. Equal noise goes to the lower index.

    Args:
        batch_size: N, 0 included.
        num_patches: L, patches per sample.
        mask_ratio: share of hidden patches, strictly between 0 and 1.
        noise: ``[N, L]`` floating, in place of ``torch.rand(N, L)``: the smallest values stay visible. Scores of your
            own make a strategy of your own, with the same count in every row.
        generator: random generator for the noise, on ``device``.
        device: where the mask is made; the noise's device when noise is given.
        count: the side that truncation counts. ``"visible"``: ``K = int(L * (1 - mask_ratio))`` as published;
            ``"masked"``: ``M = int(L * mask_ratio)`` as in VideoMAE. They differ: 196 patches at 0.9 keep 19 or 20.

    Returns:
        :class:`Masking` with tensors on the noise's device, both ids in shuffled order.

    Raises:
        ValueError: nothing would be visible or nothing hidden; wrong noise shape.
        TypeError: noise that is not floating point.

    On a GPU one launch does it all for up to 4096 patches; above, ``torch.sort`` sorts, with equal results.

    Equivalent PyTorch::

        ids_shuffle = torch.argsort(torch.rand(N, L), dim=1, stable=True)
        ids_keep, ids_mask = ids_shuffle[:, :K], ids_shuffle[:, K:]
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = ids_restore >= K

    Source: He et al. 2021, section 3, "Masking".
    """
    op = "random_masking"
    visible = _num_keep(op, batch_size, num_patches, mask_ratio, count)
    if noise is None:
        noise = _draw((batch_size, num_patches), generator, device)
    else:
        checks.tensor(op, "noise", noise, (batch_size, num_patches))
        checks.floating(op, "noise", noise)
        if generator is not None or device is not None:
            raise ValueError(f"{op}: noise fixes the mask and its device; leave out generator and device")
    return _of_equal_counts(noise, visible)


def tube_masking(
    batch_size: int,
    grid: Sizes,
    mask_ratio: float = 0.9,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Hide random places of the frame, independently per sample and the same ones in every frame.

    Every set of ``int(mask_ratio * H' * W')`` places is as likely as any other.

    Args:
        batch_size: N, 0 included.
        grid: ``(H', W')`` or ``(T', H', W')``, patches along each side.
        mask_ratio: share of hidden patches, strictly between 0 and 1.
        generator: random generator for all that is drawn, on ``device``.
        device: where the mask is made. Nothing is read back from there.

    Returns:
        :class:`Masking` with ``M = T' * int(mask_ratio * H' * W')`` in every row; both ids ascend.

    Raises:
        TypeError, ValueError: see the message.

    Source: Tong et al. 2022, "VideoMAE", section 3.3.
    """
    op = "tube_masking"
    frames, height, width = three_sides(checks.sizes(op, "grid", grid, 2))
    visible = _num_keep(op, batch_size, height * width, mask_ratio, "masked")
    return _alike_in_frames(_draw((batch_size, height * width), generator, device), visible, frames)


def block_masking(
    batch_size: int,
    grid: Sizes,
    mask_ratio: float = 0.4,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Hide rectangles of random size, shape and place, the same ones in every frame, until the count is met.

    Each rectangle has an area uniform in ``[min(16, m), m]`` with ``m = int(mask_ratio * H' * W')``, and a ratio
    height / width log-uniform in ``[0.3, 1 / 0.3]``; its sides are rounded, and are at least 1 and at most those of the
    grid; its place is uniform among all that it can have. Rectangles may overlap. From the one that would hide more
    than m patches, those that come first in the order of the grid stay visible. Should 32 rectangles hide fewer than m,
    which takes a high ratio, the whole grid serves as the next.

    Args, Returns, Raises: those of :func:`tube_masking`. A mask is a few launches, whatever is drawn.

    Source: Bao et al. 2021, "BEiT", algorithm 1. There a rectangle is no larger than what is left to hide, one that
    does not fit into the grid is drawn again, and the last ones are left out rather than cut: counts vary.
    """
    op = "block_masking"
    frames, height, width = three_sides(checks.sizes(op, "grid", grid, 2))
    visible = _num_keep(op, batch_size, height * width, mask_ratio, "masked")
    hidden = height * width - visible
    area, aspect, top, left = _draw((batch_size, 4, _RECTANGLES), generator, device).unbind(1)  # [N, R]
    least = min(_LEAST_AREA, hidden)
    area, aspect = least + (hidden - least) * area, _LEAST_ASPECT ** (1 - 2 * aspect)
    rows = _intervals(top, (area * aspect).sqrt(), height)  # [N, R, H']
    columns = _intervals(left, (area / aspect).sqrt(), width)  # [N, R, W']
    covered = (rows[:, :, :, None] & columns[:, :, None, :]).flatten(2)  # [N, R, H' * W']
    # The sort puts the earliest rectangle last, where patches are hidden.
    order = torch.arange(_RECTANGLES, 0, -1, dtype=torch.uint8, device=area.device)[:, None]
    return _alike_in_frames(torch.where(covered, order, 0).amax(dim=1).float(), visible, frames)


def _intervals(place: Tensor, length: Tensor, side: int) -> Tensor:
    """Which of ``side`` places an interval of that length holds that lies at ``place``, drawn from [0, 1)."""
    length = length.round().clamp(1, side)
    begin = (place * (side - length + 1)).floor()
    i = torch.arange(side, device=place.device)
    return (i >= begin[..., None]) & (i < (begin + length)[..., None])


def grid_masking(
    batch_size: int,
    grid: Sizes,
    mask_ratio: float = 0.75,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Hide the same places of every 2 x 2 patches of a sample, in every frame.

    Which one, two or three of the four places are hidden is drawn for each sample, all being equally likely. Where a
    side is odd, its last 2 x 2 are cut, and the four places have different numbers of patches: the count stays
    ``int(mask_ratio * H' * W')``, and one place is hidden in a random part of the 2 x 2.

    Args, Returns, Raises: those of :func:`tube_masking`; mask_ratio is 0.25, 0.5 or 0.75.

    Source: He et al. 2021, figure 6, "grid".
    """
    op = "grid_masking"
    frames, height, width = three_sides(checks.sizes(op, "grid", grid, 2))
    visible = _num_keep(op, batch_size, height * width, mask_ratio, "masked")
    if mask_ratio not in (0.25, 0.5, 0.75):
        raise ValueError(
            f"{op}: mask_ratio must be 0.25, 0.5 or 0.75, whole patches of every 2 x 2, got {mask_ratio}; "
            "random_masking takes any ratio"
        )
    order, ties = _draw((batch_size, 4 + height * width), generator, device).tensor_split([4], dim=1)
    row, column = (torch.arange(side, device=ties.device) % 2 for side in (height, width))
    place = (2 * row[:, None] + column).flatten()  # [H' * W'], 0 to 3
    return _alike_in_frames(order.argsort(dim=1)[:, place] + ties / 2, visible, frames)


def axis_masking(
    batch_size: int,
    grid: Sizes,
    mask_ratio: float = 0.75,
    *,
    share: float | Sequence[float] = 0.25,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Hide whole lines of the grid, rows and columns or frames, rows and columns, then random patches.

    Of each axis ``int(share * side)`` lines are hidden: of a spectrogram, frequencies and times. Every set of that many
    is equally likely, and the axes are independent. What is left to hide is drawn among all other patches.

    Args:
        share: of each axis, the part of its lines that is hidden, in [0, 1); a number for each axis of grid, or one for
            all. ``(0, 0.5)`` hides half of the columns, and no row.

    Other Args, Returns, Raises: those of :func:`tube_masking`, but ``M = int(mask_ratio * T' * H' * W')``, and the ids
    are in shuffled order. More patches in hidden lines than M are refused.

    Source: Huang et al. 2022, "Masked Autoencoders that Listen", section 3, masking of time, frequency or both.
    """
    op = "axis_masking"
    sides = checks.sizes(op, "grid", grid, 2)
    axes, num_patches = len(sides), math.prod(sides)
    shares = (share,) * axes if isinstance(share, int | float) else tuple(share)
    if len(shares) != axes or not all(0 <= x < 1 for x in shares):
        raise ValueError(f"{op}: share must be a number in [0, 1), or {axes} of them, one for each axis, got {share!r}")
    visible = _num_keep(op, batch_size, num_patches, mask_ratio, "masked")
    lines = [int(x * side) for x, side in zip(shares, sides, strict=True)]
    in_lines = num_patches - math.prod([side - hidden for side, hidden in zip(sides, lines, strict=True)])
    if in_lines > num_patches - visible:
        raise ValueError(
            f"{op}: lines of share {share} hold {in_lines} patches, more than mask_ratio {mask_ratio} of {num_patches} "
            "hides; lower share or raise mask_ratio"
        )
    draws = _draw((batch_size, sum(sides) + num_patches), generator, device)
    *draws, ties = draws.split([*sides, num_patches], dim=1)
    scores = ties.view(batch_size, *sides) / 2
    for axis, (draw, hidden) in enumerate(zip(draws, lines, strict=True)):
        along = (1,) * axis + (sides[axis],) + (1,) * (axes - axis - 1)
        scores = scores + (draw.argsort(dim=1) < hidden).view(batch_size, *along)
    return _of_equal_counts(scores.flatten(1), visible)


def masking_from_mask(mask: Tensor, num_keep: int | None = None) -> Masking:
    """The ids of a mask that the user brings, with the same count in every row or with different ones.

    Args:
        mask: ``[N, L]`` bool, True = removed; L at least 2.
        num_keep: K, places for visible patches: every row has 1 to K of them. None: every row has as many as the first.

    Returns:
        :class:`Masking`; both ``ids_keep`` and ``ids_mask`` ascend. With num_keep they are ``[N, K]`` and
        ``[N, L - 1]``, filled up with -1, and ``ids_restore`` gives a hidden patch K + its place in ``ids_mask``.

    Raises:
        TypeError: a mask that is not bool; a num_keep that is not an int.
        ValueError: fewer than two patches; num_keep below 1 or above L, or a row with no or more than num_keep visible
            patches; without num_keep, rows that differ in their count, or with nothing visible or nothing hidden, and
            no rows, which have no count.

    Without num_keep the count of visible patches becomes a shape, so a mask on a GPU costs one device synchronisation.
    With it nothing is read back. The counts of the rows are then checked on the CPU, elsewhere with
    ``MAE_KERNELS_DEBUG=1``; without that, a row with too many visible patches has the last of them hidden, a row with
    none has its first patch visible, and ``mask`` says so.

    Equivalent PyTorch, without num_keep::

        ids_shuffle = torch.argsort(mask, dim=1, stable=True)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
    """
    op = "masking_from_mask"
    checks.tensor(op, "mask", mask, ("N", "L"))
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool with True = removed, got {checks.dtype_name(mask)}; call .bool()")
    num_patches = mask.shape[1]
    if num_patches < 2:
        raise ValueError(f"{op}: mask must have at least two patches in a row, got shape {tuple(mask.shape)}")
    if num_keep is not None:
        checks.integer(op, "num_keep", num_keep)
        if not 0 < num_keep <= num_patches:
            raise ValueError(f"{op}: num_keep must be 1 to {num_patches}, the number of patches, got {num_keep}")
        return _masking_of(mask, num_patches - mask.sum(dim=1), num_keep, num_patches - 1)
    if mask.shape[0] == 0:
        raise ValueError(f"{op}: mask is empty, got shape {tuple(mask.shape)}")
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        n = next(n for n, masked in enumerate(counts) if masked != counts[0])
        raise ValueError(
            f"{op}: every row must hide the same number of patches, but row 0 hides {counts[0]} "
            f"and row {n} hides {counts[n]}; pass num_keep, the largest number of visible patches in a row"
        )
    visible = num_patches - counts[0]
    if not 0 < visible < num_patches:
        side = "visible" if visible == 0 else "masked"
        raise ValueError(f"{op}: mask leaves none of the {num_patches} patches {side}")
    return _of_equal_counts(mask, visible)


def _num_keep(op: str, batch_size: int, num_patches: int, mask_ratio: float, count: str) -> int:
    checks.mask_ratio(op, mask_ratio)
    if count not in ("visible", "masked"):
        raise ValueError(f"{op}: count must be 'visible' or 'masked', got {count!r}")
    checks.integer(op, "batch_size", batch_size)
    checks.integer(op, "num_patches", num_patches)
    if batch_size < 0 or num_patches < 1:
        raise ValueError(
            f"{op}: batch_size must not be negative and num_patches positive, got {batch_size} and {num_patches}"
        )
    visible = int(num_patches * (1 - mask_ratio)) if count == "visible" else num_patches - int(num_patches * mask_ratio)
    visible = operator.index(visible)  # a shape from here on: torch.compile(dynamic=True) would keep it symbolic
    if not 0 < visible < num_patches:
        side = "visible" if visible == 0 else "masked"
        raise ValueError(f"{op}: mask_ratio {mask_ratio} of {num_patches} patches leaves none {side}")
    return visible


def _draw(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    if generator is None:  # ONNX knows no generator, not even None
        return torch.rand(shape, device=device, dtype=torch.float32)
    return torch.rand(shape, device=device, dtype=torch.float32, generator=generator)


def _alike_in_frames(scores: Tensor, num_keep: int, frames: int) -> Masking:
    """The num_keep smallest scores ``[N, places]`` stay visible in every frame.

    The scores themselves are not repeated: equal ones might then be hidden in some of the frames.
    """
    mask = _of_equal_counts(scores, num_keep).mask
    return _of_equal_counts(mask.repeat(1, frames), frames * num_keep)


def _of_equal_counts(noise: Tensor, num_keep: int) -> Masking:
    return _masking_of(noise, None, num_keep, noise.shape[1] - num_keep)


def _masking_of(*args: Any) -> Masking:
    return Masking(*(decomposed(_masking, *args) if in_onnx_export() else _masking(*args)))


def _masking_check(noise: Tensor, counts: Tensor | None, num_keep: int, num_mask: int) -> None:
    if counts is None:
        return
    outside = (counts < 1) | (counts > num_keep)
    if outside.any():
        n = int(outside.nonzero()[0])
        raise ValueError(
            f"masking_from_mask: every row must have 1 to num_keep = {num_keep} visible patches, "
            f"but row {n} has {counts[n].item()}"
        )


def _masking_eager(
    noise: Tensor, counts: Tensor | None, num_keep: int, num_mask: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.sort(noise.contiguous(), dim=1, stable=True).indices
    # The inverse of a permutation is a scatter of the positions: no second sort.
    positions = torch.arange(noise.shape[1], device=noise.device).expand_as(ids)
    ids_restore = torch.empty_like(ids).scatter_(1, ids, positions)
    if counts is not None:
        counts = counts.clamp(1, num_keep)[:, None]
        ids_restore += (ids_restore >= counts) * (num_keep - counts)
        ids = ids.new_full((len(ids), num_keep + num_mask), -1).scatter_(1, ids_restore, positions)
    parts = ids.split([num_keep, num_mask], dim=1)
    ids_keep, ids_mask = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return ids_keep, ids_mask, ids_restore, ids_restore >= num_keep


def _masking_fake(
    noise: Tensor, counts: Tensor | None, num_keep: int, num_mask: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, num_patches = noise.shape
    return (
        noise.new_empty((n, num_keep), dtype=torch.int64),
        noise.new_empty((n, num_mask), dtype=torch.int64),
        noise.new_empty((n, num_patches), dtype=torch.int64),
        noise.new_empty((n, num_patches), dtype=torch.bool),
    )


_masking = register_op(
    "masking(Tensor noise, Tensor? counts, SymInt num_keep, SymInt num_mask) -> "
    "(Tensor ids_keep, Tensor ids_mask, Tensor ids_restore, Tensor mask)",
    eager=_masking_eager,
    fake=_masking_fake,
    check=_masking_check,
)
