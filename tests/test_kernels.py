"""What only the kernels can get wrong: memory outside the outputs, tiles, splits, ids out of range, roundings."""

import importlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import (
    BF16,
    F16,
    F32,
    assert_no_worse,
    cast,
    compare,
    dispatcher_calls,
    ids,
    images,
    loss_inputs,
    patch_embed_inputs,
    run,
    scatter_inputs,
    tokens,
)
from conftest import DEVICE
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpreterBuilder

from mae_kernels import (
    gather_tokens,
    kernels,
    masked_mse,
    patch_embed,
    random_masking,
    reference,
    scatter_mask_tokens,
    use_backend,
)
from mae_kernels.kernels.numerics import rounded
from mae_kernels.kernels.rows import row_tiles, split_samples

# The functions of the same names hide the modules in the package.
loss_kernels = importlib.import_module("mae_kernels.kernels.masked_mse")
scatter_kernels = importlib.import_module("mae_kernels.kernels.scatter_mask_tokens")
embed_kernels = importlib.import_module("mae_kernels.kernels.patch_embed")

U8 = torch.uint8
ALL = ("images", "weight", "bias", "pos_embed", "prefix")


@pytest.fixture(autouse=True)
def on_triton():
    with torch.device(DEVICE), use_backend("triton"):
        yield


@pytest.fixture
def guarded_empty(monkeypatch):
    """New memory lies between guards; the returned function says whether all of them are as they were."""
    buffers = []
    guard = 4096  # elements on either side
    allocate = torch.Tensor.new_empty

    def guarded(self, *size, dtype=None, **kwargs):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or self.dtype
        buffer = allocate(self, shape.numel() + 2 * guard, dtype=dtype, **kwargs)
        buffer.view(torch.uint8).fill_(0xA5)
        buffers.append((buffer, shape.numel()))
        return buffer[guard : guard + shape.numel()].view(shape)

    def intact():
        edges = (part for x, size in buffers for part in (x[:guard], x[guard + size :]))
        return all((edge.view(torch.uint8) == 0xA5).all() for edge in edges)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    intact.buffers = buffers
    return intact


CALLS = [
    pytest.param(op._qualified_op_name.split("::")[1], args, id=f"{i} {op._qualified_op_name.split('::')[1]}")
    for i, (op, *args) in enumerate(dispatcher_calls())
    if hasattr(kernels, op._qualified_op_name.split("::")[1])
    and not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args)
]


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_nothing_is_written_outside_the_outputs(name, args, guarded_empty):
    args = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, args)
    before = [x.clone() for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    getattr(kernels, name)(*args)
    assert guarded_empty.buffers
    assert guarded_empty()
    after = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True)), "an input was modified"


def test_the_guards_notice(guarded_empty):
    x = torch.zeros(3).new_empty(5)
    x.as_strided((6,), (1,))[5] = 1
    assert not guarded_empty()


OUTSIDE = [-1, 4, 2**31, -(2**31), 2**40, -(2**62)]  # of 4 patches


