"""Checkpoints of others, both ways: real models of transformers 4.57, 5.x and timm."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae import (
    CheckpointWarning,
    MAEConfig,
    MaskedAutoencoder,
    VisionTransformer,
    convert_checkpoint,
    load_checkpoint,
    mae_vit_demo_patch7,
    save_checkpoint,
)
from mae.__main__ import main
from mae.checkpoints.configs import from_hugging_face_config, to_hugging_face_config, to_timm_config
from mae.checkpoints.layouts import LAYOUTS, find_layout, from_layout, to_layout

SMALL = MAEConfig(
    image_size=32, patch_size=8, in_chans=4, embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=24, decoder_depth=2,
    decoder_num_heads=2, mlp_ratio=2.5, norm_pix_loss=False, pixel_mean=(0.1, 0.2, 0.3, 0.4), pixel_std=(0.5,) * 4,
)  # fmt: skip
MODEL = "mae_vit_demo_patch7"


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter its own numbers, so that no two can change places unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items())


def encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x for k, x in state.items() if not k.startswith("decoder") and k != "mask_token"}


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return randomised(MaskedAutoencoder(SMALL))


@pytest.fixture(scope="module")
def inputs(model) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 4, 32, 32), "noise": torch.rand(3, SMALL.num_patches)}


def our_loss(model: MaskedAutoencoder, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return model(inputs["pixel_values"], noise=inputs["noise"]).loss.item()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(model, folder)
    return folder


@pytest.fixture(scope="module")
def four(run, inputs, tmp_path_factory) -> tuple[Path, dict]:
    """What transformers 4.57 made of our folders, and folders that it wrote itself."""
    if not (peers.FOLDER / "transformers-4").is_dir():
        pytest.skip("transformers 4 is not in its folder; make test puts it there")
    folder = tmp_path_factory.mktemp("four")
    torch.save(inputs, folder / "inputs.pt")
    for number in (4, 5):
        convert_checkpoint(run, f"huggingface-{number}", folder / f"ours-{number}")
    convert_checkpoint(run, "timm", folder / "timm")
    convert_checkpoint(folder / "timm", "huggingface-4", folder / "ours-encoder")
    path = os.pathsep.join([str(peers.FOLDER / "transformers-4"), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("transformers_4.py")
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder, torch.load(folder / "seen.pt")


@pytest.fixture(scope="module")
def five():
    """transformers 5, and a real model of it with numbers of its own."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTMAEConfig(**to_hugging_face_config(SMALL))
    torch.manual_seed(1)
    return transformers, randomised(transformers.ViTMAEForPreTraining(config))


@pytest.mark.slow
def test_transformers_4_loads_what_we_wrote(four, model, inputs):
    _, seen = four
    loaded = seen["ours-4"]
    assert not loaded["missing"]
    assert not loaded["unexpected"]
    assert same(from_layout(loaded["state"]), model.state_dict())
    assert same(loaded["state"], to_layout(model.state_dict(), "huggingface-4"))
    assert loaded["loss"].item() == pytest.approx(our_loss(model, inputs), rel=1e-5)
    assert not seen["ours-encoder"]["missing"]
    assert same(from_layout(seen["ours-encoder"]["state"]), encoder(model.state_dict()))
    assert seen["pixels"] == list(SMALL.pixel_mean)


@pytest.mark.slow
def test_transformers_4_does_not_know_the_names_of_5(four):
    """The reason for two layouts: it starts such a model from random weights."""
    assert len(four[1]["ours-5"]["missing"]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "-bin"], ids=["safetensors", "bin"])
