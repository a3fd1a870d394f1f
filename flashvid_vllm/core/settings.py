# SPDX-License-Identifier: MIT
"""Settings of the server and of a request, checked and put together into one FlashVidConfig.

They travel as plain mappings under the key "flashvid" of vLLM's ``mm_processor_kwargs``: the
server's part holds only what was given, so that each model family can fill in its preset.
"""

import difflib
from collections.abc import Mapping
from itertools import islice
from typing import Any

from .config import (
    CONFIG_KEYS,
    ENCODER_SETTINGS,
    FASTV,
    FLASHVID_SETTINGS,
    INNER_SETTINGS,
    FlashVidConfig,
    is_other,
    is_set_by,
    refuse_unknown,
    refuse_unread,
    shown,
)

KEY = "flashvid"
ENABLED = "enabled"
REQUEST_OVERRIDES = "request_overrides"
BACKEND = "backend"
METHOD = "method"
POSITIONS = "positions"
CONSECUTIVE, ORIGINAL = "consecutive", "original"
MAX_VIDEO_TOKENS = "max_video_tokens"
INNER, INNER_LAYER, INNER_RATIO, INNER_DEPTH = INNER_SETTINGS
# beside a server's settings, from its start and not from anybody: ranks that share what an encoder gets in one call,
# and why it cannot compute single rows, if so
ENCODER_SHARES, ENCODER_WHOLE = "encoder_shares", "encoder_whole"
SERVER_KEYS = (*CONFIG_KEYS, ENABLED, REQUEST_OVERRIDES, POSITIONS, MAX_VIDEO_TOKENS)
SERVER_ONLY = {
    BACKEND: "the backend",
    POSITIONS: "the positions",
    MAX_VIDEO_TOKENS: "the size of the longest video",
    INNER_LAYER: "the layer behind which tokens are dropped",
    INNER_RATIO: "the share of them that is left",
    INNER_DEPTH: "the model",
}
REQUEST_KEYS = tuple(key for key in SERVER_KEYS if key not in (*SERVER_ONLY, REQUEST_OVERRIDES))
_MOST_KEYS = 100  # of mm_processor_kwargs that are looked at for a near miss; nothing reads so many
_BUDGETS = ("retention_ratio", "token_budget")
SINGLE = (*_BUDGETS, METHOD)  # settings that have an option of their own on every command line
SERVER_SINGLE = (*SINGLE, MAX_VIDEO_TOKENS, ENCODER_SETTINGS[0])  # and on a server's


def check_server(settings: Any) -> dict[str, Any]:
    """The server's settings, checked. ValueError names the value and what was expected."""
    return _check(settings, SERVER_KEYS)


def check_request(settings: Any, server: Mapping[str, Any]) -> dict[str, Any]:
    """A request's settings, checked against what the server allows.

    Raises:
        ValueError: not an object, an unknown key, a bad value, a setting that the method in force does not
            read, or the server was started with ``--no-flashvid-request-overrides``.
    """
    if not server.get(REQUEST_OVERRIDES, True):
        raise ValueError(
            f"this server takes no {KEY!r} settings from requests (--no-flashvid-request-overrides); leave them out"
        )
    for name, what in SERVER_ONLY.items():
        if isinstance(settings, Mapping) and name in settings:
            raise ValueError(f"{name}={shown(settings[name])}: the server chooses {what}; leave it out")
    checked = _check(settings, REQUEST_KEYS)
    if checked.get(INNER) and INNER_LAYER not in server:
        raise ValueError(f"{INNER}=True: this server drops nothing inside the LLM; leave it out")
    if server.get(METHOD) == FASTV:
        if checked.get(INNER) and checked.get(METHOD, FASTV) != FASTV:
            raise ValueError(
                f"{METHOD}={checked[METHOD]!r} drops nothing inside the LLM where the server's is {FASTV!r}, and "
                f"excludes {INNER}=True; leave one of them out"
            )
        beside = [name for name in (*_BUDGETS, *ENCODER_SETTINGS) if name in checked]
        if checked.get(INNER) is False and checked.get(METHOD, FASTV) == FASTV and beside:
            raise ValueError(
                f"{INNER}=False is the plain model where the server's method is {FASTV!r}, and excludes "
                f"{', '.join(beside)}; leave one of them out"
            )
    if checked.get(METHOD) == FASTV != server.get(METHOD):
        raise ValueError(f"{METHOD}={FASTV!r}: this server was not started with it, which shapes the engine")
    refuse_unread(checked, checked.get(METHOD, server.get(METHOD, FlashVidConfig.method)))
    return checked


def request_part(mm_processor_kwargs: Mapping[str, Any] | None) -> Any | None:
    """What a request says under our key, or None; a near miss of the key is refused by name."""
    if not mm_processor_kwargs:
        return None
    if not isinstance(mm_processor_kwargs, Mapping):
        raise ValueError(f"mm_processor_kwargs must be an object, got {shown(mm_processor_kwargs)}")
    for key in islice(mm_processor_kwargs, _MOST_KEYS):
        if (
            key != KEY
            and len(str(key)) <= 2 * len(KEY)
            and difflib.get_close_matches(str(key).lower(), [KEY], cutoff=0.75)
        ):
            raise ValueError(f"unknown key {key!r} in mm_processor_kwargs; did you mean {KEY!r}?")
    part = mm_processor_kwargs.get(KEY)
    if part is None and KEY in mm_processor_kwargs:
        raise ValueError(f"{KEY!r} must be an object such as {{'retention_ratio': 0.25}}, got null")
    return part


