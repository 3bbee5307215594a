"""A model with CrossMAE's decoder on disk and on the command line: its own files, and no other system's."""

import json
from dataclasses import replace

import pytest
import torch
from pictures import good_folder

from mae import (
    CheckpointError,
    CheckpointWarning,
    MAEConfig,
    MaskedAutoencoder,
    VisionTransformer,
    convert_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mae.__main__ import main
from mae.model.block import Mlp
from mae.model.cross import CrossAttention

SMALL = MAEConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=3,
    decoder_num_heads=2, decoder="cross", predicted_share=0.5,
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    model = MaskedAutoencoder(SMALL)
    save_checkpoint(model, tmp_path / "run")
    return model, tmp_path / "run"


def test_a_run_folder_holds_it(run):
    model, folder = run
    loaded = load_checkpoint(folder)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    assert type(loaded.decoder_blocks[0].attn) is CrossAttention
    assert type(loaded.decoder_blocks[0].mlp) is Mlp


def test_a_file_tells_its_decoder_by_its_keys(run, tmp_path):
    model, folder = run
    (folder / "config.json").unlink()
    heads = {"num_heads": 4, "decoder_num_heads": 2}
    with pytest.warns(CheckpointWarning):
        loaded = load_checkpoint(folder / "model.safetensors", **heads)
    assert loaded.config.decoder == "cross"
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())


def test_runs_from_before_are_of_the_published_decoder(tmp_path):
    model = MaskedAutoencoder(replace(SMALL, decoder="self", predicted_share=1.0))
    save_checkpoint(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("decoder") == "self"
    assert values.pop("predicted_share") == 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_checkpoint(tmp_path).config == model.config


def test_a_configuration_of_the_other_decoder_is_told(run):
    _, folder = run
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder, decoder="self")
    assert "decoder_blocks.0.attn.q.weight is not part of this model" in str(error.value)
    assert "decoder_blocks.0.attn.qkv.weight is missing" in str(error.value)


@pytest.mark.parametrize("to", ["published", "huggingface-4", "huggingface-5"])
def test_other_systems_have_no_such_decoder(run, tmp_path, to):
    _, folder = run
    for out in (tmp_path / "out.pth", *((tmp_path / "out",) if to != "published" else ())):
        with pytest.raises(CheckpointError) as error:
            convert_checkpoint(folder, to, out)
        expected = f"{folder} has no counterpart in {to}: its decoder is 'cross', which no other system has"
        assert str(error.value) == expected
        assert not out.exists()


def test_conversions_that_need_no_decoder(run, tmp_path):
    model, folder = run
    result = convert_checkpoint(folder, "timm", tmp_path / "timm")
    assert result.encoder_only
    assert len(result.left_out) == sum(name.startswith(("decoder", "mask_")) for name in model.state_dict())
    encoder = load_checkpoint(tmp_path / "timm")
    assert type(encoder) is VisionTransformer
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(encoder.forward_features(images), model.forward_features(images))
    save_checkpoint(VisionTransformer(model.config), tmp_path / "encoder")
    assert convert_checkpoint(tmp_path / "encoder", "huggingface-4", tmp_path / "theirs").encoder_only
    convert_checkpoint(folder, "mae", tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").config == model.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "both"}, 'MAEConfig: decoder must be "self" or "cross", got \'both\''),
        ({"predicted_share": 0}, "MAEConfig: predicted_share must be a number above 0, at most 1, got 0"),
        ({"predicted_share": 1.5}, "MAEConfig: predicted_share must be a number above 0, at most 1, got 1.5"),
        (
            {"decoder_depth": 0},
            "MAEConfig: a cross decoder sees the image in its blocks alone, and decoder_depth is 0",
        ),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        replace(SMALL, **fields)
    assert str(error.value) == message


def test_on_the_command_line(tmp_path):
    data = good_folder(tmp_path / "data", 2)
    options = [
        "pretrain", "--data", data, "--out", tmp_path / "run", "--model", "mae_vit_tiny_patch16", "--image-size", "32",
        "--batch-size", "4", "--workers", "0", "--device", "cpu", "--decoder-depth", "1", "--decoder-width", "64",
        "--steps", "1", "--decoder", "cross", "--predicted-share", "0.5",
    ]  # fmt: skip
    main([*map(str, options)])
    config = load_checkpoint(tmp_path / "run").config
    assert (config.decoder, config.predicted_share, config.decoder_depth) == ("cross", 0.5, 1)
    with pytest.raises(SystemExit) as stop:
        main([*map(str, options), "--masking", "grid", "--overwrite"])
    assert "masking grid has so few masks" in stop.value.code
