"""The pictures of the documentation, written into docs/pictures: ``python docs/pictures.py masks video``, or all.

Those of photographs need scikit-image beside what ``pip install -e '.[mae]'`` installs. Each model learns for some
minutes on a CPU. Where other programs compute too, ``OMP_NUM_THREADS=1`` is the faster setting.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from mae import MAEConfig, MaskedAutoencoder, load_checkpoint
from mae.commands.demo import fashion_mnist
from mae.data import TensorImages
from mae.data.sound import HOP, RATE, WINDOW, below_loudest, spectrogram
from mae.report.figures import save_reconstructions
from mae.training.loop import train
from mae.training.recipe import TrainConfig
from mae_kernels import (
    PackedImages,
    axis_masking,
    block_masking,
    grid_masking,
    random_crop_boxes,
    random_masking,
    random_resized_crop,
    tube_masking,
)

FOLDER = Path(__file__).parent / "pictures"
RUNS = Path("runs") / "docs"
GREY = {"in_chans": 1, "pixel_mean": (0.286,), "pixel_std": (0.353,)}


def masks() -> None:
    """Each masking strategy at its usual ratio on 14 x 14 patches, tubes in three frames; hidden patches are dark."""
    generator = torch.Generator().manual_seed(8)
    drawn = {
        "random, 75 %": random_masking(1, 196, 0.75, generator=generator),
        "grid, 75 %": grid_masking(1, (14, 14), 0.75, generator=generator),
        "block, 40 %": block_masking(1, (14, 14), 0.4, generator=generator),
        "axis, 75 %": axis_masking(1, (14, 14), 0.75, share=0.4, generator=generator),
        "tube, 90 %": tube_masking(1, (3, 14, 14), 0.9, generator=generator),
    }
    shown = [(title, frame) for title, m in drawn.items() for frame in m.mask.view(-1, 14, 14)]
    figure, axes = plt.subplots(1, len(shown), figsize=(1.5 * len(shown), 1.72), layout="constrained")
    for ax, (title, frame) in zip(axes, shown, strict=True):
        ax.pcolormesh(frame.flip(0), cmap="Blues", vmin=-0.3, vmax=1.2, edgecolors="white", linewidth=0.4)
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.set_frame_on(False)
        ax.set_title(title, fontsize=8)
    figure.savefig(FOLDER / "masks.png", dpi=110)
    plt.close(figure)


def images() -> None:
    """Six clothes in a rectangle; the same checkpoint then takes squares of four."""
    seen, unseen = clothes()
    recipe = recipe_of(steps=2500, base_lr=0.016)
    model = model_of(image_size=(56, 84), patch_size=7, **GREY)
    learn("images", model, lambda n, g: mosaic(some(seen, 6 * n, g), n, rows=2), recipe)
    draw("images", model, mosaic(unseen[50::111], 3, rows=2), recipe, per_row=1)
    square = load_checkpoint(RUNS / "images", image_size=56)
    draw("sizes", square, mosaic(unseen[5::167], 3, rows=2), recipe, per_row=1)


def channels() -> None:
    """Clothes in six bands of 16 bits, each piece with a spectrum of its own; the first three are drawn as colours."""
    seen, unseen = clothes()

    def bands(pieces: Tensor, generator: torch.Generator) -> Tensor:
        spectrum = 40 * torch.rand(len(pieces), 6, 1, 1, generator=generator)  # to 10,200, as reflectances
        return (spectrum * pieces).to(torch.uint16)

    recipe = recipe_of(steps=2500, base_lr=0.016)
    model = model_of(image_size=28, patch_size=7, in_chans=6, pixel_mean=(1500.0,) * 6, pixel_std=(2300.0,) * 6)
    learn("channels", model, lambda n, g: bands(some(seen, n, g), g), recipe)
    draw("channels", model, bands(unseen[7::222], torch.Generator().manual_seed(2)), recipe, channels=3)


def video() -> None:
    """Windows that move over photographs: eight frames, of which 75 % are hidden."""
    seen, unseen = photographs()
    recipe = recipe_of(steps=2400)
    model = model_of(image_size=(8, 64, 64), patch_size=(2, 8, 8))
    learn("video", model, lambda n, g: recoloured(clips(seen, n, g), g), recipe)
    draw("video", model, clips(unseen, len(unseen.starts), torch.Generator().manual_seed(2)), recipe)


def volume() -> None:
    """Random ellipsoids inside a shell, as in the phantom of Shepp and Logan, and their central slices."""
    recipe = recipe_of(steps=800)
    model = model_of(image_size=(32, 48, 48), patch_size=(4, 8, 8), in_chans=1, pixel_mean=(0.15,), pixel_std=(0.2,))
    learn("volume", model, phantoms, recipe)
    draw("volume", model, phantoms(3, torch.Generator().manual_seed(1)), recipe, view="slices")


def sound() -> None:
    """Log-mel spectrograms of chirps and harmonic tones, with whole frequencies and times hidden."""
    recipe = recipe_of(steps=1500, base_lr=0.016, masking="axis")
    model = model_of(image_size=(64, 128), patch_size=8, in_chans=1, pixel_mean=(0.4,), pixel_std=(0.25,))
    learn("sound", model, tones, recipe)
    draw("sound", model, tones(3, torch.Generator().manual_seed(1)), recipe, view="sound")


def recipe_of(steps: int, base_lr: float = 0.024, **options) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=16, base_lr=base_lr, device="cpu", precision="bfloat16", workers=0, **options
    )


def model_of(**sizes) -> MaskedAutoencoder:
    """A small model that predicts plain pixels, so that its pictures borrow nothing from what is hidden."""
    torch.manual_seed(0)
    encoder = {"embed_dim": 192, "depth": 6, "num_heads": 6}
    decoder = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4}
    return MaskedAutoencoder(MAEConfig(**sizes, **encoder, **decoder, norm_pix_loss=False))


def learn(
    name: str, model: MaskedAutoencoder, batch: Callable[[int, torch.Generator], Tensor], recipe: TrainConfig
) -> None:
    train(model, Drawn(batch, recipe.steps * recipe.batch_size), recipe, RUNS / name, "overwrite")
    model.eval()


class Drawn(TensorImages):
    """Images that are computed when they are asked for, no two alike."""

    def __init__(self, batch: Callable[[int, torch.Generator], Tensor], count: int):
        self.batch, self.count, self.seed = batch, count, 0

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        numbers = [index for _, index in keys]
        return self.batch(len(keys), torch.Generator().manual_seed(numbers[0])), numbers


def draw(
    name: str, model: MaskedAutoencoder, images: Tensor, recipe: TrainConfig, channels: int | None = None, **options
) -> None:
    """Reconstructions of images under a mask of the recipe's kind; of their channels the first ones, or all."""
    grid = model.patch_grid(images).grid
    masking = recipe.strategy(len(images), grid, generator=torch.Generator().manual_seed(0))
    pictures = model.reconstruct(images, masking=masking)
    parts = ("masked", "reconstruction", "original")
    pictures = pictures._replace(**{part: getattr(pictures, part)[:, :channels] for part in parts})
    file = FOLDER / f"{name}.png"
    save_reconstructions(pictures, file, **options)
    Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)  # a palette takes a fifth of the bytes


