"""Every shape that the benchmarks run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A published model and a batch. Letters as everywhere in the package: N, L, K, M, E, D."""

    name: str
    model: str  # factory in mae
    batch: int  # N
    embed_dim: int  # D
    depth: int
    patch: int = 16  # pixels
    image: int = 224  # pixels
    channels: int = 3
    decoder_dim: int = 512
    decoder_depth: int = 8
    mask_ratio: float = 0.75

    @property
    def id(self) -> str:
        return f"{self.name} N={self.batch}"

    @property
    def num_patches(self) -> int:  # L
        return (self.image // self.patch) ** 2

    @property
    def num_keep(self) -> int:  # K
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_masked(self) -> int:  # M
        return self.num_patches - self.num_keep

    @property
    def patch_values(self) -> int:  # E
        return self.channels * self.patch**2


def _tiny(batch: int) -> Shape:
    return Shape("ViT-Ti/16", "mae_vit_tiny_patch16", batch, embed_dim=192, depth=12)


def _small(batch: int) -> Shape:
    return Shape("ViT-S/16", "mae_vit_small_patch16", batch, embed_dim=384, depth=12)


def _base(batch: int) -> Shape:
    return Shape("ViT-B/16", "mae_vit_base_patch16", batch, embed_dim=768, depth=12)


def _large(batch: int) -> Shape:
    return Shape("ViT-L/16", "mae_vit_large_patch16", batch, embed_dim=1024, depth=24)


def _huge(batch: int) -> Shape:
    return Shape("ViT-H/14", "mae_vit_huge_patch14", batch, embed_dim=1280, depth=32, patch=14)


OPS = {"small": [_base(32)], "cpu": [_base(32)], "full": [_base(128), _large(128), _huge(128)]}
STEP = {
    "small": [_tiny(8)],
    "cpu": [_tiny(16), _base(16)],
    "full": [_small(256), _base(256), _large(128), _huge(64)],
}
