"""``python -m mae profile``."""

from dataclasses import astuple, dataclass, field
from typing import Annotated, Literal

import torch
import tyro

from mae.commands.options import ModelName, SizeOptions
from mae.fields import COUNT, check
from mae.model import MaskedAutoencoder
from mae.training.loop import choose_device, uses_bfloat16
from mae.training.optimizers import adamw
from mae.training.profile import Phase, profile_step, training_flops


@dataclass(frozen=True)
class ProfileConfig:
    """Show where a training step's time, memory and launches go, on random images."""

    model: ModelName = "mae_vit_base_patch16"
    """Architecture."""
    batch_size: int = 16
    """Images of a step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs of compute capability 8.0 or more, float32 elsewhere."""
    rounds: int = 5
    """Timed steps, of which the medians are shown."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    sizes: Annotated[SizeOptions, tyro.conf.arg(name="")] = field(default_factory=SizeOptions)


def profile(config: ProfileConfig) -> None:
    check(vars(config), {"batch_size": COUNT, "rounds": COUNT})
    device = choose_device(config.device)
    bfloat16 = uses_bfloat16(config.precision, device)
    model = MaskedAutoencoder(config.sizes.config(config.model)).to(device)
    size = (config.batch_size, model.config.in_chans, *model.config.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    phases = profile_step(model, images, adamw(model, lr=1e-4), bfloat16=bfloat16, rounds=config.rounds)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
    print(
        f"{config.model}, {config.batch_size} images, {'bfloat16 autocast' if bfloat16 else 'float32'}, {name}, "
        f"torch {torch.__version__}\nEager steps, cut at the borders of their phases; medians of {config.rounds}\n"
    )
    total = Phase(*(sum(column) for column in zip(*map(astuple, phases.values()), strict=True)))
    milliseconds = total.forward_ms + total.backward_ms
    print(f"{'phase':<10}{'forward ms':>12}{'backward ms':>13}{'share':>8}{'launches':>10}{'saved MB/image':>16}")
    for phase, cost in {**phases, "all": total}.items():
        share = (cost.forward_ms + cost.backward_ms) / milliseconds
        saved = cost.saved_bytes / config.batch_size / 1e6
        print(
            f"{phase:<10}{cost.forward_ms:>12.2f}{cost.backward_ms:>13.2f}{share:>8.1%}{cost.launches:>10}{saved:>16.2f}"
        )
    flops = training_flops(model.config) * config.batch_size
    print(
        f"\n{config.batch_size / milliseconds * 1e3:.1f} images/s, {flops / milliseconds / 1e9:.2f} TFLOP/s "
        f"at {flops / config.batch_size / 1e9:.1f} GFLOP an image; "
        f"{images.nbytes / config.batch_size / 1e3:.0f} kB an image from host to device"
    )
