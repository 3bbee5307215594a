"""Other people's checkpoints: where in a file the weights lie, what their settings say, and what is no checkpoint."""

import argparse
import datetime
import io
import pathlib
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune

from mae import (
    CheckpointError,
    CheckpointWarning,
    MAEConfig,
    MaskedAutoencoder,
    VisionTransformer,
    convert_checkpoint,
    load_checkpoint,
    mae_vit_demo_patch7,
)
from mae.__main__ import main
from mae.checkpoints.layouts import is_decoder, to_layout

MODEL = "mae_vit_demo_patch7"
torch.manual_seed(0)
STATE = mae_vit_demo_patch7().state_dict()
OTHER = {name: x + 1 for name, x in STATE.items()}
ENCODER = {name: x for name, x in STATE.items() if not is_decoder(name)}
SETTINGS = {"model": MODEL, "norm_pix_loss": True}
EMA = "EMA weights lie under {}, which ema=True or --ema takes"
TINY = "it does not say its heads, and num_heads 3 and decoder_num_heads 16 are those of mae_vit_tiny_patch16"
ASSUMED = "it does not say norm_pix_loss, and True is assumed"


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in state.items()}


def load(path: Path, *arguments, **options) -> tuple[MaskedAutoencoder, str]:
    """The model, and what was said of the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_checkpoint(path, *arguments, **options)
    said = [str(w.message) for w in caught if issubclass(w.category, CheckpointWarning)]
    assert len(caught) == len(said) <= 1
    return model, "".join(said).removeprefix(f"{path}: ")


def holds(model: MaskedAutoencoder, state: dict[str, Tensor]) -> bool:
    ours = model.state_dict()
    return all(torch.equal(ours[name], x) for name, x in state.items())


def saved(tmp_path: Path, content, **options) -> Path:
    torch.save(content, tmp_path / "x.pth", **options)
    return tmp_path / "x.pth"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": STATE}, ""),
        ({"module": STATE}, "the weights are those under 'module'"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}, "whatever": {"best": STATE}},
         "the weights are those under 'whatever.best'"),
        ((STATE, {"lr": 1}), "the weights are those under '0'"),
        ({"epoch": 3, **STATE}, ""),
        ({"model": {name: x.numpy() for name, x in STATE.items()}}, ""),
        ({"network": STATE, "state_dict": OTHER},
         "the weights are those under 'state_dict'; other weights lie under 'network'"),
        (under("module."), "'module.' is taken off their names"),
        (under("a.b."), "'a.b.' is taken off their names"),
        (under("models.3."), "'models.3.' is taken off their names"),
        (under("net.", to_layout(STATE, "huggingface-5")), "'net.' is taken off their names"),
        ({name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in STATE.items()},
         "'_orig_mod.' is taken off their names"),
        ({"state_dict": {**under("model._orig_mod."), "criterion.weight": torch.ones(1), "n": torch.ones(1)}},
         ("the weights are those under 'state_dict'; 'model.' and '_orig_mod.' are taken off their names; "
          "criterion, n are left out")),
        ({"model": {**STATE, "head.weight": torch.ones(2, 96), "fc_norm.weight": torch.ones(96)}},
         "the weights are those under 'model'; the classifier (head, fc_norm) is left out"),
        ({**to_layout(STATE, "huggingface-4"), "classifier.weight": torch.ones(2, 96)},
         "the classifier (classifier) is left out"),
        ({"model": STATE, "model_ema": OTHER}, f"the weights are those under 'model'; {EMA.format(repr('model_ema'))}"),
        ({"ema": {"decay": 0.9, "shadow": OTHER}, "model": STATE},
         f"the weights are those under 'model'; {EMA.format(repr('ema.shadow'))}"),
        ({**under("net."), **under("net_ema.", OTHER)},
         f"'net.' is taken off their names; {EMA.format(repr('net_ema'))}"),
        ({**STATE, **under("ema.", OTHER)}, EMA.format(repr("ema"))),
        ({"state": {"n_averaged": torch.tensor(3), **under("module.")}},
         ("the weights are those under 'state'; 'module.' is taken off their names; n_averaged is left out; "
          "the weights are averages (EMA), the only ones in the file")),
    ],
    ids=range(20),
)  # fmt: skip
def test_the_weights_are_found_and_the_rest_is_said(tmp_path, content, said):
    expected = OTHER if isinstance(content, dict) and "network" in content else STATE
    model, found = load(saved(tmp_path, content), MODEL, norm_pix_loss=False)
    assert holds(model, expected)
    assert found.removesuffix("no config.json was read: norms get the epsilon 1e-06, blocks gelu and no dropout") in (
        said,
        f"{said}; ",
    )


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "model_ema": under("module.", OTHER)},
        {"state_dict": STATE, "state_dict_ema": OTHER},
        {"model": STATE, "emaModel": {"n_averaged": torch.tensor(1), **under("module.", OTHER)}},
        {**under("model."), **under("model_ema.module.", OTHER)},
    ],
    ids=range(4),
)
def test_averages_are_taken_when_asked_for(tmp_path, content):
    path = saved(tmp_path, content)
    assert holds(load(path, MODEL)[0], STATE)
    model, said = load(path, MODEL, ema=True)
    assert holds(model, OTHER)
    assert "; the weights are averages (EMA)" in said
    with pytest.warns(CheckpointWarning):
        convert_checkpoint(path, "published", tmp_path / "out.safetensors", MODEL, ema=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["cls_token"], OTHER["cls_token"])


@pytest.mark.parametrize(
    "options",
    ["convert --to mae --out {d}/out", "reconstruct --images {d}", "attention --images {d}"],
    ids=lambda x: x.split()[0],
)
def test_averages_that_are_not_there(tmp_path, options):
    path = saved(tmp_path, {"model": STATE, "epoch": 3})
    with pytest.raises(SystemExit) as stop:
        main([*options.format(d=tmp_path).split(), "--checkpoint", str(path), "--ema"])
    assert stop.value.code == f"mae: {path} holds no EMA weights: its keys are model, epoch"
    assert len(list(tmp_path.iterdir())) == 1


def test_averages_without_names(tmp_path):
    path = saved(tmp_path, {"model": STATE, "ema": {"decay": 0.9, "shadow_params": [*OTHER.values()]}})
    assert holds(load(path, MODEL)[0], STATE)
    with pytest.raises(CheckpointError) as error:
        load(path, MODEL, ema=True)
    assert str(error.value) == (
        f"{path} holds its EMA weights under 'ema.shadow_params' as a list without names; copy them into the model, "
        "and save its state_dict()"
    )


@pytest.mark.parametrize(
    ("trained", "average"),
    [("encoder", "target_encoder"), ("base_encoder", "momentum_encoder"), ("student", "teacher"), ("model", "polyak")],
)
def test_averages_by_other_names(tmp_path, trained, average):
    prefixed = under(f"{average}.", OTHER) | under(f"{trained}.")
    for content in ({average: OTHER, trained: STATE}, {"state_dict": prefixed}):
        path = saved(tmp_path, content)
        assert holds(load(path, MODEL)[0], STATE)
        assert holds(load(path, MODEL, ema=True)[0], OTHER)


def test_a_norm_behind_pooling_is_said(tmp_path):
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: x for k, x in ENCODER.items()}
    model, said = load(saved(tmp_path, {"model": {**state, "head.bias": torch.ones(2)}}), MODEL)
    assert type(model) is VisionTransformer
    assert holds(model, ENCODER)
    assert said == (
        "the weights are those under 'model'; fc_norm, applied there behind pooling, becomes norm, applied here before "
        "it, so pooled features differ; the classifier (head) is left out"
    )


def test_what_is_no_part_of_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"; 'net.' is taken off their names\):\n  wings.weight is not part of"):
        load(saved(tmp_path, {"model": under("net.", {**STATE, "wings.weight": torch.ones(1)})}), MODEL)
    with pytest.raises(CheckpointError, match=r"\n  cls_token, pos_embed, mask_token and 71 more hold no floating"):
        load(saved(tmp_path, {"model": {name: x.to(torch.int8) for name, x in STATE.items()}}), MODEL)


@pytest.mark.parametrize("kind", [dict, lambda **x: argparse.Namespace(**x)], ids=["dict", "namespace"])
def test_settings_decide(tmp_path, kind):
    path = saved(tmp_path, {"model": STATE, "args": kind(norm_pix_loss=False, model=MODEL, input_size=28)})
    model, said = load(path)
    assert holds(model, STATE)
    assert model.config == mae_vit_demo_patch7(norm_pix_loss=False).config
    assert said == "its settings say norm_pix_loss False"
    model, said = load(path, norm_pix_loss=True)
    assert model.config.norm_pix_loss
    assert said == ""
    assert not load(path, MODEL)[0].config.norm_pix_loss


@pytest.mark.parametrize(
    ("content", "heads", "normalised", "said"),
    [
        ({"probe": {"num_heads": 12}}, (3, 16), True, TINY),
        ({"hparams": {"probe": {"num_heads": 12}}, "optimizer": {"param_groups": [{"num_heads": 6}]}}, (3, 16), True,
         TINY),
        ({"config": {"decoder": {"num_heads": 4}, "encoder": {"num_heads": 6}}}, (6, 16), True, "num_heads 6"),
        ({"hyper_parameters": {"model": {"norm_pix_loss": False}}}, (3, 16), False, TINY),
        ({"teacher_cfg": {"norm_pix_loss": False}, "student_cfg": {"norm_pix_loss": True}}, (3, 16), True, ASSUMED),
        ({"num_heads": 12, "norm_pix_loss": False}, (12, 16), False, "its settings say num_heads 12"),
        ({"args": {"norm_pix_loss": False}, "cfg": {"norm_pix_loss": True}}, (3, 16), True,
         "its settings say norm_pix_loss False in args and norm_pix_loss True in cfg, of which none is taken"),
        ({"args": {"input_size": 32}, "cfg": {"img_size": [32, 32], "num_heads": 5}}, (3, 16), True,
         "its settings say num_heads 5, which does not divide embed_dim 192"),
    ],
    ids=range(8),
)  # fmt: skip
def test_settings_are_those_of_this_model(tmp_path, content, heads, normalised, said):
    state = wide().state_dict()
    for path in (content, {"checkpoint": {**content, "model": state}}):
        model, found = load(saved(tmp_path, {"model": state, **path} if path is content else path))
        assert (model.config.num_heads, model.config.decoder_num_heads) == heads
        assert model.config.norm_pix_loss is normalised
        assert said.replace(" in ", " in checkpoint." if path is not content else " in ") in found


def wide(**options) -> MaskedAutoencoder:
    sizes = {"image_size": 32, "depth": 1, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 16}
    return MaskedAutoencoder(MAEConfig(**{**sizes, "embed_dim": 192, "num_heads": 3, **options}))


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (wide(), {}, f"{TINY}; its positions are those of image_size 32x32; {ASSUMED}"),
        (wide(norm_pix_loss=False), {"norm_pix_loss": np.array(False)},
         f"{TINY}; its positions are those of image_size 32x32; its settings say norm_pix_loss False"),
        (wide(image_size=(16, 64), norm_pix_loss=False),
         {"input_size": [3, 16, 64], "arch": "mae_vit_tiny_patch16_dec512d8b", "norm_pix_loss": np.bool_(False)},
         ("its settings say mae_vit_tiny_patch16 and its shapes depth 1, which are taken; "
          "its settings say image_size 16x64; its settings say norm_pix_loss False")),
        (wide(mlp_ratio=2.5, patch_size=8, in_chans=2, pixel_mean=(0.5,) * 2, pixel_std=(0.5,) * 2),
         {"img_size": 224, "model": "mae_vit_large_patch16", "norm_pix_loss": 1},
         ("its settings say mae_vit_large_patch16 and its shapes embed_dim 192, depth 1, patch_size 8x8, which are "
          f"taken; {TINY}; its positions are those of image_size 32x32, and not 224x224 as its settings say; "
          "pixel_mean and pixel_std are not known: 0.5 is taken for uint8 images")),
        (wide(embed_dim=64, num_heads=2, decoder_num_heads=4),
         {"num_heads": 2, "decoder_num_heads": 4, "norm_pix_loss": "maybe"},
         ("its settings say norm_pix_loss 'maybe', which is passed over; "
          f"its positions are those of image_size 32x32; {ASSUMED}")),
    ],
    ids=["shapes", "array", "settings", "contradiction", "heads"],
)  # fmt: skip
def test_the_model_need_not_be_named(tmp_path, model, settings, said):
    loaded, found = load(saved(tmp_path, {"args": settings, "model": model.state_dict()}))
    assert loaded.config == model.config
    assert holds(loaded, model.state_dict())
    assert found == said


CLIP = {
    "patch_size": (2, 16, 16), "embed_dim": 384, "num_heads": 6, "decoder_embed_dim": 48, "decoder_num_heads": 3
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "settings", "options", "said"),
    [
        ((4, 32, 48), {"num_frames": 4, "input_size": [32, 48]}, {}, "its settings say image_size 4x32x48"),
        ((4, 32, 48), {}, {"image_size": (4, 32, 48)}, ""),
        ((4, 32, 32), {}, {}, "its positions are those of image_size 4x32x32"),
        ((16, 32, 32), {"input_size": 32}, {"image_size": 64}, "its settings say image_size 16x32x32"),
    ],
    ids=["settings", "asked", "cube", "another"],
)
def test_clips_are_told_by_their_shapes(tmp_path, size, settings, options, said):
    model = wide(**CLIP | {"image_size": size})
    content = {"model": model.state_dict(), "args": {"norm_pix_loss": "channel", **settings}}
    loaded, found = load(saved(tmp_path, content), **options)
    other = (16, 64, 64) if options == {"image_size": 64} else size
    assert loaded.config == replace(model.config, image_size=other, norm_pix_loss="channel")
    heads = "it does not say its heads, and num_heads 6 and decoder_num_heads 3 are those of mae_vit_small_video"
    assert found == "; ".join(filter(None, (heads, said, "its settings say norm_pix_loss channel")))


def test_sizes_that_nothing_tells(tmp_path):
    path = saved(tmp_path, wide(embed_dim=64, num_heads=2).state_dict())
    with pytest.raises(CheckpointError, match=r"x.pth: it has no config.json beside it; name the model, one of "):
        load(path)
    assert load(path, num_heads=2, decoder_num_heads=16)[0].config.num_heads == 2
    refusal = r"its 6 positions are those of no square image; pass the image_size of its training$"
    with pytest.raises(CheckpointError, match=refusal):
        load(saved(tmp_path, wide(image_size=(32, 48)).state_dict()))


def test_what_a_training_keeps_is_harmless(tmp_path):
    extras = {
        "args": argparse.Namespace(
            out=Path("runs"), data=pathlib.PureWindowsPath("C:/data"), lr=np.float64(3), **SETTINGS
        ),
        "dtype": np.dtype("float32"),
        "best": np.float32(0.5),
        "curve": np.arange(3.0),
        "when": datetime.datetime(2020, 1, 1),
        "version": torch.torch_version.TorchVersion("2.0"),
        "counts": defaultdict(dict, a={}),
        "order": OrderedDict(a=1),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict(),
    }
    before = torch.serialization.get_safe_globals()
    model, said = load(saved(tmp_path, {"model": STATE, **extras}))
    assert holds(model, STATE)
    assert said == ""
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_paths_of_another_system(tmp_path, monkeypatch):
    """A pickle names pathlib.WindowsPath, or pathlib._local.PosixPath as Python 3.13 does."""
    other = type("WindowsPath", (pathlib.PurePosixPath,), {"__module__": "pathlib"})
    monkeypatch.setattr(pathlib, "WindowsPath", other)
    path = saved(tmp_path, {"model": STATE, "args": {"out": other("C:/x"), **SETTINGS}})
    monkeypatch.undo()
    assert holds(load(path)[0], STATE)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A module of someone else's that this process can import."""
    (tmp_path / "project.py").write_text("class Config:\n    pass\n\ndef setting():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import project

    yield project
    del sys.modules["project"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_class_is_named_with_the_line_that_saves_the_weights(tmp_path, project, monkeypatch, zipped):
    content = {"model": STATE, "config": project.Config()}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        load(path, MODEL)
    message, line = str(error.value).split(" this line keeps the weights: ")
    assert message == (
        f"{path} is not a readable checkpoint: it needs the class project.Config, and a class is never taken from a "
        "file. Where you trust it and have that class,"
    )
    assert "weights_only" not in line
    monkeypatch.chdir(tmp_path)
    with torch.serialization.safe_globals([]):
        exec(line, {})
        torch.serialization.clear_safe_globals()
    assert holds(load(tmp_path / "weights.pth", MODEL)[0], STATE)


def test_an_array_of_objects_is_named_with_the_line_that_saves_the_weights(tmp_path, monkeypatch):
    path = saved(tmp_path, {"model": STATE, "curve": np.arange(3.0), "names": np.array([None, 1], dtype=object)})
    with pytest.raises(CheckpointError, match=r"it needs the class numpy.dtypes.ObjectDType, ") as error:
        load(path, MODEL)
    monkeypatch.chdir(tmp_path)
    with torch.serialization.safe_globals([]):
        exec(str(error.value).split(" this line keeps the weights: ")[1], {})
        torch.serialization.clear_safe_globals()
    assert holds(load(tmp_path / "weights.pth", MODEL)[0], STATE)


def test_weights_that_are_not_stored_as_they_are_used(tmp_path):
    def state(change) -> dict[str, Tensor]:
        model = mae_vit_demo_patch7()
        return (change(model.blocks[0].attn.qkv), model.state_dict())[1]

    lora = {k.replace("qkv.", "qkv.base_layer."): x for k, x in STATE.items()}
    lora["blocks.0.attn.qkv.lora_A.default.weight"] = torch.ones(4, 96)
    for content, sentence in (
        (
            under("base_model.model.", lora),
            "its weights are adapters of PEFT, such as blocks.0.attn.qkv.base_layer.",
        ),
        ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 96)}, "its weights are adapters of PEFT, "),
        (
            state(torch.nn.utils.parametrizations.weight_norm),
            "its weights are parametrized, such as blocks.0.attn.qkv.",
        ),
        (state(lambda x: prune.identity(x, "weight")), "its weights are pruned or normalised, such as "),
    ):
        with pytest.raises(CheckpointError) as error:
            load(saved(tmp_path, content), MODEL)
        assert sentence in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_weights_that_are_no_numbers(tmp_path):
    broken = {k: x * np.nan if k in ("norm.weight", "norm.bias") else x for k, x in STATE.items()}
    _, said = load(saved(tmp_path, {"model": broken, "args": SETTINGS}))
    assert said == "there is NaN or infinity in norm.weight, norm.bias"


