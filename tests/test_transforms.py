"""What autograd, torch.func and inference do with the ops: each transform works, or is refused in a sentence."""

import inspect
from itertools import combinations

import pytest
import torch
from cases import OPS_BY_NAME, for_compilers, run
from conftest import DEVICE
from torch.func import grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from mae_kernels import kernels, masking_from_mask, patchify, random_crop_boxes, unpatchify, use_backend

pytestmark = pytest.mark.usefixtures("backend")

DIFFERENTIABLE = [name for name in OPS_BY_NAME if OPS_BY_NAME[name][2]]


@pytest.fixture
def n(backend) -> int:
    """Samples of a batch: the interpreter is slow."""
    return 1 if backend == "triton" and DEVICE == "cpu" else 3


@pytest.mark.eager
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_gradient(name, n):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(n)
    grad = torch.randn_like(op(**inputs))
    expected = run(op, inputs, grad, wrt)
    ours = torch.func.grad(lambda leaves: (op(**{**inputs, **leaves}) * grad).sum())({key: inputs[key] for key in wrt})
    assert all(torch.equal(ours[key], expected[key]) for key in wrt)


@pytest.mark.parametrize("computed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["computed", "leaves"])
@pytest.mark.eager
@pytest.mark.parametrize("name", for_compilers(DIFFERENTIABLE))
def test_compiled_functional_gradient(name, computed, n):
    """Of leaves, and of leaves beside a tensor that was computed from one."""
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(n)
    grad = torch.randn_like(op(**inputs))

    def loss(leaves):
        if computed:
            leaves = {**leaves, wrt[0]: 2 * leaves[wrt[0]]}
        return (op(**{**inputs, **leaves}) * grad).sum()

    leaves = {key: inputs[key] for key in wrt}
    expected = torch.func.grad(loss)(leaves)
    torch._dynamo.reset()
    ours = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(leaves)
    for key in wrt:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-6, atol=0, msg=key)


@pytest.mark.eager
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name, n):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(n)

    def loss(x):
        return op(**{**inputs, wrt[0]: x}).pow(2).sum()

    def refused():
        return pytest.raises(RuntimeError, match="second derivatives are not supported")

    leaf = inputs[wrt[0]].clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with refused():
        torch.autograd.grad(grad.pow(2).sum(), leaf, retain_graph=True)
    with refused():  # a gradient penalty: the first term has a gradient, which must not pass for that of both
        torch.autograd.grad(value + grad.pow(2).sum(), leaf, retain_graph=True)
    with refused():
        grad.pow(2).sum().backward()
    with refused():
        torch.func.grad(lambda x: torch.func.grad(loss)(x).pow(2).sum())(leaf.detach())


@pytest.mark.eager
@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_inference_mode(name, n):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(n)
    expected = run(op, inputs)["value"]
    for key in wrt:
        inputs[key].requires_grad_()
    with torch.inference_mode():
        out = op(**inputs)
    assert out.is_inference()
    assert torch.equal(out, expected)


def stacked(build, n=3):
    """Two different inputs, their tensors as one with a leading dimension to map, and what else both have."""
    both = [build(n), build(n)]
    tensors = {key: [x[key] for x in both] for key in both[0] if isinstance(both[0][key], torch.Tensor)}
    rest = {key: x for key, x in both[0].items() if key not in tensors}
    return [{**x, **rest} for x in both], {key: torch.stack(xs) for key, xs in tensors.items()}, rest


# PyTorch says once for each op that it maps sample by sample.
ignore_slowness = pytest.mark.filterwarnings("ignore:There is a performance drop")


@ignore_slowness
@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_vmap(name, n):
    op, build, _ = OPS_BY_NAME[name]
    both, mapped, rest = stacked(build, n)
    out = vmap(lambda tensors: op(**tensors, **rest))(mapped)
    assert torch.equal(out, torch.stack([op(**inputs) for inputs in both]))


@ignore_slowness
@pytest.mark.eager
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_through_vmap(name):
    """Gradients of each sample, of all mapped inputs at once, and of inputs that all samples share."""
    op, build, wrt = OPS_BY_NAME[name]
    both, mapped, rest = stacked(build)
    grads = torch.randn_like(torch.stack([op(**inputs) for inputs in both]))
    leaves, others = {key: mapped[key] for key in wrt}, {key: x for key, x in mapped.items() if key not in wrt}

    def product(leaves, others, grad):
        return (op(**leaves, **others, **rest) * grad).sum()

    expected = [run(op, inputs, g, wrt) for inputs, g in zip(both, grads, strict=True)]
    of_each = vmap(grad(product))(leaves, others, grads)
    at_once = grad(lambda *args: vmap(product)(*args).sum())(leaves, others, grads)
    of_leaves = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    vmap(product)(of_leaves, others, grads).sum().backward()
    for key in wrt:
        stack = torch.stack([x[key] for x in expected])
        assert torch.equal(of_each[key], stack)
        assert torch.equal(at_once[key], stack)
        assert torch.equal(of_leaves[key].grad, stack)

    first = {key: both[0][key] for key in wrt}
    shared = grad(lambda *args: vmap(product, (None, 0, 0))(*args).sum())(first, others, grads)
    again = run(op, {**both[1], **first}, grads[1], wrt)
    for key in wrt:
        torch.testing.assert_close(shared[key], expected[0][key] + again[key])


