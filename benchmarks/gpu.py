"""All that needs a GPU, in one command: ``python -m benchmarks.gpu --out benchmarks/results``, or ``make gpu``.

The native tests, NVIDIA's memory and race checkers on small shapes, then the benchmarks. Every step runs whatever
became of the ones before it; the command fails if one did.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
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
    """The command of each step; ``raw`` is the folder into which the benchmarks write what pytest-benchmark saw."""
    pytest = [sys.executable, "-m", "pytest", "-q"]

    def benchmark(name: str) -> list[str]:
        file, out = f"benchmarks/test_{name}.py", f"--benchmark-json={raw / name}.json"
        return [*pytest, file, "--benchmark-only", f"--size={size}", out, *(["-k", only] if only else [])]

    return {
        "native tests": [*pytest, *(f"tests/test_{name}.py" for name in NATIVE)],
        "memcheck": [*_sanitizer("memcheck"), *pytest, *SMALL],
        "racecheck": [*_sanitizer("racecheck"), *pytest, *SMALL],
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


def conditions() -> dict:
    """What the results depend on besides the code."""
    return {
        "command": "python -m benchmarks.gpu",
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def rows(raw: Path) -> list[dict]:
    """One row per benchmark in the folder's files, without the single timings."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(raw.glob("*.json"))]
    return [benchmark["extra_info"] for text in texts if text for benchmark in json.loads(text)["benchmarks"]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    parser.add_argument("--size", choices=["small", "full"], default="full", help="shapes of the benchmarks")
    parser.add_argument("--step", action="append", help="run only this step; may be repeated")
    parser.add_argument("--only", default="", help="benchmarks whose names match, as of pytest -k, such as ViT-B")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU on this machine: nothing was run and nothing is claimed\n")

    result = conditions()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder)
        commands = steps(raw, options.size, options.only)
        unknown = set(options.step or ()) - commands.keys()
        if unknown:
            parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(commands)}")
        result["steps"] = [run(name, commands[name]) for name in commands if name in (options.step or commands)]
        result["rows"] = rows(raw)

    name = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    path = options.out / f"{name}-{result['date']}-{result['commit']}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for step in result["steps"]:
        print(f"{'passed' if step['passed'] else 'FAILED'}  {step['step']}, {step['seconds']} s: {step['last_line']}")
    print(f"wrote {path}")
    return 0 if all(step["passed"] for step in result["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
