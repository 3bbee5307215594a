"""``python -m mae`` as a person uses it: real pictures, broken files, Ctrl-C, and clear words when it cannot go on."""

import json

import numpy as np
import pytest
import tifffile
import torch
from pictures import good_folder, photographs, readable_oddities, unreadable_files
from PIL import Image
from safetensors.torch import save_file
from scipy.io import wavfile

from mae import load_checkpoint
from mae.__main__ import main
from mae.commands.demo import DemoConfig, fashion_mnist, run_demo
from mae.report.figures import save_reconstructions

SMALL = [
    "--model", "mae_vit_tiny_patch16", "--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu",
    "--eval-every", "1000", "--decoder-depth", "1", "--decoder-width", "64",
]  # fmt: skip


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a folder of good and bad files."""
    folder = tmp_path_factory.mktemp("pictures")
    good_folder(folder, 4)
    readable_oddities(folder / "odd")
    unreadable_files(folder / "bad")
    run = tmp_path_factory.mktemp("run")
    main(["pretrain", "--data", str(folder), "--out", str(run), *SMALL, "--steps", "12", "--log-every", "4"])
    return run, folder


def test_pretrain_leaves_a_whole_run_folder(run):
    folder, _ = run
    assert sorted(f.name for f in folder.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "recipe.json", "reconstructions",
        "report.html", "tensorboard",
    ]  # fmt: skip
    entries = metrics(folder)
    assert [entry["step"] for entry in entries] == [4, 8, 12]
    assert set(entries[0]) == {"step", "loss", "lr", "images_per_second", "seconds", "waiting", "memory_mb", "epoch"}
    options = json.loads((folder / "recipe.json").read_text())["options"]
    assert (options["model"], options["steps"], options["image_size"]) == ("mae_vit_tiny_patch16", 12, 32)
    assert load_checkpoint(folder).config.image_size == (32, 32)
    picture = folder / "reconstructions" / "step-000012.png"
    assert Image.open(picture).convert("L").getextrema()[0] < 128  # not an empty page


def test_pretrain_counts_broken_files(tmp_path, capsys):
    good_folder(tmp_path / "data", 3)
    bad = unreadable_files(tmp_path / "data")
    main(["pretrain", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *SMALL, "--steps", "10"])
    output = capsys.readouterr()
    assert f"Warning: passed over {len(bad)} files that cannot be read: cannot read " in output.out + output.err
    assert load_checkpoint(tmp_path / "run")


def test_reconstruct_and_its_words(run, tmp_path, capsys):
    folder, pictures = run
    picture = tmp_path / "new" / "out.png"
    arguments = ["--checkpoint", str(folder), "--images", str(pictures), "--out", str(picture)]
    main(["reconstruct", *arguments, "--device", "cpu"])
    output = capsys.readouterr()
    assert f"Wrote 9 reconstructions to {picture}" in output.out
    assert "The model was trained on normalised pixels" in output.out
    assert "Warning: 4 of 13 files cannot be read" in output.err
    assert Image.open(picture).size[0] > 400


def test_reconstruct_stops_reading_when_it_has_enough(run, tmp_path, capsys):
    good_folder(tmp_path / "a" / "z", 3)
    unreadable_files(tmp_path / "a" / "bad")
    main(["reconstruct", "--checkpoint", str(run[0]), "--images", str(tmp_path / "a"), "--most", "2",
          "--out", str(tmp_path / "out.png"), "--device", "cpu"])  # fmt: skip
    output = capsys.readouterr()
    assert "Wrote 2 reconstructions" in output.out
    assert "Warning: 4 of 6 files cannot be read" in output.err


def test_reconstruct_refuses_a_checkpoint_without_a_decoder_in_one_sentence(run, tmp_path):
    state = load_checkpoint(run[0]).state_dict()
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    (tmp_path / "config.json").write_text((run[0] / "config.json").read_text())
    save_file(encoder, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["reconstruct", "--checkpoint", str(tmp_path), "--images", str(good_folder(tmp_path / "x", 1))])
    assert stop.value.code == (
        f"mae: {tmp_path} holds the encoder alone, so there is nothing to reconstruct with; take a checkpoint "
        "that holds the decoder too (published ones are called *_full or mae_visualize_*)"
    )


def test_linprobe_refuses_classes_of_broken_files_in_one_sentence(run, tmp_path):
    for name in ("one", "two"):
        unreadable_files(tmp_path / "fit" / name)
    with pytest.raises(SystemExit) as stop:
        main(
            ["linprobe", "--checkpoint", str(run[0]), "--data", str(tmp_path / "fit"), "--test", str(tmp_path / "fit")]
        )
    assert stop.value.code.startswith("mae: none of the 8 files can be read; first: cannot read ")


def test_linprobe(run, tmp_path, capsys):
    folder, _ = run
    for part in ("fit", "test"):
        for name, colour in (("dark", 40), ("light", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (32, 32), (colour + i, colour, colour)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "fit" / "dark" / "broken.png").touch()
    arguments = ["--checkpoint", str(folder), "--data", str(tmp_path / "fit"), "--test", str(tmp_path / "test")]
    main(["linprobe", *arguments, "--device", "cpu", "--batch-size", "5"])  # which divides neither 12 nor 13
    output = capsys.readouterr()
    assert f"Linear probe on the mean features of {folder}: 13 pictures to learn from, 12 to test, 2 cl" in output.out
    assert "largest class alone                 50.0%" in output.out
    assert "pre-trained encoder                100.0%" in output.out
    (result,) = json.loads((folder / "results.json").read_text())
    assert result["top1"] | {"untrained encoder": 0} == {
        "largest class alone": 0.5, "untrained encoder": 0, "pre-trained encoder": 1.0,
    }  # fmt: skip
    assert (result["command"], result["classes"], result["test_images"]) == ("linprobe", 2, 12)
    (folder / "results.json").unlink()
    assert "untrained encoder" in output.out
    assert "Warning: 1 of 13 files cannot be read" in output.err


def test_thirteen_bands_from_training_to_pictures(tmp_path, capsys):
    for part in ("one", "two"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(2):
            bands = np.random.default_rng(i).integers(0, 3000, (13, 40, 40), np.uint16)
            tifffile.imwrite(tmp_path / "data" / part / f"{i}.tif", bands, photometric="minisblack")
    data, run, options = str(tmp_path / "data"), tmp_path / "run", ["--value-range", "0", "3000"]
    main(["pretrain", "--data", data, "--out", str(run), *SMALL, "--steps", "2", "--in-chans", "13", *options])
    model = load_checkpoint(run)
    assert model.config.in_chans == 13
    assert model.config.pixel_mean == model.config.pixel_std == (0.5,) * 13
    assert Image.open(run / "reconstructions" / "step-000002.png").convert("L").getextrema()[0] < 128
    main(["linprobe", "--checkpoint", str(run), "--data", data, "--test", data, "--device", "cpu", *options])
    assert "pre-trained encoder" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--data", data, "--out", str(tmp_path / "other"), *SMALL, "--steps", "2"])
    assert stop.value.code.startswith("mae: none of the 4 files can be read; first: cannot read ")
    assert stop.value.code.endswith("it has 13 channels, and the model takes 3")


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The reconstructions that the commands draw, and how."""
    pictures = []

    def save(reconstruction, file, view):
        pictures.append((reconstruction, view))
        save_reconstructions(reconstruction, file, view=view)

    for command in ("reconstruct", "pictures"):
        monkeypatch.setattr(f"mae.commands.{command}.save_reconstructions", save)
    return pictures


