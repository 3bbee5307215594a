"""Calls of applied models that the ops do not cover run the original code, and those of each family's own are kept."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers
from conftest import DEVICE
from families import SIZE, Calls, distance, hugging_face, images, is_a_key_bias, published, timm_encoder, train
from peers import FOLDER
from torch import nn

from mae_kernels import apply, unapply
from mae_kernels.integrations.pieces import given


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, None)),
        ((1,), {"ratio": 2, "noise": 3}, (1, 2, 3)),
        ((), {"x": 1, "ratio": 2}, (1, 2, None)),
        ((1,), {}, None),
        ((1,), {"imgs": 2}, None),
        ((1, 2), {"imgs": 2}, None),
        ((1, 2, 3, 4), {}, None),
    ],
)
def test_calls_are_told_apart(args, kwargs, expected):
    assert given(args, kwargs, "x", "ratio", noise=None) == expected


@pytest.mark.parametrize(("path", "shape"), [("patch_embed", (3, 36, 64)), ("patch_embed.proj", (3, 64, 6, 6))])
def test_hooks_on_a_part_that_the_ops_would_pass_over(path, shape):
    """Whoever asks for the part's result gets it; without the hook the ops are back."""
    model = published().to(DEVICE)
    expected = train(copy.deepcopy(model), batch := images(device=DEVICE))
    apply(model)
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with Calls() as calls:
        result = train(model, batch)
    assert seen == [shape]
    assert "mae_kernels::patch_embed" not in calls.names
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)
    handle.remove()
    with Calls() as calls:
        train(model, batch)
    assert "mae_kernels::patch_embed" in calls.names


def test_a_replaced_projection_is_used():
    class Doubled(nn.Conv2d):  # as adapters do
        def forward(self, x):
            return 2 * super().forward(x)

    model = published()
    apply(model)
    doubled = Doubled(3, 64, 8, stride=8)
    doubled.load_state_dict(model.patch_embed.proj.state_dict())
    model.patch_embed.proj = doubled
    plain = copy.deepcopy(model)
    unapply(plain)
    batch = images()
    assert distance(train(model, batch)["loss"], train(plain, batch)["loss"]) < 1e-6


def negated(function):
    return lambda *args, **options: -function(*args, **options)


@pytest.mark.parametrize("how", ["another class", "another forward", "another patchify", "overlapping patches"])
@pytest.mark.parametrize("build", [published, hugging_face], ids=["published", "Hugging Face"])
def test_parts_that_were_exchanged_since_are_used(build, how):
    """Applied first, changed then: the same as the change alone."""
    plain = copy.deepcopy(model := build())
    apply(model)
    conv = nn.Conv2d(3, 64, 10, stride=8, padding=1)
    for network in (model, plain):
        embed = network.patch_embed if build is published else network.vit.embeddings.patch_embeddings
        if how == "another class":
            cls = type(embed)
            embed.__class__ = type("Another", (cls,), {"forward": negated(cls.forward)})
        elif how == "another forward":
            embed.forward = negated(embed.forward)
        elif how == "another patchify":
            network.patchify = negated(network.patchify)
        else:
            setattr(embed, "proj" if build is published else "projection", copy.deepcopy(conv))
    batch = images()
    ours, expected = train(model, batch), train(plain, batch)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


def largest_first(tokens, mask_ratio=0.75, noise=None):
    """A masking of one's own, by what is in the patches."""
    order = tokens.norm(dim=2).argsort(1, descending=True)
    kept = order[:, : int(order.shape[1] * 0.25)]
    mask = torch.ones(order.shape).scatter(1, kept, 0.0)
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2])), mask, order.argsort(1)


class Patched:
    """Methods that are exchanged after apply, on an instance or, as some libraries do, on the class."""

    @staticmethod
    def masking(function):
        return lambda self, *args, **options: largest_first(*args)

    @staticmethod
    def negated(function):
        return lambda self, *args, **options: -function(self, *args, **options)


