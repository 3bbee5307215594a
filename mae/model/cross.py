"""Blocks of CrossMAE's decoder, and which hidden patches are predicted where not all are."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from mae.model.block import Heads, Mlp, feed_forward, linear, norm_linear
from mae_kernels import Masking
from mae_kernels.untouched import untouched


class CrossAttention(Heads):
    """Attention of some tokens to others, the memory; :class:`CrossBlock` makes fewer passes."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, keys: Tensor | None = None) -> Tensor:
        """Normed tokens ``[N, S, D]`` in and out. Arguments: as of :class:`CrossBlock`."""
        return self.attend(linear(memory, self.kv), self.q(x), keys)


class CrossBlock(nn.Module):
    """A decoder's block without attention among its tokens: what becomes of one does not depend on the others.

    Source: Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders", whose memory is of the encoder's
    width, and for each block another learned mix of the encoder's layers; here it is one, what decoder_embed makes of
    the encoder's last layer.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        # Named as a Block's parts, so that whoever looks for those of blocks finds these.
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor, keys: Tensor | None = None) -> Tensor:
        """Tokens ``[N, S, D]`` that attend to memory ``[N, T, D]``, of which keys ``[N, T]`` are False for padding."""
        attn, norm = self.attn, self.norm1
        if untouched(attn, CrossAttention) and untouched(norm, nn.LayerNorm) and untouched(q := attn.q, nn.Linear):
            attended = attn.attend(linear(memory, attn.kv), norm_linear(x, norm, q.weight, q.bias), keys)
        else:
            attended = attn(norm(x), memory, keys)
        return feed_forward(x + attended, self.norm2, self.mlp)


def predicted(masking: Masking, share: float) -> Masking:
    """The masking with that share of the hidden patches of each sample as its hidden ones: what a step predicts.

    A number that is mixed from all ids of a sample's hidden patches orders them, and the first are taken: a pure
    function of the mask, on every device the same, and for random masks as good as a draw. The order of ids_mask has no
    part in it, since most masks list their patches from the top. The same mask gets the same subset, so there have to
    be many masks: of those of :func:`mae_kernels.grid_masking` there are a handful, and some patches would never come.

    Args:
        masking: its ids_keep and ids_restore are passed on as they are.
        share: above 0; of 1 the masking itself is the result. At least one patch of each sample is predicted.

    Returns:
        :class:`mae_kernels.Masking` with ids_mask ``[N, P]``, -1 where a sample has fewer, and the mask of these alone.
    """
    if share == 1:
        return masking
    ids = masking.ids_mask
    present = ids >= 0
    mixed = torch.where(present, _mix(ids + 1), 0)
    key = _mix(mixed + mixed.sum(dim=1, keepdim=True))
    order = torch.where(present, key, _PRIME).argsort(dim=1, stable=True)
    ids = ids.gather(1, order[:, : predicted_count(ids.shape[1], share)])
    counts = _part(present.sum(dim=1, keepdim=True), share).clamp(min=1)
    ids = torch.where(torch.arange(ids.shape[1], device=ids.device) < counts, ids, -1)
    n, num_patches = masking.mask.shape
    mask = masking.mask.new_zeros((n, 1 + num_patches)).scatter(1, ids + 1, True)  # the first column is for ids of -1
    return masking._replace(ids_mask=ids, mask=mask[:, 1:])


def predicted_count(hidden: int, share: float) -> int:
    """How many of that many hidden patches are predicted."""
    return max(1, _part(hidden, share))


_Count = TypeVar("_Count", int, Tensor)


def _part(count: _Count, share: float) -> _Count:
    # In whole numbers, so that a shape and a count on any device are rounded alike.
    return (count * round(share * 2**20) + 2**19) // 2**20


_PRIME = 2**31 - 1  # a product of it and a factor fits into 63 bits


def _mix(x: Tensor) -> Tensor:
    """Whole numbers to others from 0 to below the prime, those of neighbours far apart."""
    for factor in (48271, 69621, 16807):
        x = x % _PRIME * factor % _PRIME
        x = x ^ x >> 15
    return x % _PRIME
