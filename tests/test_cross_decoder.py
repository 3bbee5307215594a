"""The decoder of CrossMAE, and losses of some of the hidden patches: another objective than the published one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae import MAEConfig, MaskedAutoencoder
from mae.model.cross import predicted
from mae.training.profile import LaunchCounter, profile_step, training_flops
from mae_kernels import block_masking, masking_from_mask, patchify, random_masking, reference, tube_masking

SMALL = MAEConfig(
    image_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=3,
    decoder_num_heads=2, decoder="cross",
)  # fmt: skip
L, VISIBLE, HIDDEN = 24, 6, 18


def random_model(**fields) -> MaskedAutoencoder:
    """Every parameter random: an initial 0 or 1 would hide what is left out."""
    model = MaskedAutoencoder(replace(SMALL, **fields))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)


def trained(model) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss) -> dict[str, Tensor]:
    parameters = trained(model)
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


def plain_predictions(model, images, ids_keep, ids) -> Tensor:
    """CrossMAE by PyTorch's layers, for floating images: pixels of the patches ids ``[N, P]``."""
    projected = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    x = projected.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in model.blocks:
        x = reference.transformer_block(x, block)
    memory = model.decoder_embed(model.norm(x))
    positions = model.decoder_pos_embed[:, 1:].expand(len(x), -1, -1)
    x = model.mask_token + positions.gather(1, ids[..., None].expand(-1, -1, positions.shape[2]))
    for block in model.decoder_blocks:
        attn = block.attn
        q, k, v = attn.q(block.norm1(x)), *attn.kv(memory).chunk(2, dim=2)
        q, k, v = (y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        x = x + attn.proj(reference.attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.decoder_pred(model.decoder_norm(x))


def plain_loss(model, images, ids_keep, ids) -> Tensor:
    target = reference.pixel_target(images, 8).gather(1, ids[..., None].expand(-1, -1, 192))
    return (plain_predictions(model, images, ids_keep, ids) - target).square().mean()


@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_loss_and_gradients_are_those_of_plain_layers(share):
    model = random_model(predicted_share=share).double()
    images, masking = torch.rand(3, 3, 32, 48, dtype=torch.float64), random_masking(3, L)
    ids = predicted(masking, share).ids_mask
    assert ids.shape == (3, HIDDEN if share == 1 else 6)
    expected = plain_loss(model, images, masking.ids_keep, ids)
    loss = model(images, masking=masking).loss
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for (name, ours), theirs in zip(gradients(model, loss).items(), gradients(model, expected).values(), strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("part", ["norm1", "attn", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp"])
def test_parts_with_a_hook_are_called(part, images):
    model, masking, calls = random_model().double(), random_masking(3, L), []
    expected = model(images, masking=masking).loss
    for block in model.decoder_blocks:
        block.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    torch.testing.assert_close(model(images, masking=masking).loss, expected, rtol=1e-12, atol=0)
    assert calls == [part] * 3


def test_a_prediction_does_not_depend_on_what_else_is_asked_for(images):
    model, masking = random_model().double(), random_masking(3, L)
    memory = model.decoder_input(model.encode(model.embed(images, masking.ids_keep)), None, model.config.grid)
    everything = model.decode(memory, masking.ids_mask)
    order = torch.randperm(HIDDEN)[:5]
    some = model.decode(memory, masking.ids_mask[:, order])
    torch.testing.assert_close(some, everything[:, order], rtol=1e-12, atol=1e-12)
    each = model.decode(memory)[:, 1:].gather(1, masking.ids_mask[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(each, everything, rtol=1e-12, atol=1e-12)


def test_a_hidden_patch_changes_no_other_prediction(images):
    """The position of one hidden patch is moved: a cross decoder's other predictions stay, to the bit."""
    noise = torch.arange(L).expand(3, -1).float()  # the last patches are hidden
    for decoder, others_change in (("cross", False), ("self", True)):
        model = random_model(decoder=decoder).double()
        before = model(images, noise=noise, return_pred=True).pred
        with torch.no_grad():
            model.decoder_pos_embed[:, 1 + 20] += 1
        changed = (model(images, noise=noise, return_pred=True).pred != before).flatten(2).any(2)[:, VISIBLE:]
        assert changed[:, 20 - VISIBLE].all()
        others = torch.arange(HIDDEN) != 20 - VISIBLE
        assert changed[:, others].any().item() is others_change


MASKS = {
    "random": lambda n: random_masking(n, L),
    "tube": lambda n: tube_masking(n, (4, 6), 0.75),
    "block": lambda n: block_masking(n, (4, 6), 0.75),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("share", [0.01, 1 / 3, 0.5])
def test_the_subset_is_drawn_from_the_hidden_patches_by_the_mask(name, share):
    masking = MASKS[name](50)
    ids = predicted(masking, share).ids_mask
    assert ids.shape == (50, max(1, math.floor(18 * share + 0.5)))
    for row, hidden, mask in zip(ids.tolist(), masking.ids_mask.tolist(), predicted(masking, share).mask, strict=True):
        assert len({*row}) == len(row)
        assert {*row} <= {*hidden}
        assert mask.nonzero()[:, 0].tolist() == sorted(row)
    # A function of the mask: neither the order of the hidden patches nor the other samples have a part in it.
    again = predicted(masking_from_mask(masking.mask[7:8]), share).ids_mask
    assert again.tolist() == ids[7:8].tolist()
    assert predicted(masking, 1.0) is masking


def test_every_hidden_patch_is_as_likely_to_be_predicted():
    """Also of masks whose ids ascend, where a prefix would be the top of the image; and pairs are independent."""
    masking = tube_masking(20_000, (4, 6), 0.75)
    mask, hidden = (m.float() for m in (predicted(masking, 1 / 3).mask, masking.mask))
    assert (mask.sum(0) / hidden.sum(0) - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 15_000)
    pairs = (mask.T @ mask) / (hidden.T @ hidden)
    expected, n = 6 * 5 / (18 * 17), 20_000 * 0.55
    off = ~torch.eye(L, dtype=torch.bool)
    assert (pairs[off] - expected).abs().max() < 6 * math.sqrt(expected / n)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_loss_is_that_of_the_subset(decoder, images):
    """Of the published decoder too, with and without predictions."""
    model, masking = random_model(decoder=decoder, predicted_share=0.5).double(), random_masking(3, L)
    output = model(images, masking=masking, return_pred=True)
    short = model(images, masking=masking)
    assert torch.equal(output.mask, masking.mask)
    assert torch.equal(short.mask, masking.mask)
    torch.testing.assert_close(short.loss, output.loss, rtol=1e-12, atol=0)
    error = (output.pred - reference.pixel_target(model.patch_embed.floating_pixels(images).double(), 8)).square()
    torch.testing.assert_close(output.loss.double(), error[predicted(masking, 0.5).mask].mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_images_of_unequal_counts_get_what_they_would_get_alone(share, images):
    model = random_model(predicted_share=share).double()
    counts = torch.tensor([2, 6, 13])
    mask = torch.rand(3, L).argsort(1) >= counts[:, None]
    ragged = masking_from_mask(mask, num_keep=15)
    loss = model(images, masking=ragged).loss
    parts, alone = [], []
    for i in range(3):
        masking = masking_from_mask(mask[i : i + 1])
        parts.append(max(1, math.floor((L - counts[i].item()) * share + 0.5)))
        assert predicted(ragged, share).mask[i].sum() == parts[i]
        alone.append(model(images[i : i + 1], masking=masking).loss * parts[i])
    expected = sum(alone) / sum(parts)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(images, masking=ragged, return_pred=True).loss, loss, rtol=1e-6, atol=0)
    for (name, ours), theirs in zip(gradients(model, loss).items(), gradients(model, expected).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8, msg=name)
    with LaunchCounter() as counter:
        model(images, masking=ragged).loss.backward()
    assert counter.syncs == 0


def test_pictures_show_every_hidden_patch(images):
    model, masking = random_model(predicted_share=0.25, norm_pix_loss=False), random_masking(3, L)
    pictures = model.reconstruct(images, masking=masking)
    patches = {name: patchify(getattr(pictures, name), 8) for name in ("reconstruction", "original")}
    differs = (patches["reconstruction"] != patches["original"]).any(2)
    assert torch.equal(differs, masking.mask)
    ids = torch.arange(L).expand(3, -1)
    floats = model.patch_embed.floating_pixels(images)
    pred = plain_predictions(model, floats, masking.ids_keep, ids)
    full = model(images, masking=masking, return_pred=True).pred
    torch.testing.assert_close(full, pred, rtol=1e-3, atol=1e-4)


def test_clips_and_other_sizes_than_the_configs():
    clips = replace(SMALL, image_size=(4, 16, 24), patch_size=(2, 8, 8), predicted_share=0.5)
    model = MaskedAutoencoder(clips)
    model(torch.randint(256, (2, 3, 4, 16, 24), dtype=torch.uint8)).loss.backward()
    model = random_model(predicted_share=0.5).double()
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    noise = torch.rand(2, 36)
    output = model(images, noise=noise, return_pred=True)
    torch.testing.assert_close(model(images, noise=noise).loss, output.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("residual", [None, torch.bfloat16])
def test_bfloat16(residual, images):
    torch.manual_seed(3)
    gold = MaskedAutoencoder(replace(SMALL, predicted_share=0.5))
    model = MaskedAutoencoder(gold.config, residual)
    model.load_state_dict(gold.state_dict())
    masking = random_masking(3, L)
    expected = gradients(gold, gold_loss := gold(images, masking=masking).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, masking=masking).loss
        x = model.decoder_input(model.encode(model.embed(images, masking.ids_keep)), None, model.config.grid)
        stream = model.decode(x, masking.ids_mask)
    assert stream.dtype == (residual or torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, gold_loss, rtol=2e-2, atol=0)
    for name, grad in gradients(model, loss).items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() <= 0.06 * max(expected[name].norm(), 1e-2 * gold_loss), name


def test_a_step_is_one_graph(images):
    model = random_model(predicted_share=1 / 3)
    masking = random_masking(3, L)
    expected = model(images, masking=masking).loss
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(images, masking=masking).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(model, loss).values(), gradients(model, expected).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_subset_by_the_compiler_that_is_used():
    masking = tube_masking(16, (4, 6), 0.75)
    compiled = torch.compile(predicted, fullgraph=True)(masking, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(compiled, predicted(masking, 0.5), strict=True))


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_flops_are_those_that_pytorch_counts(decoder, monkeypatch):
    """Fused attention and the ops of this package are opaque to its counter: the former is spelled out for it."""

    def explicit(packed, queries, keys):
        q, k, v = packed.unbind(2) if queries is None else (queries, *packed.unbind(2))
        return reference.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr("mae.model.block.attention", explicit)
    config = replace(SMALL, decoder=decoder, predicted_share=0.5)
    with FlopCounterMode(display=False) as counter:
        MaskedAutoencoder(config)(torch.randn(2, 3, 32, 48)).loss.backward()
    embed, head = 4 * VISIBLE * 192 * 32, 6 * (HIDDEN // 2) * 192 * 16
    assert training_flops(config) == counter.get_total_flops() // 2 + embed + head


def test_phases_of_a_step(images):
    model = MaskedAutoencoder(replace(SMALL, predicted_share=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    phases = profile_step(model, images, optimizer, rounds=1)
    assert {n for n, phase in phases.items() if phase.backward_ms > 0} == {
        "embed", "encoder", "scatter", "decoder", "loss"
    }  # fmt: skip
