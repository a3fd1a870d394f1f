# SPDX-License-Identifier: MIT
"""What only a GPU can show: the compiled kernels' results, no host synchronisation, CUDA-graph capture, memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress, ops
from flashvid_vllm.ops import native
from tests.ops.test_golden import config_of
from tests.support.cases import DTYPES, GOLDEN, SHAPES, golden, video

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

cuda_part = pytest.mark.skipif(not native.has_cuda(), reason=native.MISSING or "the extension has no CUDA part")
HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
SANITIZER = shutil.which("compute-sanitizer", path=f"{HOME}/bin" if HOME else None) or shutil.which("compute-sanitizer")


def on_gpu(features: torch.Tensor, attention: torch.Tensor, **settings: Any) -> CompressedVideo:
    return compress(features.cuda(), attention.cuda(), FlashVidConfig(backend="triton", **settings))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_inputs_choose_the_same_tokens(name: str) -> None:
    vector = golden(name)
    settings = {key: value for key, value in config_of(vector).to_dict().items() if key != "backend"}
    got = on_gpu(vector["features"], vector["attention"], **settings)
    expected = compress(vector["features"], vector["attention"], FlashVidConfig(backend="torch", **settings))
    assert torch.equal(got.source_index.cpu(), expected.source_index)
    assert torch.equal(got.assignment.cpu(), expected.assignment)
    torch.testing.assert_close(got.tokens.cpu(), expected.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 40), (5, 65, 130), (32, 196, 3584), (8, 360, 3584)], ids=str)
def test_the_same_bits_again(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    features, attention = video("scene", *shape, dtype)
    first, second = (on_gpu(features, attention, retention_ratio=0.3) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.assignment, second.assignment)
    assert len(first.source_index.unique()) == len(first.tokens)


def test_never_waits_for_the_device() -> None:
    features, attention = (x.cuda() for x in video("scene", 8, 65, 130, torch.bfloat16))
    config = FlashVidConfig(retention_ratio=0.2, backend="triton")
    compress(features, attention, config)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        compress(features, attention, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph() -> None:
    features, attention = (x.cuda() for x in video("scene", 8, 65, 130, torch.bfloat16))
    config = FlashVidConfig(retention_ratio=0.2, backend="triton")
    compress(features, attention, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compress(features, attention, config)
    for seed in (1, 2):
        torch.manual_seed(seed)
        features.copy_(torch.randn_like(features))
        graph.replay()
        expected = compress(features, attention, config)
        assert torch.equal(captured.source_index, expected.source_index)
        assert torch.equal(captured.tokens, expected.tokens)


def test_a_long_video_stays_within_its_workspace() -> None:
    features = torch.randn(1024, 729, 3584, device="cuda", dtype=torch.bfloat16)
    attention = torch.rand(1024, 729, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compress(features, attention, FlashVidConfig(retention_ratio=0.1, backend="triton"))
    assert torch.cuda.max_memory_allocated() - before <= 2**30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_received_attention(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 2, 3, 196, 72, dtype=torch.float32).to(dtype)
    got = ops.received_attention(query.cuda(), key.cuda(), backend="triton")
    torch.testing.assert_close(got.cpu(), ops.received_attention(query, key, backend="torch"), rtol=1e-4, atol=1e-6)


# The CUDA part of the native extension, by the public ops


def forest_on_gpu(features: torch.Tensor, parent: torch.Tensor, member: torch.Tensor) -> tuple[torch.Tensor, ...]:
    root = ops.tree_roots(parent, backend="native")
    found = (root, *ops.pool_trees(features, root, member, backend="native"))
    assert all(x.is_cuda for x in found)
    return tuple(x.cpu() for x in found)


def random_forest(num_frames: int, n: int, links: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents [T, N] of which a share of ``links`` is set, many of them the same, and members [T, N]."""
    generator = torch.Generator().manual_seed(0)
    parent = torch.randint(n, (num_frames, n), generator=generator).div_(2, rounding_mode="floor")
    parent[torch.rand(num_frames, n, generator=generator) >= links] = -1
    parent[0] = -1
    return parent, torch.rand(num_frames, n, generator=generator) < 0.7


@cuda_part
@pytest.mark.parametrize("links", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 197, 515)], ids=str)
def test_forest(shape: tuple[int, int, int], dtype: torch.dtype, links: float) -> None:
    features = video("scene", *shape, dtype)[0]
    parent, member = random_forest(*shape[:2], links)
    root = ops.tree_roots(parent, backend="torch")
    got = forest_on_gpu(features.cuda(), parent.cuda(), member.cuda())
    assert torch.equal(got[0], root)
    index, mean, size = ops.pool_trees(features, root, member, backend="torch")
    assert torch.equal(got[1], index)
    assert torch.equal(got[3], size)
    torch.testing.assert_close(got[2], mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], native.pool_trees(features, root, member)[1])  # the same lines, the same bits


@cuda_part
@pytest.mark.parametrize("n", [1, 3])
def test_forest_of_the_deepest_trees(n: int) -> None:
    """Chains through 4000 frames, shortened by all threads at once; n = 3: everyone's parent is the first."""
    parent = torch.zeros(4000, n, dtype=torch.int64).cuda()
    root = ops.tree_roots(parent, backend="native")
    assert root[1:].eq(0).all()  # parents of the first frame do not count
    assert root[0].tolist() == list(range(n))


@cuda_part
def test_forest_of_any_strides_and_stream() -> None:
    features = video("scene", 5, 65, 130, torch.bfloat16)[0].cuda()
    parent, member = (x.cuda() for x in random_forest(5, 65, 0.8))
    expected = forest_on_gpu(features, parent, member)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for layout in (
        lambda x: torch.stack([x, x], dim=-1)[..., 1],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # a kernel on another stream would read what is not yet there
            found = forest_on_gpu(*(layout(x) for x in (features, parent, member)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@cuda_part
def test_forest_without_members() -> None:
    features, root = torch.ones(2, 3, 4).cuda(), torch.zeros(2, 3, dtype=torch.int64).cuda()
    found = ops.pool_trees(features, root, torch.zeros(2, 3, dtype=torch.bool).cuda(), backend="native")
    assert [tuple(x.shape) for x in found] == [(0,), (0, 4), (0,)]


@cuda_part
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer")
@pytest.mark.parametrize(("tool", "clean"), [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "0 hazards")])
def test_compute_sanitizer_finds_nothing(tool: str, clean: str) -> None:
    """The tests above once more, our kernels watched; memory is not cached, so that every bound is known."""
    watched = [
        str(SANITIZER),
        "--tool",
        tool,
        "--kernel-name",
        "kernel_substring=flashvid",
        "--report-api-errors",
        "no",
    ]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "test_forest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*watched, "--error-exitcode", "9", *tests],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert clean in done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
