"""All that needs a GPU, in one command: ``python -m benchmarks.gpu --out benchmarks/results``, or ``make gpu``.

The native tests, NVIDIA's memory and race checkers on small shapes, then the benchmarks. Every step runs whatever
became of the ones before it; the command fails if one did.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.record import ROOT

OPS = [
    "random_resized_crop", "masking", "patch_embed", "gather_tokens", "scatter_mask_tokens", "masked_mse",
    "linear_masked_mse",
]  # fmt: skip
NATIVE = [
    *OPS, "kernels", "dispatch", "transforms", "backend", "cuda", "block", "step", "model_under_pytorch", "nn", "apply",
]  # fmt: skip
# Every op at small shapes; without PyTorch's cache each tensor is an allocation of its own, with edges to check.
SMALL = ["tests/test_kernels.py", "-k", "nothing_is_written_outside"]


def steps(raw: Path, size: str, only: str = "") -> dict[str, list[str]]:
    """The command of each step; ``raw`` is the folder into which the benchmarks write a result file each."""
    pytest = [sys.executable, "-m", "pytest", "-q"]

    def benchmark(name: str, only: str = only) -> list[str]:
        file, out = f"benchmarks/test_{name}.py", f"--record={raw / name}.json"
        return [*pytest, file, "--benchmark-only", f"--size={size}", out, *(["-k", only] if only else [])]

    return {
        "native tests": [*pytest, *(f"tests/test_{name}.py" for name in NATIVE)],
        "memcheck": [*_sanitizer("memcheck"), *pytest, *SMALL],
        "racecheck": [*_sanitizer("racecheck"), *pytest, *SMALL],
        "benchmark of the host": benchmark("host", only=""),
        "benchmarks of the ops": benchmark("ops"),
        "benchmark of the training step": benchmark("step"),
    }


def _sanitizer(tool: str) -> list[str]:
    return ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", "--target-processes=all"]


def run(name: str, command: list[str]) -> dict:
    """Run one step, show what it prints, and keep its outcome and last line."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    if shutil.which(command[0]) is None:
        print(f"{command[0]} is not on this machine's PATH", flush=True)
        return {"step": name, "passed": False, "seconds": 0, "last_line": f"{command[0]} is not on the PATH"}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in command[0] else None
    start, last = time.monotonic(), ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return {
        "step": name,
        "passed": process.returncode == 0,
        "seconds": round(time.monotonic() - start),
        "last_line": last,
    }


def measured(raw: Path) -> tuple[list[dict], dict]:
    """The rows of all result files in the folder, and the ceilings that the ops are held against."""
    results = [record.read(path) for path in sorted(raw.glob("*.json"))]
    ceilings = [result["ceilings"] for result in results if result["ceilings"]]
    return [row for result in results for row in result["rows"]], ceilings[-1] if ceilings else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the result file")
    parser.add_argument("--size", choices=["small", "full"], default="full", help="shapes of the benchmarks")
    parser.add_argument("--step", action="append", help="run only this step; may be repeated")
    parser.add_argument("--only", default="", help="benchmarks whose names match, as of pytest -k, such as ViT-B")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU on this machine: nothing was run and nothing is claimed\n")

    facts = record.conditions()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder)
        commands = steps(raw, options.size, options.only)
        unknown = set(options.step or ()) - commands.keys()
        if unknown:
            parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(commands)}")
        done = [run(name, commands[name]) for name in commands if name in (options.step or commands)]
        rows, ceilings = measured(raw)

    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = options.out / f"{name}-{facts['date']}-{facts['commit']}.json"
    words = [f"'{word}'" if " " in word else word for word in (sys.argv[1:] if argv is None else argv)]
    command = " ".join(["python -m benchmarks.gpu", *words])
    record.write(path, command=command, rows=rows, ceilings=ceilings, steps=done)
    for step in done:
        print(f"{'passed' if step['passed'] else 'FAILED'}  {step['step']}, {step['seconds']} s: {step['last_line']}")
    print(f"wrote {path}; python -m benchmarks.report puts it into the README")
    return 0 if all(step["passed"] for step in done) else 1


if __name__ == "__main__":
    sys.exit(main())
