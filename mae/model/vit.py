"""The Vision Transformer of Dosovitskiy et al. 2020, as He et al. 2021 pre-train it.

State-dict keys are those of the published code.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from mae.fields import are_all, is_whole
from mae.model.block import Block, of_some
from mae.model.positions import pos_embed_for, sincos_pos_embed
from mae.model.sizes import MAEConfig
from mae_kernels.nn import MaskedPatchEmbed
from mae_kernels.patch_grid import PatchGrid


class VisionTransformer(nn.Module):
    """The encoder: patches and a class token through blocks, and a norm behind them.

    Images are ``[N, C, H, W]``, or ``[N, C, T, H, W]`` where the config's image_size has frames: uint8 or uint16 as
    they come from a file (normalised inside the ops by the config's pixel_mean and pixel_std), or floating and already
    normalised. They may have any size that the patch divides: position embeddings of another grid than the config's
    are made in the call, see :func:`mae.model.pos_embed_for`.

    Args:
        config: sizes and the meaning of pixels; what it says of a decoder is not used here.
        residual_dtype: dtype in which tokens travel between the blocks. None promotes as the published code does:
            float32 under autocast, since the position embeddings are. ``torch.bfloat16`` halves that traffic, and is
            not exact.
    """

    config: MAEConfig
    residual_dtype: torch.dtype | None
    patch_embed: MaskedPatchEmbed
    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: MAEConfig, residual_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.residual_dtype = config, residual_dtype
        dim = config.embed_dim
        self.patch_embed = MaskedPatchEmbed(
            config.patch_size,
            config.in_chans,
            dim,
            pixel_mean=config.pixel_mean,
            pixel_std=config.pixel_std,
            out_dtype=residual_dtype,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        VisionTransformer.initialize_weights(self)  # a subclass has parts that are made behind this

    def initialize_weights(self) -> None:
        """Initial values as published."""
        self.patch_embed.reset_parameters()
        initialize(self.blocks, self.norm)
        nn.init.normal_(self.cls_token, std=0.02)
        fill_positions(self.pos_embed, self.config)

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Class token and visible patches (all of them for None): ``[N, 1 + K, D]``."""
        positions = self.positions(self.pos_embed, self.patch_grid(images))
        return self.patch_embed(images, ids_keep, prefix=self.cls_token, pos_embed=positions)

    def patch_grid(self, images: Tensor) -> PatchGrid:
        return PatchGrid.of(type(self).__name__, images, self.config.patch_size)

    def positions(self, table: Tensor, grid: PatchGrid) -> Tensor:
        """The model's position embedding ``[1, 1 + L, D]`` for a grid, which is the table itself for the config's."""
        sides = self.config.sides
        if len(sides) == 2 and grid.grid[0] > 1:
            raise ValueError(f"{type(self).__name__}: images have {grid.grid[0]} frames, and this is a model of images")
        return pos_embed_for(table, sides, grid.grid[-len(sides) :])

    def encode(self, x: Tensor, keys: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Tokens ``[N, T, D]`` through blocks and norm.

        Args:
            keys: ``[N, T]`` bool, False where they are padding.
            keep: ``[N, depth, 2]`` factors of what each block adds in its two halves, None for 1.
        """
        for i, block in enumerate(self.blocks):
            x = of_some(block, x, None, keys, **({} if keep is None else {"keep": keep[:, i]}))
        return self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """Features of whole images for downstream use, nothing masked: ``[N, 1 + L, D]``, class token first."""
        return self.encode(self.embed(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Any]] | list[Any]:
        """Feature maps of several depths, nothing masked, for segmentation and detection; gradients pass.

        Args:
            images: as of the class, of any size that the patch divides.
            indices: blocks behind which maps are taken: all for None, the last n for an int, chosen ones for a list,
                where -1 is the last one.
            return_prefix_tokens: pairs of a map and the class token ``[N, 1, D]`` in the place of the maps.
            norm: the encoder's final norm is applied to each of them too.
            stop_early: blocks behind the last wanted one do not run; the tokens are then those behind it, normed.
            output_fmt: ``"NLC"`` leaves the patch tokens ``[N, L, D]`` in a row.
            intermediates_only: the maps alone are returned, and blocks behind the last wanted one do not run.

        Returns:
            Tokens ``[N, 1 + L, D]`` as of :meth:`forward_features`, and the maps ``[N, D, H', W']`` or
            ``[N, D, T', H', W']``, a value for each patch, in the order of the blocks.

        Raises:
            ValueError: there is no such block or format.

        Source: arguments and results are those of timm's ``VisionTransformer.forward_intermediates``.
        """
        wanted = self._wanted(indices)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"{type(self).__name__}: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        grid = self.patch_grid(images).grid[-len(self.config.sides) :]
        x, taken = self.embed(images), []
        for number, block in enumerate(self.blocks):
            if (intermediates_only or stop_early) and len(taken) == len(wanted):
                break
            x = block(x)  # [N, 1 + L, D]
            if number in wanted:
                taken.append(self.norm(x) if norm else x)
        maps = [tokens[:, 1:] for tokens in taken]
        if output_fmt == "NCHW":
            maps = [torch.unflatten(x.transpose(1, 2), 2, grid).contiguous() for x in maps]
        if return_prefix_tokens:
            maps = [(own, tokens[:, :1]) for own, tokens in zip(maps, taken, strict=True)]
        return maps if intermediates_only else (self.norm(x), maps)

    def _wanted(self, indices: int | list[int] | tuple[int, ...] | None) -> set[int]:
        """Numbers of blocks."""
        depth = len(self.blocks)
        if indices is None:
            return {*range(depth)}
        if is_whole(indices, 1, depth):
            return {*range(depth - indices, depth)}
        if not are_all(indices, is_whole, -depth, depth - 1) or not indices:
            raise ValueError(
                f"{type(self).__name__}: indices must be None, a whole number of 1 to {depth}, or a list of whole "
                f"numbers of {-depth} to {depth - 1}, got {repr(indices)[:60]}"
            )
        return {i % depth for i in indices}

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)

    def description(self) -> dict[str, Any]:
        """What ``config.json`` says of the model."""
        return asdict(self.config)


def initialize(*modules: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, ones and zeros for norms."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


def fill_positions(table: nn.Parameter, config: MAEConfig) -> None:
    """Sines and cosines, and zeros for the class token."""
    table.data[0, 0] = 0
    table.data[0, 1:] = sincos_pos_embed(table.shape[2], config.sides)
