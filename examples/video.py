"""A masked autoencoder learns clips of moving clothes, under tube masks: a hidden place is hidden in every frame.

Clips of 8 frames are made on the fly, of two pictures that move in straight lines. It prints the loss while it trains,
and on clips of other clothes before and after; a model that predicts the mean pixel everywhere has a loss of 1. Then it
writes runs/video.gif, in which what the model sees, what it predicts and what was there move side by side. It takes a
quarter of a minute on a CPU.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mae import MAEConfig, MaskedAutoencoder, TrainingStep, adamw
from mae.commands.demo import fashion_mnist
from mae.training.step import MaskStrategy
from mae_kernels import tube_masking

FRAMES, SIDE, RATIO = 8, 42, 0.75  # of a clip, its pixels, and the share of patches that is hidden


def moving(pictures: Tensor, count: int) -> Tensor:
    """Clips ``[N, 1, 8, 42, 42]`` uint8 of pictures ``[M, 1, 28, 28]`` that move across them."""
    clips = torch.zeros(count, FRAMES, SIDE, SIDE, dtype=torch.uint8)
    chosen = torch.randint(len(pictures), (count, 2))
    ends = torch.rand(2, count, 2, 2) * (SIDE - 28)  # where each of two pictures begins and where it stops
    for t in range(FRAMES):
        places = torch.lerp(*ends, t / (FRAMES - 1)).round().long()  # [N, 2, 2]
        for i in range(count):
            for picture, (top, left) in zip(chosen[i], places[i].tolist(), strict=True):
                window = clips[i, t, top : top + 28, left : left + 28]
                torch.maximum(window, pictures[picture, 0], out=window)
    return clips[:, None]


def model_of(clips: Tensor) -> MaskedAutoencoder:
    """Patches of 2 frames and 7 x 7 pixels; mae_vit_base_video is the published size of this."""
    std, mean = torch.std_mean(clips / 255)
    config = MAEConfig(
        image_size=(FRAMES, SIDE, SIDE), patch_size=(2, 7, 7), in_chans=1, embed_dim=96, depth=4, num_heads=4,
        decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4, norm_pix_loss=False,
        pixel_mean=(mean.item(),), pixel_std=(std.item(),),
    )  # fmt: skip
    return MaskedAutoencoder(config)


@torch.no_grad()
def held_out_loss(model: MaskedAutoencoder, clips: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)  # the same patches are hidden each time
    return model(clips, masking=tube_masking(len(clips), model.config.sides, RATIO, generator=generator)).loss.item()


def write_gif(model: MaskedAutoencoder, clips: Tensor, path: Path) -> None:
    shown = model.reconstruct(clips, masking=tube_masking(len(clips), model.config.sides, RATIO))
    pixels = torch.cat([shown.masked, shown.reconstruction, shown.original], dim=4)  # [N, 1, T, H, 3 W]
    pixels = torch.cat([*pixels[:, 0]], dim=1).repeat_interleave(2, 1).repeat_interleave(2, 2)  # [T, 2 N H, 6 W]
    first, *others = [Image.fromarray(frame.numpy()) for frame in (255 * pixels).byte()]
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=others, duration=150, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("runs/video.gif"))
    options = parser.parse_args()
    torch.manual_seed(0)
    pictures, test_pictures = fashion_mnist("train_5000")[0], fashion_mnist("test_2000")[0]
    test_clips = moving(test_pictures, 64)
    model = model_of(moving(pictures, 64))
    step = TrainingStep(model, adamw(model, lr=2e-3), strategy=MaskStrategy("tube", RATIO))
    before = held_out_loss(model, test_clips)
    for i in range(1, options.steps + 1):
        loss = step(moving(pictures, 16))
        if i % max(options.steps // 10, 1) == 0:
            print(f"step {i:4}  loss {loss.item():.3f}")
    after = held_out_loss(model, test_clips)
    print(f"loss on clothes not trained on: {before:.3f} before, {after:.3f} after; 1 is to predict the mean pixel")
    write_gif(model, test_clips[:4], options.out)
    print(f"Look at {options.out}: what is seen, what is predicted, what was there.")


if __name__ == "__main__":
    main()
