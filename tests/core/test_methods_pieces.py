# SPDX-License-Identifier: MIT
"""What the methods are made of: shares, windows, stretches, neighbourhoods."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashvid_vllm import FlashVidConfig, compress
from flashvid_vllm.core.budget import plan
from flashvid_vllm.core.methods import common, prunevid
from tests.core.test_compress import assert_sound
from tests.support.cases import assert_close, video

from .test_methods import config_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("label", "lengths"),
    [
        ([0], [1]),
        ([0, 1, 2], [3]),  # nothing longer than a frame: all one
        ([0, 0, 1, 1, 1], [2, 3]),
        ([0, 0, 1, 0, 0], [5]),  # what lies between two runs of a cluster joins them
        ([0, 0, 1, 2, 2, 2], [2, 4]),  # the longer neighbour
        ([0, 0, 1, 2, 2], [3, 2]),  # the earlier of equals
        ([1, 0, 0, 0, 2], [5]),
        ([0, 0, 0, 1, 1, 0, 0, 2, 2, 2], [3, 2, 5]),  # a shorter run of a cluster is up for grabs
    ],
)
def test_segments_of_frame_clusters(label: list[int], lengths: list[int]) -> None:
    assert prunevid.segments(label) == lengths


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_spread(room: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(room)))
    out = common.spread(total, room)
    assert sum(out) == total
    assert all(0 <= got <= most for got, most in zip(out, room, strict=True))
    below = [got for got, most in zip(out, room, strict=True) if got < most]
    assert max(out) - min(below, default=max(out)) <= 1  # equal but for what is full


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 12)), min_size=1, max_size=9), st.data())
def test_largest_remainder(frames: list[tuple[float, int]], data: st.DataObject) -> None:
    room = [most for _, most in frames]
    total = data.draw(st.integers(0, sum(room)))
    weight = [1e-9 + share for share, _ in frames]
    wanted = [total * share / sum(weight) for share in weight]
    out = common.largest_remainder(wanted, total, room)
    assert sum(out) == total
    assert all(0 <= got <= most for got, most in zip(out, room, strict=True))
    if all(share + 1 <= most for share, most in zip(wanted, room, strict=True)):  # nothing is full
        assert all(abs(got - share) < 1 + 1e-5 for got, share in zip(out, wanted, strict=True))


def test_largest_remainder_by_hand() -> None:
    assert common.largest_remainder([1.5, 1.5, 2.0], 5, [9, 9, 9]) == [2, 1, 2]  # the lowest of equals
    assert common.largest_remainder([1.2, 1.7, 2.1], 5, [9, 9, 9]) == [1, 2, 2]
    assert common.largest_remainder([4.9, 0.05, 0.05], 5, [2, 9, 9]) == [2, 2, 1]  # what a full frame leaves goes round
    assert common.largest_remainder([3 - 1e-9, 1e-9], 3, [9, 9]) == [3, 0]  # rounding is no remainder


@pytest.mark.parametrize("method", ["vcast", "gleanvid"])
def test_tokens_that_are_alike_are_kept_from_the_first(method: str) -> None:
    # In floats their scores would differ by rounding, which follows the CPU and the number of threads.
    features, attention = video("letterbox", 6, 40, 24)
    features[:] = features[0].clone()  # and frames that are alike: what is kept of one spans the next
    out = compress(features, attention, config_of(method, token_budget=100))
    for t in range(6):
        alike = [j for j in out.source_index[out.source_index // 40 == t].sub(40 * t).tolist() if j < 28]
        assert alike == list(range(len(alike)))  # 28 and 29 share a neighbourhood with others


def test_gleanvids_neighbourhoods() -> None:
    cell = importlib.import_module("flashvid_vllm.core.methods.gleanvid").cells
    assert cell(9, torch.device("cpu")).tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]
    assert cell(16, torch.device("cpu")).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert cell(6, torch.device("cpu")).tolist() == [0, 0, 0, 0, 1, 1]  # no square: in a row


@pytest.mark.parametrize("method", ["tome", "divprune"])
def test_long_videos_are_taken_in_stretches(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, attention = video("scene", 10, 8, 16)
    config = config_of(method, token_budget=20)
    monkeypatch.setattr(f"flashvid_vllm.core.methods.{method}.MOST_TOKENS", 45)
    out = compress(features, attention, config)
    halves = [compress(half, None, config_of(method, token_budget=10)) for half in features.split(5)]
    assert_close(out.tokens, torch.cat([half.tokens for half in halves]))
    assert out.source_index.tolist() == [40 * i + j for i in (0, 1) for j in halves[i].source_index.tolist()]
    monkeypatch.setattr(f"flashvid_vllm.core.methods.{method}.MOST_TOKENS", 1)  # never less than a frame
    assert_sound(compress(features, attention, config), features, config)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 400), st.integers(1, 2000))
def test_windows_cover_the_video(num_frames: int, n: int, most: int, tokens: int) -> None:
    budget = plan(num_frames, n, FlashVidConfig(token_budget=tokens))
    found = common.windows(budget, most)
    assert [start for start, _, _ in found] + [num_frames] == [0] + [stop for _, stop, _ in found]
    assert sum(kept for _, _, kept in found) == budget.tokens
    for start, stop, kept in found:
        assert kept <= (stop - start) * n <= max(most, n)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_most_similar_takes_more_targets_than_tokens(backend: str) -> None:
    features, _ = video("noise", 2, 30, 16)
    targets = features[1, :, :].clone()
    similarity, index = common.most_similar(features[:, :7], targets, backend)
    expected = torch.nn.functional.cosine_similarity(features[:, :7, None], targets, dim=-1).max(-1)
    assert torch.equal(index, expected.indices)
    assert_close(similarity, expected.values)
    tied = torch.ones(1, 2, 4)
    assert common.most_similar(tied, torch.ones(5, 4), backend)[1].tolist() == [[0, 0]]
    lost = torch.full((1, 1, 4), torch.nan)
    assert [x.tolist() for x in common.most_similar(lost, torch.ones(2, 4), backend)] == [[[-1.0]], [[-1]]]
