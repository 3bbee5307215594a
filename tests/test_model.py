"""The model: its keys, its initial values, and what its methods promise."""

import math
from dataclasses import replace

import pytest
import torch

from mae import MODELS, MAEConfig, MaskedAutoencoder, mae_vit_demo_patch7
from mae_kernels import masking_from_mask, patchify, random_masking, reference, unpatchify

TINY = MAEConfig(
    image_size=(32, 48), patch_size=8, embed_dim=64, depth=2, num_heads=4, decoder_embed_dim=32, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip


CLIP = replace(TINY, image_size=(4, 16, 24), patch_size=(2, 8, 8))
PIXEL_MEAN, PIXEL_STD = torch.tensor(TINY.pixel_mean), torch.tensor(TINY.pixel_std)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (x.view(-1, *[1] * (images.ndim - 2)) for x in (PIXEL_MEAN, PIXEL_STD))
    return (images / 255 - mean) / std


@pytest.fixture
def model() -> MaskedAutoencoder:
    return MaskedAutoencoder(TINY)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)


def published_keys(depth: int, decoder_depth: int) -> set[str]:
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    modules += [f"blocks.{i}.{part}" for i in range(depth) for part in block]
    modules += [f"decoder_blocks.{i}.{part}" for i in range(decoder_depth) for part in block]
    tables = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    return tables | {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


def test_keys_are_those_of_the_published_code(model):
    assert set(model.state_dict()) == published_keys(depth=2, decoder_depth=1)


# Parameters of the published models, position embeddings left out: they are not trained.
@pytest.mark.parametrize(
    ("name", "encoder", "total"),
    [
        ("mae_vit_base_patch16", 85_647_360, 111_655_680),
        ("mae_vit_large_patch16", 303_099_904, 329_239_296),
        ("mae_vit_huge_patch14", 630_435_840, 656_613_964),
    ],
)
def test_published_sizes(name, encoder, total):
    with torch.device("meta"):
        model = MODELS[name]()
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == total
    assert sum(n for name, n in trained.items() if not name.startswith(("decoder_", "mask_token"))) == encoder


@pytest.mark.parametrize(
    ("name", "grid", "values", "decoder"),
    [
        ("mae_vit_small_video", (8, 14, 14), 1536, (192, 3)),
        ("mae_vit_base_video", (8, 14, 14), 1536, (384, 6)),
        ("mae_vit_large_video", (8, 14, 14), 1536, (512, 8)),
        ("mae_vit_base_volume", (6, 6, 6), 4096, (512, 16)),
    ],
)
def test_models_of_clips_and_volumes(name, grid, values, decoder):
    with torch.device("meta"):
        model = MODELS[name]()
    config = model.config
    assert config.grid.grid == grid
    assert model.pos_embed.shape == (1, 1 + math.prod(grid), config.embed_dim)
    assert model.patch_embed.proj.weight.shape == (config.embed_dim, config.in_chans, *config.patch_size)
    assert model.decoder_pred.weight.shape == (values, decoder[0])
    assert (config.decoder_embed_dim, config.decoder_num_heads) == decoder


def test_pixel_statistics_survive_memory_without_values():
    """As large models are built; and half() does not round them."""
    good = MaskedAutoencoder(TINY)
    with torch.device("meta"):
        model = MaskedAutoencoder(TINY)
    model.to_empty(device="cpu")
    model.load_state_dict(good.state_dict())
    with torch.device("meta"):  # whatever the default is, a buffer stays where it was
        good = good.float()
    for network in (model, model.half()):
        assert torch.equal(network.patch_embed.pixel_mean, good.patch_embed.pixel_mean)
        assert torch.equal(network.patch_embed.pixel_std, good.patch_embed.pixel_std)
    model.patch_embed.pixel_mean.fill_(0.25)  # by hand, in place of the configuration's
    assert model.half().to("cpu").patch_embed.pixel_mean.tolist() == [0.25] * 3
    with torch.device("meta"):
        model = MaskedAutoencoder(TINY)
    model.load_state_dict(good.state_dict(), assign=True)
    images = torch.randint(256, (1, TINY.in_chans, *TINY.image_size), dtype=torch.uint8)
    assert torch.equal(model.forward_features(images), good.forward_features(images))


def test_initial_values(model):
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(64))
    assert not model.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad
    bound = math.sqrt(6 / (64 + 3 * 8 * 8))  # xavier of the projection seen as a matrix [D, C ph pw]
    weight = model.patch_embed.proj.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    large = MaskedAutoencoder(MAEConfig(depth=1, decoder_depth=1))
    for token in (large.cls_token, large.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
    assert all(block.attn.qkv.bias.abs().max() == 0 for block in model.blocks)
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6


def test_loss_is_the_same_with_and_without_predictions(model, images):
    noise = torch.rand(3, TINY.num_patches)
    short, full = model(images, noise=noise), model(images, noise=noise, return_pred=True)
    assert short.pred is None
    assert full.pred.shape == (3, TINY.num_patches, TINY.grid.patch_values)
    torch.testing.assert_close(short.loss, full.loss, rtol=1e-6, atol=0)
    assert torch.equal(short.mask, full.mask)
    grads = []
    for output in (short, full):
        model.zero_grad()
        output.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_every_trained_parameter_gets_a_gradient(model, images):
    loss, pred, mask = model(images)
    loss.backward()
    assert pred is None
    assert mask.sum(1).tolist() == [18, 18, 18]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_uint8_images_equal_normalised_ones(model, images):
    noise = torch.rand(3, TINY.num_patches)
    floats = model(normalised(images), noise=noise)
    torch.testing.assert_close(model(images, noise=noise).loss, floats.loss, rtol=1e-6, atol=0)


def test_masking_from_any_source(model, images):
    mask = torch.zeros(3, TINY.num_patches, dtype=torch.bool)
    mask[:, 5:15] = True
    output = model(images, masking=masking_from_mask(mask))
    assert torch.equal(output.mask, mask)
    with pytest.raises(ValueError) as error:
        model(images, masking=masking_from_mask(mask), noise=torch.rand(3, TINY.num_patches))
    assert str(error.value) == "MaskedAutoencoder: pass either noise or masking, got both"


def test_hidden_patches_do_not_reach_the_encoder(model, images):
    masking = random_masking(3, TINY.num_patches)
    hidden = masking.mask.view(3, 4, 1, 6, 1).expand(-1, -1, 8, -1, 8).reshape(3, 1, 32, 48)
    other = torch.where(hidden, 255 - images, images)
    encoded, same = (model.encode(model.embed(x, masking.ids_keep)) for x in (images, other))
    assert torch.equal(encoded, same)
    assert not torch.equal(model.forward_features(images), model.forward_features(other))


def test_features_equal_the_encoder_on_all_patches_in_order(model, images):
    model.double()
    ids = torch.arange(TINY.num_patches).expand(3, -1)
    features = model.forward_features(images)
    assert features.shape == (3, 1 + TINY.num_patches, 64)
    torch.testing.assert_close(features, model.encode(model.embed(images, ids)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction(images, norm_pix):
    model = MaskedAutoencoder(MAEConfig(**{**vars(TINY), "norm_pix_loss": norm_pix}))
    masking = random_masking(3, TINY.num_patches)
    pictures = model.reconstruct(images, masking=masking)
    assert pictures.uses_true_statistics is norm_pix
    torch.testing.assert_close(pictures.original, images / 255, rtol=0, atol=1e-6)
    patches = {name: patchify(getattr(pictures, name), 8) for name in ("masked", "reconstruction", "original")}
    hidden = masking.mask
    assert (patches["masked"][hidden] == 0.5).all()
    for name in ("masked", "reconstruction"):
        assert torch.equal(patches[name][~hidden], patches["original"][~hidden])
    assert not torch.equal(patches["reconstruction"][hidden], patches["original"][hidden])
    if norm_pix:
        # Prediction = (picture - mean) / std of the true patch, wherever the picture was not clipped at 0 or 1.
        pred = model(images, masking=masking, return_pred=True).pred
        truth = patchify(normalised(images), 8)
        mean, std = truth.mean(2, keepdim=True), (truth.var(2, keepdim=True) + 1e-6).sqrt()
        channel = torch.arange(TINY.grid.patch_values) % 3
        expected = (pred * std + mean) * PIXEL_STD[channel] + PIXEL_MEAN[channel]
        inside = hidden[..., None] & (expected > 0) & (expected < 1)
        torch.testing.assert_close(patches["reconstruction"][inside], expected[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_pix", [True, False, "channel"])
@pytest.mark.parametrize("config", [TINY, CLIP], ids=["images", "clips"])
def test_reconstruction_of_a_perfect_prediction_is_the_original(config, norm_pix, monkeypatch):
    """A head that outputs the true target must give the true picture back: order, statistics and scale undone."""
    model = MaskedAutoencoder(replace(config, norm_pix_loss=norm_pix))
    images = torch.randint(256, (3, 3, *config.image_size), dtype=torch.uint8)
    target = reference.pixel_target(normalised(images), config.patch_size, norm_pix)
    monkeypatch.setattr(model, "decode", lambda *_: torch.zeros(3, 1 + config.num_patches, 32))
    monkeypatch.setattr(model.decoder_pred, "forward", lambda x: torch.cat([target[:, :1], target], dim=1))
    pictures = model.reconstruct(images)
    torch.testing.assert_close(pictures.reconstruction, pictures.original, rtol=0, atol=1e-5)
    torch.testing.assert_close(pictures.original, images / 255, rtol=0, atol=1e-6)


def test_sizes_that_the_patch_does_not_divide_are_refused(model):
    for shape, message in (
        ((1, 3, 32, 36), "MaskedAutoencoder: images width 36 is not a multiple of the patch width 8"),
        ((1, 1, 32, 48), "patch_embed: images have 1 channels, but weight expects 3"),
    ):
        with pytest.raises(ValueError) as error:
            model(torch.zeros(shape))
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 225}, "MAEConfig: images height 225 is not a multiple of the patch height 16"),
        ({"embed_dim": 770}, "MAEConfig: embed_dim 770 must be a multiple of 4 and of its 12 heads"),
        (
            {"image_size": (3, 32, 32), "patch_size": (2, 16, 16)},
            "MAEConfig: images frames 3 is not a multiple of the patch frames 2",
        ),
        (
            {"in_chans": 1},
            "MAEConfig: pixel_mean and pixel_std need 1 values, one per channel, got 3 and 3",
        ),
    ],
)
def test_wrong_configurations_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        MAEConfig(**options)
    assert str(error.value) == message


def test_compiles_as_one_graph(images):
    model = MaskedAutoencoder(TINY)
    noise = torch.rand(3, TINY.num_patches)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(images, noise=noise).loss
    loss = compiled(images, noise=noise).loss
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(eager, model.cls_token)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, model.cls_token)[0], expected, rtol=1e-5, atol=1e-8)


