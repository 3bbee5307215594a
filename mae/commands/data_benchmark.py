"""``python -m mae pretrain --data-benchmark``: whether the loader or the step is the limit."""

import time
from statistics import median

import torch

from mae.data import Batches, TrainingImages, on_device
from mae.data.workers import usable_cores
from mae.model import MaskedAutoencoder
from mae.training.loop import choose_execution, uses_bfloat16
from mae.training.optimizers import adamw
from mae.training.recipe import TrainConfig
from mae.training.step import TrainingStep

_WORKERS = (0, 1, 2, 4)
_BATCHES, _WARM_UP, _STEPS = 6, 2, 3


def data_benchmark(images: TrainingImages, model: MaskedAutoencoder, config: TrainConfig, device: torch.device) -> None:
    """Print images a second of the loader for each number of workers, and of the step."""
    model.to(device).train()
    step = TrainingStep(
        model,
        adamw(model, 0.0),  # the weights stay as they are
        strategy=config.strategy,
        bfloat16=uses_bfloat16(config.precision, device),
        execution=choose_execution(config.execution, device),
        micro_batches=config.micro_batches,
    )
    batch, took = next(on_device(Batches(images, config.batch_size, range(1)), device)), []
    for _ in range(_STEPS + 1):
        start = time.perf_counter()
        step(batch.images).item()
        took.append(time.perf_counter() - start)
    trained = config.batch_size / median(took[1:])
    loaded = {}
    print(f"{'workers':>8}{'loaded images/s':>18}{'trained images/s':>18}   limit")
    for workers in _WORKERS:
        loaded[workers] = _loaded(images, config.batch_size, workers, device)
        limit = "the loader" if loaded[workers] < trained else "the step"
        print(f"{workers:>8}{loaded[workers]:>18.0f}{trained:>18.1f}   {limit}")
    if images.source.blocks is not None:
        print("These row groups are open already: see in a run how long it waits for the data of a network")
    enough = [workers for workers, rate in loaded.items() if rate > trained]
    cores = usable_cores()
    if enough:
        print(f"--workers {enough[0]} is enough. Workers and training share {cores} cores")
    else:
        print(f"The loader is the limit; {cores} cores are here. python -m mae pack makes smaller files of the images")


def _loaded(images: TrainingImages, batch_size: int, workers: int, device: torch.device) -> float:
    batches = iter(on_device(Batches(images, batch_size, range(_WARM_UP + _BATCHES), workers=workers), device))
    for _ in range(_WARM_UP):
        next(batches)
    start = time.perf_counter()
    for batch in batches:
        last = batch
    last.images.flatten()[0].item()
    return batch_size * _BATCHES / (time.perf_counter() - start)
