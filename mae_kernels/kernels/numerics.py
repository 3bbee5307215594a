"""A rounding that means the same on a chip and in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest, ties to even."""
    # The interpreter cuts the lower bits off, and mistakes subnormal numbers (Triton 3.6 to 3.9).
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        upper = tl.where(x == x, nearest, bits | 0x00400000) >> 16  # a NaN stays one without its lower bits
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)
