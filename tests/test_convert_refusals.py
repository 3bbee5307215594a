"""What convert and load_checkpoint refuse, and what they only say: messages are compared in full."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import MODEL, SMALL, change_config, same

from mae import (
    CheckpointError,
    CheckpointWarning,
    MaskedAutoencoder,
    convert_checkpoint,
    load_checkpoint,
    mae_vit_demo_patch7,
    save_checkpoint,
)
from mae.__main__ import main
from mae.checkpoints.layouts import from_layout, to_layout


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return MaskedAutoencoder(SMALL)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(model, folder)
    return folder


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps 1e-12 becomes 1e-06: results differ slightly"),
        (
            {"hidden_dropout_prob": 0.1},
            "hidden_dropout_prob 0.1 becomes 0: training differs, results in evaluation do not",
        ),
    ],
)
def test_what_changes_a_result_is_said(run, tmp_path, values, sentence):
    convert_checkpoint(run, "huggingface-4", tmp_path)
    change_config(tmp_path, **values)
    with pytest.warns(CheckpointWarning) as caught:
        load_checkpoint(tmp_path)
    assert [str(w.message) for w in caught] == [f"{tmp_path}: {sentence}"]
    assert Path(caught[0].filename) == Path(__file__)


TWO_RATIOS = (
    "intermediate_size 120 of 48 and decoder_intermediate_size 9 of 24 are not the same ratio, "
    "and this model has one for both"
)


@pytest.mark.parametrize(
    ("to", "values", "sentence"),
    [
        (
            "huggingface-4",
            {"model_type": "deit"},
            "model_type is 'deit', and only 'vit_mae', 'vit' and 'beit' can be converted",
        ),
        ("huggingface-4", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', and only 'gelu' can be converted"),
        ("huggingface-4", {"qkv_bias": False}, "qkv_bias is False, and only True can be converted"),
        ("huggingface-4", {"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001, too far from the 1e-06 of this model"),
        ("huggingface-4", {"decoder_intermediate_size": 9}, TWO_RATIOS),
        (
            "timm",
            {"architecture": "vit_base_patch14_dinov2"},
            "architecture vit_base_patch14_dinov2 is not a plain ViT",
        ),
        ("timm", {"model_args": {"qk_norm": True}}, "model_args qk_norm True cannot be converted"),
        (
            "timm",
            {"model_args": {"img_size": 224, "patch_size": 16}},
            "model_args do not hold in_chans, embed_dim, depth, num_heads, mlp_ratio; name the model",
        ),
    ],
)
def test_what_the_model_cannot_be_is_refused(run, tmp_path, to, values, sentence):
    convert_checkpoint(run, to, tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {sentence}"


@pytest.mark.parametrize(
    ("to", "fields", "reason"),
    [
        ("huggingface-4", {"image_size": (16, 32)},
         "Hugging Face's ViTMAE takes square images and patches alone, this image_size is 16x32"),
        ("huggingface-5", {"image_size": (8, 32, 32)},
         "Hugging Face's ViTMAE takes square images and patches alone, this image_size is 8x32x32"),
        ("huggingface-4", {"norm_pix_loss": "channel"},
         "Hugging Face's ViTMAE normalises whole patches, this norm_pix_loss is 'channel'"),
        ("timm", {"image_size": (8, 32, 32)}, "timm's ViT takes images, this image_size is 8x32x32"),
    ],
)  # fmt: skip
def test_models_without_a_counterpart_are_refused(tmp_path, to, fields, reason):
    save_checkpoint(MaskedAutoencoder(replace(SMALL, **fields)), tmp_path / "run")
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(tmp_path / "run", to, tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'run'} has no counterpart in {to}: {reason}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["huggingface-4", "huggingface-5"])
def test_every_mismatch_is_named_as_in_the_file(run, model, tmp_path, layout):
    convert_checkpoint(run, layout, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(k for k in state if k.endswith(("key.weight", "k_proj.weight")))
    state["vit.pooler.dense.weight"] = state.pop("vit.layernorm.bias")
    state["decoder.mask_token"] = torch.zeros(1, 1, 7)
    del state[key]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    first, *problems = str(error.value).splitlines()
    assert first == f"{tmp_path / 'model.safetensors'} does not fit the model:"
    assert sorted(problems) == sorted(
        [
            "  vit.layernorm.bias is missing",
            f"  {key} is missing",
            "  vit.pooler.dense.weight is not part of this model",
            "  decoder.mask_token has shape (1, 1, 7), the model expects (1, 1, 24)",
        ]
    )


def test_many_mismatches_are_counted(model, tmp_path):
    state, other = model.state_dict(), mae_vit_demo_patch7().state_dict()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "other.pth", MODEL)
    expected = ["does not fit the model:"]
    for words, names in (
        ("is missing", [k for k in other if k not in state]),
        ("is not part of", [k for k in state if k not in other]),
        ("has shape", [k for k in state if k in other and state[k].shape != other[k].shape]),
    ):
        expected += [f"{name} {words}" for name in names[:8]]
        expected += [f"and {len(names) - 8} more like these"] if len(names) > 8 else []
    lines = str(error.value).splitlines()
    assert len(lines) == len(expected) > 10
    assert all(words in line for words, line in zip(expected, lines, strict=True))


def test_pure_functions_name_what_is_wrong(model):
    state = to_layout(model.state_dict(), "huggingface-5")
    with pytest.raises(CheckpointError, match=r"^vit.pooler.weight is not part of a masked autoencoder$"):
        from_layout(state | {"vit.pooler.weight": torch.zeros(1)})
    del state["vit.layers.1.attention.v_proj.bias"]
    with pytest.raises(CheckpointError, match=r"^vit.layers.1.attention.v_proj.bias is missing$"):
        from_layout(state)
    with pytest.raises(ValueError, match=r"^wings.weight is no key of the published layout$"):
        to_layout({"wings.weight": torch.zeros(1)}, "huggingface-4")
    with pytest.raises(ValueError, match=r"^there is no layout called 'jax'; choose one of published, huggingface-4, "):
        to_layout({}, "jax")


UNKNOWN = (
    "the keys are of no layout known here, such as {key}; looked for blocks.0.attn.proj (published), "
    "vit.encoder.layer.0.attention.output.dense (huggingface-4), vit.layers.0.attention.o_proj (huggingface-5), "
    "encoder.layer.0.attention.output.dense (huggingface-4, encoder alone), "
    "layers.0.attention.o_proj (huggingface-5, encoder alone), "
    "vit.encoder.layer.0.attention.output.dense (huggingface-4, saved by 5), "
    "beit.encoder.layer.0.attention.output.dense (huggingface-4, BEiT), "
    "beit.layers.0.attention.o_proj (huggingface-5, BEiT)"
)
TWO_LAYOUTS = (
    "the keys are of two layouts, blocks.0.norm1.weight of published and vit.layers.0.mlp.fc1.bias of huggingface-5"
)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({}, UNKNOWN.format(key="none at all")),
        ({"model.wte.weight": torch.zeros(2)}, UNKNOWN.format(key="model.wte.weight")),
        (
            {"blocks.0.norm1.weight": torch.zeros(2), "vit.layers.0.mlp.fc1.bias": torch.zeros(2)},
            TWO_LAYOUTS,
        ),
    ],
    ids=["empty", "unknown", "two"],
)
def test_unknown_and_ambiguous_layouts_are_refused(tmp_path, state, sentence):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "x.pth", MODEL)
    assert str(error.value) == f"{tmp_path / 'x.pth'}: {sentence}"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.zeros(2)], "it is a list"),
        ({"model": 3}, "its keys are model"),
        ({"epoch": 4, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "its keys are epoch, optimizer"),
    ],
    ids=["list", "number", "no tensors"],
)
def test_files_without_a_state_dict_are_refused(tmp_path, content, what):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "x.pth", MODEL)
    assert str(error.value) == f"{tmp_path / 'x.pth'} holds no state dict: {what}"


def test_a_bare_file_of_hugging_face_says_what_it_takes_for_granted(tmp_path):
    state = to_layout(mae_vit_demo_patch7().state_dict(), "huggingface-4")
    torch.save(state, tmp_path / "x.bin")
    with pytest.warns(CheckpointWarning, match="no config.json was read: norms get the epsilon 1e-06, blocks gelu"):
        load_checkpoint(tmp_path / "x.bin", MODEL)


@pytest.mark.parametrize(
    ("to", "out", "sentence"),
    [
        ("published", "{d}/x", r"a published checkpoint is one file; let the name {d}/x end in \.pth"),
        ("mae", "{run}", "{run} is where the checkpoint itself is; choose another place"),
        ("mae", "{d}/file", "{d}/file is a file, not a folder"),
        ("timm", "{d}/folder.pth", r"{d}/folder\.pth is a folder, not a file"),
    ],
)
def test_command_stops_with_one_sentence(run, tmp_path, to, out, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "folder.pth").mkdir()
    before = load_file(run / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--checkpoint", str(run), "--to", to, "--out", out.format(d=tmp_path, run=run)])
    assert re.fullmatch("mae: " + sentence.format(d=tmp_path, run=run), stop.value.code)
    assert same(load_file(run / "model.safetensors"), before)


def test_weights_in_several_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(CheckpointError, match=r"holds its weights in several files; save them as one$"):
        load_checkpoint(tmp_path)


def test_an_unknown_target_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(run, "jax", tmp_path / "x")
    assert str(error.value) == (
        "there is no layout called 'jax'; choose one of mae, published, huggingface-4, huggingface-5, timm"
    )
