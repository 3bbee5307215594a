"""What each kernel compiles to on each chip, told without a GPU: ``python -m mae_kernels.inspect``.

The launchers run as in training, on tensors without memory, and only the last step, the launch, is left out: tiles,
dtypes, alignments and options are the library's own.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

# Memory in GB/s and dense bf16 TFLOP/s of an H200, round figures of NVIDIA's data sheet.
BANDWIDTH, TFLOPS = 4800, 989

F32, BF16, U8, I64 = torch.float32, torch.bfloat16, torch.uint8, torch.int64
SHORT = {F32: "fp32", BF16: "bf16", U8: "uint8"}

# A step of ViT-B/16: L patches of E values per image, K of them visible and M masked; d is the decoder's width.
N, C, IMAGE, PATCH, D, d = 256, 3, 224, 16, 768, 512
L, K, M, E = 196, 49, 147, C * PATCH**2


@dataclass(frozen=True)
class Specimen:
    """A launch, and what its kernel has to move and to compute at least.

    Each input element in use is read once, each output element written once. Of images and predictions count the
    patches in use, of partial sums only their sum; mean and std do not count.
    """

    kernel: str  # the name of its function, less _kernel
    variant: str
    op: str  # of mae_kernels.kernels
    args: tuple
    bytes: int
    flops: int = 0


def specimens() -> Iterator[Specimen]:
    yield masking("masking", L, 4)
    yield masking("masking", 1568, 4)
    yield masking("masking_of_order", 6272, 8)  # more than the kernel sorts: it reads the order that PyTorch sorted
    for specimen in (gather_tokens, gather_tokens_backward, scatter_mask_tokens, scatter_mask_tokens_backward):
        yield from map(specimen, (BF16, F32))
    yield scatter_mask_tokens_backward(BF16, learned=True)
    yield masked_mse(U8, BF16, "pqc", "ids_mask")
    yield masked_mse(BF16, BF16, "pqc", "mask")
    yield masked_mse(F32, F32, "pqc", "ids_mask")
    yield masked_mse(U8, BF16, "cpq", "ids_mask")
    yield masked_mse(BF16, BF16, "cpq", "ids_mask")
    yield masked_mse(F32, F32, "cpq", "mask")
    yield loss_and_scale()
    yield from map(masked_mse_backward, (BF16, F32))
    yield patch_embed(U8, BF16, F32)
    yield patch_embed(BF16, BF16, BF16)
    yield patch_embed(F32, F32, F32)
    yield patch_embed(BF16, BF16, BF16, patch=14, width=1280, model="ViT-H/14 ")
    for dtypes in ((U8, BF16, F32), (BF16, BF16, BF16), (F32, F32, F32)):
        yield patch_embed_backward("weight_gradient", *dtypes)
    for dtype in (BF16, F32):
        yield patch_embed_backward("image_gradient", dtype, dtype, dtype)
    yield patch_embed_backward("position_gradient", U8, BF16, F32)
    yield from map(random_resized_crop, ("packed", "batch"))


def empty(*size: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def images(dtype: torch.dtype) -> Tensor:
    return empty(N, C, IMAGE, IMAGE, dtype=dtype)


def mean_std(pixels: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    return (empty(C), empty(C)) if pixels == U8 else (None, None)


def masking(kernel: str, num_patches: int, key_bytes: int) -> Specimen:
    """Keys N L in; ids_keep and ids_mask, together N L, ids_restore N L and mask N L out."""
    args = (empty(N, num_patches), num_patches // 4)
    return Specimen(kernel, f"fp32 L={num_patches}", "masking", args, N * num_patches * (key_bytes + 8 + 8 + 1))


def gather_tokens(dtype: torch.dtype, width: int = D) -> Specimen:
    """Selected tokens N K D and ids N K in, N K D out."""
    args = (empty(N, L, width, dtype=dtype), empty(N, K, dtype=I64))
    moved = 2 * N * K * width * dtype.itemsize + N * K * 8
    return Specimen("gather_tokens", SHORT[dtype], "gather_tokens", args, moved)


def gather_tokens_backward(dtype: torch.dtype, width: int = D) -> Specimen:
    """Gradient N K D and ids N K in, N L D out."""
    args = (empty(N, K, width, dtype=dtype), empty(N, K, dtype=I64), L)
    moved = N * (K + L) * width * dtype.itemsize + N * K * 8
    return Specimen("gather_tokens_backward", SHORT[dtype], "gather_tokens_backward", args, moved)


def scatter_mask_tokens(dtype: torch.dtype) -> Specimen:
    """Tokens N (1 + K) d, mask token d, ids N L and positions (1 + L) d in, N (1 + L) d out; an addition each."""
    args = (empty(N, 1 + K, d, dtype=dtype), empty(d), empty(N, L, dtype=I64), empty(1 + L, d), 1, F32)
    moved = N * (1 + K) * d * dtype.itemsize + d * 4 + N * L * 8 + (1 + L) * d * 4 + N * (1 + L) * d * 4
    return Specimen("scatter_mask_tokens", SHORT[dtype], "scatter_mask_tokens", args, moved, N * (1 + L) * d)


def scatter_mask_tokens_backward(dtype: torch.dtype, learned: bool = False) -> Specimen:
    """Gradient N (1 + L) d and ids N L in, tokens N (1 + K) d, mask token d and learned positions (1 + L) d out.

    An addition for each masked value and, with learned positions, for each value.
    """
    variant, rows = (SHORT[dtype] + " learned positions", 1 + L) if learned else (SHORT[dtype], 0)
    args = (empty(N, 1 + L, d), empty(N, L, dtype=I64), 1 + K, 1, rows, dtype, [True, True, learned])
    moved = N * (1 + L) * d * 4 + N * L * 8 + N * (1 + K) * d * dtype.itemsize + d * 4 + rows * d * 4
    name = "scatter_mask_tokens_backward"
    return Specimen(name, variant, name, args, moved, N * M * d + N * rows * d)


def masked_mse(pixels: torch.dtype, dtype: torch.dtype, layout: str, rows: str, patch: int = PATCH) -> Specimen:
    """Masked predictions and pixels, N M E each, ids N M or mask N L in, residual N M E or N L E and the loss out.

    10 operations for each masked value: mean, centre, variance, scale, residual, square, sum.
    """
    patches, e = (IMAGE // patch) ** 2, C * patch**2
    m = patches - patches // 4
    if rows == "ids_mask":
        pred, mask, ids, which = empty(N, m, e, dtype=dtype), None, empty(N, m, dtype=I64), N * m * 8
    else:
        pred, mask, ids = empty(N, 1 + patches, e, dtype=dtype)[:, 1:], empty(N, patches, dtype=torch.bool), None
        which = N * patches
    moved = N * m * e * (dtype.itemsize + pixels.itemsize) + which + pred.numel() * dtype.itemsize + 4
    args = (pred, images(pixels), mask, ids, [patch, patch], True, *mean_std(pixels), 1e-6, layout, True)
    variant = f"{SHORT[dtype]} of {SHORT[pixels]} {layout} {rows}"
    return Specimen("masked_mse", variant, "masked_mse", args, moved, 10 * N * m * e)


def loss_and_scale() -> Specimen:
    """Two numbers out of partial sums."""
    return Specimen("loss_and_scale", "mask", "masked_mse", masked_mse(BF16, BF16, "pqc", "mask").args, 8)


def masked_mse_backward(dtype: torch.dtype) -> Specimen:
    """Residual N M E and two numbers in, N M E out; a product each."""
    args = (empty(N, M, E, dtype=dtype), empty(), empty(), dtype)
    moved = 2 * N * M * E * dtype.itemsize + 8
    return Specimen("masked_mse_backward", SHORT[dtype], "masked_mse_backward", args, moved, N * M * E)


def patch_embed(
    pixels: torch.dtype, dtype: torch.dtype, out: torch.dtype, patch: int = PATCH, width: int = D, model: str = ""
) -> Specimen:
    """Visible pixels N K E, ids N K, weight D E, bias D, positions L D and prefix D in, N (1 + K) D out; 2 N K E D."""
    patches, e = (IMAGE // patch) ** 2, C * patch**2
    k = patches // 4
    weight = empty(width, C, patch, patch, dtype=dtype)
    bias, positions, prefix = (empty(*size, dtype=out) for size in ((width,), (1 + patches, width), (1, width)))
    args = (images(pixels), weight, bias, positions[1:], empty(N, k, dtype=I64), prefix, *mean_std(pixels), dtype, out)
    moved = N * k * e * pixels.itemsize + N * k * 8 + width * e * dtype.itemsize
    moved += (1 + patches + 1 + N * (1 + k)) * width * out.itemsize
    variant = f"{model}{SHORT[dtype]} of {SHORT[pixels]} to {SHORT[out]}"
    return Specimen("patch_embed", variant, "patch_embed", args, moved, 2 * N * k * e * width)


def patch_embed_backward(
    kernel: str, pixels: torch.dtype, dtype: torch.dtype, grad: torch.dtype, patch: int = PATCH, width: int = D
) -> Specimen:
    """Gradient N K D and ids N K in.

    weight: visible pixels N K E in, D E and bias D out; 2 N K E D, and an addition for each value of the gradient.
    image: weight D E in, visible pixels N K E out; 2 N K E D. position: L D out; an addition for each value.
    """
    patches, e = (IMAGE // patch) ** 2, C * patch**2
    k = patches // 4
    moved, flops = {
        "weight_gradient": (N * k * e * pixels.itemsize + (width * e + width) * 4, N * k * (2 * e * width + width)),
        "image_gradient": (width * e * dtype.itemsize + N * k * e * pixels.itemsize, 2 * N * k * e * width),
        "position_gradient": (patches * width * 4, N * k * width),
    }[kernel]
    needs = [kernel == "image_gradient", *[kernel == "weight_gradient"] * 2, kernel == "position_gradient", False]
    g_tokens, weight = empty(N, 1 + k, width, dtype=grad), empty(width, C, patch, patch, dtype=dtype)
    args = (g_tokens, images(pixels), weight, empty(N, k, dtype=I64), *mean_std(pixels), 1, dtype, needs)
    variant = f"{SHORT[dtype]} of {SHORT[pixels]} and {SHORT[grad]}"
    moved += N * k * (width * grad.itemsize + 8)
    return Specimen(kernel, variant, "patch_embed_backward", args, moved, flops)


def random_resized_crop(layout: str) -> Specimen:
    """Boxes of 290 x 390 pixels, 60 % of 375 x 500, N C 290 390 in, and N C 224 224 out.

    A box of h x w pixels has h (4 w) products with taps along its rows, then 224 (4 h) along the columns that are left.
    """
    h, w = 290, 390
    if layout == "packed":  # by workers that cut the boxes out
        images = (empty(C, N * h * w, dtype=U8), empty(N, dtype=I64), empty(N, 2, dtype=I64))
        places = N * 3 * 8
    else:
        images, places = (empty(N, C, 375, 500, dtype=U8), None, None), 0
    args = (*images, empty(N, 4, dtype=I64), empty(N, dtype=torch.bool), [IMAGE, IMAGE])
    moved = N * C * (h * w + IMAGE**2) + N * (4 * 8 + 1) + places
    flops = 2 * N * C * (4 * h * w + 4 * h * IMAGE)
    return Specimen("random_resized_crop", f"uint8 {layout}", "random_resized_crop", args, moved, flops)


class Pointer:
    """What Triton asks of a tensor that it compiles for. New memory is aligned."""

    def __init__(self, x: Tensor):
        self.dtype, self._x = x.dtype, x

    def data_ptr(self) -> int:
        return self._x.storage_offset() * self._x.element_size()

    def ptr_range(self) -> int:
        return self._x.untyped_storage().nbytes()


def compiled(specimen: Specimen, chip: str) -> tuple:
    """The kernel as its launcher has it compiled on that chip, and the grid it is launched on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    from mae_kernels import kernels
    from mae_kernels.kernels import chips

    launch, found = jit.JITFunction.run, []

    def compile_only(kernel, *args, grid, warmup, **options):
        if kernel.__name__ == f"{specimen.kernel}_kernel":
            pointers = (Pointer(x) if isinstance(x, Tensor) else x for x in args)
            found.append((launch(kernel, *pointers, grid=grid, warmup=True, **options), grid))

    target = GPUTarget("hip", chip, 64) if chip.startswith("gfx") else GPUTarget("cuda", int(chip[3:]), 32)
    answers = {"get_current_device": chip, "get_current_stream": 0, "get_current_target": target}
    driver = SimpleNamespace(**{name: lambda *_, value=value: value for name, value in answers.items()})
    with (
        patch.object(jit.JITFunction, "run", compile_only),
        patch.object(jit, "driver", SimpleNamespace(active=driver)),
        chips.assume(chip),
    ):
        getattr(kernels, specimen.op)(*specimen.args)
    (launched,) = found
    return launched


