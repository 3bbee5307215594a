"""What the features are worth, on real pictures, over three seeds: ``python -m benchmarks.quality``.

labels
    Fashion-MNIST with 5, 20, 100 and 500 labels a class, 2000 pictures to test: raw pixels, an untrained encoder, a
    pre-trained one by logistic regression, nearest neighbours and fine-tuning, and the same network from scratch.
    Pre-training sees the 5000 pictures and no label.
ablations
    One thing at a time is changed in a short pre-training, whose features are then probed with all labels.
photographs
    The same as labels, in colour and small: from which of the eight photographs that scikit-image ships is a crop of
    64 x 64 pixels? Crops to learn from and crops to test are of different parts of each. It needs scikit-image.
mask tokens
    Table 2 of He et al. 2021 as a ratio: forward and backward with mask tokens in the encoder, against without.

Each row is appended to the file when it exists, and what the file holds is not computed again. All of it takes 40
minutes of one core; ``--parts`` and ``--seeds`` choose some of it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.mask_tokens import compare
from mae.commands.demo import fashion_mnist
from mae.data import TensorImages
from mae.evaluation.features import extract_features
from mae.evaluation.probe import linear_probe, nearest_neighbours
from mae.model import (
    Classifier,
    HeadConfig,
    MAEConfig,
    MaskedAutoencoder,
    VisionTransformer,
    mae_vit_demo_patch7,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
)
from mae.training.classification import FinetuneTraining, finetuning
from mae.training.loop import train
from mae.training.recipe import TrainConfig

FILE = record.RESULTS / "quality.jsonl"
NEIGHBOURS = 5
# Found on a seed that no row has: without mixing, and from scratch without a decay over the layers.
FINETUNING = {"batch_size": 64, "base_lr": 8e-3, "mixup": 0.0, "cutmix": 0.0}
FINETUNING_STEPS = {5: 200, 20: 300, 100: 600, 500: 800}  # by labels a class
PRETRAINING_STEPS, ABLATION_STEPS = 3500, 250
COMMON = {"device": "cpu", "workers": 0, "eval_every": 10**9, "log_every": 10**6, "save_every": 10**9}


@dataclass(frozen=True)
class Pictures:
    """Pictures to learn from and to test ``[n, C, H, W]`` uint8, and their labels ``[n]``."""

    train: Tensor
    labels: np.ndarray
    test: Tensor
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def with_labels(self, count: int, seed: int) -> "Pictures":
        """So many of each class, others for each seed."""
        draws = np.random.default_rng(seed)
        chosen = [draws.permutation(np.flatnonzero(self.labels == c))[:count] for c in range(self.classes)]
        places = np.concatenate(chosen)
        return replace(self, train=self.train[places], labels=self.labels[places])


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


def read(features: Callable[[Tensor], np.ndarray], pictures: Pictures) -> dict[str, float]:
    """What a logistic regression and nearest neighbours read from the features of pictures."""
    fit, test = features(pictures.train), features(pictures.test)
    votes = nearest_neighbours(*map(torch.from_numpy, (fit, pictures.labels, test)), (NEIGHBOURS,))[NEIGHBOURS]
    probabilities = linear_probe(fit, pictures.labels, test)
    return {
        "linear": accuracy(probabilities, pictures.test_labels),
        "kNN": accuracy(votes.numpy(), pictures.test_labels),
    }


def of_encoder(encoder: VisionTransformer) -> Callable[[Tensor], np.ndarray]:
    return lambda images: extract_features(encoder, images.split(500))


def of_pixels(images: Tensor) -> np.ndarray:
    return images.flatten(1).float().numpy()


def pretrained(config: MAEConfig, images: Tensor, seed: int, **options) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = MaskedAutoencoder(config)
    training = TrainConfig(**COMMON | {"batch_size": 128, "base_lr": 4e-3, "seed": seed} | options)
    with tempfile.TemporaryDirectory() as folder:
        train(model, TensorImages(images, seed), training, Path(folder))
    return model.eval()


def finetuned(encoder: VisionTransformer | MAEConfig, pictures: Pictures, steps: int, seed: int) -> float:
    """Top-1 accuracy of an encoder, or of a network that begins at random, trained with labels."""
    is_new = isinstance(encoder, MAEConfig)
    training = FinetuneTraining(
        **COMMON | FINETUNING, steps=steps, seed=seed, layer_decay=1.0 if is_new else FinetuneTraining.layer_decay
    )
    torch.manual_seed(seed)
    head = HeadConfig(tuple(map(str, range(pictures.classes))), fc_norm=True)
    model = Classifier(encoder if is_new else encoder.config, head, drop_path=training.drop_path)
    if not is_new:
        model.load_encoder(encoder)
    task = finetuning(model, training, torch.from_numpy(pictures.labels))
    with tempfile.TemporaryDirectory() as folder:
        train(model, TensorImages(pictures.train, seed), training, Path(folder), task=task)
    with torch.no_grad():
        logits = torch.cat([model.eval()(part) for part in pictures.test.split(500)])
    return accuracy(logits.numpy(), pictures.test_labels)


class Rows:
    """The file: rows by what they measure."""

    def __init__(self, file: Path):
        self._file = file
        if not file.is_file():
            record.begin(file, "python -m benchmarks.quality", kind="quality")
        self._there = {self._key(row) for row in record.read(file)["rows"]}

    @staticmethod
    def _key(row: dict) -> str:
        return json.dumps({name: row[name] for name in ("part", "seed", "labels", "case") if name in row})

    def has(self, **key) -> bool:
        return self._key(key) in self._there

    def add(self, key: dict, values: dict, since: float) -> None:
        """Values that were computed since a point of the process's time."""
        rounded = {name: float(f"{x:.4g}") for name, x in values.items()}
        took = round(time.process_time() - since, 1)
        self._there.add(self._key(key))
        record.append(self._file, row=key | rounded | {"cpu_s": took, "commit": record.conditions()["commit"]})
        print(key, rounded, flush=True)


