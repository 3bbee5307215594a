"""Which patches are hidden: random masks, and masks that the user brings."""

import operator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_kernels import checks
from mae_kernels.registration import decomposed, in_onnx_export, register_op


class Masking(NamedTuple):
    """A mask of L patches per sample, K of them visible and M = L - K hidden, in the forms that the ops take."""

    ids_keep: Tensor  # [N, K] int64, the visible patches in shuffled order
    ids_mask: Tensor  # [N, M] int64, the hidden patches in shuffled order
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
        noise: ``[N, L]`` floating, in place of ``torch.rand(N, L)``: the smallest values stay visible.
        generator: random generator for the noise, on ``device``.
        device: where the mask is made; the noise's device when noise is given.
        count: the side that truncation counts. ``"visible"``: ``K = int(L * (1 - mask_ratio))`` as published;
            ``"masked"``: ``M = int(L * mask_ratio)`` as in VideoMAE. They differ: 196 patches at 0.9 keep 19 or 20.

    Returns:
        :class:`Masking` with tensors on the noise's device.

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
    if noise is None:
        # ONNX knows no generator, not even None.
        options = {} if generator is None else {"generator": generator}
        noise = torch.rand(batch_size, num_patches, device=device, dtype=torch.float32, **options)
    else:
        checks.tensor(op, "noise", noise, (batch_size, num_patches))
        checks.floating(op, "noise", noise)
        if generator is not None or device is not None:
            raise ValueError(f"{op}: noise fixes the mask and its device; leave out generator and device")
    return Masking(*_run(noise, visible))


def masking_from_mask(mask: Tensor) -> Masking:
    """The ids of a mask that the user brings: blocks, grids, fixed regions.

    Args:
        mask: ``[N, L]`` bool, True = removed, with the same count in every row.

    Returns:
        :class:`Masking`; both ``ids_keep`` and ``ids_mask`` ascend.

    Raises:
        TypeError: a mask that is not bool.
        ValueError: rows that differ in their count, or with nothing visible or nothing hidden; no rows, which have no
            count.

    The count of visible patches becomes a shape, so a mask on a GPU costs one device synchronisation.

    Equivalent PyTorch::

        ids_shuffle = torch.argsort(mask, dim=1, stable=True)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
    """
    op = "masking_from_mask"
    checks.tensor(op, "mask", mask, ("N", "L"))
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool with True = removed, got {checks.dtype_name(mask)}; call .bool()")
    if mask.numel() == 0:
        raise ValueError(f"{op}: mask is empty, got shape {tuple(mask.shape)}")
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        n = next(n for n, masked in enumerate(counts) if masked != counts[0])
        raise ValueError(
            f"{op}: every row must hide the same number of patches, but row 0 hides {counts[0]} "
            f"and row {n} hides {counts[n]}"
        )
    visible = mask.shape[1] - counts[0]
    if not 0 < visible < mask.shape[1]:
        side = "visible" if visible == 0 else "masked"
        raise ValueError(f"{op}: mask leaves none of the {mask.shape[1]} patches {side}")
    return Masking(*_run(mask, visible))


def _run(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return decomposed(_masking, noise, num_keep) if in_onnx_export() else _masking(noise, num_keep)


def _masking_eager(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids_shuffle = torch.sort(noise.contiguous(), dim=1, stable=True).indices.tensor_split([num_keep], dim=1)
    ids_keep, ids_mask = (part.clone(memory_format=torch.contiguous_format) for part in ids_shuffle)
    del ids_shuffle
    # The inverse of a permutation is a scatter of the positions: no second sort.
    positions = torch.arange(noise.shape[1], device=noise.device)
    ids_restore = torch.empty(noise.shape, dtype=torch.int64, device=noise.device)
    ids_restore.scatter_(1, ids_keep, positions[:num_keep].expand_as(ids_keep))
    ids_restore.scatter_(1, ids_mask, positions[num_keep:].expand_as(ids_mask))
    return ids_keep, ids_mask, ids_restore, ids_restore >= num_keep


def _masking_fake(noise, num_keep):
    n, num_patches = noise.shape
    return (
        noise.new_empty((n, num_keep), dtype=torch.int64),
        noise.new_empty((n, num_patches - num_keep), dtype=torch.int64),
        noise.new_empty((n, num_patches), dtype=torch.int64),
        noise.new_empty((n, num_patches), dtype=torch.bool),
    )


_masking = register_op(
    "masking(Tensor noise, SymInt num_keep) -> (Tensor ids_keep, Tensor ids_mask, Tensor ids_restore, Tensor mask)",
    eager=_masking_eager,
    fake=_masking_fake,
)
