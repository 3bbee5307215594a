"""``python -m mae``: pre-train, fine-tune, probe, look at what is learned, convert, and more."""

import os
import signal
import sys

if sys.stderr is None:  # closed by whoever started this
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end)
# Ctrl-C is answered, and missing packages are named, while the modules below are imported.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"mae: stopped\n") and os._exit(1))

from mae.requirements import require

try:
    require("filelock", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm", "tyro")
except ModuleNotFoundError as error:
    sys.exit(str(error))

import warnings
from collections.abc import Callable
from difflib import get_close_matches
from functools import reduce
from operator import or_
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm
from tyro.conf import subcommand

from mae.checkpoints.checkpoint import CheckpointError, CheckpointWarning
from mae.commands.attention import AttentionConfig, attention
from mae.commands.convert import ConvertConfig, convert
from mae.commands.demo import DemoConfig, run_demo
from mae.commands.features import FeaturesConfig, features
from mae.commands.finetune import FinetuneConfig, finetune
from mae.commands.knn import KnnConfig, knn
from mae.commands.linprobe import LinprobeConfig, linprobe
from mae.commands.pack import PackConfig, run_pack
from mae.commands.predict import PredictConfig, predict
from mae.commands.pretrain import PretrainConfig, defaults, pretrain
from mae.commands.profile import ProfileConfig, profile
from mae.commands.reconstruct import ReconstructConfig, reconstruct
from mae.commands.report import ReportConfig, report
from mae.data import DataError, DataWarning, printable
from mae.training.loop import StoppedBySignal
from mae.training.metrics import TrainingStopped
from mae.training.parallel import ProcessLost
from mae.training.run import RunError

_FAILED, _STOPPED = 1, 3


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            config = tyro.cli(
                _chosen(arguments),
                args=arguments,
                prog="python -m mae",
                description="Pre-train masked autoencoders, look at reconstructions and attention, fine-tune and probe "
                "what they have learned, write a page about a run, convert checkpoints, profile a step, pack images.",
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
            next(run for kind, run in _COMMANDS.values() if type(config) is kind)(config)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _leave(_FAILED, f"{printable(place)}{error.strerror or printable(error)}")
    except torch.OutOfMemoryError as error:
        words = str(error).split(". ")[0]
        _leave(_FAILED, f"{words}; take more --micro-batches, or a smaller --batch-size")
    except KeyboardInterrupt:
        _leave(_FAILED, "stopped")
    except StoppedBySignal as error:
        _leave(_STOPPED, str(error))
    except (CheckpointError, DataError, ProcessLost, RunError, TrainingStopped, ValueError) as error:
        _leave(_FAILED, str(error))


_COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "pretrain": (PretrainConfig, pretrain),
    "reconstruct": (ReconstructConfig, reconstruct),
    "attention": (AttentionConfig, attention),
    "finetune": (FinetuneConfig, finetune),
    "linprobe": (LinprobeConfig, linprobe),
    "knn": (KnnConfig, knn),
    "predict": (PredictConfig, predict),
    "features": (FeaturesConfig, features),
    "report": (ReportConfig, report),
    "convert": (ConvertConfig, convert),
    "profile": (ProfileConfig, profile),
    "pack": (PackConfig, run_pack),
    "demo": (DemoConfig, run_demo),
}


def _chosen(arguments: list[str]) -> Any:
    """The commands as a type, in which a recipe that the arguments name gives pretrain its defaults.

    Raises:
        ValueError: they begin with no command.
    """
    if arguments and arguments[0] not in _COMMANDS and not arguments[0].startswith("-"):
        meant = "".join(f"; did you mean {name}?" for name in get_close_matches(arguments[0], _COMMANDS, 1))
        raise ValueError(f"there is no command {arguments[0]}, but {', '.join(_COMMANDS)}{meant}")
    default = defaults(arguments)
    given: dict[str, dict[str, Any]] = {"pretrain": {} if default is None else {"default": default}}
    types = [Annotated[kind, subcommand(name, **given.get(name, {}))] for name, (kind, _) in _COMMANDS.items()]
    return reduce(or_, types)


def _leave(status: int, words: str) -> None:
    """Of several processes, which end for the same reason, the first one says it."""
    words = "\n".join(map(printable, f"mae: {words}".splitlines()))
    if not _leads():
        sys.exit(status)
    if status == _FAILED:
        sys.exit(words)
    print(words, file=sys.stderr)
    sys.exit(status)


def _leads() -> bool:
    return int(os.environ.get("RANK") or 0) == 0


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    if not _leads():
        return
    place = "" if issubclass(category, CheckpointWarning | DataWarning) else f" ({filename}:{lineno})"
    tqdm.write(f"Warning: {message}{place}", file=sys.stderr)  # above the progress bar, where there is one


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python is closing down, and would answer with a traceback
