# SPDX-License-Identifier: MIT
"""On Model Runner V2 the host never waits for the device between the vision encoder and prefill: what waited kept a
GPU idle for up to 19 ms of a long video. Shown on tensors that raise where it would (tests/support/device.py)."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress
from flashvid_vllm.core.reuse import Reuse
from flashvid_vllm.models import attention
from flashvid_vllm.models import reuse as reuse_module
from flashvid_vllm.models import upload as upload_module
from flashvid_vllm.models.families import llava, llava_rows, mrope, mrope_rows, qwen2_5_vl
from flashvid_vllm.models.inner import rows as inner_rows
from flashvid_vllm.models.positions import LAST_DELTA, Span, compress_positions

from ..support.device import DEVICE, Device, OnDevice, Waits, held
from ..support.engine import Engines
from ..support.families import LLAVA_ONEVISION_ORIGINAL, QWEN2_5_VL, QWEN3_5, QWEN3_VL, Family
from ..support.reuse import Video, noise, random_reuse

pytestmark = pytest.mark.slow

FAMILIES = [QWEN2_5_VL, QWEN3_VL, LLAVA_ONEVISION_ORIGINAL]
LONGER = [QWEN3_5]
CONFIG = FlashVidConfig(retention_ratio=0.3)
T, GRID = 4, (4, 8, 12)  # temporal positions; patches of a Qwen video


def uploaded(table: Tensor, device: torch.device) -> Tensor:
    return OnDevice(table) if device == DEVICE else table


@pytest.fixture(
    params=[*FAMILIES, *(pytest.param(family, marks=pytest.mark.longer("a variant")) for family in LONGER)],
    ids=lambda family: family.name,
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def model(family: Family, models: Callable[[Family], Path], engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine's model; its compression (which has a test of its own: no op of the device waits) on whatever it is
    given, and its tables taken to the device as `upload` does."""
    llm = engines(models(family), {"retention_ratio": 0.3, **family.settings}, **family.engine_options)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def compressed(features: Tensor, scores: Tensor | None, config: FlashVidConfig) -> CompressedVideo:
        if not isinstance(features, OnDevice):
            return compress(features, scores, config)
        video = compress(held(features), scores if scores is None else held(scores), config)
        return CompressedVideo(*(OnDevice(getattr(video, n)) for n in ("tokens", "source_index", "size", "assignment")))

    monkeypatch.setattr(model, "compress_video", compressed)
    for module in (mrope, llava, qwen2_5_vl):
        monkeypatch.setattr(module, "upload", uploaded)
    return model


def encoded(model: Any, wrap: Callable[[Tensor], Tensor]) -> Tensor:
    """What a video becomes, from the tower's output on."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "tokens_per_frame"):
        n = model.tokens_per_frame()
        features = torch.randn(T, n, model.embedding_width(), generator=generator)
        scores = torch.rand(T, n, generator=generator)
        video = model.compress_video(wrap(features), wrap(scores), CONFIG)
        rows = model.add_newlines(video, T, n)
        return llava.append_positions(rows, model._places(video, T, n))
    n = GRID[1] * GRID[2] // 4
    rows = attention.append_scores(
        torch.randn(T * n, model.embedding_width(), generator=generator), torch.rand(T * n, generator=generator)
    )
    features, scores = attention.take_scores(wrap(rows))
    scores = model.raster_order(scores, GRID)
    fields = {"video_grid_thw": torch.tensor(GRID), "second_per_grid_ts": torch.tensor(1.0), "timestamps": [0.5] * T}
    item = {name: SimpleNamespace(data=value) for name, value in fields.items()}
    rows, places = model._compress(features, scores, CONFIG, item)
    return inner_rows.mark_rows(rows, places)[:, :-1]


def test_from_the_encoder_to_the_embeddings(model: Any) -> None:
    expected = encoded(model, lambda x: x)
    with Device():
        assert torch.equal(held(encoded(model, OnDevice)), expected)


def test_positions_of_a_chunk(model: Any) -> None:
    """As Model Runner V2 asks: positions and embeddings on the device, the delta on the host."""
    rows = encoded(model, lambda x: x)
    full = torch.arange(40 + len(rows) * 3).repeat(3, 1)
    positions, delta = compress_positions(full, [Span(20, len(rows) * 3, len(rows))])
    _, expected, given = model.final_positions([rows[:-5]], positions, 0)
    assert given == delta
    with Device():
        LAST_DELTA[:] = [delta]
        embeddings, found, given = model.final_positions([OnDevice(rows[:-5])], OnDevice(positions), 0)
    assert given == delta
    assert torch.equal(held(found), expected)
    assert torch.equal(held(embeddings[0]), rows[:-5, : model.embedding_width()])
    assert int((positions < 0).sum()) > int((expected < 0).sum()) > 0


def test_rows_that_others_stand_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the encoder is given to compute some rows alone, and what is gathered around its attention, as a GPU's
    kernels get it. The layers between are vLLM's."""
    for module in (reuse_module, llava_rows, mrope_rows):
        monkeypatch.setattr(module, "upload", uploaded)
    attention = model.attentions()[-1]
    monkeypatch.setattr(attention, "attn_backend", AttentionBackendEnum.FLASH_ATTN)
    monkeypatch.setattr(attention, "forward", lambda q, k, v, **_: q * k.flip(1) + v)
    video = noise(model, T)
    reuse = random_reuse(T, video.per_frame, 0.3)
    expected = given_to_the_layers(model, video, reuse, torch.device("cpu"), lambda x: x)
    with Device():
        found = given_to_the_layers(model, video, reuse, DEVICE, OnDevice)
        assert all(torch.equal(held(x), y) for x, y in zip(found, expected, strict=True))


