"""The modules: a model made of them is the published one, and they survive what people do to modules."""

import copy
import math
import pickle

import pytest
import torch
from conftest import DEVICE
from torch import nn

import mae_kernels
from mae import MAEConfig, MaskedAutoencoder
from mae.model import Block
from mae_kernels import masked_mse, patch_embed, random_masking, scatter_mask_tokens
from mae_kernels.nn import MaskedMSELoss, MaskedPatchEmbed, MaskTokenScatter, learned_token

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATS = {"pixel_mean": MEAN, "pixel_std": STD}
TINY = MAEConfig(
    image_size=(32, 48), patch_size=(8, 16), embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip


class Published(nn.Module):
    """As somebody would write it: the published attribute names around the three modules."""

    def __init__(self, config: MAEConfig, **options):
        super().__init__()
        dim, decoder_dim, rows = config.embed_dim, config.decoder_embed_dim, 1 + config.num_patches
        stats = {"pixel_mean": config.pixel_mean, "pixel_std": config.pixel_std}
        self.patch_embed = MaskedPatchEmbed(config.patch_size, config.in_chans, dim, **stats)
        self.cls_token = learned_token(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = learned_token(decoder_dim)
        self.scatter = MaskTokenScatter()
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, rows, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, config.decoder_num_heads, config.mlp_ratio) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, config.grid.patch_values)
        self.loss = MaskedMSELoss(config.patch_size, norm_pix=config.norm_pix_loss, **stats)

    def forward(self, images, noise):
        m = random_masking(*noise.shape, noise=noise)
        x = self.patch_embed(images, m.ids_keep, prefix=self.cls_token, pos_embed=self.pos_embed)
        for block in self.blocks:
            x = block(x)
        x = self.scatter(self.decoder_embed(self.norm(x)), self.mask_token, m.ids_restore, self.decoder_pos_embed)
        for block in self.decoder_blocks:
            x = block(x)
        return self.loss(self.decoder_pred(self.decoder_norm(x))[:, 1:], images, mask=m.mask)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.rand(3, TINY.num_patches)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("pixels", ["uint8", "normalised"])
def test_a_model_of_modules_is_the_published_one(pixels, bfloat16, images, noise):
    ours = MaskedAutoencoder(TINY)
    model = Published(TINY)
    assert list(dict(model.named_parameters())) == list(dict(ours.named_parameters()))
    model.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(model.state_dict(), strict=True)
    if pixels == "normalised":
        images = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        expected = ours(images, noise=noise, return_pred=True).loss
        loss = model(images, noise)
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    expected = gradients(ours)
    assert expected.keys() == gradients(model).keys()
    for name, g in gradients(model).items():
        assert torch.equal(g, expected[name]), name


def test_the_modules_are_the_functions(backend, images):
    images = images.to(DEVICE)
    m = random_masking(3, 12, device=DEVICE)
    registers, positions = torch.randn(2, 32, requires_grad=True), torch.randn(2 + 12, 32, requires_grad=True)
    embed = MaskedPatchEmbed((8, 16), 3, 32, **STATS).to(DEVICE)
    tokens = embed(images, m.ids_keep, prefix=registers, pos_embed=positions)
    weight, bias = embed.proj.weight, embed.proj.bias
    expected = patch_embed(
        images, weight, bias, positions[2:], m.ids_keep, prefix=registers + positions[:2], mean=MEAN, std=STD
    )
    assert torch.equal(tokens, expected)
    inputs = (weight, bias, registers, positions)
    for g, e in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (tokens, expected)), strict=True):
        assert torch.equal(g, e)

    token = torch.randn(32)
    decoded = MaskTokenScatter(2)(tokens, token, m.ids_restore, positions)
    assert torch.equal(decoded, scatter_mask_tokens(tokens, token, m.ids_restore, positions, num_prefix=2))

    pred = torch.randn(3, 9, 384)
    options = {"norm_pix": False, "layout": "channels_first"}
    loss = MaskedMSELoss((8, 16), **options, **STATS).to(DEVICE)(pred, images, ids_mask=m.ids_mask)
    assert loss == masked_mse(pred, images, patch_size=(8, 16), ids_mask=m.ids_mask, mean=MEAN, std=STD, **options)


def test_positions_with_or_without_rows_of_the_prefix(images):
    embed, prefix, positions = MaskedPatchEmbed(8, 3, 32), torch.randn(1, 1, 32), torch.randn(1, 24, 32)
    expected = patch_embed(images, embed.proj.weight, embed.proj.bias, positions, prefix=prefix)
    assert torch.equal(embed(images, prefix=prefix, pos_embed=positions), expected)
    with_prefix = torch.cat([torch.zeros(1, 1, 32), positions], dim=1)
    assert torch.equal(embed(images, prefix=prefix[0], pos_embed=with_prefix), expected)
    assert torch.equal(embed(images, prefix=prefix, pos_embed=with_prefix[0]), expected)
    assert torch.equal(embed(images, pos_embed=positions), expected[:, 1:])
    assert torch.equal(embed(images, prefix=prefix)[:, :1], prefix.expand(3, -1, -1))


