"""What a run is told before it starts, and what it says: recipes, plans, held-out images, initial weights."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import good_folder, unreadable_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae import load_checkpoint, mae_vit_demo_patch7, save_checkpoint
from mae.__main__ import main
from mae.commands.options import flat, from_flat
from mae.commands.pretrain import PretrainConfig, defaults
from mae.data import ImageFiles, Reading, find_images, held_out, read_pictures
from mae.training.parallel import Processes
from mae.training.recipe import preset
from mae.training.step import MaskStrategy
from mae.training.validation import Validation

SMALL = [
    "--model", "mae_vit_demo_patch7", "--batch-size", "4", "--workers", "0", "--device", "cpu",
    "--log-every", "1", "--eval-every", "1000",
]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    return good_folder(tmp_path / "data", 5)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pretrain(data: Path, out: Path, *options: str) -> None:
    main(["pretrain", "--data", str(data), "--out", str(out), *SMALL, *options])


def test_options_survive_their_flat_form():
    config = PretrainConfig("a", model="mae_vit_base_patch16", val_share=0.1)
    config = replace(config, train=replace(config.train, epochs=3.0), sizes=replace(config.sizes, image_size=(32, 64)))
    values = json.loads(json.dumps(flat(config)))
    again = from_flat(PretrainConfig, values | {"out": config.out})
    assert again == config
    with pytest.raises(ValueError, match="the recipe has no_such, and there is no such option"):
        from_flat(PretrainConfig, {"data": "a", "no_such": 1})


def test_the_published_recipe():
    config = defaults(["pretrain", "--recipe", "published"])
    train = config.train
    assert (train.epochs, train.warmup_epochs, train.batch_size, train.base_lr) == (800, 40, 4096, 1.5e-4)
    assert (train.weight_decay, train.mask_ratio, config.norm_pix_loss) == (0.05, 0.75, True)
    assert config.model == "mae_vit_large_patch16"
    schedule = train.schedule(1_281_167)
    assert schedule.peak_lr == pytest.approx(2.4e-3)  # He et al. 2021, appendix A.1
    assert schedule.warmup / schedule.steps == pytest.approx(40 / 800, rel=1e-3)


@pytest.mark.parametrize("name", ["published", "small_data", "cpu"])
def test_recipes_are_options_and_their_own_reason(name):
    assert isinstance(defaults(["--recipe", name]), PretrainConfig)
    assert preset(name)


def test_a_recipe_is_the_default_and_options_win(data, tmp_path, capsys):
    main(["pretrain", "--data", str(data), "--recipe", "cpu", "--batch-size", "16", "--dry-run"])
    assert capsys.readouterr().out == (
        "Pre-training mae_vit_tiny_patch16 (112 x 112 pixels in patches of 8 x 8, cpu) on 5 images from "
        f"{data}: 1000 steps of 16 images, 3,200 epochs, learning rate up to 0.0005\n"
    )
    pretrain(data, tmp_path / "run", "--steps", "2", "--clip-grad", "7")
    main(["pretrain", "--data", str(data), "--recipe", str(tmp_path / "run"), "--out", str(tmp_path / "b")])
    ends = r"^Trained for [\d.]+ m?s: loss \d\.\d{4}\nThe model is in .*/run, and report.html there shows its curves"
    assert re.search(ends, capsys.readouterr().out, re.MULTILINE)
    options = [json.loads((tmp_path / x / "recipe.json").read_text())["options"] for x in ("run", "b")]
    assert options[0] == options[1]
    assert options[0]["clip_grad"] == 7
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--data", str(data), "--recipe", "none"])
    assert stop.value.code == (
        "mae: there is no recipe none; there are cpu, published, small_data, and the recipe.json of any run"
    )


def test_the_command_line_wins_over_a_recipe_that_says_the_same_otherwise():
    assert defaults(["--recipe", "cpu", "--epochs", "5"]).train.steps is None
    published = defaults(["--recipe", "published", "--steps=5", "--warmup", "0.1"]).train
    assert (published.epochs, published.warmup_epochs) == (None, None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"options": []}', "\x00"])
def test_what_is_no_recipe_is_refused(data, tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--data", str(data), "--recipe", str(tmp_path / "r.json")])
    assert stop.value.code.startswith(f"mae: {tmp_path / 'r.json'} is no recipe: ")


def test_too_much_cannot_be_held_out(data, tmp_path):
    with pytest.raises(SystemExit) as stop:
        pretrain(data, tmp_path / "run", "--val-share", "0.99")
    assert stop.value.code == "mae: val_share 0.99 leaves none of 5 images to train on"
    with pytest.raises(SystemExit) as stop:
        pretrain(data, tmp_path / "run", "--val", str(unreadable_files(tmp_path / "bad") and tmp_path / "bad"))
    assert stop.value.code.startswith("mae: none of the 4 files can be read; first: ")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_trained_on_its_own_pictures(data):
    pretrain(data, data / "runs" / "mine", "--steps", "2")
    pretrain(data, data / "runs" / "mine", "--steps", "2", "--resume")
    assert json.loads((data / "runs" / "mine" / "recipe.json").read_text())["data"]["images"] == 5


def test_a_dry_run_leaves_nothing(data, tmp_path):
    pretrain(data, tmp_path / "run", "--dry-run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_says_everything(data, tmp_path):
    pretrain(data, tmp_path / "run", "--epochs", "1.6", "--decoder", "cross", "--optimizer", "muon")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["schedule"]["steps"] == 2
    assert recipe["data"]["images"] == 5
    assert recipe["versions"]["torch"] == torch.__version__
    assert recipe["labels"] == [
        "not the published method: decoder cross", "not the published method: optimizer muon",
    ]  # fmt: skip
    assert recipe["options"].keys() == flat(PretrainConfig(str(data))).keys() - {
        "out", "recipe", "resume", "overwrite", "dry_run", "data_benchmark",
    }  # fmt: skip
    assert "not the published method: decoder cross" in (tmp_path / "run" / "report.html").read_text()


def test_other_data_are_not_resumed(data, tmp_path, capsys):
    pretrain(data, tmp_path / "run", "--steps", "2")
    moved = data.rename(tmp_path / "moved")
    pretrain(moved, tmp_path / "run", "--steps", "2", "--resume", "--val", str(moved))  # which may come and go
    capsys.readouterr()
    pretrain(moved, tmp_path / "run", "--steps", "2", "--resume")
    assert "Nothing is left to do after step 2 of 2" in capsys.readouterr().err
    next(iter(find_images(moved))).rename(moved / "another.jpg")
    with pytest.raises(SystemExit) as stop:
        pretrain(moved, tmp_path / "run", "--steps", "2", "--resume")
    assert re.match(r"mae: .* was started on other images: fingerprint was '\w+' and is '\w+'", stop.value.code)


def test_initial_weights(data, tmp_path):
    pretrain(data, tmp_path / "a", "--steps", "2")
    pretrain(data, tmp_path / "b", "--steps", "1", "--init", str(tmp_path / "a"), "--base-lr", "1e-12", "--seed", "9")
    one, two = (load_checkpoint(tmp_path / x).state_dict() for x in "ab")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    save_checkpoint(mae_vit_demo_patch7(decoder_embed_dim=64, decoder_depth=2), tmp_path / "c")
    with pytest.raises(SystemExit) as stop:
        pretrain(data, tmp_path / "d", "--steps", "1", "--init", str(tmp_path / "c"))
    assert "is of another model: it has decoder_embed_dim 64 and not 48, decoder_depth 2 and not 1" in stop.value.code
    assert not (tmp_path / "d").exists()


def test_held_out_images_are_never_trained_on_and_always_the_same():
    source = ImageFiles([Path(f"{i}.png") for i in range(50)])
    rest, held = held_out(source, 10, seed=1)
    names = [[x.name(i) for i in range(len(x))] for x in (rest, held)]
    assert (len(names[0]), len(names[1])) == (40, 10)
    assert {*names[0]} | {*names[1]} == {f"{i}.png" for i in range(50)}
    again = held_out(source, 10, seed=1)[1]
    assert [again.name(i) for i in range(10)] == names[1]
    other = held_out(source, 10, seed=2)[1]
    assert [other.name(i) for i in range(10)] != names[1]


def test_validation_is_the_mean_loss_under_masks_that_stay(tmp_path):
    unreadable_files(good_folder(tmp_path, 5))
    source, reading = ImageFiles(find_images(tmp_path)), Reading(1, image_size=(28, 28))
    model = mae_vit_demo_patch7()

    def loss(**options) -> float:
        with pytest.warns(UserWarning, match="cannot be read"):
            return Validation(source, reading, MaskStrategy(), Processes(), **options)(model)["val_loss"]

    whole = loss(batch_size=64)
    assert loss(batch_size=2) == pytest.approx(whole, rel=1e-6)
    assert loss(seed=1) != pytest.approx(whole, rel=1e-6)
    with pytest.warns(UserWarning, match="cannot be read"):
        pictures = list(read_pictures(source, reading))
    images = torch.stack([x for x, _ in pictures])
    assert whole == pytest.approx(model(images).loss.item(), rel=0.2)
    assert model.training


def test_validation_and_tensorboard(data, tmp_path):
    run = tmp_path / "run"
    pretrain(data, run, "--steps", "4", "--val", str(good_folder(tmp_path / "val", 2)), "--eval-every", "2")
    entries = metrics(run)
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [2, 4]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [
        (entry["step"], pytest.approx(entry["loss"])) for entry in entries
    ]
    assert [x.step for x in events.Images("reconstructions")] == [2, 4]
    pretrain(data, tmp_path / "share", "--steps", "2", "--val-share", "0.4")
    assert json.loads((tmp_path / "share" / "recipe.json").read_text())["data"]["images"] == 3


def test_a_plan_says_how_long_it_will_take(data, tmp_path, capsys):
    pretrain(data, tmp_path / "run", "--steps", "4")
    assert re.search(
        r"^A step takes [\d.]+ m?s, and what is left of the run [\d.]+ m?s$", capsys.readouterr().err, re.MULTILINE
    )
    from mae.commands.pretrain import _Job
    from mae.model import MAEConfig, MaskedAutoencoder

    config = PretrainConfig(str(data))
    tiny = MAEConfig(embed_dim=192, num_heads=3)
    with torch.device("meta"):
        job = _Job(config, MaskedAutoencoder(tiny), None, None, config.train.schedule(276), torch.device("cpu"))
    words = job.foretell(18.0, 10_000)
    assert words.startswith(
        "A step takes 18 s, and what is left of the run 50 hours. It ends earlier with fewer --steps; --recipe cpu is "
        "for a first look. The decoder is 9"
    )
    assert "--decoder-depth 1 --decoder-width 128, which is another model, the run takes " in words
    assert job.foretell(1.0, 500) == "A step takes 1 s, and what is left of the run 8.3 minutes"


def test_the_limit_is_named(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mae.commands.data_benchmark._WORKERS", (0, 1))
    pretrain(data, tmp_path / "run", "--data-benchmark")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split() == ["workers", "loaded", "images/s", "trained", "images/s", "limit"]
    for workers, line in enumerate(lines[1:3]):
        number, loaded, trained, _, limit = line.split()
        assert int(number) == workers
        assert limit == ("loader" if float(loaded) < float(trained) else "step")
    assert not (tmp_path / "run").exists()
