# SPDX-License-Identifier: MIT
"""One sentence: which setting to serve with, or that none will do, or that the data are too few to tell."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from .stats import videos_needed
from .summary import AGREEMENT, Row

FOUND, NONE, TOO_FEW = "found", "none", "too few data"


@dataclass(frozen=True)
class Advice:
    """What was decided.

    Attributes:
        verdict: FOUND, NONE or TOO_FEW.
        sentence: for people.
        options: of ``vllm serve`` where it is FOUND, else empty.
        videos: how many would tell where it is TOO_FEW; None if no number would.
    """

    verdict: str
    sentence: str
    options: str = ""
    videos: int | None = None


def advise(rows: Sequence[Row], keep: float, by: str, model: str, beside: Sequence[str] | None) -> Advice:
    """Advice from the rows of the settings, the plain model's left out.

    The lower bound of a setting's interval decides. It keeps enough if that is at or above ``keep``, too little if the
    upper bound is below it, and else the data are too few to tell. Of those that keep enough, the one with the fewest
    tokens is advised, of several the one whose encoder computes least. Each is judged by its own two-sided 95 %
    interval: among many settings that keep just too little, one passes by chance more often than the 2.5 % of a single
    one.

    Args:
        keep: the share to keep.
        by: AGREEMENT or LIKELIHOOD.
        model: its name, for the command.
        beside: further options of the server; None if they are not known.
    """
    judged = [row for row in rows if row.kept(by) is not None and row.prompt_tokens is not None]
    if not judged:
        why = "no question was answered both by the plain model and compressed"
        if by != AGREEMENT:
            why = "no likelihood was measured, which takes free text, several videos, and answers that depend on them"
        return Advice(TOO_FEW, f"Nothing can be said: {why}.")
    judged.sort(key=_cost)
    enough = [row for row in judged if _bounds(row, by)[1] >= keep]
    unclear = [row for row in judged if _bounds(row, by)[1] < keep <= _bounds(row, by)[2]]
    what = "the plain model's answers" if by == AGREEMENT else "what the video adds to the plain answers' likelihood"
    if enough:
        best = enough[0]
        value, low, _ = _bounds(best, by)
        options = best.setting.options()
        command = shlex.join(["vllm", "serve", model, *(beside or [])]) + f" {options}"
        rest = "" if beside is not None else ", and the other options that the server has now"
        sentence = (
            f"{best.setting.name} is the smallest that keeps {_bar(keep)} % of {what} ({_percent(value, keep)}, "
            f"lower bound {_percent(low, keep)}; {best.prompt_tokens and best.prompt_tokens[0]:.0f} prompt tokens); "
            f"serve with: {command}{rest}"
        )
        smaller = [row for row in unclear if _cost(row) < _cost(best) and _bounds(row, by)[0] > keep]
        if smaller and (needed := _needed(smaller[0], by, keep)):
            sentence += f". {smaller[0].setting.name} may do as well: about {needed} videos would tell"
        return Advice(FOUND, sentence + ".", options)
    if not unclear:
        best = max(judged, key=lambda row: _bounds(row, by)[0])
        value, _, high = _bounds(best, by)
        found = f"the best, {best.setting.name}, keeps {_percent(value, keep)} (upper bound {_percent(high, keep)})"
        remedy = "Try larger ratios, other --methods or --positions, or a lower --keep."
        return Advice(NONE, f"None of them keeps {_bar(keep)} % of {what}: {found}. {remedy}")
    return _too_few(unclear, keep, by, what)


def _too_few(unclear: Sequence[Row], keep: float, by: str, what: str) -> Advice:
    above = [row for row in unclear if _bounds(row, by)[0] > keep]
    row = above[0] if above else max(unclear, key=lambda row: _bounds(row, by)[0])
    value, low, high = _bounds(row, by)
    needed = _needed(row, by, keep)
    found = f"{row.setting.name} keeps {_percent(value, keep)} of {what}"
    found += f" (between {_percent(low, keep)} and {_percent(high, keep)})" if math.isfinite(low) else ""
    videos = f"{row.videos} video{'s' if row.videos != 1 else ''}"
    if row.videos == 1 and needed is None:
        more = "one video tells nothing about others; begin with 20"
    elif needed is None:
        more = f"it lies on the bar of {_bar(keep)} %: no number of videos would tell, another --keep would"
    elif value > keep:
        more = f"about {needed} would do, if it stays so"
    else:
        more = f"about {needed} videos would tell that it keeps too little, if it stays so"
    return Advice(
        TOO_FEW, f"The data are too few to tell: on {videos} {found}, and the bar is {_bar(keep)} %; {more}.",
        videos=needed,
    )  # fmt: skip


def _needed(row: Row, by: str, keep: float) -> int | None:
    value, low, high = _bounds(row, by)
    return videos_needed(value, low if value > keep else high, keep, row.videos)


def _bounds(row: Row, by: str) -> tuple[float, float, float]:
    found = row.kept(by)
    assert found is not None
    return found


def _cost(row: Row) -> tuple[float, float]:
    """By what settings are ordered: tokens, then the encoder's work."""
    assert row.prompt_tokens is not None
    return row.prompt_tokens[0], row.setting.encoded


def _percent(value: float, keep: float) -> str:
    """With its sign, rounded, but never up to or beyond the bar: 97.96 does not read as the 98.0 that it is below."""
    if not math.isfinite(value):
        return "?"
    rounded = round(1000 * value)
    return f"{(rounded - 1 if value < keep <= rounded / 1000 else rounded) / 10:.1f} %"


def _bar(keep: float) -> str:
    return f"{100 * keep:g}"
