# SPDX-License-Identifier: MIT
"""The encoder's work is bounded: a long video goes through it in pieces, and is what it is in one; a longer one is
refused. vLLM counts what is left of a video, so none of this was."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

pytest.importorskip("triton")

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.models import base, measure
from flashvid_vllm.models.pieces import encode_in_pieces, longest_video
from flashvid_vllm.models.processor import MEASURE
from flashvid_vllm.models.processor_cache import FIELD, FULL_EMBEDS
from flashvid_vllm.models.settings_row import pack_settings
from flashvid_vllm.ops import pipeline, triton_backend

from ..support.engine import Clip, greedy, prompt_of
from ..support.families import LLAVA_ONEVISION, LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL, Family
from ..support.triton_keys import SM_90, compiled

SETTINGS = {"retention_ratio": 0.3}
FAMILIES = [QWEN3_VL, LLAVA_ONEVISION, QWEN2_5_VL, LLAVA_VIDEO]


@pytest.mark.parametrize("num_frames", [1, 2, 7, 12])
@pytest.mark.parametrize("most", [1, 3, 12, 100])
def test_joined_pieces(num_frames: int, most: int) -> None:
    features, scores = torch.randn(num_frames * 4, 5), torch.randn(num_frames)
    sizes = []

    def encode(start: int, stop: int) -> tuple[torch.Tensor, ...]:
        sizes.append(stop - start)
        return features[start * 4 : stop * 4], scores[start:stop]

    joined = encode_in_pieces(encode, num_frames, most)
    assert all(map(torch.equal, joined, (features, scores)))
    assert sum(sizes) == num_frames
    assert max(sizes) <= most


@pytest.mark.parametrize(
    ("vision", "settings", "expected"),
    [
        ({"out_hidden_size": 3584}, {}, 65_536),
        ({}, {}, 65_536),  # LLaVA: the width is the language model's
        ({"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}, {}, 32_768),  # 32 KiB a token
        ({"out_hidden_size": 2**17}, {}, 8192),  # what vLLM takes plain
        ({"out_hidden_size": 3584}, {"max_video_tokens": 100}, 100),
    ],
)
def test_the_longest_video(vision: dict[str, Any], settings: dict[str, Any], expected: int) -> None:
    model = SimpleNamespace(
        hf_config=SimpleNamespace(vision_config=SimpleNamespace(**vision)),
        hf_text_config=SimpleNamespace(hidden_size=896),
        dtype=torch.bfloat16,
    )
    scheduler = SimpleNamespace(max_num_batched_tokens=8192)
    assert longest_video(SimpleNamespace(model_config=model, scheduler_config=scheduler), settings) == expected


@dataclass(frozen=True)
class Served:
    """A family in an engine that other files share."""

    family: Family
    llm: Any

    @property
    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    @property
    def processor(self) -> Any:
        return self.llm.llm_engine.renderer.mm_processor

    def prompt(self, clip: Clip, **settings: Any) -> dict[str, Any]:
        return prompt_of(f"{self.family.video}What happens?", [clip], flashvid=settings)

    def watch(self, patch: pytest.MonkeyPatch) -> list[int]:
        """Visual tokens of each call of the vision tower from now on."""
        sizes: list[int] = []
        is_llava = self.family.kind.startswith("llava")
        tower = self.model.vision_tower if is_llava else self.model.visual

        def forward(*args: Any, original: Any = tower.forward, **kwargs: Any) -> Any:
            if is_llava:
                sizes.append(len(args[0]) * self.model.tokens_per_frame())
            else:
                grids = torch.as_tensor(args[1] if len(args) > 1 else kwargs["grid_thw"])
                sizes.append(int(grids.prod(-1).sum()) // tower.spatial_merge_unit)
            return original(*args, **kwargs)

        patch.setattr(tower, "forward", forward)
        return sizes


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, id=family.name, marks=pytest.mark.longer("a variant") if family is LLAVA_VIDEO else [])
        for family in FAMILIES
    ],
)
def served(request: pytest.FixtureRequest, models: Callable[[Any], Path], engines: Any) -> Served:
    return Served(request.param, engines(models(request.param), SETTINGS))


def noise(model: Any, num_frames: int) -> dict[str, Any]:
    """Arguments of `embed_multimodal` for a video of so many temporal positions of 24 tokens, or of LLaVA's frames."""
    generator, vision = torch.Generator().manual_seed(0), model.config.vision_config
    if hasattr(model, "visual"):
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values_videos": torch.randn(num_frames * 96, channels, generator=generator),
            "video_grid_thw": torch.tensor([[num_frames, 8, 12]]),
            "second_per_grid_ts": torch.ones(1),
            "timestamps": [[float(t) for t in range(num_frames)]],
        }
    side = vision.image_size
    return {"pixel_values_videos": torch.randn(1, num_frames, 3, side, side, generator=generator)}


