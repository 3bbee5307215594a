"""Where a training step's time, memory and launches go, phase by phase."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mae.model import MAEConfig, MaskedAutoencoder
from mae.model.cross import predicted, predicted_count
from mae_kernels import random_masking

# Ops that hand out memory or read it back; every other op that is not a view is at least one kernel launch.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
_SYNCS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero"}


@dataclass
class Phase:
    """What one phase of a step costs: milliseconds, launches of the device, bytes kept for the backward."""

    forward_ms: float = 0.0
    backward_ms: float = 0.0
    launches: int = 0
    saved_bytes: int = 0


class LaunchCounter(TorchDispatchMode):
    """Counts, inside a ``with`` block, ops that launch work on the device, and ops that make the host wait for it.

    One op counts as one launch: exact for most of PyTorch's, a lower bound for some. On a GPU the profiler of PyTorch
    counts the kernels themselves; without one this tells eager implementations apart.

    Args:
        host: tensors that are on the host wherever the rest is, such as the step counts of optimizers: reading them
            waits for nothing.
    """

    def __init__(self, *host: Tensor) -> None:
        super().__init__()
        self._host = {x.data_ptr() for x in host}
        self.launches = self.syncs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        leaves = torch.utils._pytree.tree_leaves(out)
        to_host = (
            name in ("_to_copy", "copy_")
            and args[-1 if name == "copy_" else 0].device.type != "cpu"
            and leaves[0].device.type == "cpu"
        )
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        on_host = bool(args) and isinstance(args[0], Tensor) and args[0].data_ptr() in self._host
        if (name in _SYNCS or to_host or by_mask) and not on_host:
            self.syncs += 1
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in _ALLOCATIONS and name != "_local_scalar_dense":
            self.launches += 1
        return out


@contextmanager
def saved_bytes(*known: Tensor) -> Iterator[Callable[[], int]]:
    """Inside the block, memory that autograd keeps for the backward is counted once, ``known`` tensors not at all."""
    seen = {x.untyped_storage().data_ptr(): 0 for x in known}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield lambda: sum(seen.values())


def training_flops(config: MAEConfig, mask_ratio: float = 0.75) -> int:
    """Floating-point operations that one image of a training step needs, matrix products and attention only.

    A block on T tokens of width D of which S leave it: ``4 T D²`` for keys and values, ``4 S D²`` for queries and
    projection, ``4 r S D²`` for an MLP of ratio r, ``4 S T D`` for attention. S < T in the last block of the decoder
    alone, where hidden patches leave, and S and T are other tokens in every block of a cross decoder. A backward costs
    two forwards, less the gradient of the images.
    """

    def block(tokens: int, dim: int, leave: int) -> int:
        linears = 4 * tokens + (4 + 4 * config.mlp_ratio) * leave
        return int(linears * dim**2 + 4 * leave * tokens * dim)

    dim, decoder_dim = config.embed_dim, config.decoder_embed_dim
    num_patches, values = config.num_patches, config.grid.patch_values
    visible = int(num_patches * (1 - mask_ratio))
    hidden, all_tokens = predicted_count(num_patches - visible, config.predicted_share), 1 + num_patches
    forward = config.depth * block(1 + visible, dim, 1 + visible)
    forward += 2 * (1 + visible) * dim * decoder_dim  # decoder_embed
    if config.decoder == "cross":
        forward += config.decoder_depth * block(1 + visible, decoder_dim, hidden)
    elif config.decoder_depth:
        forward += (config.decoder_depth - 1) * block(all_tokens, decoder_dim, all_tokens)
        forward += block(all_tokens, decoder_dim, hidden)
    embed = 2 * visible * values * dim
    return 3 * (forward + embed + 2 * hidden * decoder_dim * values) - embed


def profile_step(
    model: MaskedAutoencoder,
    images: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    mask_ratio: float = 0.75,
    bfloat16: bool = False,
    rounds: int = 5,
) -> dict[str, Phase]:
    """Run eager steps cut at the borders of their phases, and measure each: median times, counts of one step.

    Args:
        model: trained by it.
        images: ``[N, C, H, W]`` or ``[N, C, T, H, W]`` on the host, as the data loader delivers them.
        optimizer: of the model, updated ``rounds + 2`` times.
        mask_ratio: share of hidden patches.
        bfloat16: autocast to it.
        rounds: timed steps, after one that warms up and one that is counted.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    phases: dict[str, Phase] = defaultdict(Phase)

    @contextmanager
    def timed(name: str, direction: str) -> Iterator[None]:
        _wait(device)
        start = time.perf_counter()
        yield
        _wait(device)
        times[name, direction].append(time.perf_counter() - start)

    @contextmanager
    def counted(name: str, direction: str) -> Iterator[None]:
        with LaunchCounter() as counter, saved_bytes(*model.parameters(), *model.buffers(), *inputs) as kept:
            yield
        phases[name].launches += counter.launches
        phases[name].saved_bytes += kept()

    inputs: list[Tensor] = []
    _cut_step(model, images, optimizer, mask_ratio, autocast, timed, inputs)
    _cut_step(model, images, optimizer, mask_ratio, autocast, counted, inputs)
    times.clear()
    for _ in range(rounds):
        _cut_step(model, images, optimizer, mask_ratio, autocast, timed, inputs)
    for (name, direction), values in times.items():
        setattr(phases[name], f"{direction}_ms", 1e3 * median(values))
    return dict(phases)


def _cut_step(
    model: MaskedAutoencoder,
    images: Tensor,
    optimizer: torch.optim.Optimizer,
    mask_ratio: float,
    autocast: torch.autocast,
    meter: Callable[[str, str], AbstractContextManager[None]],
    inputs: list[Tensor],
) -> None:
    """One step; ``meter(phase, direction)`` surrounds each piece. ``inputs`` receives what the phases start from."""
    device = next(model.parameters()).device
    with meter("input", "forward"):
        images = images.to(device, non_blocking=True)
    grid = model.patch_grid(images)
    with meter("masking", "forward"):
        masking = random_masking(len(images), grid.num_patches, mask_ratio, device=device)
    scored = predicted(masking, model.config.predicted_share)
    inputs[:] = [images, *masking, scored.ids_mask]
    x: Any = None
    ends: list[tuple[str, Tensor | None, Tensor]] = []
    for name, run in {
        "embed": lambda x: model.embed(images, masking.ids_keep),
        "encoder": model.encode,
        "scatter": lambda x: model.decoder_input(x, masking.ids_restore, grid),
        "decoder": lambda x: model.decode(x, scored.ids_mask, grid),
        "loss": lambda x: model.loss(x, images, scored.ids_mask),
    }.items():
        start = None if x is None else x.detach().requires_grad_()
        inputs += [] if start is None else [start]
        with meter(name, "forward"), autocast:
            x = run(start)
        ends.append((name, start, x))
    grad = None
    for name, start, end in reversed(ends):
        with meter(name, "backward"):
            end.backward(grad)
        grad = None if start is None else start.grad
    with meter("optimizer", "forward"):
        optimizer.step()
        optimizer.zero_grad()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
