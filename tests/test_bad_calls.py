"""Every wrong call names the op, the argument, what was expected and what came: messages are compared in full."""

import pytest
import torch

from mae_kernels import (
    PackedImages,
    gather_tokens,
    masked_mse,
    masking_from_mask,
    patch_embed,
    patchify,
    random_crop_boxes,
    random_masking,
    random_resized_crop,
    scatter_mask_tokens,
    unpatchify,
    use_backend,
)

NAN, INF = float("nan"), float("inf")
V, T = ValueError, TypeError

IMAGES, WEIGHT = torch.rand(2, 3, 32, 32), torch.randn(8, 3, 16, 16)  # L = 4, E = 768, D = 8
VIDEO = torch.rand(2, 3, 8, 32, 32)
PRED, MASK, TOKENS, TOKEN = torch.randn(2, 4, 768), torch.ones(2, 4).bool(), torch.randn(2, 4, 8), torch.randn(8)
IDS = torch.arange(4).repeat(2, 1)
TOO_LARGE, NEGATIVE, TWICE = (torch.tensor([[0, 1, 2, 3], row]) for row in ([0, 1, 4, 3], [0, 1, 2, -1], [0, 3, 2, 3]))
PIXELS = torch.zeros(2, 3, 6, 8, dtype=torch.uint8)
BOXES, FLIPS = torch.tensor([[0, 0, 6, 8], [1, 2, 3, 4]]), torch.tensor([True, False])
PACKED = PackedImages.pack([PIXELS[0], PIXELS[1, :, :4]])  # 48 and 32 places
VIDEO_REFUSED = (
    "images have shape (2, 3, 8, 32, 32); video and volumes [N, C, T, H, W] are not supported yet, "
    "pass images [N, C, H, W]"
)


def embed(images=IMAGES, weight=WEIGHT, *args, **kwargs):
    return patch_embed(images, weight, *args, **kwargs)


def scatter(tokens=TOKENS, mask_token=TOKEN, ids_restore=IDS, *args, **kwargs):
    return scatter_mask_tokens(tokens, mask_token, ids_restore, *args, **kwargs)


def loss(pred=PRED, images=IMAGES, patch_size=16, **kwargs):
    return masked_mse(pred, images, patch_size=patch_size, **kwargs)


def by_mask(pred=PRED, images=IMAGES, patch_size=16, mask=MASK, **kwargs):
    return loss(pred, images, patch_size, mask=mask, **kwargs)


def crop(images=PIXELS, boxes=BOXES, flips=FLIPS, size=5):
    return random_resized_crop(images, boxes, flips, size)


def box(*values):
    return torch.tensor([[0, 0, 6, 8], values])


def packed(**fields):
    return PACKED._replace(**fields)


def meta(x):
    return x.to("meta")


