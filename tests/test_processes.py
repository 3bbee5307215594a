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
from runs import wait_for_step

from mae.__main__ import main
from mae.training.state import steps_on_disk

SMALL = [
    "--model", "mae_vit_tiny_patch16", "--image-size", "32", "--batch-size", "8", "--device", "cpu", "--workers", "0",
    "--decoder-depth", "1", "--decoder-width", "64", "--base-lr", "0.01", "--log-every", "1", "--steps", "50",
    "--save-every", "20", "--eval-every", "25", "--val-share", "0.25",
]  # fmt: skip


def entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path) -> None:
    one, two = entries(run), entries(other)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == list(range(1, 51))
    for name in ("loss", "val_loss"):
        a, b = ([entry[name] for entry in x if name in entry] for x in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
    assert one[-1]["loss"] < 0.9 * one[0]["loss"]  # it does train


def launched(count: int, data: Path, out: Path, *options: str) -> subprocess.Popen:
    return torchrun(count, "pretrain", "--data", str(data), "--out", str(out), *SMALL, *options)


def torchrun(count: int, *arguments: str) -> subprocess.Popen:
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
    main(["pretrain", "--data", str(data), "--out", str(run), *SMALL])
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
    process = launched(count, data, tmp_path / "run", *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same(alone, tmp_path / "run")
    lines = [line for line in output.splitlines() if line.startswith(("Pre-training", "The model is in"))]
    assert len(lines) == 2  # one process speaks


@pytest.mark.slow
def test_runs_cross_over_and_a_lost_process_ends_them(alone, data, tmp_path):
    """Two processes by DDP, of which one is killed, two by FSDP2, which a signal stops, and one alone."""
    out = tmp_path / "run"
    process = launched(2, data, out)
    wait_for_step(out, process, 23)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert time.monotonic() - begin < 60
    assert "Signal 9 (SIGKILL)" in output
    assert steps_on_disk(out) == [20]

    process = launched(2, data, out, "--resume", "--parallel", "fsdp")
    wait_for_step(out, process, 31)
    process.terminate()
    output, _ = process.communicate(timeout=100)
    assert "SIGTERM: finishing this step, then saving" in output
    assert steps_on_disk(out)[-1] > 30

    main(["pretrain", "--data", str(data), "--out", str(out), *SMALL, "--resume"])
    assert_same(alone, out)


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(data, tmp_path):
    process = launched(2, data, tmp_path / "run", "--batch-size", "7")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    words = "batch_size 7 is not a multiple of 2 processes times 1 micro_batches"
    assert output.count(words) == 1
    assert "mae/commands" not in output  # a frame of a traceback; torchrun adds one of its own
    assert not (tmp_path / "run").exists()
