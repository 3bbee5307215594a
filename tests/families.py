"""Small models of every family that apply knows, and how each is trained on a batch of images."""

from math import prod

import torch
import transformers
from peers import import_peer
from published_style import MaskedAutoencoderViT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


class Patches(nn.Module):
    """The patch embedding of images, clips and volumes."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        convolution = nn.Conv3d if len(patch_size) == 3 else nn.Conv2d
        self.img_size, self.patch_size = img_size, patch_size
        self.proj = convolution(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # [N, L, D]


class AnySize(MaskedAutoencoderViT):
    """The published class for images, clips and volumes of any sides; stated is what its patch embedding says."""

    def __init__(self, img_size, patch_size, in_chans, stated=None, **options):
        super().__init__(img_size=8, patch_size=8, in_chans=in_chans, **options)
        dim, decoder_dim = self.pos_embed.shape[2], self.decoder_pos_embed.shape[2]
        num_patches = prod(size // p for size, p in zip(img_size, patch_size, strict=True))
        self.patch_embed = Patches(stated, patch_size, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, dim), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_dim), requires_grad=False)
        self.decoder_pred = nn.Linear(decoder_dim, in_chans * prod(patch_size))

    def patchify(self, imgs):  # [N, L, E] with E = (frame,) row, column, channel
        for side, p in enumerate(self.patch_embed.patch_size, start=2):
            imgs = imgs.unfold(side, p, p)  # [N, C, (T',) H', W', (pt,) ph, pw]
        return imgs.movedim(1, -1).flatten(1, len(self.patch_embed.patch_size)).flatten(2)


class SatMAE(MaskedAutoencoderViT):
    """SatMAE's of one patch embedding: the published class, with a patch's values in the order of its convolution."""

    def patchify(self, imgs, p, c):
        x = imgs.reshape(len(imgs), c, imgs.shape[2] // p, p, imgs.shape[3] // p, p)  # [N, C, H', p, W', p]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)

    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs, self.patch_embed.patch_size[0], self.patch_embed.proj.in_channels)
        if self.norm_pix_loss:
            target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


class SatMAEOfGroups(MaskedAutoencoderViT):
    """SatMAE's of several groups of channels, each with a patch embedding of its own."""

    def __init__(self, groups=((0, 1), (2,)), **options):
        super().__init__(**options)
        embed = (self.patch_embed.img_size, self.patch_embed.patch_size)
        self.patch_embed = nn.ModuleList(Patches(*embed, len(group), 64) for group in groups)


class SatMAEOfDates(MaskedAutoencoderViT):
    """SatMAE's of two dates, [N, 2, C, H, W], which the encoder and the decoder are told."""

    def random_masking(self, x, mask_ratio, mask=None):
        return super().random_masking(x, mask_ratio)

    def forward_encoder(self, x, dates, mask_ratio, mask=None):
        x = torch.cat([self.patch_embed(image) + self.pos_embed[:, 1:] for image in x.unbind(1)], dim=1)
        x = x + dates.repeat_interleave(x.shape[1] // 2, dim=1)[:, :, None]
        x, mask, ids_restore = self.random_masking(x, mask_ratio, mask=mask)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.norm(x)], dim=1), mask, ids_restore

    def forward_decoder(self, x, dates, ids_restore):
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.repeat(len(x), ids_restore.shape[1] + 1 - x.shape[1], 1)
        x = torch.cat([x[:, 1:], mask_tokens], dim=1).gather(1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
        x = x + self.decoder_pos_embed[:, 1:].repeat(1, 2, 1)
        x = x + dates.repeat_interleave(x.shape[1] // 2, dim=1)[:, :, None]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, imgs, pred, mask):
        target = torch.cat([self.patchify(image) for image in imgs.unbind(1)], dim=1)
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75):
        dates = torch.linspace(0, 1, 2 * len(imgs), device=imgs.device).view(-1, 2)
        latent, mask, ids_restore = self.forward_encoder(imgs, dates, mask_ratio)
        pred = self.forward_decoder(latent, dates, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


class SpatiotemporalMAE(AnySize):
    """That of "Masked Autoencoders As Spatiotemporal Learners": a class token of the decoder's own, frames left out."""

    def __init__(self, **options):
        super().__init__(**options)
        self.decoder_cls_token = nn.Parameter(torch.randn_like(self.mask_token))

    def random_masking(self, x, mask_ratio):
        kept, mask, ids_restore = super().random_masking(x, mask_ratio)
        return kept, mask, ids_restore, ids_restore.argsort(1)[:, : kept.shape[1]]

    def forward_encoder(self, x, mask_ratio):
        x, mask, ids_restore, ids_keep = self.random_masking(self.patch_embed(x), mask_ratio)
        x = x + self.pos_embed[0, 1:][ids_keep]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:], mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.repeat(len(x), ids_restore.shape[1] - x.shape[1], 1)
        x = torch.cat([x, mask_tokens], dim=1).gather(1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
        x = torch.cat([self.decoder_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def patchify(self, imgs):
        self.patch_info = imgs.shape  # for unpatchify
        return super().patchify(imgs)


class EncoderDecoder(nn.Module):
    """VideoMAE and Clay: an encoder and a decoder apart, no un-shuffling, a patch embedding under another name."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"patch_embedding": Patches(None, (2, 8, 8), 3, 64), "blocks": nn.ModuleList()})
        self.decoder = nn.ModuleDict({"blocks": nn.ModuleList(), "head": nn.Linear(64, 384)})
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 64))


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
