# SPDX-License-Identifier: MIT
"""Who computes: "auto" takes the best that can run, an explicit backend is used or says why it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashvid_vllm import FlashVidConfig, compress, ops
from flashvid_vllm.ops import native


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


FOREST: dict[str, Callable[[torch.Tensor], Any]] = {
    "tree_roots": lambda x: ops.tree_roots(x[..., 0].long(), backend="native"),
    "pool_trees": lambda x: ops.pool_trees(x, x[..., 0].long(), x[..., 0].bool(), backend="native"),
}
CPU_ALONE: dict[str, Callable[[torch.Tensor], Any]] = {
    "segment_frames": lambda x: ops.segment_frames(x[0], 0.9, 1, backend="native"),
    "event_relevance": lambda x: ops.event_relevance(x, x[:, 0, 0].long(), backend="native"),
    "select_tokens": lambda x: ops.select_tokens(x, None, 1, backend="native"),
    "match_tokens": lambda x: ops.match_tokens(x, x[..., 0].bool(), x[:, 0, 0].long(), 0.8, backend="native"),
    "cluster_tokens": lambda x: ops.cluster_tokens(x[0], 1, 1, backend="native"),
    "explain_tokens": lambda x: ops.explain_tokens(x, 1, 0.7, backend="native"),
    "received_attention": lambda x: ops.received_attention(x[None], x[None], backend="native"),
    "compress": lambda x: compress(x, x[..., 0], FlashVidConfig(backend="native")),
}


class OnCuda(torch.Tensor):
    """Says that it lies where it need not: to see who is asked to compute."""

    device = torch.device("cuda", 0)
    is_cuda = True


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """[2, 3, 4]; the native ops that it may reach give their names."""
    monkeypatch.setattr(native, "MISSING", "")
    monkeypatch.setattr(ops, "_used", [])
    for name in FOREST:
        monkeypatch.setattr(native, name, lambda *_arguments, name=name: f"native {name}")
    return torch.ones(2, 3, 4).as_subclass(OnCuda)


@pytest.mark.parametrize("op", FOREST)
def test_native_has_the_forest_on_cuda(op: str, on_cuda: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    assert FOREST[op](on_cuda) == f"native {op}"
    assert ops._used == ["native"]
    monkeypatch.setattr(native, "has_cuda", lambda: False)
    with pytest.raises(ValueError, match=r"needs a tensor on cpu, got one on cuda:0, where this build has none of its"):
        FOREST[op](on_cuda)
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="this build has none of its ops"):
        FOREST[op](on_cuda)


@pytest.mark.parametrize("op", CPU_ALONE)
def test_native_refuses_the_rest_on_cuda(op: str, on_cuda: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    message = (
        "backend 'native' cannot run: it needs a tensor on cpu, got one on cuda:0, where this build has tree_roots and "
        "pool_trees alone; torch and triton have every op there"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        CPU_ALONE[op](on_cuda)


def test_a_server_on_a_gpu_does_not_start_with_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", "")
    for there, message in ((True, "tree_roots and pool_trees alone"), (False, "none of its ops")):
        monkeypatch.setattr(native, "has_cuda", lambda there=there: there)
        with pytest.raises(ValueError, match=f"'native' cannot run: .*got one on cuda, where this build has {message}"):
            ops.choose_backend("native", torch.device("cuda"))
        assert ops.choose_backend("auto", torch.device("cuda")) != "native"
