"""Compiles every launch that the tests make, for every chip, under the oldest and the newest Triton: ``make compile``.

The tests run once in Triton's interpreter, and every call of a kernel's launcher is recorded. Under each Triton the
launchers then run again for each chip, on tensors without memory, and each different launch is compiled in a process
of its own: a compiler that aborts is a failure like others. Outcomes are kept: a run that is stopped goes on later.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import peers
import torch

if TYPE_CHECKING:
    from benchmarks.inspect import Launch

ROOT = Path(__file__).parent.parent
FOLDER = Path(sys.prefix) / "launches"
OLDEST = (ROOT / "tests" / "peers-triton-3.6.txt").read_text("utf-8").strip().removeprefix("triton==")
LIMIT_YZ = 65_535  # blocks of a grid along y and along z
LIMIT_S = 600  # of the compiler, for one launch
RECORD = "RECORD_CALLS"  # the file that the plugin writes to
ROW = "{:<8}{:<8}{:>9}{:>10}{:>15}{:>8}{:>8}{:>8}"


def pytest_configure():
    """As a plugin of pytest: append each new call of a launcher to a file."""
    from mae_kernels import registration

    run, known = registration._run_kernels, set()

    def record(op, *args):
        call = encoded(op, args)
        if call not in known:
            known.add(call)
            with open(os.environ[RECORD], "a", encoding="utf-8") as f:  # of all workers
                f.write(call)
        return run(op, *args)

    registration._run_kernels = record


def encoded(op: str, args: tuple) -> str:
    """A line of JSON: dtypes, shapes, strides and offsets of tensors, and what else was given."""

    def encode(x: object) -> object:
        if isinstance(x, torch.Tensor):
            return {"tensor": [x.shape, x.stride(), x.storage_offset()], "dtype": str(x.dtype)}
        return {"dtype": str(x)} if isinstance(x, torch.dtype) else x

    return json.dumps([op, [encode(x) for x in args]]) + "\n"


def decoded(line: str) -> tuple[str, list]:
    """The same call with tensors on ``meta``."""

    def decode(x: object) -> object:
        if not isinstance(x, dict):
            return x
        dtype = getattr(torch, x["dtype"].removeprefix("torch."))
        if "tensor" not in x:
            return dtype
        shape, stride, offset = x["tensor"]
        values = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        return torch.empty(max(values, 0), dtype=dtype, device="meta").as_strided(shape, stride, offset)

    op, args = json.loads(line)
    return op, [decode(x) for x in args]


def record_suite() -> Path:
    """The calls that the tests make, of the sources as they are now."""
    sources = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("mae_kernels/**/*.py")])
    state = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:16]
    path = FOLDER / f"calls-{state}.jsonl"
    if path.is_file():
        return path
    for old in FOLDER.glob("calls-*"):
        old.unlink()
    part = path.with_suffix(".part")
    # Tests that run the kernels say so in their names, or pytest does for those of either back-end.
    command = [sys.executable, "-m", "pytest", "-p", "launches", "-k", "triton or kernels", "-n", str(os.cpu_count())]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests"), RECORD: str(part)}
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False)
    if result.returncode not in (0, 1):  # a test that fails has made its launches
        raise SystemExit(f"launches: pytest ended with {result.returncode}")
    part.rename(path)
    return path


def compile_all(calls: Path, outcomes: Path, chips: list[str], jobs: int) -> bool:
    """Compile what is not in ``outcomes`` yet, under the Triton of this process, and print a line for each chip."""
    import triton

    from benchmarks.inspect import CHIPS, launches

    recorded = [decoded(line) for line in dict.fromkeys(_lines(calls))]
    known = {x["key"]: x for x in map(json.loads, _lines(outcomes))}
    every, grids = {}, {chip: [(1, 1, 1)] for chip in chips or CHIPS}
    for chip in grids:
        for op, args in recorded:
            for launch in launches(op, args, CHIPS[chip].target):
                every[launch.key] = chip, launch
                grids[chip].append((*launch.grid, 1, 1)[:3])
    todo = [(key, launch) for key, (_, launch) in every.items() if key not in known]
    with outcomes.open("a") as f:
        for i, outcome in enumerate(_outcomes(todo, jobs), start=1):
            known[outcome["key"]] = outcome
            print(json.dumps(outcome), file=f, flush=True)
            print(f"\rTriton {triton.__version__}: {i} of {len(todo)} launches", end="", file=sys.stderr)
    print(file=sys.stderr)

    passed = True
    for chip, limit in ((chip, CHIPS[chip].shared_kib) for chip in grids):
        found = [known[key] for key, (x, _) in every.items() if x == chip]
        _, y, z = map(max, zip(*grids[chip], strict=True))
        kib = max(x.get("shared", 0) for x in found) / 1024
        failures = [f"{x['kernel']}: {x['error']}" for x in found if "error" in x]
        failures += [f"{x['kernel']}: too much shared memory" for x in found if x.get("shared", 0) > limit * 1024]
        failures += [f"a grid of {n} blocks along {axis}" for axis, n in (("y", y), ("z", z)) if n > LIMIT_YZ]
        seconds = round(sum(x["seconds"] for x in found))
        print(ROW.format(triton.__version__, chip, len(found), len(failures), f"{kib:.1f} of {limit}", y, z, seconds))
        for failure, times in Counter(failures).items():
            print(f"    {times} x {failure}")
        passed &= not failures
    return passed


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def _outcomes(todo: list[tuple[str, Launch]], jobs: int) -> Iterator[dict]:
    # Of each launch, as they come: shared bytes, or an error and what may tell why.
    waiting, running = todo[::-1], {}
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                key, launch = waiting.pop()
                folder = Path(tempfile.mkdtemp(dir=scratch))
                running[os.fork() or _compile(launch, folder)] = key, launch, folder
            pid, status, usage = os.wait3(0)
            key, launch, folder = running.pop(pid)
            if (folder / "shared").is_file():
                result = {"shared": int((folder / "shared").read_text())}
            else:
                errors = [line for line in _lines(folder / "log") if "error" in line.lower()]
                result = {"error": (errors or [f"the process ended with {os.waitstatus_to_exitcode(status)}"])[0]}
                names, constants = launch.source.fn.arg_names, launch.source.constants.items()
                result["constants"] = {names[i]: str(value) for (i,), value in constants}
            shutil.rmtree(folder)
            yield {"key": key, "kernel": launch.kernel, "seconds": round(usage.ru_utime + usage.ru_stime, 2)} | result


def _compile(launch: Launch, folder: Path) -> NoReturn:
    # In a forked process, which ends here.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        (folder / "shared").write_text(str(launch.compiled().metadata.shared))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def environment(version: str) -> dict[str, str]:
    """Of a process that imports this Triton, which is installed beside the others when it is not there."""
    paths = [str(ROOT), str(ROOT / "tests")]
    if version != importlib.metadata.version("triton"):
        folder = peers.FOLDER / f"triton-{version.rpartition('.')[0]}"
        if not (folder / f"triton-{version}.dist-info").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
        paths.insert(0, str(folder))
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return others | {"PYTHONPATH": os.pathsep.join(paths)}


def main() -> int:
    versions = [OLDEST, importlib.metadata.version("triton")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--triton", action="append", metavar="VERSION", help=f"repeatable; {' and '.join(versions)}")
    parser.add_argument("--chip", action="append", help="repeatable; every chip that benchmarks.inspect knows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="so many launches are compiled at a time")
    parser.add_argument("--calls", type=Path, help="recorded calls instead of those of the tests")
    parser.add_argument("--outcomes", type=Path, default=FOLDER / "outcomes.jsonl", help="kept from run to run")
    parser.add_argument("--here", action="store_true", help="under the Triton of this process")
    options = parser.parse_args()
    if options.here:
        return not compile_all(options.calls, options.outcomes, options.chip, options.jobs)
    FOLDER.mkdir(parents=True, exist_ok=True)
    calls = options.calls or record_suite()
    command = [sys.executable, __file__, *sys.argv[1:], "--here", "--calls", str(calls)]
    runs = [
        subprocess.run(command, env=environment(version), stdout=subprocess.PIPE, text=True, check=False)
        for version in options.triton or versions
    ]
    print(ROW.format("Triton", "chip", "launches", "failures", "shared KiB", "grid y", "grid z", "CPU s"))
    print("".join(run.stdout for run in runs), end="")
    return max(run.returncode for run in runs)


if __name__ == "__main__":
    sys.exit(main())