@pytest.mark.slow
def test_pieces_are_as_the_whole(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and attention scores; on the CPUs tried they are the same bits, which another BLAS need not give."""
    model, out = served.model, {}
    for most in (17, 5, 1):
        monkeypatch.setattr(model, "frames_per_piece", lambda n, most=most: most)
        video = noise(model, 17)
        with torch.inference_mode():
            if hasattr(model, "visual"):
                out[most] = model._encode(video["pixel_values_videos"], [17, 8, 12], True)
            else:
                out[most] = model._encode(video["pixel_values_videos"][0], True)
    for most in (5, 1):
        for pieces, whole in zip(out[most], out[17], strict=True):
            torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_no_call_of_the_encoder_is_larger_than_what_was_measured(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several videos of a step (V2's runner gives them in one call) and a long one: once 16,384 tokens in one call."""
    model = served.model
    monkeypatch.setattr(model, "flashvid_piece", 120)
    sizes = served.watch(monkeypatch)
    video = noise(model, 9)
    configs = [FlashVidConfig(retention_ratio=0.05), FlashVidConfig(selection="diversity")]
    rows = torch.stack([pack_settings(config) for config in configs])
    several = {key: value * 2 if isinstance(value, list) else torch.cat([value] * 2) for key, value in video.items()}
    with torch.inference_mode():
        together = model.embed_multimodal(**several, **{FIELD: rows})
        alone = [model.embed_multimodal(**video, **{FIELD: row[None]})[0] for row in rows]
    num_frames, n = model.video_grids(**video)[0]
    assert max(sizes) == 120 // n * n
    assert sum(sizes) == 4 * num_frames * n
    assert all(map(torch.equal, together, alone))


@pytest.mark.slow
def test_a_video_that_is_too_long_is_refused_from_its_size(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again: one that vLLM's cache had taken meanwhile would be an error of the server's. A video that stays as
    it is is vLLM's to refuse."""
    clip, info = Clip(16, 64, 96, seed=41), served.processor.info
    monkeypatch.setitem(info.flashvid_server, "max_video_tokens", 40)
    if served.family.kind.startswith("llava"):
        with monkeypatch.context() as patch:
            patch.setattr(served.processor, "_apply_hf_processor_main", None)  # not even its frames are worked on
            with pytest.raises(ValueError, match="takes 40"):
                greedy(served.llm, [served.prompt(clip, retention_ratio=0.1)], 1)
        # where some of its frames are to be chosen they are
        check_video = type(served.processor).check_video
        monkeypatch.setattr(
            type(served.processor), "check_video", lambda self, video, *a: video.embeds and check_video(self, video, *a)
        )
    for _ in range(2):
        with pytest.raises(ValueError, match=r"compression \(\d+ x \d+\), and this server takes 40: .*max-video"):
            greedy(served.llm, [served.prompt(clip, retention_ratio=0.1)], 1)
    assert greedy(served.llm, [served.prompt(clip, enabled=False)], 1)
    monkeypatch.undo()
    assert greedy(served.llm, [served.prompt(clip, retention_ratio=0.1)], 1)


@pytest.mark.slow
@pytest.mark.longer("encodes videos of thousands of tokens")
def test_memory_is_measured_on_the_longest_video(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up's video is plain: nothing of compression was in what vLLM measured."""
    model, processor = served.model, served.processor
    for modality in ("video", "image"):  # vLLM measures with whichever is larger
        inputs = processor.get_dummy_mm_inputs({modality: 1})
        assert MEASURE in inputs["mm_kwargs"][modality][0]
    dummy = processor.get_dummy_mm_inputs({"video": 1})["mm_kwargs"]["video"][0]
    assert model.flashvid_piece == math.prod(processor.video_grid(dummy))
    assert dummy[FULL_EMBEDS].data >= model.flashvid_piece

    seen: list[tuple[int, ...]] = []
    compress = model.compress_video

    def keep(features: torch.Tensor, *others: Any) -> Any:
        seen.append(tuple(features.shape))
        return compress(features, *others)

    settings = model.flashvid_vllm_config.model_config.multimodal_config.mm_processor_kwargs["flashvid"]
    monkeypatch.setitem(settings, "max_video_tokens", 2 * model.flashvid_piece)
    monkeypatch.setattr(model, "compress_video", keep)
    counted = model.flashvid_metrics
    sizes = served.watch(monkeypatch)
    with torch.inference_mode():
        model.measure_longest_video()
    n = seen[0][1]
    assert {frames * tokens for frames, tokens, _ in seen} == {2 * model.flashvid_piece}
    if model.frames_per_piece(n) == 1:  # of which nothing is a copy
        assert sizes == [model.flashvid_piece] * 2
        assert len(seen) == 1
    else:  # some rows alone, in a call for each piece; then whole frames, all but one
        assert sizes[2:] == [model.flashvid_piece, model.flashvid_piece - n]
        assert len(seen) == 2
    assert model.flashvid_metrics is counted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ["tokens", "frames"]),  # which a request may ask for
        ({"request_overrides": False}, ["whole"]),
        ({"request_overrides": False, "encoder_ratio": 0.5, "encoder_reuse": "frames"}, ["frames"]),
        ({"request_overrides": False, "encoder_ratio": "auto"}, ["tokens"]),
    ],
    ids=["open", "closed", "frames", "tokens"],
)
def test_memory_is_measured_next_to_a_share_of_one(
    served: Served, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], kinds: list[str]
) -> None:
    """Nearly all rows take more than all: keys and values beside their copies. Faults: only the whole is measured; a
    row that is copied from another call of the encoder; what nobody may ask for is measured."""
    model = served.model
    t, n = model.video_grids(**noise(model, 5))[0]
    server = model.flashvid_vllm_config.model_config.multimodal_config.mm_processor_kwargs["flashvid"]
    for name, value in {**settings, "max_video_tokens": 2 * t * n}.items():
        monkeypatch.setitem(server, name, value)
    monkeypatch.setattr(model, "flashvid_piece", t * n)
    monkeypatch.setattr(measure, "_dummy_video", lambda _: noise(model, 5))
    met: list[tuple[str, int]] = []
    compress = model.compress_video

    def keep(features: torch.Tensor, *others: Any) -> Any:
        reuse = model.flashvid_reuses[0]
        rows = 2 * t * model.rows_per_frame(n)
        missing = 0 if reuse is None else rows - len(reuse.rows)
        met.append(({0: "whole", 1: "tokens", model.rows_per_frame(n): "frames"}[missing], len(features)))
        return compress(features, *others)

    monkeypatch.setattr(model, "compress_video", keep)
    with torch.inference_mode():
        model.measure_longest_video()
        assert met == [(kind, 2 * t) for kind in kinds]
        met.clear()
        monkeypatch.setattr(measure, "why_not", lambda *_: "a reason")
        model.measure_longest_video()
    assert [kind for kind, _ in met] == ([kind for kind in kinds if kind != "tokens"] or ["whole"])


