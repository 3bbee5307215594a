"""Two processes that share a batch, under DDP and FSDP2: one process's numbers, and a state dict under our keys."""

import functools
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import CONTEXT
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from mae import MAEConfig, MaskedAutoencoder, TrainingStep
from mae.model import Block
from mae_kernels import random_masking

SMALL = MAEConfig(
    image_size=(16, 32), patch_size=8, embed_dim=32, depth=1, num_heads=4, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip
STEPS, BATCH = 3, 8
TIMEOUT = 300  # seconds; only reached when a process has died


def batches():
    """Images ``[N, 3, 16, 32]`` uint8, and noise ``[N, L]`` for their masks: always the same ones."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randint(256, (BATCH, 3, 16, 32), dtype=torch.uint8, generator=generator)
        yield images, torch.rand(BATCH, SMALL.num_patches, generator=generator)


def new_model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(SMALL)


def train(model: torch.nn.Module, part: Callable = lambda x: x, **options) -> torch.Tensor:
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)
    return torch.stack(
        [step(part(images), random_masking(*part(noise).shape, noise=part(noise))) for images, noise in batches()]
    )


def sharded(model: MaskedAutoencoder, **options) -> MaskedAutoencoder:
    for block in (*model.blocks, *model.decoder_blocks):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def bfloat16_policy():
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def checkpointed(model: MaskedAutoencoder) -> MaskedAutoencoder:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def every_layer_sharded(model: MaskedAutoencoder) -> MaskedAutoencoder:
    for part in list(model.modules()):
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)):
            fully_shard(part)
    return fully_shard(model)


def wrapped_by_size(parameters: int) -> Callable[[MaskedAutoencoder], torch.nn.Module]:
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=parameters)
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    return functools.partial(FullyShardedDataParallel, auto_wrap_policy=policy, **options)


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = model.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in named}


# How a model is distributed, options of the step, and whether its products are in bfloat16.
RUNS: dict[str, tuple[Callable, dict, bool]] = {
    "DDP": (DistributedDataParallel, {}, False),
    "DDP, micro-batches": (DistributedDataParallel, {"micro_batches": 2}, False),
    "DDP, compiled": (DistributedDataParallel, {"execution": "compile"}, False),
    "FSDP2": (sharded, {}, False),
    "FSDP2, whole": (fully_shard, {}, False),
    "FSDP2, every layer": (every_layer_sharded, {}, False),
    "FSDP1, large parts": (wrapped_by_size(4000), {}, False),
    "FSDP1, every layer": (wrapped_by_size(100), {}, False),
    "FSDP2, micro-batches, clipped": (sharded, {"micro_batches": 2, "clip_grad": 0.1}, False),
    "FSDP2, compiled": (sharded, {"execution": "compile"}, False),
    "FSDP2, checkpointed blocks": (lambda model: sharded(checkpointed(model)), {}, False),
    "FSDP2, bfloat16": (lambda model: sharded(model, mp_policy=bfloat16_policy()), {}, True),
}


def _process(rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    # What the blocks lower to is tested elsewhere.
    torch.compile = functools.partial(torch.compile, backend="eager")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    init_device_mesh("cpu", (2,))  # else FSDP2 takes a GPU where there is one
    for name, (distribute, options, _) in RUNS.items():
        try:
            model = distribute(new_model())
            summed = []
            if isinstance(model, DistributedDataParallel):
                model.register_comm_hook(summed, _counted_all_reduce)
            losses = train(model, lambda x: x.chunk(2)[rank], **options)
            dist.all_reduce(losses)
            state = whole_state(model)
            result = (losses / 2).numpy(), {k: v.float().numpy() for k, v in state.items()}, sum(summed)
        except Exception:
            result = traceback.format_exc()
        if rank == 0:
            queue.put((name, result))
    dist.destroy_process_group()


def _counted_all_reduce(summed: list[int], bucket):
    summed.append(bucket.buffer().numel())
    future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return future.then(lambda f: f.value()[0])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Every run, in two processes that are started once."""
    queue, store = CONTEXT.Queue(), str(tmp_path_factory.mktemp("processes") / "store")
    processes = [CONTEXT.Process(target=_process, args=(rank, store, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=TIMEOUT) for _ in RUNS)
    for process in processes:
        process.join()
    return results


@functools.cache
def in_one_process(bfloat16: bool, clip_grad: float | None) -> tuple[torch.Tensor, dict]:
    model = new_model()
    losses = train(model, bfloat16=bfloat16, clip_grad=clip_grad)
    return losses, model.state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(results, name):
    assert not isinstance(results[name], str), results[name]
    _, options, bfloat16 = RUNS[name]
    losses, state, _ = results[name]
    expected_losses, expected = in_one_process(bfloat16, options.get("clip_grad"))
    # FSDP2 rounds norms, position tables and residuals to bfloat16 too, which autocast keeps: a dozen roundings of
    # 2^-9 in a row, half of them of parameters that are the same in every step.
    tolerance = 12 * 2**-9 if bfloat16 else 1e-5
    torch.testing.assert_close(torch.from_numpy(losses), expected_losses, rtol=tolerance, atol=0)
    assert state.keys() == expected.keys()
    start = new_model().state_dict()
    for key, value in expected.items():
        ours = torch.from_numpy(state[key])
        assert ours.shape == value.shape
        if bfloat16:  # compared are the updates: the parameters themselves hardly change
            change = (value - start[key]).norm()
            assert (ours - value).norm() <= 16 * tolerance * change, key
        else:
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6, msg=key)


def test_ddp_sums_each_gradient_once_a_step(results):
    trained = sum(p.numel() for p in new_model().parameters() if p.requires_grad)
    for name in ("DDP", "DDP, micro-batches"):
        assert results[name][2] == STEPS * trained


def test_a_gathered_state_dict_loads_strictly(results):
    state = results["FSDP2, checkpointed blocks"][1]
    new_model().load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
