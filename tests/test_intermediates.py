"""Feature maps of several depths, as timm's, and attention of the class token, as a softmax by hand."""

import math
from dataclasses import replace

import peers
import pytest
import torch
from matplotlib.axes import Axes
from pictures import good_folder, photographs
from PIL import Image
from torch.nn.functional import layer_norm, linear

from mae import MAEConfig, MaskedAutoencoder, VisionTransformer, mae_vit_demo_patch7, save_checkpoint
from mae.__main__ import main
from mae.checkpoints.configs import to_timm_config
from mae.evaluation.attention import attention_maps
from mae.model import Classifier, HeadConfig
from mae.report.heat_maps import save_heat_maps

SMALL = MAEConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip
CLIPS = replace(SMALL, image_size=(4, 16, 24), patch_size=(2, 8, 8), embed_dim=24)


def build(config: MAEConfig, kind: type = VisionTransformer, *arguments) -> VisionTransformer:
    """Every parameter its own numbers; positions too, so that other sizes are resampled, as timm does."""
    model = kind(config, *arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def timm_of(ours: VisionTransformer) -> torch.nn.Module:
    timm = peers.import_peer("timm")
    config = to_timm_config(ours.config)
    theirs = timm.create_model(config["architecture"], **config["model_args"], dynamic_img_size=True).eval()
    theirs.load_state_dict({k: x for k, x in ours.state_dict().items() if not k.startswith(("decoder_", "mask_"))})
    return theirs


def assert_equal(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (16, 64)])
@pytest.mark.parametrize("kind", [VisionTransformer, MaskedAutoencoder])
def test_maps_are_those_of_timm(kind, size):
    ours = build(SMALL, kind)
    theirs, images = timm_of(ours), torch.randn(2, 3, *size)
    with torch.no_grad():
        for indices in (None, 1, 3, [0, 2], [-1, 1], (-4,), [2, 2]):
            for norm in (False, True):
                options = {"indices": indices, "norm": norm}
                tokens, maps = ours.forward_intermediates(images, **options)
                their_tokens, their_maps = theirs.forward_intermediates(images, **options)
                assert_equal(tokens, their_tokens)
                assert_equal(maps, their_maps)
                assert torch.equal(tokens, ours.forward_features(images))
                alone = ours.forward_intermediates(images, **options, intermediates_only=True)
                assert all(torch.equal(a, b) for a, b in zip(alone, maps, strict=True))
        early = {"indices": [0, 2], "stop_early": True, "output_fmt": "NLC"}
        assert_equal(ours.forward_intermediates(images, **early), theirs.forward_intermediates(images, **early))
        pairs = ours.forward_intermediates(images, 2, return_prefix_tokens=True, intermediates_only=True)
        assert_equal(pairs, theirs.forward_intermediates(images, 2, return_prefix_tokens=True, intermediates_only=True))


def test_a_format_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="VisionTransformer: output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        build(SMALL).forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NHWC")


@pytest.mark.parametrize("size", [(4, 16, 24), (6, 24, 16), (2, 16, 16)])
def test_maps_of_clips_have_frames(size):
    """The value at a frame, row and column is that of the token of this patch."""
    model, images = build(CLIPS), torch.randn(2, 3, *size)
    (frames, rows, columns), dim = (a // b for a, b in zip(size, CLIPS.patch_size, strict=True)), CLIPS.embed_dim
    tokens, (last,) = model.forward_intermediates(images, 1, norm=True)
    assert last.shape == (2, dim, frames, rows, columns)
    for t in range(frames):
        for y in range(rows):
            for x in range(columns):
                assert torch.equal(last[:, :, t, y, x], tokens[:, 1 + (t * rows + y) * columns + x])


def test_maps_of_a_classifier_with_a_norm_behind_the_mean():
    model = build(SMALL, Classifier, HeadConfig(("a", "b"), fc_norm=True))
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    tokens, (first, last) = model.forward_intermediates(images, [0, -1], norm=True)
    assert torch.equal(last.flatten(2).transpose(1, 2), tokens[:, 1:])  # there is no norm before the mean
    assert torch.equal(first.flatten(2).transpose(1, 2), model.blocks[0](model.embed(images))[:, 1:])
    assert_equal(model(images), model.head(model.fc_norm(last.mean((2, 3)))))


def test_gradients_reach_the_first_block_and_later_blocks_do_not_run():
    model = build(SMALL)
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 32), [1, -4], intermediates_only=True)
    assert ran == [0, 1]
    maps[1].square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= reached
    assert not any(name.startswith(("blocks.2", "blocks.3", "norm")) for name in reached)


