# SPDX-License-Identifier: MIT
"""Settings: defaults, what is refused and in which words."""

import dataclasses
import re
from typing import Any, get_args

import numpy as np
import pytest

from flashvid_vllm.core.config import (
    ABLATIONS,
    CONFIG_KEYS,
    DEFAULT_RETENTION_RATIO,
    FLASHVID_SETTINGS,
    MAX_INT,
    FlashVidConfig,
    Method,
)
from flashvid_vllm.core.methods import PEERS

OFFERED = (
    "flashvid, ttm, adts, tstm, evs, vidcom2, visionzip, fastvid, prunevid, tome, divprune, vcast, gleanvid, "
    "adaptive, uniform, fastv"
)


def test_defaults() -> None:
    assert FlashVidConfig().to_dict() == {
        "retention_ratio": DEFAULT_RETENTION_RATIO,
        "token_budget": None,
        "method": "flashvid",
        "alpha": 0.7,
        "merge_threshold": 0.8,
        "segment_threshold": 0.9,
        "min_segments": 8,
        "selection": "attention_diversity_event",
        "matching": "tree",
        "suppress_sinks": False,
        "backend": "auto",
        "encoder_ratio": 1.0,
        "encoder_reuse": "tokens",
        "inner": False,
        "inner_layer": None,
        "inner_ratio": None,
        "inner_depth": None,
    }