@pytest.mark.parametrize("bad", OUTSIDE)
def test_ids_out_of_range_stay_inside_memory(bad, guarded_empty):
    # The op checks ids before it launches, but on a GPU only with MAE_KERNELS_DEBUG=1.
    chosen = torch.tensor([[0, bad, 3], [2, 1, bad]])
    good, is_good = chosen.clamp(0, 3), chosen != bad
    x = tokens(2, 4, 5)
    out = kernels.gather_tokens(x, chosen)
    assert torch.equal(out, reference.gather_tokens(x, good) * is_good[..., None])
    back = kernels.gather_tokens_backward(tokens(2, 3, 5), chosen, 4)
    assert torch.equal(back[0, [1, 2]], torch.zeros(2, 5))

    restore = torch.tensor([[0, bad, 3, 1], [2, 1, bad, 0]])
    scatter = kernels.scatter_mask_tokens(x[:, :3], torch.ones(5), restore, None, 1, F32)
    is_token = (restore >= 0) & (restore < 2)
    assert torch.equal((scatter[:, 1:] == 1).all(dim=2), ~is_token)
    grads = kernels.scatter_mask_tokens_backward(tokens(2, 5, 5), restore, 3, 1, 5, F32, [True, True, True])
    assert all(g.isfinite().all() for g in grads[1:])

    pixels, pred = images(2, 3, 16, 16), tokens(2, 3, 192)
    pixels, target = pixels[:, :, None], ([1, 8, 8], "patch", 1e-6, "channels_last")
    loss, residual, _ = kernels.masked_mse(pred, pixels, chosen, None, True, *target)
    assert loss.isfinite()
    assert torch.equal(residual.count_nonzero(dim=2) > 0, is_good)

    inputs = patch_embed_inputs(2, (2, 2), (8, 8), 3, 5, k=3, r=1)
    inputs["ids_keep"] = chosen
    inputs["images"] = inputs["images"][:, :, None]
    arguments = [inputs[key] for key in ("images", "weight", "bias", "pos_embed", "ids_keep", "prefix")]
    embedded = kernels.patch_embed(*arguments, None, F32, F32)
    nothing = torch.zeros(5) if bad < 0 else inputs["bias"]
    assert torch.equal(embedded[:, 1:][~is_good], nothing.expand(int((~is_good).sum()), 5))
    needs = [True] * 5
    grad, weight = tokens(2, 4, 5), inputs["weight"]
    g_images, *_, g_pos, _ = kernels.patch_embed_backward(grad, inputs["images"], weight, chosen, None, 1, F32, needs)
    in_use = (chosen[:, :, None] == torch.arange(4)).any(dim=1)
    assert torch.equal(reference.patchify(g_images[:, :, 0], 8).count_nonzero(dim=2) > 0, in_use)
    assert g_pos.isfinite().all()
    assert guarded_empty()


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((-3, 2, 6, 5), (0, 2, 6, 5)),
        ((5, 7, 20, 2**40), (5, 7, 5, 5)),
        ((2**40, -(2**62), 3, 4), (9, 0, 1, 4)),
        ((4, 11, 0, -(2**40)), (4, 11, 1, 1)),
    ],
)
def test_boxes_outside_their_image_stay_inside_it(box, inside):
    # As for the ids: without MAE_KERNELS_DEBUG=1 nobody refuses them on a GPU.
    around = images(1, 3, 30, 36, U8)
    pictures = around[:, :, 10:20, 12:24]  # 10 x 12 pixels inside others
    flips = torch.tensor([True])
    ours = kernels.random_resized_crop(pictures, None, None, torch.tensor([box]), flips, [7, 9])
    assert torch.equal(ours, kernels.random_resized_crop(pictures, None, None, torch.tensor([inside]), flips, [7, 9]))


@pytest.mark.parametrize(
    "place",
    [(-1, 4, 5), (41, 4, 5), (0, 0, 5), (0, 4, -5), (2**62, 4, 5), (0, 2**62, 4), (0, 2**31, 2**31), (-(2**62), 4, 5)],
)
def test_packed_images_outside_their_buffer_are_black(place):
    start, *size = place
    pixels = torch.full((2, 100), 255, dtype=U8)[:, 20:80]
    boxes, flips = torch.tensor([[0, 0, 4, 5]]), torch.tensor([False])
    out = kernels.random_resized_crop(pixels, torch.tensor([start]), torch.tensor([size]), boxes, flips, [3, 4])
    assert (out == 0).all()
    out = kernels.random_resized_crop(pixels, torch.tensor([40]), torch.tensor([[4, 5]]), boxes, flips, [3, 4])
    assert (out == 255).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter tells the addresses")
@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
def test_no_place_outside_its_box_is_read(strides, monkeypatch):
    """Where the filter is zero a result would not show it: box 1 is the whole image, which ends its memory."""
    pictures = images(2, 3, 13, 38, U8, strides)
    boxes = torch.tensor([[2, 5, 7, 33], [0, 0, 13, 38]])
    load, read = InterpreterBuilder.create_masked_load, []

    def recorded(builder, places, mask, *rest):
        if places.get_element_ty() == tl.uint8 and places.data.ndim > 0:
            read.append(np.unique(places.data[mask.data]))
        return load(builder, places, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded)
    kernels.random_resized_crop(pictures, None, None, boxes, torch.tensor([False, True]), [9, 40])
    places = torch.arange(pictures.untyped_storage().nbytes()).as_strided(pictures.shape, pictures.stride())
    allowed = [
        places[n, :, top : top + height, left : left + width].flatten() + pictures.data_ptr()
        for n, (top, left, height, width) in enumerate(boxes.tolist())
    ]
    assert {*np.concatenate(read).tolist()} == {*torch.cat(allowed).tolist()}


@pytest.mark.parametrize("num_patches", [4097, 5000])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_masks_of_more_patches_than_one_launch_sorts(num_patches, levels):
    noise = torch.randint(levels, (2, num_patches)).float()
    for ours, expected in zip(
        random_masking(2, num_patches, noise=noise), reference.random_masking(2, num_patches, noise=noise), strict=True
    ):
        assert torch.equal(ours, expected)


def test_noise_of_any_value_is_ordered_as_by_pytorch():
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 1e-45, -1e-45, 3e38]
    noise = torch.tensor([special * 3, (special * 3)[::-1]])
    ours = random_masking(*noise.shape, 0.5, noise=noise).ids_restore.cpu()
    # On a CPU: PyTorch's sort on a GPU puts a NaN of negative sign first (its issue 190781).
    assert torch.equal(ours, reference.random_masking(*noise.shape, 0.5, noise=noise.cpu()).ids_restore)