def hidden(reconstruction, patch: tuple[int, ...]) -> torch.Tensor:
    """``[N, T', H', W']`` bool, of clips whose pixels are not grey: which patches are."""
    grey = (reconstruction.masked == 0.5).all(1)
    for dim, side in enumerate(patch, start=1):
        grey = grey.unfold(dim, side, side)
    assert torch.equal(grey.flatten(4).all(4), grey.flatten(4).any(4))
    return grey.flatten(4).all(4)


@pytest.mark.parametrize("kind", ["gif", "npy"])
def test_clips_from_training_to_pictures(tmp_path, kind, drawn):
    data = tmp_path / "data"
    data.mkdir()
    for i, photo in enumerate(photographs(3)):
        frames = [photo.crop((4 * t, 2 * t, 4 * t + 100, 2 * t + 100)) for t in range(6)]
        if kind == "gif":
            frames[0].save(data / f"{i}.gif", save_all=True, append_images=frames[1:])
        else:
            np.save(data / f"{i}.npy", np.stack([np.asarray(frame.convert("L")) for frame in frames]))
    channels, options = (3, ["--masking", "tube"]) if kind == "gif" else (1, ["--in-chans", "1", "--masking", "grid"])
    sizes = ["--num-frames", "4", "--image-size", "32", "48", "--patch-size", "2", "16", "16"]
    sizes += ["--norm-pix-loss", "channel"]
    run = tmp_path / "run"
    main(
        [
            "pretrain",
            "--data",
            str(data),
            "--out",
            str(run),
            *SMALL,
            "--steps",
            "2",
            *sizes,
            *options,
            "--norm-pix-loss",
            "channel",
        ]
    )
    config = load_checkpoint(run).config
    assert (config.image_size, config.patch_size, config.in_chans) == ((4, 32, 48), (2, 16, 16), channels)
    assert config.norm_pix_loss == "channel"
    result, view = drawn[-1]
    assert result.original.shape == (3, channels, 4, 32, 48)
    assert view == "frames"
    mask = hidden(result, (2, 16, 16))
    assert torch.equal(mask[:, 0], mask[:, 1])  # both strategies hide the same in all frames
    assert Image.open(run / "reconstructions" / "step-000002.png").convert("L").getextrema()[0] < 128
    out = tmp_path / "slices.png"
    main(["reconstruct", "--checkpoint", str(run), "--images", str(data), "--out", str(out), "--device", "cpu",
          "--image-size", "6", "64", "64", "--view", "slices", "--most", "2", "--mask-ratio", "0.5"])  # fmt: skip
    assert drawn[-1][0].original.shape == (2, channels, 6, 64, 64)
    assert hidden(drawn[-1][0], (2, 16, 16)).flatten(1).sum(1).tolist() == [24, 24]
    assert Image.open(out).convert("L").getextrema()[0] < 128


