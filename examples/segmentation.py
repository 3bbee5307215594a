"""Clothes found pixel by pixel, on a pre-trained encoder and at twice its size, on a CPU within half a minute."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae import load_checkpoint, mae_vit_demo_patch7
from mae.commands.demo import fashion_mnist
from mae.model import VisionTransformer

SIDE, PRODUCTS = 56, 2  # pixels of a canvas, and products on it
CLASSES = 11  # ten kinds of product, and the background
THRESHOLD = 20  # pixels above it are product


class Segmenter(nn.Module):
    """A convolution on feature maps of two depths of an encoder."""

    def __init__(self, encoder: VisionTransformer, frozen: bool):
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        depth, dim = encoder.config.depth, encoder.config.embed_dim
        self.blocks = [depth // 2 - 1, depth - 1]
        self.head = nn.Sequential(nn.BatchNorm2d(2 * dim), nn.Conv2d(2 * dim, CLASSES, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:  # [N, 1, 56, 56] uint8 -> logits [N, 11, 56, 56]
        images = images.expand(-1, self.encoder.config.in_chans, -1, -1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.encoder.forward_intermediates(images, self.blocks, norm=True, intermediates_only=True)
        return F.interpolate(self.head(torch.cat(maps, 1)), images.shape[-2:], mode="bilinear")


def canvases(products: Tensor, kinds: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Products ``[M, 1, 28, 28]`` at random places: pictures ``[N, 1, 56, 56]`` uint8, and the kind of each pixel."""
    pictures = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8)
    labels = torch.full((count, SIDE, SIDE), CLASSES - 1)
    chosen = torch.randint(len(products), (count, PRODUCTS), generator=generator)
    places = 7 * torch.randint((SIDE - 28) // 7 + 1, (count, PRODUCTS, 2), generator=generator)  # whole patches
    for i in range(count):
        for product, (top, left) in zip(chosen[i], places[i].tolist(), strict=True):
            window = slice(top, top + 28), slice(left, left + 28)
            is_product = products[product, 0] > THRESHOLD  # a later one lies above an earlier one
            pictures[i, 0][window] = torch.where(is_product, products[product, 0], pictures[i, 0][window])
            labels[i][window] = torch.where(is_product, kinds[product], labels[i][window])
    return pictures, labels


@torch.no_grad()
def mean_iou(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Of pixels predicted to be of a class and pixels that are: those in both over those in either, mean of classes."""
    model.eval()
    predicted = torch.cat([model(x).argmax(1) for x in pictures.split(50)])
    model.train()
    counts = torch.bincount((labels * CLASSES + predicted).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    both = counts.diag()
    return (both / (counts.sum(0) + counts.sum(1) - both)).mean().item()


def pretrain(images: Tensor, steps: int) -> VisionTransformer:
    """A small masked autoencoder of the products themselves, 28x28 pixels, without their labels."""
    model = mae_vit_demo_patch7()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(steps):
        loss = model(images[torch.randint(len(images), (64,))]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"pre-trained for {steps} steps, to a loss of {loss.item():.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="run folder, such as the demo's; patches must divide 56 pixels")
    parser.add_argument("--frozen", action="store_true", help="train the head alone, not the encoder")
    parser.add_argument("--steps", type=int, default=150, help="of pre-training, and as many of segmentation")
    options = parser.parse_args()
    torch.manual_seed(0)
    (images, kinds), (test_images, test_kinds) = fashion_mnist("train_5000"), fashion_mnist("test_2000")
    kinds, test_kinds = torch.from_numpy(kinds), torch.from_numpy(test_kinds)
    encoder = load_checkpoint(options.checkpoint) if options.checkpoint else pretrain(images, options.steps)

    model = Segmenter(encoder, options.frozen)
    generator = torch.Generator().manual_seed(0)
    held_out = canvases(test_images, test_kinds, 100, generator)
    before = mean_iou(model, *held_out)
    groups = [{"params": model.head.parameters(), "lr": 1e-2}]
    if not options.frozen:  # what has learned already takes smaller steps
        groups.append({"params": encoder.parameters(), "lr": 1e-3})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [x["lr"] for x in groups], options.steps)
    for step in range(1, options.steps + 1):
        pictures, labels = canvases(images, kinds, 16, generator)
        loss = F.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(options.steps // 10, 1) == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")
    after = mean_iou(model, *held_out)
    print(f"mean IoU of {CLASSES} classes on products not trained on: {before:.3f} before, {after:.3f} after;")
    empty = (held_out[1] == CLASSES - 1).float().mean().item() / CLASSES
    print(f"of pictures taken for nothing but background it is {empty:.3f}")


if __name__ == "__main__":
    main()
