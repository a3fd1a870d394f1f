# SPDX-License-Identifier: MIT
"""The budget: exact integers, the same on every machine."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashvid_vllm
from flashvid_vllm.core.budget import Budget, plan
from flashvid_vllm.core.config import FlashVidConfig

frames = st.integers(1, 400)
tokens = st.integers(1, 1000)
ratios = st.floats(1e-6, 1) | st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
alphas = st.floats(0, 1) | st.integers(0, 100).map(lambda hundredths: hundredths / 100)
configs = st.builds(FlashVidConfig, retention_ratio=ratios, alpha=alphas) | st.builds(
    FlashVidConfig, token_budget=st.integers(1, 10**6), alpha=alphas
)


@pytest.mark.parametrize(
    ("num_frames", "n", "ratio", "alpha", "budget", "selected_per_frame"),
    [
        (1, 360, 0.7, 1.0, 252, 252),  # 251 in doubles
        (32, 196, 0.1, 0.7, 627, 14),  # 13.7 rounds up
        (32, 196, 0.25, 0.7, 1568, 34),  # 34.3 rounds down
        (2, 10, 0.5, 0.5, 10, 3),  # half goes up, not to the even 2
        (2, 10, 0.45, 1.0, 9, 4),  # 4.5 rounds to 5, but 9 // 2 is 4
        (10, 10, 0.05, 0.7, 5, 0),  # fewer tokens than frames
        (1, 1, 0.001, 0.7, 1, 1),  # never none
        (3, 7, 1.0, 0.7, 21, 5),
    ],
)
def test_examples(num_frames: int, n: int, ratio: float, alpha: float, budget: int, selected_per_frame: int) -> None:
    planned = plan(num_frames, n, FlashVidConfig(retention_ratio=ratio, alpha=alpha))
    assert planned == Budget(num_frames, n, budget, selected_per_frame, budget)


def test_token_budget_is_at_most_the_video() -> None:
    assert plan(4, 5, FlashVidConfig(token_budget=7)).tokens == 7
    whole = plan(4, 5, FlashVidConfig(token_budget=21))
    assert whole.tokens == 20
    assert whole.is_identity


@pytest.mark.parametrize(
    ("ratio", "layer", "left", "depth", "tokens", "inside"),
    [
        (0.1, 20, 0.3, 28, 784, 235),  # 1.25 x 627.2
        (0.1, 28, 0.1, 36, 784, 78),  # 36 / 28.8 = 1.25 again
        (0.9, 20, 0.3, 28, 6272, 4076),  # no more than there are: the others are in the later layers
        (1.0, 20, 0.3, 28, 6272, 6272),
        (0.3, 1, 1.0, 4, 1881, 1881),  # nothing is dropped
        (0.0001, 1, 0.1, 2, 1, 1),  # never none
        (0.7, 3, 0.01, 10, 6272, 3584),
    ],
)
def test_more_tokens_enter_where_some_are_dropped_inside(
    ratio: float, layer: int, left: float, depth: int, tokens: int, inside: int
) -> None:
    """32 x 196 tokens; the mean over the layers is at most the ratio's."""
    config = FlashVidConfig(retention_ratio=ratio, inner=True, inner_layer=layer, inner_ratio=left, inner_depth=depth)
    budget = plan(32, 196, config)
    assert (budget.tokens, budget.inner_tokens) == (tokens, inside)
    mean = Fraction(layer * tokens + (depth - layer) * inside, depth)
    assert mean <= max(Fraction(1), Fraction(repr(ratio)) * 6272)


def test_fastv_drops_inside_alone() -> None:
    budget = plan(32, 196, FlashVidConfig(method="fastv", retention_ratio=0.1))
    assert (budget.tokens, budget.inner_tokens, budget.is_identity) == (6272, 627, True)
    assert plan(4, 5, FlashVidConfig(method="fastv", token_budget=7)).inner_tokens == 7
    hybrid = FlashVidConfig(token_budget=100, inner=True, inner_layer=20, inner_ratio=0.3, inner_depth=28)
    assert (plan(32, 196, hybrid).tokens, plan(32, 196, hybrid).inner_tokens) == (125, 37)
    with pytest.raises(ValueError, match="inner needs inner_layer, inner_ratio, inner_depth"):
        plan(4, 5, FlashVidConfig(inner=True))


@pytest.mark.parametrize(("num_frames", "n", "name"), [(0, 5, "num_frames"), (5, -1, "tokens_per_frame")])
def test_refused(num_frames: int, n: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got {min(num_frames, n)}"):
        plan(num_frames, n, FlashVidConfig())


@settings(deadline=None, max_examples=200)
@given(frames, tokens, configs)
def test_properties(num_frames: int, n: int, config: FlashVidConfig) -> None:
    budget = plan(num_frames, n, config)
    assert 1 <= budget.tokens <= budget.total == num_frames * n
    assert 0 <= budget.selected_per_frame <= n
    assert budget.merged >= 0
    assert budget.selected + budget.merged == budget.tokens
    assert budget.merged_before(0) == 0
    assert budget.merged_before(num_frames) == budget.merged
    shares = [budget.merged_before(t + 1) - budget.merged_before(t) for t in range(num_frames)]
    assert max(shares) - min(shares) <= 1
    assert max(shares) <= n - budget.selected_per_frame  # what the root guarantee rests on


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 30), st.integers(1, 60), ratios, alphas)
def test_against_counting(num_frames: int, n: int, ratio: float, alpha: float) -> None:
    budget = plan(num_frames, n, FlashVidConfig(retention_ratio=ratio, alpha=alpha))
    exact = Decimal(repr(ratio)) * num_frames * n
    assert budget.tokens == max([count for count in range(1, num_frames * n + 1) if count <= exact], default=1)
    per_frame = Fraction(repr(alpha)) * budget.tokens / num_frames
    fits = [k for k in range(n + 1) if k - Fraction(1, 2) <= per_frame and k * num_frames <= budget.tokens]
    assert budget.selected_per_frame == max(fits)


def test_more_ratio_never_means_fewer_tokens() -> None:
    counts = [plan(7, 33, FlashVidConfig(retention_ratio=r / 500)).tokens for r in range(1, 501)]
    assert counts == sorted(counts)


def test_needs_no_torch() -> None:
    # Under a stand-in for the package, whose own __init__ offers compress() and so needs torch.
    code = (
        "import sys, types; package = types.ModuleType('flashvid_vllm'); package.__path__ = [sys.argv[1]];"
        "sys.modules.update({'flashvid_vllm': package, 'torch': None}); import flashvid_vllm.core.budget"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(flashvid_vllm.__file__).parent)], check=True)