def test_autocast_keeps_the_residual_stream_in_float32(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).loss
        ids = random_masking(3, TINY.num_patches).ids_keep
        proj = model.patch_embed.proj
        stream = model.blocks[0](model.embed(images, ids))
    assert loss.dtype == torch.float32
    assert stream.dtype == torch.float32
    loss.backward()
    assert proj.weight.grad.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_it_learns():
    """A memorised batch: the loss falls well below that of predicting the mean, which is about 1."""
    torch.manual_seed(0)
    model = mae_vit_demo_patch7()
    images = torch.rand(8, 1, 4, 4).mul(255).byte().repeat_interleave(7, 2).repeat_interleave(7, 3)
    images = images // 2 + torch.linspace(0, 120, 28).byte()  # a ramp inside every patch, predictable from any other
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("norm_pix", [True, "channel"])
@pytest.mark.parametrize("config", [TINY, CLIP], ids=["images", "clips"])
def test_the_loss_is_that_of_the_published_pass(config, norm_pix):
    """Every parameter random: an initial 0 or 1 would hide what is left out."""
    model = MaskedAutoencoder(replace(config, decoder_depth=2, norm_pix_loss=norm_pix)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    floats = torch.rand(3, 3, *config.image_size, dtype=torch.float64)
    noise = torch.rand(3, config.num_patches)
    expected = reference.pretraining_loss(model, floats, noise)
    torch.testing.assert_close(model(floats, noise=noise).loss, expected, rtol=1e-10, atol=0)


def test_uint16_images_are_normalised_in_their_own_units():
    """Also where the projection is called, for a hook."""
    model = MaskedAutoencoder(replace(CLIP, in_chans=2, pixel_mean=(900.0, 3e4), pixel_std=(250.0, 8e3))).double()
    clips = torch.randint(2**16, (2, 2, 4, 16, 24)).to(torch.uint16)
    noise = torch.rand(2, CLIP.num_patches)
    mean, std = (torch.tensor(x).double().view(2, 1, 1, 1) for x in (model.config.pixel_mean, model.config.pixel_std))
    expected = model((clips.double() - mean) / std, noise=noise).loss
    torch.testing.assert_close(model(clips, noise=noise).loss, expected, rtol=1e-10, atol=0)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(clips, noise=noise).loss, expected, rtol=1e-10, atol=0)


def test_pictures_of_16_bits_show_the_range_of_each_clip():
    model = MaskedAutoencoder(
        replace(CLIP, in_chans=2, pixel_mean=(900.0, 3e4), pixel_std=(250.0, 8e3), norm_pix_loss=False)
    )
    clips = torch.stack([torch.randint(most, (2, 4, 16, 24)) for most in (4096, 2**16)]).to(torch.uint16)
    noise = torch.rand(2, CLIP.num_patches)
    pictures, output = model.reconstruct(clips, noise=noise), model(clips, noise=noise, return_pred=True)
    largest = clips.int().amax((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(pictures.original, clips.int() / largest, rtol=0, atol=1e-6)
    mean, std = (torch.tensor(x).view(2, 1, 1, 1) for x in (model.config.pixel_mean, model.config.pixel_std))
    pred = unpatchify(output.pred, CLIP.patch_size, CLIP.image_size) * std + mean
    hidden = pictures.masked != pictures.original
    expected = torch.where(hidden, (pred / largest).clamp(0, 1), pictures.original)
    torch.testing.assert_close(pictures.reconstruction, expected, rtol=0, atol=1e-5)
