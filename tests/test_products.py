"""The products of linear layers, by whichever library: one set of numbers, and PyTorch keeps its sight of them."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from mae.model.block import Block, linear
from mae_kernels import products

OURS = torch.ops.mae_kernels.linear.default, torch.ops.mae_kernels.weight_gradient.default
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of our ops, as they are called."""
    names = []
    for name in ("_linear", "_weight_gradient"):
        op = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, op=op, name=name: (names.append(name), op(*args))[1])
    return names


@pytest.fixture
def family(request, monkeypatch):
    monkeypatch.setattr(products, "_AMD_FAMILY", request.param)
    monkeypatch.setattr(products, "_FEWEST_PRODUCTS", 0)
    return request.param


def operands(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    x, weight = torch.randn(2, rows // 2, inputs), torch.randn(outputs, inputs)
    return x, weight, torch.randn(outputs), torch.randn(2, rows // 2, outputs)


def error(ours: torch.Tensor, gold: torch.Tensor) -> float:
    return (ours.double() - gold).abs().max().item()


@pytest.mark.parametrize("family", [0, 25, 26], indirect=True)
@pytest.mark.parametrize(
    "sizes", [(50, 96, 160), (50, 160, 96), (1024, 24, 40), (1024, 40, 24)], ids=lambda sizes: "x".join(map(str, sizes))
)
def test_products_are_pytorchs(sizes, family):
    """To the rounding of a float32 sum in one chain, with every bias, scratch memory and factor."""
    x, weight, bias, grad = operands(*sizes)
    gold_x, gold_weight, gold_grad = (t.double() for t in (x, weight, grad))
    (rows, inputs, outputs), eps = sizes, torch.finfo(torch.float32).eps
    with torch.no_grad():
        for b in (None, bias, bias[:1].expand(sizes[2])):
            gold = F.linear(gold_x, gold_weight, b if b is None else b.double())
            for tokens in (x, x.flatten(0, 1)):
                out = products.linear(tokens, weight, b)
                assert out.shape == (*tokens.shape[:-1], outputs)
                assert error(out.view_as(gold), gold) <= 4 * inputs**0.5 * eps * gold.std()
        gold = gold_grad @ gold_weight
        for scratch in (None, torch.full_like(x, torch.nan)):
            for divisor in (1, 4):
                g_x = products.input_gradient(grad, weight, scratch, divisor)
                assert error(g_x, gold / divisor) <= 4 * outputs**0.5 * eps * gold.std() / divisor
        gold = gold_grad.flatten(0, 1).t() @ gold_x.flatten(0, 1)
        g_weight = products.weight_gradient(grad, x)
        assert g_weight.is_contiguous()
        assert error(g_weight, gold) <= 4 * rows**0.5 * eps * gold.std()


@pytest.mark.parametrize(
    ("family", "forward", "backward"),
    [(0, [], []), (25, ["_linear"], ["_linear"]), (26, ["_linear"], ["_linear", "_weight_gradient"])],
    indirect=["family"],
)
def test_each_family_has_its_library(family, forward, backward, calls):
    """MKL takes the gradient of the weight on Zen 4, oneDNN every product on Zen 5."""
    layer, (x, *_, grad) = torch.nn.Linear(12, 8), operands(6, 12, 8)
    out = linear(x.requires_grad_(), layer)
    assert calls == forward
    out.backward(grad)
    assert calls == forward + backward


@pytest.mark.parametrize("family", [26], indirect=True)
def test_small_products_and_other_dtypes_are_left_to_pytorch(family, monkeypatch):
    x, *_ = operands(8, 16, 32)
    assert products.onednn_is_faster("forward", x, 32)
    monkeypatch.setattr(products, "_FEWEST_PRODUCTS", 8 * 16 * 32 + 1)
    assert not products.onednn_is_faster("forward", x, 32)
    monkeypatch.setattr(products, "_FEWEST_PRODUCTS", 0)
    for dtype in (torch.float64, torch.float16):
        assert not products.onednn_is_faster("forward", x.to(dtype), 32)
    assert not products.onednn_is_faster("forward", x.to("meta"), 32)
    half = x.bfloat16()
    assert [products.onednn_is_faster(name, half, 32) for name in ("forward", "weight")] == [True, False]


@pytest.mark.parametrize("family", [0, 26], indirect=True)
def test_autocast_is_that_of_a_layer(family):
    x, layer = torch.randn(2, 5, 16, requires_grad=True), torch.nn.Linear(16, 32)
    leaves = x, layer.weight, layer.bias
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = linear(x, layer), layer(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    ours, expected = (torch.autograd.grad(out, leaves, grad) for out in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", [26], indirect=True)
def test_pytorch_sees_what_it_has_to(family):
    """A second derivative, maps over samples, exported graphs and a count of operations, as without oneDNN."""
    block, x = Block(16, 2, 4.0), torch.randn(3, 5, 16)
    with FlopCounterMode(display=False) as ours:
        block(x).sum().backward()
    grads = [p.grad.clone() for p in block.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_AMD_FAMILY", 0)
        block.zero_grad()
        with FlopCounterMode(display=False) as expected:
            block(x).sum().backward()
    assert ours.get_total_flops() == expected.get_total_flops() > 0
    torch.testing.assert_close(grads, [p.grad for p in block.parameters()], rtol=1e-4, atol=1e-5)

    torch.testing.assert_close(torch.vmap(block)(x[:, None])[:, 0], block(x), rtol=1e-4, atol=1e-5)
    layer, y = torch.nn.Linear(16, 8), torch.randn(2, 3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(linear(y, layer).square().sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y)
    plain = 2 * (torch.ones(2, 3, 16) @ layer.weight.t() @ layer.weight)
    torch.testing.assert_close(second, plain, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(block, (x,))
    assert not [node for node in exported.graph.nodes if "mae_kernels.linear" in str(node.target)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", [26], indirect=True)
def test_transforms_differentiate_it(family, compiled):
    layer, x, v = torch.nn.Linear(16, 8), torch.randn(2, 3, 16), torch.randn(2, 3, 16)

    def loss(x):
        return linear(x, layer).square().sum()

    transforms = {
        "jvp": lambda x: torch.func.jvp(lambda x: linear(x, layer), (x,), (v,))[1],
        "second": torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum()),
        "hvp": lambda x: torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1],
        "each": lambda x: torch.vmap(torch.func.grad(loss))(x[:, None])[:, 0],
    }
    square = 2 * layer.weight.t() @ layer.weight
    gold = {
        "jvp": v @ layer.weight.t(),
        "second": 2 * torch.func.grad(loss)(x) @ square,
        "hvp": v @ square,
        "each": torch.func.grad(loss)(x),
    }
    torch.compiler.reset()
    for name, transform in transforms.items():
        ours = (torch.compile(transform, backend="aot_eager") if compiled else transform)(x)
        torch.testing.assert_close(ours, gold[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", [26], indirect=True)
def test_what_a_layer_refuses_and_what_is_switched_off(family):
    layer, x = torch.nn.Linear(16, 8), torch.randn(2, 3, 16)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16(), layer)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), layer)).tangent
    torch.testing.assert_close(tangent, x @ layer.weight.t())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.onednn_is_faster("forward", x, 8)


@pytest.mark.parametrize("family", [26], indirect=True)
def test_compiled_blocks_keep_it(family, request):
    """As often as eager ones call it: none of its results is computed again."""
    block, graphs, inputs, found = Block(16, 2, 4.0), [], [], []

    def keep(graph, inputs):
        graphs.append(Counter(node.target for node in graph.graph.nodes if node.target in OURS))
        return make_boxed_func(graph)

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=keep), dynamic=True)
    for rows in (3, 4):
        inputs.append([torch.randn(rows, 5, 16, requires_grad=True), *block.parameters()])
        found.append(torch.autograd.grad(compiled(inputs[-1][0]).square().sum(), inputs[-1]))
    calls = request.getfixturevalue("calls")
    for leaves, ours in zip(inputs, found, strict=True):
        calls.clear()
        expected = torch.autograd.grad(block(leaves[0]).square().sum(), leaves)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert Counter(calls) == {"_linear": 8, "_weight_gradient": 4}
    assert sum(graphs, Counter()) == {OURS[0]: 8, OURS[1]: 4}
