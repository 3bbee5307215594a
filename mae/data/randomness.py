"""Whatever is random is a pure function of the seed, of what it is for, and of the sample, epoch or step.

So nothing random has to be stored: a run that is resumed draws what it would have drawn, in any number of processes.
"""

import numpy as np

# What is drawn, each from a stream of its own. A number once given is never used for anything else.
_PURPOSES = {
    "order": 1, "sample": 2, "mask": 3, "held out": 4, "flip": 5, "validation": 6, "picture": 7, "within": 8,
    "mix": 9, "erase": 10, "drop path": 11,
}  # fmt: skip


def _raw(purpose: str, seed: int, place: tuple[int, int], count: int) -> np.ndarray:
    """``[count]`` uint64. NumPy promises the numbers of a bit generator for all its versions, and no others."""
    counter = np.array([0, _PURPOSES[purpose], *place], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed, 0], np.uint64)).random_raw(count)


def uniform(purpose: str, seed: int, place: tuple[int, int], count: int) -> np.ndarray:
    """``[count]`` float64 in [0, 1), for the pair of whole numbers that place is, such as (epoch, index)."""
    return (_raw(purpose, seed, place, count) >> np.uint64(11)) * 2.0**-53


def permutation(purpose: str, seed: int, place: tuple[int, int], count: int) -> np.ndarray:
    """The numbers from 0 to below count in random order, int64."""
    return np.argsort(_raw(purpose, seed, place, count), kind="stable")


def permutation_within(purpose: str, seed: int, place: tuple[int, int], groups: np.ndarray) -> np.ndarray:
    """The same, where each number stays among those of its group; groups ``[count]`` do not decrease."""
    return np.lexsort((_raw(purpose, seed, place, len(groups)), groups))


def derived_seed(purpose: str, seed: int, place: tuple[int, int]) -> int:
    """A seed of 63 bits for a generator of PyTorch's."""
    return int(_raw(purpose, seed, place, 1)[0] >> np.uint64(1))