def test_a_folder_of_other_files_names_them(tmp_path):
    torch.save(STATE, tmp_path / "checkpoint-799.pth")
    (tmp_path / "log.txt").touch()
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"there is no checkpoint at {tmp_path / 'model.safetensors'}; the folder holds checkpoint-799.pth: "
        "name one of them"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda project: project.setting, "it calls project.setting, which no weights need; "),
        (lambda project: print, "it calls builtins.print, which no weights need; "),
        (lambda project: torch.nn.ReLU(), "it holds a whole model (torch.nn.modules.activation.ReLU); "),
    ],
    ids=["function", "builtin", "model"],
)
def test_a_pickle_that_needs_code_is_refused(tmp_path, project, content, sentence):
    with pytest.raises(CheckpointError) as error:
        load(saved(tmp_path, {"model": content(project)}), MODEL)
    text = str(error.value)
    assert sentence in text
    assert text.endswith("torch.save(model.state_dict(), 'weights.pth')")
    assert text.isprintable()
    assert "weights_only" not in text


def packed(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("mae.pth", "x")
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("mae.pth"))
    else:
        torch.save(STATE, buffer, _use_new_zipfile_serialization=kind == "torch")
    return buffer.getvalue()


CUT = "cut short; copy or download it again"
DAMAGED = "cut short or damaged; copy or download it again"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty; copy or download it again"),
        (b"\0" * 5000, "nothing but zeros or blanks; copy or download it again"),
        (b"\n<!DOCTYPE html>\n<html>",
         "a web page (HTML), not the file itself; download the file that the page links to"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
         "a pointer of Git LFS, not the file itself; git lfs pull fetches it"),
        (b'<?xml version="1.0"?><Error/>', "an XML text that begins '<?xml version=\"1.0\"?><Error/>'"),
        (b'{"error": 404}', "a JSON text that begins '{\"error\": 404}'"),
        (b"Not found \xc3\xa4\n", "a text that begins 'Not found ä'"),
        (b"\x1f\x8b\x08", "a gzip archive; unpack it"),
        (b"\x93\x94\x95\x96\x97\x98\x99\x9a", "of no format known here, its first bytes are 93 94 95 96 97 98 99 9a"),
        (b"\x80\x04\x95",
         "a pickle that torch.save did not write; load it as it was saved, and write it with torch.save"),
        (packed("zip"), "a zip archive of mae.pth; unpack it"),
        (packed("tar"), "a tar archive; unpack it"),
        (packed("torch")[:-2000], CUT),
        (packed("legacy")[:-2000], DAMAGED),
        (packed("legacy")[:300], DAMAGED),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_file_is_called_what_it_is(tmp_path, content, sentence, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load(path, MODEL)
    assert str(error.value) == f"{path} is not a readable checkpoint: it is {sentence}"


@pytest.mark.parametrize("length", [20, 10000, -1])
def test_a_safetensors_file_that_is_cut_short(tmp_path, length):
    save_file(STATE, tmp_path / "whole")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"it is cut short or damaged; copy or download it again$"):
        load(tmp_path / "x.safetensors", MODEL)


def test_a_name_does_not_decide_what_a_file_is(tmp_path):
    save_file(STATE, tmp_path / "x.pth")
    torch.save(STATE, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert holds(load(tmp_path / name, MODEL)[0], STATE)


def test_a_program_and_a_later_protocol_are_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"it is a TorchScript program; this line saves its weights: "):
        load(tmp_path / "x.pt", MODEL)
    with pytest.raises(CheckpointError, match=r"its pickle_protocol is later than the one that torch.save takes"):
        load(saved(tmp_path, STATE, pickle_protocol=4), MODEL)
