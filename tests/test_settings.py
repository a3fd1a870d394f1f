# SPDX-License-Identifier: MIT
"""Settings of server and request: checked, put together, never silently dropped."""

from typing import Any

import pytest

from flashvid_vllm.config import FlashVidConfig
from flashvid_vllm.settings import check_request, check_server, describe, request_part, resolve

PRESET = {"min_segments": 4, "selection": "attention_diversity"}

BAD_REQUESTS: list[tuple[Any, str]] = [
    ({"retention_ratio": 0}, "retention_ratio"),
    ({"retention_ratio": -0.1}, "-0.1"),
    ({"retention_ratio": 1.5}, "1.5"),
    ({"retention_ratio": float("nan")}, "nan"),
    ({"retention_ratio": "0.1"}, "'0.1'"),
    ({"retention_ratio": True}, "True"),
    ({"token_budget": 0}, "token_budget"),
    ({"token_budget": 1.5}, "1.5"),
    ({"token_budget": 10**30}, "token_budget"),
    ({"retention_ratio": 0.1, "token_budget": 5}, "exclude each other"),
    ({"retention_ration": 0.1}, "did you mean 'retention_ratio'"),
    ({"alpha": 1.1}, "alpha"),
    ({"alpha": None}, "alpha"),
    ({"selection": "best"}, "attention_diversity"),
    ({"selection": ["attention"]}, "selection"),
    ({"backend": "cuda"}, "backend"),
    ({"backend": []}, "backend"),
    ({"enabled": "yes"}, "enabled"),
    ({"request_overrides": False}, "request_overrides"),
    ([0.1], "must be an object"),
    ("0.1", "must be an object"),
    (0.1, "must be an object"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_REQUESTS)
def test_a_bad_request_names_what_is_wrong(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(settings, {})


@pytest.mark.parametrize(("settings", "message"), BAD_REQUESTS)
def test_a_bad_server_option_names_what_is_wrong(settings: Any, message: str) -> None:
    if settings == {"request_overrides": False}:
        assert check_server(settings) == settings
        return
    with pytest.raises(ValueError, match=message):
        check_server(settings)


def test_a_request_cannot_choose_the_backend() -> None:
    """One that this server has not would raise in the engine."""
    with pytest.raises(ValueError, match="the server chooses the backend"):
        check_request({"backend": "torch"}, {})
    assert check_server({"backend": "torch"}) == {"backend": "torch"}


@pytest.mark.parametrize("key", ["flashvidd", "flashVid", "flash_vid", "flashvi", "FLASHVID"])
def test_a_near_miss_of_the_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.*did you mean 'flashvid'"):
        request_part({key: {"retention_ratio": 0.1}})


def test_other_keys_are_not_ours() -> None:
    assert request_part({"fps": 2, "max_pixels": 10, "flash_attention": True}) is None
    assert request_part({"fps": 2, "flashvid": {"alpha": 1}}) == {"alpha": 1}
    assert request_part(None) is None


def test_null_is_not_an_object() -> None:
    with pytest.raises(ValueError, match="null"):
        request_part({"flashvid": None})


def test_request_over_server_over_preset_over_defaults() -> None:
    server = check_server({"retention_ratio": 0.1, "alpha": 0.6})
    assert resolve(server, None, PRESET) == FlashVidConfig(
        retention_ratio=0.1, alpha=0.6, min_segments=4, selection="attention_diversity"
    )
    assert resolve(server, {"alpha": 0.5}, PRESET) == FlashVidConfig(
        retention_ratio=0.1, alpha=0.5, min_segments=4, selection="attention_diversity"
    )


def test_a_request_replaces_ratio_by_budget_and_back() -> None:
    by_ratio, by_budget = check_server({"retention_ratio": 0.1}), check_server({"token_budget": 64})
    config = resolve(by_ratio, {"token_budget": 32}, {})
    assert config is not None
    assert (config.retention_ratio, config.token_budget) == (None, 32)
    config = resolve(by_budget, {"retention_ratio": 0.5}, {})
    assert config is not None
    assert (config.retention_ratio, config.token_budget) == (0.5, None)


def test_enabled() -> None:
    off = check_server({"enabled": False})
    assert resolve(off, None, {}) is None
    assert resolve(off, {"alpha": 0.5}, {}) is None
    assert resolve(off, {"retention_ratio": 0.5}, {}) == FlashVidConfig(retention_ratio=0.5)
    assert resolve(off, {"enabled": True}, {}) == FlashVidConfig()
    assert resolve({}, {"enabled": False}, {}) is None
    assert resolve({}, {"enabled": False, "retention_ratio": 0.5}, {}) is None


def test_a_server_can_close_itself_to_requests() -> None:
    with pytest.raises(ValueError, match="--no-flashvid-request-overrides"):
        check_request({"alpha": 0.5}, check_server({"request_overrides": False}))


def test_the_start_line_names_what_is_in_force() -> None:
    line = describe(check_server({"retention_ratio": 0.1, "request_overrides": False}), PRESET)
    assert "retention_ratio=0.1" in line
    assert "min_segments=4" in line
    assert "requests may not change it" in line
    assert "off unless" in describe({"enabled": False}, PRESET)