def test_a_budget_takes_the_place_of_the_default_ratio() -> None:
    assert FlashVidConfig(token_budget=100).retention_ratio is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention_ratio": 0}, "retention_ratio must be a number in (0, 1], got 0"),
        ({"retention_ratio": -0.1}, "retention_ratio must be a number in (0, 1], got -0.1"),
        ({"retention_ratio": 1.01}, "retention_ratio must be a number in (0, 1], got 1.01"),
        ({"retention_ratio": float("nan")}, "retention_ratio must be a number in (0, 1], got nan"),
        ({"retention_ratio": "0.1"}, "retention_ratio must be a number in (0, 1], got '0.1' (str)"),
        ({"retention_ratio": True}, "retention_ratio must be a number in (0, 1], got True (bool)"),
        ({"encoder_ratio": 0}, 'encoder_ratio must be a number in (0, 1] or "auto", got 0'),
        ({"encoder_ratio": 1.5}, 'encoder_ratio must be a number in (0, 1] or "auto", got 1.5'),
        ({"encoder_ratio": "Auto"}, "encoder_ratio must be a number in (0, 1] or \"auto\", got 'Auto' (str)"),
        ({"encoder_ratio": False}, 'encoder_ratio must be a number in (0, 1] or "auto", got False (bool)'),
        ({"encoder_reuse": "frame"}, "encoder_reuse must be one of tokens, frames; got 'frame'"),
        ({"token_budget": 0}, f"token_budget must be a whole number from 1 to {MAX_INT}, got 0"),
        ({"token_budget": 2**31}, f"token_budget must be a whole number from 1 to {MAX_INT}, got {2**31}"),
        ({"token_budget": 10.0}, "token_budget must be a whole number >= 1, got 10.0 (float)"),
        ({"token_budget": True}, "token_budget must be a whole number >= 1, got True (bool)"),
        ({"token_budget": "9"}, "token_budget must be a whole number >= 1, got '9' (str)"),
        (
            {"retention_ratio": 0.1, "token_budget": 9},
            "retention_ratio=0.1 and token_budget=9 exclude each other; give one of them",
        ),
        ({"alpha": -0.1}, "alpha must be a number in [0, 1], got -0.1"),
        ({"alpha": float("inf")}, "alpha must be a number in [0, 1], got inf"),
        ({"alpha": None}, "alpha must be a number in [0, 1], got None (NoneType)"),
        ({"merge_threshold": -1.5}, "merge_threshold must be a number in [-1, 1], got -1.5"),
        ({"segment_threshold": 2}, "segment_threshold must be a number in [-1, 1], got 2"),
        ({"min_segments": 0}, f"min_segments must be a whole number from 1 to {MAX_INT}, got 0"),
        ({"min_segments": 2.5}, "min_segments must be a whole number >= 1, got 2.5 (float)"),
        (
            {"selection": "random"},
            "selection must be one of attention_diversity_event, attention_diversity, attention, diversity; "
            "got 'random'",
        ),
        ({"matching": ["tree"]}, "matching must be one of tree, position; got ['tree']"),
        ({"suppress_sinks": 1}, "suppress_sinks must be true or false, got 1"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, native, triton; got 'cuda'"),
        ({"method": "best"}, f"method must be one of {OFFERED}; got 'best'"),
        ({"method": ["evs"]}, f"method must be one of {OFFERED}; got ['evs']"),
        ({"method": None}, f"method must be one of {OFFERED}; got None"),
        ({"inner": 1}, "inner must be true or false, got 1"),
        ({"inner_layer": 3}, "inner_layer=3 is read where inner is true; set that too"),
        ({"inner": True, "inner_layer": 0}, "inner_layer must be a whole number from 1 to 2147483647, got 0"),
        ({"inner": True, "inner_ratio": 0}, "inner_ratio must be a number in (0, 1], got 0"),
        (
            {"inner": True, "inner_layer": 28, "inner_depth": 28},
            "inner_layer=28 must be below the language model's 28 layers",
        ),
        (
            {"method": "fastv", "inner_ratio": 0.5},
            "inner_ratio=0.5: method='fastv' keeps the retention_ratio or the token_budget inside the LLM; "
            "leave it out",
        ),
        (
            {"method": "fastv", "alpha": 0.5},
            "alpha=0.5 is a setting of FlashVID, which method='fastv' does not read; leave it out",
        ),
        (
            {"method": "adts", "alpha": 0.5},
            "method='adts' means alpha=1.0 and excludes alpha=0.5; leave one of them out",
        ),
        (
            {"method": "tstm", "alpha": 1},
            "method='tstm' means alpha=0.0 and excludes alpha=1.0; leave one of them out",
        ),
        (
            {"method": "evs", "alpha": 0.5},
            "alpha=0.5 is a setting of FlashVID, which method='evs' does not read; leave it out",
        ),
        (
            {"method": "tome", "matching": "position"},
            "matching='position' is a setting of FlashVID, which method='tome' does not read; leave it out",
        ),
        ({"method": "evs", "alpha": 2}, "alpha must be a number in [0, 1], got 2"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FlashVidConfig(**settings)


@pytest.mark.parametrize("ratio", [1, 1.0, 1e-9, np.float32(0.5)])
def test_ratio_becomes_a_float(ratio: Any) -> None:
    assert type(FlashVidConfig(retention_ratio=ratio).retention_ratio) is float


def test_numpy_integer_becomes_an_int() -> None:
    assert type(FlashVidConfig(token_budget=np.int64(5)).token_budget) is int  # type: ignore[arg-type]


def test_bounds_are_allowed() -> None:
    FlashVidConfig(alpha=0, merge_threshold=-1, segment_threshold=1, min_segments=1)
    FlashVidConfig(alpha=1, merge_threshold=1, segment_threshold=-1, min_segments=MAX_INT)


def test_frozen_and_hashable() -> None:
    config = FlashVidConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.5  # type: ignore[misc]
    assert hash(config) == hash(FlashVidConfig())


def test_round_trip() -> None:
    config = FlashVidConfig(token_budget=77, alpha=0.3, selection="diversity")
    assert FlashVidConfig(**config.to_dict()) == config
    assert FlashVidConfig.from_mapping(config.to_dict()) == config
    assert set(config.to_dict()) == set(CONFIG_KEYS)


def test_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown FlashVID setting 'alhpa'; did you mean 'alpha'\?"):
        FlashVidConfig.from_mapping({"alhpa": 0.5})
    with pytest.raises(ValueError, match="unknown FlashVID setting 'zzz'; known: retention_ratio, "):
        FlashVidConfig.from_mapping({"zzz": 1})


def test_the_encoders_share_is_every_methods() -> None:
    """It is read before any of them; 1 in whatever form is off."""
    for method in get_args(Method):
        assert FlashVidConfig(method=method, encoder_ratio=0.5, encoder_reuse="frames").encodes_less
    assert FlashVidConfig(encoder_ratio="auto").encodes_less
    assert not FlashVidConfig(encoder_ratio=1, encoder_reuse="frames").encodes_less


def test_needs_attention() -> None:
    assert FlashVidConfig(selection="attention").needs_attention
    assert not FlashVidConfig(selection="diversity").needs_attention
    assert not FlashVidConfig(alpha=0).needs_attention
    assert not FlashVidConfig(method="adts", selection="diversity").needs_attention
    assert FlashVidConfig(method="visionzip").needs_attention
    assert not FlashVidConfig(method="evs").needs_attention


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_round_trips(method: Method) -> None:
    config = FlashVidConfig(token_budget=77, method=method)
    assert FlashVidConfig(**config.to_dict()) == config
    assert FlashVidConfig.from_mapping(config.to_dict()) == config
    assert dataclasses.replace(config, token_budget=78).method == method
    assert dataclasses.replace(FlashVidConfig(token_budget=77), method=method) == config


def test_an_ablation_sets_what_it_means_and_takes_the_rest() -> None:
    assert FlashVidConfig(method="ttm").matching == "position"
    assert FlashVidConfig(method="adts").alpha == 1
    assert FlashVidConfig(method="tstm").alpha == 0
    assert FlashVidConfig(method="ttm", matching="position", alpha=0.5).alpha == 0.5
    for method in ABLATIONS:
        settings: dict[str, Any] = {"method": method, "min_segments": 4, "selection": "attention", **ABLATIONS[method]}
        assert FlashVidConfig(**settings).min_segments == 4


@pytest.mark.parametrize("method", PEERS)
def test_a_peer_takes_no_setting_of_flashvid(method: str) -> None:
    other: dict[str, Any] = {
        "alpha": 0.1, "merge_threshold": 0.1, "segment_threshold": 0.1, "min_segments": 2,
        "selection": "diversity", "matching": "position", "suppress_sinks": True,
    }  # fmt: skip
    assert set(other) == set(FLASHVID_SETTINGS)
    for name, value in other.items():
        settings: dict[str, Any] = {"method": method, name: value}
        with pytest.raises(ValueError, match=f"^{name}=.* which method='{method}' does not read; leave it out$"):
            FlashVidConfig(**settings)
