"""apply on rectangles, clips, volumes and other numbers of channels, and on the classes that others made for them."""

import copy

import pytest
import torch
from conftest import DEVICE
from families import (
    AnySize,
    Calls,
    EncoderDecoder,
    SatMAE,
    SatMAEOfDates,
    SatMAEOfGroups,
    SpatiotemporalMAE,
    distance,
    published,
    train,
)

from mae_kernels import apply

# The shape of an image, a patch, what the patch embedding states of the size, and the class.
INPUTS = {
    "a spectrogram": ((1, 16, 32), (8, 4), (16, 32), AnySize),
    "13 channels of a rectangle": ((13, 28, 42), (14, 14), (28, 42), AnySize),
    "4 channels of an unstated square": ((4, 16, 16), (8, 8), None, AnySize),
    "a clip with its frames": ((3, 4, 16, 24), (2, 8, 8), (4, 16, 24), AnySize),
    "a clip without its frames": ((3, 4, 16, 24), (2, 8, 8), (16, 24), AnySize),
    "a volume by one number": ((1, 8, 16, 16), (4, 8, 8), 16, AnySize),
    "an unstated cube": ((1, 16, 16, 16), (8, 8, 8), None, AnySize),
    "a patch of the whole height": ((1, 8, 32), (8, 4), (8, 32), AnySize),
    "13 channels of SatMAE": ((13, 48, 48), 8, None, SatMAE),
}


def build(shape, patch, stated, cls):
    if cls is SatMAE:
        return published(cls=cls, img_size=shape[1], patch_size=patch, in_chans=shape[0]).to(DEVICE)
    options = {"img_size": shape[1:], "patch_size": patch, "in_chans": shape[0], "stated": stated}
    return published(cls=cls, **options).to(DEVICE)


@pytest.mark.parametrize("name", INPUTS)
def test_every_method_runs_on_the_ops(name):
    plain = build(*INPUTS[name])
    model, batch = copy.deepcopy(plain), torch.randn(2, *INPUTS[name][0], device=DEVICE)
    report = apply(model)
    assert [change.method for change in report.replaced] == [
        "random_masking", "forward_encoder", "forward_decoder", "forward_loss",
    ]  # fmt: skip
    assert not report.left
    expected = train(plain, batch)
    with Calls() as calls:
        result = train(model, batch)
    assert {"mae_kernels::patch_embed", "mae_kernels::scatter_mask_tokens", "mae_kernels::masked_mse"} <= set(
        calls.names
    )
    assert "aten::convolution" not in calls.names
    assert result.keys() == expected.keys()
    assert all(distance(result[key], expected[key]) < 1e-5 for key in expected)


class EpsilonOutside(SatMAE):
    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs, 8, imgs.shape[1])
        target = (target - target.mean(2, keepdim=True)) / (target.std(2, keepdim=True) + 1e-6)
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


def test_a_loss_of_neither_order_is_left_once():
    (left,) = apply(published(cls=EpsilonOutside).to(DEVICE)).left
    assert str(left).startswith("forward_loss: its result is")


def test_other_sizes_of_clips_meet_the_original_error():
    """As many patches, but the published class has no positions for fewer frames of a larger picture."""
    model = build(*INPUTS["a clip without its frames"])
    assert not apply(model).left
    batch = torch.randn(2, 3, 2, 32, 24, device=DEVICE)
    with Calls() as calls:
        model(batch)
    assert "mae_kernels::patch_embed" not in calls.names


def test_dates_of_satmae_keep_the_fused_masking():
    plain = published(cls=SatMAEOfDates).to(DEVICE)
    model, batch = copy.deepcopy(plain), torch.randn(2, 2, 3, 48, 48, device=DEVICE)
    report = apply(model)
    assert [change.method for change in report.replaced] == ["random_masking"]
    assert [change.method for change in report.left] == ["forward_encoder", "forward_decoder", "forward_loss"]
    assert all(change.why_not.startswith("the original fails on random input: ") for change in report.left)
    expected, result = train(plain, batch), train(model, batch)
    assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_spatiotemporal_mae_is_left():
    options = {"img_size": (4, 16, 24), "patch_size": (2, 8, 8), "in_chans": 3, "stated": (16, 24)}
    with pytest.raises(ValueError) as error:
        apply(published(cls=SpatiotemporalMAE, **options).to(DEVICE))
    expected = [
        "random_masking: it returns 4 values, not 3, in training",
        "forward_encoder: it returns torch.float32 (2, 3, 64), not torch.float32 (2, 4, 64), in training",
        "forward_decoder: its result is ",
        "forward_loss: it sets patch_info in training",
    ]
    for line, reason in zip(str(error.value).splitlines()[1:], expected, strict=True):
        assert line.startswith(f"  {reason}")


@pytest.mark.parametrize(
    ("build", "lacking"),
    [
        (lambda: published(cls=SatMAEOfGroups), "patch_embed.proj"),
        (EncoderDecoder, "patch_embed.proj, pos_embed, cls_token, blocks, norm, decoder_embed, decoder_pos_embed, .+"),
    ],
    ids=["groups", "apart"],
)
def test_other_structures_are_refused(build, lacking):
    with pytest.raises(ValueError, match=rf"^apply: nothing in (?s:.+)Of a published-style model it lacks: {lacking}$"):
        apply(build().to(DEVICE))