def test_sound_from_training_to_pictures(tmp_path, drawn):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, 12000).astype(np.float32)
        wavfile.write(data / f"{i}.wav", 16000, noise)
    small = ["--in-chans", "1", "--image-size", "32", "64"]
    run = tmp_path / "run"
    main(["pretrain", "--data", str(data), "--out", str(run), *SMALL, "--steps", "2", *small, "--masking", "axis"])
    result, view = drawn[-1]
    assert view == "sound"
    assert result.original.shape == (3, 1, 32, 64)
    assert Image.open(run / "reconstructions" / "step-000002.png").convert("L").getextrema()[0] < 128


def test_another_size_in_every_command(run, tmp_path, drawn, capsys):
    for name in ("one", "two"):
        good_folder(tmp_path / "data" / name, 2)
    shared = ["--checkpoint", str(run[0]), "--device", "cpu", "--image-size", "48", "64"]
    main(["reconstruct", *shared, "--images", str(tmp_path / "data"), "--out", str(tmp_path / "out.png")])
    assert drawn[0][0].original.shape == (4, 3, 48, 64)
    data = str(tmp_path / "data")
    main(["linprobe", *shared, "--data", data, "--test", data, "--out", str(tmp_path / "probe")])
    main(["profile", "--model", "mae_vit_tiny_patch16", "--image-size", "32", "--num-frames", "2", "--batch-size", "2",
          "--rounds", "1", "--device", "cpu"])  # fmt: skip
    assert "6 kB an image from host to device" in capsys.readouterr().out  # 2 x 3 x 32 x 32


