"""What "auto" chooses on each kind of device: bfloat16 and one graph where the kernels run, and nowhere else."""

import pytest
import torch

from mae import MAEConfig, MaskedAutoencoder
from mae.data import TensorImages
from mae.training.loop import choose_execution, train, uses_bfloat16
from mae.training.recipe import TrainConfig
from mae_kernels import backend

RECENT = {(7, 5): False, (8, 0): True, (9, 0): True, (9, 4): True}  # the last is an MI300, whose gfx number is 942


@pytest.fixture(params=RECENT, ids=str)
def capability(request, monkeypatch):
    monkeypatch.setattr(backend, "_capability", lambda device: request.param)
    return request.param


def test_auto_on_a_gpu(capability):
    gpu, recent = torch.device("cuda:1"), RECENT[capability]
    assert uses_bfloat16("auto", gpu) is recent
    assert choose_execution("auto", gpu) == ("compile" if recent else "eager")


def test_a_choice_is_a_choice(capability):
    gpu = torch.device("cuda:1")
    assert uses_bfloat16("bfloat16", gpu)
    assert not uses_bfloat16("float32", gpu)
    assert [choose_execution(name, gpu) for name in ("eager", "compile", "graph")] == ["eager", "compile", "graph"]


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_elsewhere(device):
    assert not uses_bfloat16("auto", torch.device(device))
    assert choose_execution("auto", torch.device(device)) == "eager"


@pytest.mark.parametrize("recent", [True, False])
def test_training_takes_it(recent, monkeypatch, tmp_path):
    class Chosen(Exception):
        pass

    def step(model, optimizer, loss, *, bfloat16, execution, **options):
        raise Chosen(bfloat16, execution)

    monkeypatch.setattr("mae.training.loop.is_recent_gpu", lambda device: recent)
    monkeypatch.setattr("mae.training.loop.Step", step)
    model = MaskedAutoencoder(MAEConfig(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1))
    with pytest.raises(Chosen) as chosen:
        train(model, TensorImages(torch.rand(4, 3, 16, 16)), TrainConfig(device="cpu"), tmp_path)
    assert chosen.value.args == ((True, "compile") if recent else (False, "eager"))
