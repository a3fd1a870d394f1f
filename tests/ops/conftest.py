# SPDX-License-Identifier: MIT
"""What tests of the native ops share: every instruction set of this machine."""

from collections.abc import Iterator

import pytest

from flashvid_vllm.ops import native

ISAS = native.isas() if not native.MISSING else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_isa(request.param)
    yield request.param
    native.use_isa("")
