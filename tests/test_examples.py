"""The examples run as their readers run them and train; the fused ops change no loss of Hugging Face's Trainer."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# One process for all: to import PyTorch and transformers takes longer than to train.
RUN = """
import runpy, sys
scripts, sys.argv[1:] = sys.argv[1:], ["--steps", "50"]
for script in scripts:
    print(f"script {script}")
    runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_the_loss_falls_and_is_that_of_the_model_without_apply(tmp_path):
    examples = sorted((ROOT / "examples").glob("*.py"))
    names = ["custom_model", "hugging_face", "published_style", "segmentation", "token_selection"]
    assert [path.stem for path in examples] == names
    lines = examples[1].read_text(encoding="utf-8").splitlines(keepends=True)
    without = [line for line in lines if not re.match(r"\s*(import mae_kernels\b|print\(mae_kernels\.apply)", line)]
    assert len(lines) - len(without) == 2
    before = tmp_path / "before.py"
    before.write_text("".join(without), encoding="utf-8")

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # TRITON_INTERPRET as a reader has it: conftest sets it for the kernels' own tests.
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", RUN, *examples, before],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    _, *told = re.split(r"^script .+\n", result.stdout, flags=re.MULTILINE)
    selected = told.pop(4)
    losses = [[float(loss) for loss in re.findall(r"^step +\d+  loss (\d+\.\d+)$", x, re.MULTILINE)] for x in told]
    assert all(found[-1] < 0.85 * found[0] for found in losses), losses
    assert losses[4] == pytest.approx(losses[1], abs=1e-3)
    before, after = map(float, re.search(r"mean IoU .+: (\S+) before, (\S+) after", told[3]).groups())
    assert before < 0.08 < 0.1 < after  # nothing but background is below 0.08
    assert re.findall(r"^(\w+): equal; .+ times as fast$", selected, re.MULTILINE) == ["apply_masks", "restore"]


def test_token_selection_tells_a_difference():
    """In a result, and in a gradient alone."""
    script = runpy.run_path(str(ROOT / "examples" / "token_selection.py"))
    x = [torch.randn(2, 3)]
    script["compare"]("same", lambda x: 2 * x, lambda x: x + x, x, 1)
    for other in (lambda x: 2 * x + 1, lambda x: x + x.detach()):
        with pytest.raises(AssertionError, match=r"^another: the results or the gradients differ"):
            script["compare"]("another", lambda x: 2 * x, other, x, 1)