# fmt: off
CALLS = [
    # id, call, exception, message
    ("embed images array", lambda: embed(IMAGES.numpy()), T, "patch_embed: images must be a torch.Tensor, got ndarray"),
    ("embed weight array", lambda: embed(weight=WEIGHT.numpy()), T,
     "patch_embed: weight must be a torch.Tensor, got ndarray"),
    ("embed images 3-D", lambda: embed(IMAGES[0]), V,
     "patch_embed: images must be [N, C, H, W], got shape (3, 32, 32)"),
    ("embed weight 3-D", lambda: embed(weight=WEIGHT[0]), V,
     "patch_embed: weight must be [D, C, ph, pw], got shape (3, 16, 16)"),
    ("embed video", lambda: embed(VIDEO), V, f"patch_embed: {VIDEO_REFUSED}"),
    ("embed video weight", lambda: embed(VIDEO, torch.randn(8, 3, 2, 16, 16)), V,
     "patch_embed: weight has shape (8, 3, 2, 16, 16); video and volumes are not supported yet"),
    ("embed images int64", lambda: embed(IMAGES.long()), T,
     "patch_embed: images must be uint8, float32, float16, bfloat16 or float64, got int64"),
    ("embed weight int64", lambda: embed(weight=WEIGHT.long()), T,
     "patch_embed: weight must be float32, float16, bfloat16 or float64, got int64"),
    ("embed height", lambda: embed(torch.rand(2, 3, 225, 224)), V,
     "patch_embed: images height 225 is not a multiple of the patch height 16"),
    ("embed width", lambda: embed(torch.rand(2, 3, 32, 40)), V,
     "patch_embed: images width 40 is not a multiple of the patch width 16"),
    ("embed channels", lambda: embed(torch.rand(2, 4, 32, 32)), V,
     "patch_embed: images have 4 channels, but weight expects 3"),
    ("embed empty batch", lambda: embed(IMAGES[:0]), V,
     "patch_embed: the batch of images is empty, got shape (0, 3, 32, 32)"),
    ("embed empty height", lambda: embed(IMAGES[:, :, :0]), V,
     "patch_embed: the height of images is empty, got shape (2, 3, 0, 32)"),
    ("embed empty patch", lambda: embed(weight=WEIGHT[:, :, :0]), V,
     "patch_embed: weight is empty, got shape (8, 3, 0, 16)"),
    ("embed no outputs", lambda: embed(weight=WEIGHT[:0]), V, "patch_embed: weight is empty, got shape (0, 3, 16, 16)"),
    ("embed bias size", lambda: embed(bias=torch.zeros(9)), V, "patch_embed: bias must be [8], got shape (9,)"),
    ("embed bias int64", lambda: embed(bias=TOKEN.long()), T,
     "patch_embed: bias must be float32, float16, bfloat16 or float64, got int64"),
    ("embed bias float", lambda: embed(bias=1.0), T, "patch_embed: bias must be a torch.Tensor, got float"),
    ("embed pos with class row", lambda: embed(pos_embed=torch.zeros(1, 5, 8)), V,
     "patch_embed: pos_embed must be [4, 8] or [1, 4, 8], got shape (1, 5, 8)"),
    ("embed pos per sample", lambda: embed(pos_embed=torch.zeros(2, 4, 8)), V,
     "patch_embed: pos_embed must be [4, 8] or [1, 4, 8], got shape (2, 4, 8)"),
    ("embed pos int32", lambda: embed(pos_embed=torch.zeros(4, 8).int()), T,
     "patch_embed: pos_embed must be float32, float16, bfloat16 or float64, got int32"),
    ("embed prefix 1-D", lambda: embed(prefix=TOKEN), V,
     "patch_embed: prefix must be [R, 8] or [1, R, 8], got shape (8,)"),
    ("embed prefix width", lambda: embed(prefix=torch.zeros(1, 1, 9)), V,
     "patch_embed: prefix must be [R, 8] or [1, R, 8], got shape (1, 1, 9)"),
    ("embed ids int32", lambda: embed(ids_keep=IDS.int()), T,
     "patch_embed: ids_keep must be int64, got int32; call .long()"),
    ("embed ids list", lambda: embed(ids_keep=IDS.tolist()), T,
     "patch_embed: ids_keep must be a torch.Tensor, got list"),
    ("embed ids 1-D", lambda: embed(ids_keep=IDS[0]), V, "patch_embed: ids_keep must be [N, K], got shape (4,)"),
    ("embed ids batch", lambda: embed(ids_keep=IDS[:1]), V, "patch_embed: ids_keep has 1 rows for a batch of 2"),
    ("embed ids empty", lambda: embed(ids_keep=IDS[:, :0]), V, "patch_embed: ids_keep is empty, got shape (2, 0)"),
    ("embed ids too many", lambda: embed(ids_keep=torch.arange(5).repeat(2, 1)), V,
     "patch_embed: ids_keep has 5 ids per sample, but there are only 4 patches"),
    ("embed ids L", lambda: embed(ids_keep=TOO_LARGE), V,
     "patch_embed: ids_keep[1, 2] is 4, out of range for 4 patches, 0 to 3"),
    ("embed ids -1", lambda: embed(ids_keep=NEGATIVE), V,
     "patch_embed: ids_keep[1, 3] is -1, out of range for 4 patches, 0 to 3"),
    ("embed ids twice", lambda: embed(ids_keep=TWICE), V, "patch_embed: ids_keep[1] holds the id 3 more than once"),
    ("embed weight device", lambda: embed(weight=meta(WEIGHT)), V,
     "patch_embed: weight is on meta, but images is on cpu"),
    ("embed bias device", lambda: embed(bias=meta(TOKEN)), V, "patch_embed: bias is on meta, but images is on cpu"),
    ("embed pos device", lambda: embed(pos_embed=meta(torch.zeros(4, 8))), V,
     "patch_embed: pos_embed is on meta, but images is on cpu"),
    ("embed prefix device", lambda: embed(prefix=meta(torch.zeros(1, 8))), V,
     "patch_embed: prefix is on meta, but images is on cpu"),
    ("embed ids device", lambda: embed(ids_keep=meta(IDS)), V,
     "patch_embed: ids_keep is on meta, but images is on cpu"),
    ("embed mean device", lambda: embed(mean=meta(torch.zeros(3)), std=torch.ones(3)), V,
     "patch_embed: mean is on meta, but images is on cpu"),
    ("embed mean alone", lambda: embed(mean=[0, 0, 0]), V,
     "patch_embed: mean was given without std; pass both or neither"),
    ("embed std alone", lambda: embed(std=[1, 1, 1]), V,
     "patch_embed: std was given without mean; pass both or neither"),
    ("embed std 0", lambda: embed(mean=[0, 0, 0], std=[1, 0, 1]), V,
     "patch_embed: std must be positive, got [1, 0, 1]"),
    ("embed std nan", lambda: embed(mean=[0, 0, 0], std=[1, NAN, 1]), V,
     "patch_embed: std must be positive, got [1, nan, 1]"),
    ("embed std count", lambda: embed(mean=[0, 0, 0], std=[1, 1]), V,
     "patch_embed: std has 2 values, but images have 3 channels"),
    ("embed mean count", lambda: embed(mean=[0, 0], std=[1, 1, 1]), V,
     "patch_embed: mean has 2 values, but images have 3 channels"),
    ("embed mean int64", lambda: embed(mean=torch.zeros(3).long(), std=torch.ones(3)), T,
     "patch_embed: mean must be float32, float16, bfloat16 or float64, got int64"),
    ("embed mean number", lambda: embed(mean=0.5, std=0.5), V,
     "patch_embed: mean has 1 values, but images have 3 channels"),
    ("embed std number", lambda: embed(mean=[0, 0, 0], std=0.5), V,
     "patch_embed: std has 1 values, but images have 3 channels"),
    ("embed half images", lambda: embed(IMAGES.bfloat16()), T,
     ("patch_embed: images are bfloat16, but weight is float32; cast one of them, pass uint8 images, or use "
      "torch.autocast")),
    ("embed double weight", lambda: embed(weight=WEIGHT.double()), T,
     ("patch_embed: images are float32, but weight is float64; cast one of them, pass uint8 images, or use "
      "torch.autocast")),
    ("embed out_dtype int", lambda: embed(out_dtype=torch.int64), T,
     "patch_embed: out_dtype must be a floating dtype, got torch.int64"),
    ("embed out_dtype str", lambda: embed(out_dtype="bfloat16"), T,
     "patch_embed: out_dtype must be a floating dtype, got 'bfloat16'"),

    ("gather list", lambda: gather_tokens(TOKENS.tolist(), IDS), T,
     "gather_tokens: tokens must be a torch.Tensor, got list"),
    ("gather 2-D", lambda: gather_tokens(TOKENS[0], IDS), V,
     "gather_tokens: tokens must be [N, L, D], got shape (4, 8)"),
    ("gather int64", lambda: gather_tokens(TOKENS.long(), IDS), T,
     "gather_tokens: tokens must be float32, float16, bfloat16 or float64, got int64"),
    ("gather empty batch", lambda: gather_tokens(TOKENS[:0], IDS[:0]), V,
     "gather_tokens: tokens is empty, got shape (0, 4, 8)"),
    ("gather ids float", lambda: gather_tokens(TOKENS, IDS.float()), T,
     "gather_tokens: ids must be int64, got float32; call .long()"),
    ("gather ids batch", lambda: gather_tokens(TOKENS, torch.zeros(3, 1).long()), V,
     "gather_tokens: ids has 3 rows for a batch of 2"),
    ("gather ids empty", lambda: gather_tokens(TOKENS, IDS[:, :0]), V, "gather_tokens: ids is empty, got shape (2, 0)"),
    ("gather ids L", lambda: gather_tokens(TOKENS, TOO_LARGE), V,
     "gather_tokens: ids[1, 2] is 4, out of range for 4 patches, 0 to 3"),
    ("gather ids -1", lambda: gather_tokens(TOKENS, NEGATIVE), V,
     "gather_tokens: ids[1, 3] is -1, out of range for 4 patches, 0 to 3"),
    ("gather ids twice", lambda: gather_tokens(TOKENS, TWICE), V,
     "gather_tokens: ids[1] holds the id 3 more than once"),
    ("gather device", lambda: gather_tokens(meta(TOKENS), IDS), V,
     "gather_tokens: ids is on cpu, but tokens is on meta"),

    ("scatter no mask token", lambda: scatter(mask_token=None), T,
     "scatter_mask_tokens: mask_token must be a torch.Tensor, got NoneType"),
    ("scatter token width", lambda: scatter(mask_token=TOKEN[1:]), V,
     "scatter_mask_tokens: mask_token must be [8] or [1, 1, 8], got shape (7,)"),
    ("scatter token 2-D", lambda: scatter(mask_token=TOKEN[None]), V,
     "scatter_mask_tokens: mask_token must be [8] or [1, 1, 8], got shape (1, 8)"),
    ("scatter token int32", lambda: scatter(mask_token=TOKEN.int()), T,
     "scatter_mask_tokens: mask_token must be float32, float16, bfloat16 or float64, got int32"),
    ("scatter no tokens", lambda: scatter(TOKENS[:, :0]), V,
     "scatter_mask_tokens: tokens is empty, got shape (2, 0, 8)"),
    ("scatter prefix -1", lambda: scatter(num_prefix=-1), V,
     "scatter_mask_tokens: num_prefix must be at least 0 and less than the 4 tokens, got -1"),
    ("scatter prefix 4", lambda: scatter(num_prefix=4), V,
     "scatter_mask_tokens: num_prefix must be at least 0 and less than the 4 tokens, got 4"),
    ("scatter prefix float", lambda: scatter(num_prefix=1.0), T,
     "scatter_mask_tokens: num_prefix must be an int, got float"),
    ("scatter too many visible", lambda: scatter(torch.zeros(2, 6, 8)), V,
     ("scatter_mask_tokens: tokens has 5 visible tokens per sample behind 1 prefix tokens, but ids_restore has "
      "only 4 patches")),
    ("scatter pos rows", lambda: scatter(pos_embed=torch.zeros(6, 8)), V,
     "scatter_mask_tokens: pos_embed must be [5, 8] or [1, 5, 8], got shape (6, 8)"),
    ("scatter pos width", lambda: scatter(pos_embed=torch.zeros(4, 9)), V,
     "scatter_mask_tokens: pos_embed must be [4, 8] or [1, 4, 8], got shape (4, 9)"),
    ("scatter pos list", lambda: scatter(pos_embed=[0]), T,
     "scatter_mask_tokens: pos_embed must be a torch.Tensor, got list"),
    ("scatter ids int32", lambda: scatter(ids_restore=IDS.int()), T,
     "scatter_mask_tokens: ids_restore must be int64, got int32; call .long()"),
    ("scatter ids batch", lambda: scatter(ids_restore=IDS[:1]), V,
     "scatter_mask_tokens: ids_restore has 1 rows for a batch of 2"),
    ("scatter ids empty", lambda: scatter(ids_restore=IDS[:, :0]), V,
     "scatter_mask_tokens: ids_restore is empty, got shape (2, 0)"),
    ("scatter ids L", lambda: scatter(ids_restore=TOO_LARGE), V,
     "scatter_mask_tokens: ids_restore[1, 2] is 4, out of range for 4 patches, 0 to 3"),
    ("scatter ids -1", lambda: scatter(ids_restore=NEGATIVE), V,
     "scatter_mask_tokens: ids_restore[1, 3] is -1, out of range for 4 patches, 0 to 3"),
    ("scatter ids twice", lambda: scatter(ids_restore=TWICE), V,
     "scatter_mask_tokens: ids_restore[1] holds the id 3 more than once"),
    ("scatter device", lambda: scatter(mask_token=meta(TOKEN)), V,
     "scatter_mask_tokens: mask_token is on meta, but tokens is on cpu"),
    ("scatter out_dtype int", lambda: scatter(out_dtype=torch.int32), T,
     "scatter_mask_tokens: out_dtype must be a floating dtype, got torch.int32"),

    ("loss neither", lambda: loss(), V, "masked_mse: pass exactly one of mask and ids_mask, got neither"),
    ("loss both", lambda: by_mask(ids_mask=IDS), V, "masked_mse: pass exactly one of mask and ids_mask, got both"),
    ("loss mask shape", lambda: by_mask(mask=MASK[:, :3]), V, "masked_mse: mask must be [2, 4], got shape (2, 3)"),
    ("loss mask 0.5", lambda: by_mask(mask=MASK * torch.tensor([1, 1, 0.5, 0])), V,
     "masked_mse: mask[0, 2] is 0.5; only 0 (visible) and 1 (masked) are allowed"),
    ("loss mask nan", lambda: by_mask(mask=MASK * NAN), V,
     "masked_mse: mask[0, 0] is nan; only 0 (visible) and 1 (masked) are allowed"),
    ("loss mask list", lambda: by_mask(mask=MASK.tolist()), T, "masked_mse: mask must be a torch.Tensor, got list"),
    ("loss mask int64", lambda: by_mask(mask=MASK.long()), T,
     "masked_mse: mask must be bool, or floating 0 and 1, got int64; call .bool()"),
    ("loss mask device", lambda: by_mask(mask=meta(MASK)), V, "masked_mse: mask is on meta, but pred is on cpu"),
    ("loss images device", lambda: by_mask(images=meta(IMAGES)), V,
     "masked_mse: images is on meta, but pred is on cpu"),
    ("loss pred values", lambda: by_mask(PRED[..., 1:]), V,
     "masked_mse: pred must be [2, 4, 768], got shape (2, 4, 767)"),
    ("loss pred rows of mask", lambda: by_mask(PRED[:, 1:]), V,
     "masked_mse: pred must be [2, 4, 768], got shape (2, 3, 768)"),
    ("loss pred rows of ids", lambda: loss(ids_mask=IDS[:, :3]), V,
     "masked_mse: pred must be [2, 3, 768], got shape (2, 4, 768)"),
    ("loss pred int64", lambda: by_mask(PRED.long()), T,
     "masked_mse: pred must be float32, float16, bfloat16 or float64, got int64"),
    ("loss pred None", lambda: by_mask(None), T, "masked_mse: pred must be a torch.Tensor, got NoneType"),
    ("loss image gradient", lambda: by_mask(images=IMAGES.clone().requires_grad_()), V,
     "masked_mse: images require grad, but the target is a constant of the loss; pass images.detach()"),
    ("loss images int64", lambda: by_mask(images=IMAGES.long()), T,
     "masked_mse: images must be uint8, float32, float16, bfloat16 or float64, got int64"),
    ("loss empty batch", lambda: by_mask(images=IMAGES[:0]), V,
     "masked_mse: the batch of images is empty, got shape (0, 3, 32, 32)"),
    ("loss video", lambda: by_mask(images=VIDEO), V, f"masked_mse: {VIDEO_REFUSED}"),
    ("loss patch 3-D", lambda: by_mask(patch_size=(2, 16, 16)), V,
     "masked_mse: patch_size (2, 16, 16) has three dimensions; video and volumes are not supported yet"),
    ("loss patch 15", lambda: by_mask(patch_size=(16, 15)), V,
     "masked_mse: images width 32 is not a multiple of the patch width 15"),
    ("loss patch 0", lambda: by_mask(patch_size=0), V,
     "masked_mse: patch_size must be a positive int or a pair of them, got 0"),
    ("loss patch float", lambda: by_mask(patch_size=16.0), V,
     "masked_mse: patch_size must be a positive int or a pair of them, got 16.0"),
    ("loss ids int32", lambda: loss(ids_mask=IDS.int()), T,
     "masked_mse: ids_mask must be int64, got int32; call .long()"),
    ("loss ids empty", lambda: loss(ids_mask=IDS[:, :0]), V, "masked_mse: ids_mask is empty, got shape (2, 0)"),
    ("loss ids L", lambda: loss(ids_mask=TOO_LARGE), V,
     "masked_mse: ids_mask[1, 2] is 4, out of range for 4 patches, 0 to 3"),
    ("loss ids -1", lambda: loss(ids_mask=NEGATIVE), V,
     "masked_mse: ids_mask[1, 3] is -1, out of range for 4 patches, 0 to 3"),
    ("loss ids twice", lambda: loss(ids_mask=TWICE), V, "masked_mse: ids_mask[1] holds the id 3 more than once"),
    ("loss ids device", lambda: loss(ids_mask=meta(IDS)), V, "masked_mse: ids_mask is on meta, but pred is on cpu"),
    ("loss layout", lambda: by_mask(layout="qpc"), V, "masked_mse: layout must be 'pqc' or 'cpq', got 'qpc'"),
    ("loss std alone", lambda: by_mask(std=[1, 1, 1]), V,
     "masked_mse: std was given without mean; pass both or neither"),
    ("loss std -1", lambda: by_mask(mean=[0, 0, 0], std=[1, -1, 1]), V,
     "masked_mse: std must be positive, got [1, -1, 1]"),
    ("loss eps", lambda: by_mask(eps=-1.0), V, "masked_mse: eps must not be negative, got -1.0"),

    ("masking ratio 0", lambda: random_masking(2, 196, 0), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got 0"),
    ("masking ratio 1", lambda: random_masking(2, 196, 1), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got 1"),
    ("masking ratio -0.5", lambda: random_masking(2, 196, -0.5), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got -0.5"),
    ("masking ratio nan", lambda: random_masking(2, 196, NAN), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got nan"),
    ("masking ratio inf", lambda: random_masking(2, 196, INF), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got inf"),
    ("masking ratio str", lambda: random_masking(2, 196, "0.75"), T,
     "random_masking: mask_ratio must be a number, got str"),
    ("masking none visible", lambda: random_masking(2, 10, 0.9), V,
     "random_masking: mask_ratio 0.9 of 10 patches leaves none visible"),
    ("masking none masked", lambda: random_masking(2, 10, 0.05, count="masked"), V,
     "random_masking: mask_ratio 0.05 of 10 patches leaves none masked"),
    ("masking no samples", lambda: random_masking(0, 10), V,
     "random_masking: batch_size and num_patches must be positive, got 0 and 10"),
    ("masking no patches", lambda: random_masking(2, 0), V,
     "random_masking: batch_size and num_patches must be positive, got 2 and 0"),
    ("masking float batch", lambda: random_masking(2.0, 10), T, "random_masking: batch_size must be an int, got float"),
    ("masking count", lambda: random_masking(2, 10, count="hidden"), V,
     "random_masking: count must be 'visible' or 'masked', got 'hidden'"),
    ("masking noise shape", lambda: random_masking(2, 10, noise=torch.rand(2, 9)), V,
     "random_masking: noise must be [2, 10], got shape (2, 9)"),
    ("masking noise int64", lambda: random_masking(2, 4, noise=IDS), T,
     "random_masking: noise must be float32, float16, bfloat16 or float64, got int64"),
    ("masking noise list", lambda: random_masking(2, 4, noise=[0]), T,
     "random_masking: noise must be a torch.Tensor, got list"),
    ("masking noise and device", lambda: random_masking(2, 4, noise=IDS.float(), device="cpu"), V,
     "random_masking: noise fixes the mask and its device; leave out generator and device"),
    ("mask uneven", lambda: masking_from_mask(IDS.gt(torch.tensor([[2], [1]]))), V,
     "masking_from_mask: every row must hide the same number of patches, but row 0 hides 1 and row 1 hides 2"),
    ("mask full", lambda: masking_from_mask(MASK), V, "masking_from_mask: mask leaves none of the 4 patches visible"),
    ("mask bare", lambda: masking_from_mask(~MASK), V, "masking_from_mask: mask leaves none of the 4 patches masked"),
    ("mask float", lambda: masking_from_mask(MASK.float()), T,
     "masking_from_mask: mask must be bool with True = removed, got float32; call .bool()"),
    ("mask 1-D", lambda: masking_from_mask(MASK[0]), V, "masking_from_mask: mask must be [N, L], got shape (4,)"),
    ("mask empty", lambda: masking_from_mask(MASK[:0]), V, "masking_from_mask: mask is empty, got shape (0, 4)"),

    ("patchify height", lambda: patchify(IMAGES[:, :, 2:], 16), V,
     "patchify: images height 30 is not a multiple of the patch height 16"),
    ("patchify patch 3-D", lambda: patchify(IMAGES, (2, 16, 16)), V,
     "patchify: patch_size (2, 16, 16) has three dimensions; video and volumes are not supported yet"),
    ("patchify patch None", lambda: patchify(IMAGES, None), V,
     "patchify: patch_size must be a positive int or a pair of them, got None"),
    ("patchify patch -1", lambda: patchify(IMAGES, -1), V,
     "patchify: patch_size must be a positive int or a pair of them, got -1"),
    ("patchify layout", lambda: patchify(IMAGES, 16, "qpc"), V, "patchify: layout must be 'pqc' or 'cpq', got 'qpc'"),
    ("patchify video", lambda: patchify(VIDEO, 16), V, f"patchify: {VIDEO_REFUSED}"),
    ("unpatchify larger", lambda: unpatchify(PRED, 16, 48), V,
     "unpatchify: patches has 4 patches per sample, but a 48x48 image has 3 x 3 patches of 16x16"),
    ("unpatchify 33", lambda: unpatchify(PRED, 16, 33), V,
     "unpatchify: patches has 4 patches per sample, but a 33x33 image has 2.0625 x 2.0625 patches of 16x16"),
    ("unpatchify values", lambda: unpatchify(PRED[..., 1:], 16, 32), V,
     "unpatchify: patches has 767 values per patch, not a multiple of 16x16"),
    ("unpatchify 2-D", lambda: unpatchify(PRED[0], 16, 32), V,
     "unpatchify: patches must be [N, L, E], got shape (4, 768)"),
    ("unpatchify layout", lambda: unpatchify(PRED, 16, 32, "qpc"), V,
     "unpatchify: layout must be 'pqc' or 'cpq', got 'qpc'"),
    ("unpatchify size 3-D", lambda: unpatchify(PRED, 16, (3, 32, 32)), V,
     "unpatchify: image_size must be a positive int or a pair of them, got (3, 32, 32)"),
    ("unpatchify size 0", lambda: unpatchify(PRED[:, :0], 16, 0), V,
     "unpatchify: image_size must be a positive int or a pair of them, got 0"),

    ("crop float", lambda: crop(PIXELS.float()), T, "random_resized_crop: images must be uint8, got float32"),
    ("crop array", lambda: crop(PIXELS.numpy()), T, "random_resized_crop: images must be a torch.Tensor, got ndarray"),
    ("crop 3-D", lambda: crop(PIXELS[0]), V,
     "random_resized_crop: images must be [N, C, H, W], got shape (3, 6, 8)"),
    ("crop empty", lambda: crop(PIXELS[:, :, :0]), V,
     "random_resized_crop: images is empty, got shape (2, 3, 0, 8)"),
    ("crop size 0", lambda: crop(size=(5, 0)), V,
     "random_resized_crop: size must be a positive int or a pair of them, got (5, 0)"),
    ("crop size float", lambda: crop(size=5.5), V,
     "random_resized_crop: size must be a positive int or a pair of them, got 5.5"),
    ("crop boxes list", lambda: crop(boxes=BOXES.tolist()), T,
     "random_resized_crop: boxes must be a torch.Tensor, got list"),
    ("crop boxes batch", lambda: crop(boxes=BOXES[:1]), V,
     "random_resized_crop: boxes must be [2, 4], got shape (1, 4)"),
    ("crop boxes float", lambda: crop(boxes=BOXES.float()), T,
     "random_resized_crop: boxes must be int64, got float32; call .long()"),
    ("crop flips batch", lambda: crop(flips=FLIPS[:1]), V, "random_resized_crop: flips must be [2], got shape (1,)"),
    ("crop flips uint8", lambda: crop(flips=FLIPS.byte()), T,
     "random_resized_crop: flips must be bool, got uint8; call .bool()"),
    ("crop boxes device", lambda: crop(boxes=meta(BOXES)), V,
     "random_resized_crop: boxes is on meta, but images is on cpu"),
    ("crop flips device", lambda: crop(flips=meta(FLIPS)), V,
     "random_resized_crop: flips is on meta, but images is on cpu"),
    ("crop box empty", lambda: crop(boxes=box(1, 2, 0, 4)), V,
     ("random_resized_crop: boxes[1], of 0 x 4 pixels from row 1 and column 2 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box negative", lambda: crop(boxes=box(-1, 2, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row -1 and column 2 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box low", lambda: crop(boxes=box(4, 2, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row 4 and column 2 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box wide", lambda: crop(boxes=box(0, 5, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row 0 and column 5 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box of a packed image", lambda: crop(PACKED, boxes=box(2, 2, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row 2 and column 2 on, is empty or does not lie inside its "
      "image of 4 x 8")),
    ("crop packed pixels", lambda: crop(packed(pixels=PIXELS)), V,
     "random_resized_crop: images.pixels must be [C, B], got shape (2, 3, 6, 8)"),
    ("crop packed float", lambda: crop(packed(pixels=PACKED.pixels.float())), T,
     "random_resized_crop: images must be uint8, got float32"),
    ("crop packed starts", lambda: crop(packed(starts=PACKED.starts.int())), T,
     "random_resized_crop: images.starts must be int64, got int32; call .long()"),
    ("crop packed sizes", lambda: crop(packed(sizes=PACKED.sizes[:1])), V,
     "random_resized_crop: images.sizes must be [2, 2], got shape (1, 2)"),
    ("crop packed sizes device", lambda: crop(packed(sizes=meta(PACKED.sizes))), V,
     "random_resized_crop: sizes is on meta, but images is on cpu"),
    ("crop packed too far", lambda: crop(packed(starts=torch.tensor([0, 49]))), V,
     ("random_resized_crop: image 1, of 4 x 8 pixels from place 49 on, does not lie inside the 80 places of "
      "images.pixels")),
    ("crop packed too large", lambda: crop(packed(sizes=torch.tensor([[2**40, 2**40], [4, 8]]))), V,
     ("random_resized_crop: image 0, of 1099511627776 x 1099511627776 pixels from place 0 on, does not lie inside the "
      "80 places of images.pixels")),
    ("crop list of none", lambda: crop([]), V, "PackedImages.pack: images is empty"),
    ("crop list of floats", lambda: crop([PIXELS[0], PIXELS[1].float()]), T,
     "PackedImages.pack: images[1] must be uint8, got float32"),
    ("crop list of arrays", lambda: crop([PIXELS[0].numpy()]), T,
     "PackedImages.pack: images[0] must be a torch.Tensor, got ndarray"),
    ("crop list of channels", lambda: crop([PIXELS[0], PIXELS[1, :1]]), V,
     "PackedImages.pack: images[1] has 1 channels, but images[0] has 3"),
    ("crop list of batches", lambda: crop([PIXELS, PIXELS]), V,
     "PackedImages.pack: images[0] must be [C, H, W], got shape (2, 3, 6, 8)"),
    ("crop list with an empty image", lambda: crop([PIXELS[0], PIXELS[1, :, :, :0]]), V,
     "PackedImages.pack: images[1] is empty, got shape (3, 6, 0)"),
    ("crop list of devices", lambda: crop([PIXELS[0], meta(PIXELS[1])]), V,
     "PackedImages.pack: images[1] is on meta, but images[0] is on cpu"),
    ("boxes sizes 1-D", lambda: random_crop_boxes(torch.tensor([6, 8])), V,
     "random_crop_boxes: sizes must be [N, 2], got shape (2,)"),
    ("boxes sizes float", lambda: random_crop_boxes(torch.rand(2, 2)), T,
     "random_crop_boxes: sizes must be int64, got float32; call .long()"),
    ("boxes scale", lambda: random_crop_boxes(PACKED.sizes, scale=(0.5, 0.2)), V,
     "random_crop_boxes: scale must be two positive numbers in ascending order, got (0.5, 0.2)"),
    ("boxes ratio 0", lambda: random_crop_boxes(PACKED.sizes, ratio=(0, 1)), V,
     "random_crop_boxes: ratio must be two positive numbers in ascending order, got (0, 1)"),
    ("boxes ratio nan", lambda: random_crop_boxes(PACKED.sizes, ratio=(NAN, 1)), V,
     "random_crop_boxes: ratio must be two positive numbers in ascending order, got (nan, 1)"),

    ("backend", lambda: use_backend("cuda"), V,
     "use_backend: name must be one of 'auto', 'triton', 'eager', got 'cuda'"),
]
# fmt: on


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=name) for name, *row in CALLS])
def test_message(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message
