"""The planted faults: each fits the code as it is."""

import shlex
from pathlib import Path

import pytest
from faults import FAULTS, planted


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_planted_faults_still_fit_the_code(fault):
    compile(planted(fault), fault.file, "exec")
    files = [word for word in shlex.split(fault.tests) if word.endswith(".py")]
    assert files
    assert all(Path(__file__).with_name(file).is_file() for file in files)


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