@pytest.mark.parametrize("indices", [0, 5, -1, True, 1.5, "1", [], [4], [0, -5], [True], [0.0], "all"])
def test_indices_of_no_block_are_refused_in_one_sentence(indices):
    with pytest.raises(ValueError) as error:
        build(SMALL).forward_intermediates(torch.randn(1, 3, 32, 32), indices)
    assert str(error.value) == (
        "VisionTransformer: indices must be None, a whole number of 1 to 4, or a list of whole numbers of -4 to 3, "
        f"got {indices!r}"
    )


def shares_by_hand(model: VisionTransformer, images: torch.Tensor, block: int) -> torch.Tensor:
    """``[N, heads, 1 + L]``: what each head of the class token gives to every token."""
    x = model.embed(images)
    for earlier in range(block):
        x = model.blocks[earlier](x)
    norm, qkv, heads = model.blocks[block].norm1, model.blocks[block].attn.qkv, model.config.num_heads
    packed = linear(layer_norm(x, x.shape[2:], norm.weight, norm.bias, 1e-6), qkv.weight, qkv.bias)
    dim = x.shape[2] // heads
    shares = []
    for head in range(heads):
        query = packed[:, 0, head * dim : (head + 1) * dim]
        keys = packed[:, :, x.shape[2] + head * dim : x.shape[2] + (head + 1) * dim]
        weights = torch.exp((keys * query[:, None]).sum(2) / math.sqrt(dim))
        shares.append(weights / weights.sum(1, keepdim=True))
    return torch.stack(shares, 1)