def test_eps_and_dtypes_reach_the_ops(images):
    m = random_masking(3, 24)
    pred = torch.randn(3, 24, 192)
    loss = MaskedMSELoss(8, eps=0.5)(pred, images, mask=m.mask)
    assert loss == masked_mse(pred, images, patch_size=8, mask=m.mask, eps=0.5)
    assert loss != MaskedMSELoss(8)(pred, images, mask=m.mask)
    tokens = MaskedPatchEmbed(8, 3, 32, out_dtype=torch.bfloat16)(images)
    assert tokens.dtype == torch.bfloat16
    out = MaskTokenScatter(0, out_dtype=torch.float64)(tokens[:, :6], torch.randn(32), m.ids_restore)
    assert out.dtype == torch.float64


def test_statistics_are_buffers_that_no_call_builds_again(images, monkeypatch):
    """On a GPU a list would be copied there, and waited for, in each call."""
    embed, loss = MaskedPatchEmbed(8, 3, 32, **STATS), MaskedMSELoss(8, **STATS)
    monkeypatch.setattr(torch, "tensor", None)
    assert embed(images).shape == (3, 24, 32)
    assert loss(torch.zeros(3, 24, 192), images, mask=torch.ones(3, 24, dtype=torch.bool)).isfinite()


def test_statistics_are_for_uint8(images):
    with_stats = MaskedPatchEmbed(8, 3, 32, **STATS)
    without = MaskedPatchEmbed(8, 3, 32)
    without.load_state_dict(with_stats.state_dict(), strict=True)
    assert list(with_stats.state_dict()) == ["proj.weight", "proj.bias"]
    assert torch.equal(with_stats(images / 255), without(images / 255))
    torch.testing.assert_close(without(images), without(images / 255))
    assert not torch.allclose(with_stats(images), without(images))
    assert MaskedMSELoss(8, **STATS).state_dict() == MaskTokenScatter().state_dict() == {}


@pytest.mark.parametrize("module", [MaskedPatchEmbed, MaskedMSELoss])
@pytest.mark.parametrize("given", [list, torch.tensor], ids=["sequence", "tensor"])
def test_statistics_keep_their_precision_and_follow_the_parameters(module, given):
    model = nn.Sequential(module(8, pixel_mean=given(MEAN), pixel_std=given(STD)))

    def stats(dtype):
        (m,) = model
        assert {x.dtype for x in (m.pixel_mean, m.pixel_std)} == {dtype}
        assert {x.device.type for x in (m.pixel_mean, m.pixel_std)} == {"cpu"}
        rtol = 1e-15 if dtype == torch.float64 and given is list else 1e-7
        for values, expected in zip((m.pixel_mean, m.pixel_std), (MEAN, STD), strict=True):
            torch.testing.assert_close(values.double(), torch.tensor(expected).double(), rtol=1e-7, atol=0)
            assert values.tolist() == pytest.approx(expected, rel=rtol)

    stats(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype)
        stats(torch.float32)
    model.double()
    stats(torch.float64)
    model.float().to("meta")
    assert model[0].pixel_mean.device.type == model[0].pixel_std.device.type == "meta"
    with torch.no_grad():
        model.to_empty(device="cpu")  # as large models are built: memory without values
    stats(torch.float32)
    with torch.device("meta"):
        model = nn.Sequential(module(8, pixel_mean=MEAN, pixel_std=STD))
    model.to_empty(device="cpu")
    stats(torch.float32)


def test_half_precision_reads_pixels_in_full(images):
    embed = MaskedPatchEmbed(8, 3, 32, **STATS).bfloat16()
    expected = patch_embed(images, embed.proj.weight, embed.proj.bias, mean=MEAN, std=STD)
    assert torch.equal(embed(images), expected)
    assert expected.dtype == torch.bfloat16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(duplicate, images, noise):
    model = Published(TINY)
    twin = duplicate(model)
    loss, same = model(images, noise), twin(images, noise)
    assert torch.equal(loss, same)
    same.backward()
    assert model.patch_embed.proj.weight.grad is None
    twin.patch_embed.pixel_mean += 1
    assert not torch.equal(twin(images, noise), loss)
    assert torch.equal(model(images, noise), loss)


def test_compiles_as_one_graph(images, noise):
    model = Published(TINY)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(images, noise)
    expected = model(images, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected, grads = (torch.autograd.grad(x, trained(model)) for x in (expected, loss))
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-7)


