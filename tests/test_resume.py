"""A run that is stopped, killed or resumed ends as one that never was, and nothing that was finished is lost."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import good_folder
from PIL import Image
from safetensors.torch import load_file

from mae import CheckpointError, load_checkpoint, mae_vit_demo_patch7
from mae.__main__ import main
from mae.data import TensorImages
from mae.data.randomness import derived_seed
from mae.training.loop import TrainConfig, train
from mae.training.metrics import TrainingStopped, cut_back
from mae.training.run import RunError, open_run
from mae.training.state import path_of, steps_on_disk
from mae.training.step import TrainingStep
from mae_kernels import random_masking

SMALL = [
    "--model", "mae_vit_tiny_patch16", "--image-size", "32", "--batch-size", "4", "--device", "cpu",
    "--decoder-depth", "1", "--decoder-width", "64",
]  # fmt: skip


def images(count: int = 40) -> TensorImages:
    generator = torch.Generator().manual_seed(5)
    return TensorImages(torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator), seed=3)


def config(steps: int = 12, **options) -> TrainConfig:
    shared = {"batch_size": 8, "base_lr": 0.02, "device": "cpu", "log_every": 1, "workers": 0, "seed": 3}
    return TrainConfig(**shared | {"steps": steps, "eval_every": 10**6} | options)


def run_demo_model(run: Path, mode: str = "new", data: TensorImages | None = None, seed: int = 0, **options):
    torch.manual_seed(seed)
    return train(mae_vit_demo_patch7(), data or images(), config(**options), run, mode)


class Interrupted(Exception):
    pass


class Interrupting(TensorImages):
    """Fails like a power cut in the batch after so many."""

    def __init__(self, data: TensorImages, batches: int):
        super().__init__(data.images, data.seed)
        self.left = batches

    def __getitems__(self, keys):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().__getitems__(keys)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries]


def assert_equal(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(one) == losses(other)


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


def test_resuming_takes_the_other_weights_and_moments_and_not_its_own(tmp_path):
    """Broken on purpose: without the optimizer's state the runs part."""
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
        f"{tmp_path} was started with another recipe: steps was 4 and is 5; base_lr was 0.02 and is 0.03; "
        "data images was 40 and is 41. Give it its own options again"
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
    def __reduce__(self):
        return (Path("/tmp/mae-pickle-was-run").touch, ())


def test_no_pickle_is_read(tmp_path):
    """Whatever somebody puts into the folder."""
    run_demo_model(tmp_path, steps=4)
    planted = [path_of(tmp_path, 4) / name for name in (".metadata", "__0_0.distcp", "scaler.pt")]
    for file in planted:
        file.write_bytes(pickle.dumps(Bomb()))
    run_demo_model(tmp_path, "resume", steps=4)
    damaged(tmp_path, 4).write_bytes(pickle.dumps(Bomb()))
    (path_of(tmp_path, 4) / "state.json").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="is damaged"):
        run_demo_model(tmp_path, "resume", steps=4)
    assert not Path("/tmp/mae-pickle-was-run").exists()


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


def test_losses_that_are_not_finite_are_skipped_and_counted(tmp_path):
    pixels = torch.rand(40, 1, 28, 28)
    pixels[7] = float("inf")
    history = run_demo_model(tmp_path, data=TensorImages(pixels), steps=10)
    assert [entry.get("skipped", 0) for entry in history] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0] or history[-1][
        "skipped"
    ] == 2
    assert history[-1]["skipped"] == 2  # the image is seen once in each of two epochs
    assert all(x.isfinite().all() for x in weights(tmp_path).values())
    assert [loss is None for _, loss in losses(tmp_path)].count(True) == 2


