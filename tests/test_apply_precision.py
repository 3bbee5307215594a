"""apply tries methods in full float32, whatever precision the user has chosen, and leaves that choice as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import BiasedVariance, MaskedAutoencoderViT, published

from mae_kernels import apply

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = torch.backends
# PyTorch has two sets of names for the same choice, and refuses to read the older ones where both disagree.
OLDER = [
    torch.get_float32_matmul_precision,
    lambda: BACKENDS.cuda.matmul.allow_tf32,
    lambda: BACKENDS.cudnn.allow_tf32,
]
NEWER = [BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn]
NEWER += [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn]


def older() -> list:
    values = []
    for read in OLDER:
        try:
            values.append(read())
        except RuntimeError:
            values.append("refused")
    return values


def readings() -> list:
    """Every value, also as it will be once the user sets the precision of everything: which values are defaults."""
    everywhere = BACKENDS.fp32_precision
    values = [BACKENDS.cudnn.enabled, everywhere, *older()]
    for precision in ("none", "ieee", "tf32", "bf16", everywhere):
        BACKENDS.fp32_precision = precision
        values += [part.fp32_precision for part in NEWER]
    return values


def older_way(**values):
    for name, value in values.items():
        {"matmul": BACKENDS.cuda.matmul, "cudnn": BACKENDS.cudnn}[name].allow_tf32 = value


def newer_way(part, precision):
    part.fp32_precision = precision


WAYS = {
    "nothing": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul.allow_tf32": lambda: older_way(matmul=True),
    "cudnn.allow_tf32": lambda: older_way(cudnn=True),
    "both allow_tf32": lambda: older_way(matmul=True, cudnn=True),
    "everywhere tf32": lambda: newer_way(BACKENDS, "tf32"),
    "everywhere bf16": lambda: newer_way(BACKENDS, "bf16"),
    "everywhere ieee": lambda: newer_way(BACKENDS, "ieee"),
    "cudnn tf32": lambda: newer_way(BACKENDS.cudnn, "tf32"),
    "matmul tf32": lambda: newer_way(BACKENDS.cuda.matmul, "tf32"),
    "convolutions tf32": lambda: newer_way(BACKENDS.cudnn.conv, "tf32"),
    "oneDNN bf16": lambda: (newer_way(BACKENDS.mkldnn.matmul, "bf16"), newer_way(BACKENDS.mkldnn.conv, "bf16")),
    "high, then everywhere ieee": lambda: (WAYS["high"](), newer_way(BACKENDS, "ieee")),
    "without cuDNN": lambda: setattr(BACKENDS.cudnn, "enabled", False),
}


@pytest.fixture(params=WAYS)
def chosen(request):
    yield WAYS[request.param]()
    for part in (BACKENDS, BACKENDS.cudnn, BACKENDS.mkldnn.conv):
        part.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    older_way(cudnn=False)
    BACKENDS.cudnn.enabled = True


class Reads(MaskedAutoencoderViT):
    """As models do that switch cuDNN's benchmarks for a call."""

    def patchify(self, imgs):
        with BACKENDS.cudnn.flags(enabled=BACKENDS.cudnn.enabled, allow_tf32=BACKENDS.cudnn.allow_tf32):
            assert older() == ["highest", False, BACKENDS.cudnn.allow_tf32]
        return super().patchify(imgs)


class Stops(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        raise KeyboardInterrupt


@pytest.mark.usefixtures("chosen")
def test_the_choice_neither_changes_the_trial_nor_is_changed():
    before = readings()
    assert not apply(published().to(DEVICE)).left
    assert readings() == before
    # In TF32 or bfloat16 this difference would be smaller than that of the products.
    assert [change.method for change in apply(published(cls=BiasedVariance).to(DEVICE)).left] == ["forward_loss"]
    assert readings() == before
    with pytest.raises(KeyboardInterrupt):
        apply(published(cls=Stops).to(DEVICE))
    assert readings() == before


def test_a_model_may_read_the_choice():
    torch.set_float32_matmul_precision("high")
    try:
        assert not apply(published(cls=Reads).to(DEVICE)).left
    finally:
        torch.set_float32_matmul_precision("highest")


def test_in_a_process_that_has_chosen_nothing():
    """There convolutions are TF32 until the user sets the precision of everything, which must stay so."""
    code = (
        "from test_apply_precision import *; before = readings(); "
        "apply(published().to(DEVICE)); assert readings() == before"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    )
