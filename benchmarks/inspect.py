"""What each kernel compiles to on each chip, told without a GPU: ``python -m benchmarks.inspect``."""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime import jit
from triton.runtime.cache import get_cache_key

import mae_kernels.kernels
from benchmarks.measure import OpRecorder
from benchmarks.work import BASE, BF16, CASES, HUGE


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    shared_kib: int  # of memory that one program may use


# The chips that every launch compiles for.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64),
}

# Every case, and what the cases lack but the kernels have: a case, what is different, a model, and changed arguments.
VARIANTS = [
    *((case, "", BASE, dict) for case in CASES),
    ("patch_embed bfloat16", f" {HUGE.name}", HUGE, dict),
    ("random_masking", " L=6272", BASE, lambda a: {"num_patches": 6272, "noise": a["noise"].new_empty(256, 6272)}),
    ("random_resized_crop", " packed", BASE, lambda a: {"images": list(a["images"])}),
    ("patch_embed float32", " learned images", BASE, lambda a: {"images": a["images"].requires_grad_()}),
    ("patch_embed bfloat16", " learned images", BASE, lambda a: {"images": a["images"].requires_grad_()}),
    ("patch_embed bfloat16", " learned positions", BASE, lambda a: {"pos_embed": a["pos_embed"].requires_grad_()}),
    ("scatter_mask_tokens", " learned positions", BASE, lambda a: {"pos_embed": a["pos_embed"].requires_grad_()}),
    *(
        (f"masked_mse {case}", " channels_first", BASE, lambda a: {"layout": "channels_first"})
        for case in ("masked-only", "uint8 bfloat16")
    ),
]


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton specializes it for its arguments, and the grid that it is launched on."""

    kernel: str
    grid: tuple[int, ...]
    target: GPUTarget
    source: ASTSource
    options: object  # of the target's backend

    @property
    def key(self) -> str:
        """Launches of one key compile to the same, for one chip by one Triton."""
        return sha256(get_cache_key(self.source, make_backend(self.target), self.options, {}).encode()).hexdigest()

    def compiled(self) -> CompiledKernel:
        return triton.compile(self.source, self.target, vars(self.options))


def launches(op: str, args: tuple, target: GPUTarget) -> list[Launch]:
    """Those of a call of ``mae_kernels.kernels.<op>``, with tensors on ``meta``, for a chip that may not be here."""
    run, grids, found = jit.JITFunction.run, [], []

    def pointer(x: Tensor) -> SimpleNamespace:
        address = x.storage_offset() * x.element_size()  # new memory is aligned
        return SimpleNamespace(dtype=x.dtype, data_ptr=lambda: address, ptr_range=x.untyped_storage().nbytes)

    def specialize(kernel, *args, grid, warmup, **options):
        grids.append(grid)
        run(kernel, *(pointer(x) if isinstance(x, Tensor) else x for x in args), grid=grid, warmup=True, **options)

    def keep(kernel, key, signature, device, constexprs, options, attrs, warmup):
        source = ASTSource(kernel, signature, constexprs, attrs)
        found.append(Launch(kernel.__name__.removesuffix("_kernel"), grids.pop(), target, source, options))

    answers = {"get_current_device": target, "get_current_stream": 0, "get_current_target": target}
    driver = SimpleNamespace(active=SimpleNamespace(**{name: lambda *_, x=x: x for name, x in answers.items()}))
    hooks = patch.multiple(jit.JITFunction, run=specialize, _do_compile=keep)
    with hooks, patch.object(jit, "driver", driver):
        getattr(mae_kernels.kernels, op)(*args)
    return found


def calls() -> Iterator[tuple[str, str, tuple]]:
    """Case, op and arguments, on ``meta``, of the ops that VARIANTS call, backward too."""
    for case, what, model, change in VARIANTS:
        work = CASES[case](replace(model, batch=256))
        arguments = (a := work.arguments(torch.device("meta"))) | change(a)
        autocast = {"is_autocast_enabled": work.compute == BF16, "get_autocast_dtype": BF16}  # none is known of meta
        hooks = patch.multiple(torch, **{k: lambda _, v=v: v for k, v in autocast.items()})
        with OpRecorder() as recorder, hooks, mae_kernels.use_backend("triton"):
            out = getattr(mae_kernels, work.op)(**arguments)
            forward = len(recorder.calls)
            if learned := [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]:
                torch.autograd.grad(out, learned, torch.empty_like(out))
        for i, (op, args) in enumerate(recorder.calls):
            if hasattr(mae_kernels.kernels, name := op.overloadpacket.__name__):  # The rest are made of other ops.
                yield case + what + " backward" * (i >= forward), name, args


def machine_code(kernel: CompiledKernel) -> dict:
    """Registers of a thread, what spills, shared bytes, widest accesses to global memory."""
    if text := kernel.asm.get("amdgcn"):
        count = {name: int(n) for name, n in re.findall(r"\.([sv]gpr\w*)_count:\s+(\d+)", text)}
        registers, spills = count["vgpr"], count["vgpr_spill"] + count["sgpr_spill"]
        bits = {"byte": 8, "short": 16, "dword": 32}
        access = r"^\s+(?:global|buffer)_(load|store)_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?"
        widths = [(verb, bits[unit] * int(n or 1)) for verb, unit, n in re.findall(access, text, re.M)]
    else:
        cuobjdump, cubin = triton.knobs.nvidia.cuobjdump.path, kernel.metadata_group[f"{kernel.name}.cubin"]
        run = subprocess.run([cuobjdump, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True)
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", run.stdout).groups())
        spills = stack + local  # bytes; of AMD registers
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", run.stdout, re.M)
        # Bulk copies, U*, name no width: they move multiples of 16 bytes.
        width = {op: re.search(r"\.[US]?(8|16|64|128|256)\b", op) or ("", 128 if op[0] == "U" else 32) for op in code}
        widths = [("load", int(width[op][1])) for op in code if re.match(r"LDG|UBLKCP|UTMALDG", op)]
        widths += [("store", int(width[op][1])) for op in code if re.match(r"STG|UTMASTG", op)]
    widest = {f"{which}_bits": max((n for w, n in widths if w == which), default=0) for which in ("load", "store")}
    return {"registers": registers, "spills": spills, "shared_bytes": kernel.metadata.shared} | widest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspect", description=__doc__)
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this; repeatable")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this; repeatable")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table, with the key of each launch")
    parser.add_argument("--known", type=Path, help="JSON of before: a launch of a key in it is not compiled again")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.exit(1, "TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it\n")
    every = [
        (case, name, x)
        for case, op, args in calls()
        for name, chip in CHIPS.items()
        for x in launches(op, args, chip.target)
    ]
    kernels = sorted({x.kernel for _, _, x in every})
    if unknown := set(options.kernel or ()).difference(kernels):
        parser.error(f"--kernel must be one of {', '.join(kernels)}, got {min(unknown)!r}")
    found = {x.key: (case, chip, x) for case, chip, x in reversed(every)}  # each under its first case
    known = json.loads(options.known.read_text(encoding="utf-8"))["rows"] if options.known else []
    rows = {row["key"]: row for row in known if row.get("key") in found}
    for key, (case, chip, x) in sorted(found.items(), key=lambda item: (item[1][2].kernel, item[1][0])):
        if key not in rows and x.kernel in (options.kernel or kernels) and chip in (options.chip or CHIPS):
            told = {"kernel": x.kernel, "case": case, "chip": chip, "warps": x.options.num_warps}
            rows[key] = told | machine_code(x.compiled()) | {"key": key}
    if options.json:
        text = json.dumps({"triton": triton.__version__, "rows": [*rows.values()]})
        print(text.replace("}, {", "},\n{"))  # a row a line
        return
    columns = [x for x in next(iter(rows.values())) if x != "key"]
    table = [columns, *([row[column] for column in columns] for row in rows.values())]
    width = [max(len(str(x)) for x in values) for values in zip(*table, strict=True)]
    print("\n".join("  ".join(str(x).ljust(n) for x, n in zip(row, width, strict=True)).rstrip() for row in table))


if __name__ == "__main__":
    main()
