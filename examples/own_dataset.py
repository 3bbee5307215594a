"""A masked autoencoder learns pictures that a Dataset of one's own reads and transforms.

The Dataset gives uint8 tensors [C, H, W], and uint8 they stay: the ops of the model divide them by 255 and normalise
them. It prints the losses, which fall on pictures that the model never saw too. Then it saves a checkpoint that every
command of ``python -m mae`` reads, puts labelled pictures beside it, and prints two commands to try on them. It takes a
quarter of a minute on a CPU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mae

SHEETS = Path(mae.__file__).parent / "fashion_mnist"
SIDE, KINDS = 28, 10  # pixels of a picture, and kinds of clothes


class Clothes(Dataset):
    """Pictures ``[1, 28, 28]`` uint8 out of one file in which they lie side by side, sorted by their kind."""

    def __init__(self, sheet: Path, transform: Callable[[Tensor], Tensor] | None = None):
        pixels = torch.from_numpy(np.array(Image.open(sheet)))
        self.pictures = rearrange(pixels, "(rows h) (columns w) -> (rows columns) 1 h w", h=SIDE, w=SIDE)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        picture = self.pictures[i]
        return picture if self.transform is None else self.transform(picture)

    def write(self, folder: Path, count: int) -> None:
        """Some of the pictures as files, in a folder for each kind."""
        for i in range(0, len(self), len(self) // count):
            path = folder / f"kind {i * KINDS // len(self)}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.pictures[i, 0].numpy()).save(path)


def shifted_and_mirrored(picture: Tensor) -> Tensor:
    """By at most two pixels; whatever gives uint8, such as transforms of torchvision, may stand here."""
    top, left = torch.randint(5, (2,)).tolist()
    picture = F.pad(picture, (2, 2, 2, 2))[:, top : top + SIDE, left : left + SIDE]
    return picture.flip(2) if torch.rand(()) < 0.5 else picture


@torch.no_grad()
def held_out_loss(model: mae.MaskedAutoencoder, images: Tensor) -> float:
    noise = torch.rand(len(images), model.config.num_patches, generator=torch.Generator().manual_seed(0))
    return model(images, noise=noise).loss.item()  # the same patches are hidden each time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/own_dataset"))
    options = parser.parse_args()
    torch.manual_seed(0)
    train = Clothes(SHEETS / "fashion_train_5000.png", shifted_and_mirrored)
    test = Clothes(SHEETS / "fashion_test_2000.png")
    loader = DataLoader(train, batch_size=128, shuffle=True, drop_last=True)  # num_workers=8 where reading takes long

    # The smallest of the models. Another would be mae_vit_base_patch16(image_size=(96, 160), in_chans=1, ...).
    std, mean = torch.std_mean(train.pictures / 255)
    model = mae.mae_vit_demo_patch7(pixel_mean=(mean.item(),), pixel_std=(std.item(),))
    step = mae.TrainingStep(model, mae.adamw(model, lr=4e-3))
    total = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(step.optimizer, 4e-3, total, cycle_momentum=False)
    before = held_out_loss(model, test.pictures)
    for epoch in range(1, options.epochs + 1):
        for images in loader:
            loss = step(images)  # forward, backward, update; on a GPU nothing waits for it
            schedule.step()
        print(f"epoch {epoch:3}  loss {loss.item():.3f}")
    after = held_out_loss(model, test.pictures)
    print(f"loss on pictures not trained on: {before:.3f} before, {after:.3f} after; 1 is to predict each patch's mean")

    out = options.out
    mae.save_checkpoint(model, out)
    train.write(out / "train", 500)
    test.write(out / "test", 500)
    print(f"python -m mae reconstruct --checkpoint {out} --images {out / 'test'}")
    print(f"python -m mae linprobe --checkpoint {out} --data {out / 'train'} --test {out / 'test'}")


if __name__ == "__main__":
    main()
