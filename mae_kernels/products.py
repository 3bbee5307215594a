"""The three products of a linear layer, on AMD's processors by the faster of the ways that PyTorch has."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .registration import register_op


def _amd_family() -> int:
    """Of a processor with all the units of its family; 0 for others, and where PyTorch's oneDNN may not use them."""
    if not torch.backends.mkldnn.is_available() or {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & {*os.environ}:
        return 0
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:  # not on Linux
        return 0
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    is_whole = facts.get("vendor_id") == "AuthenticAMD" and "avx512_bf16" in facts["flags"].split()
    return int(facts["cpu family"]) if is_whole else 0


# On x86 PyTorch takes MKL for float32, which leaves half the width of AMD's newer units idle; for bfloat16 it takes
# oneDNN and adds the bias by itself. TFLOP/s so and of oneDNN alone, two threads, layers of ViT-B and its decoder, 16
# images (benchmarks/NOTES.md, "Matrix products"):
#                                forward       gradient of x   gradient of the weight
# family 26 (Zen 5), float32     0.22, 0.47    0.21, 0.46      0.21, 0.40
#                    bfloat16    0.89, 0.94    0.93, 0.92      0.88, 0.75
# family 25 (Zen 4), float32     0.19, 0.22    0.20, 0.22      0.19, 0.16
_FIRST_FAMILY = {
    ("forward", torch.float32): 25,
    ("forward", torch.bfloat16): 26,
    ("input", torch.float32): 25,
    ("weight", torch.float32): 26,
}
_AMD_FAMILY = _amd_family()
_FEWEST_PRODUCTS = 2**21  # with fewer, a call of oneDNN takes longer to begin than MKL to end


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., D] @ weight [O, D].T + bias [O]`` as ``[..., O]``; for code that has a gradient of its own."""
    if onednn_is_faster("forward", x, weight.shape[0]):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor, scratch: Tensor | None = None, divisor: int = 1) -> Tensor:
    """``grad [..., O] @ weight [O, D] / divisor`` as ``[..., D]``.

    ``scratch [..., D]`` is memory that nobody needs any more, which the result may take: on a CPU touching fresh memory
    costs as much as the whole of gelu.
    """
    if onednn_is_faster("input", grad, weight.shape[1]):
        product = _linear(grad, weight.t(), None)
        return product if divisor == 1 else product.div_(divisor)
    if scratch is None or torch.is_grad_enabled():  # PyTorch records nothing that writes into given memory
        return grad @ weight if divisor == 1 else grad @ weight / divisor
    out = scratch.view(-1, scratch.shape[-1])
    if divisor == 1:
        torch.mm(grad.flatten(0, -2), weight, out=out)
    else:
        torch.addmm(out, grad.flatten(0, -2), weight, beta=0, alpha=1 / divisor, out=out)
    return scratch


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad [..., O]``, ``x [..., D]`` -> ``[O, D]``: the sum over all rows of ``outer(grad, x)``."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return _weight_gradient(grad, x) if onednn_is_faster("weight", grad, x.shape[1]) else grad.t() @ x


def onednn_is_faster(product: str, x: Tensor, outputs: int) -> bool:
    """Whether oneDNN takes a product, ``"forward"``, or the gradient of ``"input"`` or ``"weight"``.

    Not where PyTorch has to see it: to differentiate it in other ways, to map over samples, to export, or to count.
    """
    first = _FIRST_FAMILY.get((product, x.dtype))
    if first is None or first > _AMD_FAMILY or x.device.type != "cpu":
        return False
    # The flag itself: torch 2.11 takes its function for true in whatever is compiled.
    if torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():  # nor may a graph ask for the number of samples
        return True
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0 or not torch._C._get_mkldnn_enabled():
        return False
    if product != "forward" and torch.is_grad_enabled():
        return False
    return x.numel() * outputs >= _FEWEST_PRODUCTS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    is_right = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
    if not is_right or x.numel() * weight.shape[0] < _FEWEST_PRODUCTS:  # in a graph that was made for other tensors
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # it is read without strides
    if x.ndim == 2 and len(x) >= 1024 and x.dtype == torch.float32 and weight.is_contiguous():
        # Of many patches that were gathered a moment ago: 6.2 ms instead of 10 (benchmarks/NOTES.md).
        return F.conv2d(as_pixels(x), weight[:, :, None, None], bias)[0, :, 0].t().contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _sum_of_outer_products(grad: Tensor, x: Tensor) -> Tensor:
    (rows, outputs), inputs = grad.shape, x.shape[1]
    if grad.numel() * inputs < _FEWEST_PRODUCTS:
        return grad.t() @ x
    if rows < 1024 or outputs < inputs:
        return _product(grad.t(), x.t(), None)
    # Over many rows a 1x1 convolution takes the same time or less, and adds as accurately as MKL.
    weight = x.new_empty((outputs, inputs, 1, 1))
    _, g_weight, _ = torch.ops.aten.convolution_backward(
        as_pixels(grad), as_pixels(x), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return g_weight[:, :, 0, 0]


def as_pixels(rows: Tensor) -> Tensor:
    """Rows ``[B, E]`` as one image of B pixels ``[1, E, 1, B]``, of which a 1x1 convolution makes a product."""
    # The permutation makes all four strides those of channels last; with any other PyTorch copies, which takes twice
    # the memory and adds in a less accurate order.
    return rows[None, None].permute(0, 3, 1, 2)


_linear = register_op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    eager=_product,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    has_kernels=False,
)
_weight_gradient = register_op(
    "weight_gradient(Tensor grad, Tensor x) -> Tensor",
    eager=_sum_of_outer_products,
    fake=lambda grad, x: grad.new_empty((grad.shape[1], x.shape[1])),
    has_kernels=False,
)
