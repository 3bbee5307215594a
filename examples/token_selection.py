"""Tokens are selected by ids and put back as two other projects do it, and by the ops in their place.

V-JEPA 2 selects the tokens of several masks, and nnssl fills a volume with mask tokens. It prints that results and
gradients are equal to the bit, how long each takes, and what is kept for the backward pass. It takes ten seconds on a
CPU.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from mae_kernels import gather_tokens, random_masking, scatter_mask_tokens


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:  # [N, L, D], each [N, K] -> [N * len(masks), K, D]
    """As V-JEPA 2 selects the tokens of several masks."""
    selected = []
    for ids in masks:
        index = ids.unsqueeze(-1).repeat(1, 1, x.shape[2])  # each id D times
        selected.append(torch.gather(x, 1, index))
    return torch.cat(selected)


def apply_masks_on_ops(x: Tensor, masks: list[Tensor]) -> Tensor:
    return torch.cat([gather_tokens(x, ids) for ids in masks])


def restore(x: Tensor, mask_token: Tensor, ids_keep: Tensor, num_patches: int) -> Tensor:  # [N, K, D] -> [N, L, D]
    """As nnssl fills a volume, one sample after the other."""
    restored = torch.zeros(len(x), num_patches, x.shape[2], dtype=x.dtype, device=x.device)
    for i, kept in enumerate(ids_keep):
        is_hidden = torch.ones(num_patches, dtype=torch.bool, device=x.device)
        is_hidden[kept] = False
        restored[i, kept] = x[i]
        restored[i, is_hidden] = mask_token[0].expand(num_patches - len(kept), -1)
    return restored


def restore_on_ops(x: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    return scatter_mask_tokens(x, mask_token, ids_restore, num_prefix=0)


def trained(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The result for the inputs, and the gradient of each of them."""
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def kept_for_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Megabytes that autograd holds until the backward pass, besides the inputs."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        _ = function(*inputs)  # as long as the result lives, no address is used twice
    for x in inputs:
        kept.pop(x.data_ptr(), None)
    return sum(kept.values()) / 1e6


def compare(name: str, before: Callable, after: Callable, inputs: list[Tensor], steps: int) -> None:
    inputs = [x.requires_grad_() for x in inputs]
    result = before(*inputs)
    gradient = torch.randint(-8, 9, result.shape).to(result.dtype)  # sums of whole numbers are exact in any order
    theirs, ours = (trained(way, inputs, gradient) for way in (before, after))
    assert all(map(torch.equal, theirs, ours)), f"{name}: the results or the gradients differ"
    milliseconds = [], []
    for _ in range(steps):
        for way, taken in zip((before, after), milliseconds, strict=True):  # in turn: other load slows down both
            start = perf_counter()
            trained(way, inputs, gradient)
            taken.append(1e3 * (perf_counter() - start))
    theirs, ours = map(median, milliseconds)
    print(f"{name}: equal; {theirs:.1f} ms before, {ours:.1f} ms after, {theirs / ours:.1f} times as fast")
    theirs, ours = (kept_for_backward(way, inputs) for way in (before, after))
    print(f"{name}: {theirs:.2f} MB kept for the backward pass before, {ours:.2f} MB after")


def main(steps: int) -> None:
    torch.manual_seed(0)
    clips = torch.randn(4, 8 * 14 * 14, 384)  # 16 frames of 224 x 224 in patches of 2 x 16 x 16
    masks = [random_masking(*clips.shape[:2], ratio).ids_keep for ratio in (0.75, 0.75)]
    compare("apply_masks", lambda x: apply_masks(x, masks), lambda x: apply_masks_on_ops(x, masks), [clips], steps)
    masking = random_masking(4, 12**3)  # volumes of 96 x 96 x 96 in patches of 8 x 8 x 8
    visible, mask_token = torch.randn(4, masking.ids_keep.shape[1], 384), torch.randn(1, 1, 384)
    compare(
        "restore", lambda x, token: restore(x, token, masking.ids_keep, 12**3),
        lambda x, token: restore_on_ops(x, token, masking.ids_restore), [visible, mask_token], steps,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