def test_we_load_what_transformers_4_wrote(four, inputs, form):
    folder, seen = four
    loaded = load_checkpoint(folder / f"full{form}", pixel_mean=SMALL.pixel_mean, pixel_std=SMALL.pixel_std)
    assert loaded.config == SMALL
    assert type(loaded) is MaskedAutoencoder
    assert same(to_layout(loaded.state_dict(), "huggingface-4"), seen["full"]["state"])
    assert our_loss(loaded, inputs) == pytest.approx(seen["full"]["output"].item(), rel=1e-5)
    with pytest.warns(CheckpointWarning, match="pixel_mean and pixel_std are not known: 0.5 is taken"):
        alone = load_checkpoint(folder / f"encoder{form}")
    assert type(alone) is VisionTransformer
    state = encoder(alone.state_dict())
    assert same(to_layout(state, "huggingface-4, encoder alone"), seen["encoder"]["state"])


def test_transformers_5_loads_what_we_wrote(five, model, run, inputs, tmp_path):
    transformers, _ = five
    for number in (4, 5):  # it turns the names of 4 into its own
        convert_checkpoint(run, f"huggingface-{number}", tmp_path)
        loaded, report = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert same(loaded.state_dict(), to_layout(model.state_dict(), "huggingface-5"))
        assert loaded(**inputs).loss.item() == pytest.approx(our_loss(model, inputs), rel=1e-5)
        assert loaded.config.layer_norm_eps == 1e-6
        alone, report = transformers.ViTMAEModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert same(from_layout(alone.state_dict()), encoder(model.state_dict()))


def test_we_load_what_transformers_5_wrote(five, inputs, tmp_path):
    """Its save_pretrained writes names of 4, but for the decoder's blocks, which become decoder_encoder.layer."""
    _, theirs = five
    theirs.save_pretrained(tmp_path / "full")
    theirs.vit.save_pretrained(tmp_path / "encoder")
    pixels = {"pixel_mean": SMALL.pixel_mean, "pixel_std": SMALL.pixel_std}
    full, alone = (load_checkpoint(tmp_path / name, **pixels) for name in ("full", "encoder"))
    assert full.config == SMALL
    assert same(to_layout(full.state_dict(), "huggingface-5"), theirs.state_dict())
    assert our_loss(full, inputs) == pytest.approx(theirs(**inputs).loss.item(), rel=1e-5)
    assert type(alone) is VisionTransformer
    assert same(to_layout(encoder(alone.state_dict()), "huggingface-5, encoder alone"), theirs.vit.state_dict())


def test_state_dicts_of_transformers_5_round_trip(five):
    _, theirs = five
    for module, layout in ((theirs, "huggingface-5"), (theirs.vit, "huggingface-5, encoder alone")):
        state = module.state_dict()
        assert find_layout(state) == layout
        assert same(to_layout(from_layout(state), layout), state)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (8, 64)], ids=["square", "oblong", "one row of patches"])
def test_timm_builds_our_encoder_and_we_its(size, tmp_path):
    timm = peers.import_peer("timm")
    torch.manual_seed(2)
    ours = randomised(MaskedAutoencoder(replace(SMALL, image_size=size)))
    save_checkpoint(ours, tmp_path / "run")
    result = convert_checkpoint(tmp_path / "run", "timm", tmp_path / "timm")
    written = load_file(tmp_path / "timm" / "model.safetensors")
    assert same(written, encoder(ours.state_dict()))
    assert result.left_out == [k for k in ours.state_dict() if k not in written]

    config = to_timm_config(ours.config)
    theirs = timm.create_model(config["architecture"], **config["model_args"]).eval()
    theirs.load_state_dict(written, strict=True)
    from_folder = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, 4, *size)
    with torch.no_grad():
        features = ours.forward_features(images)
        for vit in (theirs, from_folder):
            torch.testing.assert_close(vit.forward_features(images), features, rtol=1e-5, atol=1e-5)
        classifier = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=10)
        assert classifier(images).shape == (2, 10)
    assert from_folder.pretrained_cfg["mean"] == list(SMALL.pixel_mean)

    state = randomised(theirs).state_dict()
    save_file(state, tmp_path / "timm" / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "timm")
    assert type(loaded) is VisionTransformer
    assert loaded.config == MAEConfig(  # with a decoder of the defaults, unused
        image_size=size, patch_size=8, in_chans=4, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2.5,
        pixel_mean=SMALL.pixel_mean, pixel_std=SMALL.pixel_std,
    )  # fmt: skip
    assert same(to_layout(loaded.state_dict(), "timm"), state)