@pytest.mark.parametrize(
    ("config", "size"),
    [(SMALL, (32, 32)), (SMALL, (16, 40)), (CLIPS, (4, 16, 24)), (CLIPS, (6, 24, 16))],
    ids=lambda x: {SMALL: "images", CLIPS: "clips"}.get(x),
)
@pytest.mark.parametrize("block", [0, 2, -1])
def test_attention_is_a_softmax(config, size, block):
    model = build(config, MaskedAutoencoder).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    maps = attention_maps(model, images, block)
    by_hand = shares_by_hand(model, images, block % config.depth)
    grid = [a // b for a, b in zip(size, config.patch_size, strict=True)]
    assert maps.shape == (2, config.num_heads, *grid)
    torch.testing.assert_close(maps.flatten(2), by_hand[:, :, 1:], rtol=1e-12, atol=1e-12)
    own = by_hand[:, :, 0]  # the class token's share of itself
    torch.testing.assert_close(maps.flatten(2).sum(2) + own, torch.ones_like(own), rtol=1e-12, atol=0)
    assert by_hand.std() > 0.005  # not all alike
    torch.testing.assert_close(attention_maps(model.float(), images.float(), block), maps.float(), rtol=1e-4, atol=1e-6)


def test_attention_is_what_the_block_attends_with():
    """Through values and projection it gives what the fused path adds to the class token."""
    model, images = build(SMALL).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = model.blocks[0](model.embed(images))
    shares = attention_maps(model, images, 1).flatten(2)
    shares = torch.cat([1 - shares.sum(2, keepdim=True), shares], 2)  # [N, heads, 1 + L]
    normed = model.blocks[1].norm1(x)
    values = model.blocks[1].attn.qkv(normed)[..., 64:].unflatten(2, (4, 8))
    attended = torch.einsum("nhl,nlhd->nhd", shares, values).flatten(1)
    expected = model.blocks[1].attn(normed)[:, 0]
    torch.testing.assert_close(model.blocks[1].attn.proj(attended), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [4, -5, True])
def test_attention_of_no_block_is_refused(block):
    with pytest.raises(ValueError, match=r"^block must be a whole number of -4 to 3, got "):
        attention_maps(build(SMALL), torch.randn(1, 3, 32, 32), block)


def test_heat_is_bright_where_the_map_is_and_grey_shows_elsewhere(tmp_path, monkeypatch):
    """Of a picture with a black half and a white one; the frame in the middle of three."""
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda self, picture, **_: shown.append(picture))
    pictures = torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8)
    pictures[:, :, 1, :, :16] = 255
    maps = torch.zeros(1, 4, 3, 2, 2)
    for i in range(4):
        maps[0, i, 1, i // 2, i % 2] = 0.01 * (1 + i)  # each is brightest in another quarter
    save_heat_maps(pictures, maps, [f"map {i}" for i in range(4)], tmp_path / "a.png")
    original, *heated = map(torch.from_numpy, shown)
    assert torch.equal(original, pictures[0, 0, 1] / 255)
    ends = (0, 0), (0, 31), (31, 0), (31, 31)
    for i, picture in enumerate(heated):
        light = torch.stack([picture[end].mean() for end in ends])
        assert light.argmax() == i
        assert light[i] > 0.85
        row, column = ends[3 - i]  # the quarter across has no heat: half the light of its grey
        expected = [0.5 if column == 0 else 0.0] * 3
        assert picture[row, column].tolist() == pytest.approx(expected, abs=0.02)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """What the command draws."""
    calls = []

    def save(*arguments):
        calls.append(arguments)
        save_heat_maps(*arguments)

    monkeypatch.setattr("mae.commands.attention.save_heat_maps", save)
    return calls


def test_the_command_draws_chosen_heads_and_the_mean_of_all(tmp_path, drawn, capsys):
    model = build(SMALL)  # the encoder alone
    save_checkpoint(model, tmp_path / "run")
    photos = good_folder(tmp_path / "photos", 5)
    out, size = tmp_path / "new" / "heads", ["32", "48"]
    main(["attention", "--checkpoint", str(tmp_path / "run"), "--images", str(photos), "--out", str(out),
          "--block", "1", "--heads", "2", "0", "--most", "3", "--image-size", *size, "--device", "cpu"])  # fmt: skip
    assert f"Wrote attention to 3 pictures to {out}.png" in capsys.readouterr().out
    ((pictures, maps, titles, _, words),) = drawn
    assert titles == ["head 2", "head 0", "mean of 4 heads"]
    assert words.startswith("attention of the class token in block 1 (of 0 to 3); ")
    all_maps = attention_maps(model, pictures, 1)
    assert maps.shape == (3, 3, 4, 6)
    assert_equal(maps, torch.stack([all_maps[:, 2], all_maps[:, 0], all_maps.mean(1)], 1))
    assert len(Image.open(f"{out}.png").convert("RGB").getcolors(10**6)) > 1000  # a picture with colours


def test_the_command_takes_clips_and_classifiers(tmp_path, drawn):
    save_checkpoint(build(CLIPS, MaskedAutoencoder), tmp_path / "clips")
    frames = [photo.resize((24, 16)) for photo in photographs(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    name = "mae_vit_demo_patch7"
    classifier = build(mae_vit_demo_patch7().config, Classifier, HeadConfig(("a", "b")))
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    good_folder(tmp_path / "photos", 1)
    for checkpoint, images, more in (("clips", "a.gif", []), ("classifier.pth", "photos", ["--model", name])):
        main(["attention", "--checkpoint", str(tmp_path / checkpoint), "--images", str(tmp_path / images),
              "--out", str(tmp_path / "out.png"), "--device", "cpu", *more])  # fmt: skip
    clip, photo = drawn
    assert clip[1].shape == (1, 5, 2, 2, 3)
    assert_equal(photo[1][:, :4], attention_maps(classifier, photo[0]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--heads 99", "heads must be whole numbers of 0 to 3, at least one, got [99]"),
        ("--heads 0 -1", "heads must be whole numbers of 0 to 3, at least one, got [0, -1]"),
        ("--block 4", "block must be a whole number of -4 to 3, got 4"),
        ("--most 0", "most must be a whole number of 1 to 1000000000, got 0"),
        ("--out a.xyz", "a.xyz is of no format that can be written;"),
    ],
)
def test_the_command_refuses_in_one_sentence(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(build(SMALL), tmp_path / "run")
    good_folder(tmp_path / "photos", 1)
    with pytest.raises(SystemExit) as stop:
        main(["attention", "--checkpoint", "run", "--images", "photos", "--device", "cpu", *options.split()])
    assert stop.value.code.startswith(f"mae: {sentence}")
    assert "\n" not in stop.value.code
    assert not (tmp_path / "attention.png").exists()