def test_what_a_folder_holds_is_said_in_a_few_lines(tmp_path, capfd):
    data = good_folder(tmp_path / "data", 3)
    good_folder(tmp_path / "linked", 1)
    (data / "more").symlink_to(tmp_path / "linked")
    for i in range(40):
        (data / f"broken{i}\x1b[2J.jpg").write_bytes(b"no picture")
    np.save(data / "decibels.npy", np.linspace(-25, 0, 900).reshape(30, 30))
    Image.new("1", (200, 200)).save(data / "large.png")
    (data / "notes.txt").touch()
    options = ["--steps", "12", "--max-pixels", "30000"]
    main(["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL, *options])
    output = "".join(capfd.readouterr())
    assert "\x1b[2J" not in output
    assert "PIL" not in output
    assert f"on 46 images from {data}: 12 steps of 4 images" in output
    lines = sorted(line.split("Warning: ", 1)[1] for line in output.splitlines() if "Warning: " in line)
    assert len(lines) == 3
    assert lines[0] == f"{data}: left out 1 .txt file"
    assert lines[1].startswith(f"1 picture so far scaled each by its own range of values, such as {data}/decibels.npy")
    assert lines[2].startswith("passed over 41 files that cannot be read: cannot read ")


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    data = good_folder(tmp_path / "data", 2)

    def losses(name: str, seed: int) -> list[float]:
        out = tmp_path / name
        arguments = ["--data", str(data), "--out", str(out), *SMALL, "--steps", "3", "--log-every", "1"]
        main(["pretrain", *arguments, "--seed", str(seed)])
        return [entry["loss"] for entry in metrics(out)]

    first = losses("a", 3)
    assert losses("b", 3) == first
    assert losses("c", 4) != first


def test_demo_in_short(tmp_path, capsys, monkeypatch):
    # A fifth of each class: the logistic regressions take most of the time.
    monkeypatch.setattr("mae.commands.demo.fashion_mnist", lambda part: tuple(x[::5] for x in fashion_mnist(part)))
    accuracies = run_demo(DemoConfig(out=tmp_path, steps=12))
    assert set(accuracies) == {"raw pixels", "untrained encoder", "pre-trained encoder"}
    assert 0.5 < accuracies["untrained encoder"] < accuracies["raw pixels"] < 0.9
    output = capsys.readouterr().out
    assert "python -m mae pretrain --data FOLDER" in output
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "recipe.json", "reconstructions",
        "report.html", "results.json", "tensorboard",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())[0]["top1"] == accuracies


def test_fashion_mnist_is_what_it_says():
    images, labels = fashion_mnist("train_5000")
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert [int((labels == c).sum()) for c in range(10)] == [500] * 10
    mean, std = (images / 255).mean(), (images / 255).std()
    assert mean.item() == pytest.approx(0.286, abs=0.005)
    assert std.item() == pytest.approx(0.353, abs=0.005)
    assert fashion_mnist("test_2000")[0].shape == (2000, 1, 28, 28)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    good_folder(folder / "good", 3)
    unreadable_files(folder / "bad")
    (folder / "empty").mkdir()
    for part in ("fit/ant", "fit/cat", "test/bee", "test/cat"):
        good_folder(folder / "classes" / part, 1)
    return folder


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("pretrain --data {d}/none", "there is no folder {d}/none"),
        ("trian --data {d}/good", "there is no command trian, but pretrain, reconstruct,"),
        ("pretrain --data {d}/good/photo_00.jpg", "{d}/good/photo_00.jpg is a file, not a folder"),
        ("pretrain --data {d}/empty", "found no image below {d}/empty; looked for .jpg, .png, .webp"),
        ("pretrain --data {d}/bad", "none of the 4 files can be read; first: cannot read {d}/bad/"),
        (
            "pretrain --data {d}/good --image-size 33",
            "MAEConfig: images height 33 is not a multiple of the patch height 16",
        ),
        ("pretrain --data {d}/good --mask-ratio 1", "mask_ratio must be a number between 0 and 1, got 1.0"),
        ("pretrain --data {d}/good --mask-ratio nan", "mask_ratio must be a number between 0 and 1, got nan"),
        ("pretrain --data {d}/good --mask-ratio .9", "random_masking: mask_ratio 0.9 of 4 patches leaves none visible"),
        ("pretrain --data {d}/good --clip-grad -1", "clip_grad must be a number above 0, got -1.0"),
        ("pretrain --data {d}/good --weight-decay -1", "weight_decay must be a number from 0 on, got -1.0"),
        ("pretrain --data {d}/good --warmup 2", "warmup must be a number from 0 to 1, got 2.0"),
        ("pretrain --data {d}/good --base-lr inf", "base_lr must be a number above 0, got inf"),
        ("pretrain --data {d}/good --seed -1", f"seed must be a whole number of 0 to {2**63 - 1}, got -1"),
        ("pretrain --data {d}/good --seed 1" + 30 * "0", f"seed must be a whole number of 0 to {2**63 - 1}, got 1000"),
        ("pretrain --data {d}/good --workers -1", "workers must be a whole number from 0 on, got -1"),
        ("pretrain --data {d}/good --micro-batches 3", "batch_size 4 is not a multiple of micro_batches 3"),
        ("pretrain --data {d}/good --residual bfloat16", "residual bfloat16 needs precision bfloat16"),
        ("pretrain --data {d}/good --decoder-width 30", "MAEConfig: decoder_embed_dim 30 must be a multiple of 4 and"),
        *(
            (
                f"pretrain --data {{d}}/good --{name} 0",
                f"{name.replace('-', '_')} must be a whole number of 1 to 1000000",
            )
            for name in ("steps", "batch-size", "micro-batches", "log-every", "save-every")
        ),
        ("pretrain --data {d}/good --image-size 65536", "MAEConfig: an image has 16777216 patches, more than 1048576"),
        (
            "pretrain --data {d}/good --masking grid --mask-ratio .6",
            "grid_masking: mask_ratio must be 0.25, 0.5 or 0.75",
        ),
        (
            "pretrain --data {d}/good --masking tube --mask-ratio .1",
            "tube_masking: mask_ratio 0.1 of 4 patches leaves none",
        ),
        (
            "pretrain --data {d}/good --image-size 32 40",
            "MAEConfig: images width 40 is not a multiple of the patch width 16",
        ),
        (
            "pretrain --data {d}/good --num-frames 5 --patch-size 2 16 16",
            "MAEConfig: images frames 5 is not a multiple of the patch frames 2",
        ),
        (
            "pretrain --data {d}/good --num-frames 4",
            "none of the 3 files can be read; first: cannot read {d}/good/photo_",
        ),
        (
            "profile --num-frames 0",
            "MAEConfig: image_size must be a whole number of 1 to 65536, or a list of two or three",
        ),
        (
            "linprobe --checkpoint {run} --data {d}/classes/fit --test {d}/classes/fit --out {run}/config.json/x",
            "{run}/config.json/x cannot be a folder: {run}/config.json is a file",
        ),
        ("profile --batch-size 0", "batch_size must be a whole number of 1 to 1000000"),
        ("profile --rounds 0", "rounds must be a whole number of 1 to 1000000"),
        ("demo --steps 0", "steps must be a whole number of 1 to 1000000"),
        ("reconstruct --checkpoint {run} --images {d}/good --most 0", "most must be a whole number of 1 to 1000000"),
        ("reconstruct --checkpoint {run} --images {d}/good --out {d}", "{d} is a folder, not a picture to write"),
        ("reconstruct --checkpoint {run} --images {d}/good --out a.xyz", "a.xyz is of no format that can be written;"),
        ("linprobe --checkpoint {run} --data {d} --test {d} --batch-size 0", "batch_size must be a whole number of 1"),
        ("pretrain --data {d}/good --out {run}/config.json/x", "{run}/config.json/x cannot be a folder: {run}/config"),
        ("pretrain --data {d}/good --in-chans 0", "MAEConfig: in_chans must be a whole number of 1 to 65536, got 0"),
        (
            "reconstruct --checkpoint {d}/none --images {d}/good --value-range 9 2",
            "value_range must be two finite numbers in ascending order, got 9 and 2",
        ),
        ("linprobe --checkpoint {d}/none --data {d} --test {d} --max-pixels 0", "max_pixels must be at least 1, got 0"),
        ("pretrain --data {d}/good --device abacus", "device 'abacus' cannot be used here; there is cpu"),
        ("reconstruct --checkpoint {d}/none --images {d}/good", "there is no checkpoint at {d}/none"),
        ("reconstruct --checkpoint {run} --images {d}/bad", "none of the 4 files can be read"),
        (
            "linprobe --checkpoint {run} --data {d}/good --test {d}",
            "{d}/good must hold one sub-folder of images per class",
        ),
        (
            "linprobe --checkpoint {run} --data {d}/classes/fit --test {d}/classes/test",
            "{d}/classes/fit and {d}/classes/test do not hold the same classes: only {d}/classes/fit holds ant; only",
        ),
    ],
)
def test_it_stops_with_one_clear_sentence(run, folders, tmp_path, command, sentence):
    places = {"d": folders, "run": run[0]}
    arguments = command.format(**places).split()
    if arguments[0] == "pretrain":
        defaults = [*SMALL, "--out", str(tmp_path / "run"), "--steps", "2"]
        arguments = [arguments[0], *defaults, *arguments[1:]]  # the last of two equal options counts
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    message = stop.value.code
    assert message.startswith("mae: " + sentence.format(**places))
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_help_explains_every_option(capsys):
    for command in (
        "pretrain", "reconstruct", "attention", "finetune", "linprobe", "knn", "predict", "features", "convert", "demo",
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.count("--") >= 3
    assert "Optimizer steps" in text
