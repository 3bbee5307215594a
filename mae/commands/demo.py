"""A masked autoencoder learns on real pictures, on a laptop's CPU, within minutes."""

import sys
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.checkpoints.checkpoint import load_checkpoint
from mae.checkpoints.saving import write_json
from mae.commands.pictures import put_picture
from mae.data import TensorImages
from mae.evaluation.features import extract_features
from mae.evaluation.probe import linear_probe
from mae.model import MaskedAutoencoder, mae_vit_demo_patch7
from mae.report.page import write_report
from mae.run_files import RESULTS
from mae.training.loop import train
from mae.training.recipe import Recipe, TrainConfig
from mae.training.run import Mode, refuse_run

_CLASSES, _SIDE, _PER_ROW = 10, 28, 50


@dataclass(frozen=True)
class DemoConfig:
    """Pre-train on the Fashion-MNIST pictures that ship with the package, reconstruct held-out ones, probe."""

    out: Path = Path("runs/demo")
    """Folder for pictures, metrics and the checkpoint."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    steps: int = 4000
    """Optimizer steps; the default takes about two minutes on two cores."""
    seed: int = 0
    """Of weights, order of images and masks."""


def fashion_mnist(part: str) -> tuple[Tensor, np.ndarray]:
    """Images ``[N, 1, 28, 28]`` uint8 and labels ``[N]`` of ``"train_5000"`` or ``"test_2000"``."""
    with resources.files("mae").joinpath(f"fashion_mnist/fashion_{part}.png").open("rb") as file:
        sheet = np.asarray(Image.open(file))  # tiles, _PER_ROW a row, sorted by class
    tiles = sheet.reshape(-1, _SIDE, _PER_ROW, _SIDE).transpose(0, 2, 1, 3).reshape(-1, 1, _SIDE, _SIDE)
    labels = np.arange(_CLASSES).repeat(len(tiles) // _CLASSES)
    return torch.from_numpy(tiles.copy()), labels


def run_demo(config: DemoConfig) -> dict[str, float]:
    """Print what happens and return the probe's accuracies by kind of feature."""
    training = TrainConfig(
        steps=config.steps, batch_size=128, base_lr=4e-3, seed=config.seed, device="cpu", workers=0, eval_every=10**9
    )
    refuse_run(config.out, config.overwrite)
    torch.manual_seed(config.seed)
    # Pixel targets give honest pictures: normalised ones would borrow contrast from the answer.
    model = mae_vit_demo_patch7(norm_pix_loss=False)
    images, labels = fashion_mnist("train_5000")
    test_images, test_labels = fashion_mnist("test_2000")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"Pre-training a masked autoencoder of {parameters / 1e6:.1f} M parameters on {len(images)} Fashion-MNIST\n"
        "pictures, without their labels: 12 of 16 patches are hidden, and the model predicts their pixels."
    )
    untrained = extract_features(model, images.split(500)), extract_features(model, test_images.split(500))
    options = {"model": mae_vit_demo_patch7.__name__} | asdict(training)
    recipe = Recipe(options, {"images": len(images)}, training.schedule(len(images)))
    mode: Mode = "overwrite" if config.overwrite else "new"
    train(model, TensorImages(images, config.seed), training, config.out, mode, recipe=recipe)

    model = load_checkpoint(config.out)
    assert isinstance(model, MaskedAutoencoder)
    shown = test_images[:: len(test_images) // 18][:18]
    noise = torch.rand(len(shown), model.config.num_patches, generator=torch.Generator().manual_seed(0))
    picture = put_picture(model.reconstruct(shown, noise=noise), config.out, config.steps)

    print("\nLinear probe: 5000 labelled pictures to fit, 2000 never seen before to test")
    trained = extract_features(model, images.split(500)), extract_features(model, test_images.split(500))
    raw = images.flatten(1).float().numpy(), test_images.flatten(1).float().numpy()
    accuracies = {}
    print(f"  {'features':<24}{'per picture':>12}{'top-1':>9}")
    for name, (fit, test) in {
        "raw pixels": raw,
        "untrained encoder": untrained,
        "pre-trained encoder": trained,
    }.items():
        accuracies[name] = float((linear_probe(fit, labels, test).argmax(1) == test_labels).mean())
        print(f"  {name:<24}{fit.shape[1]:>12}{accuracies[name]:>9.1%}")
    result = {"command": "demo", "images": len(images), "test_images": len(test_images), "top1": accuracies}
    write_json(config.out, {RESULTS: [result]})
    report = write_report(config.out)
    print(
        f"\nLook at {picture} and {report}; the model is in {config.out}.\n"
        "Next, your own images (any folder of pictures; this recipe is for a first look without a GPU):\n"
        f"  {_python()} -m mae pretrain --data FOLDER --recipe cpu --out runs/mine\n"
        f"  {_python()} -m mae reconstruct --checkpoint runs/mine --images FOLDER"
    )
    return accuracies


def _python() -> str:
    """This interpreter as one would type it here: a virtual environment below this folder need not be active."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else "python"
