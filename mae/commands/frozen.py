"""What the quick linear probe and kNN have in common: features of a pre-trained and of an untrained encoder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mae.commands.labelled_run import FEATURES_OF, LabelledOptions
from mae.commands.results import Results, Table
from mae.data import Labelled, Reading, counted, open_train_and_test, printable, usable_workers
from mae.data.whole import refuse_unreadable
from mae.evaluation.features import LabelledFeatures, labelled_features
from mae.evaluation.predictions import Predictions
from mae.model import Classifier, VisionTransformer
from mae.model.classifier import Pool
from mae.run_files import RECIPE
from mae.training.loop import choose_device


@dataclass(frozen=True)
class FrozenFeatures:
    """Both encoders, the pictures, and where the results go: everything checked."""

    config: LabelledOptions
    encoders: dict[str, VisionTransformer]  # by what a table calls them, the pre-trained one last
    data: Labelled
    test: Labelled
    reading: Reading
    results: Results

    @classmethod
    def prepare(
        cls, command: str, config: LabelledOptions, out: Path | None, device: str, seed: int
    ) -> "FrozenFeatures":
        """The results go to out, by default into the run folder of the checkpoint, where there is one."""
        config.reading.reading()
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError("this is computed in one process; start it without torchrun")
        is_run = (config.checkpoint / RECIPE).is_file()  # another folder of a model may be somebody's to upload
        results = Results(command, out or (config.checkpoint if is_run else None))
        data, test = open_train_and_test(config.data, config.test)
        trained, chosen = config.loading.load(config.checkpoint), choose_device(device)
        torch.manual_seed(seed)
        untrained = VisionTransformer(trained.config)
        name = "fine-tuned encoder" if isinstance(trained, Classifier) else "pre-trained encoder"
        encoders = {"untrained encoder": untrained.to(chosen), name: trained.to(chosen)}
        reading = config.reading.reading(trained.config)
        for labelled in (data, test):
            refuse_unreadable(labelled.source, reading)
        return cls(config, encoders, data, test, reading, results)

    def words(self, pool: Pool) -> str:
        counts = f"{counted(len(self.data), 'picture')} to learn from, {len(self.test)} to test"
        where = printable(self.config.checkpoint)
        return f"the {FEATURES_OF[pool]} of {where}: {counts}, {len(self.data.classes)} classes"

    def features(self, pool: Pool, batch_size: int, workers: int) -> tuple[LabelledFeatures, LabelledFeatures]:
        """Of the pictures to learn from, and of those to test."""
        models, options = [*self.encoders.values()], {"batch_size": batch_size, "workers": usable_workers(workers)}
        fit, test = (labelled_features(models, x, self.reading, pool, **options) for x in (self.data, self.test))
        return fit, test

    def write(self, table: Table, predictions: Predictions, **conditions: Any) -> None:
        self.results.write(table, predictions, self.test, self.reading, self.config.where | conditions)
