"""Hugging Face's ViTMAE is trained by its own Trainer, on the ops of mae_kernels.

Two lines of it are new, an import and ``mae_kernels.apply``, which prints what it has replaced in the model; a model
that follows the published code takes the same two. The Trainer prints the losses: they fall, and without the two lines
they are the same. It needs ``pip install transformers accelerate``, and takes a quarter of a minute on a CPU.
"""

import argparse
import tempfile

from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining, set_seed

import mae_kernels
from mae.commands.demo import fashion_mnist


def main(steps: int) -> None:
    set_seed(0)
    config = ViTMAEConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=256, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    model.decoder.initialize_weights(num_patches=16)  # from a config alone its position embeddings would be zero
    print(mae_kernels.apply(model))
    pictures = fashion_mnist("train_5000")[0] / 255
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=5e-4, warmup_steps=20,
            weight_decay=0.05, logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        data = [{"pixel_values": picture} for picture in pictures]
        Trainer(model, arguments, train_dataset=data).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
