# SPDX-License-Identifier: MIT
"""The whole pipeline: equal to compress on the torch backend, its launches counted, its memory bounded."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress, ops
from flashvid_vllm.core.budget import plan
from flashvid_vllm.ops import pipeline, triton_backend
from flashvid_vllm.ops.launch import record
from tests.core.test_compress import assert_sound
from tests.ops import test_gpu
from tests.ops.interpreted.conftest import FULL, sampled
from tests.ops.test_golden import config_of
from tests.support.cases import DTYPES, golden, video

SELECTIONS = ["attention_diversity", "attention", "diversity"]
# A mean is summed in another order than the reference's: a few ulp of fp32, then at most one of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_same(got: CompressedVideo, expected: CompressedVideo) -> None:
    assert torch.equal(got.source_index, expected.source_index)
    assert torch.equal(got.size, expected.size)
    assert torch.equal(got.assignment, expected.assignment)
    tolerance = TOLERANCE[expected.tokens.dtype]
    torch.testing.assert_close(got.tokens, expected.tokens, rtol=tolerance, atol=1e-5, equal_nan=True)
    alone = expected.size == 1
    assert torch.equal(got.tokens[alone].nan_to_num(), expected.tokens[alone].nan_to_num())


def check(features: Tensor, attention: Tensor, config: FlashVidConfig) -> int:
    """Compare the backends; return the number of launches."""
    expected = compress(features, attention, replace(config, backend="torch"))
    with record() as launches:
        got = compress(features, attention, replace(config, backend="triton"))
    assert_sound(got, features, config)
    assert_same(got, expected)
    return len(launches)


@pytest.mark.skipif(not FULL, reason="make test-full")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["many_cuts", "noisy", "odd_grid"])
def test_golden_inputs(name: str) -> None:
    vector = golden(name)
    assert check(vector["features"], vector["attention"], config_of(vector)) <= 16


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kind", "dtype"), sampled(["letterbox", "nan"], DTYPES))
def test_kinds_and_dtypes(kind: str, dtype: torch.dtype) -> None:
    every = ({"retention_ratio": 0.2}, {"token_budget": 3}, {"retention_ratio": 0.5, "alpha": 1})
    for settings in every if FULL else every[:1]:
        check(*video(kind, 5, 20, 40, dtype), FlashVidConfig(**settings))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("selection", "matching"), sampled(SELECTIONS, ["tree", "position"]))
def test_settings(selection: Any, matching: Any) -> None:
    # Every link is made, so the root guarantee has links to drop.
    some = ((0.6, 0.1, 1), (0.8, 0.0, 2), (0.3, 0.9, 9))
    for ratio, alpha, segments in some if FULL else [some[SELECTIONS.index(selection)]]:
        config = FlashVidConfig(
            retention_ratio=ratio,
            alpha=alpha,
            selection=selection,
            matching=matching,
            min_segments=segments,
            merge_threshold=-1,
        )
        check(*video("scene", 5, 17, 40), config)


def test_equal_links_are_dropped_from_the_last() -> None:
    axes = torch.eye(8).repeat(3, 1, 1)
    config = FlashVidConfig(token_budget=14, alpha=0, min_segments=1, segment_threshold=-1)
    check(axes, torch.ones(3, 8), config)


@pytest.mark.parametrize("shape", [(1, 7, 72), (2, 1, 40), (2, 63, 130)], ids=str)
def test_awkward_shapes(shape: tuple[int, int, int]) -> None:
    check(*video("scene", *shape), FlashVidConfig(retention_ratio=0.5))


def test_any_layout_gives_the_same_bits() -> None:
    features, attention = video("scene", 3, 12, 72, torch.bfloat16)
    config = FlashVidConfig(retention_ratio=0.3, backend="triton")
    one = compress(features, attention, config)
    strided = torch.stack([features, features], dim=-1)[..., 1]
    other = compress(strided, attention.T.contiguous().T, config)
    for name in ("tokens", "source_index", "size", "assignment"):
        assert torch.equal(getattr(one, name), getattr(other, name))


# Launches, synchronisation, memory


class _DeviceOps(TorchDispatchMode):
    """Collect the torch ops that are not allocations or views: each would launch a kernel, or wait."""

    FREE = ("empty", "slice", "select", "view", "alias", "detach", "unsqueeze", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in self.FREE:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("selection", ["attention_diversity_event", "attention", "diversity"])
@pytest.mark.parametrize("min_segments", [1, 8])
def test_a_video_takes_16_launches_and_no_synchronisation(selection: str, min_segments: int) -> None:
    features, attention = video("noise", 8, 16, 40)
    # A dry run: the interpreter itself calls torch ops. Nothing that depends on the data can happen then.
    features, attention = features.to("meta"), attention.to("meta")
    with _DeviceOps() as device_ops, record(run=False) as launches:
        pipeline.compress_video(features, attention, 2, 9, selection, "tree", 0.8, 0.9, min_segments)
    assert device_ops.seen == []
    assert len(launches) == {"attention_diversity_event": 16, "attention": 13, "diversity": 15}[selection]


@pytest.mark.parametrize(("selected", "merged"), [(3, 10), (0, 20)] if FULL else [(3, 10)])
def test_chunks_of_frames_change_no_bit(monkeypatch: pytest.MonkeyPatch, selected: int, merged: int) -> None:
    features, attention = video("scene", 7, 20, 40)
    settings = (selected, merged, "attention_diversity_event", "tree", 0.8, 0.9, 2)
    whole = pipeline.compress_video(features, attention, *settings)
    for room in (20_000, 1) if FULL else (20_000,):
        monkeypatch.setattr(pipeline, "WORKSPACE_BYTES", room)
        chunks = pipeline.Chunks.fit(7, 20, 40, selected, merged, 4)
        assert chunks.merge_frames < 7
        with record() as launches:
            parts = pipeline.compress_video(features, attention, *settings)
        assert len(launches) <= chunks.most_launches(7)
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_the_longest_video_fits_one_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, live, most = torch.empty, 0, 0

    def release(size: int) -> None:
        nonlocal live
        live -= size

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal live, most
        tensor = empty(*args, **kwargs)
        size = tensor.numel() * tensor.itemsize
        live, most = live + size, max(most, live + size)
        weakref.finalize(tensor, release, size)
        return tensor

    t, n, d = 1024, 729, 3584
    features = torch.empty((t, n, d), dtype=torch.bfloat16, device="meta")
    attention = torch.empty((t, n), device="meta")
    budget = plan(t, n, FlashVidConfig(retention_ratio=0.1))
    sizes = (budget.selected_per_frame, budget.merged)
    monkeypatch.setattr(torch, "empty", counted)
    with record(run=False) as launches:
        out = pipeline.compress_video(features, attention, *sizes, "attention_diversity_event", "tree", 0.8, 0.9, 8)
    assert len(out[0]) == budget.tokens
    assert most <= 2**30
    chunks = pipeline.Chunks.fit(t, n, d, *sizes, 2)
    assert len(launches) <= chunks.most_launches(t)


@pytest.mark.parametrize(("t", "n", "d"), [(32, 196, 3584), (160, 360, 3584), (64, 256, 4096)])
def test_usual_videos_fit_in_one_chunk(t: int, n: int, d: int) -> None:
    budget = plan(t, n, FlashVidConfig(retention_ratio=0.1))
    chunks = pipeline.Chunks.fit(t, n, d, budget.selected_per_frame, budget.merged, 2)
    assert chunks.most_launches(t) == 16


# torch.library


@pytest.mark.skipif(not FULL, reason="make test-full")
def test_ops_are_registered_soundly() -> None:
    features, attention = video("scene", 3, 9, 40)
    segment_id, mask = torch.tensor([0, 0, 1]), torch.arange(27).view(3, 9) % 2 == 0
    root = torch.arange(27).view(3, 9)
    query = torch.randn(2, 2, 9, 16)
    calls: dict[str, tuple[Any, ...]] = {
        "segment_frames": (features[:, 0], 0.8, 2),
        "event_relevance": (features, segment_id),
        "select_tokens": (features, attention, 3),
        "match_tokens": (features, mask, segment_id, 0.5, "tree"),
        "tree_roots": (torch.full((3, 9), -1),),
        "pool_trees": (features, root, mask),
        "cluster_tokens": (features[0], 3, 5),
        "explain_tokens": (features, 9, 0.7),
        "received_attention": (query, query),
        "compress": (features, attention, 2, 4, "attention_diversity_event", "tree", 0.8, 0.9, 2),
    }
    assert set(calls) == set(triton_backend.UNREGISTERED)
    for name, args in calls.items():
        op = getattr(torch.ops.flashvid, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_torch_compile_traces_through() -> None:
    features, attention = video("scene", 3, 9, 40)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor, w: Tensor) -> Tensor:
        return ops.select_tokens(x * 2, w, 3, backend="triton") + 1

    expected = ops.select_tokens(features * 2, attention, 3, backend="torch") + 1
    assert torch.equal(compiled(features, attention), expected)


# The GPU's own tests, with a host for a GPU


@pytest.mark.skipif(not FULL, reason="make test-full")
@pytest.mark.parametrize("fault", [None, "select_tokens", "match_tokens", "cluster_tokens", "compress"])
def test_what_a_gpu_is_held_against(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/ops/test_gpu.py passes what is right, and fails a choice that is not as good, in an op or in the whole."""
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    by_triton, on_gpu = test_gpu.by_triton, test_gpu.on_gpu

    def faulty(op: Any, *given: Any) -> Any:
        found = by_triton(op, *given)
        if op.__name__ != fault:
            return found
        if fault == "select_tokens":
            return torch.arange(found.shape[1]).expand_as(found)
        return (found[0], found[1].roll(1, -1)) if fault == "match_tokens" else (found[0], found[1].flip(0))

    monkeypatch.setattr(test_gpu, "by_triton", faulty)
    if fault == "compress":
        monkeypatch.setattr(test_gpu, "on_gpu", lambda x, y, **settings: on_gpu(x, y.flip(1), **settings))
    ties: list[Any] = []
    given = video("scene", 3, 30, 40)
    if fault is None:
        test_gpu.check(*given, lambda *tie: ties.append(tie), retention_ratio=0.3, min_segments=2)
        assert not ties
        return
    with pytest.raises(AssertionError):
        test_gpu.check(*given, lambda *tie: ties.append(tie), retention_ratio=0.3, min_segments=2)