def trained(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_initial_values():
    weight = MaskedPatchEmbed((8, 16), 3, 64).proj.weight
    bound = math.sqrt(6 / (64 + 3 * 8 * 16))  # xavier of the projection seen as a matrix [D, C ph pw]
    assert 0.95 * bound < weight.abs().max() <= bound
    token = learned_token(4096)
    assert token.shape == (1, 1, 4096)
    assert isinstance(token, nn.Parameter)
    assert token.std().item() == pytest.approx(0.02, rel=0.1)
    assert MaskedPatchEmbed(8, bias=False).proj.bias is None
    assert MaskedPatchEmbed(8, bias=False)(torch.zeros(1, 3, 8, 8)).count_nonzero() == 0


def test_repr():
    assert repr(MaskedPatchEmbed(8, 1, 32, pixel_mean=0.286, pixel_std=(0.353,), out_dtype=torch.bfloat16)) == (
        "MaskedPatchEmbed(\n"
        "  patch_size=(8, 8), pixel_mean=(0.286,), pixel_std=(0.353,), out_dtype=torch.bfloat16\n"
        "  (proj): Conv2d(1, 32, kernel_size=(8, 8), stride=(8, 8))\n"
        ")"
    )
    assert repr(MaskTokenScatter()) == "MaskTokenScatter(num_prefix=1)"
    assert (
        repr(MaskedMSELoss((8, 4)))
        == "MaskedMSELoss(patch_size=(8, 4), norm_pix=True, eps=1e-06, layout='channels_last')"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskedPatchEmbed((2, 2, 8, 8)),
         "MaskedPatchEmbed: patch_size must be a positive int, or two or three of them, got (2, 2, 8, 8)"),
        (lambda: MaskedPatchEmbed(8, pixel_mean=MEAN),
         "MaskedPatchEmbed: pixel_mean was given without pixel_std; pass both or neither"),
        (lambda: MaskedMSELoss(8, pixel_std=STD),
         "MaskedMSELoss: pixel_std was given without pixel_mean; pass both or neither"),
        (lambda: MaskedPatchEmbed(8, 1, **STATS), "MaskedPatchEmbed: pixel_mean has 3 values for 1 channels"),
        (lambda: MaskedMSELoss(8, pixel_mean=MEAN, pixel_std=(1.0,)),
         "MaskedMSELoss: pixel_mean has 3 values, but pixel_std has 1"),
        (lambda: MaskedMSELoss(8, pixel_mean=MEAN, pixel_std=(1.0, 0.0, 1.0)),
         "MaskedMSELoss: pixel_std must be positive, got [1.0, 0.0, 1.0]"),
        (lambda: MaskedMSELoss(8, layout="chw"),
     "MaskedMSELoss: layout must be 'channels_last' or 'channels_first', got 'chw'"),
        (lambda: MaskedMSELoss(8, eps=-1.0), "MaskedMSELoss: eps must not be negative, got -1.0"),
        (lambda: embed(pos_embed=torch.zeros(200, 32)), ("MaskedPatchEmbed: pos_embed has 200 rows; "
         "it must have 24, one per patch, or 25 with those of the prefix")),
        (lambda: embed(pos_embed=torch.zeros(25, 16)),
         "MaskedPatchEmbed: pos_embed must be [R + L, 32] or [1, R + L, 32], got shape (25, 16)"),
        (lambda: embed(prefix=torch.zeros(32), pos_embed=torch.zeros(25, 32)),
         "MaskedPatchEmbed: prefix must be [R, 32] or [1, R, 32], got shape (32,)"),
        (lambda: embed(images=torch.zeros(3, 3, 33, 48), pos_embed=torch.zeros(25, 32)),
         "MaskedPatchEmbed: images height 33 is not a multiple of the patch height 8"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def embed(images=None, prefix=None, pos_embed=None):
    images = torch.zeros(3, 3, 32, 48) if images is None else images
    return MaskedPatchEmbed(8, 3, 32)(
        images, prefix=torch.zeros(1, 32) if prefix is None else prefix, pos_embed=pos_embed
    )


def test_a_star_import_leaves_nn_to_torch():
    assert mae_kernels.nn.MaskedPatchEmbed is MaskedPatchEmbed
    assert "nn" not in mae_kernels.__all__


@pytest.mark.parametrize("patch", [(4, 4), (2, 4, 4)])
def test_a_called_projection_takes_clips(patch):
    embed = MaskedPatchEmbed(patch, 3, 16)
    clips, ids = torch.rand(2, 3, 2, 8, 12), torch.tensor([[1, 3], [0, -1]])
    expected = embed(clips, ids)
    embed.proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(embed(clips, ids)[0], expected[0], rtol=1e-5, atol=1e-6)
    assert embed(clips, ids)[1, 1].count_nonzero() == 0


def test_one_number_is_a_cube_for_clips():
    pred, clips, mask = torch.randn(2, 4, 192), torch.rand(2, 3, 4, 8, 8), torch.ones(2, 4).bool()
    expected = mae_kernels.masked_mse(pred, clips, patch_size=4, mask=mask)
    assert torch.equal(MaskedMSELoss(4)(pred, clips, mask=mask), expected)
