"""Result files: what a number depends on, the ceilings of its run and what was measured, a line of JSON each.

A line is appended the moment it exists, so that a run killed at any second has left what it measured. It is an object
with one key, which says what it holds:

=============  =====================================================================================================
conditions     machine, versions, commit, command: the first line. Its ``kind`` tells what made the numbers: ``"gpu"``,
               ``"cpu"``, ``"interpreter"`` (shapes and correctness, never a speed), ``"demo"`` or ``"quality"``
ceilings       see :mod:`benchmarks.ceilings`
row            an op (``backend``), a training step (``contender``) or the cost of a call (``host_us``)
kernel         a kernel that the rows before it ran: name, signature and SHA-256 of its machine code
tiles          a race of tiles for one kernel, see :mod:`benchmarks.race`
test           outcome of a test on a GPU
stage          a stage of :mod:`benchmarks.gpu`: whether it passed, its seconds and its last line
=============  =====================================================================================================
"""

import datetime
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import cpuinfo
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("shape", "op", "pass", "contender", "backend", "dtype")  # what a row of an op, a step or a call measures
_LISTS = {"row": "rows", "kernel": "kernels", "tiles": "tiles", "test": "tests", "stage": "stages"}
# What products run on, where a CPU has it.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "asimd", "sve")


@cache
def conditions() -> dict:
    """What a number depends on besides the shape. The load is that of the minute before the first row."""
    on_gpu, cpu = torch.cuda.is_available(), cpuinfo.get_cpu_info()
    facts = {
        "kind": "gpu" if on_gpu else "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu",
        "commit": os.environ.get("MAE_COMMIT") or _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
        if "MAE_COMMIT" not in os.environ and _output("git", "rev-parse", "HEAD") else "unknown",
        "sources": sources(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M}",
        "device": torch.cuda.get_device_name() if on_gpu else cpu.get("brand_raw", "CPU"),
        "cpu": {name: cpu.get(key, "unknown") for name, key in (
            ("brand", "brand_raw"), ("vendor", "vendor_id_raw"), ("family", "family"), ("model", "model")
        )} | {"instruction_sets": [name for name in _INSTRUCTION_SETS if name in cpu.get("flags", ())]},
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
    }  # fmt: skip
    if on_gpu:
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return facts


def sources() -> str:
    """The first digits of the SHA-256 of the package's files, which a copy without git has too."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "mae_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def name() -> str:
    """The file name of this machine's results, without a suffix: a CPU by vendor, family and threads, not by brand."""
    facts = conditions()
    cpu = facts["cpu"]
    vendor = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(cpu["vendor"], cpu["vendor"])
    parts = [facts["device"]] if facts["kind"] == "gpu" else [
        facts["kind"], vendor, f"family {cpu['family']} model {cpu['model']}", f"{facts['threads']} threads"
    ]  # fmt: skip
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def command(program: str) -> str:
    """The command line of this process, but for where its results go, which is a path of one machine."""
    return re.sub(r" --record[ =]('[^']*'|\S+)", "", f"{program} {shlex.join(sys.argv[1:])}")


def append(path: Path, **line) -> None:
    """Add one line, such as ``row={...}``: it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":  # a line that was cut off
            file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def begin(path: Path, command: str, **more: str) -> None:
    """Write the conditions, unless the file has them: several processes may write into one file, in turn.

    Raises:
        ValueError: the file holds what another machine or other code made.
    """
    facts = conditions() | more
    before = read(path) if path.is_file() and path.stat().st_size else {}
    for name in ("kind", "device", "commit", "sources", "torch", "triton"):
        if before.get(name, facts[name]) != facts[name]:
            raise ValueError(f"{path} holds results of {name} {before[name]}, not {facts[name]}: write to another file")
    if "kind" not in before:  # outcomes of tests may have come first
        append(path, conditions={**facts, "command": command})


def read(path: Path) -> dict:
    """The conditions, with ``ceilings`` and the lists ``rows``, ``kernels``, ``tiles``, ``tests`` and ``stages``.

    Of rows that were measured twice the later one counts.
    """
    found, rows = {"ceilings": {}, **{name: [] for name in _LISTS.values()}}, {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            ((what, value),) = json.loads(text).items()
        except ValueError:  # a line that was cut off
            continue
        if what == "row" and "op" in value:
            rows[tuple(value.get(name) for name in KEY)] = value
        elif what in _LISTS:
            found[_LISTS[what]].append(value)
        elif what == "ceilings":
            found["ceilings"] |= value
        else:
            found = {**value, **found}
    found["rows"] += rows.values()
    return found


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