def given_to_the_layers(
    model: Any, video: Video, reuse: Reuse, device: torch.device, wrap: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Embedded patches or tables of positions; what comes out of attention; all rows' queries."""
    given: list[Tensor] = []
    size = len(reuse.rows), 2
    rows: Any
    tower: Any
    if hasattr(model, "visual"):
        tables = {n: x for n, x in model.visual.prepare_encoder_metadata([list(GRID)]).items() if x is not None}
        tower = SimpleNamespace(device=device, out_hidden_size=1, spatial_merge_unit=4)
        tower.prepare_encoder_metadata = lambda _: {name: wrap(table) for name, table in tables.items()}
        tower.get_rope_by_thw = getattr(model.visual, "get_rope_by_thw", None)
        make = mrope_rows.in_window_order if tower.get_rope_by_thw else mrope_rows.in_raster_order
        rows = make(tower, list(GRID), reuse)
        given += [rows._metadata[name] for name in sorted(rows._metadata)]
        size = len(reuse.rows) * 4, 2
    else:
        tower = SimpleNamespace(device=device, vision_model=model.vision_tower.vision_model)
        rows = llava_rows.RowsTower(tower, reuse, T)
        given.append(rows._embed(wrap(video.computed(reuse))))
    query, key, value = (wrap(torch.randn(1, *size, generator=torch.Generator().manual_seed(i))) for i in range(3))
    attention, per_unit = model.attentions()[-1], 4 if hasattr(model, "visual") else 1
    with reuse_module.attending_to_all([attention], rows._inside, rows._tables, per_unit, T):
        given.append(attention(query, key, value))
    return [*given, rows.gather(query[0])]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True), lambda x: int(x[0]), lambda x: x + torch.ones(3),
        lambda x: bool((x > 0).any()), lambda x: torch.bincount(x), lambda x: x + torch.ones(3).to(x.device),
        lambda x: x.numpy(), lambda x: torch.ones(3).to(device=x.device), lambda x: torch.tensor([1], device=x.device),
        lambda x: torch.unique(x), lambda x: torch.repeat_interleave(x),
    ],
)  # fmt: skip
def test_what_waits_is_found(wait: Callable[[Tensor], Any]) -> None:
    with Device(), pytest.raises((Waits, TypeError, RuntimeError)):
        wait(OnDevice(torch.tensor([1, 0, 2])))


@pytest.mark.parametrize("pinned", [True, False])
def test_tables_are_uploaded_from_pinned_memory(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Table:
        def pin_memory(self) -> "Table":
            calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> str:
            calls.append((device.type, non_blocking))
            return "there"

    monkeypatch.setattr(upload_module, "is_pin_memory_available", lambda: pinned)
    assert upload_module.upload(Table(), torch.device("cuda")) == "there"  # type: ignore[arg-type]
    assert calls == [*(["pinned"] if pinned else []), ("cuda", True)]
    host = torch.ones(3)
    assert upload_module.upload(host, torch.device("cpu")) is host
