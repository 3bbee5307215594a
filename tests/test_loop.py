"""What the loop computes: schedule and masks as functions of the step, and updates that go wrong."""

import io
import json
import os

import pytest
import torch
from runs import Interrupted, Interrupting, assert_equal, config, images, losses, run_demo_model, weights

from mae import mae_vit_demo_patch7
from mae.data import TensorImages
from mae.data.randomness import derived_seed
from mae.training.loop import Looks, train
from mae.training.metrics import TrainingStopped, _Bar
from mae.training.recipe import TrainConfig
from mae.training.state import path_of
from mae.training.step import Step
from mae_kernels import Masking, random_masking


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


def test_updates_that_float16_skips_are_counted(tmp_path):
    pixels = torch.rand(40, 1, 28, 28)
    pixels[7] = float("inf")
    history = run_demo_model(tmp_path, data=TensorImages(pixels), steps=5, precision="float16")
    others = run_demo_model(tmp_path / "finite", data=TensorImages(pixels[:7]), steps=5, precision="float16")
    assert history[-1]["skipped"] == 1 + others[-1].get("skipped", 0)
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


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

    class Recorded(Step):
        def __call__(self, images, *masks):
            seen.append(Masking(*masks))
            return super().__call__(images, *masks)

    monkeypatch.setattr("mae.training.loop.Step", Recorded)
    run_demo_model(tmp_path, steps=3, seed=1)
    assert len(seen) == 3
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


def test_long_steps_are_foretold_after_the_first_one(tmp_path, monkeypatch):
    told = []

    def foretell(seconds: float, steps: int) -> str:
        told.append((seconds > 0, steps))
        return "words"

    for folder, length in (("short", 1e6), ("long", 0.0)):
        monkeypatch.setattr("mae.training.loop._LONG", length)
        train(mae_vit_demo_patch7(), images(), config(5), tmp_path / folder, looks=Looks(foretell=foretell))
    assert told == [(True, 2), (True, 4)]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (150, "loss 0.5000, held out 0.2500, 1234 images/s, lr 1.0e-03, 12% waiting for data, 5,678 MB of memory"),
        (100, "loss 0.5000, held out 0.2500, 1234 images/s"),
        (60, "loss 0.5000, held out 0.2500"),
        (40, "loss 0.5000"),
    ],
)
def test_a_bar_shows_whole_words_within_its_width(monkeypatch, columns, shown):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    bar = _Bar(10_000, 0)
    bar.advance()
    entry = {"loss": 0.5, "images_per_second": 1234.4, "lr": 1e-3, "waiting": 0.12, "memory_mb": 5678.0}
    bar.show(entry | {"val_loss": 0.25})
    bar.show(entry)  # what is held out is shown until there is a newer one
    bar.close()
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if line.endswith(f"left, {shown}")], lines
