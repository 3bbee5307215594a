"""What a run keeps: resumed it ends as one that never stopped, and nothing that was finished is lost or replaced."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import Interrupted, Interrupting, assert_equal, config, images, losses, run_demo_model, weights
from safetensors.torch import load_file

from mae import CheckpointError, mae_vit_demo_patch7
from mae.data import TensorImages
from mae.training.loop import train
from mae.training.metrics import cut_back
from mae.training.run import RunError, open_run
from mae.training.state import path_of, steps_on_disk


@pytest.mark.parametrize("options", [{}, {"clip_grad": 0.5}, {"precision": "bfloat16"}, {"optimizer": "muon"}], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, options):
    run_demo_model(tmp_path / "straight", **options)
    with pytest.raises(Interrupted):
        run_demo_model(tmp_path / "cut", data=Interrupting(images(), 7), save_every=5, **options)
    assert steps_on_disk(tmp_path / "cut") == [5]
    assert losses(tmp_path / "cut")[-1][0] == 7
    history = run_demo_model(tmp_path / "cut", "resume", seed=99, save_every=5, **options)
    assert [entry["step"] for entry in history] == list(range(1, 13))
    assert_equal(tmp_path / "straight", tmp_path / "cut")


def test_losses_after_a_kill_are_means_of_the_same_steps(tmp_path):
    run_demo_model(tmp_path / "straight", log_every=4, save_every=5)
    assert [step for step, _ in losses(tmp_path / "straight")] == [4, 5, 8, 10, 12]
    with pytest.raises(Interrupted):
        run_demo_model(tmp_path / "cut", data=Interrupting(images(), 7), log_every=4, save_every=5)
    run_demo_model(tmp_path / "cut", "resume", log_every=4, save_every=5)
    assert_equal(tmp_path / "straight", tmp_path / "cut")


def test_resuming_takes_the_other_weights_and_moments_and_not_its_own(tmp_path):
    run_demo_model(tmp_path / "straight", steps=8)
    with pytest.raises(Interrupted):
        run_demo_model(tmp_path / "cut", data=Interrupting(images(), 4), save_every=4, steps=8)
    file = next(path_of(tmp_path / "cut", 4).glob("*.safetensors"))
    held = load_file(file)
    assert {name.split(".")[0] for name in held} == {"model", "optimizer"}
    assert {name.rpartition(".")[2] for name in held if name.startswith("optimizer")} == {
        "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip
    run_demo_model(tmp_path / "cut", "resume", steps=8)
    assert_equal(tmp_path / "straight", tmp_path / "cut")


def test_resume_begins_where_there_is_nothing_yet_and_ends_where_all_is_done(tmp_path):
    run_demo_model(tmp_path / "a")
    run_demo_model(tmp_path / "b", "resume")
    assert_equal(tmp_path / "a", tmp_path / "b")
    before = {file: file.read_bytes() for file in (tmp_path / "b").rglob("*") if file.is_file()}
    run_demo_model(tmp_path / "b", "resume")
    assert all(file.read_bytes() == content for file, content in before.items())


def test_what_a_kill_left_out_of_the_end_is_made_up_for(tmp_path):
    run_demo_model(tmp_path, steps=4)
    before = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run_demo_model(tmp_path, "resume", steps=4)
    assert all(torch.equal(before[name], x) for name, x in weights(tmp_path).items())
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="holds a model and no checkpoint to go on from"):
        run_demo_model(tmp_path, "resume", steps=4)


def test_skipped_updates_are_counted_across_resumes(tmp_path):
    pixels = torch.rand(40, 1, 28, 28)
    pixels[7] = float("inf")
    with pytest.raises(Interrupted):
        run_demo_model(tmp_path, data=Interrupting(TensorImages(pixels, 3), 5), steps=10, save_every=5)
    history = run_demo_model(tmp_path, "resume", data=TensorImages(pixels, 3), steps=10)
    assert history[-1]["skipped"] == 2


def test_only_the_last_checkpoints_are_kept(tmp_path):
    run_demo_model(tmp_path, save_every=2, keep=3)
    assert steps_on_disk(tmp_path) == [8, 10, 12]
    assert sorted(x.name for x in (tmp_path / "checkpoints").iterdir()) == [f"step-{i:06}" for i in (8, 10, 12)]


def test_another_recipe_is_refused_with_its_fields(tmp_path):
    run_demo_model(tmp_path, steps=4)
    with pytest.raises(RunError) as error:
        run_demo_model(tmp_path, "resume", data=images(41), steps=5, base_lr=0.03)
    assert str(error.value) == (
        f"{tmp_path} was started with another recipe: steps was 4 and is 5; base_lr was 0.02 and is 0.03. Give it its "
        f"own options again, which --recipe {tmp_path} does"
    )
    with pytest.raises(RunError) as error:
        run_demo_model(tmp_path, "resume", data=images(41), steps=4)
    assert str(error.value) == (
        f"{tmp_path} was started on other images: images was 40 and is 41. Put them back, or begin another run"
    )
    run_demo_model(tmp_path, "resume", steps=4, save_every=1, log_every=2, micro_batches=2)  # how, and not what


def test_another_model_is_refused(tmp_path):
    run_demo_model(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match=r"step-000004 is of another model: model\.\S+ is \(\d"):
        train(mae_vit_demo_patch7(embed_dim=48), images(), config(4), tmp_path, "resume")


def damaged(run: Path, step: int) -> Path:
    return next(path_of(run, step).glob("*.safetensors"))


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_state(file: Path) -> None:
    (file.parent / "state.json").unlink()


def with_garbage(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize("scaler", [5, {"a": 1}], ids=str)
def test_a_state_of_other_things_is_damaged(tmp_path, scaler):
    run_demo_model(tmp_path, steps=4, precision="float16")
    file = path_of(tmp_path, 4) / "state.json"
    for change in ({"scaler": scaler}, {"seconds": "a"}, {"skipped": None}):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError, match="can be resumed"):
            run_demo_model(tmp_path, "resume", steps=4, precision="float16")
        file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_in_half, "has"), (Path.unlink, "is missing"), (without_state, "state.json cannot be read"),
        (with_garbage, "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, words):
    straight, run = tmp_path / "straight", tmp_path / "run"
    run_demo_model(straight, save_every=4, keep=3)
    shutil.copytree(straight, run)
    damage(damaged(run, 12))
    with pytest.warns(UserWarning, match=rf"step-000012 .*{words}.*Resuming from step 8"):
        run_demo_model(run, "resume", save_every=4, keep=3)
    assert_equal(straight, run)
    assert steps_on_disk(run) == [4, 8, 12]
    assert (run / "checkpoints" / "damaged-step-000012").is_dir()
    for step in steps_on_disk(run):
        damage(damaged(run, step))
    with pytest.raises(CheckpointError, match="can be resumed"):
        run_demo_model(run, "resume", save_every=4)


class Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (self.file.touch, ())


def test_no_pickle_is_read(tmp_path):
    """Whatever somebody puts into the folder."""
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(Bomb(touched)))
    assert touched.exists()  # so it would have worked
    touched.unlink()
    run_demo_model(tmp_path, steps=4)
    planted = [path_of(tmp_path, 4) / name for name in (".metadata", "__0_0.distcp", "scaler.pt")]
    for file in planted:
        file.write_bytes(pickle.dumps(Bomb(touched)))
    run_demo_model(tmp_path, "resume", steps=4)
    damaged(tmp_path, 4).write_bytes(pickle.dumps(Bomb(touched)))
    (path_of(tmp_path, 4) / "state.json").write_bytes(pickle.dumps(Bomb(touched)))
    with pytest.raises(CheckpointError, match="is damaged"):
        run_demo_model(tmp_path, "resume", steps=4)
    assert not touched.exists()


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    lines = [json.dumps({"step": i, "loss": 0.1 * i}) + "\n" for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "lo')
    assert [entry["step"] for entry in cut_back(tmp_path, 4)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:4])


def test_a_run_that_is_overwritten_comes_back_if_the_new_one_never_starts(tmp_path):
    run_demo_model(tmp_path, steps=4)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(Interrupted):
        run_demo_model(tmp_path, "overwrite", data=Interrupting(images(), 0))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    kill = "import os, sys; from pathlib import Path; from mae.training.run import open_run\n"
    kill += "with open_run(Path(sys.argv[1]), 'overwrite'): os._exit(9)"
    subprocess.run([sys.executable, "-c", kill, str(tmp_path)], check=False)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(RunError, match="holds a run already"):
        run_demo_model(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    (tmp_path / ".replacing").mkdir()  # killed while it was set aside
    (tmp_path / "model.safetensors").rename(tmp_path / ".replacing" / "model.safetensors")
    with open_run(tmp_path, "resume"):
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"} == before
    run_demo_model(tmp_path, "overwrite", data=images(16), steps=3)
    assert steps_on_disk(tmp_path) == [3]
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]