# 40 x 64 pixels of 3 channels are held in two turns, 40 x 64 of 13 in nine.
@pytest.mark.parametrize(("c", "turns"), [(3, 2), (13, 9)])
@pytest.mark.parametrize(("layout", "by"), [("channels_last", "mask"), ("channels_first", "ids_mask")])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_patches_larger_than_the_registers(c, turns, layout, by, norm_pix):
    tiles = loss_kernels.loss_tiles(4, c * 40 * 64, True)
    assert -(-c * 40 * 64 // tiles.values) == turns
    inputs = loss_inputs(2, (1, 2), (40, 64), c, layout=layout, by=by, masked=1, norm_pix=norm_pix, norm=True)
    compare(masked_mse, reference.masked_mse, inputs, torch.tensor(1.0), ("pred",))


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("patch", [16, 64])  # in one block, in three
def test_the_target_of_a_flat_patch_is_zero(patch, layout):
    flat = torch.rand(2, 1, 3, 4).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    pred, mask = torch.zeros(2, 12, 3 * patch**2), torch.ones(2, 12, dtype=torch.bool)
    assert masked_mse(pred, flat.expand(-1, 3, -1, -1), patch_size=patch, mask=mask, layout=layout).item() == 0


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_channels_more_than_32_bits_apart(layout):
    inputs = loss_inputs(1, (2, 2), (4, 8), 3, layout=layout, pixels=U8)
    far = torch.empty(2**32 + 128, dtype=U8).as_strided((1, 3, 8, 16), (0, 2**31, 16, 1))
    near = inputs.pop("images")
    assert torch.equal(masked_mse(images=far.copy_(near), **inputs), masked_mse(images=near, **inputs))


def test_crops_of_channels_more_than_32_bits_apart():
    near = images(1, 3, 8, 16, U8)
    far = torch.empty(2**32 + 128, dtype=U8).as_strided((1, 3, 8, 16), (0, 2**31, 16, 1))
    boxes, flips = torch.tensor([[1, 2, 6, 13]]), torch.tensor([True])
    ours, expected = (kernels.random_resized_crop(x, None, None, boxes, flips, [5, 9]) for x in (far.copy_(near), near))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("step", "options", "adjacent"),
    [
        (1, {}, 2),
        (2, {}, 1),
        (1, {"norm_pix": "channel"}, 1),
        (1, {"layout": "channels_first"}, 256),
        (2, {"layout": "channels_first"}, 1),
    ],
)
def test_the_compiler_is_told_of_adjacent_values_that_are(step, options, adjacent, monkeypatch):
    """The interpreter takes no notice; a chip would read what lies between strided predictions."""
    kernel, told = loss_kernels.masked_mse_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, ADJACENT, **rest: (
                told.append(ADJACENT),
                kernel[grid](*args, ADJACENT=ADJACENT, **rest),
            )

    monkeypatch.setattr(loss_kernels, "masked_mse_kernel", Recorded())
    inputs = loss_inputs(1, (2, 2), (8, 8), 3, **options)
    inputs["pred"] = inputs["pred"].repeat_interleave(step, 2)[..., ::step]
    masked_mse(**inputs)
    assert told == [adjacent]


def test_frames_more_than_32_bits_apart():
    inputs = loss_inputs(1, (2, 1, 2), (1, 4, 8), 2, pixels=U8, norm_pix="channel")
    far = torch.empty(3 * 2**31 + 256, dtype=U8).as_strided((1, 2, 2, 4, 16), (0, 64, 2**31 + 128, 16, 1))
    near = inputs.pop("images")
    assert torch.equal(masked_mse(images=far.copy_(near), **inputs), masked_mse(images=near, **inputs))
    weight = torch.randn(5, 2, 2, 4, 8)
    ours, expected = (patch_embed(x, weight, None, None, torch.tensor([[1]])) for x in (far, near))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "tiles",
    [
        loss_kernels.LossTiles(patches=1, values=512, turns=4, adjacent=1, num_warps=1),
        loss_kernels.LossTiles(patches=4, values=512, turns=1, adjacent=2, num_warps=4),
        loss_kernels.LossTiles(patches=8, values=128, turns=2, adjacent=8, num_warps=4),
    ],
    ids=["turns", "patches", "both"],
)
@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_any_tiles_of_the_loss(by, tiles, monkeypatch):
    monkeypatch.setattr(loss_kernels, "loss_tiles", lambda *args: tiles)
    inputs = loss_inputs(3, (2, 3), (8, 14), 3, by=by, pixels=U8, norm=True)
    compare(masked_mse, reference.masked_mse, inputs, torch.tensor(1.0), ("pred",))


