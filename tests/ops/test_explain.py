# SPDX-License-Identifier: MIT
"""What stands for each token where budgets follow the video: C++ against torch, and ties, which are whole numbers.

Torch against brute force is tests/core/test_methods_oracle.py, Triton against torch interpreted/test_ops.py."""

import pytest
import torch
from torch import Tensor

from flashvid_vllm import ops
from flashvid_vllm.ops import native, reference
from tests.ops.conftest import ISAS
from tests.support.cases import DTYPES, SHAPES, VIDEOS, video
from tests.support.exactness import assert_explained

built = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "built")


def check(features: Tensor, tokens: int, still: float) -> None:
    got = native.explain_tokens(features, tokens, still)
    assert_explained(features, tokens, still, got, reference.explain_tokens(features, tokens, still))


@built
@pytest.mark.parametrize("shape", [*SHAPES, (3, 101, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch_does(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    whole = shape[0] * shape[1]
    for kind in VIDEOS if isa in (ISAS[0], ISAS[-1]) else ("scene", "nan"):
        features = video(kind, *shape, dtype)[0]
        for tokens in {1, -(-whole // 10), -(-whole // 3), whole}:
            check(features, tokens, 0.7)
        check(features, -(-whole // 3), 0)


@built
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e-3, 1e3, 1e12, 1e25])
def test_features_of_any_scale(isa: str, scale: float) -> None:
    features = video("scene", 4, 33, 40)[0]
    for scaled in (features * scale, (features * scale).bfloat16()):
        check(scaled, 30, 0.7)
    features[1:3, ::2] *= scale  # and of several
    check(features, 30, 0.7)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=built)])
@pytest.mark.parametrize("scale", [1e-23, 3e-23, 1e-22, 1e-19])
def test_lengths_that_fp32_has_not_cost_no_token(backend: str, scale: float) -> None:
    """Squares of such tokens lose their digits: their unit vectors may be longer than 1, and products above."""
    features = scale * video("noise", 4, 16, 8)[0].abs()
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (20, 40, 60):
            source = ops.explain_tokens(features.to(dtype), tokens, 0.7, backend)
            assert int((source == torch.arange(64).view(4, 16)).sum()) == tokens


@built
def test_equal_distances_give_equal_tokens(isa: str) -> None:
    """Of vectors with sixteen entries of 1/4 in any order of sums: whole numbers, and ties without end."""
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        words = torch.zeros(12, 40)
        for word in words:
            word[torch.randperm(40, generator=draw)[:16]] = 0.25
        features = words[torch.randint(12, (6, 30), generator=draw)]
        for tokens in (5, 18, 60):
            expected = reference.explain_tokens(features, tokens, 0.7)
            assert torch.equal(native.explain_tokens(features, tokens, 0.7), expected)
            assert torch.equal(ops.explain_tokens(features.half(), tokens, 0.7, "torch"), expected)


def test_a_number_of_tokens_that_is_none_is_refused() -> None:
    for tokens in (0, 13):
        with pytest.raises(ValueError, match=rf"tokens must be between 1 and T\*N=12, got {tokens}"):
            ops.explain_tokens(torch.ones(3, 4, 5), tokens, 0.7)
        if not native.MISSING:
            with pytest.raises(ValueError, match="tokens must be between 1 and"):
                native.explain_tokens(torch.ones(3, 4, 5), tokens, 0.7)
