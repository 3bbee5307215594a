"""Checks of arguments. Every message names the op, the argument, what was expected, what came, and the remedy.

Those called ``*_values`` read tensors: :func:`mae_kernels.registration.register_op` knows when that may be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import accumulation_dtype

Values = Sequence[float] | Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(op: str, name: str, x: Tensor, *shapes: tuple[int | str, ...]) -> None:
    """A tensor of one of the shapes; a letter stands for any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    sizes = x.shape
    for shape in shapes:
        if _fits(sizes, shape):
            return
    # Sizes are formatted only here: formatting a symbolic size would fix it for torch.compile.
    expected = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
    raise ValueError(f"{op}: {name} must be {expected}, got shape {tuple(sizes)}")


def _fits(sizes: torch.Size, shape: tuple[int | str, ...]) -> bool:
    # A loop takes half the time of all() over a generator, and a call of an op has a dozen of these.
    if len(sizes) != len(shape):
        return False
    for size, expected in zip(sizes, shape, strict=True):
        if not isinstance(expected, str) and size != expected:
            return False
    return True


def floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {dtype_name(x)}")


def pixels(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in (torch.uint8, torch.uint16) and x.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be uint8, uint16, float32, float16, bfloat16 or float64, got {dtype_name(x)}"
        )


def uint8(op: str, name: str, x: Tensor) -> None:
    if x.dtype != torch.uint8:
        raise TypeError(f"{op}: {name} must be uint8, got {dtype_name(x)}")


def int64(op: str, name: str, x: Tensor) -> None:
    if x.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {dtype_name(x)}; call .long()")


def out_dtype(op: str, value: torch.dtype) -> None:
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"{op}: out_dtype must be a floating dtype, got {value!r}")


def same_device(op: str, anchor_name: str, anchor: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != anchor.device:
            raise ValueError(f"{op}: {name} is on {x.device}, but {anchor_name} is on {anchor.device}")


def integer(op: str, name: str, value: int) -> None:
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")


def pair(op: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """``(height, width)`` of a value that gives both, or one for both."""
    sides = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int | torch.SymInt) and side > 0 for side in sides):
        raise ValueError(f"{op}: {name} must be a positive int or a pair of them, got {value!r}")
    return sides


def sizes(op: str, name: str, value: int | tuple[int, ...] | list[int], sides: int) -> tuple[int, ...]:
    """Two or three sizes, of height and width or of frames too; one for all sides is repeated."""
    result = tuple(value) if isinstance(value, tuple | list) else (value,) * sides
    fits = len(result) in (2, 3)
    for side in result:
        fits = fits and isinstance(side, int | torch.SymInt) and side > 0
    if not fits:
        raise ValueError(f"{op}: {name} must be a positive int, or two or three of them, got {value!r}")
    return result


def constant(op: str, name: str, x: Tensor) -> None:
    if x.requires_grad:
        what = f"{name} require grad" if name == "images" else f"{name} requires grad"
        raise ValueError(f"{op}: {what}, but the target is a constant of the loss; pass {name}.detach()")


def eps(op: str, value: float) -> None:
    if not value >= 0:  # NaN included
        raise ValueError(f"{op}: eps must not be negative, got {value}")


