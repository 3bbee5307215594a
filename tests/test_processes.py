"""``torchrun``: one, two and four processes see the same batches and masks, and take up each other's runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import good_folder
from processes import torchrun
from runs import wait_for_step

from mae.__main__ import main
from mae.training.state import steps_on_disk

SMALL = [
    "--model", "mae_vit_demo_patch7", "--batch-size", "8", "--device", "cpu", "--workers", "0",
    "--base-lr", "0.01", "--log-every", "1", "--steps", "20",
    "--save-every", "8", "--eval-every", "10", "--val-share", "0.25",
]  # fmt: skip


def entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path) -> None:
    one, two = entries(run), entries(other)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == list(range(1, 21))
    for name in ("loss", "val_loss"):
        a, b = ([entry[name] for entry in x if name in entry] for x in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
    assert one[-1]["loss"] < 0.9 * one[0]["loss"]  # it does train


def arguments(data: Path, out: Path, *options: str) -> list[str]:
    return ["pretrain", "--data", str(data), "--out", str(out), *SMALL, *options]


def launched(count: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "mae", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return good_folder(tmp_path_factory.mktemp("pictures"), 13)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    main(arguments(data, run))
    return run


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, ("--micro-batches", "2")),
        pytest.param(4, ("--parallel", "fsdp", "--clip-grad", "1000"), marks=pytest.mark.slow),
    ],
    ids=["2 by DDP", "4 by FSDP2"],
)
def test_the_number_of_processes_changes_nothing(alone, data, tmp_path, count, options):
    run = tmp_path / "run"
    started = torchrun(count, run, *arguments(data, run, *options))
    (output, _), *others = [process.ended() for process in started]
    assert [process.exitcode for process in started] == [0] * count
    assert_same(alone, run)
    lines = [line for line in output.splitlines() if line.startswith(("Pre-training", "The model is in"))]
    assert len(lines) == 2
    assert not any(output for output, _ in others)  # one process speaks


@pytest.mark.slow
def test_runs_cross_over_and_a_lost_process_ends_them(alone, data, tmp_path):
    """Two processes by DDP, of which one is killed, two by FSDP2, which a signal stops, and one alone."""
    out = tmp_path / "run"
    process = launched(2, *arguments(data, out))
    wait_for_step(out, process, 9)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert time.monotonic() - begin < 60
    assert "Signal 9 (SIGKILL)" in output
    assert steps_on_disk(out) == [8]

    process = launched(2, *arguments(data, out, "--resume", "--parallel", "fsdp"))
    wait_for_step(out, process, 12)
    process.terminate()
    output, _ = process.communicate(timeout=100)
    assert "SIGTERM: finishing this step, then saving" in output
    assert steps_on_disk(out)[-1] > 11

    main(arguments(data, out, "--resume"))
    assert_same(alone, out)


def test_what_one_process_refuses_all_refuse(data, tmp_path):
    run = tmp_path / "run"
    started = torchrun(2, run, *arguments(data, run, "--batch-size", "7"))
    (_, words), (_, others) = [process.ended() for process in started]
    assert [process.exitcode for process in started] == [1, 1]
    assert words.strip() == "mae: batch_size 7 is not a multiple of 2 processes times 1 micro_batches"
    assert others == ""
    assert not run.exists()
