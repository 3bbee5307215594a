"""Whole training steps to compare: the published pipeline, its best tuning, Hugging Face's model, and ours.

All train on the same images or clips; those that share the published layout of parameters train the same model in turn,
so that the largest ones fit into memory together.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from benchmarks.measure import DEVICE
from mae.checkpoints.configs import to_hugging_face_config
from mae.checkpoints.layouts import find_layout, from_layout, to_layout
from mae.training.optimizers import adamw
from mae.training.profile import LaunchCounter, saved_bytes
from mae.training.step import TrainingStep
from mae_kernels import Masking, apply, random_masking, reference

LABELS = {
    "a": "published pipeline as written",
    "b": "published, SDPA, fused AdamW, compiled",
    "c": "Hugging Face ViTMAE, SDPA",
    "C": "Hugging Face ViTMAE, SDPA, compiled",
    "g": "Hugging Face ViTMAE, SDPA, mae_kernels.apply",
    "d": "mae, eager",
    "e": "mae, compiled",
    "f": "mae, CUDA graphs",
}
COMPILED = "bCef"

# What the host calls to put work on a GPU, and to wait for one.
_LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")
_SYNC = re.compile(r"cuda(Stream|Device|Event)Synchronize")
# Lines of a compiled graph that run something: a generated kernel, or one of PyTorch's.
_COMPILED_CALL = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels\.|cpp_fused\w*\(|\w*\.run\(|torch\.ops\.|aten\.)", re.M)


class Batch(NamedTuple):
    """What a step trains on."""

    images: Tensor  # [N, C, H, W] or [N, C, T, H, W] on the host, in the dtype that the pipeline ships
    noise: Tensor  # [N, L] on the device
    mask_ratio: float


@dataclass
class Contender:
    """``step`` trains once, from images on the host to updated weights; ``loss`` is its forward alone."""

    name: str
    model: nn.Module
    step: Callable[[], object]
    loss: Callable[[], Tensor]
    batch: Batch
    optimizer: torch.optim.Optimizer

    def loss_and_gradients(self) -> dict[str, Tensor]:
        """Under the published names of the parameters."""
        loss = self.loss()
        loss.backward()
        gradients = from_layout({name: p.grad for name, p in self.model.named_parameters() if p.requires_grad})
        self.model.zero_grad()
        return {"the loss": loss.detach().clone(), **gradients}

    def saved_bytes(self) -> int:
        with saved_bytes(*self.model.parameters(), *self.model.buffers(), self.batch.noise) as kept:
            loss = self.loss()
        loss.backward()
        return kept()

    def launches_and_syncs(self) -> tuple[int, int]:
        """Per step. On a GPU of what the host called; without one, of ops and of calls in the compiled graph."""
        if DEVICE.type == "cuda":
            with torch.profiler.profile() as profiler:
                self.step()
            names = [event.name for event in profiler.events()]
            # one synchronisation is the profiler's, at the end
            return sum(bool(_LAUNCH.match(n)) for n in names), sum(bool(_SYNC.match(n)) for n in names) - 1
        if self.name in COMPILED:
            torch.compiler.reset()
            _, codes = run_and_get_code(lambda: self.loss().backward())
            calls = sum(len(_COMPILED_CALL.findall(code.partition("def call(")[2])) for code in codes)
            return calls, 0  # one graph without a break cannot read anything back
        with LaunchCounter(*(state["step"] for state in self.optimizer.state.values())) as counter:
            self.step()
        return counter.launches, counter.syncs


def contenders(names: str, model: nn.Module, batch: Batch, bfloat16: bool) -> list[Contender]:
    """Those of ``names`` that run here, on what the model takes.

    Args:
        names: letters of :data:`LABELS`.
        model: a MaskedAutoencoder on the device.
        batch: of uint8 images.
        bfloat16: autocast to it.
    """
    images, noise, ratio = batch
    floats = reference.normalize(images, model.patch_embed.pixel_mean.cpu(), model.patch_embed.pixel_std.cpu())
    if DEVICE.type == "cuda":
        images, floats = images.pin_memory(), floats.pin_memory()
    batch, normalized = batch._replace(images=images), batch._replace(images=floats)
    fused = adamw(model, lr=1e-4)
    made = []
    for name in names:
        if name == "a":
            made.append(_published(model, normalized, bfloat16))
        elif name == "b":
            loss = torch.compile(
                lambda x: reference.pretraining_loss(model, x, noise, ratio, F.scaled_dot_product_attention)
            )
            made.append(_plain("b", model, loss, fused, normalized, bfloat16))
        elif name in "cCg":
            if (peer := _hugging_face(model, ratio)) is None:
                continue
            if name == "g":
                apply(peer)
            run = torch.compile(peer) if name == "C" else peer
            optimizer = adamw(peer, lr=1e-4)
            made.append(
                _plain(name, peer, lambda x, run=run: run(x, noise=noise).loss, optimizer, normalized, bfloat16)
            )
        elif name != "f" or DEVICE.type == "cuda":
            execution = {"d": "eager", "e": "compile", "f": "graph"}[name]
            step = TrainingStep(model, fused, bfloat16=bfloat16, execution=execution)
            made.append(_ours(name, model, step, batch))
    return made


def _ours(name: str, model: nn.Module, step: TrainingStep, batch: Batch) -> Contender:
    def ship() -> Tensor:
        return batch.images.to(DEVICE, non_blocking=True)

    def masking() -> Masking:
        return random_masking(*batch.noise.shape, batch.mask_ratio, noise=batch.noise)

    def run() -> Tensor:
        return step(ship(), masking())

    return Contender(name, model, run, lambda: step.loss(ship(), *masking()), batch, step.optimizer)


def _plain(name, model, loss, optimizer, batch, bfloat16) -> Contender:
    def forward() -> Tensor:
        shipped = batch.images.to(DEVICE, non_blocking=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
            return loss(shipped)

    def step() -> Tensor:
        out = forward()
        out.backward()
        optimizer.step()
        optimizer.zero_grad()
        return out.detach()

    return Contender(name, model, step, forward, batch, optimizer)


def _published(model, batch, bfloat16) -> Contender:
    """With the engine's habits: the loss is read in every step, a gradient norm is computed and not used."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=True)  # PyTorch's default on GPUs

    def forward() -> Tensor:
        shipped = batch.images.to(DEVICE, non_blocking=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
            return reference.pretraining_loss(model, shipped, batch.noise, batch.mask_ratio)

    def step() -> float:
        loss = forward()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value}")
        loss.backward()
        torch.stack([p.grad.norm() for p in parameters]).norm()
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return value

    return Contender("a", model, step, forward, batch, optimizer)


def _hugging_face(model: nn.Module, mask_ratio: float) -> nn.Module | None:
    """The same model as theirs; None of one that theirs cannot be, such as one of clips."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    try:
        fields = to_hugging_face_config(model.config, mask_ratio)
    except ValueError:
        return None
    peer = ViTMAEForPreTraining(ViTMAEConfig(**fields, attn_implementation="sdpa"))
    peer.load_state_dict(to_layout(model.state_dict(), find_layout(peer.state_dict())))
    return peer.to(DEVICE).train()
