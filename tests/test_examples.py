"""The examples run as their readers run them, and train.

An example takes ``--steps`` and ends with a line such as ``loss: 1.121 before, 0.524 after``, of the same masks of the
same pictures, with targets normalised per patch: predicting no more than the mean of each patch then scores 1.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_loss_falls(example, tmp_path):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # TRITON_INTERPRET as a reader has it: conftest sets it for the kernels' own tests.
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, str(example), "--steps", "50"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    found = re.search(r"loss.*?: (\d+\.\d+) before, (\d+\.\d+) after", last)
    assert found, last
    before, after = map(float, found.groups())
    assert after < 0.85 * min(before, 1)


def test_there_are_examples():
    assert EXAMPLES
