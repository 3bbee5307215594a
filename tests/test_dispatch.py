"""How the ops reach PyTorch: fakes, compilers, autocast, functional transforms, checkpointing, back-ends."""

import shutil
from functools import partial

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    OPS_BY_NAME,
    cast,
    compare,
    dispatcher_calls,
    for_compilers,
    images,
    patch_embed_inputs,
    run,
    tokens,
)
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mae_kernels import (
    gather_tokens,
    linear_masked_mse,
    masked_mse,
    patch_embed,
    random_masking,
    reference,
    scatter_mask_tokens,
)

pytestmark = pytest.mark.usefixtures("backend")

OPS = torch.ops.mae_kernels
U8 = torch.uint8


def call(i, op, args):
    in_float64 = any(isinstance(x, torch.Tensor) and x.dtype == F64 for x in args)
    name = f"{i} {op._qualified_op_name.split('::')[1]}"
    return pytest.param(op, args, id=name, marks=pytest.mark.eager if in_float64 else ())


CALLS = [call(i, op, args) for i, (op, *args) in enumerate(dispatcher_calls())]


def on_device(args):
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, args)


def is_interpreted(backend):
    return backend == "triton" and DEVICE == "cpu"


def test_every_op_is_called():
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mae_kernels::")}
    assert defined == {op._qualified_op_name for op, *_ in dispatcher_calls()}


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_opcheck(op, args, backend):
    # PyTorch compiles the same op in both back-ends; what it does to its arguments and returns differs.
    only = {"test_utils": ("test_schema", "test_faketensor")} if is_interpreted(backend) else {}
    torch.library.opcheck(op.default, tuple(on_device(args)), **only)


# Positions of the arguments that have a gradient.
GRADIENTS = {
    OPS.gather_tokens: (0,),
    OPS.scatter_mask_tokens: (0, 1, 3),
    OPS.masked_mse: (0,),
    OPS.linear_masked_mse: (0, 1, 2),
    OPS.patch_embed: (0, 1, 2, 3, 5),
}


@pytest.mark.eager
@pytest.mark.parametrize(("op", "args"), [call for call in CALLS if call.values[0] in GRADIENTS])
def test_opcheck_with_gradients(op, args):
    if op is OPS.linear_masked_mse:
        args = [*args[:7], [True, True, args[2] is not None], *args[8:]]  # needs
    leaves = [
        x.detach().requires_grad_() if i in GRADIENTS[op] and x is not None and x.is_floating_point() else x
        for i, x in enumerate(on_device(args))
    ]
    torch.library.opcheck(op.default, tuple(leaves))


def to_fake_gpu(args):
    """The same shapes, strides and dtypes on a GPU that need not exist; inside a FakeTensorMode."""

    def fake(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

    return tree_map(lambda x: fake(x) if isinstance(x, torch.Tensor) else x, args)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_fakes_foretell_shape_dtype_and_strides(op, args):
    """Beside the real tensors, and on a GPU that need not exist."""

    def described(results, device):
        assert {x.device.type for x in tree_leaves(results)} == {device}
        return [(x.shape, x.dtype, x.stride() if x.numel() else None) for x in tree_leaves(results)]

    args = on_device(args)
    real = described(op(*args), DEVICE)
    with FakeTensorMode() as mode:
        fake = op(*tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, args))
        on_gpu = op(*to_fake_gpu(args))
    assert described(fake, DEVICE) == real
    assert described(on_gpu, "cuda") == real


# A compiler sees the same op in both back-ends: what the kernels meet of it is in test_inductor.
@pytest.mark.parametrize("backend", ["eager"] if DEVICE == "cpu" else ["eager", "triton"], indirect=True)
@pytest.mark.parametrize("name", for_compilers(OPS_BY_NAME))
def test_compile(name):
    op, build, wrt = OPS_BY_NAME[name]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (5, 7, 11):
            inputs = build(n)
            grad = torch.randn_like(op(**inputs)) if wrt else None
            expected, ours = run(op, inputs, grad, wrt), run(compiled, inputs, grad, wrt)
            assert all(torch.equal(ours[key], expected[key]) for key in expected)


