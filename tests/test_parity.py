"""Parity with code nobody here wrote, Hugging Face's ViTMAEForPreTraining, and with the definition in float64."""

import pytest
import torch
import transformers
from torch import Tensor

from mae import MAEConfig, MaskedAutoencoder
from mae_kernels import reference

SMALL = MAEConfig(
    image_size=48, patch_size=8, embed_dim=64, depth=3, num_heads=4, decoder_embed_dim=48, decoder_depth=2,
    decoder_num_heads=4,
)  # fmt: skip
VIT_B = MAEConfig()

# Ours -> theirs. {} is a block's number; three entries are q, k, v, concatenated in our qkv.
BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
TOP = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}


def their_names(name: str) -> list[str]:
    """The Hugging Face keys that make up one of ours."""
    stem, _, leaf = name.rpartition(".")
    for blocks, layers in (("blocks", "vit.layers"), ("decoder_blocks", "decoder.decoder_layers")):
        if name.startswith(f"{blocks}."):
            _, number, part = stem.split(".", 2)
            return [f"{layers}.{number}.{theirs}.{leaf}" for theirs in BLOCK[part]]
    return [TOP[name]] if name in TOP else [f"{TOP[stem]}.{leaf}"]


def from_theirs(name: str, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[theirs] for theirs in their_names(name)])


def hugging_face(model: MaskedAutoencoder):
    """Their model with our weights: from a config alone theirs has zero position embeddings and another epsilon."""
    c = model.config
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=c.image_size[0],
            patch_size=c.patch_size[0],
            num_channels=c.in_chans,
            hidden_size=c.embed_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            intermediate_size=int(c.embed_dim * c.mlp_ratio),
            decoder_hidden_size=c.decoder_embed_dim,
            decoder_num_hidden_layers=c.decoder_depth,
            decoder_num_attention_heads=c.decoder_num_heads,
            decoder_intermediate_size=int(c.decoder_embed_dim * c.mlp_ratio),
            layer_norm_eps=1e-6,
            norm_pix_loss=c.norm_pix_loss,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    state = {}
    for name, ours in model.state_dict().items():
        names = their_names(name)
        state.update(zip(names, ours.chunk(len(names)), strict=True))
    theirs.load_state_dict(state, strict=True)
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


@pytest.mark.parametrize("return_pred", [False, True], ids=["masked-head", "full-head"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "plain"])
@pytest.mark.parametrize("config", [SMALL, VIT_B], ids=["small", "ViT-B"])
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
    their_gradients = gradients(theirs)
    checked = 0
    for name, gradient in gradients(ours).items():
        assert relative_error(gradient, from_theirs(name, their_gradients)) < 1e-5, name
        checked += len(their_names(name))
    assert checked == len(their_gradients)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "plain"])
def test_hugging_face_predictions(norm_pix):
    ours = build(SMALL, norm_pix)
    images, noise = torch.randn(3, 3, 48, 48), torch.rand(3, SMALL.num_patches)
    output = ours(images, noise=noise, return_pred=True)
    theirs = hugging_face(ours)(pixel_values=images, noise=noise)
    assert relative_error(output.pred, theirs.logits) < 1e-5
    assert torch.equal(output.mask, theirs.mask.bool())


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "plain"])
@pytest.mark.parametrize("config", [SMALL, VIT_B], ids=["small", "ViT-B"])
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
