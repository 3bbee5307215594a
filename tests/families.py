"""Small models of every family that apply knows, and how each is trained on a batch of images."""

import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from peers import import_peer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_spec = importlib.util.spec_from_file_location(
    "published_style", Path(__file__).parent.parent / "examples" / "published_style.py"
)
published_style = importlib.util.module_from_spec(_spec)
sys.modules["published_style"] = published_style  # its classes pickle by name
_spec.loader.exec_module(published_style)
MaskedAutoencoderViT = published_style.MaskedAutoencoderViT

SIZE = 48
SMALL = {
    "img_size": SIZE, "patch_size": 8, "in_chans": 3, "embed_dim": 64, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 48, "decoder_depth": 2, "decoder_num_heads": 4,
}  # fmt: skip


class AnotherHead(MaskedAutoencoderViT):
    """A subclass as people write them: another prediction head, and a second one of their own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.decoder_pred = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 192))
        self.quality = nn.Linear(64, 1)

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio=mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask) + self.quality(latent[:, 0]).square().mean(), pred, mask


class BiasedVariance(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


def published(norm_pix: bool = True, cls: type = MaskedAutoencoderViT, **options) -> nn.Module:
    return _trained(cls(**{**SMALL, "norm_pix_loss": norm_pix, **options}))


def hugging_face(norm_pix: bool = True, cls: str = "ViTMAEForPreTraining", **options) -> nn.Module:
    sizes = {
        "image_size": SIZE, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "decoder_hidden_size": 48, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 96, "norm_pix_loss": norm_pix,
    }  # fmt: skip
    return _trained(getattr(transformers, cls)(transformers.ViTMAEConfig(**{**sizes, **options})))


def timm_encoder(**options) -> nn.Module:
    timm = import_peer("timm")
    options = {"img_size": SIZE, "patch_drop_rate": 0.75, "embed_dim": 64, "depth": 2, "num_classes": 5, **options}
    return _trained(timm.create_model("vit_tiny_patch16_224", patch_size=8, num_heads=4, **options))


class Lightly(nn.Module):
    """The encoder as lightly's own masked autoencoder calls it."""

    def __init__(self):
        super().__init__()
        modules = import_peer("lightly.models.modules")
        self.backbone = modules.MaskedVisionTransformerTIMM(timm_encoder(patch_drop_rate=0.0))

    def forward(self, images: Tensor) -> Tensor:
        utils = import_peer("lightly.models.utils")
        shape = len(images), self.backbone.sequence_length
        idx_keep, _ = utils.random_token_mask(shape, mask_ratio=0.75, device=images.device)
        return self.backbone.encode(images, idx_keep=idx_keep)


def lightly() -> nn.Module:
    return _trained(Lightly())


FAMILIES = {
    "published": published,
    "published, plain pixels": lambda: published(norm_pix=False),
    "published, another head": lambda: published(cls=AnotherHead),
    "Hugging Face": hugging_face,
    "Hugging Face, plain pixels": lambda: hugging_face(norm_pix=False),
    "Hugging Face, encoder": lambda: hugging_face(cls="ViTMAEModel"),
    "timm": timm_encoder,
    "lightly": lightly,
}


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Loss, and whatever else the model returns; for an encoder the loss is a sum of squares."""
    output = model(images)
    if isinstance(output, tuple):
        return dict(zip(("loss", "pred", "mask"), output, strict=True))
    if isinstance(output, Tensor):
        return {"loss": output.float().square().mean(), "pred": output}
    if "loss" in output:
        return {"loss": output.loss, "pred": output.logits, "mask": output.mask}
    pred = output.last_hidden_state
    return {"loss": pred.float().square().mean(), "pred": pred, "mask": output.mask}


def images(n: int = 3, device: str = "cpu") -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, device=device)


def train(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What the model returns, and the gradient of each parameter."""
    torch.manual_seed(1)
    model.zero_grad()
    result = outcome(model, batch)
    result["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: x.detach() for name, x in result.items()}, **gradients}


def distance(x: Tensor, y: Tensor, scale: Tensor | None = None) -> float:
    return ((x.double() - y.double()).norm() / (y if scale is None else scale).double().norm()).item()


def is_a_key_bias(name: str) -> bool:
    # Softmax does not see it: its gradient is rounding and nothing else.
    return name.endswith(("key.bias", "k_proj.bias"))


class Calls(TorchDispatchMode):
    """The names of the dispatcher's ops that ran inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _trained(model: nn.Module) -> nn.Module:
    """Every parameter off the zeros and ones that it starts from, so that none goes untested."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()
