"""Checkpoints: our run folders, and files laid out as the published code lays them out."""

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mae
from mae import (
    CheckpointError,
    MAEConfig,
    MaskedAutoencoder,
    VisionTransformer,
    load_checkpoint,
    mae_vit_tiny_patch16,
    save_checkpoint,
)

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
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mae.checkpoints.saving.save_file", fail)
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(MaskedAutoencoder(replace(SMALL, norm_pix_loss=True)), tmp_path)
    names = "config.json, model.safetensors"
    assert str(error.value) == (
        f"{names} could not be written into {tmp_path}: No space left on device; {names} from before are whole"
    )
    loaded = load_checkpoint(tmp_path)
    assert same_weights(loaded, old)
    assert loaded.config == SMALL
    assert len(list(tmp_path.iterdir())) == 2


FULL_DISK = """
import resource, torch
from mae.checkpoints.layouts import CheckpointError
from mae.checkpoints.saving import write_files, write_folder, write_pickle

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
state = {"x": torch.zeros(1000)}
from pathlib import Path
for write in (
    lambda: write_folder(Path("new"), state, {}),
    lambda: write_files(Path("new"), {"x.pth": lambda path: write_pickle(path, state)}),
    lambda: write_folder(Path("file/new"), state, {}),
):
    try:
        write()
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", FULL_DISK]
    path = os.pathsep.join([str(Path(mae.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    first, *others = result.stdout.splitlines()
    assert first.startswith("model.safetensors could not be written into new: Error while serializing: I/O error: ")
    assert others == [
        "x.pth could not be written into new: File too large",
        "model.safetensors could not be written into file/new: Not a directory",
    ]
    assert not list((tmp_path / "new").iterdir())


def test_leftovers_of_killed_saves_go_and_those_of_living_ones_stay(tmp_path):
    model = MaskedAutoencoder(SMALL)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = {
        f".saving-{host}-{ended.pid}-01234567": False,
        f".saving-{host}-{os.getpid()}-01234567": True,
        f".saving-elsewhere-{ended.pid}-01234567": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    files = {
        ".tmpAbCd12": (1, False),
        ".tmpNew123": (None, True),
        "model.safetensors.tmp": (1, False),
        "x.tmp": (1, True),
    }
    for name, (time, _) in files.items():
        (tmp_path / name).touch()
        if time:
            os.utime(tmp_path / name, (time, time))
    save_checkpoint(model, tmp_path)
    kept = [name for name, stays in names.items() if stays] + [name for name, (_, stays) in files.items() if stays]
    assert {x.name for x in tmp_path.iterdir()} == {"config.json", "model.safetensors", *kept}


def test_two_saves_at_once_do_not_meet(tmp_path, monkeypatch):
    model = MaskedAutoencoder(SMALL)
    inner, real = [], mae.checkpoints.saving.save_file

    def save(state, path, metadata):
        if not inner:
            inner.append(path)
            save_checkpoint(model, tmp_path)
        real(state, path, metadata=metadata)

    monkeypatch.setattr("mae.checkpoints.saving.save_file", save)
    save_checkpoint(model, tmp_path)
    assert same_weights(load_checkpoint(tmp_path), model)
    assert len(list(tmp_path.iterdir())) == 2


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
    assert type(loaded) is MaskedAutoencoder


def test_a_checkpoint_of_the_encoder_alone_is_one(tmp_path, tiny):
    state = {k: v for k, v in tiny.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_tiny.pth")
    loaded = load_checkpoint(tmp_path / "mae_pretrain_vit_tiny.pth", "mae_vit_tiny_patch16")
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(loaded.forward_features(images), tiny.forward_features(images))
    assert type(loaded) is VisionTransformer
    assert torch.equal(loaded(images), tiny.forward_features(images))
    save_checkpoint(loaded, tmp_path / "run")
    again = load_checkpoint(tmp_path / "run")
    assert type(again) is VisionTransformer
    assert same_weights(again, loaded)


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


WHOLE, SIZE = "a whole number of 1 to 65536", "a whole number of 1 to 65536, or a list of two or three"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"depth": 3.5}, "depth must be a whole number of 0 to 1000, got 3.5"),
        ({"depth": 10**9}, "depth must be a whole number of 0 to 1000, got 1000000000"),
        ({"depth": True}, "depth must be a whole number of 0 to 1000, got True"),
        ({"num_heads": 0}, f"num_heads must be {WHOLE}, got 0"),
        ({"embed_dim": "32"}, f"embed_dim must be {WHOLE}, got '32'"),
        ({"patch_size": [0, 8, 8]}, f"patch_size must be {SIZE}, got [0, 8, 8]"),
        ({"patch_size": [1, 8, 8, 8]}, f"patch_size must be {SIZE}, got [1, 8, 8, 8]"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a number above 0, got nan"),
        ({"norm_pix_loss": "no"}, "norm_pix_loss must be true, false or \"channel\", got 'no'"),
        ({"pixel_std": [1, 1, 0]}, "pixel_std must be a list of numbers above 0, got [1, 1, 0]"),
        ({"model_type": "vit_mae", "hidden_size": 0}, f"hidden_size must be {WHOLE}, got 0"),
        ({"model_type": "vit_mae", "layer_norm_eps": "x"}, "layer_norm_eps must be a number above 0, got 'x'"),
        ({"architecture": 3}, "architecture must be a name, got 3"),
        ([1], "it is '[1]', not an object"),
        ("[" * 200_000, "its brackets nest too deep"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_configuration_is_checked_before_anything_is_built(tmp_path, values, sentence):
    save_checkpoint(MaskedAutoencoder(SMALL), tmp_path)
    if isinstance(values, dict):
        values = asdict(SMALL) | values
    text = values if isinstance(values, str) else json.dumps(values)
    write_text(tmp_path / "config.json", text)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'} is not the configuration of a model: {sentence}"


def test_blocks_that_the_file_does_not_hold_are_not_built(tmp_path, monkeypatch):
    save_checkpoint(MaskedAutoencoder(SMALL), tmp_path)
    write_text(tmp_path / "config.json", json.dumps(asdict(SMALL) | {"depth": 1000}))
    monkeypatch.setattr("mae.checkpoints.checkpoint.MaskedAutoencoder", None)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: depth is 1000, and the weights have 1 blocks"
