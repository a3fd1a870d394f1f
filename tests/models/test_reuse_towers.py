# SPDX-License-Identifier: MIT
"""A vision tower that computes some of a video's rows gives what transformers gives where the others are overwritten
with them in every layer: a wrong key, position, window, class token or copy."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.reuse import Reuse
from flashvid_vllm.models import reuse as reuse_module
from flashvid_vllm.models.families import llava, mrope_encoder
from flashvid_vllm.models.processor_cache import FIELD
from flashvid_vllm.models.settings_row import pack_settings

from ..support.families import LLAVA_ONEVISION, LLAVA_ONEVISION_CLIP, QWEN2_5_VL, QWEN3_5, QWEN3_VL, Family
from ..support.reuse import Video, frame_reuse, noise, random_reuse, still

pytestmark = pytest.mark.slow

T = 5


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(family, id=family.name) for family in (QWEN2_5_VL, LLAVA_ONEVISION_CLIP)),
        *(
            pytest.param(family, id=family.name, marks=pytest.mark.longer("without windows, or a class token"))
            for family in (QWEN3_VL, QWEN3_5, LLAVA_ONEVISION)
        ),
    ],
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family: Family, models: Callable[[Family], Path], engines: Any) -> Any:
    llm = engines(models(family), {"retention_ratio": 0.3})
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


@pytest.fixture
def no_whole_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole temporal positions are computed like other rows."""
    for module in (llava, mrope_encoder):
        monkeypatch.setattr(module, "whole_frames", lambda *_: None)


def assert_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Features and scores, within a rounding or two."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, **others: Any
) -> Tensor:
    """What FlashAttention says of its function, in float64: a sequence's queries and keys are those between bounds."""
    assert others["causal"] is False
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])) == (len(q), len(k))
    out = torch.full_like(q, torch.nan)
    for i, n in enumerate((cu_seqlens_k[1:] - cu_seqlens_k[:-1]).tolist()):
        (a, b), (start, stop) = cu_seqlens_q[i : i + 2].tolist(), cu_seqlens_k[i : i + 2].tolist()
        assert b - a <= others["max_seqlen_q"]
        assert n <= others["max_seqlen_k"]
        logits = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[start:stop].double()) * softmax_scale
        out[a:b] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[start:stop].double()).to(q.dtype)
    return out


@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("kernel", ["computed queries", "all queries", "query lengths"])
def test_as_transformers(
    model: Any, family: Family, oracles: Callable[[Family], Any], share: float, kernel: str, monkeypatch: Any
) -> None:
    video, oracle = noise(model, T), oracles(family)
    reuse = random_reuse(T, video.per_frame, share)
    for attention in model.attentions() if kernel != "computed queries" else ():  # what a GPU's kernels get
        monkeypatch.setattr(attention, "attn_backend", AttentionBackendEnum.FLASH_ATTN)
        monkeypatch.setattr(attention, "_fa_version", 2)
    if kernel == "query lengths":
        if hasattr(model, "visual"):  # whose tables say how long the longest sequence is
            monkeypatch.setattr(model.visual, "attn_backend", AttentionBackendEnum.FLASH_ATTN)
        monkeypatch.setattr(reuse_module.current_platform, "is_cuda", lambda: True)
        monkeypatch.setattr(reuse_module.fa_utils, "flash_attn_varlen_func", varlen, raising=False)  # none on a CPU
    assert 0 < len(reuse.rows) < len(reuse.source)
    assert_close(video.encoded(reuse), video.expected(oracle, reuse))


def test_whole_positions(model: Any, family: Family, oracles: Callable[[Family], Any], monkeypatch: Any) -> None:
    """Of any tower, in pieces of whatever length: it runs on the computed ones alone."""
    video, reuse = noise(model, T), frame_reuse([3, 1, 1, 3, 3], noise(model, 1).per_frame)
    monkeypatch.setattr(model, "frames_per_piece", lambda n: 1)
    monkeypatch.setattr(type(model), "refuse_rows", None)
    assert_close(video.encoded(reuse), video.expected(oracles(family), reuse))


def test_all_rows_are_no_reuse(model: Any) -> None:
    video = noise(model, T)
    everything = frame_reuse(list(range(T)), video.per_frame)
    assert all(map(torch.equal, video.encoded(everything), video.encoded()))


def test_all_rows_one_by_one(model: Any, no_whole_frames: None) -> None:
    video = noise(model, T)
    assert_close(video.encoded(frame_reuse(list(range(T)), video.per_frame)), video.encoded())


def test_a_still_video(model: Any, no_whole_frames: None) -> None:
    """From one frame's rows, in whichever frame they are."""
    video = still(model, T)
    for reuse in (frame_reuse([0] * T, video.per_frame), random_reuse(T, video.per_frame, 0)):
        assert len(reuse.rows) == video.per_frame
        assert_close(video.encoded(reuse), video.encoded())


