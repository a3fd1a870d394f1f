# SPDX-License-Identifier: MIT
"""The settings that are tried: each a request's ``flashvid`` object, and the options that serve it."""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.config import AUTO, ENCODER_SETTINGS
from ...core.settings import CONSECUTIVE, POSITIONS, check_request
from ..errors import UserError

RATIOS = (0.5, 0.25, 0.15, 0.1)
PLAIN = "plain"
ENCODER_RATIO = ENCODER_SETTINGS[0]


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        request: what a request says under ``flashvid``.
        positions: what the server was started with by ``flashvid tune``; None: the server is as it is.
    """

    request: Mapping[str, Any] = field(hash=False)
    positions: str | None = None

    @property
    def is_plain(self) -> bool:
        return self.request.get("enabled") is False

    @property
    def key(self) -> str:
        """What it is known by in the results. The plain model knows no positions: nothing is left out."""
        if self.is_plain:
            return PLAIN
        parts = json.dumps(dict(self.request), sort_keys=True)
        return parts if self.positions is None else f"{self.positions} {parts}"

    @property
    def name(self) -> str:
        """How it is called: "R = 0.25", "B = 1024, evs", "R = 0.1, encoder auto", "R = 0.1, positions original"."""
        if self.is_plain:
            return PLAIN
        request = dict(self.request)
        ratio, budget = request.pop("retention_ratio", None), request.pop("token_budget", None)
        parts = [f"R = {ratio:g}" if budget is None else f"B = {budget}"]
        parts += [str(request.pop("method"))] if "method" in request else []
        parts += [f"encoder {request.pop(ENCODER_RATIO)}"] if ENCODER_RATIO in request else []
        parts += [f"{name} {value}" for name, value in request.items()]
        return ", ".join([*parts, *([f"positions {self.positions}"] if self.positions else [])])

    @property
    def encoded(self) -> float:
        """The share of a video's patches that the encoder computes at the most, for an order of settings; "auto" is
        not known before, and only counts as less than all. The server's own share, too, is taken for all."""
        share = self.request.get(ENCODER_RATIO, 1.0)
        return math.nextafter(1.0, 0.0) if share == AUTO else float(share)

    def options(self) -> str:
        """The options of ``vllm serve`` that make it the server's default."""
        rest = dict(self.request)
        parts = ["--plugin", "flashvid"]
        for name in ("retention_ratio", "token_budget", "method", ENCODER_RATIO):
            if name in rest:
                parts += [f"--flashvid-{name.replace('_', '-')}", f"{rest.pop(name)}"]
        if self.positions and self.positions != CONSECUTIVE:
            rest[POSITIONS] = self.positions
        return shlex.join(parts + (["--flashvid-config", json.dumps(rest)] if rest else []))


def plain() -> Setting:
    """The uncompressed model."""
    return Setting({"enabled": False})


def settings(
    ratios: Sequence[float],
    budgets: Sequence[int],
    methods: Sequence[str],
    config: Mapping[str, Any],
    positions: str | None = None,
    encoder_ratios: Sequence[float | str] = (),
) -> list[Setting]:
    """Every ratio and budget with every method and share of the encoder's work (none given: the server's), each with
    ``config`` beside it.

    Raises UserError for one that no server would take.
    """
    sizes = [{"retention_ratio": ratio} for ratio in ratios] + [{"token_budget": budget} for budget in budgets]
    if encoder_ratios and ENCODER_RATIO in config:
        raise UserError(f"--encoder-ratios and --config both give {ENCODER_RATIO}; leave one of them out")
    made = []
    for method, share, size in itertools.product(methods or (None,), encoder_ratios or (None,), sizes):
        given = {"method": method, ENCODER_RATIO: share}
        request = {**size, **{name: value for name, value in given.items() if value is not None}, **config}
        try:
            check_request(request, {})
        except ValueError as error:
            raise UserError(str(error)) from None
        made.append(Setting(request, positions))
    return made
