"""What only a GPU can show: CUDA graphs, streams, no waiting for the device, several devices, large tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import OPS_BY_NAME, run
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mae import MAEConfig, MaskedAutoencoder, TrainingStep, adamw
from mae_kernels import gather_tokens, masked_mse, patch_embed, random_masking, scatter_mask_tokens, use_backend

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"), use_backend("triton"):
        yield


def inputs_of(name: str) -> dict:
    """Mean and std as tensors: as sequences each call would copy them from the host."""
    inputs = OPS_BY_NAME[name][1](3)
    return inputs | {key: torch.tensor(inputs[key]) for key in ("mean", "std") if key in inputs}


def case(name: str) -> tuple:
    op, _, wrt = OPS_BY_NAME[name]
    inputs = inputs_of(name)
    return op, inputs, torch.randn_like(op(**inputs)) if wrt else None, wrt


def changed(x: Tensor) -> Tensor:
    """Other values of the same kind; ids, boxes and masks stay."""
    if x.dtype == torch.uint8:
        return 255 - x
    return x.flip(0) if x.is_floating_point() else x


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.cuda.synchronize()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name].cpu(), expected[name].cpu()) for name in expected)


@contextmanager
def waiting_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_captured_in_a_graph(name):
    """Forward and backward, replayed on other values in the same memory."""
    op, inputs, grad, wrt = case(name)
    others = tree_map(lambda x: changed(x) if isinstance(x, Tensor) else x, inputs)
    expected = run(op, others, grad, wrt)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(op, inputs, grad, wrt)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, inputs, grad, wrt)
    for x, y in zip(tree_leaves(inputs), tree_leaves(others), strict=True):
        if isinstance(x, Tensor) and x is not y:
            x.copy_(y)
    graph.replay()
    assert_equal(captured, expected)


@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_the_host_never_waits(name):
    op, inputs, grad, wrt = case(name)
    run(op, inputs, grad, wrt)  # compiles
    with waiting_refused():
        run(op, inputs, grad, wrt)


@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_the_host_never_waits_for_a_training_step(execution, bfloat16):
    model = MaskedAutoencoder(
        MAEConfig(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, decoder_embed_dim=64,
                  decoder_depth=2, decoder_num_heads=2)
    )  # fmt: skip
    options = {"bfloat16": bfloat16, "execution": execution, "micro_batches": 2, "clip_grad": 1.0}
    step = TrainingStep(model, adamw(model, lr=1e-3), **options)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    step(images)  # compiles, and allocates the optimizer's state
    with waiting_refused():
        losses = [step(images) for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)


def test_float32_is_not_tf32():
    """Held against products in TF32, errors of ours a thousand times too large would pass."""
    x, weight = torch.randn(64, 32, 16, 16), torch.randn(32, 32, 3, 3)
    for op, *args in ((F.conv2d, x, weight), (torch.matmul, x.flatten(1), x.flatten(1).t())):
        ours, exact = op(*args).double(), op(*(arg.double() for arg in args))
        assert (ours - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_on_another_stream(name):
    """While the default stream is busy for a second or so: nothing goes there, nothing waits for it."""
    op, inputs, grad, wrt = case(name)
    expected = run(op, inputs, grad, wrt)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles, in which every multiprocessor is free
    busy = torch.cuda.current_stream().record_event()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ours = run(op, inputs, grad, wrt)
    side.synchronize()
    assert not busy.query()
    assert_equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS_BY_NAME)
def test_on_a_device_that_is_not_the_current_one(name):
    op, inputs, grad, wrt = case(name)
    expected = run(op, inputs, grad, wrt)
    there, grad = tree_map(lambda x: x.to("cuda:1") if isinstance(x, Tensor) else x, (inputs, grad))
    with torch.device("cuda:1"):
        ours = run(op, there, grad, wrt)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in ours.values())
    assert_equal(ours, expected)


def room_for(gigabytes: int) -> bool:
    return torch.cuda.mem_get_info()[0] > gigabytes * 10**9


def test_more_than_two_billion_pixels():
    if not room_for(16):
        pytest.skip("needs 16 GB")
    n = 2**31 // (3 * 224 * 224) + 2
    images = torch.randint(256, (n, 3, 224, 224), dtype=torch.uint8)
    weight = torch.randn(64, 3, 16, 16)
    ids_keep = random_masking(n, 196).ids_keep
    ours = patch_embed(images, weight, ids_keep=ids_keep)[-2:]
    expected = patch_embed(images[-2:], weight, ids_keep=ids_keep[-2:])
    # For two images the library of products takes another kernel, whose sums have another order.
    assert (ours - expected).norm() < 1e-6 * expected.norm()


def test_more_than_two_billion_values_of_tokens():
    if not room_for(24):
        pytest.skip("needs 24 GB")
    n = 2**31 // (196 * 768) + 2
    tokens = torch.randn(n, 196, 768, dtype=torch.bfloat16)
    masking = random_masking(n, 196, 0.1)
    visible = gather_tokens(tokens, masking.ids_keep)
    mask_token = torch.randn(768, dtype=torch.bfloat16)
    full = scatter_mask_tokens(visible, mask_token, masking.ids_restore, num_prefix=0)
    expected = torch.where(masking.mask[-2:, :, None], mask_token, tokens[-2:])
    assert torch.equal(full[-2:], expected)


@pytest.mark.parametrize("pixels", [torch.uint8, torch.bfloat16], ids=["residual again", "residual kept"])
def test_more_than_two_billion_predictions(pixels):
    if not room_for(40):
        pytest.skip("needs 40 GB")
    n = 2**31 // (147 * 768) + 2
    images = torch.randint(256, (n, 3, 224, 224), dtype=torch.uint8).to(pixels)
    ids_mask = random_masking(n, 196).ids_mask
    pred = torch.randn(n, 147, 768, dtype=torch.bfloat16)

    def gradient(part: slice) -> Tensor:
        leaf = pred[part].detach().requires_grad_()
        loss = masked_mse(leaf, images[part], patch_size=16, ids_mask=ids_mask[part])
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(1e6 * len(leaf)))  # that of each patch, whatever n
        return grad[-2:]

    torch.testing.assert_close(gradient(slice(None)), gradient(slice(-2, None)), rtol=2**-7, atol=1e-3)