def test_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long video's pieces get their part of its rows; one that needs another's is no piece."""
    video = noise(model, 2 * T)
    halves = [random_reuse(T, video.per_frame, 0.3, seed) for seed in (1, 2)]
    shift = T * video.per_frame
    reuse = Reuse(
        torch.cat([halves[0].rows, halves[1].rows + shift]),
        torch.cat([halves[0].source, halves[1].source + len(halves[0].rows)]),
    )
    whole = video.encoded(reuse)
    monkeypatch.setattr(model, "frames_per_piece", lambda n: T)
    assert_close(video.encoded(reuse), whole)
    monkeypatch.setattr(model, "frames_per_piece", lambda n: T - 1)
    with pytest.raises(ValueError, match="0 to 4 go through the encoder by themselves"):
        video.encoded(reuse)


def test_videos_of_one_step(model: Any) -> None:
    """Several with rows of their own, one of which is to stay whole: each is what it is alone, and as without reuse
    where nothing moves."""
    videos = [still(model, T), still(model, T + 1)]
    reuses = [random_reuse(v.num_frames, v.per_frame, share) for v, share in zip(videos, (0.2, 0.5), strict=True)]
    configs = [FlashVidConfig(retention_ratio=1.0), FlashVidConfig(retention_ratio=0.2, selection="diversity")]
    rows = [pack_settings(config)[None] for config in configs]

    def embed(videos: list[Video], reuses: list[Any], rows: list[torch.Tensor]) -> Any:
        fields = [video.fields(reuse) for video, reuse in zip(videos, reuses, strict=True)]
        joined: dict[str, Any] = {FIELD: torch.cat(rows)}
        for name in fields[0]:
            values = [field[name] for field in fields]
            lists = isinstance(values[0], list)
            joined[name] = [x for value in values for x in value] if lists else torch.cat(values)
        with torch.inference_mode():
            return model.embed_multimodal(**joined)

    together = embed(videos, reuses, rows)
    alone = [embed([v], [reuse], [row])[0] for v, reuse, row in zip(videos, reuses, rows, strict=True)]
    assert all(map(torch.equal, together, alone))
    assert len(together[0]) > 0.9 * T * model.video_grids(**videos[0].fields(None))[0][1]
    assert_close(tuple(together[:1]), tuple(embed(videos[:1], [None], rows[:1])))
    assert model.video_grids(**videos[0].fields(reuses[0])) == model.video_grids(**videos[0].fields(None))


def test_who_computes_no_single_rows_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.refuse_rows()
    attention = model.attentions()[0]
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attn_backend", AttentionBackendEnum.FLASHINFER)
        with pytest.raises(ValueError, match="FlashInfer"):
            model.refuse_rows()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "fp8_enabled", True)
        with pytest.raises(ValueError, match="fp8"):
            model.refuse_rows()
    if hasattr(model, "visual"):
        with monkeypatch.context() as patch:
            patch.setattr(model.visual.blocks[0], "do_not_compile", False)
            with pytest.raises(ValueError, match="compile_mm_encoder"):
                model.refuse_rows()
    video = noise(model, T)
    monkeypatch.setattr(model, "attentions", lambda: [torch.nn.Identity()])
    with pytest.raises(ValueError, match="Identity"):
        video.encoded(random_reuse(T, video.per_frame, 0.3))


@pytest.mark.parametrize("num_frames", [2 * T, 4])
def test_a_piece_for_each_rank(family: Family, model: Any, num_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks that share the encoder by videos, one after the other in this process; the last one's piece is
    shorter, or there is none: every rank's rows in their place."""
    if family.kind.startswith("llava"):
        pytest.skip("vLLM shares LLaVA's encoder by heads only")
    share = -(-num_frames // 3)
    video = noise(model, num_frames)
    parts, computed = [], 0
    for start in range(0, num_frames, share):
        own = random_reuse(min(share, num_frames - start), video.per_frame, 0.1 + 0.1 * start, start)
        parts.append((own.rows + start * video.per_frame, own.source + computed))
        computed += len(own.rows)
    reuse = Reuse(*(torch.cat(tables) for tables in zip(*parts, strict=True)))
    whole = video.encoded(reuse)
    shares: dict[int, torch.Tensor] = {}

    def gather(rank: int, own: torch.Tensor, dim: int) -> torch.Tensor:
        shares[rank] = own
        return torch.cat([shares.get(r, torch.zeros_like(own)) for r in range(3)], dim)

    monkeypatch.setattr(model, "use_data_parallel", True)
    monkeypatch.setattr(mrope_encoder, "get_tensor_model_parallel_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(mrope_encoder, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(mrope_encoder, "tensor_model_parallel_all_gather", functools.partial(gather, rank))
        found = video.encoded(reuse)
    assert_close(found, whole)
    assert len({own.shape for own in shares.values()}) == 1
