"""A masked autoencoder in a training loop of Hugging Face's Accelerate, which sees to precision and processes.

The model is a plain module whose forward returns the loss, so nothing in the loop is particular to it. It prints the
losses, which fall on pictures that the model never saw too, and saves a checkpoint that every command of
``python -m mae`` reads. It needs ``pip install accelerate``, and takes a quarter of a minute on a CPU. Each of these
starts it:

    python examples/accelerate_loop.py --mixed-precision bf16
    accelerate launch --num_processes 2 --mixed_precision bf16 examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --cpu
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mae import adamw, mae_vit_demo_patch7, save_checkpoint
from mae.commands.demo import fashion_mnist


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor) -> float:
    noise = torch.rand(len(images), 16, generator=torch.Generator().manual_seed(0)).to(images.device)
    return model(images, noise=noise).loss.item()  # the same patches are hidden each time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], help="by default what launches it decides")
    parser.add_argument("--accumulate", type=int, default=2, help="batches for one update")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate, cpu=options.cpu
    )
    set_seed(0, device_specific=True)  # every process draws masks of its own

    model = mae_vit_demo_patch7()
    optimizer = adamw(model, lr=2e-3)
    images, test_images = fashion_mnist("train_5000")[0], fashion_mnist("test_2000")[0]  # uint8
    loader = DataLoader(images, batch_size=64, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, options.epochs * len(loader) // options.accumulate, cycle_momentum=False
    )
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    test_images = test_images.to(accelerator.device)

    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.mixed_precision} mixed precision")
    before = held_out_loss(model, test_images)
    for epoch in range(1, options.epochs + 1):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"epoch {epoch:2}  loss {mean:.3f}")
    after = held_out_loss(model, test_images)
    accelerator.print(f"loss on pictures not trained on: {before:.3f} before, {after:.3f} after")

    if accelerator.is_main_process:
        save_checkpoint(accelerator.unwrap_model(model), options.out)
        print(f"python -m mae features --checkpoint {options.out} --images FOLDER --out features.npy")


if __name__ == "__main__":
    main()