def by_labels(
    rows: Rows,
    part: str,
    seed: int,
    pictures: Pictures,
    finetuning_steps: dict[int, int],
    config: MAEConfig,
    **pretraining,
) -> None:
    """Every way to use some labels of a class, for each number of them."""
    keys = [{"part": part, "seed": seed, "labels": count} for count in finetuning_steps]
    if all(rows.has(**key) for key in keys):
        return
    since = time.process_time()
    encoder = pretrained(config, pictures.train, seed, **pretraining)
    torch.manual_seed(seed)
    ways = {"raw pixels": of_pixels, "untrained encoder": of_encoder(VisionTransformer(config).eval())}
    ways["pre-trained encoder"] = of_encoder(encoder)
    for key, count in zip(keys, finetuning_steps, strict=True):
        some = pictures.with_labels(count, seed)
        values = {f"{name}, {how}": x for name, way in ways.items() for how, x in read(way, some).items()}
        values["pre-trained encoder, fine-tuned"] = finetuned(encoder, some, finetuning_steps[count], seed)
        values["the same network from scratch"] = finetuned(config, some, finetuning_steps[count], seed)
        rows.add(key, values, since)
        since = time.process_time()


def fashion() -> Pictures:
    (images, labels), (test, test_labels) = fashion_mnist("train_5000"), fashion_mnist("test_2000")
    return Pictures(images, labels, test, test_labels)


def labels(rows: Rows, seed: int) -> None:
    config = mae_vit_demo_patch7(norm_pix_loss=True).config
    by_labels(rows, "labels", seed, fashion(), FINETUNING_STEPS, config, steps=PRETRAINING_STEPS)


