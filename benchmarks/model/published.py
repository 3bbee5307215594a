"""What the published pipeline runs around its transformer blocks, counted op by op on tensors without memory."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import work
from benchmarks.model.ops import predict
from benchmarks.model.step import Part, rate_of
from benchmarks.shapes import Shape
from benchmarks.work import BF16, F32, Work


def predict_published_glue(shape: Shape, ceilings: dict, dtype: str = "bfloat16") -> Part:
    """Of the published code, run eagerly: masking, embedding, un-shuffling, head and loss, forward and backward.

    Products and other kernels follow each other, so that bytes and FLOPs add up.
    """
    n, tokens, d, e = shape.batch, 1 + shape.num_patches, shape.decoder_dim, shape.patch_values
    compute, traffic = getattr(torch, dtype), EagerTraffic()

    def head(device: torch.device) -> dict:
        sizes = {"input": (n, tokens, d), "weight": (e, d), "bias": (e,)}
        return {name: torch.empty(size, device=device, requires_grad=True) for name, size in sizes.items()}

    replaced = [
        work.random_masking(shape),
        work.patch_embed(shape, F32, compute),
        work.scatter_mask_tokens(shape, compute),
        Work("linear", head, bytes=(1, 1), peer=F.linear),
        dataclasses.replace(work.masked_mse(shape, "full", F32, compute), peer=None),
    ]
    with FakeTensorMode():
        for one in replaced:
            arguments = one.arguments(torch.device("cpu"))
            leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
            with traffic, torch.autocast("cpu", torch.bfloat16, enabled=compute == BF16):
                out = one.reference(**arguments)
                if one.differentiable:
                    torch.autograd.grad(out, leaves, out.detach())
    flops = 4 * n * shape.num_patches * e * shape.embed_dim + 6 * n * tokens * e * d
    kernels = (
        predict(ceilings, traffic.bytes, 0, traffic.launches),
        predict(ceilings, 0, flops, 0, rate_of(ceilings, compute)),
    )
    return Part("glue", "published, eager", "forward and backward", kernels)


class EagerTraffic(TorchDispatchMode):
    """Counts bytes and launches of the ops inside a ``with`` block, each of them one kernel.

    A kernel reads each tensor that it takes and writes each one that it returns; of a table that is gathered from or
    added into, the rows in use.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        in_place = any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns)
        storages = {x.untyped_storage()._cdata for x in given}
        is_view = not in_place and all(x.untyped_storage()._cdata in storages for x in results)
        if func.namespace != "aten" or is_view or "empty" in name:
            return out
        self.launches += 1
        if name == "gather":
            self.bytes += args[2].nbytes + 2 * out.nbytes
        elif name == "scatter_add":  # out of place for fake tensors alone
            self.bytes += args[2].nbytes + 3 * args[3].nbytes
        else:
            read = [] if name in ("new_zeros", "ones_like") else given
            # Expanded tensors are small.
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in read + results)
        return out