def test_too_many_of_them_stop_the_run_with_the_files_of_the_batch(tmp_path):
    run_demo_model(tmp_path / "good", steps=4)
    with pytest.raises(TrainingStopped) as stop:
        run_demo_model(tmp_path / "bad", data=TensorImages(torch.full((40, 1, 28, 28), float("nan"))), max_skipped=3)
    words = str(stop.value)
    assert words.startswith("stopped: 3 losses in a row were not finite, the first of these at step 1, whose files are")
    assert "image " in words
    assert len((tmp_path / "bad" / "non-finite.txt").read_text().splitlines()) == 3 * 8
    assert not (tmp_path / "bad" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    run_demo_model(tmp_path, steps=4)
    before = weights(tmp_path)
    torch.manual_seed(0)
    model = mae_vit_demo_patch7()
    model.norm.bias.data[0] = float("nan")
    with pytest.raises(TrainingStopped, match="the weights are not finite after step 5, so they are not saved"):
        train(model, images(), config(5, max_skipped=100), tmp_path / "other")
    assert not (tmp_path / "other" / "model.safetensors").exists()
    assert weights(tmp_path).keys() == before.keys()


def test_float16_scales_the_loss_and_resumes(tmp_path):
    run_demo_model(tmp_path / "straight", precision="float16", steps=6)
    with pytest.raises(Interrupted):
        run_demo_model(tmp_path / "cut", data=Interrupting(images(), 4), save_every=3, precision="float16", steps=6)
    scaler = json.loads((path_of(tmp_path / "cut", 3) / "state.json").read_text())["scaler"]
    assert scaler["scale"] > 1
    run_demo_model(tmp_path / "cut", "resume", precision="float16", steps=6)
    assert_equal(tmp_path / "straight", tmp_path / "cut")


def test_masks_are_a_function_of_seed_and_step(tmp_path, monkeypatch):
    seen = []

    class Step(TrainingStep):
        def __call__(self, images, masking=None):
            seen.append(masking)
            return super().__call__(images, masking)

    monkeypatch.setattr("mae.training.loop.TrainingStep", Step)
    run_demo_model(tmp_path, steps=3, seed=1)
    for step, masking in enumerate(seen):
        generator = torch.Generator().manual_seed(derived_seed("mask", 3, (step, 0)))
        expected = random_masking(8, 16, 0.75, generator=generator)
        assert all(torch.equal(a, b) for a, b in zip(masking, expected, strict=True))
    assert not torch.equal(seen[0].mask, seen[1].mask)


def test_the_learning_rate_is_a_function_of_the_step():
    schedule = config(20, batch_size=256, warmup=0.2, base_lr=1e-3).schedule(images=1000)
    rates = [schedule.lr(step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 2e-5
    assert config(1, batch_size=512, base_lr=1e-3).schedule(10).peak_lr == pytest.approx(2e-3)


def test_epochs_are_steps():
    published = TrainConfig(epochs=800, warmup_epochs=40, batch_size=4096).schedule(1_281_167)
    assert published.steps == round(800 * 1_281_167 / 4096)
    assert published.warmup == round(40 * 1_281_167 / 4096)
    assert published.peak_lr == pytest.approx(2.4e-3)
    assert published.eval_every == 25023  # 80 epochs
    with pytest.raises(ValueError, match="steps 5 and epochs 3 say the same thing"):
        TrainConfig(steps=5, epochs=3)


@pytest.fixture
def data(tmp_path) -> Path:
    return good_folder(tmp_path / "data", 3)


def started(out: Path, data: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mae", "pretrain", "--data", str(data), "--out", str(out), *SMALL, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


def wait_for_step(out: Path, process: subprocess.Popen, step: int) -> None:
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_disk_costs_no_finished_checkpoint(tmp_path, data):
    """As far as files of a limited size can tell: the one that does not fit is said, and the one before stays."""
    out, options = tmp_path / "run", ["--steps", "8", "--save-every", "4", "--log-every", "1", "--workers", "0"]
    options += ["--eval-every", "100"]
    main(["pretrain", "--data", str(data), "--out", str(out), *SMALL, *options])
    shutil.rmtree(path_of(out, 8))
    before = {file: file.read_bytes() for file in path_of(out, 4).iterdir()}
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
    limited += "sys.argv = ['mae', *sys.argv[1:]]; runpy.run_module('mae', run_name='__main__')"
    command = [sys.executable, "-c", limited, "pretrain", "--data", str(data), "--out", str(out), *SMALL, *options]
    process = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        f"mae: the checkpoint of step 8 could not be written into {out}: File too large; the one of step 4 is whole"
    )
    assert {file: file.read_bytes() for file in path_of(out, 4).iterdir()} == before
    assert [x.name for x in (out / "checkpoints").iterdir()] == ["step-000004"]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_signals_save_and_leave_nobody_behind(tmp_path, data, name):
    out = tmp_path / "run"
    process = started(out, data, "--steps", "100000", "--log-every", "1", "--workers", "1")
    wait_for_step(out, process, 2)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"mae: {name}: finishing this step, then saving; again to stop at once\n" in errors
    assert "Traceback" not in errors
    step = losses(out)[-1][0]
    assert steps_on_disk(out)[-1] == step
    assert (out / "reconstructions" / f"step-{step:06}.png").exists()
    assert (out / "report.html").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker outlives it


def test_a_second_signal_stops_at_once(tmp_path, data):
    out = tmp_path / "run"
    process = started(out, data, "--steps", "100000", "--workers", "0", "--batch-size", "1024", "--image-size", "96")
    end = time.monotonic() + 120
    while not (out / "recipe.json").exists():  # which is written when the first step begins
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 1
    assert errors.splitlines()[-3:] == [
        "mae: SIGINT: finishing this step, then saving; again to stop at once", "",
        "mae: stopped at once; the last checkpoint is whole",
    ]  # fmt: skip


def test_a_killed_worker_is_a_sentence_and_the_work_is_kept(tmp_path, data):
    out = tmp_path / "run"
    process = started(out, data, "--steps", "100000", "--log-every", "1", "--workers", "2")
    wait_for_step(out, process, 2)
    (worker,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[:1]
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "one of 2 worker processes was killed, as the system does where memory runs out" in errors
    assert "Traceback" not in errors
    assert steps_on_disk(out)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(tmp_path, data):
    """Always resumes, loses no more than the steps since the last save, and ends as the run that nobody killed."""
    options = ["--steps", "60", "--save-every", "2", "--log-every", "1", "--workers", "0", "--eval-every", "10000"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert started(straight, data, *options).wait(timeout=120) == 0
    generator, kills = random.Random(0), 0
    while kills < 20:
        before = steps_on_disk(out)[-1] if steps_on_disk(out) else 0
        process = started(out, data, *options, "--resume")
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            reached = losses(out)[-1][0] if (out / "metrics.jsonl").exists() and losses(out) else 0
            if reached >= before + 2:
                break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.15)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert started(out, data, *options, "--resume").wait(timeout=120) == 0
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
    process.communicate()
    options = [*options, "--workers", workers, "--resume"]
    subprocess.run([sys.executable, "-m", "mae", "pretrain", "--data", str(data), "--out", str(out), *SMALL, *options],
                   check=True, capture_output=True)  # fmt: skip
    assert load_checkpoint(out).config == load_checkpoint(straight).config
    assert_equal(straight, out)
    assert Image.open(out / "reconstructions" / "step-000014.png").size[0] > 100
