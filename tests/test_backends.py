# SPDX-License-Identifier: MIT
"""Who computes: "auto" takes the best that can run, an explicit backend is used or says why it cannot."""

import pytest
import torch

from flashvid_vllm import ops


def test_choose_backend() -> None:
    cpu = torch.device("cpu")
    assert ops.choose_backend("torch", cpu) == "torch"
    assert ops.choose_backend("auto", cpu) == ("torch" if ops.missing_for("native", cpu) else "native")
    assert ops.choose_backend("auto", torch.device("meta")) == "torch"
    for name in ("nonsense", ""):
        with pytest.raises(ValueError, match=f"no backend '{name}'; available: torch"):
            ops.choose_backend(name, cpu)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton' cannot run: (it needs a tensor on a CUDA|triton is not installed)"):
        ops.choose_backend("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="'native' cannot run: "):
        ops.choose_backend("native", torch.device("meta"))
