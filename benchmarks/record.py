"""The result files under ``benchmarks/results``: what a number depends on, the ceilings of its run, and its rows.

A file is a JSON object. ``kind`` tells what made the numbers: ``"gpu"``, ``"cpu"``, ``"interpreter"`` (kernels in
Triton's interpreter: shapes and correctness, never a speed) or ``"demo"``. ``ceilings`` are those of
:mod:`benchmarks.ceilings`, measured in the same run; files from before they were measured lack them. ``rows`` are
ops (``backend``) and training steps (``contender``).
"""

import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import cpuinfo
import torch

from mae_kernels import backend

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@cache
def conditions() -> dict[str, str | int | float | bool]:
    """What a number depends on besides the shape. The load is that of the minute before the first row."""
    on_gpu = torch.cuda.is_available()
    facts = {
        "kind": "gpu" if on_gpu else "interpreter" if backend.INTERPRETED else "cpu",
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else cpuinfo.get_cpu_info().get("brand_raw", "CPU"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
    }
    if on_gpu:
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return facts


def write(path: Path, *, command: str, rows: list[dict], ceilings: dict | None = None, **more) -> None:
    """Write a result file; ``more`` are further fields of the file."""
    facts = {**conditions(), "command": command, **more, "ceilings": ceilings or {}, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
