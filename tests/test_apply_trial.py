"""What apply leaves alone: methods that do something else than the ops, and models that it does not know."""

import copy

import pytest
import torch
from conftest import DEVICE
from families import (
    BiasedVariance,
    MaskedAutoencoderViT,
    distance,
    hugging_face,
    images,
    published,
    timm_encoder,
    train,
)
from torch import nn

from mae_kernels import apply, unapply


class ShiftedMasking(MaskedAutoencoderViT):
    """A strategy of its own: a run of patches that starts anywhere."""

    def random_masking(self, x, mask_ratio):
        n, length, dim = x.shape
        keep = int(length * (1 - mask_ratio))
        start = torch.randint(length, (n, 1), device=x.device)
        ids_shuffle = (torch.arange(length, device=x.device) + start) % length
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
        return kept, (ids_restore >= keep).float(), ids_restore


class BrightestPatches(MaskedAutoencoderViT):
    """Chooses by the embeddings themselves, which the fused encoder does not compute."""

    def random_masking(self, x, mask_ratio):
        _, length, dim = x.shape
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = x.mean(2).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
        return kept, (ids_restore >= keep).float(), ids_restore


class EpsilonOutside(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        target = (target - target.mean(2, keepdim=True)) / (target.std(2, keepdim=True) + 1e-6)
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


class Dropout(MaskedAutoencoderViT):
    """Not seen in evaluation mode."""

    def forward_encoder(self, x, mask_ratio):
        x = torch.dropout(self.patch_embed(x) + self.pos_embed[:, 1:], 0.1, self.training)
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore


class AnotherDraw(MaskedAutoencoderViT):
    """The same result, one random number later."""

    def forward_decoder(self, x, ids_restore):
        torch.rand(1)
        return super().forward_decoder(x, ids_restore)


class Counting(MaskedAutoencoderViT):
    """Keeps a statistic."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(()))

    def forward_encoder(self, x, mask_ratio):
        self.seen += len(x)
        return super().forward_encoder(x, mask_ratio)


class CountingAnew(Counting):
    def forward_encoder(self, x, mask_ratio):
        self.seen = self.seen + len(x)
        return MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)


class Remembering(MaskedAutoencoderViT):
    """Leaves what it did on the model, for pictures."""

    def forward_decoder(self, x, ids_restore):
        self.last_ids, self.norm.last = ids_restore, x
        return super().forward_decoder(x, ids_restore)


class Weighted(MaskedAutoencoderViT):
    """Hidden patches that count for more, or less."""

    def random_masking(self, x, mask_ratio):
        kept, mask, ids_restore = super().random_masking(x, mask_ratio)
        return kept, mask * torch.linspace(0.5, 1.5, mask.shape[1], device=x.device), ids_restore


class WithAttention(MaskedAutoencoderViT):
    """Returns one thing more."""

    def forward_encoder(self, x, mask_ratio):
        latent, mask, ids_restore = super().forward_encoder(x, mask_ratio)
        return latent, mask, ids_restore, latent.mean()

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore, _ = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


class BooleanMask(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        kept, mask, ids_restore = super().random_masking(x, mask_ratio)
        return kept, mask.bool(), ids_restore


class HiddenInReverse(MaskedAutoencoderViT):
    """Keeps the same patches, and numbers the hidden ones from the last to the first."""

    def random_masking(self, x, mask_ratio):
        kept, mask, ids_restore = super().random_masking(x, mask_ratio)
        first, last = kept.shape[1], x.shape[1] - 1
        return kept, mask, torch.where(ids_restore < first, ids_restore, first + last - ids_restore)


class AnotherSignature(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, weight):
        return super().forward_loss(imgs, pred, mask) * weight

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask, 2.0), pred, mask


@pytest.mark.parametrize(
    ("cls", "method", "reason"),
    [
        (ShiftedMasking, "random_masking", "its result is"),
        (BrightestPatches, "random_masking", "its result is"),
        (BrightestPatches, "forward_encoder", "its result is"),
        (BiasedVariance, "forward_loss", "its result is"),
        (EpsilonOutside, "forward_loss", "its result is"),
        (Dropout, "forward_encoder", "its result is"),
        (AnotherDraw, "forward_decoder", "it draws other random numbers"),
        (Weighted, "forward_loss", ""),
        (WithAttention, "forward_encoder", "it returns 4 values, not 3, in training"),
        (BooleanMask, "random_masking", "it returns torch.bool (3, 36), not torch.float32 (3, 36), in training"),
        (HiddenInReverse, "random_masking", "it chooses other patches in training"),
        (Counting, "forward_encoder", "it changes buffers"),
        (CountingAnew, "forward_encoder", "it changes buffers"),
        (Remembering, "forward_decoder", "it sets last, last_ids"),
        (AnotherSignature, "forward_loss", "the original fails on random input: TypeError: "),
    ],
)
def test_a_subclass_that_does_something_else_keeps_doing_it(cls, method, reason):
    model = published(cls=cls).to(DEVICE)
    expected = train(copy.deepcopy(model), batch := images(device=DEVICE))
    report = apply(model)
    assert method in [change.method for change in report.left]
    assert next(change for change in report.left if change.method == method).why_not.startswith(reason)
    assert f"left      {method}: {reason}" in str(report)
    assert len(report.replaced) > 1
    assert not hasattr(model, "seen") or model.seen == 0  # the trial left no trace
    assert not hasattr(model, "last_ids")
    result = train(model, batch)
    assert not hasattr(model, "seen") or model.seen == 3
    assert hasattr(model, "last_ids") == (cls is Remembering)
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)


def test_a_strategy_of_their_own_keeps_the_fused_encoder():
    report = apply(published(cls=ShiftedMasking))
    assert [change.method for change in report.replaced] == ["forward_encoder", "forward_decoder", "forward_loss"]


def test_a_method_of_the_instance_is_left():
    model = published()
    model.forward_loss = lambda imgs, pred, mask: pred.mean()
    (left,) = apply(model).left
    assert str(left) == "forward_loss: the method forward_loss was set on the instance"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pos_drop_rate": 0.1}, "the ops do not cover its options"),
        ({"dynamic_img_size": True}, "dynamic_img_size takes images of any size"),
        ({"pos_embed": "none"}, "it has no pos_embed"),
    ],
)
def test_options_of_timm_are_left(options, reason):
    with pytest.raises(ValueError, match=f"^apply: nothing was replaced:\n  forward_features: {reason}$"):
        apply(timm_encoder(**options))


class Stem(nn.Module):
    """Patches by two convolutions, in place of any family's patch embedding or projection."""

    num_patches = 36

    def __init__(self, as_map: bool = False):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 64, 2, 2))
        self.as_map = as_map

    def forward(self, x, interpolate_pos_encoding=False):
        x = self.layers(x)
        return x if self.as_map else x.flatten(2).transpose(1, 2)


