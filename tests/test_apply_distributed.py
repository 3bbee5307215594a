"""Applied models in two processes, under DDP and FSDP2: the numbers of the model without apply, in one process."""

import copy
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from families import SIZE, hugging_face, published
from processes import CONTEXT
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mae_kernels import apply, unapply

STEPS, BATCH, NUM_PATCHES = 3, 4, 36
TIMEOUT = 300  # seconds; only reached when a process has died
BUILD = {"published": published, "Hugging Face": hugging_face}


def new_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILD[family]()


def applied(model: nn.Module) -> nn.Module:
    apply(model)
    return model


def sharded(model: nn.Module, **options) -> nn.Module:
    for part in model.modules():
        if type(part).__name__ in ("Block", "ViTMAELayer"):
            fully_shard(part, **options)
    return fully_shard(model, **options)


def sharded_embedding(model: nn.Module) -> nn.Module:
    """The projection gathers its weights by hooks of its own, so it must be called."""
    for name, part in model.named_modules():
        if name.endswith(("patch_embed.proj", "patch_embeddings.projection")):
            fully_shard(part)
    return sharded(model)


def bfloat16(model: nn.Module) -> nn.Module:
    return sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


# How a model is applied and distributed, and the tolerance: of rounding, or of bfloat16, a dozen times in a row.
RUNS: dict[str, tuple[Callable[[nn.Module], nn.Module], float]] = {
    "DDP of an applied model": (lambda model: DistributedDataParallel(applied(model)), 1e-5),
    "apply after DDP": (lambda model: applied(DistributedDataParallel(model)), 1e-5),
    "FSDP2": (lambda model: sharded(applied(model)), 1e-5),
    "FSDP2, embedding by itself": (lambda model: sharded_embedding(applied(model)), 1e-5),
    "FSDP2, bfloat16": (lambda model: bfloat16(applied(model)), 12 * 2**-9),
}


def train(model: nn.Module, rows: slice) -> Tensor:
    """Losses of steps on these rows of each batch; every mask is that of the whole batch's noise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    draw, losses = torch.rand, []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)[rows]
        noise = draw(BATCH, NUM_PATCHES, generator=generator)[rows]
        torch.rand = lambda *shape, noise=noise, **options: noise if shape == noise.shape else draw(*shape, **options)
        try:
            output = model(images)
        finally:
            torch.rand = draw
        loss = output[0] if isinstance(output, tuple) else output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def _process(rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    init_device_mesh("cpu", (2,))  # else FSDP2 takes a GPU where there is one
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for family in BUILD:
        for name, (distribute, _) in RUNS.items():
            try:
                model = distribute(new_model(family))
                losses = train(model, half)
                dist.all_reduce(losses)
                state = get_model_state_dict(model, options=whole)
                refusals = [str(error.value) for error in _refusals(model)]
                result = (losses / 2).numpy(), {k: v.float().numpy() for k, v in state.items()}, refusals
            except Exception:
                result = traceback.format_exc()
            if rank == 0:
                queue.put(((family, name), result))
    dist.destroy_process_group()


def _refusals(model: nn.Module):
    if isinstance(model, DistributedDataParallel):
        return
    for change in (apply, unapply):
        with pytest.raises(ValueError) as error:
            change(model)
        yield error


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Every run, in two processes that are started once."""
    queue, store = CONTEXT.Queue(), str(tmp_path_factory.mktemp("processes") / "store")
    processes = [CONTEXT.Process(target=_process, args=(rank, store, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=TIMEOUT) for _ in range(len(RUNS) * len(BUILD)))
    for process in processes:
        process.join()
    return results


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", BUILD)
def test_two_processes_equal_one_without_apply(results, family, name):
    found, tolerance = results[family, name], RUNS[name][1]
    assert not isinstance(found, str), found
    losses, state, _ = found
    model = new_model(family)
    start = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(torch.from_numpy(losses), train(model, slice(None)), rtol=tolerance, atol=0)
    assert state.keys() == start.keys()
    for key, value in model.state_dict().items():
        ours = torch.from_numpy(state[key])
        if tolerance == 1e-5:
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6, msg=key)
        elif not key.endswith(("key.bias", "k_proj.bias")):  # their gradient is rounding and nothing else
            change = (value - start[key]).norm()  # the parameters themselves hardly change
            assert (ours - value).norm() <= 16 * tolerance * change, key


@pytest.mark.parametrize("family", BUILD)
def test_sharded_models_keep_their_class(results, family):
    after_apply, after_unapply = results[family, "FSDP2"][2]
    assert "is sharded; apply before fully_shard" in after_apply
    assert "has become a FSDP" in after_unapply
