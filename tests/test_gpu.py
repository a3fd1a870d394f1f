# SPDX-License-Identifier: MIT
"""What only a GPU can show: the compiled kernels' results, no host synchronisation, CUDA-graph capture, memory."""

from typing import Any

import pytest
import torch

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress, ops
from tests.cases import DTYPES, GOLDEN, golden, video
from tests.test_golden import config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


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
