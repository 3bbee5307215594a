"""Fine-tuned classifiers on disk: our folders, and those of timm and of transformers 4.57 and 5.x, both ways."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file
from test_convert import MODEL, SMALL, change_config, convert, encoder, same

from mae import (
    CheckpointError,
    CheckpointWarning,
    Classifier,
    HeadConfig,
    MAEConfig,
    VisionTransformer,
    convert_checkpoint,
    load_checkpoint,
    mae_vit_demo_patch7,
    save_checkpoint,
)
from mae.__main__ import main

NAMES = ("cat", "dog", "crane")
TOKEN, FINE_TUNED, PROBE = HeadConfig(NAMES, "token"), HeadConfig(NAMES, fc_norm=True), HeadConfig(NAMES)
HEADS = {"token": TOKEN, "fine-tuned": FINE_TUNED, "probe": PROBE}
BUILT = {"token": "ViTForImageClassification", "fine-tuned": "BeitForImageClassification"}  # by Hugging Face
# Of a model whose file says nothing of a decoder.
ENCODER = {name: getattr(MAEConfig, name) for name in vars(MAEConfig()) if "decoder" in name or name == "norm_pix_loss"}


def classifier(head: HeadConfig, config: MAEConfig = SMALL) -> Classifier:
    """Every parameter its own numbers, so large that no part of the logits is lost in rounding."""
    model = Classifier(config, head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model.eval()(images)
    return getattr(result, "logits", result)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    torch.manual_seed(0)
    return {name: classifier(head) for name, head in HEADS.items()}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, model in models.items():
        save_checkpoint(model, folder / name)
    return folder


@pytest.fixture(scope="module")
def four(runs, images, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("four")
    path = os.pathsep.join([str(peers.find("transformers-4")), os.environ.get("PYTHONPATH", "")])
    torch.save(images, folder / "images.pt")
    for name in BUILT:
        convert_checkpoint(runs / name, "huggingface-4", folder / f"ours-{name}")
    script = Path(__file__).with_name("transformers_4_classifiers.py")
    command = [sys.executable, str(script), str(folder)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, torch.load(folder / "seen.pt")


def assert_same_logits(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.5  # else a tolerance of 1e-5 would say little
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def assert_came_back(folder: Path, model: Classifier, **pixels) -> None:
    """Equal to the bit, but for what is in no file of another system: the decoder, and the bias of BEiT's keys."""
    back = load_checkpoint(folder, **pixels)
    assert type(back) is Classifier
    assert back.head_config == model.head_config
    assert back.config == replace(model.config, **ENCODER)
    expected, width = model.state_dict(), model.config.embed_dim
    if json.loads((folder / "config.json").read_text()).get("model_type") == "beit":
        for name in [name for name in expected if name.endswith("qkv.bias")]:
            expected[name] = expected[name].clone()
            assert expected[name][width : 2 * width].abs().min() > 0
            expected[name][width : 2 * width] = 0
    assert same(back.state_dict(), expected)


@pytest.mark.parametrize("name", HEADS)
def test_round_trip(models, runs, images, tmp_path, name):
    model = models[name]
    described = json.loads((runs / name / "config.json").read_text())
    assert described.pop("head") == {**asdict(HEADS[name]), "classes": [*NAMES]}
    assert described == json.loads(json.dumps(asdict(SMALL)))
    convert_checkpoint(runs / name, "mae", tmp_path / "again")
    for folder in (runs / name, tmp_path / "again"):
        loaded = load_checkpoint(folder)
        assert type(loaded) is Classifier
        assert (loaded.config, loaded.head_config, loaded.training) == (SMALL, HEADS[name], False)
        assert same(loaded.state_dict(), model.state_dict())
        assert torch.equal(logits(loaded, images), logits(model, images))
    larger = load_checkpoint(runs / name, image_size=(48, 64))
    assert larger.config.image_size == (48, 64)
    assert torch.allclose(larger.pos_embed, model.positions(model.pos_embed, larger.config.grid))
    assert torch.equal(larger.head.weight, model.head.weight)


