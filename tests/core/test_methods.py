# SPDX-License-Identifier: MIT
"""Every method: exactly B tokens whatever comes, the same on every run; and vLLM's own masks."""

import importlib
import importlib.util
import itertools
import json
import sys
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress
from flashvid_vllm.core.config import ABLATIONS, Method
from flashvid_vllm.core.methods import PEERS
from tests.core.test_compress import assert_sound, same
from tests.support.cases import DTYPES, SHAPES, VIDEOS, video

VLLMS = ("evs", "vidcom2")  # call vLLM's own functions
HAS_VLLM = importlib.util.find_spec("vllm") is not None
METHODS = [name for name in get_args(Method) if HAS_VLLM or name not in VLLMS]
MERGING = [name for name, peer in PEERS.items() if peer.merges]
PRUNING = [name for name in METHODS if name in PEERS and not PEERS[name].merges]
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(method: str, backend: str = "torch", **size: Any) -> FlashVidConfig:
    arguments: Any = {"method": method, "backend": backend, **size}
    return FlashVidConfig(**arguments)


def test_the_table_is_what_is_offered() -> None:
    assert get_args(Method) == ("flashvid", *ABLATIONS, *PEERS)
    for name in PEERS:
        module = importlib.import_module(f"flashvid_vllm.core.methods.{name}")
        assert name in ("adaptive", "uniform") or "arXiv 2" in str(module.__doc__)
        assert "budget: says B" in str(module.compress.__doc__)


# Exactly B tokens, whatever comes

budgets = st.floats(0.01, 1).map(lambda ratio: {"retention_ratio": ratio}) | st.integers(1, 120).map(
    lambda budget: {"token_budget": budget}
)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 11),
    st.integers(1, 20),
    budgets,
    st.sampled_from(DTYPES),
    st.sampled_from(VIDEOS),
    st.sampled_from(["auto", "torch"]),
    st.integers(0, 99),
)
def test_exactly_the_budget(
    method: str, num_frames: int, n: int, size: Any, dtype: torch.dtype, kind: str, backend: str, seed: int
) -> None:
    features, attention = video(kind, num_frames, n, 9, dtype, seed)
    config = config_of(method, backend, **size)
    assert_sound(compress(features, attention, config), features, config)


@pytest.mark.parametrize("method", METHODS)
def test_awkward_budgets(method: str) -> None:
    for num_frames, n, d in SHAPES:
        features, attention = video("scene", num_frames, n, d)
        total = num_frames * n
        for tokens in {1, num_frames - 1 or 1, num_frames, n, total // 2 or 1, total - 1 or 1}:
            config = config_of(method, "auto", token_budget=tokens)
            out = compress(features, attention, config)
            assert_sound(out, features, config)
            assert len(out.tokens) == min(tokens, total)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_all_returns_the_features(method: str, dtype: torch.dtype) -> None:
    features, attention = video("nan", 3, 7, 8, dtype)
    out = compress(features, attention, config_of(method, retention_ratio=1))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.tokens.view(bits), features.flatten(0, 1).view(bits))
    assert torch.equal(out.assignment, torch.arange(21).view(3, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_on_every_run_thread_count_and_layout(method: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for kind, backend in itertools.product(("scene", "letterbox", "static"), ("auto", "torch")):
            features, attention = video(kind, 4, 25, 200, dtype)
            config = config_of(method, backend, retention_ratio=0.2)
            torch.set_num_threads(1)
            first = compress(features, attention, config)
            torch.set_num_threads(2)
            assert same(compress(features, attention, config), first)
            strided = torch.stack([features, features], dim=-1)[..., 1]
            assert same(compress(strided, attention.T.contiguous().T, config), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone(method: str) -> None:
    for kind in ("scene", "nan"):
        features, attention = video(kind, 4, 16, 8)
        kept = features.clone(), attention.clone()
        compress(features.requires_grad_(), attention, config_of(method))
        assert torch.equal(features.detach().nan_to_num(), kept[0].nan_to_num())
        assert torch.equal(attention, kept[1])


# What a kept token is


def members(out: CompressedVideo, features: Tensor, row: int) -> Tensor:
    return features.flatten(0, 1)[(out.assignment.flatten() == row)].double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*PRUNING, "adts"])
def test_pruning_copies_tokens_and_drops_the_others(method: str, dtype: torch.dtype) -> None:
    features, attention = video("scene", 4, 20, 33, dtype)
    out = compress(features, attention, config_of(method, retention_ratio=0.25))
    assert torch.equal(out.tokens, features.flatten(0, 1)[out.source_index])
    assert (out.size == 1).all()
    assert int((out.assignment >= 0).sum()) == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [name for name in MERGING if name != "fastvid"])  # which has a test of its own
def test_merged_tokens_are_means_of_what_they_stand_for(method: str, dtype: torch.dtype) -> None:
    features, attention = video("scene", 8, 40, 33, dtype)
    out = compress(features, attention, config_of(method, retention_ratio=0.3))
    expected = torch.stack([members(out, features, row).mean(0) for row in range(len(out.tokens))])
    rounded = 2 * torch.finfo(dtype).eps  # once, a sum in fp32
    torch.testing.assert_close(out.tokens.double(), expected, rtol=rounded, atol=1e-5)
    assert int(out.size.max()) > 1
    alone = out.size == 1
    assert torch.equal(out.tokens[alone], features.flatten(0, 1)[out.source_index[alone]])


@pytest.mark.parametrize("method", [name for name in PEERS if name in METHODS and name not in ("uniform", "evs")])
def test_what_is_not_finite_comes_last(method: str) -> None:
    # EVS keeps the first frame as it is, by rule, and uniform does not look.
    features, attention = video("scene", 6, 30, 16)
    features[:, 7, 3], features[2:4, 0], attention[1, 4] = torch.nan, torch.inf, torch.nan
    attention[:, 7] = 1
    config = config_of(method, retention_ratio=0.4)
    out = compress(features, attention, config)
    assert_sound(out, features, config)
    assert out.tokens.isfinite().all()


@pytest.mark.parametrize("method", ABLATIONS)
def test_an_ablation_is_flashvid_with_its_setting(method: str) -> None:
    features, attention = video("noise", 12, 20, 16)
    features = torch.stack([features[0].roll(t, 0) + 0.1 * frame for t, frame in enumerate(features)])  # it moves
    by_setting: Any = {"retention_ratio": 0.3, "backend": "torch", **ABLATIONS[method]}
    out = compress(features, attention, config_of(method, retention_ratio=0.3))
    assert same(out, compress(features, attention, FlashVidConfig(**by_setting)))
    assert not same(out, compress(features, attention, config_of("flashvid", retention_ratio=0.3)))


# Against vLLM's own masks


@needs_vllm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.25, 0.5, 0.9])
def test_evs_is_vllms_at_the_same_count(ratio: float, dtype: torch.dtype) -> None:
    from vllm.multimodal.video_prune import evs

    for seed in range(4):
        features, attention = video("scene", 12, 36, 64, dtype, seed)
        out = compress(features, attention, config_of("evs", retention_ratio=ratio))
        mask = evs.compute_retention_mask(features.flatten(0, 1), (12, 12, 12), 2, 1 - ratio)
        assert abs(int(mask.sum()) - len(out.tokens)) <= 1  # vLLM's int() of a product of doubles
        if mask.sum() == len(out.tokens):
            assert torch.equal(out.source_index, mask.nonzero().flatten())
    # fewer than a frame: vLLM keeps the first frame whole, its first of equals are ours
    out = compress(features, attention, config_of("evs", token_budget=20))
    assert out.source_index.tolist() == list(range(20))
    assert evs.compute_retention_mask(features.flatten(0, 1), (12, 12, 12), 2, 1 - 20 / 432)[:36].all()


