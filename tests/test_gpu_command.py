"""``make gpu`` where there is no GPU: it refuses to claim anything, and its record holds what a number needs."""

import sys

import pytest
import torch

from benchmarks import gpu, record


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_runs(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path)])
    assert stop.value.code == 1
    assert "no GPU on this machine: nothing was run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_step_names_files_and_tests_that_exist(tmp_path):
    commands = gpu.steps(tmp_path, "full")
    assert list(commands) == [
        "native tests", "memcheck", "racecheck", "benchmark of the host", "benchmarks of the ops",
        "benchmark of the training step",
    ]  # fmt: skip
    named = {word for command in commands.values() for word in command if word.startswith(("tests/", "benchmarks/"))}
    assert {"tests/test_kernels.py", "tests/test_masked_mse.py"} < named
    assert all((gpu.ROOT / name).exists() for name in named)
    assert f"def test_{gpu.SMALL[-1]}" in (gpu.ROOT / gpu.SMALL[0]).read_text(encoding="utf-8")


@pytest.fixture
def pretended_gpu(monkeypatch):
    facts = {**record.conditions(), "kind": "gpu", "device": "NVIDIA H200 (pretended)"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "conditions", lambda: facts)


def test_the_record(pretended_gpu, monkeypatch, tmp_path, capsys):
    rows = [{"op": "masking", "median_ms": 1.0}]
    record.write(tmp_path / "made.json", command="pytest", rows=rows, ceilings={"copy_gb_per_s": 4000.0})
    made = (tmp_path / "made.json").read_text(encoding="utf-8")
    commands = {
        "good": [sys.executable, "-c", "print('3 passed')"],
        "bad": [sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"],
        "missing": ["no-such-program"],
        "benchmarks": [sys.executable, "-c", f"import sys; open(sys.argv[1], 'w').write({made!r})"],
    }
    monkeypatch.setattr(
        gpu,
        "steps",
        lambda path, size, only: {**commands, "benchmarks": [*commands["benchmarks"], str(path / "ops.json")]},
    )
    out = tmp_path / "results"
    assert gpu.main(["--out", str(out)]) == 1
    (path,) = out.iterdir()
    assert path.name.startswith("nvidia-h200-pretended-")
    result = record.read(path)
    assert {"kind", "commit", "date", "device", "python", "torch", "triton", "uncommitted_changes"} < result.keys()
    assert result["command"] == f"python -m benchmarks.gpu --out {out}"
    assert [(step["step"], step["passed"], step["last_line"]) for step in result["steps"]] == [
        ("good", True, "3 passed"),
        ("bad", False, "1 failed"),
        ("missing", False, "no-such-program is not on the PATH"),
        ("benchmarks", True, ""),
    ]
    assert result["rows"] == rows
    assert result["ceilings"] == {"copy_gb_per_s": 4000.0}
    printed = capsys.readouterr().out
    assert "FAILED  bad" in printed
    assert "passed  good" in printed

    assert gpu.main(["--out", str(out), "--step", "good"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out), "--step", "unknown"])