def statistics(op: str, mean: Values | None, std: Values | None, images: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Mean and standard deviation of each channel ``[2, C]``, beside the images and in the precision of dtype."""
    if (mean is None) != (std is None):
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"{op}: {given} was given without {missing}; pass both or neither")
    if mean is None or std is None:
        return None
    dtype = accumulation_dtype(dtype)
    both = [_per_channel(op, name, x, images) for name, x in (("mean", mean), ("std", std))]
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return torch.stack([torch.as_tensor(x, dtype=dtype, device=images.device).flatten() for x in both])
    return torch.tensor(both, dtype=dtype, device=images.device)


def _per_channel(op: str, name: str, values: Values | float, images: Tensor) -> Tensor | list[float]:
    if isinstance(values, Tensor):
        floating(op, name, values)
        same_device(op, "images", images, **{name: values})
        count = values.numel()
    else:
        values = [values] if isinstance(values, int | float) else list(values)
        if name == "std" and not all(v > 0 for v in values):
            raise ValueError(f"{op}: std must be positive, got {values}")
        count = len(values)
    if count != images.shape[1]:
        raise ValueError(f"{op}: {name} has {count} values, but images have {images.shape[1]} channels")
    return values


def mask_ratio(op: str, value: float) -> None:
    if not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"{op}: mask_ratio must be a number, got {type(value).__name__}")
    if not 0 < value < 1:  # NaN included
        raise ValueError(f"{op}: mask_ratio must lie strictly between 0 and 1, got {value}")


def not_empty(op: str, name: str, x: Tensor, *, batch: bool = False) -> None:
    """No dimension of size 0, but for the first one where that is the batch."""
    if 0 in (x.shape[1:] if batch else x.shape):
        raise ValueError(f"{op}: {name} is empty, got shape {tuple(x.shape)}")


def table(op: str, name: str, x: Tensor, rows: int | str, width: int) -> Tensor:
    """``[rows, width]``, or the same with a leading 1, which is dropped."""
    tensor(op, name, x, (rows, width), (1, rows, width))
    floating(op, name, x)
    return x[0] if x.ndim == 3 else x


def norm_pix(op: str, value: bool | str) -> None:
    if value not in (True, False, "channel"):
        raise ValueError(f"{op}: norm_pix must be True, False or 'channel', got {value!r}")


def layout(op: str, value: str) -> None:
    if value not in ("channels_last", "channels_first"):
        raise ValueError(f"{op}: layout must be 'channels_last' or 'channels_first', got {value!r}")


def ids(op: str, name: str, x: Tensor, batch_size: int, num_patches: int) -> None:
    """``[N, K]`` int64 with ``0 < K <= L``; the values are checked where the op runs, see :func:`id_values`."""
    tensor(op, name, x, ("N", "K"))
    int64(op, name, x)
    if x.shape[0] != batch_size:
        raise ValueError(f"{op}: {name} has {x.shape[0]} rows for a batch of {batch_size}")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: {name} is empty, got shape {tuple(x.shape)}")
    if x.shape[1] > num_patches:
        raise ValueError(f"{op}: {name} has {x.shape[1]} ids per sample, but there are only {num_patches} patches")


def id_values(op: str, name: str, x: Tensor, num_patches: int, lowest: int = -1) -> None:
    """In range, and unique in each row but for -1, as the op is run."""
    low, high = (int(value) for value in x.aminmax())
    if low < lowest or high >= num_patches:
        n, k = ((x < lowest) | (x >= num_patches)).nonzero()[0].tolist()
        value, last = x[n, k].item(), num_patches - 1
        none = "" if lowest == 0 else ", or -1 for none"
        raise ValueError(
            f"{op}: {name}[{n}, {k}] is {value}, out of range for {num_patches} patches, 0 to {last}{none}"
        )
    is_token = None if low >= 0 else x >= 0
    seen = x.new_zeros(x.shape[0], num_patches - min(low, 0), dtype=torch.bool)
    seen.scatter_(1, x - min(low, 0), True)
    seen = seen if is_token is None else seen[:, 1:]
    if seen.count_nonzero().item() < (x.numel() if is_token is None else is_token.count_nonzero().item()):
        for n, row in enumerate(x):
            values, counts = row[row >= 0].unique(return_counts=True)
            if (counts > 1).any():
                raise ValueError(f"{op}: {name}[{n}] holds the id {values[counts > 1][0].item()} more than once")


def restore_values(op: str, name: str, x: Tensor, num_keep: int) -> None:
    """Visible patches numbered from 0 on and hidden ones from num_keep on, in each row."""
    num_patches = x.shape[1]
    if x.amax().item() >= num_patches:  # rows with fewer visible patches leave numbers out
        is_visible = x < num_keep
        dense = torch.where(is_visible, x, x - num_keep + is_visible.sum(dim=1, keepdim=True))
        is_order = dense.sort(dim=1).values == torch.arange(num_patches, device=x.device)
        x = torch.where(is_order.all(dim=1, keepdim=True), dense, x)
    id_values(op, name, x, num_patches, lowest=0)


def mask_values(op: str, name: str, x: Tensor) -> None:
    """Only 0 and 1."""
    if x.dtype == torch.bool:
        return
    other = (x != 0) & (x != 1)
    if other.any():
        n, patch = other.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {name}[{n}, {patch}] is {x[n, patch].item():g}; only 0 (visible) and 1 (masked) are allowed"
        )


def packed_values(op: str, starts: Tensor, sizes: Tensor, places: int) -> None:
    """Images inside their buffer."""
    outside = (sizes <= 0).any(dim=1) | (sizes > places).any(dim=1) | (starts < 0)
    outside |= starts > places - sizes[:, 0] * sizes[:, 1]
    if outside.any():
        n = int(outside.nonzero()[0])
        height, width = sizes[n].tolist()
        raise ValueError(
            f"{op}: image {n}, of {height} x {width} pixels from place {starts[n].item()} on, "
            f"does not lie inside the {places} places of images.pixels"
        )


def box_values(op: str, name: str, x: Tensor, sizes: Tensor | Sequence[int]) -> None:
    """Not empty, and inside the image."""
    sizes = torch.as_tensor(sizes, device=x.device).expand(len(x), 2)
    corners, sides = x.split(2, dim=1)
    outside = ((corners < 0) | (sides <= 0) | (sides > sizes) | (corners > sizes - sides)).any(dim=1)
    if outside.any():
        n = int(outside.nonzero()[0])
        (top, left, height, width), size = x[n].tolist(), " x ".join(map(str, sizes[n].tolist()))
        raise ValueError(
            f"{op}: {name}[{n}], of {height} x {width} pixels from row {top} and column {left} on, "
            f"is empty or does not lie inside its image of {size}"
        )


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
