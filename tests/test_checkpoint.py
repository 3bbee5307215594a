"""Checkpoints: our run folders, and files laid out as the published code lays them out."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from mae import CheckpointError, MAEConfig, MaskedAutoencoder, load_checkpoint, mae_vit_tiny_patch16, save_checkpoint

SMALL = MAEConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=2, norm_pix_loss=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> MaskedAutoencoder:
    return mae_vit_tiny_patch16()


def same_weights(a: MaskedAutoencoder, b: MaskedAutoencoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_round_trip(tmp_path):
    model = MaskedAutoencoder(SMALL)
    save_checkpoint(model, tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        loaded = load_checkpoint(path)
        assert loaded.config == SMALL
        assert same_weights(loaded, model)
        assert not loaded.training
    assert load_checkpoint(tmp_path / "run", norm_pix_loss=True).config.norm_pix_loss
    files = sorted((tmp_path / "run").iterdir())
    assert [f.name for f in files] == ["config.json", "model.safetensors"]
    (tmp_path / "other").touch()
    assert {f.stat().st_mode for f in files} == {(tmp_path / "other").stat().st_mode}


def test_a_failing_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    old = MaskedAutoencoder(SMALL)
    save_checkpoint(old, tmp_path)

    def fail(state, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("mae.checkpoint.save_file", fail)
    with pytest.raises(OSError):
        save_checkpoint(MaskedAutoencoder(SMALL), tmp_path)
    assert same_weights(load_checkpoint(tmp_path), old)


@pytest.mark.parametrize(
    "layout", ["under model", "bare", "with a command line", "under state_dict", "distributed and compiled"]
)
def test_published_checkpoints_load(tmp_path, tiny, layout):
    state = tiny.state_dict()
    content = {
        "under model": {"model": state},
        "bare": state,
        "with a command line": {"model": state, "args": argparse.Namespace(epochs=800), "epoch": 799},
        "under state_dict": {"state_dict": state},
        "distributed and compiled": {"model": {f"module._orig_mod.{name}": x for name, x in state.items()}},
    }[layout]
    torch.save(content, tmp_path / "mae_full.pth")
    loaded = load_checkpoint(tmp_path / "mae_full.pth", "mae_vit_tiny_patch16")
    assert same_weights(loaded, tiny)
    assert not loaded.encoder_only


def test_encoder_only_checkpoints_give_features_and_refuse_to_reconstruct(tmp_path, tiny):
    state = {k: v for k, v in tiny.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_tiny.pth")
    loaded = load_checkpoint(tmp_path / "mae_pretrain_vit_tiny.pth", "mae_vit_tiny_patch16")
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(loaded.forward_features(images), tiny.forward_features(images))
    for use in (loaded.reconstruct, loaded):
        with pytest.raises(RuntimeError) as error:
            use(images)
        assert str(error.value) == (
            "MaskedAutoencoder: the checkpoint held the encoder alone, so there is nothing to reconstruct with; "
            "load a checkpoint that includes the decoder (published ones are called *_full or mae_visualize_*)"
        )


def test_every_mismatch_is_named(tmp_path):
    model = MaskedAutoencoder(SMALL)
    save_checkpoint(model, tmp_path)
    state = model.state_dict()
    del state["norm.bias"]
    state["head.weight"] = torch.zeros(10, 32)
    state["cls_token"] = torch.zeros(1, 1, 48)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'model.safetensors'} does not fit the model:\n"
        "  norm.bias is missing\n"
        "  head.weight is not part of this model\n"
        "  cls_token has shape (1, 1, 48), the model expects (1, 1, 32)"
    )


def write_text(path, content="this is no checkpoint"):
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("prepare", "model", "message"),
    [
        (lambda d: d / "missing", None, "there is no checkpoint at {d}/missing"),
        (lambda d: d, None, "there is no checkpoint at {d}/model.safetensors"),
        (
            lambda d: write_text(d / "x.pth"),
            "mae_vit_giant",
            "there is no model called 'mae_vit_giant'; choose one of mae_vit_tiny_patch16, mae_vit_small_patch16, ",
        ),
        (lambda d: write_text(d / "x.pth"), "mae_vit_tiny_patch16", "{d}/x.pth is not a readable checkpoint: "),
        (lambda d: write_text(d / "x.safetensors"), "mae_vit_tiny_patch16", "{d}/x.safetensors is not a readable "),
    ],
)
def test_unusable_checkpoints_are_refused(tmp_path, prepare, model, message):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(prepare(tmp_path), model)
    assert str(error.value).startswith(message.format(d=tmp_path))


def test_a_file_without_its_configuration_asks_for_the_model(tmp_path):
    save_checkpoint(MaskedAutoencoder(SMALL), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json beside it; name the model, one of mae_vit_tiny"):
        load_checkpoint(tmp_path)
    write_text(tmp_path / "config.json", json.dumps({"wings": 2}))
    with pytest.raises(CheckpointError, match=r"config.json is not the configuration of a model: "):
        load_checkpoint(tmp_path)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not appear",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pth", "mae_vit_tiny_patch16")