def test_an_encoder_says_nothing_of_a_head(tmp_path):
    save_checkpoint(VisionTransformer(SMALL), tmp_path)
    assert "head" not in json.loads((tmp_path / "config.json").read_text())
    assert type(load_checkpoint(tmp_path)) is VisionTransformer


@pytest.mark.parametrize("name", HEADS)
def test_timm(models, runs, images, tmp_path, name):
    timm = peers.import_peer("timm")
    result = convert_checkpoint(runs / name, "timm", tmp_path / "ours")
    assert (result.left_out, result.encoder_only, result.classes) == ([], False, 3)
    assert same(load_file(tmp_path / "ours" / "model.safetensors"), models[name].state_dict())
    theirs = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True)
    assert_same_logits(logits(theirs, images), logits(models[name], images))
    assert theirs.pretrained_cfg["label_names"] == [*NAMES]
    assert theirs.num_classes == 3
    timm.models.save_for_hf(theirs, tmp_path / "theirs", {"label_names": NAMES}, safe_serialization=True)
    for folder in ("ours", "theirs"):
        assert_came_back(tmp_path / folder, models[name])


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("number", [4, 5])
def test_transformers_5(models, runs, images, tmp_path, name, number):
    transformers = pytest.importorskip("transformers", minversion="5")
    convert_checkpoint(runs / name, f"huggingface-{number}", tmp_path / "ours")
    build = transformers.AutoModelForImageClassification
    theirs, report = build.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == BUILT[name]
    assert_same_logits(logits(theirs, images), logits(models[name], images))
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert theirs.config.label2id == {name: i for i, name in enumerate(NAMES)}
    theirs.save_pretrained(tmp_path / "theirs")
    assert_came_back(tmp_path / "ours", models[name])
    assert_came_back(tmp_path / "theirs", models[name], pixel_mean=SMALL.pixel_mean, pixel_std=SMALL.pixel_std)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_transformers_4(four, models, images, name):
    folder, seen = four[0], four[1][f"ours-{name}"]
    assert (seen["class"], seen["names"]) == (BUILT[name], dict(enumerate(NAMES)))
    assert not seen["missing"]
    assert not seen["unexpected"]
    assert_same_logits(seen["logits"], logits(models[name], images))
    assert seen["pixels"] == list(SMALL.pixel_mean)
    pixels = {"pixel_mean": SMALL.pixel_mean, "pixel_std": SMALL.pixel_std}
    assert_came_back(folder / f"theirs-{name}", models[name], **pixels)


def test_an_encoder_of_hugging_face_is_no_classifier(tmp_path, models, runs):
    convert_checkpoint(runs / "token", "huggingface-4", tmp_path)
    change_config(tmp_path, architectures=["ViTModel"])
    with pytest.warns(CheckpointWarning, match=r"the classifier \(classifier\) is left out"):
        loaded = load_checkpoint(tmp_path)
    assert type(loaded) is VisionTransformer
    assert same(loaded.state_dict(), {k: x for k, x in models["token"].state_dict().items() if "head" not in k})


def test_published_files(tmp_path):
    """With fc_norm in the place of norm they can be nothing else; with a norm the head is left out, as ever."""
    config, names = mae_vit_demo_patch7().config, tuple(map(str, range(1000)))
    for head in (HeadConfig(names, fc_norm=True), HeadConfig(names, "token")):
        model = classifier(head, config)
        save_checkpoint(model, tmp_path / "run")
        convert_checkpoint(tmp_path / "run", "published", tmp_path / "x.pth")
        content = torch.load(tmp_path / "x.pth", weights_only=True)
        assert content.keys() == {"model"}
        assert same(content["model"], model.state_dict())
        with pytest.warns(CheckpointWarning) as caught:
            loaded = load_checkpoint(tmp_path / "x.pth", MODEL)
        said = str(caught[0].message).removeprefix(f"{tmp_path / 'x.pth'}: ")
        if head.fc_norm:
            assert type(loaded) is Classifier
            assert loaded.head_config == head
            assert same(loaded.state_dict(), model.state_dict())
            numbers = "its classes have no names and are called 0 to 999"
            assert said == f"with fc_norm and without norm it is a classifier; {numbers}"
        else:
            assert type(loaded) is VisionTransformer
            assert same(encoder(loaded.state_dict()), {k: x for k, x in content["model"].items() if "head" not in k})
            assert said == "the weights are those under 'model'; the classifier (head) is left out"


