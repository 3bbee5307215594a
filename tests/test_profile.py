"""What the profile counts, against PyTorch's own counters and cases with a known answer."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mae import MAEConfig, MaskedAutoencoder
from mae.__main__ import main
from mae.training.optimizers import adamw
from mae.training.profile import LaunchCounter, profile_step, saved_bytes, training_flops
from mae_kernels import reference

SMALL = MAEConfig(
    image_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, decoder_embed_dim=32, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, image_size=(4, 16, 32), patch_size=(2, 8, 8))], ids=["image", "clip"]
)
def test_flops_are_those_that_pytorch_counts(config, monkeypatch):
    """Fused attention and the ops of this package are opaque to its counter: the former is spelled out for it."""

    def explicit(packed, queries, keys):
        q, k, v = packed.unbind(2) if queries is None else (queries, *packed.unbind(2))
        return reference.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr("mae.model.block.attention", explicit)
    with FlopCounterMode(display=False) as counter:
        MaskedAutoencoder(config)(torch.randn(2, 3, *config.image_size)).loss.backward()
    visible, hidden, dim, decoder_dim, values = 4, 12, 64, 32, 3 * math.prod(config.patch_size)
    embed, head = 4 * visible * values * dim, 6 * hidden * values * decoder_dim
    assert training_flops(config) == counter.get_total_flops() // 2 + embed + head


def test_launches_are_ops_that_compute():
    x = torch.randn(4, 4)
    with LaunchCounter() as counter:
        y = x.t()[1:].reshape(-1)  # a copy
        torch.empty(3).add_(y[:3])  # an addition
        F.linear(x, x)  # a product
    assert (counter.launches, counter.syncs) == (3, 0)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool((x > 0).all())]
)
def test_reading_back_is_a_synchronisation(read):
    with LaunchCounter() as counter:
        read(torch.randn(4, 4))
    assert counter.syncs == 1


def test_reading_what_is_on_the_host_is_none():
    count = torch.tensor(3.0)
    with LaunchCounter(count) as counter:
        count.item()
    assert counter.syncs == 0


def test_saved_memory_is_counted_once():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    with saved_bytes(x, weight) as kept:
        h = x @ weight  # saves its inputs, which are known
        (h.sigmoid() * h[:, :2].repeat(1, 2)).exp()
    # h, its sigmoid, the repeated columns and the exponential; the sigmoid twice, but in one memory
    assert kept() == 4 * 3 * 8 * 4


@pytest.mark.parametrize("bfloat16", [False, True])
def test_phases_of_a_step(bfloat16):
    model, images = MaskedAutoencoder(SMALL), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    phases = profile_step(model, images, adamw(model, lr=1e-3), bfloat16=bfloat16, rounds=2)
    assert list(phases) == ["input", "masking", "embed", "encoder", "scatter", "decoder", "loss", "optimizer"]
    assert all(phase.forward_ms > 0 for phase in phases.values())
    trained = {name for name, phase in phases.items() if phase.backward_ms > 0}
    assert trained == {"embed", "encoder", "scatter", "decoder", "loss"}
    assert phases["encoder"].saved_bytes > 24 == phases["embed"].saved_bytes  # mean and deviation of three channels
    with LaunchCounter() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(images).loss
        loss.backward()
    cut = sum(phase.launches for name, phase in phases.items() if name != "optimizer")
    assert cut == pytest.approx(counter.launches, rel=0.05)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_profile_on_the_command_line(capsys):
    main(["profile", "--model", "mae_vit_demo_patch7", "--batch-size", "4", "--rounds", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mae_vit_demo_patch7, 4 images, float32, cpu, ")
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:13]}
    assert list(rows)[-1] == "all"
    assert rows["all"][2] == "100.0%"
    assert sum(int(row[3]) for name, row in rows.items() if name != "all") == int(rows["all"][3])
    assert lines[-1].endswith("1 kB an image from host to device")
