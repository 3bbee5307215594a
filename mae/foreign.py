"""Checkpoints of other people: where in a file the weights of a model lie."""

import argparse
import re
import types
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.files import listed, read_file
from mae.layouts import CheckpointError, find_layout, find_models, published_names

# Containers of weights, the likeliest first; any other name comes behind them.
_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "student")
# Modules that hold one other module and are no part of a model's own names.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
_AVERAGE = re.compile(r"(?<![a-z])(ema|averaged?|avg|swa)(?![a-z])")
_HEADS = ("head", "heads", "head_dist", "fc_norm", "classifier", "fc", "pooler")


class Weights(NamedTuple):
    """The weights of one model out of a file."""

    state: dict[str, Tensor]  # keys of one layout, nothing before them
    layout: str
    arguments: dict[str, Any]  # the settings of its training, wherever the file holds them
    notes: list[str]  # what was done to get at them, each a clause


class _Model(NamedTuple):
    place: tuple[str, ...]  # dictionaries around the weights, outermost first
    prefix: str
    keys: set[str]  # those that a layout knows
    table: dict[str, Tensor]  # everything that lies in the same dictionary
    wrappers: list[str]
    averaged: bool

    @property
    def name(self) -> str:
        return ".".join([*self.place, self.prefix]).rstrip(".")


