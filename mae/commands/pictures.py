"""The pictures and the report of a run, while it goes on and when it ends."""

import os
import warnings
from pathlib import Path

import torch

from mae.data import DataWarning, Reading, Source, is_sound, read_pictures
from mae.data.randomness import derived_seed
from mae.model import MaskedAutoencoder
from mae.report.figures import default_count, save_reconstructions
from mae.report.page import write_report
from mae.training.step import MaskStrategy
from mae_kernels import Masking

FOLDER = "reconstructions"


class Drawing:
    """Callable: reconstructions of the same images under the same masks, as the picture of a step."""

    def __init__(self, source: Source, reading: Reading, strategy: MaskStrategy, run: Path, seed: int = 0):
        self._source, self._reading, self._strategy, self._run, self._seed = source, reading, strategy, run, seed
        self._images = self._view = self._says = None

    def __call__(self, model: MaskedAutoencoder, step: int) -> Path:
        if self._images is None:
            most = default_count(self._reading.image_size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)  # training says them
                pictures, numbers = zip(*read_pictures(self._source, self._reading, most), strict=True)
            self._images = torch.stack(pictures)
            sound = all(is_sound(Path(self._source.name(i))) for i in numbers)
            self._view = "sound" if sound else "frames"
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(derived_seed("held out", self._seed, (2, 0)))
        masking = self._strategy(len(self._images), model.config.grid.grid, generator=generator)
        result = model.reconstruct(self._images.to(device), masking=Masking(*(x.to(device) for x in masking)))
        file = self._run / FOLDER / f"step-{step:06}.png"
        file.parent.mkdir(exist_ok=True)
        beside = file.with_name(f".{file.name}")
        save_reconstructions(result, beside, view=self._view)
        os.replace(beside, file)
        return file

    def finish(self) -> None:
        """Write the report of what there is."""
        if (self._run / "metrics.jsonl").is_file():
            write_report(self._run)
