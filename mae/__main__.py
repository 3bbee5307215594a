"""``python -m mae``: pre-train, reconstruct, probe, convert, profile, demo."""

# ruff: noqa: E402 (the packages that the modules below import are asked for first)
from mae.requirements import require

require("matplotlib", "PIL", "sklearn", "tqdm", "tyro")

import sys
import warnings
from typing import Annotated

import tyro
from tqdm import tqdm

from mae.checkpoints.checkpoint import CheckpointError, CheckpointWarning
from mae.commands.convert import ConvertConfig, convert
from mae.commands.demo import DemoConfig, run_demo
from mae.commands.linprobe import LinprobeConfig, linprobe
from mae.commands.pretrain import PretrainConfig, pretrain
from mae.commands.profile import ProfileConfig, profile
from mae.commands.reconstruct import ReconstructConfig, reconstruct
from mae.data import DataError, DataWarning, printable
from mae.training.loop import TrainingStopped
from mae.training.run import RunError


def main(arguments: list[str] | None = None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            config = tyro.cli(
                Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
                | Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")]
                | Annotated[LinprobeConfig, tyro.conf.subcommand("linprobe")]
                | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
                | Annotated[ProfileConfig, tyro.conf.subcommand("profile")]
                | Annotated[DemoConfig, tyro.conf.subcommand("demo")],
                args=arguments,
                prog="python -m mae",
                description="Pre-train masked autoencoders, look at reconstructions, probe features, convert "
                "checkpoints, profile a training step.",
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
            _COMMANDS[type(config)](config)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"mae: {printable(place)}{error.strerror or printable(error)}")
    except KeyboardInterrupt:
        sys.exit("mae: stopped")
    except (CheckpointError, DataError, RunError, TrainingStopped, ValueError) as error:
        sys.exit("\n".join(map(printable, f"mae: {error}".splitlines())))


_COMMANDS = {
    PretrainConfig: pretrain,
    ReconstructConfig: reconstruct,
    LinprobeConfig: linprobe,
    ConvertConfig: convert,
    ProfileConfig: profile,
    DemoConfig: run_demo,
}


def _show(message: Warning, category: type[Warning], filename: str, line: int, *_) -> None:
    place = "" if issubclass(category, CheckpointWarning | DataWarning) else f" ({filename}:{line})"
    tqdm.write(f"Warning: {message}{place}", file=sys.stderr)  # above the progress bar, where there is one


if __name__ == "__main__":
    main()
