"""What fields of a configuration may be, checked before anything is built from them; those of MAEConfig."""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

_MOST_BLOCKS, _LARGEST = 1000, 1 << 16  # which no model comes near, and which build within seconds


def is_whole(x: Any, lowest: int = 1, highest: int = _LARGEST) -> TypeGuard[int]:
    return isinstance(x, int) and not isinstance(x, bool) and lowest <= x <= highest


def is_number(x: Any, lowest: float = -math.inf) -> TypeGuard[float]:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and lowest < x < math.inf


def are_all(values: Any, test: Callable[..., bool], *arguments: float) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(values, (list, tuple)) and all(test(x, *arguments) for x in values)


SIZE = (
    lambda x: is_whole(x) or (are_all(x, is_whole) and len(x) in (2, 3)),
    f"a whole number of 1 to {_LARGEST}, or a list of two or three",
)
SHARE = (lambda x: is_number(x) and 0 <= x < 1, "a number from 0 to below 1")
RATIO = (lambda x: is_number(x, 0) and x < 1, "a number between 0 and 1")
COUNT = (lambda x: is_whole(x, 1, 10**9), f"a whole number of 1 to {10**9}")
SEED = (lambda x: is_whole(x, 0, 2**63 - 1), f"a whole number of 0 to {2**63 - 1}")
WORKERS = (lambda x: is_whole(x, 0, 10**9), "a whole number from 0 on")
WIDTH = (is_whole, f"a whole number of 1 to {_LARGEST}")
BLOCKS = (lambda x: is_whole(x, 0, _MOST_BLOCKS), f"a whole number of 0 to {_MOST_BLOCKS}")
RULES = {
    "image_size": SIZE, "patch_size": SIZE, "in_chans": WIDTH, "embed_dim": WIDTH, "depth": BLOCKS,
    "num_heads": WIDTH, "decoder_embed_dim": WIDTH, "decoder_depth": BLOCKS, "decoder_num_heads": WIDTH,
    "mlp_ratio": (lambda x: is_number(x, 0) and x < _LARGEST, "a number above 0"),
    "norm_pix_loss": (lambda x: isinstance(x, bool) or x == "channel", "true, false or \"channel\""),
    "pixel_mean": (lambda x: are_all(x, is_number), "a list of numbers"),
    "pixel_std": (lambda x: are_all(x, is_number, 0), "a list of numbers above 0"),
    "decoder": (lambda x: x in ("self", "cross"), "\"self\" or \"cross\""),
    "predicted_share": (lambda x: is_number(x, 0) and x <= 1, "a number above 0, at most 1"),
}  # fmt: skip


def unknown_statistics(channels: int) -> dict[str, tuple[float, ...]]:
    """Fields for pixels of which nobody knows mean and spread: [0, 1] becomes [-1, 1]."""
    return dict.fromkeys(("pixel_mean", "pixel_std"), (0.5,) * channels)


def check_fields(values: dict[str, Any]) -> None:
    """Types and ranges of fields of :class:`MAEConfig`, before anything is built from them.

    Raises:
        ValueError: the field, what was expected and what came.
    """
    for name in values:
        if name not in RULES:
            raise ValueError(f"{name} is no field of MAEConfig, which has {', '.join(RULES)}")
    check(values, RULES)


def check(values: dict[str, Any], rules: dict[str, Any]) -> None:
    """Hold values against rules of the same names, each a test and what it expects, in words.

    Raises:
        ValueError: the field, what was expected and what came.
    """
    for name, (fits, expected) in rules.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"{name} must be {expected}, got {repr(values[name])[:60]}")
