"""What fixes a model: its sizes, and the meaning of its pixels."""

from dataclasses import dataclass
from typing import Any, Literal

from mae.fields import check_fields
from mae_kernels.patch_grid import PatchGrid

_MOST_PATCHES = 2**20  # whose positions alone take gigabytes, and their attention years


@dataclass(frozen=True)
class MAEConfig:
    """Everything that fixes the architecture and the meaning of pixels. The defaults are ViT-B/16.

    Video and volumes have three sizes: frames (slices), height and width. An int as patch_size is then the patch's size
    along all three, and a pair is a patch of one frame.
    """

    # Both are Sizes in pixels, and held as two or three numbers.
    image_size: Any = 224  # H = W, (H, W) or (T, H, W); the model takes other sizes too
    patch_size: Any = 16  # one number for all sides, (ph, pw) or (pt, ph, pw)
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    # Targets normalised per patch, or per patch and channel ("channel", as VideoMAE): better features, but pictures
    # need the true statistics.
    norm_pix_loss: bool | Literal["channel"] = True
    # Of uint8 pixels as numbers in [0, 1], of uint16 ones in their own units; the ops apply them to both.
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # What predicts: mask tokens among the visible ones, which attend to each other; or CrossMAE's, which attend to the
    # visible ones alone. Another model with another objective, not the published one faster.
    decoder: Literal["self", "cross"] = "self"
    predicted_share: float = 1.0  # of the hidden patches, in the loss: see mae.model.cross.predicted

    def __post_init__(self) -> None:
        try:
            check_fields(vars(self))
        except ValueError as error:
            raise ValueError(f"MAEConfig: {error}") from None
        size, patch = self.image_size, self.patch_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        patch = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)
        sides = max(len(size), len(patch))
        for name, value in (("image_size", size), ("patch_size", patch)):
            object.__setattr__(self, name, (1,) * (sides - len(value)) + value)
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, width, heads in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("decoder_embed_dim", self.decoder_embed_dim, self.decoder_num_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(f"MAEConfig: {name} {width} must be a multiple of 4 and of its {heads} heads")
        if self.decoder == "cross" and not self.decoder_depth:
            raise ValueError("MAEConfig: a cross decoder sees the image in its blocks alone, and decoder_depth is 0")
        if self.num_patches > _MOST_PATCHES:
            raise ValueError(f"MAEConfig: an image has {self.num_patches} patches, more than {_MOST_PATCHES}")
        if not len(self.pixel_mean) == len(self.pixel_std) == self.in_chans:
            raise ValueError(
                f"MAEConfig: pixel_mean and pixel_std need {self.in_chans} values, one per channel, "
                f"got {len(self.pixel_mean)} and {len(self.pixel_std)}"
            )

    @property
    def grid(self) -> PatchGrid:
        """How an image of this size is cut."""
        return PatchGrid.of_sizes("MAEConfig", self.image_size, self.patch_size, self.in_chans)

    @property
    def sides(self) -> tuple[int, ...]:
        """Patches along height and width, or along time, height and width."""
        return self.grid.grid[-len(self.image_size) :]

    @property
    def num_patches(self) -> int:
        return self.grid.num_patches
