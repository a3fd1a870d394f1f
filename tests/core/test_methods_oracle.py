# SPDX-License-Identifier: MIT
"""Every peer's method against a slow implementation of its definition."""

import os

import pytest
import torch

from flashvid_vllm import CompressedVideo, compress
from tests.core.test_compress import assert_sound
from tests.support.cases import DTYPES, video

from ..support.oracles.methods import SLOW, slow_fastvid_tokens
from .test_methods import METHODS, config_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = os.environ.get("FLASHVID_TESTS") == "quick"


def places(out: CompressedVideo) -> list[int]:
    """The source index of the token that each original token went to, or -1."""
    return torch.where(out.assignment >= 0, out.source_index[out.assignment], -1).flatten().tolist()


@pytest.mark.longer
@pytest.mark.parametrize("kind", ["noise", "slow", "alike"])
@pytest.mark.parametrize("method", [name for name in SLOW if name in METHODS])
def test_against_a_slow_implementation(method: str, kind: str) -> None:
    shapes = [(1, 12, 8), (4, 9, 8), (9, 7, 8), (3, 40, 8), (24, 4, 8)]
    shapes += [] if QUICK else [(12, 12, 16)]  # half of the time
    for seed, (num_frames, n, d) in enumerate(shapes):
        features, attention = video("scene" if kind == "slow" else "noise", num_frames, n, d, seed=seed)
        if kind == "slow":  # half of the positions stand still
            features[:, : n // 2] = features[0, : n // 2] + 0.1 * features[:, : n // 2]
        elif kind == "alike":  # all have much in common
            features += 1.5 * features[0, 0]
        total = num_frames * n
        for tokens in {max(1, total * percent // 100) for percent in (5, 25, 45, 80)}:
            config = config_of(method, token_budget=tokens)
            out = compress(features, attention, config)
            assert_sound(out, features, config)
            went = SLOW[method](features.double().numpy(), attention.double().numpy(), tokens)
            assert places(out) == [went.get(i, -1) for i in range(total)], (num_frames, n, tokens)


EXACT = [name for name in SLOW if name in METHODS and name not in ("tome", "vidcom2", "gleanvid")]


@pytest.mark.parametrize("method", EXACT)
def test_ties_go_to_the_lowest_index(method: str) -> None:
    # Four orthogonal vectors: what ties in doubles ties in fp32. Means of ToMe's three and VidCom2's exp() do not, and
    # GleanVID's first singular vector is not one of them alone.
    for seed, (num_frames, n) in enumerate([(1, 16), (2, 8), (4, 8), (8, 16), (16, 4)]):
        likes = torch.randint(4, (num_frames, n), generator=torch.Generator().manual_seed(seed))
        features, attention = torch.eye(4)[likes], torch.ones(num_frames, n)
        for tokens in {max(1, num_frames * n * percent // 100) for percent in (10, 25, 50, 80)}:
            out = compress(features, attention, config_of(method, token_budget=tokens))
            went = SLOW[method](features.double().numpy(), attention.double().numpy(), tokens)
            assert places(out) == [went.get(i, -1) for i in range(num_frames * n)], (num_frames, n, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [60, 150])
def test_fastvid_merges_into_every_anchor_frame(tokens: int, dtype: torch.dtype) -> None:
    features, attention = video("noise", 16, 20, 16, dtype)
    features = (features + 3 * features[0, 0]).contiguous()  # long segments
    out = compress(features, attention, config_of("fastvid", token_budget=tokens))
    _, made = slow_fastvid_tokens(features.double().numpy(), attention.double().numpy(), tokens)
    assert made
    for row, index in enumerate(out.source_index.tolist()):
        expected = torch.from_numpy(made.get(index, features.flatten(0, 1)[index].double().numpy()))
        rounded = torch.finfo(dtype).eps
        torch.testing.assert_close(out.tokens[row].double(), expected, rtol=rounded, atol=1e-5)
