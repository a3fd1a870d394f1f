# SPDX-License-Identifier: MIT
"""What only a GPU can show: the compiled kernels' results, no host synchronisation, CUDA-graph capture, memory.

A compiled kernel divides, fuses and sums in other ways than the reference. Where it chooses another token, that one
must be as good within 1e-5 (tests/support/exactness.py), and the test records it as a near tie: `make gpu` lists them.
The CUDA part of the extension is in test_gpu_forest.py, a served video in tests/models/test_gpu_served.py, and
compute-sanitizer is a part of `make gpu` (benchmarks/gpu/sanitizer.py).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress, ops
from flashvid_vllm.core.compress import segments_of
from flashvid_vllm.ops import reference
from tests.core.test_compress import assert_sound
from tests.ops.test_golden import config_of
from tests.ops.test_reference import half_mask
from tests.support.cases import DTYPES, GOLDEN, assert_close, golden, video
from tests.support.exactness import assert_clustered, assert_explained, assert_linked, assert_selected

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

GIB = 2**30
LONG = (1024, 729, 3584)  # a video whose inner products do not fit the workspace at once
# served sizes, one frame, and sizes beside powers of 2
VIDEOS = [(1, 1, 40), (5, 65, 130), (9, 196, 1152), (16, 360, 3584)]
Record = Callable[[str, object], None]


def on_gpu(features: Tensor, attention: Tensor, **settings: Any) -> CompressedVideo:
    return compress(features.cuda(), attention.cuda(), FlashVidConfig(backend="triton", **settings))


def on_cpu(video: CompressedVideo) -> CompressedVideo:
    return CompressedVideo(*(getattr(video, name).cpu() for name in ("tokens", "source_index", "size", "assignment")))


def by_triton(op: Callable[..., Any], *given: Any) -> Any:
    """What an op's Triton kernels compute of tensors of the host, on the host."""
    found = op(*(x.cuda() if isinstance(x, Tensor) else x for x in given), backend="triton")
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()


