"""Run in the folder above: ``LOCAL_KERNELS={{repo_id}}=. pytest``."""

import kernels
import pytest
import torch

mae = kernels.get_kernel("{{repo_id}}", revision="v{{version}}")
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def step(ops, m):
    """Loss and gradients of a small training step."""
    random = torch.Generator().manual_seed(0)
    sizes = (64, 3, 8, 8), (64,), (1, 16, 64), (1, 1, 64), (192, 64)
    images = torch.rand(3, 3, 32, 32, generator=random).to(DEVICE)
    parameters = [torch.randn(size, generator=random).to(DEVICE).requires_grad_() for size in sizes]
    weight, bias, pos_embed, token, head = parameters
    x = ops.patch_embed(images, weight, bias, pos_embed, m.ids_keep, prefix=token)
    x = ops.scatter_mask_tokens(x, token, m.ids_restore, pos_embed)
    x = x + x.mean(dim=1, keepdim=True)  # as attention would, it tells hidden patches of visible ones
    loss = ops.masked_mse((x @ head.t())[:, 1:], images, patch_size=8, mask=m.mask)
    return loss, *torch.autograd.grad(loss, parameters)


@pytest.mark.kernels_ci
def test_a_step_is_that_of_the_published_code():
    torch.backends.cudnn.allow_tf32 = False  # in the convolution of the reference
    torch.manual_seed(0)
    m = mae.random_masking(3, 16, device=DEVICE)
    for ours, published in zip(step(mae, m), step(mae.reference, m), strict=True):
        assert (ours - published).norm() < 1e-4 * published.norm()


@pytest.mark.kernels_ci
def test_masks_are_those_of_the_published_code():
    noise = torch.rand(3, 16, device=DEVICE)
    masks = zip(mae.random_masking(3, 16, noise=noise), mae.reference.random_masking(3, 16, noise=noise), strict=True)
    assert all(torch.equal(ours, published) for ours, published in masks)
