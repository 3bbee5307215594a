"""Optimizers: the published one, and Muon, which is not."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

_BLOCKS = {"blocks", "decoder_blocks"}


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.05) -> torch.optim.AdamW:
    """The published optimizer in one fused update: weight decay on all but biases and norms, the vectors among them.

    Source: He et al. 2021, appendix A.1.
    """
    return _adamw(_decayed((p for p in model.parameters() if p.requires_grad), weight_decay), lr)


def layerwise_adamw(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 0.65
) -> torch.optim.AdamW:
    """AdamW for fine-tuning: of each block a learning rate smaller than that of the block behind it.

    A group's ``lr_scale`` is ``layer_decay ** k`` for what lies k layers before the head: blocks, and before them
    embeddings, class token and positions as one. Neither these two nor biases and norms decay.

    Source: Clark et al. 2020, "ELECTRA"; He et al. 2021, appendix A.1, table 9.
    """
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    layers = 1 + max((layer for name in trained if (layer := _block(name)) is not None), default=-1)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in trained.items():
        is_first = name in _TOKENS or name.startswith("patch_embed.")
        block = _block(name)
        before_head = layers + 1 if is_first else 0 if block is None else layers - block
        groups.setdefault((before_head, p.ndim > 1 and name not in _TOKENS), []).append(p)
    described: list[dict[str, Any]] = [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "lr_scale": layer_decay**before_head}
        for (before_head, decays), params in groups.items()
    ]
    for group in described:
        group["lr"] = lr * group["lr_scale"]
    return torch.optim.AdamW(described, lr=lr, betas=(0.9, 0.999), fused=True)


_TOKENS = ("cls_token", "pos_embed")


def _block(name: str) -> int | None:
    """Which block of the encoder a parameter belongs to."""
    first, number, *_ = [*name.split("."), ""]
    return int(number) if first == "blocks" else None


def sgd(model: nn.Module, lr: float, weight_decay: float = 0.0) -> "Sgd":
    """With momentum 0.9, of what is trained."""
    return Sgd(_trained(model), lr, momentum=0.9, weight_decay=weight_decay, fused=True)


def lars(model: nn.Module, lr: float, weight_decay: float = 0.0) -> "Lars":
    """The published optimizer of linear probing, of what is trained."""
    return Lars(_trained(model), lr, momentum=0.9, weight_decay=weight_decay, fused=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Sgd(torch.optim.SGD):
    """PyTorch's fused SGD, which where its first step is left out would go on with a momentum that nobody wrote."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for p in self._with_gradient():
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return super().step(closure)

    def _with_gradient(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class Lars(Sgd):
    """:class:`Sgd`, whose gradients of matrices are scaled to a thousandth of their matrix's norm.

    Biases and norms neither decay nor are scaled.

    Source: You et al. 2017, "Large Batch Training of Convolutional Networks".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        loss_scale = getattr(self, "grad_scale", None)
        if loss_scale is not None:  # GradScaler leaves the gradients of fused optimizers to them
            torch._foreach_div_([p.grad for p in self._with_gradient() if p.grad is not None], loss_scale)
            self.grad_scale = None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None and p.ndim > 1):
                p.grad.add_(p, alpha=group["weight_decay"])
                of_weight, of_gradient = p.norm(), p.grad.norm()
                scale = torch.where((of_weight > 0) & (of_gradient > 0), 0.001 * of_weight / of_gradient, 1.0)
                p.grad.mul_(scale)
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def muon(model: nn.Module, lr: float, weight_decay: float = 0.05) -> "MuonAdamW":
    """Muon for the matrices inside blocks, whose updates are orthogonalised, and :func:`adamw` for all else.

    Not the published recipe. Learning rate and weight decay are those of AdamW: an update is scaled to the size that
    AdamW's has. The projection of queries, keys and values is one matrix ``[3 D, D]``, as it is stored.

    Of sharded matrices (fully_shard) each of Muon's products communicates, five times three of them for a matrix. Its
    updates are computed in bfloat16, so that they are those of one process but for that rounding.

    Raises:
        ValueError: a model without matrices in its blocks, such as one that FSDP1 has made flat.

    Source: Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, the scale.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.ndim == 2 and _BLOCKS & {*name.split(".")}}
    if not matrices:
        raise ValueError("muon: the model has no matrices in blocks; FSDP1 flattens them, fully_shard does not")
    rest = _decayed((p for name, p in trained.items() if name not in matrices), weight_decay)
    parts = _muon([{"params": [*matrices.values()]}], lr=lr, weight_decay=weight_decay), _adamw(rest, lr)
    return MuonAdamW([group for part in parts for group in part.param_groups])


def _decayed(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    parameters = [*parameters]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _adamw(groups: list[dict[str, Any]], lr: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def _muon(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Muon:
    return torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw", **options)


class MuonAdamW(torch.optim.Optimizer):
    """PyTorch's Muon and its fused AdamW as one optimizer, with one list of groups and one state.

    Schedulers, state dicts, copies and torch.distributed.checkpoint see nothing else. As of every fused optimizer of
    PyTorch a step does nothing where ``found_inf``, a tensor on the device that torch.amp.GradScaler or the trainer
    sets, is 1, and nothing is read back to find out.

    Args:
        groups: complete ones of torch.optim.Muon, told by their momentum, and of torch.optim.AdamW.
    """

    found_inf: torch.Tensor | None = None
    _adamw: Any  # it takes found_inf, and declares no such attribute

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._make_parts()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies and of load_state_dict
        super().__setstate__(state)
        self._make_parts()

    def _make_parts(self) -> None:
        # They hold nothing of their own: a step gives them groups and state.
        self._muon, self._adamw = _muon([{"params": []}]), _adamw([{"params": []}])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in (self._muon, self._adamw):
            is_muon = part is self._muon
            part.state, part.param_groups = self.state, [g for g in self.param_groups if ("momentum" in g) is is_muon]
        self._adamw.found_inf = self.found_inf
        self._adamw.step()
        if self.found_inf is None:
            self._muon.step()
        else:
            self._guarded_muon_step(self.found_inf)
        return loss

    def _guarded_muon_step(self, found_inf: torch.Tensor) -> None:
        """One matrix after the other, as PyTorch does it too, so that little is kept to take an update back."""
        for group in self._muon.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[p]:  # else the first one would begin with this gradient
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                before = [(x, x.clone()) for x in (p, self.state[p]["momentum_buffer"])]
                self._muon.param_groups = [{**group, "params": [p]}]
                self._muon.step()
                for x, old in before:
                    x.copy_(torch.where(found_inf.bool(), old, x))


OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: dict[OptimizerName, Callable[[nn.Module, float, float], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}