@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_sums_over_samples_in_several_splits(n, monkeypatch):
    for module in (scatter_kernels, embed_kernels):
        monkeypatch.setattr(module, "split_samples", lambda n, blocks: (-(-n // 3), 3))
    inputs = scatter_inputs(n, 4, 2, 5, 1, pos=5)
    grad = tokens(n, 5, 5)
    wrt = ("tokens", "mask_token", "pos_embed")
    compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, wrt, exact=("value", "tokens"))
    inputs = patch_embed_inputs(n, (1, 4), (1, 2), 1, 5, k=2)
    compare(patch_embed, reference.patch_embed, inputs, tokens(n, 2, 5), ("pos_embed",))


@pytest.mark.parametrize("blocks", [1, 7, 50, 3000])
@pytest.mark.parametrize("n", [1, 2, 49, 256, 1024, 2047, 2049, 4100])
def test_split_samples(n, blocks):
    splits, per_split = split_samples(n, blocks)
    assert (splits - 1) * per_split < n <= splits * per_split  # every sample in one split, none of them empty
    assert splits * blocks <= max(2048, blocks)


@pytest.mark.parametrize("d", [1, 7, 16, 64, 100, 192, 384, 512, 768, 1000, 1024, 1280, 4096])
def test_row_tiles(d):
    tiles = row_tiles(d)
    assert tiles.rows * tiles.width == 2048
    assert -(-d // tiles.width) * tiles.width - d < max(64, d)
    if d % 64 == 0:
        assert d % tiles.width == 0, "a width that pads where none has to"


# Central differences of linear and quadratic functions are exact, so that large steps drown the float32 rounding.
STEP = {"eps": 0.5, "atol": 2e-4, "rtol": 2e-4, "nondet_tol": 0.0, "fast_mode": True}


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_gradcheck_of_the_kernels():
    chosen = ids(2, 4, 3)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, chosen), tokens(2, 4, 3).requires_grad_(), **STEP)

    inputs = scatter_inputs(2, 4, 2, 3, 1, pos=5)
    leaves = [inputs.pop(key).requires_grad_() for key in ("tokens", "mask_token", "pos_embed")]
    restore = inputs["ids_restore"]
    assert torch.autograd.gradcheck(lambda x, mask, pos: scatter_mask_tokens(x, mask, restore, pos), leaves, **STEP)

    for by, layout in (("mask", "channels_last"), ("ids_mask", "channels_first")):
        inputs = loss_inputs(2, (1, 2), (1, 3), 2, by=by, layout=layout, norm=True)
        pred = inputs.pop("pred").requires_grad_()
        assert torch.autograd.gradcheck(lambda x, inputs=inputs: masked_mse(x, **inputs), pred, **STEP)

    inputs = patch_embed_inputs(2, (1, 2), (1, 2), 2, 3, k=1, r=1, norm=True)
    leaves = [inputs.pop(key).requires_grad_() for key in ALL]

    def embed(images, weight, bias, pos_embed, prefix):
        return patch_embed(images, weight, bias, pos_embed, prefix=prefix, **inputs)

    assert torch.autograd.gradcheck(embed, leaves, **STEP)


@triton.jit
def _round_kernel(p_x, p_out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + i, rounded(tl.load(p_x + i), p_out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_rounding(dtype):
    bits = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0x3F800000, 0x3F800000 + 2**23, 2**15, dtype=torch.int64).to(torch.int32)  # halfway, and exact
    x = torch.cat([bits, ties, bits[: 2**10 - len(ties) % 2**10]]).view(F32)
    x = x[: len(x) // 1024 * 1024]
    out = torch.empty(len(x), dtype=dtype)
    _round_kernel[(len(x) // 1024,)](x, out, BLOCK=1024)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_backward_of_the_loss_scales_the_residual():
    residual = tokens(2, 1500, 3, BF16)  # three programs, the last one in part
    out = kernels.masked_mse_backward(residual, torch.tensor(3.0), torch.tensor(0.5), F32)
    assert torch.equal(out, residual.float() * 1.5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_both_back_ends_agree(dtype):
    """The same op, the same dtype, two implementations: neither is further from float64 than twice the other."""
    inputs = patch_embed_inputs(3, (4, 5), (8, 8), 3, 40, dtype=dtype, k=6, r=1, norm=True)
    grad = tokens(3, 7, 40, dtype)
    triton_result = run(patch_embed, inputs, grad, ALL)
    with use_backend("eager"):
        eager_result = run(patch_embed, inputs, grad, ALL)
    gold = run(reference.patch_embed, cast(inputs, torch.float64), grad.double(), ALL)
    for name in gold:
        assert_no_worse(triton_result[name], eager_result[name], gold[name], name)
