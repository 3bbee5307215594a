"""The dossier of a GPU, where there is none: no stage stops another, and a kill loses nothing measured."""

import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, record

PYTHON = [sys.executable, "-c"]
# Inside a worker of pytest-xdist, whose variables it would inherit, pytest-benchmark measures nothing.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_XDIST", "TRITON_INTERPRET"))}
ROWS = "import sys; from pathlib import Path; sys.path += ['tests']; from test_gpu_command import append_rows; "


def append_rows(path):
    for i in itertools.count():
        record.append(path, row={"op": str(i), "median_ms": float(i), "text": "x" * 5000})
        time.sleep(0.005)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_runs(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["1", "--out", str(tmp_path)])
    assert stop.value.code == 1
    assert "no GPU on this machine: nothing was run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_stage_names_files_and_tests_that_exist(tmp_path):
    names = {
        call: [stage.name for stage in gpu.stages(call, tmp_path / "f", failed=["tests/t.py::t"])] for call in (1, 2)
    }
    assert names[1] == ["ceilings", "native tests", "test_cuda", "ops", "host", "memcheck"]
    assert names[2][:7] == [
        "failed tests again", "step acgd", "step ae", "step ab", "race of tiles", "step aC", "step af",
    ]  # fmt: skip
    named = {w for call in (1, 2) for stage in gpu.stages(call, tmp_path / "f") for w in stage.command if ".py" in w}
    assert {"tests/test_kernels.py", "tests/test_masked_mse.py", "benchmarks/test_step.py"} < named
    assert all((gpu.ROOT / name).exists() for name in named)
    assert f"def test_{gpu.SMALL[-1]}" in (gpu.ROOT / gpu.SMALL[0]).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_selected_benchmarks_exist(tmp_path):
    commands = {stage.name: stage.command for call in (1, 2) for stage in gpu.stages(call, tmp_path / "f")}
    command = [word for word in commands["ops"] + commands["step acgd"][3:] if not word.startswith("--record")]
    command.append("--collect-only")
    told = subprocess.run(command, cwd=gpu.ROOT, env=ALONE, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout
    assert "test_ops.py::test_" in told.stdout
    assert "test_step.py::test_" in told.stdout


@pytest.fixture
def pretended_stages(monkeypatch):
    def pretend(*made):
        def stages(call, path, *_):
            return [gpu.Stage(n, limit, [w.replace("FILE", str(path)) for w in command]) for n, limit, command in made]

        monkeypatch.setattr(gpu, "stages", stages)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return pretend


@pytest.mark.slow
def test_no_stage_stops_the_next(pretended_stages, tmp_path, capsys):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
    late = tmp_path / "late"
    grandchild = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    pretended_stages(
        ("good", 20, [*PYTHON, "print('3 passed')"]),
        ("bad", 20, [*PYTHON, "print('1 failed'); raise SystemExit(1)"]),
        ("missing", 20, ["no-such-program"]),
        ("endless", 1, [*PYTHON, child.format(grandchild)]),
        ("rows", 15, [*PYTHON, f"{ROWS}append_rows(Path(sys.argv[1]))", "FILE"]),
    )
    assert gpu.main(["1", "--rehearse", "--out", str(tmp_path), "--commit", "abc1234"]) == 1
    (path,) = tmp_path.glob("*.jsonl")
    assert path.name == f"rehearsal-{record.conditions()['date'][:10]}-{record.conditions()['commit']}-call-1.jsonl"
    result = record.read(path)
    assert result["command"] == "python -m benchmarks.gpu 1 --rehearse"
    assert [(stage["stage"], stage["passed"], stage["last_line"]) for stage in result["stages"]] == [
        ("good", True, "3 passed"),
        ("bad", False, "exit code 1; 1 failed"),
        ("missing", False, "no-such-program is not on the PATH"),
        ("endless", False, "killed after 1 s"),
        ("rows", False, "killed after 15 s"),
    ]
    assert [row["median_ms"] for row in result["rows"]] == list(range(len(result["rows"])))
    assert len(result["rows"]) > 10
    printed = capsys.readouterr().out
    assert "FAILED  bad, " in printed
    assert len(printed.splitlines()) <= 60
    assert not late.exists()  # it would be there by now, had only its parent been killed


def test_the_time_of_a_call_is_never_exceeded(pretended_stages, tmp_path):
    pretended_stages(*((name, 60, [*PYTHON, "import time; time.sleep(60)"]) for name in ("one", "two")))
    start = time.monotonic()
    assert gpu.main(["2", "--rehearse", "--out", str(tmp_path), "--seconds", "2"]) == 1
    assert time.monotonic() - start < 15
    (path,) = tmp_path.glob("*.jsonl")
    assert [stage["stage"] for stage in record.read(path)["stages"]] == ["one"]


def test_a_rehearsal_holds_no_speeds(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "1", "--rehearse", "--seconds=1.5", f"--out={tmp_path}"]
    told = subprocess.run(command, cwd=gpu.ROOT, env=ALONE, capture_output=True, text=True, check=False)
    (path,) = tmp_path.glob("*.jsonl")
    assert record.read(path)["kind"] == "interpreter", told.stderr  # as the stages, whose rows it takes
    assert [stage["stage"] for stage in record.read(path)["stages"]] == ["ceilings"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tests_of_the_interpreter_do_not_pass_as_native_ones(tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu", f"--outcomes={tmp_path / 'f'}"]
    command += ["--collect-only", "tests/test_gather_tokens.py"]
    told = subprocess.run(command, cwd=gpu.ROOT, env=ALONE, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "PyTorch sees no GPU here" in told.stdout + told.stderr
    assert not (tmp_path / "f").exists()


def test_killed_at_any_second_the_file_holds_what_was_measured(tmp_path):
    random.seed(0)
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        process = multiprocessing.get_context("fork").Process(target=append_rows, args=(path,))
        process.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.join()
        rows = record.read(path)["rows"]
        assert [row["op"] for row in rows] == [str(i) for i in range(len(rows))]
        lines = path.read_bytes().splitlines()
        assert len(lines) - len(rows) in (0, 1)  # at most the line that was being written


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "f.jsonl"
    record.begin(path, "command")
    record.append(path, row={"op": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": {"op": "b", "med')
    record.append(path, row={"op": "c"})
    result = record.read(path)
    assert [row["op"] for row in result["rows"]] == ["a", "c"]
    assert result["command"] == "command"


@pytest.mark.slow
def test_outcomes_of_tests_are_told_as_they_come(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n", encoding="utf-8",
    )  # fmt: skip
    (tmp_path / "test_broken.py").write_text("import no_such_module", encoding="utf-8")
    path = tmp_path / "f.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu", f"--outcomes={path}", "-n", "1", str(tmp_path)]
    command += ["--continue-on-collection-errors", "-p", "xdist"]
    interpreted = ALONE | {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=gpu.ROOT, env=interpreted, capture_output=True, check=False)
    tests = {re.split("::|/", test["id"])[-1]: test for test in record.read(path)["tests"]}
    outcomes = {name: test["outcome"] for name, test in tests.items()}
    broken = tests.pop("test_broken.py")
    assert outcomes == {
        "test_good": "passed", "test_bad": "failed", "test_left_out": "skipped", "test_broken.py": "failed",
    }  # fmt: skip
    assert "no_such_module" in broken["error"]
    assert tests["test_bad"]["error"].startswith("AssertionError: no assert 1 == 2")
    assert "def test_bad(): assert 1 == 2, 'no'" in tests["test_bad"]["traceback"]
    assert "traceback" not in tests["test_good"]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [list(line) for line in lines] == [["test"]] * 4
    told = gpu.summary({"tests": list(tests.values()), "rows": [], "kind": "gpu"})
    assert told[0] == "1 of 3 tests failed"
    assert "test_bad: AssertionError: no" in told[1]
