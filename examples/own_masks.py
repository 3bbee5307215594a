"""Masks that come from the data: what is hidden follows the pictures, and what is missing is neither seen nor scored.

Two small models are trained. For one, patches that show clothes are hidden and dark ones visible, so that pictures
differ in how many are hidden. For the other, pictures have gaps, such as clouds in satellite images, and patches in a
gap are never seen and never scored. It prints the losses and three equalities: the loss of a batch with unequal counts
is that of its pictures alone, whatever stands in a gap changes nothing, and masked_mse gives what a line of PyTorch
gives. It takes a quarter of a minute on a CPU.
"""

import argparse

import torch
from torch import Tensor

from mae import MaskedAutoencoder, TrainingStep, adamw, mae_vit_demo_patch7
from mae.commands.demo import fashion_mnist
from mae_kernels import Masking, masked_mse, masking_from_mask, patchify, random_masking

PATCH, PATCHES = 7, 16  # pixels of a side, and patches of a picture


def clothes_hidden(images: Tensor, share: float = 0.8) -> Masking:
    """Hide most of the patches that show something: ``[N, 1, 28, 28]`` -> masks of unequal counts."""
    brightness = patchify(images.float(), PATCH).amax(2)  # [N, L]
    hidden = (brightness > 40) & (torch.rand(brightness.shape) < share)
    hidden.scatter_(1, brightness.argmin(1, keepdim=True), False)  # at least one patch has to be visible
    return masking_from_mask(hidden, num_keep=PATCHES)  # of which any number from 1 to num_keep is


def with_gaps(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures, a band of which is missing, and ``[N, 1, 28, 28]`` bool: where."""
    top = torch.randint(28, (len(images), 1, 1, 1))
    rows = torch.arange(28).view(1, 1, -1, 1)
    missing = ((rows >= top) & (rows < top + 5)).expand(images.shape)
    return images.masked_fill(missing, 0), missing


def gaps_left_out(missing: Tensor, keep: int = 4) -> Masking:
    """Random masks in which a patch with a missing pixel is hidden, but no patch to predict."""
    invalid = patchify(missing.float(), PATCH).amax(2) > 0  # [N, L]
    masking = random_masking(*invalid.shape, 1 - keep / PATCHES, noise=torch.rand(invalid.shape) + invalid.float())
    ids_mask = masking.ids_mask  # the last in the order of noise: gaps among them
    return masking._replace(ids_mask=ids_mask.masked_fill(invalid.gather(1, ids_mask), -1))  # -1 is no patch


def train(images: Tensor, steps: int, gaps: bool) -> MaskedAutoencoder:
    model = mae_vit_demo_patch7()
    step = TrainingStep(model, adamw(model, lr=2e-3))
    for i in range(1, steps + 1):
        batch = images[torch.randint(len(images), (64,))]
        if gaps:
            batch, missing = with_gaps(batch)
        loss = step(batch, gaps_left_out(missing) if gaps else clothes_hidden(batch))
        if i % max(steps // 5, 1) == 0:
            print(f"step {i:4}  loss {loss.item():.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of each of the two models")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, test_images = fashion_mnist("train_5000")[0], fashion_mnist("test_2000")[0][::250]  # uint8

    print("clothes are hidden:")
    model = train(images, steps, gaps=False).eval()
    masking = clothes_hidden(test_images)
    counts = masking.mask.sum(1)
    with torch.no_grad():
        together = model(test_images, masking=masking).loss
        alone = [
            model(picture[None], masking=masking_from_mask(mask[None])).loss
            for picture, mask in zip(test_images, masking.mask, strict=True)
        ]
    weighted = (torch.stack(alone) * counts).sum() / counts.sum()  # the mean over all hidden patches of the batch
    print(f"{counts.tolist()} of {PATCHES} patches hidden: loss {together:.6f} together, {weighted:.6f} alone")

    print("pictures have gaps:")
    model = train(images, steps, gaps=True).eval()
    holed, missing = with_gaps(test_images)
    masking = gaps_left_out(missing)
    noisy = torch.where(missing, torch.randint_like(holed, 256), holed)
    with torch.no_grad():
        losses = [model(x, masking=masking).loss for x in (holed, noisy)]
        pred = model(holed, masking=masking, return_pred=True).pred  # [N, L, E]
    print(f"gaps filled with zeros: loss {losses[0]:.6f}, with noise: {losses[1]:.6f}")

    scored = torch.zeros(len(pred), 1 + PATCHES).scatter(1, masking.ids_mask + 1, 1.0)[:, 1:]  # [N, L]
    pixels = model.patch_embed.floating_pixels(holed)
    by_function = masked_mse(pred, pixels, patch_size=PATCH, mask=scored.bool(), norm_pix=False)
    by_hand = (pred - patchify(pixels, PATCH))[scored.bool()].square().mean()
    print(f"plain pixels as target: loss {by_function:.6f} by masked_mse, {by_hand:.6f} by hand")


if __name__ == "__main__":
    main()