@ignore_slowness
@pytest.mark.eager
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_over_the_backward(name):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(3)
    leaves = [inputs[key].clone().requires_grad_() for key in wrt]
    out = op(**{**inputs, **dict(zip(wrt, leaves, strict=True))})
    grads = torch.randn(2, *out.shape)
    expected = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in grads]
    together = torch.autograd.grad(out, leaves, grads, is_grads_batched=True)
    for ours, *each in zip(together, *expected, strict=True):
        assert torch.equal(ours, torch.stack(each))
    jacobian = jacrev(lambda x: op(**{**inputs, wrt[0]: x}).flatten()[:2])(inputs[wrt[0]])
    for row, i in zip(jacobian, range(2), strict=False):
        one = torch.zeros(out.numel())
        one[i] = 1
        assert torch.equal(row, run(op, inputs, one.view_as(out), wrt[:1])[wrt[0]])


class Outputs(TorchDispatchMode):
    """How many values each output has of the ops that compute gradients."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "mae_kernels::linear_masked_mse":  # its gradients are computed in the forward
            self.sizes += [x.numel() for x in out[1:4]]
        elif name.startswith("mae_kernels::") and name.endswith(
            ("embed_backward", "tokens_backward", "mse_recomputed_backward")
        ):
            self.sizes += [x.numel() for x in (out if isinstance(out, tuple) else (out,))]
        elif name == "mae_kernels::masked_mse":
            self.sizes.append(out[1].numel())
        return out


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_that_nobody_wants_are_not_computed(name, n):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(n)
    grad = torch.randn_like(op(**inputs))
    expected = run(op, inputs, grad, wrt)
    for wanted in (subset for size in {0, 1, len(wrt) - 1} for subset in combinations(wrt, size)):
        leaves = {key: inputs[key].clone().requires_grad_(key in wanted) for key in wrt}
        with Outputs() as outputs:
            out = op(**{**inputs, **leaves})
            assert out.requires_grad == bool(wanted)
            if wanted:
                out.backward(grad)
        for key, leaf in leaves.items():
            if key in wanted:
                torch.testing.assert_close(leaf.grad, expected[key], rtol=1e-5, atol=1e-6)
            else:
                assert leaf.grad is None
        assert sorted(filter(None, outputs.sizes)) == sorted(expected[key].numel() for key in wanted)


@pytest.mark.eager
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_accumulate(name):
    """Calls that share inputs, whose backwards run one after the other or at once, add up in .grad to the sum."""
    op, build, wrt = OPS_BY_NAME[name]
    first = build(3)
    second = {**build(3), **{key: first[key] for key in wrt}}
    leaves = {key: first[key].clone().requires_grad_() for key in wrt}
    grads = [torch.randn_like(op(**inputs)) for inputs in (first, second)]
    expected = [run(op, inputs, g, wrt) for inputs, g in zip((first, second), grads, strict=True)]
    outs = [op(**{**inputs, **leaves}) for inputs in (first, second)]
    for out, g in zip(outs, grads, strict=True):
        out.backward(g, retain_graph=True)
    one_by_one = {key: leaf.grad for key, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    torch.autograd.backward(outs, grads)
    for key in wrt:
        total = expected[0][key] + expected[1][key]
        assert torch.equal(one_by_one[key], total)
        assert torch.equal(leaves[key].grad, total)


@pytest.fixture
def no_empty_launches(monkeypatch):
    def guarded(kernel):
        def run(first, *rest):
            assert first.shape[0] > 0, f"{kernel.__name__} was called on an empty batch"
            return kernel(first, *rest)

        return run

    for name, function in [*vars(kernels).items()]:
        if inspect.isfunction(function):
            monkeypatch.setattr(kernels, name, guarded(function))


def without_samples(inputs: dict, n: int) -> dict:
    """The first none of n samples."""
    return {key: x[:0] if isinstance(x, torch.Tensor) and x.shape[:1] == (n,) else x for key, x in inputs.items()}


WITH_EMPTY_BATCH = [name for name in OPS_BY_NAME if name != "crop, packed"]


@pytest.mark.parametrize("name", WITH_EMPTY_BATCH)
@pytest.mark.usefixtures("poisoned_empty")
def test_empty_batch(name, no_empty_launches):
    """Empty results of the right shape, losses of 0, and gradients of zeros for what has no batch."""
    op, build, wrt = OPS_BY_NAME[name]
    full, inputs = build(5), without_samples(build(5), 5)
    with use_backend("eager"):
        like = op(**full)
    out = run(op, inputs, like[:0] if like.ndim else torch.ones(()), wrt)
    value = out.pop("value")
    assert value.dtype == like.dtype
    assert value.shape == ((0, *like.shape[1:]) if like.ndim else ())
    assert (value == 0).all()
    for key, g in out.items():
        assert (g.shape, g.dtype) == (inputs[key].shape, inputs[key].dtype)
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.eager
@pytest.mark.parametrize("name", ["embed", "scatter", "head and loss"])
def test_an_empty_batch_among_others_recompiles_once(name):
    op, build, wrt = OPS_BY_NAME[name]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (0, 5, 7, 0):
            inputs = build(n) if n else without_samples(build(5), 5)
            grad = torch.randn_like(op(**inputs))
            ours, expected = run(compiled, inputs, grad, wrt), run(op, inputs, grad, wrt)
            assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_helpers_on_an_empty_batch():
    patches = patchify(torch.rand(0, 3, 16, 24), 8)
    assert patches.shape == (0, 6, 192)
    assert unpatchify(patches, 8, (16, 24)).shape == (0, 3, 16, 24)
    assert random_crop_boxes(torch.ones(0, 2, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"^masking_from_mask: mask is empty, got shape \(0, 4\)$"):
        masking_from_mask(torch.ones(0, 4).bool())  # how many are visible nobody knows
