"""Faults planted in the kernels, one at a time, each of which the tests must notice: ``python tests/faults.py``."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # in mae_kernels/kernels
    right: str  # stands once in the file
    wrong: str


FAULTS = [
    Fault("an index off by one", "gather_tokens", "n * s_tn + ids * s_tl", "n * s_tn + (ids + 1) * s_tl"),
    Fault("a missing mask", "gather_tokens", "x, mask=m_i[:, None] & m_d)", "x, mask=m_i[:, None])"),
    Fault("an id out of range is read", "gather_tokens", "(ids >= 0) & (ids < num_tokens)", "ids >= 0"),
    Fault("ties go to the higher index", "masking", "| i.to(tl.uint64)", "| (BLOCK - 1 - i).to(tl.uint64)"),
    Fault("-0.0 sorts before 0.0", "masking", ".to(tl.float32) + 0.0", ".to(tl.float32)"),
    Fault("a wrong stride", "scatter_mask_tokens", "n * s_gn + j * s_gl", "n * s_gn + j * D"),
    Fault("visible tokens count as masked", "scatter_mask_tokens", "tl.where(is_token[:, None], 0, g", "(g"),
    Fault("a position too far", "scatter_mask_tokens", "(j - first_pos) * s_pl", "j * s_pl"),
    Fault("a biased variance", "masked_mse", "moment / (E - 1)", "moment / E"),
    Fault("eps outside the root", "masked_mse", "1 / tl.sqrt_rn(moment / (E - 1) + eps)",
          "1 / (tl.sqrt_rn(moment / (E - 1)) + eps)"),
    Fault("a swapped layout", "pixels", "    if PQC:", "    if not PQC:"),
    Fault("nothing masked is a division by zero", "masked_mse", "tl.maximum(tl.sum(counts), 1)", "tl.sum(counts)"),
    Fault("a gradient computed again without its scale", "masked_mse", "* tl.load(p_scale)\n    #", "\n    #"),
    Fault("uint8 divided by 256", "pixels", "(1 / 255)", "(1 / 256)"),
    Fault("the mean of another channel", "pixels", "tl.load(p_mean + c,", "tl.load(p_mean + 0 * c,"),
    Fault("a mean that rounds", "masked_mse", "x -= pivot", "pivot = tl.zeros([BLOCK, 1], tl.float32)"),
    Fault("an offset of a pixel that wraps", "pixels", "if not WIDE:", "if True:"),
    Fault("a strided mean", "masked_mse", "x if x is None else x.contiguous()", "x"),
    Fault("the position of another patch", "patch_embed", "patch[:, None] * s_pl", "(j - num_prefix)[:, None] * s_pl"),
    Fault("a prefix row too many", "patch_embed", "m_i & (j < num_prefix)", "m_i & (j <= num_prefix)"),
    Fault("a sample counted in two splits", "patch_embed", "tl.minimum(first + samples_per_split,",
          "tl.minimum(first + samples_per_split + 1,"),
    Fault("a patch turned over", "pixels", "e // PW % PH, e % PW", "e % PW, e // PW % PH"),
    Fault("weights beside the box", "random_resized_crop", "(source >= 0) & (source < length)", "source >= 0"),
    Fault("weights that are not those of an enlarged filter", "random_resized_crop", "inverse_y = 1 / stretch",
          "inverse_y = 1.0"),
    Fault("a picture that is not flipped", "random_resized_crop", "tl.load(p_flips + n * s_fn)", "n < 0"),
    Fault("products of bit patterns", "numerics", "a, b = a.to(tl.float32), b.to(tl.float32)", "pass"),
    Fault("rounding towards zero", "numerics", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits"),
]  # fmt: skip


def plant(fault: Fault, tree: Path) -> None:
    path = tree / "mae_kernels" / "kernels" / f"{fault.file}.py"
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise ValueError(
            f"{fault.name}: {fault.right!r} stands {text.count(fault.right)} times in {path.name}, not once"
        )
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def noticed(fault: Fault) -> str:
    """What notices this fault in a copy of the code, in words; empty when nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("mae_kernels", "tests", "pyproject.toml"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tree / name)
        plant(fault, tree)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not eager and not planted",
        ]
        # Guarded memory first: elsewhere a write outside it may end the process.
        own = fault.file if fault.file not in ("pixels", "numerics") else "patch_embed"
        files = ["kernels", own, "strides"]
        command += [f"tests/test_{name}.py" for name in files]
        environment = {**os.environ, "PYTHONPATH": folder}
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if result.returncode < 0:
            return f"the tests end with signal {-result.returncode}"
        if result.returncode > 1:
            raise RuntimeError(result.stdout + result.stderr)
        failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
        return failures[0].split()[1] if failures else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only faults whose name contains this")
    chosen = [fault for fault in FAULTS if parser.parse_args().k in fault.name]
    missed = 0
    for fault in chosen:
        test = noticed(fault)
        missed += not test
        print(f"{'noticed' if test else 'MISSED '}  {fault.name}: {test or 'every test passes'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