@needs_vllm
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.25, 0.5, 0.9])
def test_vidcom2_is_vllms_at_the_same_count(ratio: float) -> None:
    # In fp32: 16-bit scores are full of ties, which vLLM's topk leaves open. At the rate of that count: vLLM's
    # frames share by its rate, ours by B, and floor(R*T*N) is not quite R*T*N.
    from vllm.multimodal.video_prune import vidcom2

    from flashvid_vllm.core.methods.evs import pruning_rate

    for kind, n, seed in itertools.product(("scene", "noise"), (36, 41), range(3)):
        features, attention = video(kind, 12, n, 64, seed=seed)
        out = compress(features, attention, config_of("vidcom2", retention_ratio=ratio))
        rate = pruning_rate(len(out.tokens), 12 * n)
        mask = vidcom2.compute_retention_mask(features.flatten(0, 1), (12, 1, n), 1, rate)
        assert torch.equal(out.source_index, mask.nonzero().flatten())
    features, attention = video("scene", 10, 40, 64)
    out = compress(features, attention, config_of("vidcom2", retention_ratio=ratio))
    mask = vidcom2.compute_retention_mask(features.flatten(0, 1), (10, 10, 16), 2, 1 - ratio)
    if mask.sum() == len(out.tokens):
        assert torch.equal(out.source_index, mask.nonzero().flatten())


@needs_vllm
@given(st.integers(1, 10**6), st.integers(2, 10**6))
def test_the_rate_at_which_vllm_keeps_so_many(kept: int, total: int) -> None:
    from flashvid_vllm.core.methods.evs import pruning_rate

    kept = min(kept, total - 1)
    rate = pruning_rate(kept, total)
    assert int(total * (1 - rate)) == kept
    assert rate == pytest.approx(1 - kept / total)


@pytest.mark.parametrize("method", VLLMS)
def test_without_vllm_its_methods_say_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vllm", "vllm.multimodal", "vllm.multimodal.video_prune"):
        monkeypatch.setitem(sys.modules, module, None)
    features, attention = video("scene", 3, 9, 8)
    with pytest.raises(ValueError, match=f"method='{method}' calls vLLM's own functions; install vllm"):
        compress(features, attention, config_of(method, retention_ratio=0.5))


# Attention, settings


@pytest.mark.parametrize("method", METHODS)
def test_attention_may_be_missing_where_it_is_not_read(method: str) -> None:
    features, attention = video("scene", 4, 20, 8)
    config = config_of(method, retention_ratio=0.4)
    assert config.needs_attention == (method in ("flashvid", "ttm", "adts", "visionzip", "fastvid"))
    if config.needs_attention:
        name = "method" if method in PEERS else "selection"
        with pytest.raises(ValueError, match=rf"{name}='\w+' needs attention \[T, N\], got None"):
            compress(features, None, config)
    else:
        for backend in ("auto", "torch"):
            config = config_of(method, backend, retention_ratio=0.4)
            assert same(compress(features, None, config), compress(features, attention, config))


@pytest.mark.parametrize("method", get_args(Method))
def test_the_settings_of_every_method_fit_the_row_that_carries_them(method: str) -> None:
    extremes: Any = {"retention_ratio": 0.1 + 0.2, "method": method, "backend": "native"}
    if method not in PEERS:
        extremes |= {"merge_threshold": -0.1 - 0.2, "segment_threshold": -0.1 - 0.2, "min_segments": 2**31 - 1}
        if "alpha" not in ABLATIONS.get(method, {}):
            extremes["alpha"] = 0.1 + 0.2
    config = FlashVidConfig(**extremes)
    assert len(json.dumps(config.to_dict())) <= 512
    assert FlashVidConfig(**json.loads(json.dumps(config.to_dict()))) == config
