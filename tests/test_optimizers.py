"""Muon beside AdamW as one optimizer: PyTorch's own updates of both, wherever an optimizer is looked into."""

import copy
import pickle
import traceback
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import CONTEXT
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mae import MAEConfig, MaskedAutoencoder, TrainingStep, adamw, mae_vit_demo_patch7, muon
from mae.data import TensorImages
from mae.training.loop import train
from mae.training.profile import LaunchCounter
from mae.training.recipe import TrainConfig
from mae_kernels import random_masking

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = MAEConfig(
    image_size=(16, 32), patch_size=8, embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip
LR, DECAY, STEPS = 1e-2, 0.1, 3
MATRICES = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def new_model(**fields) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(replace(SMALL, **fields)).to(DEVICE)


def batches(steps: int = STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randint(256, (8, 3, 16, 32), dtype=torch.uint8, generator=generator)
        noise = torch.rand(8, SMALL.num_patches, generator=generator)
        yield images.to(DEVICE), random_masking(*noise.shape, noise=noise.to(DEVICE))


def weights(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        assert torch.equal(x, expected[name]), name


def names_of(model, group) -> set[str]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p] for p in group["params"]}


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_groups(decoder):
    model = new_model(decoder=decoder)
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    matrices, decayed, rest = (names_of(model, group) for group in muon(model, LR, DECAY).param_groups)
    decoder_part = "attn.qkv.weight" if decoder == "self" else "attn.q.weight attn.kv.weight"
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in MATRICES} - {"blocks.0.mlp.fc1.weight"}
    expected |= {f"decoder_blocks.0.{name}" for name in (*(MATRICES - {"attn.qkv.weight"}), *decoder_part.split())}
    assert matrices == expected
    modules = ("patch_embed.proj", "decoder_embed", "decoder_pred")
    assert decayed == {"cls_token", "mask_token"} | {f"{module}.weight" for module in modules}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert rest == trained - matrices - decayed
    settings = [(g["lr"], g["weight_decay"]) for g in muon(model, LR, DECAY).param_groups]
    assert settings == [(LR, DECAY), (LR, DECAY), (LR, 0.0)]


def test_groups_of_a_wrapped_model():
    model = new_model()
    wrapped = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"_orig_mod": model})})
    ours, plain = muon(wrapped, LR).param_groups, muon(model, LR).param_groups
    assert [names_of(model, g) for g in ours] == [names_of(model, g) for g in plain]


def test_steps_are_those_of_pytorchs_optimizers():
    model, other = new_model(), new_model()
    named = {name: p for name, p in other.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.items() if "blocks" in name and p.ndim == 2]
    others = [p for name, p in named.items() if "blocks" not in name or p.ndim != 2]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    by_hand = (
        torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True),
    )
    step = TrainingStep(model, muon(model, LR, DECAY))
    for i, (images, masking) in enumerate(batches()):
        rate = LR / (1 + i)
        for group in (g for optimizer in (step.optimizer, *by_hand) for g in optimizer.param_groups):
            group["lr"] = rate
        loss = step(images, masking)
        expected = other(images, masking=masking).loss
        expected.backward()
        for optimizer in by_hand:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(loss, expected.detach())
    assert_equal(weights(model), weights(other))


