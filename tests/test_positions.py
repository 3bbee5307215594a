"""Position embeddings: sines and cosines, tables of another grid, and the model at sizes that are not its own."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import peers
import pytest
import torch
from torch import Tensor

from mae import CheckpointError, MAEConfig, MaskedAutoencoder, load_checkpoint, save_checkpoint
from mae.model import pos_embed_for, resample_pos_embed, sincos_pos_embed
from mae.training.profile import LaunchCounter

IMAGES = MAEConfig(
    image_size=(32, 48), patch_size=8, embed_dim=32, depth=1, num_heads=4, decoder_embed_dim=16, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip
CLIPS = replace(IMAGES, image_size=(4, 16, 24), patch_size=(2, 8, 8), embed_dim=40)
OTHER = {IMAGES: (24, 56), CLIPS: (6, 16, 16)}


@pytest.mark.parametrize(("dim", "grid", "widths"), [(16, (2, 3), (8, 8)), (20, (2, 3, 2), (6, 6, 8))])
def test_sines_and_cosines_of_the_column_then_the_row_then_the_frame(dim, grid, widths):
    table = sincos_pos_embed(dim, grid)
    assert table.shape == (math.prod(grid), dim)
    for patch, place in enumerate(product(*map(range, grid))):
        expected = []
        for position, width in zip(reversed(place), widths, strict=True):
            angles = [position / 10000 ** (i / (width // 2)) for i in range(width // 2)]
            expected += [*map(math.sin, angles), *map(math.cos, angles)]
        assert table[patch].tolist() == pytest.approx(expected, abs=1e-7)


def filters(old: int, new: int) -> np.ndarray:
    """``[new, old]``: Keys' cubic with a = -0.5, stretched where fewer samples come out, normalised at the edges."""
    scale = old / new
    x = np.abs((np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * scale) / max(scale, 1))
    a = -0.5
    inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("old", "new"), [((4, 6), (7, 3)), ((14, 14), (16, 20)), ((2, 4, 3), (5, 2, 4)), ((8, 3, 4), (3, 3, 4))], ids=str
)
def test_a_table_is_resampled_side_by_side(old, new):
    table = torch.randn(1, 2 + math.prod(old), 5, dtype=torch.float64)
    ours = resample_pos_embed(table, old, new, num_prefix=2)
    x = table[0, 2:].view(*old, 5).numpy()
    for side, (a, b) in enumerate(zip(old, new, strict=True)):
        x = np.moveaxis(np.tensordot(filters(a, b), x, (1, side)), 0, side)
    assert torch.equal(ours[:, :2], table[:, :2])
    torch.testing.assert_close(ours[0, 2:], torch.from_numpy(x).reshape(-1, 5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_is_what_timm_makes_of_it(dtype):
    layers = peers.import_peer("timm.layers")
    table = torch.randn(1, 1 + 14 * 14, 24).to(dtype)
    theirs = layers.resample_abs_pos_embed(table, (10, 24), (14, 14))
    assert torch.equal(resample_pos_embed(table, (14, 14), (10, 24)), theirs)


def test_an_equal_grid_keeps_the_table_itself():
    table = torch.randn(1, 1 + 12, 8)
    assert resample_pos_embed(table, (3, 4), [3, 4]) is table
    assert pos_embed_for(table, (3, 4), [3, 4]) is table


def with_class_row(table: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, table.shape[1]), table])[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sines_and_cosines_are_recognised(dtype):
    old, new = (with_class_row(sincos_pos_embed(32, grid)).to(dtype) for grid in ((4, 6), (5, 5)))
    old[0, 0] = 3
    ours = pos_embed_for(old, (4, 6), (5, 5))
    assert torch.equal(ours[:, 1:], new[:, 1:])
    assert (ours[:, 0] == 3).all()
    old[0, 7, 5] += 0.1
    assert torch.equal(pos_embed_for(old, (4, 6), (5, 5)), resample_pos_embed(old, (4, 6), (5, 5)))


def images_of(config: MAEConfig, size) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    return images, torch.rand(2, replace(config, image_size=size).num_patches)


@pytest.mark.parametrize("learned", [False, True], ids=["sines", "learned"])
@pytest.mark.parametrize("config", [IMAGES, CLIPS], ids=["images", "clips"])
def test_the_model_at_another_size_is_one_made_for_it(config, learned, tmp_path):
    """Encoder and decoder, in a call and by load_checkpoint."""
    model, size = MaskedAutoencoder(config), OTHER[config]
    if learned:
        torch.nn.init.normal_(model.pos_embed, std=0.5)
        torch.nn.init.normal_(model.decoder_pos_embed, std=0.5)
    made = MaskedAutoencoder(replace(config, image_size=size))
    state = model.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        resampled = resample_pos_embed(state[name], config.sides, made.config.sides)
        state[name] = resampled if learned else made.state_dict()[name]
    made.load_state_dict(state)
    save_checkpoint(model, tmp_path)
    loaded = load_checkpoint(tmp_path, image_size=size)
    assert loaded.config == made.config
    images, noise = images_of(config, size)
    expected = made(images, noise=noise, return_pred=True)
    for other in (model, loaded):
        output = other(images, noise=noise, return_pred=True)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(other.forward_features(images), made.forward_features(images))
    assert not torch.allclose(model(*images_of(config, config.image_size)[:1]).loss, expected.loss)
    assert model.reconstruct(images, noise=noise).original.shape == images.shape


def test_another_size_waits_for_nothing_and_compiles_as_one_graph():
    model = MaskedAutoencoder(IMAGES)
    images, noise = images_of(IMAGES, OTHER[IMAGES])
    with LaunchCounter() as counter:
        loss = model(images, noise=noise).loss
        loss.backward()
    assert counter.syncs == 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, noise=noise).loss, loss, rtol=1e-6, atol=0)


def test_a_size_of_a_checkpoint_keeps_its_frames(tmp_path):
    save_checkpoint(MaskedAutoencoder(CLIPS), tmp_path / "clips")
    assert load_checkpoint(tmp_path / "clips", image_size=24).config.image_size == (4, 24, 24)
    assert load_checkpoint(tmp_path / "clips", image_size=[8, 24, 24]).config.image_size == (8, 24, 24)
    save_checkpoint(MaskedAutoencoder(IMAGES), tmp_path / "images")
    for size, reason in (
        ((4, 32, 32), "its patches have no frames"),
        (33, "MAEConfig: images height 33 is not a multiple of the patch height 8"),
        ("big", "MAEConfig: image_size must be "),
    ):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(tmp_path / "images", image_size=size)
        file = tmp_path / "images" / "model.safetensors"
        assert str(error.value).startswith(f"{file} cannot take images of size {size}: {reason}")
