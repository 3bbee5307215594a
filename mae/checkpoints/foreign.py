"""Checkpoints of other people: where in a file the weights of a model lie."""

import argparse
import re
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.checkpoints.files import listed, read_file
from mae.checkpoints.layouts import CheckpointError, find_layout, find_models, is_head, published_names

# Containers of weights, the likeliest first; any other name comes behind them.
_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "student")
# Modules that hold one other module and are no part of a model's own names.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
# A teacher, a target and a momentum encoder are averages of the weights that are trained beside them.
_AVERAGE = re.compile(r"(?<![a-z])(ema|averaged?|avg|swa|polyak|shadow|momentum|target|teacher)(?![a-z])")
# Dictionaries and namespaces of settings; those of any other name may be about a probe, an optimizer or a teacher.
_SETTINGS = ("args", "config", "cfg", "hyper_parameters", "hparams", "opt", "params", "model_args", "model_config")
# Parts of names of weights that are not stored as they are used, what they are, and what puts them together.
_TAKEN_APART = (
    (r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)", "adapters of PEFT", "model.merge_and_unload()"),
    (r"(^|\.)parametrizations\.", "parametrized", "torch.nn.utils.parametrize.remove_parametrizations"),
    (r"weight_[gv]$", "normalised", "torch.nn.utils.remove_weight_norm"),
    (r"(weight|bias)_(orig|mask)$", "pruned or normalised", "torch.nn.utils.prune.remove or remove_spectral_norm"),
)
_HEADS = ("head", "heads", "head_dist", "fc_norm", "classifier", "fc", "pooler")
_FINE_TUNED = {f"{part}.{leaf}" for part in ("fc_norm", "head") for leaf in ("weight", "bias")}


class Weights(NamedTuple):
    """The weights of one model out of a file."""

    state: dict[str, Tensor]  # keys of one layout, nothing before them
    layout: str
    arguments: dict[str, dict[str, Any]]  # the settings of its training, by where in the file they lie
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
        exact: leave no classifier out. Without it one stays that the weights cannot do without: its norm is behind
            pooling, in the place of the encoder's.

    Raises:
        CheckpointError: a file of another kind, a pickle that needs a class, or no weights of a known layout.
    """
    content = read_file(file)
    dictionaries = list(_dictionaries(content))
    models = [model for place, values in dictionaries for model in _models(place, values)]
    if not models:
        models = [_unprefixed(file, content, dictionaries)]
    if ema and not any(model.averaged for model in models):
        if nameless := next(_nameless_averages(dictionaries), None):
            raise CheckpointError(
                f"{file} holds its EMA weights under {nameless!r} as a list without names; copy them into the model, "
                "and save its state_dict()"
            )
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
        raise CheckpointError(f"{file}: {_taken_apart(state) or error}") from error
    if not exact:
        state, more = _without_head(state, layout)
        notes += more
    if reason := _taken_apart(sorted(state.keys() - published_names(state, layout).keys())):
        raise CheckpointError(f"{file}: {reason}")
    # The place where the published code keeps its weights is no news by itself.
    if chosen.place and (notes or chosen.name != "model"):
        notes.insert(0, f"the weights are those under {'.'.join(chosen.place)!r}")
    return Weights(state, layout, _settings(dictionaries, chosen.place), notes)


def _taken_apart(names: Iterable[str]) -> str | None:
    """What weights of such names need before they are saved, in a clause."""
    for pattern, what, remedy in _TAKEN_APART:
        if found := next((name for name in names if re.search(pattern, name)), None):
            return f"its weights are {what}, such as {found}; save them after {remedy}"
    return None


def _settings(dictionaries: list[Any], place: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Plain values around the weights, and those of dictionaries beside them whose names say that they are settings."""
    result = {}
    for where, values in dictionaries:
        inner = where[sum(1 for _ in takewhile(lambda x: x[0] == x[1], zip(where, place, strict=False))) :]
        if all(x in _SETTINGS for x in inner[:1]) and all(x in (*_SETTINGS, "model", "encoder") for x in inner[1:]):
            result[".".join(where)] = {name: x for name, x in values.items() if _is_plain(x)}
    return result


def _dictionaries(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All that are in a file, the outermost first, with the names of those around them; a namespace counts as one."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen = set()  # some hold themselves
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


def _nameless_averages(dictionaries: list[Any]) -> Iterator[str]:
    for place, values in dictionaries:
        for name, x in values.items():
            if isinstance(x, (list, tuple)) and any(map(_is_array, x)) and _is_average((*place, name), "", []):
                yield ".".join((*place, name))


def _unprefixed(file: Path, content: Any, dictionaries: list[Any]) -> _Model:
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
    is_fine_tuned = {*known.values()} >= _FINE_TUNED and "norm.weight" not in known.values()
    head = [
        name
        for name in state
        if (not is_fine_tuned and is_head(known[name]) if name in known else name.partition(".")[0] in _HEADS)
    ]
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
