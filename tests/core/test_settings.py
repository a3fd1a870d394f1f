# SPDX-License-Identifier: MIT
"""Settings of server and request: checked, put together, never silently dropped."""

from typing import Any

import pytest

from flashvid_vllm.core import settings
from flashvid_vllm.core.config import FlashVidConfig
from flashvid_vllm.core.settings import check_request, check_server, describe, request_part, resolve

PRESET: dict[str, Any] = {"min_segments": 4, "selection": "attention_diversity"}

BAD_REQUESTS: list[tuple[Any, str]] = [
    ({"retention_ratio": 0}, "retention_ratio"),
    ({"retention_ratio": -0.1}, "-0.1"),
    ({"retention_ratio": 1.5}, "1.5"),
    ({"retention_ratio": float("nan")}, "nan"),
    ({"retention_ratio": "0.1"}, "'0.1'"),
    ({"retention_ratio": 10**400}, r"retention_ratio must be a number in \(0, 1\], got 10{99}\.\.\."),
    ({"alpha": -(10**400)}, r"alpha must be a number in \[0, 1\], got -10"),
    ({"selection": "x" * 2**20}, r"got 'x{99}\.\.\."),
    ({"y" * 2**20: 1}, r"unknown FlashVID setting 'y{99}\.\.\.; known"),
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
    ({"method": "fastv", "alpha": 0.5}, "alpha=0.5 is a setting of FlashVID, which method='fastv' does not read"),
    ({"inner": None}, "inner must not be null"),
    ({"method": "evsi"}, "method must be one of flashvid, .*got 'evsi'"),
    ({"method": None}, "method must not be null"),
    ({"method": "evs", "alpha": 0.5}, "alpha=0.5 is a setting of FlashVID, which method='evs' does not read"),
    ({"method": "evs", "alpha": 0.7}, "alpha=0.7 is a setting of FlashVID"),
    ({"method": "adts", "alpha": 0.7}, "method='adts' means alpha=1.0 and excludes alpha=0.7"),
    ({"method": "ttm", "matching": "tree"}, "method='ttm' means matching='position' and excludes matching='tree'"),
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


@pytest.mark.parametrize(("name", "value"), [("backend", "torch"), ("positions", "original"), ("max_video_tokens", 9)])
def test_a_request_cannot_choose_what_is_the_servers(name: str, value: Any) -> None:
    """A backend that this server has not would raise in the engine; positions are the model's."""
    with pytest.raises(ValueError, match=f"{name}={value!r}: the server chooses the "):
        check_request({name: value}, {})
    assert check_server({name: value}) == {name: value}


INNER: dict[str, Any] = {
    "inner": True,
    "inner_layer": 20,
    "inner_ratio": 0.3,
    "inner_depth": 28,
}  # of a server that has started


def test_a_layer_or_a_share_switches_dropping_inside_on() -> None:
    assert check_server({"inner_layer": 3}) == {"inner_layer": 3, "inner": True}
    assert check_server({"inner_ratio": 0.5, "inner": False}) == {"inner_ratio": 0.5, "inner": False}
    assert check_server({"inner": True}) == {"inner": True}
    with pytest.raises(ValueError, match="method='fastv' is inner=True"):
        check_server({"method": "fastv", "inner": False})


def test_a_request_may_leave_out_what_is_dropped_inside() -> None:
    """Its budget is then what it was without."""
    hybrid, plain = resolve(INNER, None, {}), resolve(INNER, {"inner": False}, {})
    assert hybrid == FlashVidConfig(**INNER)
    assert plain == FlashVidConfig()
    assert resolve(INNER, {"retention_ratio": 0.1}, {}) == FlashVidConfig(retention_ratio=0.1, **INNER)
    off = INNER | {"inner": False}
    assert resolve(off, None, {}) == FlashVidConfig()
    assert resolve(off, {"inner": True}, {}) == hybrid
    assert resolve(INNER, {"enabled": False}, {}) is None
    assert check_request({"inner": False}, {}) == {"inner": False}
    with pytest.raises(ValueError, match="inner=True: this server drops nothing inside the LLM; leave it out"):
        check_request({"inner": True}, {})
    assert "inner" not in describe({}, {})
    assert "inner_layer=20, inner_ratio=0.3, inner_depth=28" in describe(INNER, {})


def test_fastv_belongs_to_the_server() -> None:
    """Another method's request drops nothing inside: the layer is FastV's."""
    server: dict[str, Any] = {"method": "fastv", "inner": True, "inner_layer": 2, "inner_depth": 28}
    fastv = resolve(server, None, {"min_segments": 4})
    assert fastv == FlashVidConfig(method="fastv", inner_layer=2, inner_depth=28)
    assert resolve(server, {"method": "evs"}, {}) == FlashVidConfig(method="evs")
    assert resolve(server, {"inner": False}, {}) is None
    asked = check_request({"method": "fastv", "retention_ratio": 0.5}, server)
    assert resolve(server, asked, {}) == FlashVidConfig(
        retention_ratio=0.5, method="fastv", inner_layer=2, inner_depth=28
    )
    with pytest.raises(ValueError, match=r"method='evs' drops nothing inside the LLM where .* and excludes inner=True"):
        check_request({"method": "evs", "inner": True}, server)
    for beside in ({"retention_ratio": 0.1}, {"method": "fastv", "token_budget": 9}, {"encoder_ratio": 0.5}):
        with pytest.raises(ValueError, match=rf"inner=False is the plain model .* excludes {list(beside)[-1]}; leave"):
            check_request({"inner": False, **beside}, server)
    assert check_request({"inner": False, "method": "evs", "retention_ratio": 0.1}, server)
    with pytest.raises(ValueError, match="method='fastv': this server was not started with it"):
        check_request({"method": "fastv"}, INNER)


@pytest.mark.parametrize("value", ["spread", None, 1])
def test_unknown_positions(value: Any) -> None:
    with pytest.raises(ValueError, match=f"positions must be one of consecutive, original, got {value!r}"):
        check_server({"positions": value})


@pytest.mark.parametrize("value", [0, -1, 1.5, "9", True, None])
def test_a_bad_size_of_the_longest_video(value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_video_tokens must be a whole number of at least 1, got {value!r}"):
        check_server({"max_video_tokens": value})


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


def test_a_request_for_less_encoding_alone_keeps_every_token_where_the_server_is_off() -> None:
    """Faults: the request is answered by the plain model, as if it had said nothing; tokens go that nobody gave up."""
    off = check_server({"enabled": False, "retention_ratio": 0.1, "encoder_reuse": "frames"})
    found = resolve(off, check_request({"encoder_ratio": 0.5}, off), PRESET)
    assert found == FlashVidConfig(1.0, encoder_ratio=0.5, encoder_reuse="frames", **PRESET)
    assert resolve({"enabled": False, "token_budget": 9}, {"encoder_ratio": "auto"}, {}) == FlashVidConfig(
        1.0, encoder_ratio="auto"
    )
    both = resolve(off, {"encoder_ratio": 0.5, "token_budget": 9}, PRESET)
    assert both is not None
    assert (both.retention_ratio, both.token_budget, both.encoder_ratio) == (None, 9, 0.5)
    for request in ({"encoder_ratio": 1}, {"encoder_reuse": "tokens"}, {"enabled": False, "encoder_ratio": 0.5}):
        assert resolve(off, request, PRESET) is None
    on = resolve({"retention_ratio": 0.1}, {"encoder_ratio": 0.5}, PRESET)
    assert on is not None
    assert on.retention_ratio == 0.1


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


def test_a_method_may_be_asked_for_like_any_setting() -> None:
    server = check_server({"retention_ratio": 0.1, "alpha": 0.6})
    request = check_request({"method": "evs"}, server)
    assert resolve(server, request, PRESET) == FlashVidConfig(retention_ratio=0.1, method="evs")
    request = check_request({"method": "adts", "token_budget": 9}, server)
    assert resolve(server, request, PRESET) == FlashVidConfig(
        token_budget=9, method="adts", min_segments=4, selection="attention_diversity"
    )
    # the server's settings of FlashVID are back where a request asks for it
    server = check_server({"method": "evs", "retention_ratio": 0.1})
    assert resolve(server, None, PRESET) == FlashVidConfig(retention_ratio=0.1, method="evs")
    request = check_request({"method": "flashvid", "alpha": 0.6}, server)
    assert resolve(server, request, PRESET) == FlashVidConfig(
        retention_ratio=0.1, alpha=0.6, min_segments=4, selection="attention_diversity"
    )


@pytest.mark.parametrize(
    ("server", "request_", "message"),
    [
        ({"method": "evs"}, {"alpha": 0.5}, "alpha=0.5 is a setting of FlashVID, which method='evs' does not read"),
        ({"method": "evs"}, {"alpha": 0.7}, "alpha=0.7 is a setting of FlashVID"),
        ({"method": "adts"}, {"alpha": 0.7}, "method='adts' means alpha=1.0 and excludes alpha=0.7"),
    ],
)
def test_a_request_cannot_set_what_the_servers_method_does_not_read(
    server: dict[str, Any], request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(request_, check_server(server))
    assert check_request({"alpha": 1}, {"method": "adts"}) == {"alpha": 1.0}


def test_the_start_line_names_the_method_and_what_it_reads() -> None:
    assert "method=flashvid, alpha=0.7" in describe({}, PRESET)
    assert "method=adts, alpha=1.0" in describe(check_server({"method": "adts"}), PRESET)
    line = describe(check_server({"method": "evs", "token_budget": 9}), PRESET)
    assert line == "token_budget=9, method=evs, backend=auto"


def test_the_start_line_names_what_is_in_force() -> None:
    line = describe(check_server({"retention_ratio": 0.1, "request_overrides": False}), PRESET)
    assert "retention_ratio=0.1" in line
    assert "min_segments=4" in line
    assert "requests may not change it" in line
    assert "off unless" in describe({"enabled": False}, PRESET)


def test_the_encoders_share_by_server_and_request() -> None:
    """It stays under a request's method, a request may take it back, and the start line has it where it is in force."""
    server = check_server({"encoder_ratio": "auto", "encoder_reuse": "frames"})
    config = resolve(server, check_request({"method": "evs", "retention_ratio": 1}, server), PRESET)
    assert config == FlashVidConfig(1, method="evs", encoder_ratio="auto", encoder_reuse="frames")
    config = resolve(server, check_request({"encoder_ratio": 1}, server), PRESET)
    assert config is not None
    assert not config.encodes_less
    assert "encoder_ratio=auto, encoder_reuse=frames" in describe(server, PRESET)
    assert "encoder" not in describe(check_server({"encoder_reuse": "frames"}), PRESET)
    for asked, message in (
        ({"encoder_ratio": "half"}, r"encoder_ratio must be a number in \(0, 1\] or \"auto\", got 'half' \(str\)"),
        ({"encoder_ratio": [0.5]}, r"encoder_ratio must be a number in \(0, 1\] or \"auto\", got \[0.5\] \(list\)"),
        ({"encoder_ratio": None}, "encoder_ratio must not be null; leave it out for the default"),
        ({"encoder_reuse": ["tokens"]}, r"encoder_reuse must be one of tokens, frames; got \['tokens'\]"),
        ({"encoder_shares": 2}, "unknown FlashVID setting 'encoder_shares'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_request(asked, server)


def test_a_client_cannot_make_us_look_for_near_misses_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the event loop of the API server, while others wait."""
    looked: list[str] = []

    def note(key: str, *_: Any, **__: Any) -> list[str]:
        looked.append(key)
        return []

    monkeypatch.setattr(settings.difflib, "get_close_matches", note)
    assert request_part({"fla" * 2**20: 1, **{f"flashvi{i}": 1 for i in range(5000)}}) is None
    assert 0 < len(looked) <= 100
    assert max(map(len, looked)) <= 20
