# SPDX-License-Identifier: MIT
"""What a processor sends of a video that is encoded less: the pixels of its computed rows, and which these are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from flashvid_vllm.core.config import ENCODER_SETTINGS, INNER_SETTINGS, FlashVidConfig
from flashvid_vllm.core.levels import PixelScale
from flashvid_vllm.models import pieces
from flashvid_vllm.models.encode_less import PIXELS, ROWS, SOURCE
from flashvid_vllm.models.processor_cache import FIELD
from flashvid_vllm.models.reuse import take_reuses
from flashvid_vllm.models.settings_row import pack_settings, unpack_settings

from ..serving.test_processor_cache import Pipe, cached_and_not, same, sent_alike
from ..support.engine import Clip
from ..support.families import LLAVA_ONEVISION, LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL

VARIANT = pytest.mark.longer("a variant")
FAMILIES = [
    pytest.param(QWEN2_5_VL, id="qwen2_5_vl"), pytest.param(LLAVA_ONEVISION, id="llava_onevision"),
    pytest.param(QWEN3_VL, id="qwen3_vl", marks=VARIANT), pytest.param(LLAVA_VIDEO, id="llava_video", marks=VARIANT),
]  # fmt: skip
CLIP = Clip(10, 64, 96)


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest, models: Callable[[Any], Path]) -> Pipe:
    """Without a cache."""
    return Pipe(request.param, models(request.param), "none")


def sent(pipe: Pipe, **settings: Any) -> tuple[list[int], Any]:
    """Ids of a prompt with the clip, and its feature as the worker gets it."""
    ids, (feature,) = pipe.send([CLIP], settings)
    return ids, feature


def whole_rows(pipe: Pipe, pixels: Tensor) -> Tensor:
    """[rows, ...] of a whole video: by four patches, or cut from frames by hand."""
    if pixels.dim() == 2:
        return pixels.reshape(-1, 4, pixels.shape[1])
    side = pipe.processor.info.get_hf_config().vision_config.patch_size
    return torch.stack(
        [
            frame[:, y : y + side, x : x + side]
            for frame in pixels
            for y in range(0, frame.shape[1] - side + 1, side)
            for x in range(0, frame.shape[2] - side + 1, side)
        ]
    )


def test_not_one_byte_is_another_where_all_is_encoded(pipe: Pipe) -> None:
    """The fields, the settings' row and the names are those from before there were these settings."""
    ids, plain = sent(pipe, retention_ratio=0.5)
    same_ids, asked = sent(pipe, retention_ratio=0.5, encoder_ratio=1, encoder_reuse="frames")
    assert same_ids == ids
    same([asked], [plain])
    assert not {ROWS, SOURCE} & set(plain.data)
    row = bytes(plain.data[FIELD].data.tolist())
    config = unpack_settings(plain.data[FIELD].data)
    assert config is not None
    assert json.loads(row) == {
        k: v for k, v in config.to_dict().items() if k not in (*ENCODER_SETTINGS, *INNER_SETTINGS)
    }
    assert "-encoder-" not in plain.identifier


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_ratio": 0.3},
        {"encoder_ratio": 0.5, "encoder_reuse": "frames", "retention_ratio": 1},
        {"encoder_ratio": "auto", "method": "evs"},
    ],
    ids=["tokens", "frames", "auto"],
)
def test_the_pixels_of_the_computed_rows_are_sent(pipe: Pipe, settings: dict[str, Any]) -> None:
    others = {"retention_ratio": 0.5, **{k: v for k, v in settings.items() if k not in ENCODER_SETTINGS}}
    ids, full = sent(pipe, **others)
    less_ids, less = sent(pipe, **{**others, **settings})
    assert less_ids == ids
    assert less.mm_position == full.mm_position
    assert "-encoder-" in less.identifier  # pixels of another choice are not its
    assert set(less.data) == {*full.data, ROWS, SOURCE}
    for key in set(full.data) - {PIXELS, FIELD}:
        assert less.data[key] == full.data[key]
    config = unpack_settings(less.data[FIELD].data)
    assert config is not None
    assert all(getattr(config, k) == v for k, v in settings.items())

    (reuse,) = take_reuses({key: [less.data[key].data] for key in (ROWS, SOURCE)})
    rows = whole_rows(pipe, full.data[PIXELS].data)
    t = pipe.processor.video_grid(full.data)[0]
    assert len(reuse.source) == len(rows)
    pixels = less.data[PIXELS].data
    assert torch.equal(pixels.reshape(len(reuse.rows), *rows.shape[1:]), rows[reuse.rows])
    assert pixels.untyped_storage().nbytes() == pixels.nbytes  # and no more of the video behind them
    if settings["encoder_ratio"] == "auto":
        assert len(rows) / t <= len(reuse.rows) < len(rows)
    elif settings.get("encoder_reuse") == "frames":
        assert len(reuse.rows) == t // 2 * (len(rows) // t)
    else:
        assert len(reuse.rows) == max(len(rows) // t, int(settings["encoder_ratio"] * len(rows)))
    assert all(less.data[key].field.keep_on_cpu for key in (ROWS, SOURCE))
    # the scene is still but for a small square: what is copied is alike
    rows = rows.float()
    stands = rows[reuse.rows[reuse.source]]
    assert (stands - rows).abs().mean() < (rows.roll(1, 0) - rows).abs().mean() / 2


def test_where_compression_is_off_it_may_be_asked_for_alone(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a whole video's pixels are sent, as if nothing had been asked for."""
    plain_ids, plain = sent(pipe, enabled=False)
    monkeypatch.setitem(pipe.processor.info.flashvid_server, "enabled", False)
    ids, feature = sent(pipe, encoder_ratio=0.5)
    assert ids == plain_ids
    rows = len(whole_rows(pipe, plain.data[PIXELS].data))
    assert len(feature.data[ROWS].data) == rows // 2
    config = unpack_settings(feature.data[FIELD].data)
    assert config is not None
    assert config.retention_ratio == 1
    assert ROWS not in sent(pipe, encoder_ratio=1)[1].data


def test_a_piece_has_its_own_rows(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is copied from what another call of the encoder computes, with ranks that share a call too."""
    num_frames, n = pipe.processor.video_grid(sent(pipe, retention_ratio=1)[1].data)
    names = set()
    for piece, shares in ((2 * n, 1), (n, 2), (10 * n, 2)):
        monkeypatch.setattr(pipe.processor, "piece", piece)
        monkeypatch.setattr(pipe.processor.info, "flashvid_shares", shares)
        _, feature = sent(pipe, encoder_ratio=0.01)
        names.add(feature.identifier)
        (reuse,) = take_reuses({key: [feature.data[key].data] for key in (ROWS, SOURCE)})
        first = pieces.blocks(num_frames, piece // n, shares)
        per_frame = len(reuse.source) // num_frames
        assert len(reuse.rows) == per_frame * len(first)
        block = torch.bucketize(torch.arange(num_frames), torch.tensor(first), right=True).repeat_interleave(per_frame)
        assert torch.equal(block[reuse.rows[reuse.source]], block)
    assert len(names) == 3


def test_blocks_are_what_is_encoded_in_a_call() -> None:
    assert pieces.blocks(7, 3, 1) == [0, 3, 6]
    assert pieces.blocks(7, 9, 1) == [0]
    assert pieces.blocks(300, 400, 1) == [0, 128, 256]  # so that a choice of hours is none
    assert pieces.blocks(7, 9, 2) == [0, 4]
    assert pieces.blocks(7, 2, 2) == [0, 2, 4, 6]  # the last call has three positions, in shares of two
    assert pieces.blocks(5, 1, 4) == [0, 1, 2, 3, 4]
    for t in range(1, 12):
        assert pieces.blocks(t, 3, 1) == list(range(0, t, 3))


def test_levels_are_those_of_the_frames() -> None:
    """What was normalised is found again, and its means over 4 x 4 pixels are rounded as they should."""
    scale = PixelScale([0.48, 0.5, 0.4], [0.27, 0.5, 0.26])
    frames = torch.randint(0, 256, (2, 5, 1, 3, 1, 8, 8), dtype=torch.uint8)
    by_channel = (-1, 1, 1, 1)
    pixels = (frames / 255 - torch.tensor(scale.mean).view(by_channel)) / torch.tensor(scale.std).view(by_channel)
    means = frames.double().unflatten(-1, (2, 4)).unflatten(-3, (2, 4)).mean((-1, -3))
    assert torch.equal(scale.levels(pixels), (means + 0.5).floor().flatten(2).to(torch.uint8))
    assert torch.equal(scale.levels(frames), scale.levels(pixels))  # as they are where the device normalises them
    # 14 pixels are pooled by 2, of 7 each counts
    assert scale.levels(torch.zeros(1, 2, 4, 3, 2, 14, 14)).shape == (1, 2, 4 * 3 * 2 * 49)
    assert scale.levels(torch.zeros(1, 2, 1, 3, 1, 7, 7)).shape == (1, 2, 3 * 49)
    assert int(scale.levels(torch.full((1, 1, 1, 3, 1, 2, 2), 1e9)).min()) == 255


def test_settings_that_do_not_travel_are_not_lost() -> None:
    for config in (FlashVidConfig(), FlashVidConfig(encoder_ratio=0.5, encoder_reuse="frames")):
        assert unpack_settings(pack_settings(config)) == config


@pytest.fixture(
    params=[(f, k) for f in (QWEN3_VL, LLAVA_ONEVISION) for k in ("lru", "shm")],
    ids=lambda param: f"{param[0].name}-{param[1]}",
)
def cached(
    request: pytest.FixtureRequest, models: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Pipe, Pipe]]:
    family, kind = request.param
    with cached_and_not(family, models(family), kind, monkeypatch) as both:
        yield both


SETTINGS: list[dict[str, Any]] = [
    {"retention_ratio": 0.5}, {"encoder_ratio": 0.3}, {"encoder_ratio": 0.5}, {"enabled": False},
    {"encoder_ratio": 0.5, "encoder_reuse": "frames"}, {"encoder_ratio": 0.5, "retention_ratio": 0.1},
]  # fmt: skip


@pytest.mark.longer("two caches of two families")
def test_caches_hold_each_choice_apart(cached: tuple[Pipe, Pipe]) -> None:
    """Pixels of one choice were another's where the name was the video's alone; one copy for all other settings."""
    names = {sent_alike(cached, [CLIP], settings)[0].identifier for settings in SETTINGS * 2}
    assert len(names) == len(SETTINGS)
    assert cached[0].held()[0] == 4  # all of it, two numbers of rows, whole frames


def test_a_video_that_is_too_long_is_refused_before_anything_is_chosen(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipe.processor.info.flashvid_server, "max_video_tokens", 20)
    monkeypatch.setattr(pipe.processor, "_encode_less", None)
    with pytest.raises(ValueError, match="this server takes 20"):
        sent(pipe, retention_ratio=0.5, encoder_ratio=0.5)
