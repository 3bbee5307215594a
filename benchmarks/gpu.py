"""A dossier of one lent GPU, in two calls: ``python -m benchmarks.gpu 1 --out DIR``, then ``2 --after FILE``.

Whatever is measured is appended to one result file the moment it exists, what is printed to a log beside it. Each stage
has a limit of its own, and none stops another; killed at any second, the file holds all that came before.
``--rehearse`` runs the same stages without a GPU, kernels in Triton's interpreter, on tiny shapes.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.record import ROOT

# tests/test_NAME.py
NATIVE = [
    "random_resized_crop", "masking", "patch_embed", "gather_tokens", "scatter_mask_tokens", "masked_mse",
    "linear_masked_mse", "kernels", "dispatch", "strides", "any_size", "transforms", "backend", "nn", "block", "step",
    "model_under_pytorch", "apply", "apply_calls", "apply_trial", "apply_precision",
]  # fmt: skip
# Every op at small shapes; without PyTorch's cache each tensor is an allocation of its own, with edges to check.
SMALL = ["tests/test_kernels.py", "-k", "nothing_is_written_outside"]
MEMCHECK = ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=1", "--target-processes=all"]
BUDGET = {1: 430, 2: 400}  # seconds; a machine starts in half a minute
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read before the tests' conftest.py sets it, where no GPU is


@dataclass(frozen=True)
class Stage:
    name: str
    limit: int  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def stages(call: int, path: Path, rehearse: bool = False, failed: Sequence[str] = ()) -> list[Stage]:
    """Those of a call, what matters most first; ``path`` is the result file, ``failed`` are tests of call 1."""
    python, cores = [sys.executable, "-m"], "2" if rehearse else str(max((os.cpu_count() or 3) - 2, 1))
    tests = [*python, "pytest", "-p", "benchmarks.gpu", f"--outcomes={path}", "--continue-on-collection-errors"]
    tests += ["--tb=short"]  # thousands of failures leave a log that can be carried away
    tests += ["--timeout=150"] if importlib.util.find_spec("pytest_timeout") else []
    spread = ["-n", cores, "--dist=worksteal"]
    size, at = ("tiny", "gather or masking") if rehearse else ("full", "256 and ViT-B")
    bench = [*python, "pytest", "--benchmark-only", f"--record={path}", f"--size={size}"]
    short = ["--step-rounds=2", "--step-dtypes=float32"]
    step = [*bench, "benchmarks/test_step.py", *(short if rehearse else ["-k", at])]

    def compiled(names: str) -> Stage:
        return Stage(f"step {names}", 130, [*step, f"--contenders={names}"])

    race = [*python, "benchmarks.race", f"--record={path}", "--seconds=75", *(["--only=gather"] if rehearse else [])]
    checked = [
        Stage("memcheck", 120, [*MEMCHECK, *tests, *SMALL], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        *(Stage(mode, 40, [*tests, *SMALL], {"TRITON_INSTRUMENTATION_MODE": mode}) for mode in _instrumentation()),
    ]
    if call == 1:
        files = [f"tests/test_{name}.py" for name in (["gather_tokens"] if rehearse else NATIVE)]
        return [
            Stage("ceilings", 40, [*python, "benchmarks.ceilings", f"--record={path}"]),
            # Each process would start as many compilers as there are cores.
            Stage("native tests", 220, [*tests, *spread, *files], {"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
            Stage("test_cuda", 90, [*tests, "tests/test_cuda.py"]),
            Stage("ops", 110, [*bench, "benchmarks/test_ops.py", "-k", at, "--compiled=", "--max-rounds=100"]),
            Stage("host", 45, [*bench, "benchmarks/test_host.py"]),
            *checked[:1],
        ]
    return [
        *([Stage("failed tests again", 60, [*tests, *spread, *failed])] if failed else []),
        # Those that are compiled take more than a minute each before anything is measured: one at a time.
        Stage("step acgd", 70, [*step, f"--contenders={'ad' if rehearse else 'acgd'}"]),
        *(compiled("ae"), compiled("ab")),
        Stage("race of tiles", 90, race),
        *(() if rehearse else (compiled("aC"), compiled("af"))),
        *checked,
    ]


def _instrumentation() -> list[str]:
    """Triton's own checkers: it takes the name of one that it does not have in silence."""
    compiler = importlib.util.find_spec("triton.backends.nvidia.compiler")
    text = Path(compiler.origin).read_text(encoding="utf-8") if compiler else ""
    return [mode for mode in ("consan", "gsan") if mode in text]


