"""Video, volumes, spectrograms, many channels, 16 bits, and batches whose samples differ in their number of patches."""

from math import prod

import pytest
import torch
from cases import (
    BF16,
    F32,
    F64,
    U8,
    U16,
    compare,
    head_inputs,
    images_of,
    loss_inputs,
    mean_std,
    patch_embed_inputs,
    run,
    scatter_inputs,
    tokens,
)
from test_gather_tokens import EXACT
from test_linear_masked_mse import ALL as HEAD
from test_linear_masked_mse import check as check_head
from test_masked_mse import check as check_loss
from test_patch_embed import ALL as EMBED
from test_patch_embed import check as check_patch_embed
from test_scatter_mask_tokens import ALL as SCATTER

from mae_kernels import (
    gather_tokens,
    linear_masked_mse,
    masked_mse,
    patch_embed,
    patchify,
    reference,
    scatter_mask_tokens,
    unpatchify,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

# Grid, patch, channels, dtype of the pixels.
INPUTS = {
    "96x160": ((6, 10), (16, 16), 3, F32),
    "32x128 spectrogram": ((4, 32), (8, 4), 1, F32),
    "13 channels of 16 bits": ((2, 3), (8, 6), 13, U16),
    "16-frame video": ((8, 14, 14), (2, 16, 16), 3, U8),
    "volume": ((16, 16, 16), (4, 8, 8), 1, BF16),
    "one patch of 4 channels": ((1, 1, 1), (4, 8, 8), 4, U16),
}
INPUTS = [pytest.param(*x, id=name) for name, x in INPUTS.items()]


@pytest.mark.parametrize(("grid", "patch", "c", "pixels"), INPUTS)
def test_patch_embed(grid, patch, c, pixels):
    dtype = pixels if pixels.is_floating_point else F32
    k = min(19, prod(grid))
    n = 1 if len(grid) == 3 else 2
    check_patch_embed(patch_embed_inputs(n, grid, patch, c, 24, dtype=dtype, pixels=pixels, k=k, r=1, norm=True), dtype)


TARGETS = [
    (False, "channels_first"),
    (True, "channels_last"),
    ("channel", "channels_last"),
    ("channel", "channels_first"),
]


@pytest.mark.parametrize(
    ("grid", "patch", "c", "pixels", "norm_pix", "layout"),
    [
        pytest.param(*x.values, *TARGETS[(i + j) % 4], id=f"{x.id}-{TARGETS[(i + j) % 4]}")
        for i, x in enumerate(INPUTS)
        for j in (1, 3)  # two targets each
    ],
)
def test_masked_mse(grid, patch, c, pixels, norm_pix, layout):
    dtype = pixels if pixels.is_floating_point else F32
    masked = min(5, prod(grid))
    inputs = {"norm_pix": norm_pix, "layout": layout, "pixels": pixels, "dtype": dtype}
    check_loss(loss_inputs(2, grid, patch, c, by="ids_mask", masked=masked, norm=pixels != F32, **inputs))


@pytest.mark.parametrize(("grid", "patch", "c", "pixels"), INPUTS[2:4])
def test_linear_masked_mse(grid, patch, c, pixels):
    check_head(head_inputs(2, grid, patch, c, 24, masked=6, pixels=pixels, norm_pix="channel", norm=True))


@pytest.mark.parametrize("strides", ["channels_last", "cropped", "expanded"])
def test_strides_of_video(strides):
    grid, patch = (2, 3, 2), (2, 4, 8)
    check_patch_embed(patch_embed_inputs(3, grid, patch, 3, 24, pixels=U8, strides=strides, k=5, norm=True))
    check_loss(loss_inputs(3, grid, patch, 3, pixels=U8, image_strides=strides, norm_pix="channel", norm=True))


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_every_value_of_a_patch(layout):
    (t, h, w), (pt, ph, pw), c = (2, 3, 4), (2, 4, 8), 3
    x = images_of(2, c, (t, h, w), (pt, ph, pw), U16)
    patches = patchify(x, (pt, ph, pw), layout)
    for e in range(c * pt * ph * pw):
        if layout == "channels_last":
            channel, q, p, r = e % c, e // c % pw, e // c // pw % ph, e // c // pw // ph
        else:
            channel, q, p, r = e // (pt * ph * pw), e % pw, e // pw % ph, e // pw // ph % pt
        assert torch.equal(patches[:, :, e].int(), x[:, channel, r::pt, p::ph, q::pw].reshape(2, -1).int())
    back = unpatchify(patches, (pt, ph, pw), tuple(x.shape[2:]), layout)
    assert torch.equal(back.int(), x.int())


def test_an_image_is_a_video_of_one_frame():
    image = patch_embed_inputs(2, (3, 4), (8, 4), 3, 24, k=5, norm=True)
    video = {**image, "images": image["images"][:, :, None], "weight": image["weight"][:, :, None]}
    grad = tokens(2, 5, 24)
    one, other = (run(patch_embed, x, grad, ("weight", "images")) for x in (image, video))
    assert torch.equal(one["value"], other["value"])
    assert torch.equal(one["images"], other["images"][:, :, 0])
    # A patch of one frame embeds the frames of a video each by itself.
    two = {**image, "images": torch.stack([image["images"]] * 2, 2), "pos_embed": None, "ids_keep": None}
    out = patch_embed(**two)
    assert torch.equal(out[:, :12], out[:, 12:])


@pytest.mark.parametrize("value", [0, 77, 255])
def test_the_channels_of_a_flat_patch_have_a_target_of_zero(value):
    clips = torch.full((1, 3, 2, 16, 16), value, dtype=U8)
    options = {"patch_size": (2, 16, 16), "mask": torch.ones(1, 1).bool(), "norm_pix": "channel", **mean_std(3)}
    assert masked_mse(torch.zeros(1, 1, 1536), clips, **options).item() == 0


@pytest.mark.eager
def test_tensors_without_memory():
    inputs = patch_embed_inputs(2, (2, 1, 2), (2, 4, 4), 3, 24, pixels=U8, k=3, r=1)
    out = patch_embed(**{name: x.to("meta") for name, x in inputs.items()})
    assert (out.device.type, out.shape) == ("meta", (2, 4, 24))
    inputs = head_inputs(2, (2, 2), (4, 4), 3, 24)
    assert linear_masked_mse(
        **{n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    ).is_meta


@pytest.mark.eager
def test_videomae_target_by_hand():
    """Tubelets of 2 x 4 x 4, each channel by its own statistics, eps outside the root: Tong et al. 2022."""
    video = torch.rand(2, 3, 4, 8, 12, dtype=F64)
    pred = torch.randn(2, 12, 96, dtype=F64)
    hidden = torch.zeros(2, 2, 6, dtype=torch.bool)
    hidden[:, :, [0, 3, 4]] = True  # a tube: the same places in both tubelets
    total = 0
    for n in range(2):
        for patch in hidden[n].flatten().nonzero().flatten().tolist():
            t, y, x = patch // 6 * 2, patch % 6 // 3 * 4, patch % 3 * 4
            cube = video[n, :, t : t + 2, y : y + 4, x : x + 4]
            target = torch.stack([(v - v.mean()) / (v.var().sqrt() + 1e-6) for v in cube], dim=-1)
            total += ((pred[n, patch] - target.flatten()) ** 2).mean() / 12
    loss = masked_mse(pred, video, patch_size=(2, 4, 4), mask=hidden.flatten(1), norm_pix="channel")
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)


# Samples with 3, 1 and 2 tokens of 3, in any order; one of the samples has none to score.
PADDED = torch.tensor([[5, 0, 2], [1, -1, -1], [-1, 4, 3]])


def test_ids_of_no_token_are_zeros():
    compare(
        gather_tokens, reference.gather_tokens, {"tokens": tokens(3, 6, 24), "ids": PADDED}, tokens(3, 3, 24), **EXACT
    )
    for pos, r in ((True, 1), (False, 0)):
        inputs = patch_embed_inputs(3, (2, 3), (4, 8), 3, 24, k=3, r=r, pos=pos, norm=True)
        inputs["images"][0, :, :4, :8] = float("nan")  # patch 0 of sample 0 spoils its own token and no other
        inputs["images"][1, :, :4, :8] = float("nan")
        inputs["ids_keep"] = torch.where(PADDED == 0, 4, PADDED)
        grad = tokens(3, r + 3, 24)
        grad[:, r:][PADDED < 0] = float("nan")
        result = run(patch_embed, inputs, grad, ("weight", "bias"))
        assert result["value"][:, r:][PADDED < 0].count_nonzero() == 0
        assert all(x.isfinite().all() for x in result.values())
        inputs["images"] = inputs["images"].nan_to_num()
        check_patch_embed(inputs)


def test_ids_of_no_token_are_not_scored():
    ids = torch.tensor([[5, 0, 2], [-1, -1, -1], [-1, 4, 3]])
    for options in ({}, {"pixels": U8, "norm_pix": "channel", "norm": True}):
        inputs = loss_inputs(3, (2, 3), (4, 8), 3, by="ids_mask", masked=3, **options)
        inputs["ids_mask"] = ids
        result = check_loss(inputs)
        assert result["pred"][ids < 0].count_nonzero() == 0
        poisoned = {**inputs, "pred": inputs["pred"].masked_fill((ids < 0)[..., None], float("nan"))}
        assert torch.equal(run(masked_mse, poisoned, torch.tensor(1.0), ("pred",))["pred"], result["pred"])
        inputs = head_inputs(3, (2, 3), (4, 8), 3, 24, masked=3, **options)
        inputs["ids_mask"] = ids
        assert check_head(inputs)["hidden"][ids < 0].count_nonzero() == 0
    inputs["ids_mask"] = torch.full_like(ids, -1)
    result = run(linear_masked_mse, inputs, torch.tensor(1.0), HEAD)
    assert all(x.count_nonzero() == 0 for x in result.values())


@pytest.mark.parametrize("counts", [(3, 1, 2), (3, 3, 3), (1, 1, 1)])
def test_tokens_that_nobody_reads(counts):
    inputs = scatter_inputs(3, 6, 3, 24, 2, pos=8)
    for row, count in zip(inputs["ids_restore"], counts, strict=True):
        row[torch.randperm(6)] = torch.cat([torch.arange(count), 3 + torch.arange(6 - count)])
    result = compare(
        scatter_mask_tokens, reference.scatter_mask_tokens, inputs, tokens(3, 8, 24), SCATTER, exact=("value", "tokens")
    )
    grad = tokens(3, 8, 24)
    grad[:, 2:][inputs["ids_restore"] < 3] = float("nan")  # visible patches have no mask token
    assert run(scatter_mask_tokens, inputs, grad, ("mask_token",))["mask_token"].isfinite().all()
    unread = torch.arange(3) >= torch.tensor(counts)[:, None]
    assert result["tokens"][:, 2:][unread].count_nonzero() == 0


@pytest.mark.parametrize("norm_pix", [None, True])
@pytest.mark.parametrize("by", ["mask", "ids_mask"])
@pytest.mark.parametrize("strides", ["contiguous", "slice", "permute"])
def test_features_of_a_teacher_as_target(by, norm_pix, strides):
    inputs = loss_inputs(3, (1, 10), (1, 1), 20, by=by)
    inputs = {name: x for name, x in inputs.items() if name in ("pred", "mask", "ids_mask")}
    check_loss({**inputs, "target": tokens(3, 10, 20, strides=strides), "norm_pix": norm_pix})


@pytest.mark.eager
def test_a_target_by_hand():
    pred, target = torch.randn(2, 5, 7, dtype=F64), torch.randn(2, 5, 7, dtype=F64)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    expected = (pred - target)[mask].square().mean()
    torch.testing.assert_close(masked_mse(pred, target=target, mask=mask), expected, rtol=1e-14, atol=0)
    normed = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (pred - normed)[mask].square().mean()
    ours = masked_mse(pred, target=target, mask=mask, norm_pix=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.eager
@pytest.mark.parametrize("op", ["embed", "loss", "head", "gather"])
def test_gradcheck_with_padding(op):
    ids = torch.tensor([[3, 0], [1, -1]])
    options = {"dtype": F64, "norm_pix": "channel", "masked": 2}
    grid, patch, c = (1, 2, 2), (2, 1, 2), 2
    function, inputs, wrt = {
        "gather": lambda: (gather_tokens, {"tokens": tokens(2, 4, 3, F64)}, ("tokens",)),
        "embed": lambda: (patch_embed, patch_embed_inputs(2, grid, patch, c, 3, dtype=F64, norm=True), EMBED[:-1]),
        "loss": lambda: (masked_mse, loss_inputs(2, grid, patch, c, by="ids_mask", **options), ("pred",)),
        "head": lambda: (linear_masked_mse, head_inputs(2, grid, patch, c, 3, **options), HEAD),
    }[op]()
    inputs[{"gather": "ids", "embed": "ids_keep"}.get(op, "ids_mask")] = ids
    leaves = [inputs.pop(name).requires_grad_() for name in wrt]
    assert torch.autograd.gradcheck(lambda *x: function(**dict(zip(wrt, x, strict=True)), **inputs), leaves)


@pytest.mark.eager
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pred, x: masked_mse(pred, x, mask=MASK), "patch_size is missing"),
        (lambda pred, x: masked_mse(pred, mask=MASK), "pass exactly one of images and target, got neither"),
        (lambda pred, x: masked_mse(pred, x, patch_size=4, target=pred, mask=MASK), "images and target, got both"),
        (lambda pred, x: masked_mse(pred, patch_size=4, target=pred, mask=MASK), "leave out patch_size, mean and std"),
        (lambda pred, x: masked_mse(pred, target=pred[0], mask=MASK), r"target must be \[N, L, E\], got shape"),
        (lambda pred, x: masked_mse(pred, target=pred[:, :0], mask=MASK), "target is empty"),
        (lambda pred, x: masked_mse(pred, target=pred.int(), mask=MASK), "target must be float32"),
        (lambda pred, x: masked_mse(pred, target=pred.clone().requires_grad_(), mask=MASK), r"pass target.detach\(\)"),
        (lambda pred, x: masked_mse(pred, target=pred, mask=MASK, norm_pix="channel"), "more than one value"),
        (lambda pred, x: masked_mse(pred, x[:, :1, :2, :2], patch_size=1, mask=MASK), "more than one value"),
        (lambda pred, x: masked_mse(pred, x, patch_size=4, mask=MASK, norm_pix="patch"), "True, False or 'channel'"),
        (lambda pred, x: masked_mse(pred, x[:, :, None], patch_size=(2, 4, 4), mask=MASK),
         "images frames 1 is not a multiple of the patch frames 2"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises((ValueError, TypeError), match=f"masked_mse: .*{message}"):
        call(torch.randn(2, 4, 48), torch.rand(2, 3, 8, 8))


MASK = torch.tensor([[True, False, True, False]] * 2)
