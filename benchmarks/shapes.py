"""Every shape that the benchmarks run."""

from dataclasses import dataclass, replace


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
        size = "" if self.image == 224 else f" {self.image}"
        return f"{self.name}{size} N={self.batch}"

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


TINY = Shape("ViT-Ti/16", "mae_vit_tiny_patch16", 1, embed_dim=192, depth=12)
SMALL = Shape("ViT-S/16", "mae_vit_small_patch16", 1, embed_dim=384, depth=12)
BASE = Shape("ViT-B/16", "mae_vit_base_patch16", 1, embed_dim=768, depth=12)
LARGE = Shape("ViT-L/16", "mae_vit_large_patch16", 1, embed_dim=1024, depth=24)
HUGE = Shape("ViT-H/14", "mae_vit_huge_patch14", 1, embed_dim=1280, depth=32, patch=14)

OPS = {
    # For Triton's interpreter, half a millisecond a program.
    "tiny": [replace(TINY, batch=2, image=64, embed_dim=64, decoder_dim=64)],
    "small": [replace(BASE, batch=32)],
    "cpu": [replace(BASE, batch=32)],
    "full": [
        *(replace(BASE, batch=n) for n in (64, 256, 1024)),
        *(replace(model, batch=256) for model in (SMALL, LARGE, HUGE)),
        replace(BASE, batch=64, image=448),  # L = 784
        replace(BASE, batch=16, image=896),  # L = 3136
    ],
}
STEP = {
    "tiny": [],
    "small": [replace(TINY, batch=8)],
    "cpu": [replace(TINY, batch=16), replace(BASE, batch=16)],
    "full": [replace(SMALL, batch=256), replace(BASE, batch=256), replace(LARGE, batch=128), replace(HUGE, batch=64)],
}
