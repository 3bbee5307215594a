"""Arithmetic of launchers. Triton's functions of these names, which kernels may call too, take the host 4 µs a call."""

from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Of a table or ids that may be left out."""
    return (0, 0) if x is None else x.stride()
