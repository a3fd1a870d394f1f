# SPDX-License-Identifier: MIT
"""`adaptive`: what it keeps, worked out by hand."""

import pytest
import torch

from flashvid_vllm import compress
from tests.core.test_compress import same
from tests.support.cases import assert_close, video

from .test_methods import config_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pays_for_what_is_new() -> None:
    # One word in many: nothing but the fourth frame has news, and of its tokens two alone.
    words = torch.eye(24)  # all equally far from one another
    features = words[None, :9].repeat(8, 1, 1)
    features[3:, 4], features[3:, 5] = -words[4], -words[5]
    out = compress(features, None, config_of("adaptive", token_budget=11))
    assert out.source_index.tolist() == [*range(9), 3 * 9 + 4, 3 * 9 + 5]
    assert out.size.tolist() == [8] * 4 + [3, 3] + [8] * 3 + [5, 5]
    assert_close(out.tokens, features.flatten(0, 1)[out.source_index])  # no frame is forced to have one
    few = compress(features, None, config_of("adaptive", token_budget=3))
    assert few.size.sum() == 72  # every token is merged into what explains it
    assert int(few.assignment[0, 4]) != int(few.assignment[3, 4])


def test_tells_again_what_is_still_of_the_frames_that_show_most() -> None:
    words = torch.eye(24)
    plain, rich = words[[0, 0, 0, 1, 1, 1, 2, 2, 2]], words[9:18]
    features = torch.stack([plain] * 4 + [rich] * 4)
    told = [0, 3, 6, *range(36, 45)]
    assert compress(features, None, config_of("adaptive", token_budget=12)).source_index.tolist() == told
    out = compress(features, None, config_of("adaptive", token_budget=14))
    assert out.source_index.tolist() == [*told, 45, 46]
    assert out.size.tolist() == [12] * 3 + [1, 1] + [4] * 7 + [3, 3]


def test_tells_nothing_again_where_positions_are_numbered_anew() -> None:
    words = torch.eye(24)
    features = torch.stack([words[[0, 0, 0, 1, 1, 1, 2, 2, 2]]] * 4 + [words[9:18]] * 4)
    config = config_of("adaptive", token_budget=14)
    new = [0, 3, 6, *range(36, 45)]
    assert compress(features, None, config).source_index.tolist() == [*new, 45, 46]
    anew = compress(features, None, config, keeps_positions=False)
    assert anew.source_index.tolist() == [0, 1, 2, 3, 6, *range(36, 45)]  # nothing else is new: the first of all


def test_measures_a_frame_by_its_finite_tokens() -> None:
    words = torch.eye(24)
    features = torch.stack([words[[0] * 8]] * 4 + [words[[1, 2] * 4]] * 4)  # a frame of one word, and one of two
    features[:4, 4:] = torch.nan  # half of it lost: no richer than it was
    out = compress(features, None, config_of("adaptive", token_budget=5))
    assert out.source_index.tolist() == [0, 32, 33, 40, 41]


@pytest.mark.parametrize("frames_at_a_time", [1, 2, 5])
def test_is_the_same_whatever_is_in_memory(frames_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = video("scene", 9, 20, 16)
    config = config_of("adaptive", token_budget=40)
    whole = compress(features, None, config)
    monkeypatch.setattr("flashvid_vllm.ops.explain.PAIRS_AT_A_TIME", frames_at_a_time * 20**2)
    assert same(compress(features, None, config), whole)