class Tiny(torch.nn.Module):
    """Every op once, around a linear encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(24, 3, 4, 8) / 10)
        self.bias = torch.nn.Parameter(torch.randn(24))
        self.prefix = torch.nn.Parameter(torch.randn(1, 1, 24))
        self.mask_token = torch.nn.Parameter(torch.randn(1, 1, 24))
        self.register_buffer("pos_embed", torch.randn(1, 15, 24))
        self.encoder = torch.nn.Linear(24, 24)
        self.head = torch.nn.Linear(24, 96)

    def forward(self, images, noise):
        masking = random_masking(images.shape[0], 14, noise=noise)
        x = patch_embed(images, self.weight, self.bias, self.pos_embed[:, 1:], masking.ids_keep, prefix=self.prefix)
        x = scatter_mask_tokens(self.encoder(x), self.mask_token, masking.ids_restore, self.pos_embed)
        pred = self.head(x)[:, 1:]
        first = masked_mse(pred, images, patch_size=(4, 8), mask=masking.mask)
        hidden, options = gather_tokens(x[:, 1:], masking.ids_mask), {"patch_size": (4, 8), "norm_pix": False}
        second = masked_mse(self.head(hidden), images, ids_mask=masking.ids_mask, **options)
        head = self.head.weight, self.head.bias
        return first + second + linear_masked_mse(hidden, *head, images, masking.ids_mask, **options)


def tiny_inputs(n):
    return images(n, 3, 8, 56), torch.rand(n, 14)


def loss_and_gradients(model, *args):
    loss = model(*args)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # the kernels meet the strides that the compiler chose
def test_inductor():
    model, args = Tiny(), tiny_inputs(5)
    torch._dynamo.reset()
    torch.testing.assert_close(
        loss_and_gradients(torch.compile(model, fullgraph=True), *args), loss_and_gradients(model, *args)
    )


@pytest.mark.parametrize("backend", ["eager"], indirect=True)  # an export holds the same op in both back-ends
def test_export():
    model, batch = Tiny(), torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model, tiny_inputs(5), dynamic_shapes=({0: batch}, {0: batch}))
    called = [node.target for node in program.graph.nodes if "mae_kernels" in str(node.target)]
    names = ("masking", "patch_embed", "scatter_mask_tokens", "masked_mse", "gather_tokens", "masked_mse")
    assert called == [getattr(OPS, name).default for name in (*names, "linear_masked_mse")]
    exported, args = program.module(), tiny_inputs(11)
    with torch.no_grad():
        assert torch.equal(exported(*args), model(*args))
    args = tiny_inputs(5)
    ours, expected = loss_and_gradients(exported, *args), loss_and_gradients(model, *args)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(x, y) for x, y in zip(ours[1], expected[1], strict=True))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("table", "pixels"), [(True, F32), (False, F32), (True, U8), (True, BF16)])
def test_autocast_of_the_projection(table, pixels, dtype):
    inputs = patch_embed_inputs(3, (7, 7), (8, 16), 3, 24, pixels=pixels, k=12, r=int(table), pos=table)
    wrt = ("weight", "bias", "pos_embed", "prefix") if table else ("weight", "bias")

    def under_autocast(op, **kwargs):
        if kwargs["weight"].dtype == F64:
            return op(**kwargs)
        with torch.autocast(DEVICE, dtype=dtype):
            return op(**kwargs)

    grad = tokens(3, 12 + int(table), 24, F32 if table else dtype)
    ops = [partial(under_autocast, op) for op in (patch_embed, reference.patch_embed)]
    result = compare(*ops, inputs, grad, wrt)
    assert result["value"].dtype == (F32 if table else dtype)  # the frozen float32 table promotes, as published
    with torch.autocast(DEVICE, dtype=dtype):
        inside = run(patch_embed, inputs, grad, wrt)
    assert all(torch.equal(inside[name], result[name]) for name in result)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("name", ["gather", "scatter", "scatter, no table", "loss, mask", "loss, ids"])
def test_autocast_leaves_the_other_ops_alone(name, dtype):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = cast(build(1), dtype)
    grad = torch.randn_like(op(**inputs))
    outside = run(op, inputs, grad, wrt)
    with torch.autocast(DEVICE, dtype=BF16):
        inside = run(op, inputs, grad, wrt)
    for key, x in outside.items():
        assert inside[key].dtype == x.dtype
        assert torch.equal(inside[key], x)


@pytest.mark.eager
def test_autocast_keeps_float64():
    inputs = patch_embed_inputs(3, (7, 7), (8, 16), 3, 24, dtype=F64, k=12)
    with torch.autocast(DEVICE, dtype=BF16):
        inside = patch_embed(**inputs)
    assert torch.equal(inside, patch_embed(**inputs))


@pytest.mark.eager
def test_autocast_and_compile():
    model, args = Tiny(), tiny_inputs(5)
    torch._dynamo.reset()
    with torch.autocast(DEVICE, dtype=BF16):
        expected, ours = model(*args), torch.compile(model, fullgraph=True, backend="aot_eager")(*args)
    assert ours.dtype == expected.dtype == F32
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0)  # a compiler may round to bfloat16 elsewhere


class CountPatchEmbed(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is OPS.patch_embed.default
        return func(*args, **(kwargs or {}))


def keep_patch_embed(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is OPS.patch_embed.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.eager
@pytest.mark.parametrize(("policy", "runs"), [(None, 2), (keep_patch_embed, 1)], ids=["all", "selective"])
def test_checkpointing(policy, runs):
    model, args = Tiny(), tiny_inputs(5)
    expected = loss_and_gradients(model, *args)
    context = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if policy else {}
    with CountPatchEmbed() as counter:
        loss = checkpoint(model, *args, use_reentrant=False, **context)
        grads = torch.autograd.grad(loss, list(model.parameters()))
    assert counter.count == runs
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(x, y) for x, y in zip(grads, expected[1], strict=True))


# PyTorch without CUDA cannot record a gradient of a tensor that claims to be there: no leaf requires one. Only the
# back-end "triton" might ask what kind of GPU it is.
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", for_compilers(OPS_BY_NAME))
def test_compile_and_export_for_a_gpu(name):
    op, build, _ = OPS_BY_NAME[name]
    inputs = build(5)
    inputs |= {key: torch.tensor(inputs[key]) for key in ("mean", "std") if key in inputs}

    class Module(torch.nn.Module):
        def forward(self, **kwargs):
            return op(**kwargs)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch._dynamo.config.patch(recompile_limit=1):
        fakes = to_fake_gpu(inputs)
        assert op(**fakes).device.type == "cuda"
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (5, 7):
            out = compiled(**to_fake_gpu(build(n) | {key: inputs[key] for key in ("mean", "std") if key in inputs}))
            assert out.device.type == "cuda"
        graph = torch.export.export(Module(), (), kwargs=fakes).graph
    assert any("mae_kernels" in str(node.target) for node in graph.nodes)