def test_a_schedule_reaches_both():
    model = new_model()
    optimizer = muon(model, LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    step, before = TrainingStep(model, optimizer), weights(model)
    (images, masking), _ = batches(2)
    step(images, masking)
    assert_equal(weights(model), before)  # at a rate of 0
    schedule.step()
    step(images, masking)
    changed = {name for name, x in weights(model).items() if not torch.equal(x, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def continued(model, optimizer) -> dict[str, Tensor]:
    step = TrainingStep(model, optimizer)
    for images, masking in batches():
        step(images, masking)
    return weights(model)


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy", "distributed"])
def test_a_copy_goes_on_where_it_was(how):
    model, optimizer = new_model(), None
    optimizer = muon(model, LR, DECAY)
    continued(model, optimizer)
    if how in ("state_dict", "distributed"):
        other = new_model()
        other.load_state_dict(model.state_dict())
        its = muon(other, 1.0, 1.0)
        if how == "state_dict":
            its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            set_optimizer_state_dict(other, its, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    else:
        both = (model, optimizer)
        other, its = pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
    assert [g["lr"] for g in its.param_groups] == [LR] * 3
    assert_equal(continued(other, its), continued(model, optimizer))


def test_state_under_the_names_of_parameters():
    """What torch.distributed.checkpoint writes, also before the first step."""
    model = new_model()
    state = get_optimizer_state_dict(model, muon(model, LR))["state"]
    assert state.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert state["blocks.0.mlp.fc1.weight"].keys() == {"momentum_buffer"}
    assert state["cls_token"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    assert "state.blocks.0.mlp.fc1.weight.momentum_buffer" in get_optimizer_state_dict(
        model, muon(model, LR), options=flat
    )


@pytest.mark.parametrize("make", [adamw, muon])
@pytest.mark.parametrize("first", [True, False])
def test_an_update_that_is_not_finite_is_left_out(make, first):
    """As torch.amp.GradScaler asks it of fused optimizers, without a look at what is on the device."""
    model = new_model()
    optimizer = make(model, LR, DECAY)
    images, masking = next(batches())
    if not first:
        TrainingStep(model, optimizer)(images, masking)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
    optimizer.found_inf = torch.ones((), device=DEVICE)
    steps = (s["step"] for s in optimizer.state.values() if "step" in s)
    with LaunchCounter(*steps) as counter:
        optimizer.step()
    assert counter.syncs == 0
    assert_equal(weights(model), before)
    optimizer.zero_grad()
    optimizer.found_inf.zero_()
    assert_equal(continued(model, optimizer), continued(twin_model, twin))


def test_what_is_without_a_gradient_stays():
    model = new_model()
    optimizer, before = muon(model, LR), weights(model)
    for found_inf in (None, torch.zeros((), device=DEVICE)):
        optimizer.found_inf = found_inf
        optimizer.step()
        assert_equal(weights(model), before)
        assert not any(optimizer.state.values())


def test_a_closure_is_called_once():
    model = new_model()
    images, masking = next(batches())
    calls = []

    def closure():
        calls.append(1)
        loss = model(images, masking=masking).loss
        loss.backward()
        return loss

    assert muon(model, LR).step(closure).isfinite()
    assert calls == [1]


def test_a_model_without_matrices_in_its_blocks_is_refused():
    with pytest.raises(ValueError) as error:
        muon(new_model(depth=0, decoder_depth=0), LR)
    assert str(error.value) == ("muon: the model has no matrices in blocks; FSDP1 flattens them, fully_shard does not")


@pytest.mark.slow
def test_it_learns(tmp_path):
    """A memorised batch, by the command's own loop."""
    torch.manual_seed(0)
    model = mae_vit_demo_patch7()
    images = torch.rand(8, 1, 4, 4).mul(255).byte().repeat_interleave(7, 2).repeat_interleave(7, 3)
    images = images // 2 + torch.linspace(0, 120, 28).byte()
    config = TrainConfig(
        steps=150, batch_size=8, base_lr=2e-3 * 256 / 8, optimizer="muon", device="cpu", precision="float32", workers=0
    )
    history = train(model, TensorImages(images), config, tmp_path)
    assert history[-1]["loss"] < 0.1


def _process(rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    init_device_mesh("cpu", (2,))
    try:
        result = [_distributed(rank, wrapped) for wrapped in ("DDP", "FSDP2")]
    except Exception:
        result = traceback.format_exc()
    queue.put((rank, result))
    dist.destroy_process_group()


def _distributed(rank: int, wrapped: str):
    model = new_model().cpu()
    if wrapped == "FSDP2":
        for block in (*model.blocks, *model.decoder_blocks):
            fully_shard(block)
    model = fully_shard(model) if wrapped == "FSDP2" else DistributedDataParallel(model)
    step = TrainingStep(model, muon(model, LR, DECAY))
    for images, masking in batches():
        step(images.cpu().chunk(2)[rank], type(masking)(*(x.cpu().chunk(2)[rank] for x in masking)))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    trained = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, step.optimizer, options=options).get("state", {})  # of rank 0 alone
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
    step.optimizer.found_inf = torch.ones(())
    step.optimizer.step()
    after = get_model_state_dict(model, options=options)
    if rank:
        return None
    momentum = {name: x["momentum_buffer"].numpy() for name, x in state.items() if "momentum_buffer" in x}
    return {k: x.numpy() for k, x in trained.items()}, momentum, {k: x.numpy() for k, x in after.items()}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Under fully_shard too, where Muon's products are of sharded matrices: but for their rounding to bfloat16."""
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_process, args=(rank, str(tmp_path / "store"), queue), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    by_rank = dict(queue.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    for results in by_rank.values():
        assert not isinstance(results, str), results
    model = new_model().cpu()
    start, step = model.state_dict(), TrainingStep(model, muon(model, LR, DECAY))
    start = {name: x.clone() for name, x in start.items()}
    for images, masking in batches():
        step(images.cpu(), type(masking)(*(x.cpu() for x in masking)))
    for trained, momentum, after in by_rank[0]:
        assert momentum.keys() == {name for name in start if "blocks" in name and start[name].ndim == 2}
        for name, expected in model.state_dict().items():
            ours, change = torch.from_numpy(trained[name]), expected - start[name]
            # Weights that differ by a millionth end as far as 0.07 apart: bfloat16 turns the small directions.
            assert (ours - expected).norm() <= 0.2 * change.norm() + 1e-9, name
            assert torch.equal(torch.from_numpy(after[name]), ours), name