@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize(
    ("build", "path", "name", "change"),
    [
        (published, "", "patchify", "negated"),
        (published, "", "forward_loss", "negated"),
        (published, "", "random_masking", "masking"),
        (hugging_face, "", "patchify", "negated"),
        (hugging_face, "vit.embeddings", "random_masking", "masking"),
    ],
)
def test_methods_that_were_exchanged_since_are_used(build, path, name, change, where, monkeypatch):
    plain = copy.deepcopy(model := build())
    owners = [network.get_submodule(path) for network in (model, plain)]
    apply(model)
    cls = type(owners[1])
    new = getattr(Patched, change)(getattr(cls, name))
    if where == "class":
        monkeypatch.setattr(cls, name, new)
    else:
        for owner in owners:
            setattr(owner, name, new.__get__(owner))
    batch = images()
    ours, expected = train(model, batch), train(plain, batch)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_masks_that_the_op_does_not_take():
    """Weights, integers, float64, and a mask that is learned: as the original, or as it raises."""
    plain = copy.deepcopy(model := published())
    apply(model)
    pred, pixels = torch.randn(2, 36, 192), images(2)
    masks = [
        torch.linspace(0.1, 1, 36),
        torch.arange(36) % 2,
        (torch.arange(36) % 2).double(),
        torch.arange(36) % 3 == 0,
    ]
    for mask in (mask.repeat(2, 1) for mask in masks):
        torch.testing.assert_close(model.forward_loss(pixels, pred, mask), plain.forward_loss(pixels, pred, mask))
    learned = torch.rand(2, 36).round().requires_grad_()
    gradients = [torch.autograd.grad(m.forward_loss(pixels, pred, learned), learned)[0] for m in (model, plain)]
    torch.testing.assert_close(*gradients)


def test_arguments_that_the_ops_do_not_take():
    plain = copy.deepcopy(model := published())
    apply(model)
    batch = images(2)
    for ratio in (torch.tensor(0.75), 1.0):
        results = []
        for network in (model, plain):
            torch.manual_seed(1)
            results.append(network(batch, ratio))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)
    for wrong in (batch.half(), batch.double(), batch[:, :1]):
        with pytest.raises(RuntimeError) as ours:
            model(wrong)
        with pytest.raises(RuntimeError) as theirs:
            plain(wrong)
        assert str(ours.value) == str(theirs.value)


def test_classes_that_copy_in_their_own_way():
    class Reduced(families.MaskedAutoencoderViT):
        def __reduce__(self):
            return _new_reduced, (type(self),), self.__dict__

    model = published(cls=Reduced)
    apply(model)
    twin, batch = copy.deepcopy(model), images(2)
    assert type(twin) is type(model)
    torch.manual_seed(1)
    expected = model(batch)[0]
    torch.manual_seed(1)
    assert twin(batch)[0] == expected


def _new_reduced(cls):
    return cls.__new__(cls)


@pytest.mark.parametrize("build", [published, hugging_face], ids=["published", "Hugging Face"])
def test_pixels_that_are_no_floating_numbers_meet_the_original(build):
    model = build()
    apply(model)
    with pytest.raises(RuntimeError, match="should be the same"):
        model(torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8))


def test_an_argument_of_a_subclass_reaches_it():
    class Scaled(families.MaskedAutoencoderViT):
        def forward_decoder(self, x, ids_restore, scale=1.0):
            return scale * super().forward_decoder(x, ids_restore)

    model = published(cls=Scaled)
    assert "forward_decoder" in [change.method for change in apply(model).replaced]
    call = torch.randn(2, 10, 64), torch.rand(2, 36).argsort(1)
    assert distance(model.forward_decoder(*call, scale=2.0), 2 * model.forward_decoder(*call)) < 1e-6


@pytest.mark.parametrize("stated", [None, SIZE, [SIZE, SIZE]], ids=["nowhere", "int", "list"])
def test_where_a_published_model_states_its_image_size(stated):
    model = published()
    expected = train(copy.deepcopy(model), batch := images())
    del model.patch_embed.img_size
    if stated is not None:
        model.patch_embed.img_size = stated
    assert "forward_encoder" in [change.method for change in apply(model).replaced]
    with Calls() as calls:
        result = train(model, batch)
    assert "mae_kernels::patch_embed" in calls.names
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)


@pytest.mark.parametrize("build", [published, hugging_face], ids=["published", "Hugging Face"])
def test_images_that_require_grad(build):
    model = build().to(DEVICE)
    plain = copy.deepcopy(model)
    apply(model)
    batch = images(device=DEVICE)
    leaves = [batch.clone().requires_grad_() for _ in range(2)]
    for network, leaf in zip((model, plain), leaves, strict=True):
        train(network, leaf)
    assert distance(leaves[0].grad, leaves[1].grad) < 1e-5


