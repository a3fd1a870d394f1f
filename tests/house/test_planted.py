# SPDX-License-Identifier: MIT
"""The planted faults (tests/planted.py) can still be planted: their texts and tests are where they say."""

import pytest

from tests.planted import FAULTS, ROOT, Fault, files_of


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.old.strip()[:30]}")
def test_a_fault_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert len(files_of(fault, ROOT)) == len(fault.tests.split())
