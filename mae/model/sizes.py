"""What fixes a model: its sizes, and the meaning of its pixels."""

from dataclasses import dataclass

from mae.fields import check_fields

_MOST_PATCHES = 2**20  # whose positions alone take gigabytes, and their attention years


@dataclass(frozen=True)
class MAEConfig:
    """Everything that fixes the architecture and the meaning of pixels. The defaults are ViT-B/16."""

    image_size: int | tuple[int, int] = 224  # pixels, H = W or (H, W)
    patch_size: int | tuple[int, int] = 16  # pixels, ph = pw or (ph, pw)
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    norm_pix_loss: bool = True  # targets normalised per patch: better features, but pictures need the true statistics
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels in [0, 1], applied to uint8 images by the ops
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        try:
            check_fields(vars(self))
        except ValueError as error:
            raise ValueError(f"MAEConfig: {error}") from None
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value, value) if isinstance(value, int) else tuple(value))
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for size, patch, side in zip(self.image_size, self.patch_size, ("height", "width"), strict=True):
            if size % patch:
                raise ValueError(f"MAEConfig: image {side} {size} is not a multiple of the patch {side} {patch}")
        for name, width, heads in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("decoder_embed_dim", self.decoder_embed_dim, self.decoder_num_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(f"MAEConfig: {name} {width} must be a multiple of 4 and of its {heads} heads")
        if self.num_patches > _MOST_PATCHES:
            raise ValueError(f"MAEConfig: an image has {self.num_patches} patches, more than {_MOST_PATCHES}")
        if not len(self.pixel_mean) == len(self.pixel_std) == self.in_chans:
            raise ValueError(
                f"MAEConfig: pixel_mean and pixel_std need {self.in_chans} values, one per channel, "
                f"got {len(self.pixel_mean)} and {len(self.pixel_std)}"
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_values(self) -> int:
        return self.in_chans * self.patch_size[0] * self.patch_size[1]