def test_timm_models_of_their_own_names(tmp_path):
    """The state dict of timm's vit_base_patch16_224 as it is, given the name of our model."""
    timm = peers.import_peer("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="")
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    loaded = load_checkpoint(tmp_path / "timm.pth", "mae_vit_tiny_patch16")
    assert same(encoder(loaded.state_dict()), theirs.state_dict())


def test_every_way_around_is_exact(tmp_path):
    torch.manual_seed(3)
    first = randomised(mae_vit_demo_patch7(norm_pix_loss=False))
    save_checkpoint(first, tmp_path / "run")
    ways = [
        ("huggingface-4", "a", None),
        ("huggingface-5", "b", None),
        ("published", "c.pth", None),
        ("huggingface-5", "d.safetensors", MODEL),
        ("published", "e.safetensors", MODEL),
        ("huggingface-4", "f.pth", MODEL),
        ("mae", "g", MODEL),
    ]
    source = tmp_path / "run"
    for to, name, architecture in ways:
        overrides = {"norm_pix_loss": False} if architecture else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)  # a file of Hugging Face's without its configuration
            convert_checkpoint(source, to, tmp_path / name, architecture, **overrides)
        source = tmp_path / name
    last = load_checkpoint(source)
    assert last.config == first.config
    assert same(last.state_dict(), first.state_dict())
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    assert same(content["model"], first.state_dict())
    assert same(load_file(tmp_path / "e.safetensors"), first.state_dict())
    assert same(torch.load(tmp_path / "f.pth", weights_only=True), to_layout(first.state_dict(), "huggingface-4"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_keep_dtype_and_share_no_memory(model, layout):
    state = {k: x.to(torch.bfloat16) for k, x in model.state_dict().items()}
    theirs = to_layout(state, layout)
    pointers = [x.untyped_storage().data_ptr() for x in theirs.values()]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {x.untyped_storage().data_ptr() for x in state.values()}
    assert same(from_layout(theirs), encoder(state) if layout == "timm" else state)


def test_half_precision_survives_on_disk(model, tmp_path):
    state = {k: x.half() for k, x in model.state_dict().items()}
    save_checkpoint(model, tmp_path / "run")
    save_file(state, tmp_path / "run" / "model.safetensors")
    convert_checkpoint(tmp_path / "run", "huggingface-5", tmp_path / "there")
    convert_checkpoint(tmp_path / "there", "mae", tmp_path / "back")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), state)


def test_mask_ratio_and_loss_travel(run, tmp_path):
    convert_checkpoint(run, "huggingface-4", tmp_path / "four")
    change_config(tmp_path / "four", mask_ratio=0.6, norm_pix_loss=True)
    convert_checkpoint(tmp_path / "four", "huggingface-5", tmp_path / "five")
    config = json.loads((tmp_path / "five" / "config.json").read_text())
    assert config["mask_ratio"] == 0.6
    assert config["norm_pix_loss"] is True
    with pytest.warns(CheckpointWarning) as caught:
        load_checkpoint(tmp_path / "five")
    assert [str(w.message) for w in caught] == [
        f"{tmp_path / 'five'} was trained with mask_ratio 0.6, which this model takes in each call"
    ]
    with pytest.warns(CheckpointWarning) as caught:
        convert_checkpoint(tmp_path / "five", "mae", tmp_path / "mae")
    assert [str(w.message) for w in caught] == [
        f"mask_ratio 0.6 has no place in {tmp_path / 'mae'}: the model takes it in each call"
    ]
    assert load_checkpoint(tmp_path / "mae").config.norm_pix_loss


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("sizes", [(48, 100, 24, 50), (1280, 5120, 512, 2048), (48, 11, 49, 12)])
def test_both_widths_of_the_mlp_are_met(sizes):
    names = ("hidden_size", "intermediate_size", "decoder_hidden_size", "decoder_intermediate_size")
    ratio = from_hugging_face_config(dict(zip(names, sizes, strict=True)))[0]["mlp_ratio"]
    assert (int(sizes[0] * ratio), int(sizes[2] * ratio)) == (sizes[1], sizes[3])


