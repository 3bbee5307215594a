"""Fine-tuning: a loop of timm's parts gives the same losses, and what is random is a function of seed and step."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from pictures import photographs
from runs import (
    ALL,
    HEAD,
    Interrupted,
    Interrupting,
    assert_equal,
    classifier,
    finetune_config,
    finetune_demo_model,
    images,
    labels,
    losses,
    run_demo_model,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import mae.commands.labelled_run
from mae import Classifier, HeadConfig
from mae.__main__ import main
from mae.data import Batch, Batches, TensorImages, TrainingImages
from mae.data.randomness import derived_seed
from mae.training.augmentation import draw_mix
from mae.training.classification import Classification, FinetuneTraining, finetuning
from mae.training.loop import Looks
from mae.training.optimizers import lars, layerwise_adamw, sgd
from mae.training.parallel import Processes
from mae.training.run import RunError
from mae.training.state import path_of, steps_on_disk
from mae.training.step import Step


def timm_model(ours: Classifier) -> nn.Module:
    vision_transformer = peers.import_peer("timm.models.vision_transformer").VisionTransformer
    size, head = ours.config, ours.head_config
    model = vision_transformer(
        size.image_size, size.patch_size, size.in_chans, len(head.classes), "avg" if head.pool == "mean" else "token",
        size.embed_dim, size.depth, size.num_heads, size.mlp_ratio, fc_norm=head.fc_norm,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    model.load_state_dict(ours.state_dict(), strict=True)
    return model


def timm_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    groups_of = peers.import_peer("timm.optim").param_groups_layer_decay
    return groups_of(model, weight_decay, model.no_weight_decay(), layer_decay=layer_decay)


class Factors(nn.Module):
    """In the place of timm's DropPath."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors[:, None, None]


def losses_by_timm(config: FinetuneTraining, monkeypatch) -> list[float]:
    """timm mixes an image with that at the same place from the end of the batch."""
    mixup = peers.import_peer("timm.data.mixup")
    loss_of = peers.import_peer("timm.loss").SoftTargetCrossEntropy()
    ours = classifier()
    model, schedule = timm_model(ours), config.schedule(40)
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = Factors(), Factors()
    optimizer = torch.optim.AdamW(timm_groups(model, config.weight_decay, config.layer_decay), betas=(0.9, 0.999))
    mixing = mixup.Mixup(
        config.mixup, config.cutmix, mode="batch", label_smoothing=config.smoothing, num_classes=len(HEAD.classes)
    )
    pairs = torch.arange(config.batch_size).view(-1, 2)
    order = torch.cat([pairs[:, 0], pairs[:, 1].flip(0)])
    ours.drop_path, result = config.drop_path, []
    for step, batch in enumerate(Batches(images(), config.batch_size, range(config.steps))):
        mix = draw_mix(config.seed, step, config.mixup, config.cutmix, (28, 28))
        monkeypatch.setattr(mixing, "_params_per_batch", lambda: (mix.share, mix.box is not None))  # noqa: B023
        if mix.box is not None:
            box = [edge for part in mix.box for edge in (part.start, part.stop)]
            monkeypatch.setattr(mixup, "cutmix_bbox_and_lam", lambda *_, **__: (box, mix.share))  # noqa: B023
        generator = torch.Generator().manual_seed(derived_seed("drop path", config.seed, (step, 0)))
        keep = ours.draw_keep(config.batch_size, generator)[order]
        for i, block in enumerate(model.blocks):
            block.drop_path1.factors, block.drop_path2.factors = keep[:, i].unbind(1)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step) * group["lr_scale"]
        pixels = (batch.images[order] / 255 - ours.config.pixel_mean[0]) / ours.config.pixel_std[0]
        mixed, targets = mixing(pixels, labels()[batch.numbers][order])
        loss = loss_of(model(mixed), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def test_losses_are_those_of_a_loop_of_timms_parts(tmp_path, monkeypatch):
    config = finetune_config(steps=20)
    finetune_demo_model(tmp_path, steps=20)
    ours, theirs = [loss for _, loss in losses(tmp_path)], losses_by_timm(config, monkeypatch)
    kinds = {draw_mix(config.seed, step, config.mixup, config.cutmix, (28, 28)).box is None for step in range(20)}
    assert kinds == {True, False}
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    assert np.ptp(ours) > 0.5


def settings(groups: list[dict], model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("head", [HEAD, HeadConfig(HEAD.classes, "token")], ids=["mean", "token"])
def test_groups_are_those_of_timm(head):
    model = classifier(head=head)
    optimizer, other = layerwise_adamw(model, 1e-3, 0.05, 0.65), timm_model(model)
    ours, theirs = settings(optimizer.param_groups, model), settings(timm_groups(other, 0.05, 0.65), other)
    assert ours.keys() == {name for name, _ in model.named_parameters()}
    for name in ("norm.weight", "norm.bias"):  # timm's has the rate of the last block, the published one that of heads
        if name in ours:
            assert ours.pop(name) == (1.0, 0.0)
            assert theirs.pop(name) == (0.65, 0.0)
    assert {name: pytest.approx(x, rel=1e-12) for name, x in theirs.items()} == ours
    assert all(group["lr"] == 1e-3 * group["lr_scale"] for group in optimizer.param_groups)
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_two_processes_have_the_rows_of_one(step):
    config, pixels, numbers = finetune_config(**ALL), images(8).images, torch.arange(8)
    model = classifier(drop_path=0.3)
    whole = finetuning(model, config, labels()).inputs(Batch(pixels, numbers), step)
    parts = []
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        task = finetuning(model, config, labels(), Processes(rank, 2))
        parts.append(task.inputs(Batch(pixels[rows], numbers[rows]), step))
    assert len(whole) == 3
    for x, *both in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat(both))
    assert not torch.equal(whole[2], finetuning(model, config, labels()).inputs(Batch(pixels, numbers), step + 1)[2])


def test_factors_of_drop_path_have_a_mean_of_1_and_rates_that_rise():
    keep = classifier(drop_path=0.3).draw_keep(20_000, torch.Generator().manual_seed(0))  # [N, 4, 2]
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3)):
        own = keep[:, block]
        assert own.mean(0).tolist() == pytest.approx([1, 1], abs=0.02)
        assert (own == 0).float().mean(0).tolist() == pytest.approx([rate, rate], abs=0.012)
        assert own.max().item() == pytest.approx(1 / (1 - rate))
    assert not torch.equal(keep[:, 3, 0], keep[:, 3, 1])