def read_weights(file: Path, ema: bool = False, exact: bool = False) -> Weights:
    """The weights of the model in a file, whatever lies around them.

    Args:
        file: of ``torch.save`` or safetensors; which of them, its bytes say and not its name.
        ema: take the averaged weights, not the plain ones beside them.
        exact: leave no classifier out, so that it counts as a key that does not fit.

    Raises:
        CheckpointError: a file of another kind, a pickle that needs a class, or no weights of a known layout.
    """
    content = read_file(file)
    dictionaries = list(_dictionaries(content))
    models = [model for place, values in dictionaries for model in _models(place, values)]
    if not models:
        models = [_unprefixed(file, content, dictionaries)]
    if ema and not any(model.averaged for model in models):
        raise CheckpointError(f"{file} holds no EMA weights: its keys are {_leading(_top(content))}")
    chosen, *others = sorted(models, key=lambda model: (model.averaged != ema, *_likelihood(model)))
    state, notes = _cut_out(chosen, others)
    if alike := [repr(x.name) for x in others if x.averaged == chosen.averaged]:
        notes.append(f"other weights lie under {listed(alike)}")
    if averages := [repr(x.name) for x in others if x.averaged > chosen.averaged]:
        notes.append(f"EMA weights lie under {listed(averages)}, which ema=True or --ema takes")
    if chosen.averaged:
        notes.append("the weights are averages (EMA)" + ("" if ema else ", the only ones in the file"))
    try:
        layout = find_layout(state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not exact:
        state, more = _without_head(state, layout)
        notes += more
    # The place where the published code keeps its weights is no news by itself.
    if chosen.place and (notes or chosen.name != "model"):
        notes.insert(0, f"the weights are those under {'.'.join(chosen.place)!r}")
    arguments = {k: x for _, values in reversed(dictionaries) for k, x in values.items() if _is_plain(x)}
    return Weights(state, layout, arguments, notes)


def _dictionaries(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All that are in a file, the outermost first, with the names of those around them; a namespace counts as one."""
    waiting, seen = deque([((), content)]), set()  # some hold themselves
    while waiting:
        place, x = waiting.popleft()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, (argparse.Namespace, types.SimpleNamespace)):
            x = vars(x)
        elif isinstance(x, (list, tuple)):
            x = {str(i): inner for i, inner in enumerate(x) if isinstance(inner, dict)}
        if isinstance(x, dict):
            values = {name: inner for name, inner in x.items() if isinstance(name, str)}
            yield place, values
            waiting.extend(((*place, name), inner) for name, inner in values.items())


def _is_array(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind == "f")


def _is_plain(x: Any) -> bool:
    return isinstance(x, (bool, int, float, str, list, tuple, np.generic)) or getattr(x, "ndim", None) == 0


def _models(place: tuple[str, ...], values: dict[str, Any]) -> list[_Model]:
    table, wrappers = _unwrapped({name: torch.as_tensor(x).detach() for name, x in values.items() if _is_array(x)})
    counters = [name.removesuffix("n_averaged") for name in table if re.search(r"(^|\.)n_averaged$", name)]
    return [
        _Model(place, prefix, keys, table, wrappers, _is_average(place, prefix, counters))
        for prefix, keys in find_models(table).items()
    ]


def _unwrapped(table: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Names without those of wrappers, wherever they stand, and the wrappers that were found."""
    found = {part: None for name in table for part in name.split(".") if part in _WRAPPERS}
    short = {".".join(part for part in name.split(".") if part not in _WRAPPERS): x for name, x in table.items()}
    return (short, [*found]) if len(short) == len(table) else (table, [])


def _is_average(place: tuple[str, ...], prefix: str, counters: list[str]) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", ".".join([*place, prefix])).lower()
    return bool(_AVERAGE.search(words)) or any(prefix.startswith(counter) for counter in counters)


def _unprefixed(file: Path, content: Any, dictionaries: list) -> _Model:
    """The largest state dict of a file in which no model was recognised: its keys make the error."""
    tables = [(len(place), place, {k: x for k, x in values.items() if _is_array(x)}) for place, values in dictionaries]
    tables = [(depth, place, table) for depth, place, table in tables if table]
    if not tables and content != {}:
        kind = type(content).__name__
        keys = _leading(_top(content))
        raise CheckpointError(f"{file} holds no state dict: {f'its keys are {keys}' if keys else f'it is a {kind}'}")
    _, place, table = max(tables, key=lambda x: (len(x[2]), -x[0]), default=(0, (), {}))
    table, wrappers = _unwrapped(table)
    return _Model(place, "", set(table), table, wrappers, False)


def _likelihood(model: _Model) -> tuple[int, int]:
    first = next(iter([*model.place, *model.prefix.split(".")]), "")
    rank = _CONTAINERS.index(first) if first in _CONTAINERS else len(_CONTAINERS) if first else -1
    return rank, -len(model.keys)


def _cut_out(chosen: _Model, others: list[_Model]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under a model's prefix, and what was taken off and left out."""
    inner = tuple(x.prefix for x in others if x.place == chosen.place and x.prefix.startswith(chosen.prefix))
    state = {
        name.removeprefix(chosen.prefix): x
        for name, x in chosen.table.items()
        if name.startswith(chosen.prefix) and not (inner and name.startswith(inner))
    }
    counter = state.pop("n_averaged", None)
    notes = []
    if taken_off := [repr(x) for x in (chosen.prefix, *(f"{x}." for x in chosen.wrappers)) if x]:
        notes.append(f"{' and '.join(taken_off)} {'is' if len(taken_off) == 1 else 'are'} taken off their names")
    models = tuple(x.prefix for x in others if x.place == chosen.place)
    rest = [x for x in chosen.table if not x.startswith(chosen.prefix) and not (models and x.startswith(models))]
    rest += ["n_averaged"] if counter is not None else []
    if rest:
        notes.append(f"{_leading(rest)} {'is' if len(_first_parts(rest)) == 1 else 'are'} left out")
    return state, notes


def _without_head(state: dict[str, Tensor], layout: str) -> tuple[dict[str, Tensor], list[str]]:
    known = published_names(state, layout)
    head = [name for name in state if name not in known and name.partition(".")[0] in _HEADS]
    notes = []
    if "fc_norm.weight" in head and "norm.weight" not in state:
        state = state | {f"norm.{x}": state[f"fc_norm.{x}"] for x in ("weight", "bias") if f"fc_norm.{x}" in state}
        head = [name for name in head if not name.startswith("fc_norm.")]
        notes.append(
            "fc_norm, applied there behind pooling, becomes norm, applied here before it, so pooled features differ"
        )
        state = {name: x for name, x in state.items() if not name.startswith("fc_norm.")}
    if head:
        notes.append(f"the classifier ({_leading(head)}) is left out")
    return {name: x for name, x in state.items() if name not in head}, notes


def _top(content: Any) -> Iterable[str]:
    return map(str, content) if isinstance(content, dict) else ()


def _first_parts(names: Iterable[str]) -> list[str]:
    return [*dict.fromkeys(name.partition(".")[0] for name in names)]


def _leading(names: Iterable[str]) -> str:
    """``"criterion, head"``: the modules of many keys."""
    return listed(_first_parts(names))