def read_cubin(cubin: bytes) -> tuple[int, int, list[str], int, int, int]:
    """Registers, spills, tensor-core opcodes, widest load, widest store, and instructions in all."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups())
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", text, re.M)  # such as LDG.E.128
    mma = [op.partition(".")[0] for op in code if re.match(r"HG?MMA|UTC[A-Z]MMA", op)]

    def widest(opcodes: str) -> int:
        found = [op for op in code if re.match(rf"({opcodes})\b", op)]
        # Bulk copies, U*, name no width: they move multiples of 16 bytes.
        widths = (re.search(r"\.[US]?(8|16|64|128|256)\b", op) or ("", 128 if op[0] == "U" else 32) for op in found)
        return max((int(width[1]) for width in widths), default=0)

    return registers, stack + local, mma, widest("LDG|LDGSTS|UBLKCP|UTMALDG"), widest("STG|UTMASTG"), len(code)


def read_amdgcn(text: str) -> tuple[int, int, list[str], int, int, int]:
    bits = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def widest(verb: str) -> int:
        found = re.findall(rf"^\s+(?:global|buffer)_{verb}_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)", text, re.M)
        return max((bits[width] for width in found), default=0)

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    instructions = len(re.findall(r"^\s+(?:buffer|ds|flat|global|[sv])_\w+", text, re.M))
    mma = re.findall(r"^\s+(v_mfma)", text, re.M)
    return field("vgpr_count"), spills, mma, widest("load"), widest("store"), instructions


def inspect(specimen: Specimen, chip: str, bandwidth: float, tflops: float) -> dict:
    kernel, _ = compiled(specimen, chip)
    read, binary = (read_amdgcn, "amdgcn") if chip.startswith("gfx") else (read_cubin, "cubin")
    registers, spills, mma, load, store, _ = read(kernel.asm[binary])
    return {
        "kernel": specimen.kernel,
        "variant": specimen.variant,
        "chip": chip,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spills": spills,
        "shared_bytes": kernel.metadata.shared,
        "mma": len(mma),
        "mma_opcode": min(mma, default=""),
        "load_bits": load,
        "store_bits": store,
        "bytes": specimen.bytes,
        "flops": specimen.flops,
        "floor_us": round(max(specimen.bytes / (bandwidth * 1e3), specimen.flops / (tflops * 1e6)), 2),
    }


def table(rows: list[dict]) -> str:
    cells = [[name.removesuffix("_bits").removesuffix("_bytes") for name in rows[0]]]
    cells[0][-3:-1] = "MB", "GFLOP"
    for row in rows:
        *values, moved, flops, floor = row.values()
        cells.append([*map(str, values), f"{moved / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{floor:.2f}"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = "  ".join(f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(line.format(*row) for row in cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mae_kernels.inspect", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", action="append", help="only this kernel of the table; repeatable")
    parser.add_argument("--chip", action="append", help="only this chip; repeatable")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    for name, value, unit in (("bandwidth", BANDWIDTH, "GB/s"), ("tflops", TFLOPS, "dense bf16 TFLOP/s")):
        meaning = f"{unit} that the floors assume; by default {value}, of an H200"
        parser.add_argument(f"--{name}", type=float, default=value, metavar="X", help=meaning)
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        sys.exit("mae_kernels.inspect: the package triton is not installed")
    import triton

    if triton.knobs.runtime.interpret:
        sys.exit("mae_kernels.inspect: TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")
    from mae_kernels.kernels.chips import CHIPS

    chosen = list(specimens())
    kernels = list(dict.fromkeys(specimen.kernel for specimen in chosen))
    for option, asked, known in (("--kernel", args.kernel, kernels), ("--chip", args.chip, CHIPS)):
        if unknown := set(asked or ()).difference(known):
            parser.error(f"{option} must be one of {', '.join(known)}, got {min(unknown)!r}")
    rows = [
        inspect(specimen, chip, args.bandwidth, args.tflops)
        for specimen in chosen
        for chip in CHIPS
        if specimen.kernel in (args.kernel or kernels) and chip in (args.chip or CHIPS)
    ]
    if args.json:
        lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
        print(f'{{"rows": [\n{lines}\n], "triton": "{triton.__version__}"}}')
        return
    print(f"""{table(rows)}

Triton {triton.__version__}. ViT-B/16 unless named otherwise: {N} images of {C} x {IMAGE} x {IMAGE}, 75 % masked.
registers, spills: of a thread. AMD: vector registers, spilled registers; NVIDIA: spills are bytes of stack.
shared: bytes. mma: tensor-core instructions. load, store: the widest access to global memory, in bits.
MB, GFLOP: each input element in use read once, each output element written once; 2 A B C for a product of matrices.
floor_us: MB at {args.bandwidth:g} GB/s or GFLOP at {args.tflops:g} TFLOP/s, the longer; the defaults are an H200's.""")


if __name__ == "__main__":
    main()
