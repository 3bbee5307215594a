"""What the trainer adds to a bare step on this machine: ``python -m benchmarks.loop``.

Rounds of bare steps and of the loop alternate, with the same small model and batch size; shown are medians. The loop
orders and flips images, draws masks, sets the learning rate, watches signals, logs every 20 steps and writes
TensorBoard's events.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from mae.commands.demo import fashion_mnist
from mae.data import TensorImages
from mae.model import MaskedAutoencoder, mae_vit_demo_patch7
from mae.training.loop import train
from mae.training.optimizers import adamw
from mae.training.recipe import TrainConfig
from mae.training.step import TrainingStep

BATCH_SIZE, STEPS = 128, 200


def bare(model: MaskedAutoencoder, images: torch.Tensor) -> float:
    """Seconds a step."""
    step = TrainingStep(model, adamw(model, 1e-4))
    step(images[:BATCH_SIZE])
    start = time.perf_counter()
    for i in range(STEPS):
        first = i * BATCH_SIZE % (len(images) - BATCH_SIZE)
        step(images[first : first + BATCH_SIZE])
    return (time.perf_counter() - start) / STEPS


def looped(model: MaskedAutoencoder, images: torch.Tensor) -> float:
    """Seconds a step, from the first entry of the metrics to the last but one, behind which the run is saved."""
    config = TrainConfig(steps=STEPS + 40, batch_size=BATCH_SIZE, device="cpu", workers=0, eval_every=10**9)
    with tempfile.TemporaryDirectory() as folder:
        train(model, TensorImages(images), config, Path(folder))
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return (seconds[-2] - seconds[0]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    model, images = mae_vit_demo_patch7(), fashion_mnist("train_5000")[0]
    times = [(bare(model, images), looped(model, images)) for _ in range(parser.parse_args().rounds)]
    of_bare, of_loop = (median(x) for x in zip(*times, strict=True))
    added = median(loop / step - 1 for step, loop in times)
    print(f"{BATCH_SIZE} images: a bare step {1e3 * of_bare:.2f} ms, in the loop {1e3 * of_loop:.2f} ms, {added:+.1%}")


if __name__ == "__main__":
    main()
