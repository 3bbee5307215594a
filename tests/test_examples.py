"""The examples run as their readers run them, and train; the fused ops change none of their losses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def losses(script: Path, folder: Path) -> list[float]:
    """Those of the lines ``step 20  loss 0.7421`` that the script prints."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # TRITON_INTERPRET as a reader has it: conftest sets it for the kernels' own tests.
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, str(script), "--steps", "50"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [float(loss) for loss in re.findall(r"^step +\d+  loss (\d+\.\d+)$", result.stdout, re.MULTILINE)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_loss_falls_and_is_that_of_the_model_without_apply(example, tmp_path):
    found = losses(example, tmp_path)
    assert found[-1] < 0.85 * found[0]
    lines = example.read_text(encoding="utf-8").splitlines(keepends=True)
    without = [line for line in lines if not re.match(r"\s*(import mae_kernels\b|print\(mae_kernels\.apply)", line)]
    if len(without) < len(lines):
        assert len(lines) - len(without) == 2
        before = tmp_path / "before.py"
        before.write_text("".join(without), encoding="utf-8")
        assert losses(before, tmp_path) == pytest.approx(found, abs=1e-3)


def test_the_examples():
    assert [path.stem for path in EXAMPLES] == ["custom_model", "hugging_face", "published_style"]
