"""A run folder holds one run: nobody overwrites it unasked, and what is refused or fails leaves it as it was."""

import subprocess
import sys

import pytest
import torch
from pictures import good_folder, unreadable_files
from PIL import Image

from mae import CheckpointError, mae_vit_demo_patch7
from mae.__main__ import main
from mae.data import TensorImages, usable_workers
from mae.requirements import require
from mae.training.loop import train
from mae.training.recipe import TrainConfig
from mae.training.run import RunError, open_run

SMALL = [
    "--model", "mae_vit_demo_patch7", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--steps", "2",
    "--eval-every", "1000",
]  # fmt: skip


def contents(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code


@pytest.fixture
def run(tmp_path):
    main(["pretrain", "--data", str(good_folder(tmp_path / "data", 2)), "--out", str(tmp_path / "run"), *SMALL])
    return tmp_path / "run"


def test_a_run_is_not_overwritten_unasked(run):
    before, data = contents(run), run.parent / "data"
    found = "model.safetensors, metrics.jsonl, config.json, checkpoints"
    again = ["pretrain", "--data", data, "--out", run, *SMALL]
    assert refused(*again) == (
        f"mae: {run} holds a run already ({found}); add --resume to go on with it, or --overwrite, "
        "or choose another --out"
    )
    assert refused("demo", "--out", run).startswith(f"mae: {run} holds a run already")
    assert contents(run) == before
    main([*map(str, again), "--overwrite", "--seed", "1"])
    after = contents(run)
    assert {name for name in after if "tfevents" not in name} == {name for name in before if "tfevents" not in name}
    assert after["model.safetensors"] != before["model.safetensors"]


def test_an_overwriting_run_that_cannot_start_leaves_the_old_one(run):
    before = contents(run)
    unreadable_files(run.parent / "bad")
    for options in (["--data", run.parent / "bad"], ["--data", run.parent / "data", "--precision", "float32",
                                                    "--residual", "bfloat16"]):  # fmt: skip
        refused("pretrain", "--out", run, *SMALL, "--overwrite", *options)
        assert contents(run) == before


def test_one_process_at_a_time(tmp_path):
    hold = "import sys; from pathlib import Path; from mae.training.run import open_run\n"
    hold += "with open_run(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    try:
        data = good_folder(tmp_path / "data", 1)
        words = refused("pretrain", "--data", data, "--out", tmp_path / "run", *SMALL)
        assert words == f"mae: another process writes into {tmp_path / 'run'}; choose another --out, or wait for it"
    finally:
        process.kill()
        process.wait()
    with open_run(tmp_path / "run"), open_run(tmp_path / "run"):  # what a killed process left is no obstacle
        pass
    assert [*(tmp_path / "run").iterdir()] == []


def test_a_full_disk_ends_in_a_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    config = TrainConfig(steps=2, batch_size=4, device="cpu", log_every=1, workers=0)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        train(mae_vit_demo_patch7(), TensorImages(torch.rand(8, 1, 28, 28)), config, tmp_path, "resume")
    with pytest.raises(RunError, match="holds a run already"):
        train(mae_vit_demo_patch7(), TensorImages(torch.rand(8, 1, 28, 28)), config, tmp_path)


def test_a_picture_lies_where_it_says(run, tmp_path, capsys):
    main(
        ["reconstruct", "--checkpoint", str(run), "--images", str(tmp_path / "data"), "--out", str(tmp_path / "plain")]
    )
    assert f"Wrote 2 reconstructions to {tmp_path / 'plain.png'}" in capsys.readouterr().out
    assert Image.open(tmp_path / "plain.png").size[0] > 100


def test_more_workers_than_cores_are_not_started(tmp_path, capsys):
    cores = usable_workers(100000)
    assert 0 < cores < 1000
    assert usable_workers(1) == 1
    run = ["pretrain", "--data", good_folder(tmp_path / "data", 1), "--out", tmp_path / "run", *SMALL]
    main([*map(str, run), "--workers", "100000"])
    assert f"Warning: 100000 workers were asked for; {cores} are started, one a core" in capsys.readouterr().err


def test_missing_packages_are_named():
    require("json", "torch")
    with pytest.raises(
        ModuleNotFoundError, match=r"^mae needs no_such, nor_this, which pip install 'mae_kernels\[mae\]'"
    ):
        require("no_such", "json", "nor_this")