def test_a_configuration_may_leave_out_its_defaults():
    fields, notes = from_hugging_face_config({"model_type": "vit_mae", "layer_norm_eps": 1e-6})
    assert MAEConfig(**fields) == MAEConfig(norm_pix_loss=False)
    assert notes == []


def convert(*arguments) -> None:
    main(["convert", *map(str, arguments)])


def test_command(run, tmp_path, capsys):
    convert("--checkpoint", run, "--to", "huggingface-4", "--out", tmp_path / "hf")
    files = [tmp_path / "hf" / name for name in ("config.json", "preprocessor_config.json", "model.safetensors")]
    assert capsys.readouterr().out == f"Wrote {', '.join(map(str, files))}\n"
    assert sorted((tmp_path / "hf").iterdir()) == sorted(files)

    change_config(tmp_path / "hf", layer_norm_eps=1e-12)
    convert("--checkpoint", tmp_path / "hf", "--to", "timm", "--out", tmp_path / "new" / "encoder.pth")
    output = capsys.readouterr()
    assert output.err == f"Warning: {tmp_path / 'hf'}: layer_norm_eps 1e-12 becomes 1e-06: results differ slightly\n"
    wrote, left_out, configuration = output.out.splitlines()
    assert wrote == f"Wrote {tmp_path / 'new' / 'encoder.pth'}"
    assert left_out.startswith("Left out, the 32 tensors of the decoder: mask_token, decoder_pos_embed, ")
    assert configuration == "Left out: the configuration. Whoever loads this file has to know the architecture"

    torch.save({"model": encoder(mae_vit_demo_patch7().state_dict())}, tmp_path / "mae.pth")
    convert("--checkpoint", tmp_path / "mae.pth", "--model", MODEL, "--to", "huggingface-5", "--out", tmp_path / "e")
    assert "The checkpoint holds the encoder alone, and so does this" in capsys.readouterr().out
    assert json.loads((tmp_path / "e" / "config.json").read_text())["architectures"] == ["ViTMAEModel"]

    torch.save(mae_vit_demo_patch7().state_dict(), tmp_path / "plain.pth")
    arguments = ["--checkpoint", tmp_path / "plain.pth", "--model", MODEL, "--norm-pix-loss", "False"]
    convert(*arguments, "--to", "mae", "--out", tmp_path / "plain")
    assert not load_checkpoint(tmp_path / "plain").config.norm_pix_loss

    convert("--checkpoint", run, "--image-size", "48", "64", "--to", "mae", "--out", tmp_path / "larger")
    written, resampled = load_checkpoint(tmp_path / "larger"), load_checkpoint(run, image_size=(48, 64))
    assert written.config == resampled.config
    assert torch.equal(written.pos_embed, resampled.pos_embed)


def test_a_published_file_says_what_no_shape_tells(tmp_path):
    for normalised in (True, False):
        model = mae_vit_demo_patch7(norm_pix_loss=normalised)
        save_checkpoint(model, tmp_path / "run")
        convert_checkpoint(tmp_path / "run", "published", tmp_path / "x.pth")
        content = torch.load(tmp_path / "x.pth", weights_only=True)
        assert content.get("args") == (None if normalised else {"norm_pix_loss": False})
        assert load_checkpoint(tmp_path / "x.pth", MODEL).config.norm_pix_loss is normalised
