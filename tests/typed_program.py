"""What a person writes with types: mypy checks it in ``make lint``, and test_types.py runs it.

Wrong calls are marked as such, and mypy says so where it no longer sees that they are wrong.
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

import mae
import mae_kernels
from mae_kernels import nn


def right_calls() -> None:
    images = torch.rand(2, 1, 28, 28)
    masking = mae_kernels.random_masking(2, 16, 0.75, count="masked")
    assert_type(masking, mae_kernels.Masking)
    ids_keep, _, ids_restore, mask = masking
    assert_type(mask, Tensor)
    tokens = mae_kernels.patch_embed(images, torch.rand(8, 1, 7, 7), ids_keep=ids_keep, prefix=torch.rand(1, 8))
    assert_type(tokens, Tensor)
    assert_type(mae_kernels.scatter_mask_tokens(tokens, torch.rand(8), ids_restore), Tensor)
    pred = mae_kernels.patchify(images, 7)
    assert_type(mae_kernels.masked_mse(pred, images, patch_size=7, mask=mask, norm_pix="channel"), Tensor)
    assert_type(mae_kernels.reference.masked_mse(pred, images, patch_size=(7, 7), mask=mask), Tensor)
    assert_type(mae_kernels.why_not_triton(images), list[str])
    with mae_kernels.use_backend("eager") as backend:
        assert_type(backend, mae_kernels.use_backend)
    embed = nn.MaskedPatchEmbed(7, 1, 8, pixel_mean=[0.5], pixel_std=[0.25])
    assert_type(embed.forward(images, ids_keep), Tensor)
    assert_type(embed.pixel_mean, Tensor | None)

    model = mae.mae_vit_demo_patch7(norm_pix_loss=False)
    assert_type(model, mae.MaskedAutoencoder)
    assert_type(model.forward(images, masking=masking), mae.MAEOutput)
    assert_type(model.reconstruct(images).reconstruction, Tensor)
    assert_type(mae.MODELS["mae_vit_demo_patch7"](), mae.MaskedAutoencoder)
    step = mae.TrainingStep(model, mae.adamw(model, 1e-3))
    assert_type(step(images), Tensor)


def wrong_calls(images: Tensor) -> None:
    mae_kernels.random_masking(2, 16, 0.75, count="hidden")  # type: ignore[arg-type]
    mae_kernels.patch_embed(images)  # type: ignore[call-arg]
    mae_kernels.patchify(images, 7, layout="rows")  # type: ignore[arg-type]
    mae_kernels.masked_mse(images, images, patch_size=7, norm_pix="patch")  # type: ignore[arg-type]
    mae_kernels.reference.patchify(images, "7")  # type: ignore[arg-type]
    nn.MaskedMSELoss(patch_size=7.0)  # type: ignore[arg-type]
    mae.MAEConfig(decoder="both")  # type: ignore[arg-type]
    mae.nothing_of_this_name  # type: ignore[attr-defined]  # noqa: B018