def run(stage: Stage, limit: float, log: Path) -> dict:
    """Run one stage with its output in the log; at its limit it is killed with all that it started."""
    start, problem = time.monotonic(), ""
    with log.open("ab") as out:
        out.write(f"\n--- {stage.name}: {' '.join(stage.command)}\n".encode())
        out.flush()
        begin = out.tell()
        if shutil.which(stage.command[0]) is None:
            problem = f"{stage.command[0]} is not on the PATH"
        else:
            environment = {**os.environ, **stage.environment}
            # A group of its own can be killed whole. A session of its own would outlive whoever ends this command.
            streams = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": out}
            process = subprocess.Popen(stage.command, **streams, preexec_fn=os.setpgrp)
            try:
                problem = f"exit code {code}" if (code := process.wait(limit)) else ""
            except subprocess.TimeoutExpired:
                problem = f"killed after {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    last = log.read_bytes()[begin:].decode(errors="replace").strip().rpartition("\n")[2].strip(" =")[:200]
    seconds, told = round(time.monotonic() - start, 1), "; ".join(filter(None, (problem, last)))
    return {"stage": stage.name, "passed": not problem, "seconds": seconds, "last_line": told}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("call", type=int, choices=[1, 2], help="1: correctness and ops; 2: the step and the tiles")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the result file and its log")
    parser.add_argument(
        "--after", type=Path, metavar="FILE", help="of call 1, by default the one beside: its failed tests run again"
    )
    parser.add_argument("--seconds", type=float, help=f"in all; by default {BUDGET[1]} and {BUDGET[2]}")
    parser.add_argument("--commit", help="of the sources, where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in Triton's interpreter")
    options = parser.parse_args(argv)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU on this machine: nothing was run and nothing is claimed\n")
    if options.commit:
        os.environ["MAE_COMMIT"] = options.commit
    name = "rehearsal" if options.rehearse else record.name()
    facts = record.conditions()
    path = options.out.resolve() / f"{name}-{facts['date'][:10]}-{facts['commit']}-call-{options.call}.jsonl"
    after, failed = options.after or path.with_name(path.name.replace("call-2", "call-1")), []
    if options.call == 2 and after.is_file():
        failed = [test["id"] for test in record.read(after)["tests"] if test["outcome"] == "failed"]
    elif options.call == 2:
        print(f"there is no {after}: no failed test runs again", flush=True)
    chosen = stages(options.call, path, options.rehearse, failed)

    end = time.monotonic() + (options.seconds or BUDGET[options.call])
    record.begin(path, f"python -m benchmarks.gpu {options.call}{' --rehearse' * options.rehearse}")
    passed = True
    for stage in chosen:
        if (left := end - time.monotonic()) < 1:
            break
        done = run(stage, min(stage.limit, left), path.with_suffix(".log"))
        record.append(path, stage=done)
        passed &= done["passed"]
        outcome = "passed" if done["passed"] else "FAILED"
        print(f"{outcome}  {stage.name}, {done['seconds']} s: {done['last_line']}", flush=True)
    print("\n".join(summary(record.read(path))))
    print(f"wrote {path}")
    return 0 if passed else 1


def summary(result: dict) -> list[str]:
    """At most 40 lines: the first tests that failed, then each op beside its floor and its clone, and the steps."""
    failed = [test for test in result["tests"] if test["outcome"] == "failed"]
    lines = [f"{len(failed)} of {len(result['tests'])} tests failed"] if result["tests"] else []
    lines += [f"  {test['id']}: {test['error']}"[:200] for test in failed[:12]]
    for row in result["rows"] if result["kind"] == "gpu" else ():
        if row.get("backend") == "triton" and row["pass"] != "backward" and "median_ms" in row:
            shares = f"{row['of_floor']:.0%} of the floor, {row['of_clone']:.0%} of a clone, {row['speedup']:.1f}x"
            lines.append(f"{row['op']}, {row['pass']}: {row['median_ms'] * 1e3:.1f} us, {shares}")
        elif "contender" in row:
            lines.append(f"{row['shape']}, {row['contender']}: {row['images_per_s']:.0f} images/s")
    return lines[:40]


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="result file to which the outcome of each test is appended")


def pytest_configure(config):
    path = config.getoption("--outcomes")
    if not path:
        return
    if not torch.cuda.is_available() and not INTERPRETED:
        pytest.exit("PyTorch sees no GPU here: tests in the interpreter would pass as native ones", returncode=1)
    if "TRITON_INSTRUMENTATION_MODE" in os.environ and torch.cuda.is_available():
        import triton

        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist tells its controller, which writes
        config.pluginmanager.register(_Outcomes(path))


class _Outcomes:
    def __init__(self, path: Path):
        self._path = path

    def pytest_collectreport(self, report):
        if report.outcome == "failed":  # a file whose import fails
            self._append(report, 0.0)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self._append(report, report.duration)

    def _append(self, report, seconds: float):
        test = {"id": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            # The log has tracebacks only after the last test: a stage that is killed leaves none there.
            traceback = re.sub(r"\s+", " ", str(report.longrepr))[-1500:]
            error = re.sub(r"\s+", " ", crash.message)[:300] if crash else traceback[-300:]
            test |= {"error": error, "traceback": traceback}
        record.append(self._path, test=test)


if __name__ == "__main__":
    sys.exit(main())
