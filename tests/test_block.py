"""Norm and gelu that are computed again, and attention: PyTorch's numbers and gradients, less memory."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae.model.attention import attention
from mae.model.block import Block, gelu_linear, norm_linear
from mae.training.profile import saved_bytes
from mae_kernels import gather_tokens, reference


def plain_norm_linear(x, norm, weight, bias):
    return F.linear(norm(x), weight, bias)


def plain_gelu_linear(x, weight, bias):
    return F.linear(F.gelu(x), weight, bias)


def layer(name: str, dtype: torch.dtype = torch.float32):
    """Ours, PyTorch's, and inputs ``[2, 5, 12]`` to eight outputs."""
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    linear = nn.Linear(12, 8, dtype=dtype)
    if name == "gelu":
        return gelu_linear, plain_gelu_linear, (x, linear.weight, linear.bias)
    norm = nn.LayerNorm(12, eps=1e-6, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm_linear, plain_norm_linear, (x, norm, linear.weight, linear.bias)


def parameters_of(inputs) -> list[torch.Tensor]:
    return [p for x in inputs for p in (x.parameters() if isinstance(x, nn.Module) else [x])]


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_value_and_gradients(name):
    ours, plain, inputs = layer(name, torch.float64)
    leaves = parameters_of(inputs)
    out, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(2, 8, 5, dtype=torch.float64).transpose(1, 2)  # any strides
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_under_autocast(name, stream):
    """bfloat16 products, float32 gradients of float32 parameters; the error is PyTorch's own."""
    ours, plain, inputs = layer(name)
    x, *rest = inputs
    x = x.detach().to(stream).requires_grad_()
    gold = plain(x.double(), *[copy_in_double(r) for r in rest])
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(x, *rest), plain(x, *rest)
    assert out.dtype == torch.bfloat16
    error, allowed = ((y.double() - gold).abs().max().item() for y in (out, expected))
    assert error <= 2 * allowed + 1e-2 * gold.abs().max().item()
    leaves = parameters_of((x, *rest))
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in grads] == [p.dtype for p in leaves]
    for a, b in zip(grads, torch.autograd.grad(gold.sum(), leaves), strict=True):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def copy_in_double(x):
    if not isinstance(x, nn.Module):
        return x.double()
    return lambda tokens: F.layer_norm(tokens, (12,), x.weight.double(), x.bias.double(), x.eps)


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_autocast_leaves_float64_alone(name):
    ours, plain, inputs = layer(name, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_only_the_input_is_kept(name):
    ours, _, inputs = layer(name)
    with saved_bytes(*parameters_of(inputs)) as kept:
        ours(*inputs)
    assert kept() == 0


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_gradients_that_nobody_wants_are_not_computed(name):
    """No product for the weight when it is frozen, none for what lies before when nothing of that is trained."""
    ours, _, inputs = layer(name)
    leaves = parameters_of(inputs)
    out = ours(*inputs)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    for wanted in product([False, True], repeat=len(leaves)):
        for leaf, need in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(need)
            leaf.grad = None
        out = ours(*inputs)
        assert out.requires_grad == any(wanted)
        with CountProducts() as counter:
            if any(wanted):
                out.backward(grad)
        for leaf, g, need in zip(leaves, expected, wanted, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, g, rtol=0, atol=0)
        *before, weight, _ = wanted
        assert counter.count == any(before) + weight


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_second_derivatives(name):
    ours, plain, inputs = layer(name, torch.float64)
    leaves = parameters_of(inputs)
    grad = torch.randn(2, 5, 8, dtype=torch.float64)
    results = []
    for f in (ours, plain):
        grads = torch.autograd.grad(f(*inputs), leaves, grad, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves[:-1]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_compiles_as_one_graph(name):
    ours, _, inputs = layer(name)
    compiled = torch.compile(lambda: ours(*inputs), fullgraph=True, backend="aot_eager")
    leaves = parameters_of(inputs)
    expected = torch.autograd.grad(ours(*inputs).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(compiled().square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def random_block(dim: int = 16, heads: int = 2) -> Block:
    block = Block(dim, heads, mlp_ratio=4).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block


def test_block_is_the_published_one():
    block, x = random_block(), torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    out, expected = block(x), reference.transformer_block(x, block)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_some_tokens_of_a_block_are_those_of_all():
    block, x = random_block(), torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    leaves = [x, *block.parameters()]
    some, expected = block(x, ids), gather_tokens(block(x), ids)
    torch.testing.assert_close(some, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(some)
    for a, b in zip(torch.autograd.grad(some, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def explicit(packed, queries=None):
    q, k, v = packed.unbind(2) if queries is None else (queries, *packed.unbind(2))
    return reference.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def heads(parts: int, dtype: torch.dtype, tokens: int = 23):
    """``[3, tokens, parts, 2, 8]``, a view of a wider product."""
    wide = torch.randn(3, tokens, parts * 16 + 16, dtype=dtype)
    return wide[..., : parts * 16].unflatten(2, (parts, 2, 8)).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fewer", [False, True], ids=["all queries", "fewer queries"])
@pytest.mark.parametrize("chunk", [1, 2 * 2 * 7 * 23 * 2, 2**20], ids=["head by head", "two at a time", "at once"])
def test_attention(fewer, dtype, chunk, monkeypatch):
    """Values and gradients against float64; the error is at most twice that of the explicit formula."""
    monkeypatch.setattr("mae.model.attention.CHUNK_BYTES", chunk)
    inputs = [heads(2, dtype), heads(1, dtype, 7)[:, :, 0].detach().requires_grad_()] if fewer else [heads(3, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gold = explicit(*exact)
    grad = torch.randn(gold.shape, dtype=torch.float64).to(dtype)
    results = []
    for run in (attention, explicit):
        out = run(*inputs)
        assert (out.shape, out.dtype) == (gold.shape, dtype)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    golden = [gold, *torch.autograd.grad(gold, exact, grad.double())]
    for ours, peer, right in zip(*results, golden, strict=True):
        error, allowed = ((x.double() - right).abs().max().item() for x in (ours, peer))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * right.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fewer", [False, True], ids=["all queries", "fewer queries"])
def test_padding_takes_no_attention(fewer, dtype, monkeypatch):
    """Values and gradients are those of each sample without its padding; the padding gets no gradient."""
    monkeypatch.setattr("mae.model.attention.CHUNK_BYTES", 2 * 2 * 7 * 23 * 2)
    packed, queries = heads(2 if fewer else 3, dtype), heads(1, dtype, 7)[:, :, 0].detach().requires_grad_()
    keys = torch.rand(3, 23) < torch.tensor([[0.2], [0.6], [1.0]])
    keys[:, 4] = True
    out = attention(packed, queries if fewer else None, keys)
    grad = torch.randn(out.shape).to(dtype)
    if not fewer:
        grad *= keys[:, :, None, None]  # nobody reads what padding asks for
    ours = torch.autograd.grad(out, [packed, queries] if fewer else [packed], grad)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for n, row in enumerate(keys):
        inputs = [packed[n : n + 1, row].detach().double().requires_grad_()]
        inputs += [queries[n : n + 1].detach().double().requires_grad_()] if fewer else []
        alone = explicit(*inputs)
        rows = slice(None) if fewer else row
        torch.testing.assert_close(out[n, rows].double(), alone[0], rtol=tolerance, atol=tolerance)
        expected = torch.autograd.grad(alone, inputs, grad[n : n + 1, rows].double())
        torch.testing.assert_close(ours[0][n, row].double(), expected[0][0], rtol=tolerance, atol=2 * tolerance)
        assert ours[0][n, ~row].count_nonzero() == 0
        if fewer:
            torch.testing.assert_close(ours[1][n].double(), expected[1][0], rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("fewer", [False, True], ids=["all queries", "fewer queries"])
def test_attention_in_half_precision_is_a_well_behaved_op(fewer):
    dtype = torch.bfloat16
    packed = heads(2 if fewer else 3, dtype).detach().requires_grad_()
    queries = heads(1, dtype, 7)[:, :, 0].detach().requires_grad_() if fewer else None
    keys = torch.rand(3, 23) < 0.8 if fewer else None
    torch.library.opcheck(torch.ops.mae.attention.default, (packed, queries, keys), atol=2e-2, rtol=2e-2)


def test_attention_keeps_no_scores():
    for dtype in (torch.float32, torch.bfloat16):
        packed = heads(3, dtype, tokens=300)
        with saved_bytes(packed) as kept:
            attention(packed)
        assert kept() < 2 * packed.nbytes < 3 * 2 * 300 * 300 * packed.element_size()
