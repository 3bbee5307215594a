"""The head of a classifier in configurations of ours, Hugging Face's and timm's: pure functions on dictionaries.

Hugging Face's ViT classifies the class token alone. A norm of the mean is what its BEiT classifies, which is this model
where it has absolute positions, no relative ones, no mask token and no scale of its layers. Its keys have no bias:
``q (k + b)`` adds ``q b`` to all keys of a query, which softmax does not notice. Read in transformers 4.57.6 and 5.23.0
(``ViTForImageClassification``, ``BeitForImageClassification``) and in timm 1.0.31.
"""

from collections import Counter
from dataclasses import fields
from typing import Any

from torch import Tensor

from mae.checkpoints.configs import BEIT, TIMM_POOLS, to_encoder_config
from mae.checkpoints.files import listed
from mae.checkpoints.layouts import CheckpointError
from mae.fields import are_all, is_whole
from mae.model import HeadConfig, MAEConfig
from mae.model.classifier import Pool


def says_classifier(description: dict[str, Any]) -> bool:
    """Whether a ``config.json`` of ours, Hugging Face's or timm's is of a classifier."""
    if "model_type" in description:
        return "ForImageClassification" in str(description.get("architectures"))
    if "architecture" in description:
        return is_whole(_timm(description, "num_classes"))
    return "head" in description


def find_head(description: dict[str, Any], state: dict[str, Tensor]) -> tuple[HeadConfig | None, list[str]]:
    """The head of a model, None for no classifier, and a clause for each choice.

    Args:
        description: the contents of a ``config.json``, empty where there is none.
        state: published keys, a foreign head among them only where it is to be taken.

    Raises:
        CheckpointError: a pooling that this model does not have.
        ValueError: a head that no model can have.
    """
    if description and not description.keys() & {"model_type", "architecture"}:
        return (_from_ours(description["head"]) if "head" in description else None), []
    weight = state.get("head.weight")
    if weight is None or weight.ndim != 2:
        return None, []
    pool: Pool = "mean"
    labels, fc_norm, notes = None, True, []
    if "model_type" in description:
        labels, is_vit = description.get("id2label"), description["model_type"] == "vit"
        pool, fc_norm = ("token", False) if is_vit else ("mean", True)
    elif says_classifier(description):
        labels, pool, fc_norm = _from_timm(description)
    else:
        notes.append("with fc_norm and without norm it is a classifier")
    classes, more = _names(labels, len(weight))
    return HeadConfig(classes, pool, fc_norm), notes + more


def _from_ours(values: Any) -> HeadConfig:
    known = [field.name for field in fields(HeadConfig)]
    if not isinstance(values, dict) or not are_all(values.get("classes"), lambda x: isinstance(x, str)):
        raise ValueError(f"head must be an object with classes, a list of names, got {repr(values)[:60]}")
    for name in values:
        if name not in known:
            raise ValueError(f"{name} is no field of HeadConfig, which has {', '.join(known)}")
    return HeadConfig(**values)


def _timm(values: dict[str, Any], name: str, default: Any = None) -> Any:
    """What builds the model there: its arguments, and behind them what the file says of it."""
    arguments = values.get("model_args")
    return (arguments if isinstance(arguments, dict) else {}).get(name, values.get(name, default))


def _from_timm(values: dict[str, Any]) -> tuple[Any, Pool, bool]:
    pool, fc_norm = _timm(values, "global_pool", "token"), _timm(values, "fc_norm")
    if not isinstance(pool, str) or pool not in TIMM_POOLS:
        raise CheckpointError(f"global_pool {pool!r} cannot be converted")
    labels = values.get("label_names", values.get("pretrained_cfg", {}).get("label_names"))
    return labels, TIMM_POOLS[pool], pool == "avg" if fc_norm is None else fc_norm


def _names(labels: Any, count: int) -> tuple[tuple[str, ...], list[str]]:
    """So many different names out of a list, or a dictionary by numbers; a class without a name is its number."""
    labels = dict(enumerate(labels)) if isinstance(labels, (list, tuple)) else labels or {}
    if not isinstance(labels, dict):
        raise ValueError(f"names of classes must be a list or an object, got {repr(labels)[:60]}")
    if len(labels) > count:
        raise ValueError(f"it names {len(labels)} classes, and the weights have {count}")
    labels = {str(number): str(name) for number, name in labels.items()}
    nameless = [number for number in map(str, range(count)) if number not in labels]
    names = [labels.get(number, number) for number in map(str, range(count))]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    notes = []
    if not labels:
        notes.append(f"its classes have no names and are called 0 to {count - 1}")
    elif nameless:
        notes.append(f"{len(nameless)} of its {count} classes have no name and get their number")
    if repeated:  # among those of ImageNet are two cranes
        names = [f"{name} {number}" if name in repeated else name for number, name in enumerate(names)]
        notes.append(f"classes of the same name get their number as well: {listed(repeated, 3)}")
    return tuple(names), notes


def to_classifier_config(config: MAEConfig, head: HeadConfig) -> dict[str, Any]:
    """A ``config.json`` for Hugging Face's ViT, or its BEiT for a mean.

    Raises:
        ValueError: sizes or a head that neither has.
    """
    kind = classifier_kind(head)
    labels = {
        "id2label": {str(number): name for number, name in enumerate(head.classes)},
        "label2id": {name: number for number, name in enumerate(head.classes)},
    }
    theirs = to_encoder_config(config, kind)
    if kind == "ViT":
        return {"architectures": ["ViTForImageClassification"], "model_type": "vit", **theirs, **labels}
    del theirs["qkv_bias"]
    beit = {**theirs, **BEIT, "drop_path_rate": 0.0}
    return {"architectures": ["BeitForImageClassification"], "model_type": "beit", **beit, **labels}


def classifier_kind(head: HeadConfig) -> str:
    """``"ViT"`` or ``"BEiT"``, the model of Hugging Face's that has such a head.

    Raises:
        ValueError: neither has it.
    """
    if head.pool == "mean" and not head.fc_norm:
        raise ValueError(
            "Hugging Face has no classifier on the mean of what the encoder's norm gives; timm has, with fc_norm False"
        )
    return "BEiT" if head.fc_norm else "ViT"