ABLATIONS = {  # the case: fields of the model, and options of the training
    "as above: 75 % random, normalised pixels, 1 decoder block, AdamW": ({}, {}),
    "25 % hidden": ({}, {"mask_ratio": 0.25}),
    "50 % hidden": ({}, {"mask_ratio": 0.5}),
    "90 % hidden": ({}, {"mask_ratio": 0.9}),
    "blocks hidden": ({}, {"masking": "block"}),
    "plain pixels": ({"norm_pix_loss": False}, {}),
    "2 decoder blocks": ({"decoder_depth": 2}, {}),
    "4 decoder blocks": ({"decoder_depth": 4}, {}),
    "cross decoder": ({"decoder": "cross"}, {}),
    "Muon, as long as AdamW takes": ({}, {"optimizer": "muon"}),
}


def ablations(rows: Rows, seed: int) -> None:
    pictures, config = fashion(), mae_vit_demo_patch7(norm_pix_loss=True).config
    for case, (fields, options) in ABLATIONS.items():
        key = {"part": "ablations", "seed": seed, "case": case}
        if rows.has(**key):
            continue
        steps = ABLATION_STEPS
        if "optimizer" in options:
            steps = round(steps * _seconds(config, pictures.train) / _seconds(config, pictures.train, **options))
        since = time.process_time()
        encoder = pretrained(replace(config, **fields), pictures.train, seed, steps=steps, **options)
        took = time.process_time() - since
        rows.add(key, read(of_encoder(encoder), pictures) | {"steps": steps, "training_cpu_s": took}, since)


def _seconds(config: MAEConfig, images: Tensor, **options) -> float:
    """Of a short pre-training, the shorter of two."""
    took = []
    for _ in range(2):
        start = time.process_time()
        pretrained(config, images, 0, steps=30, **options)
        took.append(time.process_time() - start)
    return min(took)


PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry", "hubble_deep_field",
    "stereo_motorcycle",
)  # fmt: skip
SIDE, CROPS, TEST_CROPS = 64, 100, 50  # pixels, and crops of a photograph


def photographs(rows: Rows, seed: int) -> None:
    config = MAEConfig(
        image_size=SIDE, patch_size=8, embed_dim=96, depth=4, num_heads=4, decoder_embed_dim=48, decoder_depth=1,
        decoder_num_heads=4,
    )  # fmt: skip
    by_labels(rows, "photographs", seed, crops_of_photographs(), {5: 100}, config, steps=300, batch_size=64)


def crops_of_photographs() -> Pictures:
    """Crops of the left three fifths of each photograph to learn from, and of the rest to test."""
    import skimage.data

    from mae_kernels import random_crop_boxes, random_resized_crop

    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    generator = torch.Generator().manual_seed(0)
    for name in PHOTOGRAPHS:
        pixels = getattr(skimage.data, name)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels
        whole = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        border = 3 * whole.shape[2] // 5
        for is_train, part, count in ((True, whole[..., :border], CROPS), (False, whole[..., border:], TEST_CROPS)):
            sizes = torch.tensor([part.shape[1:]] * count)
            boxes = random_crop_boxes(sizes, scale=(0.1, 0.4), generator=generator)
            flips = torch.zeros(count, dtype=torch.bool)
            parts[is_train].append(random_resized_crop([part.contiguous()] * count, boxes, flips, (SIDE, SIDE)))
    numbers = np.arange(len(PHOTOGRAPHS))
    fit, test = (torch.cat(parts[is_train]) for is_train in (True, False))
    return Pictures(fit, numbers.repeat(CROPS), test, numbers.repeat(TEST_CROPS))


def mask_tokens(rows: Rows, seed: int) -> None:
    """Once, for the first seed: times of this machine."""
    for name, (make, batch_size) in {"ViT-L": (mae_vit_large_patch16, 4), "ViT-H": (mae_vit_huge_patch14, 2)}.items():
        key = {"part": "mask tokens", "case": name}
        if not seed and not rows.has(**key):
            since = time.process_time()
            rows.add(key, compare(make(), batch_size), since)


PARTS = {"labels": labels, "ablations": ablations, "photographs": photographs, "mask tokens": mask_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--record", type=Path, default=FILE, help="the file to add to")
    options = parser.parse_args()
    rows = Rows(options.record)
    for part in options.parts:
        for seed in options.seeds:
            PARTS[part](rows, seed)


if __name__ == "__main__":
    main()
