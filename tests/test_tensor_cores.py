"""What the matrix instructions of a chip make of our products: how far sums stray, and to which side."""

import pytest
import torch
from cases import BF16, F16, F32, crop_inputs
from conftest import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mae_kernels import random_resized_crop, reference, use_backend
from mae_kernels.patch_embed import _product_in_float32

pytest.importorskip("mmasim")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from simulated import CHIPS, interpreted_dots, product  # noqa: E402

each_chip = pytest.mark.parametrize("chip", CHIPS)
each_sign = pytest.mark.parametrize("sign", ["either", "positive"])
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is asked to simulate a chip's dots")

# Mean error of one chain toward zero, in units of the sums' size, of products of either sign and of positive ones: the
# largest for 6 seeds. NVIDIA's chips cut off what does not fit; gfx942 rounds to nearest, and its figures are noise.
BIAS = {
    ("sm_80", 768): (5.6e-7, 2.9e-6),
    ("sm_80", 12_544): (1.3e-5, 1.2e-4),
    ("sm_90", 768): (5.1e-7, 1.4e-6),
    ("sm_90", 12_544): (1.1e-5, 5.3e-5),
    ("gfx942", 768): (1.8e-8, 1.4e-8),
    ("gfx942", 12_544): (1.1e-7, 4.6e-8),
}


@pytest.fixture(autouse=True)
def one_thread():
    """A simulated step is too small to be shared: where other processes are at work, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Vendor(TorchDispatchMode):
    """Products of half precision are those that the vendor's library has a chip compute, each in one chain."""

    def __init__(self, chip: str):
        super().__init__()
        self.chip = chip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.bmm):
            return func(*args, **(kwargs or {}))
        a, b, *out_dtype = args
        return product(self.chip, a, b).to(*out_dtype or [a.dtype])


def operands(k: int, sign: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients and patches ``[K, 16]``, and the sum over K of their products in float64."""
    both = torch.randn(2, k, 16)
    grad, patches = (both.abs() if sign == "positive" else both).to(BF16)
    return grad, patches, grad.double().t() @ patches.double()


def in_parts(grad: Tensor, patches: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    return grad.view(parts, -1, 16).mT, patches.view(parts, -1, 16)


def error_and_bias(sums: Tensor, gold: Tensor) -> tuple[float, float]:
    """Root mean square, and mean with the sign of the sum: both in units of the sums' size."""
    off, size = sums.double() - gold, gold.square().mean().sqrt()
    return (off.square().mean().sqrt() / size).item(), ((off * gold.sign()).mean() / size).item()


@each_sign
@pytest.mark.parametrize("k", [768, pytest.param(12_544, marks=pytest.mark.slow)])
@each_chip
def test_a_weight_gradient_is_as_good_as_one_chain(chip, k, sign):
    """One chain strays far less than bfloat16 rounds, if toward zero where a chip cuts off; parts would stray less."""
    grad, patches, gold = operands(k, sign)
    (error, bias), (error_4, bias_4), (error_16, bias_16) = (
        error_and_bias(product(chip, *in_parts(grad, patches, n)).sum(0), gold) for n in (1, 4, 16)
    )
    most = BIAS[chip, k][sign == "positive"]
    with Vendor(chip):
        ours, our_bias = error_and_bias(_product_in_float32(grad, patches), gold)
    assert ours <= 2 * error
    assert abs(our_bias) <= 2 * most
    assert error <= error_and_bias(gold.to(BF16), gold)[0] / 8
    assert max(error_4, error_16) <= error / 1.2
    if chip != "gfx942":
        assert bias < -most / 2
        assert abs(bias_16) < abs(bias_4) / 2 < abs(bias) / 4
        assert error_and_bias(grad.float().t() @ patches.float(), gold)[0] < error


@each_sign
@each_chip
def test_worse_orders_are_noticed(chip, sign):
    """Sums of parts in bfloat16, or a chain that begins with a larger sum, such as that of steps before."""
    grad, patches, gold = operands(k := 768, sign)
    error, _ = error_and_bias(product(chip, grad.t(), patches), gold)
    with Vendor(chip):
        left, right = in_parts(grad, patches, 16)
        assert error_and_bias((left @ right).sum(0), gold)[0] > 2 * error
    before = (16 * gold).float()
    worse, bias = error_and_bias(product(chip, grad.t(), patches, before).double() - before, gold)
    assert worse > 2 * error
    assert abs(bias) > 2 * BIAS[chip, k][sign == "positive"] or chip == "gfx942"


@triton.jit
def dot_kernel(p_a, p_b, p_acc, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b, acc = tl.load(p_a + m * K + k[None, :]), tl.load(p_b + k[:, None] * N + n), tl.load(p_acc + m * N + n)
    tl.store(p_acc + m * N + n, tl.dot(a, b, acc))


@interpreted
@each_chip
def test_dots_are_simulated_to_the_bit(chip):
    a, b, acc = torch.randn(32, 64).to(F16), torch.randn(64, 16).to(F16), torch.randn(32, 16)
    ours, plain = acc.clone(), acc.clone()
    dot_kernel[(1,)](a, b, plain, 32, 16, 64)
    with interpreted_dots(chip) as dots:
        dot_kernel[(1,)](a, b, ours, 32, 16, 64)
    assert dots == [(32, 16)]
    assert torch.equal(ours, product(chip, a, b, acc))
    assert not torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def crops(chip: str, sum_dtype: torch.dtype = F32) -> tuple[int, float, float]:
    """Most levels off the interpreter's own pixels, the share of pixels off, and most levels off float64."""
    inputs = crop_inputs(2, 3, 48, 80, (16, 32))
    gold = reference.random_resized_crop(**inputs, dtype=torch.float64, rounded=False).clamp(0, 255)
    with use_backend("triton"):
        plain = random_resized_crop(**inputs)
        with interpreted_dots(chip, sum_dtype) as dots:
            ours = random_resized_crop(**inputs)
    assert dots
    off = (ours.int() - plain.int()).abs()
    return off.max().item(), (off > 0).double().mean().item(), (ours - gold).abs().max().item()


@interpreted
@each_chip
def test_kernels_crop_the_same_pixels(chip):
    """Measured: none of 3,072 differs; of sums in float16 3 of 100 would, and more than float64 allows."""
    most, share, off = crops(chip)
    assert most <= 1
    assert share <= 0.001
    assert off <= 0.5 + 2**-8
    _, share, off = crops(chip, F16)
    assert share > 0.01
    assert off > 0.5 + 2**-8
