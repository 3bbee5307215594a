"""What tests of runs share: small ones by the loop and by the command, and what they leave behind."""

import json
import subprocess
import time
from pathlib import Path

import torch
from processes import Command
from safetensors.torch import load_file

from mae import Classifier, HeadConfig, mae_vit_demo_patch7
from mae.data import TensorImages
from mae.training.classification import FinetuneTraining, finetuning
from mae.training.loop import Looks, train
from mae.training.recipe import TrainConfig

SMALL = ["--model", "mae_vit_demo_patch7", "--batch-size", "4", "--device", "cpu"]


def images(count: int = 40) -> TensorImages:
    generator = torch.Generator().manual_seed(5)
    return TensorImages(torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator), seed=3)


def config(steps: int = 12, **options) -> TrainConfig:
    shared = {"batch_size": 8, "base_lr": 0.02, "device": "cpu", "log_every": 1, "workers": 0, "seed": 3}
    return TrainConfig(**shared | {"steps": steps, "eval_every": 10**6} | options)


def run_demo_model(run: Path, mode: str = "new", data: TensorImages | None = None, seed: int = 0, **options):
    torch.manual_seed(seed)
    return train(mae_vit_demo_patch7(), data or images(), config(**options), run, mode)


HEAD = HeadConfig(("boot", "coat", "dress", "shirt", "bag"), fc_norm=True)
# Of everything that is random in fine-tuning; the learning rate rises for 4 of 20 steps.
MIXED = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "drop_path": 0.3, "warmup": 0.2, "base_lr": 0.064}
ALL = {"erase": 0.25, "ema_decay": 0.9}  # beside these, what fine-tuning can be asked for


def labels(count: int = 40) -> torch.Tensor:
    return torch.arange(count) * 7 % 5


def classifier(seed: int = 0, head: HeadConfig = HEAD, **options) -> Classifier:
    """The demo encoder with a head so large that each image has a loss of its own."""
    torch.manual_seed(seed)
    model = Classifier(mae_vit_demo_patch7().config, head, **options)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def finetune_config(steps: int = 12, **options) -> FinetuneTraining:
    shared = {"batch_size": 8, "device": "cpu", "log_every": 1, "workers": 0, "seed": 3, "eval_every": 10**6}
    return FinetuneTraining(steps=steps, **shared | MIXED | options)


def finetune_demo_model(
    run: Path, mode: str = "new", data: TensorImages | None = None, seed: int = 0, looks: Looks | None = None, **options
):
    config = finetune_config(**options)
    model = classifier(seed, drop_path=config.drop_path)
    task = finetuning(model, config, labels())
    return train(model, data or images(), config, run, mode, task=task, looks=looks or Looks())


class Interrupted(Exception):
    pass


class Interrupting(TensorImages):
    """Fails like a power cut in the batch after so many."""

    def __init__(self, data: TensorImages, batches: int):
        super().__init__(data.images, data.seed)
        self.left = batches

    def __getitems__(self, keys):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().__getitems__(keys)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries]


def assert_equal(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(one) == losses(other)


def started(out: Path, data: Path, *options: str, **how) -> Command:
    return Command(out, "pretrain", "--data", str(data), "--out", str(out), *SMALL, *options, **how)


def wait_for_step(out: Path, process: Command | subprocess.Popen, step: int) -> None:
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, f"it ends with {process.poll()}"
        assert time.monotonic() < end
        time.sleep(0.02)
