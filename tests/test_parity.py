"""Parity with code nobody here wrote, Hugging Face's ViTMAEForPreTraining, and with the definition in float64."""

import pytest
import torch
import transformers
from torch import Tensor

from mae import MAEConfig, MaskedAutoencoder
from mae.checkpoints.configs import to_hugging_face_config
from mae.checkpoints.layouts import from_layout, to_layout
from mae_kernels import reference

SMALL = MAEConfig(
    image_size=48, patch_size=8, embed_dim=64, depth=3, num_heads=4, decoder_embed_dim=48, decoder_depth=2,
    decoder_num_heads=4,
)  # fmt: skip
VIT_B = MAEConfig()


def hugging_face(model: MaskedAutoencoder):
    """Their model with our weights, under our names turned into theirs: strict, and the numbers tell if q were k."""
    theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**to_hugging_face_config(model.config)))
    theirs.load_state_dict(to_layout(model.state_dict(), "huggingface-5"), strict=True)
    return theirs


def build(config: MAEConfig, norm_pix: bool) -> MaskedAutoencoder:
    torch.manual_seed(0)
    config = MAEConfig(**{**vars(config), "norm_pix_loss": norm_pix})
    model = MaskedAutoencoder(config)
    with torch.no_grad():  # biases and norms off their initial zeros and ones, so that none goes untested
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("config", "norm_pix", "return_pred"),
    [
        *((SMALL, norm_pix, return_pred) for norm_pix in (True, False) for return_pred in (True, False)),
        pytest.param(VIT_B, True, False, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, bool) else {SMALL: "small", VIT_B: "ViT-B"}[x],
)
def test_hugging_face_loss_and_every_gradient(config, norm_pix, return_pred):
    ours = build(config, norm_pix)
    theirs = hugging_face(ours)
    images = torch.randn(2, 3, *config.image_size)
    noise = torch.rand(2, config.num_patches)

    loss = ours(images, noise=noise, return_pred=return_pred).loss
    loss.backward()
    their_loss = theirs(pixel_values=images, noise=noise).loss
    their_loss.backward()

    assert abs(loss.item() / their_loss.item() - 1) < 1e-5
    their_gradients = from_layout(gradients(theirs))
    our_gradients = gradients(ours)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert relative_error(gradient, their_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "plain"])
def test_hugging_face_predictions(norm_pix):
    ours = build(SMALL, norm_pix)
    images, noise = torch.randn(3, 3, 48, 48), torch.rand(3, SMALL.num_patches)
    output = ours(images, noise=noise, return_pred=True)
    theirs = hugging_face(ours)(pixel_values=images, noise=noise)
    assert relative_error(output.pred, theirs.logits) < 1e-5
    assert torch.equal(output.mask, theirs.mask.bool())


@pytest.mark.parametrize(
    ("config", "norm_pix"),
    [(SMALL, True), (SMALL, False), pytest.param(VIT_B, True, marks=pytest.mark.slow)],
    ids=["small-norm_pix", "small-plain", "ViT-B"],
)
def test_definition_in_float64(config, norm_pix):
    model = build(config, norm_pix).double()
    images = torch.randn(2, 3, *config.image_size, dtype=torch.float64)
    noise = torch.rand(2, config.num_patches)

    loss = model(images, noise=noise).loss
    loss.backward()
    ours = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    definition = reference.pretraining_loss(model, images, noise)
    definition.backward()

    assert abs(loss.item() / definition.item() - 1) < 1e-12
    for name, gradient in gradients(model).items():
        assert relative_error(ours[name], gradient) < 1e-12, name