def test_nothing_hidden():
    model = published().to(DEVICE)
    plain = copy.deepcopy(model)
    apply(model)
    batch = images(device=DEVICE)
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        results.append(network.forward_encoder(batch, 0.0))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_wrong_sizes_meet_the_original_error():
    model = hugging_face()
    apply(model)
    with pytest.raises(ValueError, match="Input image size"):
        model(torch.randn(2, 3, 24, 96))


def test_as_many_patches_in_another_rectangle():
    """The published model has no positions for them, and its patch embedding says so."""

    class Strict(type(published().patch_embed)):
        def forward(self, x):
            assert x.shape[2:] == self.img_size, "Input image size doesn't match model"
            return super().forward(x)

    model = published()
    model.patch_embed.__class__ = Strict
    apply(model)
    with pytest.raises(AssertionError, match="Input image size doesn't match model"):
        model(torch.randn(2, 3, 24, 96))


def test_interpolated_positions_of_hugging_face():
    model = hugging_face()
    plain = copy.deepcopy(model)
    apply(model)
    batch = torch.randn(2, 3, 64, 64)
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        results.append(network(batch, interpolate_pos_encoding=True))
    assert torch.equal(results[0].loss, results[1].loss)


@pytest.mark.parametrize("options", [{"output_hidden_states": True, "output_attentions": True}, {"return_dict": False}])
def test_outputs_of_hugging_face(options):
    model = hugging_face(attn_implementation="eager")
    plain = copy.deepcopy(model)
    apply(model)
    batch, noise = torch.randn(2, 3, SIZE, SIZE), torch.rand(2, 36)
    ours, theirs = (network(pixel_values=batch, noise=noise, **options) for network in (model, plain))
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    for x, y in zip(*(torch.utils._pytree.tree_leaves(out) for out in (ours, theirs)), strict=True):
        assert distance(x, y) < 1e-5


def test_gradient_checkpointing_of_hugging_face():
    model = hugging_face().to(DEVICE)
    apply(model)
    expected = train(model, batch := images(device=DEVICE))
    model.gradient_checkpointing_enable()
    result = train(model, batch)
    assert all(distance(result[name], expected[name]) < 1e-6 for name in expected if not is_a_key_bias(name))


def test_saving_as_hugging_face_does(tmp_path):
    model = hugging_face()
    apply(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ViTMAEForPreTraining"]
    batch = torch.randn(2, 3, SIZE, SIZE)
    assert distance(train(loaded.train(), batch)["loss"], train(model, batch)["loss"]) < 1e-6


@pytest.mark.parametrize(
    "options", [{"reg_tokens": 4}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_prefix_tokens_of_timm(options):
    model = timm_encoder(**options)
    plain = copy.deepcopy(model)
    assert apply(model).replaced
    batch = images()
    expected, result = train(plain, batch), train(model, batch)
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)


def test_patch_dropout_in_order():
    model = timm_encoder()
    model.patch_drop.ordered = True
    plain = copy.deepcopy(model)
    apply(model)
    batch = images()
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        results.append(network.forward_features(batch))
    assert distance(*results) < 1e-5


def test_lightly_refuses_a_missing_class_token():
    model = families.lightly()
    apply(model)
    with pytest.raises(RuntimeError, match="the class token, number 0, must come first in idx_keep"):
        model.backbone.encode(images(), idx_keep=torch.tensor([[1, 2, 3]] * 3))


@pytest.mark.parametrize("masked", ["mask", "idx_mask"])
def test_a_mask_of_lightly_runs_the_original(masked):
    model = families.lightly()
    plain = copy.deepcopy(model)
    apply(model)
    order = torch.cat([torch.zeros(3, 1, dtype=torch.long), 1 + torch.rand(3, 36).argsort(1)], dim=1)
    masks = {"mask": torch.rand(3, 37) < 0.5, "idx_mask": order[:, 1:19]}
    call = {"images": images(), "idx_keep": order[:, :10], masked: masks[masked]}
    with Calls() as calls:
        result = model.backbone.encode(**call)
    assert "mae_kernels::patch_embed" not in calls.names
    assert torch.equal(result, plain.backbone.encode(**call))


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="this is the run with transformers 4")
def test_transformers_4():
    """What concerns Hugging Face once more, with the last transformers 4."""
    folder = FOLDER / "transformers-4"
    if not folder.is_dir():
        pytest.skip("transformers 4 is not installed; make test does it")
    here = Path(__file__)
    files = ["test_apply.py", here.name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "Hugging or hugging", *files],
        cwd=here.parent, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(here.parent.parent)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert "failed" not in result.stdout