@pytest.mark.parametrize(
    ("values", "classes", "said"),
    [
        ({"label_names": ["crane", "dog", "crane"]}, ("crane 0", "dog", "crane 2"),
         "classes of the same name get their number as well: crane"),
        ({"label_names": {"1": "dog"}}, ("0", "dog", "2"), "2 of its 3 classes have no name and get their number"),
        ({"label_names": None}, ("0", "1", "2"), "its classes have no names and are called 0 to 2"),
    ],
    ids=["two of a name", "gaps", "none"],
)  # fmt: skip
def test_names_of_others_become_ours(runs, tmp_path, values, classes, said):
    convert_checkpoint(runs / "token", "timm", tmp_path)
    change_config(tmp_path, **values)
    with pytest.warns(CheckpointWarning) as caught:
        assert load_checkpoint(tmp_path).head_config == replace(TOKEN, classes=classes)
    assert str(caught[0].message) == f"{tmp_path}: {said}"


OBJECT = "head must be an object with classes, a list of names, got "


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (None, f"{OBJECT}None"),
        (["cat"], f"{OBJECT}['cat']"),
        ({"pool": "mean"}, OBJECT + "{'pool': 'mean'}"),
        ({"classes": "cat"}, OBJECT + "{'classes': 'cat'}"),
        ({"classes": [1, 2, 3]}, OBJECT + "{'classes': [1, 2, 3]}"),
        ({"classes": []}, "HeadConfig: classes must be names, at least one"),
        ({"classes": ["cat", "cat", "dog"]}, "HeadConfig: classes must have different names"),
        ({"classes": [*NAMES], "pool": "max"}, "HeadConfig: pool must be 'mean' or 'token', got 'max'"),
        ({"classes": [*NAMES], "fc_norm": 1},
         "HeadConfig: fc_norm is a norm of the mean, True or False, and True only with pool 'mean'"),
        ({"classes": [*NAMES], "wings": 2}, "wings is no field of HeadConfig, which has classes, pool, fc_norm"),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_a_broken_head_is_a_sentence(runs, tmp_path, head, sentence):
    convert_checkpoint(runs / "probe", "mae", tmp_path)
    change_config(tmp_path, head=head)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'} is not the configuration of a model: {sentence}"


