"""How long a launch should take with some tiles: what its code does, on a chip as its data sheet says."""

import math
from dataclasses import dataclass

from mae_kernels import inspect
from mae_kernels.inspect import F32, U8, Specimen
from mae_kernels.kernels.tuned import BlockTiles, CropTiles, GemmTiles, LossTiles, RowTiles, Tiles


@dataclass(frozen=True)
class Chip:
    """Multiprocessors, KiB of shared memory of each, GB/s, dense bf16 TFLOP/s and GHz.

    Shared memory: CUDA C++ programming guide, technical specifications per compute capability; so are the limits that
    all three have in common. The rest: data sheets of A100 SXM 80 GB, H200 SXM and B200; the clock is the one that
    gives the data sheet's FLOPs.
    """

    multiprocessors: int
    shared: int
    bandwidth: float
    tflops: float
    clock: float


CHIPS = {
    "sm_80": Chip(108, 164, 2039, 312, 1.41),
    "sm_90": Chip(132, 228, inspect.BANDWIDTH, inspect.TFLOPS, 1.83),
    "sm_100": Chip(148, 228, 8000, 2250, 1.86),
}
WARPS, REGISTERS, PROGRAMS = 64, 65536, 32  # of a multiprocessor
# Assumed, of any chip: what a launch adds; a round trip to memory under load, and under that of a product; the shares
# of the data sheet's bandwidth and FLOPs that a good kernel gets; bytes that a multiprocessor gets out of L2 and out of
# shared memory in a cycle; cycles between instructions of a warp that has a multiprocessor to itself, and from a step
# of a product to the next besides its operations.
LAUNCH, LATENCY, IDLE_LATENCY = 2e-6, 0.7e-6, 0.4e-6
BANDWIDTH_SHARE, FLOPS_SHARE = 0.9, 0.75
L2_BYTES, SHARED_BYTES, PER_INSTRUCTION, BARRIER = 32, 128, 2, 64


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: of a thread, a program, and as instructions that a warp issues."""

    registers: int
    spills: int
    shared: int
    mma: str
    load_bits: int
    store_bits: int
    instructions: int


@dataclass(frozen=True)
class Demand:
    """What a program of a launch does, and all of them together."""

    trips: float  # round trips to memory that a program waits for one after the other
    repeats: float  # how often it runs through its code
    moved: float  # bytes from and to memory, of all programs
    through_l2: float = 0  # bytes, read by several programs
    through_shared: float = 0  # bytes that feed tensor cores
    flops: float = 0  # on tensor cores, padding included, in units of bf16
    lanes: float = 0  # other operations of a thread, where repeats does not count them
    exposed: float = 0  # trips of a program that its product does not overlap
    steps: float = 0  # of a program's product


def resident(resources: Resources, num_warps: int, chip: Chip) -> int:
    """Programs that a multiprocessor holds: registers come 256 to a warp, each program takes 1 KiB more to itself."""
    per_warp = max(math.ceil(resources.registers * 32 / 256) * 256, 256)
    shared = chip.shared * 1024 // (resources.shared + 1024)
    return min(WARPS // num_warps, REGISTERS // (per_warp * num_warps), shared, PROGRAMS)


def predicted(demand: Demand, resources: Resources, num_warps: int, programs: int, chip: Chip) -> float:
    """Seconds of a launch.

    time = launch + max(memory, l2, compute + waves (exposed latency + steps barrier), waves life)
    memory = bytes / (0.9 bandwidth)
    life = trips latency + repeats instructions 2 cycles;  waves = ceil(programs / (multiprocessors resident))
    compute = fullest max(flops / (0.75 rate), shared bytes / rate, lanes / 128 a cycle, instructions / 4 a cycle)
    fullest = ceil(programs / multiprocessors) / (programs / multiprocessors)

    ``waves life`` is Little's law: what is in flight is resident programs times the bytes of one of their trips.
    """
    multiprocessors, cycles = chip.multiprocessors, chip.multiprocessors * chip.clock * 1e9
    fullest = math.ceil(programs / multiprocessors) / (programs / multiprocessors)
    waves = math.ceil(programs / (multiprocessors * max(resident(resources, num_warps, chip), 1)))
    instructions, cycle = demand.repeats * resources.instructions, 1e-9 / chip.clock
    latency = IDLE_LATENCY if demand.flops else LATENCY
    compute = fullest * max(
        demand.flops / (FLOPS_SHARE * chip.tflops * 1e12),
        demand.through_shared / (SHARED_BYTES * cycles),
        demand.lanes / (128 * cycles),
        programs * num_warps * instructions / (4 * cycles),
    )
    return LAUNCH + max(
        demand.moved / (BANDWIDTH_SHARE * chip.bandwidth * 1e9),
        demand.through_l2 / (L2_BYTES * cycles),
        compute + waves * (demand.exposed * latency + demand.steps * BARRIER * cycle),
        waves * (demand.trips * latency + instructions * PER_INSTRUCTION * cycle),
    )


def demand(specimen: Specimen, tiles: Tiles, grid: tuple[int, ...]) -> Demand:
    """What the kernels do with these tiles, counted by hand from their code."""
    args, programs, moved = specimen.args, math.prod(grid), specimen.bytes
    if isinstance(tiles, BlockTiles):
        return Demand(1, 1, moved)
    if isinstance(tiles, LossTiles):
        pred, (_, c, _, _), (ph, _) = args[0], args[1].shape, args[4]
        turns = math.ceil(pred.shape[0] * pred.shape[1] / (programs * tiles.patches))
        passes = math.ceil(c * ph / tiles.rows)
        return Demand(turns * (3 if passes == 1 else 1 + 3 * passes), turns, moved)
    if isinstance(tiles, CropTiles):
        # Boxes of 290 x 390 pixels to 224 x 224: 8 taps to a pixel, about 15 operations each; 4 rows of a margin.
        lines = 290 / 224 * (tiles.rows + 4) / tiles.lines + 0.5  # the last of them are half full
        taps = lines * tiles.lines * tiles.cols * 8
        lanes = programs * (15 * taps + lines * tiles.lines * tiles.rows * tiles.cols)
        return Demand(lines * 3, 1, moved, lanes=lanes)
    if isinstance(tiles, RowTiles):
        d = args[0].shape[-1]
        if len(grid) == 1:
            return Demand(1 + math.ceil(d / tiles.width), 1, moved)
        samples = math.ceil(args[0].shape[0] / grid[2])
        # Partial sums are written and read once more.
        rows = patches_of(specimen) if specimen.kernel == "position_gradient" else grid[0] + args[4]
        return Demand(2 * samples, samples, moved + 2 * 4 * grid[2] * rows * d)
    return product_demand(specimen, tiles, grid)


def product_demand(specimen: Specimen, tiles: GemmTiles, grid: tuple[int, ...]) -> Demand:
    """A product of m x n values to a program, ``depth`` at a time: operands of a step come through L2 once a program.

    float32 is three products of TF32, at half the rate, of halves that are split in registers.
    """
    args, programs, moved = specimen.args, math.prod(grid), specimen.bytes
    forward = specimen.kernel == "patch_embed"
    images, weight, dtype = (args[0], args[1], args[8]) if forward else (args[1], args[2], args[7])
    d, c, ph, pw = weight.shape
    m, n, depth = sides(specimen, tiles)
    pixels, grads, trips = images.itemsize * pw / tiles.cols, args[0].itemsize, 1
    if forward:
        a, b, steps = pixels, dtype.itemsize, math.ceil(c * ph / tiles.rows)
    elif specimen.kernel == "weight_gradient":
        a, b, steps = grads, pixels, math.ceil(math.ceil(args[3].numel() / grid[2]) / depth)
        moved += 2 * 4 * grid[2] * weight.numel()  # of partial sums
        trips = 2  # the places of patches are read on the way
    else:
        a, b, steps = grads, dtype.itemsize, math.ceil(d / depth)
    work = 6 if dtype == F32 else 1
    # Conversions of a value: 8-bit pixels are scaled and normalised, other dtypes rounded, float32 split into halves.
    converted = 6 if images.dtype == U8 else 2 if images.dtype != dtype else 0
    on_m = converted if forward else 2 * (args[0].dtype != dtype)
    on_n = converted if specimen.kernel == "weight_gradient" else 0
    split = 6 * (dtype == F32)
    everything = programs * steps * depth
    operands = everything * (m + n * max(tiles.num_warps // 4, 1)) * (3 if split else 1)  # four warps share the n side
    return Demand(
        trips=2 + trips * steps / (tiles.num_stages - 1),
        repeats=1,
        moved=moved,
        through_l2=everything * (m * a + n * b),
        through_shared=operands * dtype.itemsize,
        flops=2 * everything * m * n * work,
        lanes=everything * (m * (on_m + split) + n * (on_n + split)),
        exposed=3,
        steps=steps,
    )


def sides(specimen: Specimen, tiles: GemmTiles) -> tuple[int, int, int]:
    """A program's product of m x depth with depth x n values."""
    values = tiles.rows * tiles.cols
    return {
        "patch_embed": (tiles.tokens, tiles.width, values),
        "weight_gradient": (tiles.width, values, tiles.tokens),
        "image_gradient": (tiles.tokens, values, tiles.width),
    }[specimen.kernel]


def patches_of(specimen: Specimen) -> int:
    """L of a launch whose arguments hold ids."""
    args = specimen.args
    return {
        "masking": lambda: args[0].shape[1],
        "gather_tokens": lambda: args[0].shape[1],
        "gather_tokens_backward": lambda: args[2],
        "scatter_mask_tokens": lambda: args[2].shape[1],
        "scatter_mask_tokens_backward": lambda: args[1].shape[1],
        "masked_mse": lambda: math.prod(args[1].shape[2:]) // math.prod(args[4]),
        "masked_mse_backward": lambda: 0,
        "patch_embed": lambda: math.prod(args[0].shape[2:]) // math.prod(args[1].shape[2:]),
        "patch_embed_backward": lambda: math.prod(args[1].shape[2:]) // math.prod(args[2].shape[2:]),
    }[specimen.op]()
