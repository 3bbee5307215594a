"""Head and loss in one: the vendor's matrix products around the kernel of the loss, for some samples at a time."""

from functools import partial

from torch import Tensor

from mae_kernels.chunks import in_chunks
from mae_kernels.kernels.masked_mse import masked_mse


def linear_masked_mse(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return in_chunks(partial(masked_mse, in_place=True), *args)
