# SPDX-License-Identifier: MIT
"""Intervals, tests and the advice that `flashvid tune` draws from them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from flashvid_vllm.tools.errors import UserError
from flashvid_vllm.tools.tune import stats
from flashvid_vllm.tools.tune.advice import FOUND, NONE, TOO_FEW, advise
from flashvid_vllm.tools.tune.grid import Setting, settings
from flashvid_vllm.tools.tune.stats import Estimate
from flashvid_vllm.tools.tune.summary import AGREEMENT, LIKELIHOOD, Row


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 1), (2, 5), (4, 4), (0, 8)])
def test_mcnemar_is_the_share_of_coin_flips_as_uneven(only_first: int, only_second: int) -> None:
    """Against every outcome of the discordant pairs; pairs that agree count for nothing."""
    first = np.array([True] * only_first + [False] * only_second + [True, False])
    second = np.array([False] * only_first + [True] * only_second + [True, False])
    n, uneven = only_first + only_second, abs(only_first - only_second)
    flips = [abs(n - 2 * sum(flip)) >= uneven for flip in itertools.product((0, 1), repeat=n)]
    assert stats.mcnemar(first, second) == pytest.approx(sum(flips) / len(flips))


def test_whole_videos_are_drawn() -> None:
    """100 questions about each of 10 videos, all of a video answered alike, are 10 trials and not 1000."""
    values, video = np.repeat([1] * 5 + [0] * 5, 100).astype(float), np.repeat(np.arange(10), 100)
    _, low, high = stats.mean(values, video)
    assert 0.5 - low > 0.25
    assert high - 0.5 > 0.25
    _, low, high = stats.mean(values, np.arange(1000))
    assert 0.5 - low < 0.04


def test_the_mean_of_normal_videos_has_students_interval() -> None:
    """The percentile bootstrap alone is 30 % too narrow for 6 videos."""
    values = np.random.default_rng(1).normal(size=6)
    half = stats.t_quantile(5) * values.std(ddof=1) / math.sqrt(6)
    value, low, high = stats.mean(values, np.arange(6))
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (300, 1.968)]
)
def test_students_t(degrees: int, value: float) -> None:
    """Printed tables'."""
    assert stats.t_quantile(degrees) == pytest.approx(value, abs=0.006)


def test_a_share_of_all_is_not_certain() -> None:
    """Six of six have a bootstrap of no width; the interval is Wilson's, and falls below the rule of three's bound."""
    for videos in (2, 6, 100):
        value, low, high = stats.share(np.ones(3 * videos), np.repeat(np.arange(videos), 3))
        assert (value, high) == (1, 1)
        assert low == pytest.approx(videos / (videos + 1.959964**2), abs=1e-5)
        assert low < 1 - 3 / (3 * videos)
    assert stats.share(np.zeros(6), np.arange(6))[2] == pytest.approx(1 - 6 / (6 + 1.959964**2), abs=1e-5)


def test_intervals_hold_what_they_promise() -> None:
    """Shares near 1 of few videos, where the plain bootstrap's lower bound lies above the truth far too often."""
    rng = np.random.default_rng(2)
    for share, videos in ((0.97, 30), (0.8, 12)):
        missed = above = 0
        for _ in range(200):
            values = (rng.random(videos) < share).astype(float)
            _, low, high = stats.share(values, np.arange(videos))
            missed += not low <= share <= high
            above += low > share
        assert missed <= 0.09 * 200, (share, videos, missed)
        assert above <= 0.06 * 200, (share, videos, above)


def test_a_ratio_weighs_items_by_what_is_below() -> None:
    value, *_ = stats.ratio(np.array([1.0, 0.0]), np.array([3.0, 1.0]), np.array([0, 1]))
    assert value == 0.25


def test_how_many_videos_would_do() -> None:
    """The number is enough for the same share, and a few less are not."""
    needed = stats.videos_needed(1.0, 0.6, 0.98, 6)
    assert needed is not None
    assert stats.wilson(1.0, needed)[0] >= 0.98 > stats.wilson(1.0, needed - 2)[0]
    assert stats.videos_needed(0.99, 0.97, 0.98, 50) == 200  # half the width: four times as many
    assert stats.videos_needed(0.98, 0.9, 0.98, 50) is None


HALF, AUTO_ENCODER = {"encoder_ratio": 0.5}, {"encoder_ratio": "auto"}


def row(ratio: float, agreement: Estimate, videos: int = 100, likelihood: Estimate | None = None) -> Row:
    tokens = 1000 * ratio
    return Row(
        Setting({"retention_ratio": ratio}), 2 * videos, videos, (tokens, tokens, tokens),
        agreement=agreement, likelihood=likelihood,
    )  # fmt: skip


def test_the_lower_bound_decides() -> None:
    """R = 0.1 has the higher value and the lower bound below the bar."""
    rows = [row(0.5, (1, 0.99, 1)), row(0.15, (0.985, 0.981, 0.99)), row(0.1, (0.99, 0.97, 1))]
    advice = advise(rows, 0.98, AGREEMENT, "org/model", ["--dtype", "float32"])
    assert advice.verdict == FOUND
    assert advice.options == "--plugin flashvid --flashvid-retention-ratio 0.15"
    assert "(98.5 %, lower bound 98.1 %;" in advice.sentence
    command = "vllm serve org/model --dtype float32 --plugin flashvid --flashvid-retention-ratio 0.15"
    assert command in advice.sentence
    assert "R = 0.1 may do as well: about 400 videos would tell" in advice.sentence
    assert advise(rows, 0.995, AGREEMENT, "m", []).verdict == TOO_FEW