# How a model is changed, the method that stays as it is, and why: applied afterwards it says so.
CHANGES = {
    "stem of Hugging Face": (
        hugging_face, lambda model: setattr(model.vit.embeddings, "patch_embeddings", Stem()),
        "vit.embeddings.forward", "patch_embeddings.projection is missing, not a convolution of patches",
    ),
    "stem of a published projection": (
        published, lambda model: setattr(model.patch_embed, "proj", Stem(as_map=True)),
        "forward_encoder", "patch_embed.proj is a Stem, not a convolution of patches",
    ),
    "no hidden patch": (
        hugging_face, lambda model: setattr(model.config, "mask_ratio", 0.0),
        "vit.embeddings.forward", "a mask ratio of 0.0 hides none of the patches, or all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("applied_first", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_exchanged_stays_exchanged(name, applied_first):
    build, change, method, reason = CHANGES[name]
    model = build()
    if applied_first:
        apply(model)
    change(model)
    model.to(DEVICE)
    plain = copy.deepcopy(model)
    unapply(plain)
    if not applied_first:
        assert f"{method}: {reason}" in map(str, apply(model).left)
    batch = images(device=DEVICE)
    ours, expected = (train(network, batch) for network in (model, plain))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=key)


def test_emptied_parameters_are_refused():
    model = published()
    model.pos_embed.data = torch.empty(0)
    message = "apply: pos_embed is empty, as FSDP and ZeRO-3 leave parameters; apply before sharding"
    with pytest.raises(ValueError, match=f"^{message}$"):
        apply(model)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError) as error:
        apply(nn.Sequential(nn.Linear(2, 2)))
    lines = str(error.value).splitlines()
    assert lines[0] == "apply: nothing in Sequential is known. Looked for:"
    assert lines[1] == "  ViTMAEForPreTraining or ViTMAEModel of transformers"
    assert lines[2].startswith("  a model with the published parts patch_embed.proj, pos_embed, ")
    assert lines[3] == "  VisionTransformer of timm with patch_drop_rate above 0"
    assert lines[4] == "  MaskedVisionTransformerTIMM of lightly"
    assert lines[5].startswith("Of a published-style model it lacks: patch_embed.proj, pos_embed, ")


def test_what_a_model_lacks_is_named():
    model = published()
    del model.mask_token, model.decoder_pred
    with pytest.raises(ValueError, match=r"it lacks: mask_token, decoder_pred$"):
        apply(model)


def test_weights_without_memory_are_refused():
    with pytest.raises(ValueError, match="cls_token is on the meta device; apply once the weights have their memory"):
        apply(published().to("meta"))


def test_a_class_that_cannot_be_derived_from_is_left():
    class Named(MaskedAutoencoderViT):
        def __init_subclass__(cls, *, name):
            cls.name = name

    with pytest.raises(ValueError, match=r"random_masking: no class can be derived from Named: .*'name'"):
        apply(published(cls=Named))
