"""``pretrain`` as processes that are stopped by signals, killed, and started again."""

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import good_folder
from PIL import Image
from runs import SMALL, assert_equal, losses, started, wait_for_step

from mae import load_checkpoint
from mae.__main__ import main
from mae.training.state import path_of, steps_on_disk


@pytest.fixture
def data(tmp_path) -> Path:
    return good_folder(tmp_path / "data", 3)


def test_a_full_disk_costs_no_finished_checkpoint(tmp_path, data):
    """As far as files of a limited size can tell: the one that does not fit is said, and the one before stays."""
    out, options = tmp_path / "run", ["--steps", "8", "--save-every", "4", "--log-every", "1", "--workers", "0"]
    options += ["--eval-every", "100"]
    main(["pretrain", "--data", str(data), "--out", str(out), *SMALL, *options])
    shutil.rmtree(path_of(out, 8))
    before = {file: file.read_bytes() for file in path_of(out, 4).iterdir()}
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))
    process = started(out, data, *options, "--resume", before=limit)
    _, errors = process.ended()
    assert process.exitcode == 1
    assert errors.splitlines()[-1] == (
        f"mae: the checkpoint of step 8 could not be written into {out}: File too large; the one of step 4 is whole"
    )
    assert {file: file.read_bytes() for file in path_of(out, 4).iterdir()} == before
    assert [x.name for x in (out / "checkpoints").iterdir()] == ["step-000004"]


@pytest.mark.parametrize("name", ["SIGINT", *(pytest.param(x, marks=pytest.mark.slow) for x in ("SIGTERM", "SIGHUP"))])
def test_signals_save_and_leave_nobody_behind(tmp_path, data, name):
    out = tmp_path / "run"
    process = started(out, data, "--steps", "100000", "--log-every", "1", "--workers", "1")
    wait_for_step(out, process, 2)
    os.killpg(process.pid, getattr(signal, name))  # as a terminal does: the workers get it too
    _, errors = process.ended(60)
    assert process.exitcode == 3
    assert f"mae: {name}: finishing this step, then saving; again to stop at once\n" in errors
    assert "Traceback" not in errors
    step = losses(out)[-1][0]
    assert errors.splitlines()[-1] == (
        f"mae: stopped after step {step} of 100000. The checkpoint is in {out}; the same command with --resume goes on"
    )
    assert steps_on_disk(out)[-1] == step
    assert load_checkpoint(out).config.image_size == (28, 28)
    assert (out / "reconstructions" / f"step-{step:06}.png").exists()
    assert (out / "report.html").exists()


def test_a_second_signal_stops_at_once(tmp_path, data):
    out = tmp_path / "run"
    process = started(out, data, "--steps", "100000", "--workers", "0", "--batch-size", "1024", "--image-size", "196")
    end = time.monotonic() + 120
    while not (out / "recipe.json").exists():  # which is written when the first step begins
        assert process.is_alive(), process.ended()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.ended(5)
    assert process.exitcode == 1
    assert errors.splitlines()[-3:] == [
        "mae: SIGINT: finishing this step, then saving; again to stop at once", "",
        "mae: stopped at once; checkpoints that were finished are whole",
    ]  # fmt: skip


def test_a_killed_worker_is_a_sentence_and_the_work_is_kept(tmp_path, data):
    out = tmp_path / "run"
    process = started(out, data, "--steps", "100000", "--log-every", "1", "--workers", "2")
    wait_for_step(out, process, 2)
    (worker,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[:1]
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.ended(60)
    assert process.exitcode == 1
    assert "one of 2 worker processes was killed, as the system does where memory runs out" in errors
    assert "Traceback" not in errors
    assert steps_on_disk(out)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(tmp_path, data):
    """Always resumes, loses no more than the steps since the last save, and ends as the run that nobody killed."""
    options = ["--steps", "60", "--save-every", "2", "--log-every", "1", "--workers", "0", "--eval-every", "10000"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    main(["pretrain", "--data", str(data), "--out", str(straight), *SMALL, *options])
    generator, kills = random.Random(0), 0
    while kills < 20:
        before = steps_on_disk(out)[-1] if steps_on_disk(out) else 0
        process = started(out, data, *options, "--resume")
        end = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < end:
            reached = losses(out)[-1][0] if (out / "metrics.jsonl").exists() and losses(out) else 0
            if reached >= before + 2:
                break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.15)
        if not process.is_alive():
            assert process.exitcode == 0, process.ended()
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    main(["pretrain", "--data", str(data), "--out", str(out), *SMALL, *options, "--resume"])
    assert kills >= 10
    assert_equal(straight, out)


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_the_command_resumes_bit_for_bit(tmp_path, data, workers):
    straight, out = tmp_path / "straight", tmp_path / "run"
    options = ["--steps", "14", "--save-every", "5", "--log-every", "1", "--eval-every", "100"]
    main(["pretrain", "--data", str(data), "--out", str(straight), *SMALL, *options, "--workers", "0"])
    process = started(out, data, *options, "--workers", workers)
    wait_for_step(out, process, 6)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    options = [*options, "--workers", workers, "--resume"]
    subprocess.run([sys.executable, "-m", "mae", "pretrain", "--data", str(data), "--out", str(out), *SMALL, *options],
                   check=True, capture_output=True)  # fmt: skip
    assert load_checkpoint(out).config == load_checkpoint(straight).config
    assert_equal(straight, out)
    assert Image.open(out / "reconstructions" / "step-000014.png").size[0] > 100
