"""The examples run as their readers run them: what they print shows that they learn, what they write is read."""

import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from PIL import Image

from mae import MaskedAutoencoder, load_checkpoint
from mae.__main__ import main

FOLDER = Path(__file__).parent.parent / "examples"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| \[(\w+)\.py\].*\| `python (.+?)` \|", README, re.MULTILINE))
slow = pytest.mark.slow  # each trains for seconds, on code that other tests hold against its definition


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run what follows python in a command, with options that make it shorter, in an empty folder: what it prints."""

    def output(command: str, *options: str) -> str:
        monkeypatch.chdir(tmp_path)
        AcceleratorState._reset_state(reset_partial_state=True)
        script, *given = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *given, *options])
        runpy.run_path(str(FOLDER.parent / script), run_name="__main__")
        return capsys.readouterr().out

    yield output
    AcceleratorState._reset_state(reset_partial_state=True)  # it is that of the process, and others ask for another


def losses(told: str) -> list[float]:
    """Of steps, of epochs, and of Hugging Face's Trainer."""
    return [float(x) for x in re.findall(r"^(?:(?:step|epoch) +\d+  loss |\{'loss': '?)(\d+\.\d+)", told, re.MULTILINE)]


def numbers(pattern: str, told: str) -> list[float]:
    """Where # stands for a number."""
    return [float(x) for x in re.search(pattern.replace("#", r"(\d+\.\d+)"), told).groups()]


def test_the_list_has_every_example_and_each_is_short_and_says_what_to_expect():
    examples = sorted(FOLDER.glob("*.py"))
    assert [x.stem for x in examples] == [*COMMANDS]
    for path in examples:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 100
        assert re.search(r"prints?\b.*\btakes?\b.*\bCPU\b", re.search(r'"""(.+?)"""', text, re.DOTALL)[1], re.DOTALL)


@slow
def test_own_dataset(run, tmp_path):
    """Its commands read what it wrote, as they stand."""
    told = run(COMMANDS["own_dataset"], "--epochs", "1")
    before, after = numbers("loss on pictures not trained on: # before, # after", told)
    assert max(*losses(told), after) < 0.5 * before
    *_, reconstruct, probe = told.splitlines()
    for line in (reconstruct, probe):
        python, m, mae, *arguments = shlex.split(line)
        assert (python, m, mae) == ("python", "-m", "mae")
        main(arguments)
    assert Image.open(tmp_path / "reconstructions.png").width > 28


@slow
def test_own_masks(run):
    told = run(COMMANDS["own_masks"], "--steps", "15")
    assert len(losses(told)) == 10
    assert all(x[-1] < 0.8 * x[0] for x in (losses(told)[:5], losses(told)[5:]))
    counts = [int(x) for x in re.search(r"\[(.+)\] of 16", told)[1].split(", ")]
    assert len(set(counts)) > 2
    for pattern in ("loss # together, # alone", "zeros: loss #, with noise: #", "loss # by masked_mse, # by hand"):
        one, other = numbers(pattern, told)
        assert one == pytest.approx(other, abs=2e-5)


@slow
def test_own_model(run):
    told = run(COMMANDS["own_model"], "--steps", "50")
    before, after = numbers("loss on these: # before, # after", told)
    assert losses(told)[-1] < 0.85 * losses(told)[0]
    assert after < 0.85 * before


@slow
def test_video(run, tmp_path):
    told = run(COMMANDS["video"], "--steps", "20")
    before, after = numbers("not trained on: # before, # after", told)
    assert after < 0.7 * before
    gif = Image.open(tmp_path / "runs" / "video.gif")
    assert gif.n_frames == 8
    seen, _, there = np.split(np.asarray(gif.convert("L"), int), 3, axis=1)
    assert 0.5 < (abs(seen - there) > 8).mean() < 0.9  # grey where 75 % is hidden


@slow
def test_hugging_face_has_the_losses_of_the_model_without_apply(run, tmp_path):
    """Two lines of it are about mae_kernels; without them it prints the same."""
    told = run(COMMANDS["hugging_face"], "--steps", "50")
    lines = (FOLDER / "hugging_face.py").read_text(encoding="utf-8").splitlines(keepends=True)
    without = [line for line in lines if not re.match(r"\s*(import mae_kernels\b|print\(mae_kernels\.apply)", line)]
    assert len(lines) - len(without) == 2
    (tmp_path / "without.py").write_text("".join(without), encoding="utf-8")
    assert losses(told)[-1] < 0.85 * losses(told)[0]
    assert losses(run(str(tmp_path / "without.py"), "--steps", "50")) == pytest.approx(losses(told), abs=1e-3)


@slow
def test_segmentation(run):
    told = run(COMMANDS["segmentation"], "--steps", "40")
    before, after = numbers("mean IoU of 11 classes: # before, # after", told)
    assert losses(told)[-1] < 0.5 * losses(told)[0]
    assert before < 0.08 < 0.1 < after  # nothing but background is below 0.08


@slow
def test_accelerate_loop_is_the_same_started_by_python_and_by_accelerate(run, tmp_path, monkeypatch):
    """What the one is told by an option, the other is told by the launcher's; that starts its process in this one."""
    options = ["--epochs", "1", "--cpu"]
    told = run(COMMANDS["accelerate_loop"], *options)
    before, after = numbers("not trained on: # before, # after", told)
    assert "bf16 mixed precision" in told
    assert after < 0.5 * before
    assert isinstance(load_checkpoint(tmp_path / "runs" / "accelerate"), MaskedAutoencoder)

    def start(command: list[str], env: dict[str, str]):
        for name in {name for name in env if env[name] != os.environ.get(name)}:
            monkeypatch.setenv(name, env[name])
        python, script, *arguments = (word for word in command if word != "-u")
        assert (python, arguments) == (sys.executable, options)
        assert run(script, *arguments) == told
        return SimpleNamespace(wait=lambda: None, returncode=0)

    called = Mock(side_effect=start)
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=called))
    flags = ["--cpu", "--mixed_precision=bf16", "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
    arguments = launch.launch_command_parser().parse_args([*flags, str(FOLDER / "accelerate_loop.py"), *options])
    launch.launch_command(arguments)
    called.assert_called_once()


@slow
def test_token_selection_is_equal(run):
    told = run(COMMANDS["token_selection"], "--steps", "1")
    assert re.findall(r"^(\w+): equal; .+ times as fast$", told, re.MULTILINE) == ["apply_masks", "restore"]


def test_token_selection_tells_a_difference():
    """In a result, and in a gradient alone."""
    script = runpy.run_path(str(FOLDER / "token_selection.py"))
    x = [torch.randn(2, 3)]
    script["compare"]("same", lambda x: 2 * x, lambda x: x + x, x, 1)
    for other in (lambda x: 2 * x + 1, lambda x: x + x.detach()):
        with pytest.raises(AssertionError, match=r"^another: the results or the gradients differ"):
            script["compare"]("another", lambda x: 2 * x, other, x, 1)