def test_a_bound_just_below_the_bar_does_not_read_as_the_bar() -> None:
    sentence = advise([row(0.5, (0.9799, 0.96, 0.9799))], 0.98, AGREEMENT, "m", []).sentence
    assert "97.9" in sentence
    assert "98.0" not in sentence


def test_times_stay_above_nothing() -> None:
    """An interval about the median of few videos, one of them slow, that reaches below 0 seconds."""
    value, low, high = stats.median(np.array([0.1, 0.11, 0.12, 5.0]), np.arange(4))
    assert 0 < low < value < high


def test_none_keeps_enough() -> None:
    advice = advise([row(0.5, (0.9, 0.85, 0.94)), row(0.1, (0.5, 0.4, 0.6))], 0.98, AGREEMENT, "m", None)
    assert (advice.verdict, advice.options) == (NONE, "")
    assert "R = 0.5, keeps 90.0 % (upper bound 94.0 %)" in advice.sentence


def test_too_few_to_tell() -> None:
    """Above the bar it is told how many would show it, on the bar that none would, and of one video nothing."""
    advice = advise([row(0.5, (0.99, 0.95, 1), 25)], 0.98, AGREEMENT, "m", None)
    assert (advice.verdict, advice.videos) == (TOO_FEW, 400)
    assert "keeps 99.0 % of the plain model's answers (between 95.0 % and 100.0 %)" in advice.sentence
    assert "about 400 would do, if it stays so" in advice.sentence
    advice = advise([row(0.5, (0.98, 0.95, 1), 25)], 0.98, AGREEMENT, "m", None)
    assert (advice.verdict, advice.videos) == (TOO_FEW, None)
    assert "no number of videos would tell" in advice.sentence
    advice = advise([row(0.5, (0.9, -math.inf, math.inf), 1)], 0.98, AGREEMENT, "m", None)
    assert "begin with 20" in advice.sentence
    assert advise([], 0.98, AGREEMENT, "m", None).verdict == TOO_FEW


def test_more_videos_are_no_promise_of_success() -> None:
    """An estimate below the bar: so many videos would show that it keeps too little."""
    advice = advise([row(0.5, (0.6, 0, 1), 4)], 0.98, AGREEMENT, "m", None)
    assert (advice.verdict, advice.videos) == (TOO_FEW, 5)
    assert "about 5 videos would tell that it keeps too little" in advice.sentence
    assert "would do" not in advice.sentence
    rows = [row(0.5, (1, 0.99, 1)), row(0.1, (0.97, 0.9, 1))]
    assert "may do as well" not in advise(rows, 0.98, AGREEMENT, "m", None).sentence


def test_of_as_many_tokens_the_least_encoder_is_advised() -> None:
    """Fault: a share of the encoder's work that is never advised, or "auto" before a share that is known."""
    good = row(0.1, (0.99, 0.985, 1))
    rows = [replace(good, setting=Setting({"retention_ratio": 0.1, **more})) for more in ({}, AUTO_ENCODER, HALF)]
    options = "--plugin flashvid --flashvid-retention-ratio 0.1 --flashvid-encoder-ratio"
    assert advise(rows, 0.98, AGREEMENT, "m", None).options == f"{options} 0.5"
    assert advise(rows[:2], 0.98, AGREEMENT, "m", None).options == f"{options} auto"


def test_likelihood_may_decide() -> None:
    rows = [row(0.25, (0.1, 0, 0.2), likelihood=(0.99, 0.985, 1))]
    assert advise(rows, 0.98, AGREEMENT, "m", None).verdict == NONE
    assert advise(rows, 0.98, LIKELIHOOD, "m", None).verdict == FOUND


def test_settings_become_options_of_a_server() -> None:
    """What is advised is what was asked, and a server would take it."""
    import argparse

    from flashvid_vllm.serving.cli import add_options

    (setting,) = settings([], [64], ["adts"], {"min_segments": 1}, "original")
    assert setting.name == "B = 64, adts, min_segments 1, positions original"
    parser = argparse.ArgumentParser()
    add_options(parser, None)
    import shlex

    served = parser.parse_args(shlex.split(setting.options())).mm_processor_kwargs["flashvid"]
    assert served == {"token_budget": 64, "method": "adts", "min_segments": 1, "positions": "original"}
    less = settings([0.1], [], [], {}, None, [0.25, "auto"])
    assert [setting.name for setting in less] == ["R = 0.1, encoder 0.25", "R = 0.1, encoder auto"]
    assert less[1].options() == "--plugin flashvid --flashvid-retention-ratio 0.1 --flashvid-encoder-ratio auto"
    assert less[0].key != less[1].key
    with pytest.raises(UserError, match="both give encoder_ratio"):
        settings([0.1], [], [], {"encoder_ratio": 1}, None, [0.25])
    with pytest.raises(UserError, match="encoder_ratio must be a number"):
        settings([0.1], [], [], {}, None, [0.0])
    (setting,) = settings([0.1], [], [], {}, "consecutive")
    assert setting.options() == "--plugin flashvid --flashvid-retention-ratio 0.1"
    with pytest.raises(UserError, match="fastv"):
        settings([0.1], [], ["fastv"], {})
