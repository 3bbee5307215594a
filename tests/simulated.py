"""Matrix products as a chip's matrix instructions compute them, to the bit and on a CPU: mmasim knows how each adds."""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# mmasim's one compiled part, for operands of float32 and float64, would ask for ninja and a C++ compiler at import.
sys.modules.setdefault("mmasim.arithmetic.fma", types.ModuleType("mmasim.arithmetic.fma"))
from mmasim import MMAOperation  # noqa: E402
from mmasim.amd import MFMA  # noqa: E402
from mmasim.nv_ptx import MMA, WGMMA  # noqa: E402

CHIPS = ("sm_80", "sm_90", "gfx942")
_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


@functools.cache
def instruction(chip: str, dtype: torch.dtype, sum_dtype: torch.dtype = torch.float32) -> MMAOperation:
    operand, total = _NAMES[dtype], _NAMES[sum_dtype]
    if chip == "sm_80":
        return MMA("Ampere", f"m16n8k16.{total}.{operand}.{operand}.{total}")
    if chip == "sm_90":
        return WGMMA("Hopper", f"m64n16k16.{total}.{operand}.{operand}")
    assert chip == "gfx942"
    return MFMA("CDNA3", f"f32_16x16x16_{operand}")  # it has sums of float32 only


def product(chip: str, a: Tensor, b: Tensor, acc: Tensor | None = None) -> Tensor:
    """``acc + a [..., M, K] @ b [..., K, N]`` in the dtype of acc, float32 without: one chain of instructions along K.

    How instructions share out M and N does not matter: the elements of a result do not touch each other.
    """
    shape = (*a.shape[:-1], b.shape[-1])
    acc = a.new_zeros(shape, dtype=torch.float32) if acc is None else acc
    step = instruction(chip, a.dtype, acc.dtype)
    rows, columns = a[..., :, None, :].expand(*shape, -1), b.mT[..., None, :, :].expand(*shape, -1)
    total = acc.to(step.c_type)
    for each in zip(rows.split(step.k, dim=-1), columns.split(step.k, dim=-1), strict=True):
        total = step.dpa(*each, total)
    return total.to(acc.dtype)


@contextlib.contextmanager
def interpreted_dots(chip: str, sum_dtype: torch.dtype = torch.float32) -> Iterator[list[tuple[int, ...]]]:
    """Triton's interpreter computes each ``tl.dot`` of float16 as the chip does; yields the shapes of their results.

    Other dots are left as they are. ``sum_dtype`` is that of the chip's sums, whatever the kernel asked for.
    """
    create_dot, shapes = InterpreterBuilder.create_dot, []

    def simulated(builder, a, b, d, *options):
        if not a.data.dtype == b.data.dtype == np.float16:
            return create_dot(builder, a, b, d, *options)
        shapes.append(d.data.shape)
        operands = (torch.from_numpy(np.ascontiguousarray(x.data)) for x in (a, b, d))
        left, right, acc = operands
        total = product(chip, left, right, acc.to(sum_dtype)).to(acc.dtype)
        return TensorHandle(total.numpy(), d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", simulated):
        yield shapes
