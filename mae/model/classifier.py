"""The encoder with a linear classifier behind it, as it is fine-tuned and probed."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from mae.model.sizes import MAEConfig
from mae.model.vit import VisionTransformer, initialize

Pool = Literal["mean", "token"]


@dataclass(frozen=True)
class HeadConfig:
    """What a classifier tells apart, and what of the encoder it looks at."""

    classes: tuple[str, ...]  # names, in the order of the logits
    pool: Pool = "mean"  # of the patch tokens, or the class token
    # Published for fine-tuning with the mean: a norm of its own behind the mean, in place of the encoder's before it.
    fc_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes or not all(isinstance(name, str) for name in self.classes):
            raise ValueError("HeadConfig: classes must be names, at least one")
        if len({*self.classes}) < len(self.classes):
            raise ValueError("HeadConfig: classes must have different names")
        if self.pool not in ("mean", "token"):
            raise ValueError(f"HeadConfig: pool must be 'mean' or 'token', got {self.pool!r}")
        if not isinstance(self.fc_norm, bool) or (self.fc_norm and self.pool != "mean"):
            raise ValueError("HeadConfig: fc_norm is a norm of the mean, True or False, and True only with pool 'mean'")


class Classifier(VisionTransformer):
    """Logits of images: :class:`VisionTransformer`, its tokens pooled to one, and a linear layer.

    State-dict keys are those of the published fine-tuning code and of timm: ``head``, and ``fc_norm`` in the place of
    ``norm`` where the head has one: :meth:`forward_features` then gives tokens without a norm. Position embeddings are
    trained, as published.

    Args:
        head: classes and pooling.
        drop_path: share of samples for which the last block is passed over in training, half by half; of the blocks
            before it less, in equal steps from 0. Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    head_config: HeadConfig
    drop_path: float
    fc_norm: nn.Module
    head: Any  # a linear layer, before which a probe puts a normalisation

    def __init__(
        self,
        config: MAEConfig,
        head: HeadConfig,
        residual_dtype: torch.dtype | None = None,
        *,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(config, residual_dtype)
        if not 0 <= drop_path < 1:
            raise ValueError(f"Classifier: drop_path must be from 0 to below 1, got {drop_path}")
        self.head_config, self.drop_path = head, drop_path
        if head.fc_norm:
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(config.embed_dim, eps=1e-6)
        else:
            self.fc_norm = nn.Identity()
        self.pos_embed.requires_grad_(True)
        self.head = nn.Linear(config.embed_dim, len(head.classes))
        self._initialize_head()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._initialize_head()

    def _initialize_head(self) -> None:
        initialize(self.fc_norm)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def load_encoder(self, encoder: VisionTransformer) -> "Classifier":
        """Take the weights of an encoder; the head stays as it is, and so does a norm that the encoder has not."""
        own = self.state_dict()
        state = {name: x for name, x in encoder.state_dict().items() if name in own and not name.startswith("head.")}
        self.load_state_dict(own | state)
        return self

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits ``[N, classes]``.

        Args:
            images: as of :class:`VisionTransformer`.
            keep: ``[N, depth, 2]``, as :meth:`draw_keep` makes it; None for no drop path.
        """
        return self.head(self.pooled(self.encode(self.embed(images), keep=keep)))

    def features(self, images: Tensor) -> Tensor:
        """What the head sees: ``[N, D]``."""
        return self.pooled(self.forward_features(images))

    def pooled(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, 1 + L, D]`` as one: ``[N, D]``."""
        return self.fc_norm(pool_tokens(tokens, self.head_config.pool))

    def draw_keep(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Factors ``[N, depth, 2]`` of each sample's two halves of each block: 0, or 1 over the share that is kept."""
        device = self.pos_embed.device if generator is None else generator.device
        kept = 1 - torch.linspace(0, self.drop_path, len(self.blocks), device=device)[:, None]
        return (torch.rand(batch_size, len(self.blocks), 2, device=device, generator=generator) < kept) / kept

    def description(self) -> dict[str, Any]:
        return super().description() | {"head": asdict(self.head_config)}


def pool_tokens(tokens: Tensor, pool: Pool) -> Tensor:
    """The class token, or the mean of the patch tokens: ``[N, 1 + L, D] -> [N, D]``."""
    return tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
