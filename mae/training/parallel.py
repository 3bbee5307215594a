"""Several processes that train one model. Nothing else here knows how DistributedDataParallel and FSDP2 are used."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mae.model import Block, CrossBlock

Parallel = Literal["ddp", "fsdp"]

_PATIENCE = timedelta(minutes=30)  # of processes that wait for one that saves, or that compiles


class ProcessLost(Exception):
    """Another process of the run has ended; the message says so."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. On the host they talk by gloo, whatever the gradients take."""

    rank: int = 0
    count: int = 1
    host_group: dist.ProcessGroup | None = None  # None is the default one, for those who joined otherwise

    @property
    def leads(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's part of a batch."""
        part = batch_size // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def most(self, value: int) -> int:
        """The largest value of all processes."""
        if self.count == 1:
            return value
        x = torch.tensor(value)
        with self.lost_said():
            dist.all_reduce(x, dist.ReduceOp.MAX, self.host_group)
        return int(x)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            with self.lost_said():
                dist.all_gather_object(values, value, self.host_group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises in the block, all raise behind it, so that none waits for it."""
        problem = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            problem = error
        if problem := next(filter(None, self.gather(problem)), None):
            raise problem

    @contextmanager
    def lost_said(self) -> Iterator[None]:
        """What communication raises when another process is gone becomes :class:`ProcessLost`."""
        try:
            yield
        except RuntimeError as error:
            words = str(error).lower()
            if self.count == 1 or not any(word in words for word in ("gloo", "nccl", "closed")):
                raise
            raise ProcessLost("another process of this run has ended, and torchrun says which and why") from error

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes of a tensor on the device, without waiting for it."""
        if self.count > 1:
            x = x.clone()
            with self.lost_said():
                dist.all_reduce(x)
        return x / self.count


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun has started, joined while the block runs; without it this one alone."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        yield Processes()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), count, dist.new_group(backend="gloo", timeout=_PATIENCE))
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """This process's own GPU, where torchrun has started several on a machine."""
    local = os.environ.get("LOCAL_RANK")
    is_open = device.type == "cuda" and device.index is None
    return torch.device("cuda", int(local)) if is_open and local is not None else device


def distribute(
    model: nn.Module, parallel: Parallel, processes: Processes, param_dtype: torch.dtype | None = None
) -> nn.Module:
    """The model as all processes train it; of one process it is the model itself.

    Args:
        parallel: ``"ddp"`` holds all of it in each process, ``"fsdp"`` shards it block by block.
        param_dtype: for ``"fsdp"``, what parameters are gathered in; gradients are summed in float32.
    """
    if processes.count == 1:
        return model
    device = next(model.parameters()).device
    if parallel == "ddp":
        own = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option's new name is not known to torch 2.11
            return DistributedDataParallel(model, device_ids=own, broadcast_buffers=False, gradient_as_bucket_view=True)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (processes.count,))
    for block in (m for m in model.modules() if isinstance(m, (Block, CrossBlock))):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def plain(model: nn.Module) -> Any:
    """The autoencoder that was distributed, whose parameters may be sharded."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model itself, on the CPU: whole in the leading process, which all have to help."""
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a backward: gradients of several processes are only summed once they are complete."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def local(x: Tensor) -> Tensor:
    """A sum over sharded tensors, as each process can use it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def in_any_process(flag: Tensor, model: nn.Module) -> Tensor:
    """A flag on the device, 0 or 1 in float32, raised where it is raised in any process that trains the model."""
    for group in _groups_of(model):
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return flag


def _groups_of(model: nn.Module) -> Sequence[dist.ProcessGroup | None]:
    if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)):
        return [model.process_group]
    p = next(model.parameters())
    return p.device_mesh.get_all_groups() if isinstance(p, DTensor) else []