def resolve(
    server: Mapping[str, Any], request: Mapping[str, Any] | None, preset: Mapping[str, Any]
) -> FlashVidConfig | None:
    """The settings in force: defaults < preset of the family < server < request.

    A request's ratio or budget replaces whichever the server set, and switches compression on
    where the server has it off; there, a request's encoder_ratio alone lets the encoder compute less, and every token
    stays. A method leaves out what lies below it and it does not read or sets
    itself: the preset, and for a request's method the server's settings. None: this request gets the
    plain model.
    """
    request = request or {}
    asks_for_less = any(name in request for name in _BUDGETS)
    if not request.get(ENABLED, asks_for_less or server.get(ENABLED, True)):
        if ENABLED in request or request.get(ENCODER_SETTINGS[0], 1) == 1:
            return None
        request = {**request, _BUDGETS[0]: 1.0}
        asks_for_less = True
    decides = request if METHOD in request else server
    method = decides.get(METHOD, FlashVidConfig.method)
    merged = _without(preset, method)
    merged.update(server if decides is server else _without(server, method))
    if asks_for_less:
        for name in _BUDGETS:
            merged.pop(name, None)
    merged.update(request)
    if method == FASTV:
        if merged.get(INNER) is False:  # nothing is left to do
            return None
        merged[INNER] = True
    elif server.get(METHOD) == FASTV:  # the layer is FastV's
        merged[INNER] = False
    if not merged.get(INNER, False):
        merged = {name: value for name, value in merged.items() if name not in INNER_SETTINGS}
    return FlashVidConfig(**{name: value for name, value in merged.items() if name in CONFIG_KEYS})


def in_force(server: Mapping[str, Any], preset: Mapping[str, Any]) -> FlashVidConfig:
    """The settings in force for a request that says nothing, or that turns on what the server has off."""
    config = resolve({**server, ENABLED: True}, None, preset)
    assert config is not None
    return config


def describe(server: Mapping[str, Any], preset: Mapping[str, Any]) -> str:
    """The settings in force for a request that says nothing, in one line."""
    config = in_force(server, preset)
    hidden = (FLASHVID_SETTINGS if is_other(config.method) else ()) + (() if config.encodes_less else ENCODER_SETTINGS)
    hidden += () if config.inner else INNER_SETTINGS
    shown = {name: value for name, value in config.to_dict().items() if value is not None and name not in hidden}
    parts = [f"{name}={value}" for name, value in shown.items()]
    if not server.get(ENABLED, True):
        parts.insert(0, "off unless a request asks for it")
    if POSITIONS in server:
        parts.append(f"{POSITIONS}={server[POSITIONS]}")
    if MAX_VIDEO_TOKENS in server:
        parts.append(f"videos of at most {server[MAX_VIDEO_TOKENS]} tokens before compression ({MAX_VIDEO_TOKENS})")
    if not server.get(REQUEST_OVERRIDES, True):
        parts.append("requests may not change it")
    return ", ".join(parts)


def _without(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings but for those that ``method`` does not read or sets itself."""
    return {name: value for name, value in settings.items() if not is_set_by(method, name)}


def _check(settings: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"{KEY!r} must be an object such as {{'retention_ratio': 0.25}}, "
            f"got {shown(settings)} ({type(settings).__name__})"
        )
    refuse_unknown(settings, keys, "setting")
    for name in (ENABLED, REQUEST_OVERRIDES):
        if not isinstance(settings.get(name, True), bool):
            raise ValueError(f"{name} must be true or false, got {shown(settings[name])}")
    if settings.get(POSITIONS, ORIGINAL) not in (CONSECUTIVE, ORIGINAL):
        raise ValueError(f"{POSITIONS} must be one of {CONSECUTIVE}, {ORIGINAL}, got {shown(settings[POSITIONS])}")
    longest = settings.get(MAX_VIDEO_TOKENS, 1)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise ValueError(f"{MAX_VIDEO_TOKENS} must be a whole number of at least 1, got {shown(longest)}")
    given = {name: value for name, value in settings.items() if name in CONFIG_KEYS}
    for name, value in given.items():
        if value is None and name not in _BUDGETS:
            raise ValueError(f"{name} must not be null; leave it out for the default")
    if any(name in given for name in INNER_SETTINGS[1:]):
        given.setdefault(INNER, True)
    # beside a layer that requests may ask for, it is false
    checked = FlashVidConfig(**(given | {INNER: True} if INNER in given else given))
    if given.get(METHOD) == FASTV and keys is SERVER_KEYS and given.get(INNER) is False:
        raise ValueError(f"{METHOD}={FASTV!r} is {INNER}=True; leave one of them out")
    refuse_unread(given, checked.method)  # here even a default was given
    out = {name: getattr(checked, name) for name, value in given.items() if value is not None}
    if INNER in given:
        out[INNER] = given[INNER]
    others = (ENABLED, REQUEST_OVERRIDES, POSITIONS, MAX_VIDEO_TOKENS)
    return out | {name: settings[name] for name in others if name in settings}