def near_ties(features: Tensor, attention: Tensor, config: FlashVidConfig) -> list[str]:
    """The choosing ops that choose otherwise on the GPU, on the reference's inputs; AssertionError if not as well."""
    t, n, _ = features.shape
    found = []
    cpu = FlashVidConfig(**config.to_dict() | {"backend": "torch"})
    frames = torch.stack([frame.float().mean(0) for frame in features])
    segment_id = segments_of(frames, cpu)
    got = by_triton(ops.segment_frames, frames, config.segment_threshold, config.min_segments)
    if not torch.equal(got, segment_id):
        found.append(f"segments {got.tolist()}, not {segment_id.tolist()}")
    k = max(1, n // 8)
    weight = attention.float()
    if config.selection == "attention_diversity_event":
        weight = weight * ops.event_relevance(features, segment_id, backend="torch")
    selected = ops.select_tokens(features, weight, k, backend="torch")
    got = by_triton(ops.select_tokens, features, weight, k)
    assert_selected(features, weight, got, selected)
    found += [f"selection in frame {i}" for i in (got != selected).any(1).nonzero().flatten().tolist()]
    candidate = torch.ones(t, n, dtype=torch.bool).scatter_(1, selected, False)
    links = (features, candidate, segment_id, config.merge_threshold, config.matching)
    expected = ops.match_tokens(*links, backend="torch")
    matched = by_triton(ops.match_tokens, *links)
    assert_linked(features, config.merge_threshold, matched, expected)
    found += [f"the link of token {at}" for at in (matched[1] != expected[1]).nonzero().tolist()]
    root = ops.tree_roots(expected[1], backend="torch")
    index, mean, _ = ops.pool_trees(features, root, candidate, backend="torch")
    for i in (index // n).unique().tolist():
        trees = mean[index // n == i]
        sizes = max(1, len(trees) // 5), min(7, len(trees))
        clusters = ops.cluster_tokens(trees, *sizes, backend="torch")
        own = by_triton(ops.cluster_tokens, trees, *sizes)
        assert_clustered(trees, sizes[1], own, clusters)
        found += [] if all(map(torch.equal, own, clusters)) else [f"clusters of frame {i}"]
    explained = ops.explain_tokens(features, max(1, t * n // 8), 0.7, backend="torch")
    own = by_triton(ops.explain_tokens, features, max(1, t * n // 8), 0.7)
    assert_explained(features, max(1, t * n // 8), 0.7, own, explained)
    found += [f"what stands for token {at}" for at in (own != explained).nonzero().tolist()]
    return found


def check(features: Tensor, attention: Tensor, record: Record, **settings: Any) -> None:
    """The whole compression against the reference: the same tokens, or near ties that are named."""
    config = FlashVidConfig(backend="torch", **settings)
    got, expected = on_cpu(on_gpu(features, attention, **settings)), compress(features, attention, config)
    assert_sound(got, features, config)
    ties = near_ties(features, attention, config)
    for tie in ties:
        record("near tie", tie)
    places = [torch.where(x.assignment >= 0, x.source_index[x.assignment], -1) for x in (got, expected)]
    differing = (places[0] != places[1]).sum()
    if differing:
        record("near tie", f"{differing} of {places[0].numel()} tokens go elsewhere than the reference's")
        assert ties, "other tokens are kept or merged, and no op on its own has a near tie"
    else:
        tolerance = {torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-7}[features.dtype]
        torch.testing.assert_close(got.tokens, expected.tokens, rtol=tolerance, atol=max(1e-4, tolerance))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_inputs_choose_the_same_tokens(name: str, record_property: Record) -> None:
    vector = golden(name)
    settings = {key: value for key, value in config_of(vector).to_dict().items() if key != "backend"}
    check(vector["features"], vector["attention"], record_property, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", VIDEOS, ids=str)
@pytest.mark.parametrize("kind", ["scene", "noise"])
def test_videos_choose_the_same_tokens(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, record_property: Record
) -> None:
    check(*video(kind, *shape, dtype), record_property, retention_ratio=0.3, min_segments=3)


@pytest.mark.parametrize("kind", ["static", "letterbox", "zeros", "nan", "infinite"])
def test_ties_and_bad_values_are_sound(kind: str) -> None:
    """Equal rows have equal products in one kernel, but which rounding they have is the kernel's own."""
    features, attention = video(kind, 6, 65, 130, torch.bfloat16)
    config = FlashVidConfig(retention_ratio=0.3)
    assert_sound(on_cpu(on_gpu(features, attention, retention_ratio=0.3)), features, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_means(dtype: torch.dtype) -> None:
    """Of the ops that choose nothing."""
    features = video("scene", 5, 65, 130, dtype)[0]
    segment_id = torch.tensor([0, 0, 1, 1, 1])
    expected = ops.event_relevance(features, segment_id, backend="torch")
    torch.testing.assert_close(by_triton(ops.event_relevance, features, segment_id), expected, rtol=1e-4, atol=1e-5)
    parent = torch.randint(-1, 65, (5, 65), generator=torch.Generator().manual_seed(1))
    parent[0] = -1
    root = reference.tree_roots(parent)
    assert torch.equal(by_triton(ops.tree_roots, parent), root)
    member = half_mask(5, 65)
    got, means = by_triton(ops.pool_trees, features, root, member), ops.pool_trees(features, root, member, "torch")
    assert torch.equal(got[0], means[0])
    assert_close(got[1], means[1])
    assert torch.equal(got[2], means[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 40), (5, 65, 130), (32, 196, 3584), (8, 360, 3584)], ids=str)
def test_the_same_bits_again(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    features, attention = video("scene", *shape, dtype)
    first, second = (on_gpu(features, attention, retention_ratio=0.3) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.assignment, second.assignment)
    assert len(first.source_index.unique()) == len(first.tokens)


def as_served() -> tuple[Callable[[], CompressedVideo], Tensor]:
    """Received attention and compression of a video on the GPU, as a model calls them; and the features."""
    features, _ = (x.cuda() for x in video("scene", 8, 65, 130, torch.bfloat16))
    query, key = torch.randn(2, 8, 4, 65, 80, device="cuda").bfloat16()
    config = FlashVidConfig(retention_ratio=0.2, backend="triton")
    run = lambda: compress(features, ops.received_attention(query, key, backend="triton"), config)  # noqa: E731
    run()  # compiles
    return run, features


def test_never_waits_for_the_device() -> None:
    run, _ = as_served()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph() -> None:
    run, features = as_served()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        torch.manual_seed(seed)
        features.copy_(torch.randn_like(features))
        graph.replay()
        expected = run()
        assert torch.equal(captured.source_index, expected.source_index)
        assert torch.equal(captured.tokens, expected.tokens)


def test_on_another_stream() -> None:
    """What a kernel on the default stream would read is not yet there."""
    run, features = as_served()
    later = torch.randn_like(features)
    expected_of = lambda given: (features.copy_(given), run())[1]  # noqa: E731
    before, expected = features.clone(), expected_of(later)
    features.copy_(before)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        features.copy_(later)
        got = run()
    stream.synchronize()
    assert torch.equal(got.source_index, expected.source_index)
    assert torch.equal(got.tokens, expected.tokens)


def test_a_long_video_stays_within_its_workspace(record_property: Record) -> None:
    t, n, d = LONG
    if torch.cuda.mem_get_info()[0] < 2 * t * n * d * 2:
        pytest.skip(f"needs {2 * t * n * d * 2 / GIB:.0f} GiB of free memory")
    features = torch.randn(t, n, d, device="cuda", dtype=torch.bfloat16)
    attention = torch.rand(t, n, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compress(features, attention, FlashVidConfig(retention_ratio=0.1, backend="triton"))
    peak = torch.cuda.max_memory_allocated() - before
    record_property("figure", f"{peak / 2**20:.0f} MiB beside {features.nbytes / 2**20:.0f} MiB of features")
    assert peak <= GIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.explain_tokens(features, t * n // 10, 0.7, backend="triton")
    assert torch.cuda.max_memory_allocated() - before <= GIB // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_received_attention(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 2, 3, 196, 72, dtype=torch.float32).to(dtype)
    got = ops.received_attention(query.cuda(), key.cuda(), backend="triton")
    torch.testing.assert_close(got.cpu(), ops.received_attention(query, key, backend="torch"), rtol=1e-4, atol=1e-6)