def clothes() -> tuple[Tensor, Tensor]:
    """Grey pictures ``[N, 1, 28, 28]`` of Fashion-MNIST, of which a model sees the first and never the second ones."""
    return fashion_mnist("train_5000")[0], fashion_mnist("test_2000")[0]


def some(pieces: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return pieces[torch.randint(len(pieces), (count,), generator=generator)]


def mosaic(pieces: Tensor, count: int, rows: int) -> Tensor:
    """Count images of so many rows of the pieces."""
    return rearrange(pieces, "(n r c) k h w -> n k (r h) (c w)", n=count, r=rows)


def photographs() -> tuple[PackedImages, PackedImages]:
    """Those of which a model sees crops, and three that it never sees: a cat, a portrait and a cup of coffee."""
    from skimage import data

    china, flower = load_sample_images().images
    with get_sample_data("grace_hopper.jpg") as file:
        portrait = np.asarray(Image.open(file))
    names = ["astronaut", "camera", "rocket", "hubble_deep_field", "retina", "immunohistochemistry"]
    names += ["coins", "moon", "brick", "grass"]
    seen = [china, flower, data.stereo_motorcycle()[0], *(getattr(data, name)() for name in names)]
    return _packed(seen), _packed([data.cat(), portrait, data.coffee()])


def _packed(photographs: list[np.ndarray]) -> PackedImages:
    images = [Image.fromarray(x).convert("RGB") for x in photographs]
    for image in images:
        image.thumbnail((640, 640))
    return PackedImages.pack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def clips(photographs: PackedImages, count: int, generator: torch.Generator) -> Tensor:
    """``[N, 3, 8, 64, 64]`` uint8, of each photograph in turn: a window that moves and zooms.

    It goes from one random square a sixth of the way to another.
    """
    n, frames = torch.arange(count) % len(photographs.starts), 8
    first, other = (random_crop_boxes(photographs.sizes[n], ratio=(1, 1), generator=generator) for _ in range(2))
    way = torch.linspace(0, 1 / 6, frames)[:, None]
    boxes = (first[:, None] + way * (other - first)[:, None]).long()  # [N, T, 4]
    flips = torch.rand(count, generator=generator) < 0.5
    n, flips = n.repeat_interleave(frames), flips.repeat_interleave(frames)
    frames_of = PackedImages(photographs.pixels, photographs.starts[n], photographs.sizes[n])
    windows = random_resized_crop(frames_of, boxes.flatten(0, 1), flips, 64)  # [N * T, 3, 64, 64]
    return rearrange(windows, "(n t) c h w -> n c t h w", n=count)


def recoloured(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Each clip with its colours in another order and darker: a dozen photographs alone would be learned by heart."""
    order = torch.rand(len(clips), 3, generator=generator).argsort(dim=1)
    light = 0.5 + 0.5 * torch.rand(len(clips), 3, 1, 1, 1, generator=generator)
    return (light * clips[torch.arange(len(clips))[:, None], order]).to(torch.uint8)


def phantoms(count: int, generator: torch.Generator) -> Tensor:
    """``[N, 1, 32, 48, 48]`` uint8: a bright shell, and ten ellipsoids inside that add to its content or take away."""
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in (32, 48, 48)), indexing="ij")

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, 1, generator=generator)

    radii, turn = draw(0.65, 0.95, 3), draw(0, 3.2)
    outside = _distance(x, y, z, draw(-0.05, 0.05, 3), radii, turn)
    volume = 0.8 * (outside < 1) - 0.5 * (outside < 0.85)
    for _ in range(10):
        inside = _distance(x, y, z, draw(-0.45, 0.45, 3), draw(0.08, 0.35, 3), draw(0, 3.2))
        volume += draw(-0.25, 0.45) * (inside < 1) * (outside < 0.8)
    return (255 * volume.clamp(0, 1)).to(torch.uint8)[:, None]


def _distance(x: Tensor, y: Tensor, z: Tensor, centre: Tensor, radii: Tensor, turn: Tensor) -> Tensor:
    """From the centre of an ellipsoid that is turned in the plane of a slice, 1 on its surface."""
    x, y, z = x - centre[:, 0], y - centre[:, 1], z - centre[:, 2]
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    return ((along / radii[:, 0]) ** 2 + (across / radii[:, 1]) ** 2 + (z / radii[:, 2]) ** 2).sqrt()


def tones(count: int, generator: torch.Generator) -> Tensor:
    """``[N, 1, 64, 128]`` uint8: spectrograms of two harmonic tones that begin and end, and a chirp, in some noise."""
    random = np.random.default_rng(torch.randint(2**31, (), generator=generator).item())
    columns = 128
    seconds = np.arange((columns - 1) * HOP + WINDOW) / RATE
    pictures = []
    for _ in range(count):
        low, high = np.exp(random.uniform(np.log(200), np.log(7000), 2))
        chirp = np.sin(2 * np.pi * (low * seconds + (high - low) * seconds**2 / (2 * seconds[-1])))
        samples = chirp + 0.003 * random.standard_normal(len(seconds))
        for _ in range(2):
            begin, pitch = random.uniform(0, 0.8 * seconds[-1]), random.uniform(250, 1000)
            sounding = (begin < seconds) & (seconds < begin + random.uniform(0.2, 0.8))
            harmonics = np.arange(1, 7900 // pitch + 1)[:, None]
            samples += sounding * (np.sin(2 * np.pi * pitch * harmonics * seconds) / harmonics).sum(axis=0)
        pictures.append(below_loudest(spectrogram(samples, 64, columns)))
    return torch.from_numpy(255 * np.stack(pictures)).to(torch.uint8)[:, None]


if __name__ == "__main__":
    for name in sys.argv[1:] or ("masks", "images", "channels", "video", "volume", "sound"):
        globals()[name]()
