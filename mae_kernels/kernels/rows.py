"""How copies of token rows are split among programs."""

from functools import cache

from .host import cdiv, next_power_of_2
from .tiles import RowTiles


@cache
def row_tiles(d: int) -> RowTiles:
    """Widths that pad D least, and the widest of them; 2048 values at a time.

    With 4 warps 2048 values are 16 a thread, two 128-bit accesses each way in bfloat16 and four in float32, in at most
    44 registers, 80 with sums: an H200 moves them at 74 to 110 % of the rate of a clone. Padding costs lanes, not
    bytes: masked lanes do not access memory.
    """
    widths = [min(1024, next_power_of_2(max(d, 16)))]
    while widths[-1] > 64:
        widths.append(widths[-1] // 2)
    width = min(widths, key=lambda w: (cdiv(d, w) * w, -w))
    return RowTiles(rows=2048 // width, width=width)


def split_samples(n: int, blocks: int) -> tuple[int, int]:
    """Splits of a sum over samples, and samples in each, when every split takes ``blocks`` programs.

    About 2048 programs: 16 for each multiprocessor of a large chip.
    """
    per_split = cdiv(n, max(1, min(n, 2048 // blocks)))
    return cdiv(n, per_split), per_split