def test_weights_that_are_not_those_of_the_head_are_named(runs, tmp_path):
    convert_checkpoint(runs / "probe", "mae", tmp_path)
    change_config(tmp_path, head={"classes": ["cat", "dog"], "fc_norm": True})
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert {*str(error.value).splitlines()[1:]} == {
        "  fc_norm.weight is missing",
        "  fc_norm.bias is missing",
        "  norm.weight is not part of this model",
        "  norm.bias is not part of this model",
        "  head.weight has shape (3, 48), the model expects (2, 48)",
        "  head.bias has shape (3,), the model expects (2,)",
    }
    save_checkpoint(VisionTransformer(SMALL), tmp_path)
    change_config(tmp_path, head={"classes": [*NAMES]})
    with pytest.raises(
        CheckpointError, match=r"does not fit the model:\n  head.weight is missing\n  head.bias is miss"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "to", "values", "sentence"),
    [
        ("fine-tuned", "huggingface-4", {"layer_scale_init_value": 0.1},
         "layer_scale_init_value is 0.1, and only 0.0 can be converted"),
        ("fine-tuned", "huggingface-5", {"use_relative_position_bias": True},
         "use_relative_position_bias is True, and only False can be converted"),
        ("probe", "timm", {"global_pool": "max"}, "global_pool 'max' cannot be converted"),
        ("token", "huggingface-4", {"id2label": dict(enumerate("abcd"))},
         "it names 4 classes, and the weights have 3"),
        ("token", "timm", {"label_names": "abc"}, "names of classes must be a list or an object, got 'abc'"),
    ],
)  # fmt: skip
def test_classifiers_that_ours_cannot_be_are_refused(runs, tmp_path, name, to, values, sentence):
    convert_checkpoint(runs / name, to, tmp_path)
    file = tmp_path / "config.json"
    if "global_pool" in values:
        values = {"model_args": json.loads(file.read_text())["model_args"] | values}
    change_config(tmp_path, **values)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value).removeprefix(f"{file}: ").removeprefix(
        f"{file} is not the configuration of a model: "
    ) == sentence  # fmt: skip


MEAN = "Hugging Face has no classifier on the mean of what the encoder's norm gives; timm has, with fc_norm False"
SQUARE = "takes square images and patches alone, this image_size is"


@pytest.mark.parametrize(
    ("head", "size", "to", "reason"),
    [
        (PROBE, 32, "huggingface-4", MEAN),
        (PROBE, 32, "huggingface-5", MEAN),
        (TOKEN, (16, 32), "huggingface-4", f"Hugging Face's ViT {SQUARE} 16x32"),
        (FINE_TUNED, (16, 32), "huggingface-5", f"Hugging Face's BEiT {SQUARE} 16x32"),
        (FINE_TUNED, (8, 16, 16), "huggingface-4", f"Hugging Face's BEiT {SQUARE} 8x16x16"),
        (FINE_TUNED, (8, 16, 16), "timm", "timm's ViT takes images, this image_size is 8x16x16"),
    ],
)
def test_classifiers_without_a_counterpart_are_refused(tmp_path, head, size, to, reason):
    save_checkpoint(Classifier(replace(SMALL, image_size=size), head), tmp_path / "run")
    for out in ("out", "out.safetensors") if head == PROBE else ("out",):
        with pytest.raises(CheckpointError) as error:
            convert_checkpoint(tmp_path / "run", to, tmp_path / out)
        assert str(error.value) == f"{tmp_path / 'run'} has no counterpart in {to}: {reason}"
        assert not (tmp_path / out).exists()


def test_a_target_of_pre_training_is_no_obstacle(tmp_path):
    save_checkpoint(Classifier(replace(SMALL, norm_pix_loss="channel"), TOKEN), tmp_path / "run")
    convert_checkpoint(tmp_path / "run", "huggingface-4", tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").head_config == TOKEN


def test_commands(runs, tmp_path, capsys):
    convert("--checkpoint", runs / "fine-tuned", "--to", "huggingface-4", "--out", tmp_path / "hf")
    _, *said = capsys.readouterr().out.splitlines()
    held = "The classifier of 3 classes is in it"
    assert said == [
        held,
        "It is written as BeitForImageClassification, with the same logits, because ViTForImageClassification",
        "cannot average patch tokens",
        "Left out: the biases of the keys, which BEiT does not have and which change no result",
    ]
    convert("--checkpoint", runs / "token", "--to", "published", "--out", tmp_path / "x.pth")
    _, *said = capsys.readouterr().out.splitlines()
    without = "Left out: the configuration and the names of the classes. Whoever loads this file has to know the "
    assert said == [held, f"{without}architecture"]
    with pytest.raises(SystemExit, match="holds the encoder alone, so there is nothing to reconstruct with"):
        main(["reconstruct", "--checkpoint", str(runs / "probe"), "--images", str(tmp_path)])
