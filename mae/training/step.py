"""One training step: masks, forward, backward, update, without waiting for the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor, nn

from mae.training.parallel import accumulating, in_any_process, local, plain
from mae_kernels import Masking, axis_masking, block_masking, grid_masking, random_masking, tube_masking
from mae_kernels.patch_grid import PatchGrid

Execution = Literal["eager", "compile", "graph"]

# The backward computes norms, gelu and casts again, as the blocks do without a compiler. A memory budget below 1 does
# that too, but where it saves little it computes whole ops of ours again. ViT-Ti, batch 16: 37 MB saved per image in
# float32 and 19 MB in bfloat16, against 59 and 37 MB by default, in the same time on a CPU.
_RECOMPUTE = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}


def _random(batch_size: int, grid: tuple[int, ...], mask_ratio: float, **options: Any) -> Masking:
    return random_masking(batch_size, math.prod(grid), mask_ratio, **options)


StrategyName = Literal["random", "block", "grid", "tube", "axis"]
_STRATEGIES: dict[StrategyName, Callable[..., Masking]] = {
    "random": _random, "block": block_masking, "grid": grid_masking, "tube": tube_masking, "axis": axis_masking,
}  # fmt: skip


@dataclass(frozen=True)
class MaskStrategy:
    """Which patches are hidden, and what share of them; for other strategies pass masks of your own to the step."""

    name: StrategyName = "random"
    ratio: float = 0.75

    def __call__(self, batch_size: int, grid: tuple[int, ...], **options: Any) -> Masking:
        """Masks of a grid of patches; options are ``generator`` and ``device``.

        ``"random"`` draws what the published code draws and nothing else, so a seed gives its masks.
        """
        return _STRATEGIES[self.name](batch_size, grid, self.ratio, **options)


class Step:
    """Callable: tensors of a batch in, the loss out, and the model updated.

    Nothing is read back from the device. The result stays on it until someone prints it.

    Args:
        model: of any kind, or one wrapped in DistributedDataParallel or sharded by fully_shard.
        optimizer: see :mod:`mae.training.optimizers`. One that takes ``found_inf``, as PyTorch's fused ones do, changes
            nothing where the loss, or the norm that is clipped, is not finite; ``skipped`` counts that on the device.
        loss: of the model and a batch's tensors ``[N, ...]``, a scalar that is a mean over the batch.
        bfloat16: autocast to it.
        execution: ``"eager"``; ``"compile"``, one graph by torch.compile; ``"graph"``, the same replayed as a CUDA
            graph, which pays where the host launches more slowly than the GPU computes: small models and batches.
        micro_batches: parts in which a batch is computed, to fit into memory. The update is that of the whole batch.
        clip_grad: largest norm of the whole gradient, None for any. Only then the norm is computed.
        scaler: of the loss, for autocast to float16, which it turns on.

    Raises:
        ValueError: CUDA graphs asked for elsewhere.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[..., Tensor]
    micro_batches: int
    clip_grad: float | None
    scaler: torch.amp.GradScaler | None
    autocast: torch.dtype | None
    skipped: Tensor

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        *,
        bfloat16: bool = False,
        execution: Execution = "eager",
        micro_batches: int = 1,
        clip_grad: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.optimizer, self._loss = model, optimizer, loss
        self.micro_batches, self.clip_grad, self.scaler = micro_batches, clip_grad, scaler
        self.autocast = torch.float16 if scaler is not None else torch.bfloat16 if bfloat16 else None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self.skipped = torch.zeros((), device=device)
        if execution == "graph" and device.type != "cuda":
            raise ValueError(f"TrainingStep: execution 'graph' replays CUDA graphs, but the model is on {device}")
        self._replayed = execution == "graph"
        self.loss = self._forward if execution == "eager" else self._compiled()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Train on tensors ``[N, ...]`` on the model's device, N a multiple of micro_batches.

        Returns:
            The loss, a float32 scalar on the device.
        """
        n = len(inputs[0])
        if n % self.micro_batches:
            raise ValueError(f"TrainingStep: {n} images cannot be cut into {self.micro_batches} equal micro-batches")
        if self._replayed:  # what the step before left in the graphs' memory may be overwritten; its micro-batches not
            torch.compiler.cudagraph_mark_step_begin()
        parts = zip(*(x.chunk(self.micro_batches) for x in inputs), strict=True)
        losses = [self._backward(part, last=i == self.micro_batches) for i, part in enumerate(parts, start=1)]
        loss = torch.stack(losses).sum()
        self._update(loss)
        self.optimizer.zero_grad()
        return loss

    def _update(self, loss: Tensor) -> None:
        scaler: Any = self.scaler  # whose _scale is declared as one that may be None
        if scaler is not None:
            if self.clip_grad is not None:
                scaler.unscale_(self.optimizer)
                self._clip(self.clip_grad)
            before = scaler._scale.clone()  # update changes it in place; get_scale would wait for the device
            scaler.step(self.optimizer)
            scaler.update()
            self.skipped += (scaler._scale < before).float()
            return
        finite = loss.isfinite()
        if self.clip_grad is not None:
            finite &= self._clip(self.clip_grad).isfinite()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "found_inf") or getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = in_any_process((~finite).float(), self.model)
            self.skipped += optimizer.found_inf
        optimizer.step()

    def _clip(self, most: float) -> Tensor:
        return local(torch.nn.utils.clip_grad_norm_(self._parameters, most))

    def _backward(self, inputs: tuple[Tensor, ...], last: bool) -> Tensor:
        with accumulating(self.model, last):
            loss = self.loss(*inputs)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach().clone() if self._replayed else loss.detach()  # a replay overwrites its results

    def _forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, self.autocast, enabled=self.autocast is not None):
            loss = self._loss(self.model, *inputs)
        return loss / self.micro_batches

    def _compiled(self) -> Callable[..., Tensor]:
        several_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
        compiled = torch.compile(
            self._forward,
            fullgraph=not several_processes,  # what DDP and FSDP do around modules is left to Python
            dynamic=False,
            mode="reduce-overhead" if self._replayed else None,
        )

        def run(*inputs: Tensor) -> Tensor:
            with torch._functorch.config.patch(_RECOMPUTE):
                return compiled(*inputs)

        return run


def pretraining_loss(model: nn.Module, images: Tensor, *masks: Tensor) -> Tensor:
    """Of images and the tensors of a :class:`mae_kernels.Masking`."""
    return model(images, masking=Masking(*masks)).loss


class TrainingStep(Step):
    """A :class:`Step` of pre-training: images in, and masks, which the step draws where they are not given.

    Args:
        model: a :class:`mae.MaskedAutoencoder`, or one that is distributed.
        strategy: which patches are hidden.
        optimizer, options: as of :class:`Step`.
    """

    strategy: MaskStrategy

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        strategy: MaskStrategy = MaskStrategy(),
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, pretraining_loss, **options)
        self.strategy, self._patch_size = strategy, plain(model).config.patch_size

    def __call__(  # type: ignore[override]  # of a subclass that draws what is missing
        self, images: Tensor, masking: Masking | None = None
    ) -> Tensor:
        """Train on images ``[N, C, H, W]`` or clips ``[N, C, T, H, W]``.

        Args:
            images: on the model's device, N a multiple of micro_batches.
            masking: the masks, drawn on the device by the strategy if None.

        Returns:
            The loss, a float32 scalar on the device.
        """
        if masking is None:
            grid = PatchGrid.of("TrainingStep", images, self._patch_size).grid
            masking = self.strategy(len(images), grid, device=images.device)
        if self.micro_batches > 1 and masking.ids_keep.shape[1] + masking.ids_mask.shape[1] > masking.mask.shape[1]:
            raise ValueError("TrainingStep: the mean over micro-batches needs masks with the same count in every row")
        return super().__call__(images, *masking)