def test_a_sample_that_all_blocks_pass_over_is_unchanged():
    model = classifier(drop_path=0.3)
    x, keep = torch.randn(3, 17, 96), torch.ones(3, 4, 2)
    keep[1] = 0
    ours, expected = model.encode(x, keep=keep), model.encode(x)
    assert torch.equal(ours[1], x[1])  # the norm is that of the mean
    assert torch.equal(ours[[0, 2]], expected[[0, 2]])
    pixels = images(3).images
    assert torch.equal(model(pixels, torch.ones(3, 4, 2)), model(pixels))


@pytest.mark.parametrize("half", [0, 1])
def test_a_factor_is_that_of_its_half_of_the_block(half):
    block, x, keep = classifier().blocks[0], torch.randn(2, 17, 96), torch.ones(2, 2)
    keep[:, half] = torch.tensor([0.0, 2.0])
    attended = block.attn(block.norm1(x))
    rows = x + attended * keep[:, 0, None, None]
    expected = rows + block.mlp(block.norm2(rows)) * keep[:, 1, None, None]
    torch.testing.assert_close(block(x, keep=keep), expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    finetune_demo_model(tmp_path / "straight", **ALL)
    with pytest.raises(Interrupted):
        finetune_demo_model(tmp_path / "cut", data=Interrupting(images(), 7), save_every=5, **ALL)
    assert steps_on_disk(tmp_path / "cut") == [5]
    with pytest.raises(RunError, match=r"was started with another recipe: mixup was 0\.8 and is 0\.5\. Give it"):
        finetune_demo_model(tmp_path / "cut", "resume", **ALL, mixup=0.5)
    finetune_demo_model(tmp_path / "cut", "resume", seed=99, save_every=5, **ALL)
    assert_equal(tmp_path / "straight", tmp_path / "cut")
    assert len(losses(tmp_path / "cut")) == 12
    one, other = (in_checkpoint(tmp_path / name, 12) for name in ("straight", "cut"))
    assert {name.split(".")[0] for name in one} == {"model", "optimizer", "average"}
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def in_checkpoint(run: Path, step: int, part: str = "") -> dict[str, Tensor]:
    (file,) = path_of(run, step).glob("*.safetensors")
    return {name.removeprefix(part): x for name, x in load_file(file).items() if name.startswith(part)}


def test_averages_are_those_of_a_loop_and_change_nothing_about_training(tmp_path):
    seen = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        return {}

    options = {"steps": 5, "save_every": 1, "keep": 5}
    finetune_demo_model(tmp_path / "plain", **options)
    finetune_demo_model(tmp_path / "ema", **options | {"eval_every": 1}, ema_decay=0.25, looks=Looks(validate))
    start = classifier(drop_path=0.3).state_dict()
    expected = {name: x.double() for name, x in start.items()}
    assert len(seen) == 5
    for step, shown in enumerate(seen):
        own, theirs = (in_checkpoint(tmp_path / run, step + 1, "model.") for run in ("ema", "plain"))
        decay = min(0.25, (1 + step) / (10 + step))
        for name, x in own.items():
            assert torch.equal(x, theirs[name])
            expected[name] = decay * expected[name] + (1 - decay) * x.double()
            torch.testing.assert_close(shown[name].double(), expected[name], rtol=1e-6, atol=1e-7)
    averaged, last = weights(tmp_path / "ema"), seen[-1]
    assert averaged.keys() == own.keys()
    assert all(torch.equal(x, last[name]) for name, x in averaged.items())
    assert not any(torch.equal(x, own[name]) for name, x in averaged.items())


def test_what_cannot_be_trained_is_refused_in_a_sentence():
    model, half = classifier(), "mixup and cutmix take images in pairs, and batch_size"
    for size, processes, expected in (
        (7, Processes(), f"{half} 7 is no multiple of 2"),
        (6, Processes(0, 2), f"{half} 6 is no multiple of 4"),
    ):
        with pytest.raises(ValueError) as error:
            finetuning(model, finetune_config(batch_size=size), labels(), processes)
        assert str(error.value) == expected
    finetuning(model, finetune_config(batch_size=7, mixup=0.0, cutmix=0.0), labels())
    for field, value, expected in (
        ("drop_path", 1.0, "a number from 0 to below 1, got 1.0"),
        ("layer_decay", 0, "a number above 0, at most 1, got 0"),
        ("mixup", -0.1, "a number from 0 on, got -0.1"),
        ("least_area", 0, "a number above 0, at most 1, got 0"),
        ("erase", 1.5, "a number from 0 to 1, got 1.5"),
        ("ema_decay", 1, "a number from 0 to below 1, got 1"),
    ):
        with pytest.raises(ValueError) as error:
            FinetuneTraining(**{field: value})
        assert str(error.value) == f"{field} must be {expected}"
    with pytest.raises(ValueError, match="Classifier: drop_path must be from 0 to below 1, got 1"):
        classifier(drop_path=1.0)


OPTIMIZERS = {
    "AdamW": partial(layerwise_adamw, weight_decay=0.05, layer_decay=0.65),
    "SGD": partial(sgd, weight_decay=0.01),
    "LARS": partial(lars, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad_steps", [{0}, {1, 2}], ids=["the first", "later ones"])
def test_a_step_with_images_that_are_not_finite_changes_nothing(optimizer, bad_steps, poisoned_empty):
    config, pixels = finetune_config(), torch.rand(8, 1, 28, 28)

    def trained(steps: set[int]) -> tuple[dict[str, Tensor], float]:
        model = classifier(drop_path=0.3)
        task = Classification(model, config, labels(), OPTIMIZERS[optimizer])
        step = Step(model, task.optimizer(model, 0.01), task.loss)
        for i in sorted({0, 1, 2, 3} & steps):
            bad = torch.where(torch.arange(8) == 2, math.nan, 1.0).view(-1, 1, 1, 1)
            step(*task.inputs(Batch(pixels * bad if i in bad_steps else pixels, torch.arange(8)), i))
        return model.state_dict(), step.skipped.item()

    (ours, skipped), (expected, none) = trained({0, 1, 2, 3}), trained({0, 1, 2, 3} - bad_steps)
    assert (skipped, none) == (len(bad_steps), 0)
    assert all(torch.equal(x, expected[name]) for name, x in ours.items())
    start = classifier().state_dict()
    assert not any(torch.equal(x, start[name]) for name, x in ours.items())


def test_skipped_steps_of_a_run_are_counted(tmp_path):
    pixels = torch.rand(40, 1, 28, 28)
    pixels[7] = math.nan
    history = finetune_demo_model(tmp_path, data=TensorImages(pixels, 3), steps=10, ema_decay=0.9)
    assert history[-1]["skipped"] == 2
    assert [loss is None for _, loss in losses(tmp_path)].count(True) == 2
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


def test_options_of_crops_reach_the_pictures(tmp_path, monkeypatch):
    run_demo_model(tmp_path / "run", steps=1)
    for name in ("land", "sea"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, photo in enumerate(photographs(2)):
            photo.save(tmp_path / "data" / name / f"{i}.png")
    made = []

    class Recorded(TrainingImages):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(mae.commands.labelled_run, "TrainingImages", Recorded)
    data, out = str(tmp_path / "data"), ("--out", str(tmp_path / "out"))
    command = ["finetune", "--checkpoint", str(tmp_path / "run"), "--data", data, "--test", data, "--dry-run", *out]
    main([*command, "--seed", "4"])
    main([*command, "--no-flips", "--least-area", "0.9"])
    assert [(x.least_area, x.flips, x.seed) for x in made] == [(0.08, True, 4), (0.9, False, 0)]
