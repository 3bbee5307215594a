"""``python -m mae attention``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from mae.commands.options import LoadOptions, ReadingOptions
from mae.commands.pictures import refuse_replacing, some_pictures
from mae.data import counted, printable
from mae.evaluation.attention import attention_maps
from mae.fields import COUNT, are_all, check, is_whole
from mae.model import Classifier
from mae.report.figures import picture_file
from mae.report.heat_maps import save_heat_maps
from mae.training.loop import choose_device


@dataclass(frozen=True)
class AttentionConfig:
    """Show where the class token looks: each head's attention as heat over the picture."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads; the encoder alone is enough."""
    images: tuple[str, ...]
    """Image files, folders of them, or hf: and a dataset, as in pretrain. Of clips the middle frame is drawn."""
    out: Path = Path("attention.png")
    """Picture to write, a .png unless its name ends otherwise."""
    block: int = -1
    """Which block: 0 is the first, -1 the last."""
    heads: tuple[int, ...] | None = None
    """Numbers of the heads to draw, from 0 on; by default all. Behind them stands the mean of all heads."""
    most: int = 6
    """Take at most this many images, spread over all files."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def attention(config: AttentionConfig) -> None:
    check(vars(config), {"most": COUNT})
    config.reading.reading()
    out = picture_file(config.out)
    refuse_replacing(out, config.images)
    model = config.loading.load(config.checkpoint).to(choose_device(config.device))
    depth, count = model.config.depth, model.config.num_heads
    heads = [*range(count)] if config.heads is None else [*config.heads]
    expected = f"whole numbers of 0 to {count - 1}, at least one"
    check({"heads": heads}, {"heads": (lambda x: x and are_all(x, is_whole, 0, count - 1), expected)})
    _, pictures, _ = some_pictures(config.images, config.reading.reading(model.config), config.most)
    maps = attention_maps(model, pictures.to(model.cls_token.device), config.block)  # [N, heads, (T',) H', W']
    drawn = torch.cat([maps[:, heads], maps.mean(1, keepdim=True)], dim=1)
    titles = [*(f"head {i}" for i in heads), f"mean of {counted(count, 'head')}"]
    place = f"block {config.block % depth} (of 0 to {depth - 1})"
    words = f"attention of the class token in {place}; each map is scaled to its own maximum"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_heat_maps(pictures, drawn, titles, out, words)
    if isinstance(model, Classifier) and model.head_config.pool == "mean":
        print("This classifier looks at the mean of the patches, not at the class token whose attention is drawn")
    print(f"Wrote attention to {counted(len(pictures), 'picture')} to {printable(out)}")