@pytest.mark.slow
def test_start_up_compiles_what_its_videos_call_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout that the encoder gives: a stride or an offset of another class would be compiled in a request."""
    model = served.model
    with compiled(SM_90) as before:
        monkeypatch.setattr(base.ops, "choose_backend", lambda *_: "triton")
        model.compile_kernels()
    monkeypatch.undo()
    assert len(before) > 30

    def also_on_triton(
        features: torch.Tensor, attention: torch.Tensor | None, config: FlashVidConfig, **options: Any
    ) -> Any:
        video = compress(features, attention, config, **options)
        selected = plan(features.shape[0], features.shape[1], config).selected_per_frame
        with compiled(SM_90) as found:
            pipeline.compress_video(features, attention, selected, 9, config.selection, config.matching, 0.8, 0.9, 4)
        called.update(found)
        return video

    def attention_also_on_triton(query: torch.Tensor, key: torch.Tensor, backend: str) -> torch.Tensor:
        with compiled(SM_90) as found:
            triton_backend.UNREGISTERED["received_attention"](query, key)
        called.update(found)
        return received_attention(query, key, backend=backend)

    called: set[Any] = set()
    compress, received_attention = base.compress, base.ops.received_attention
    monkeypatch.setattr(base, "compress", also_on_triton)
    monkeypatch.setattr(base.ops, "received_attention", attention_also_on_triton)
    for num_frames in (5, 9):
        video = noise(model, num_frames)
        with torch.inference_mode():
            model.embed_multimodal(**video, **{FIELD: pack_settings(FlashVidConfig())[None]})
    assert len(called) > 10
    assert called <= before
