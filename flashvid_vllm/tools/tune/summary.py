# SPDX-License-Identifier: MIT
"""A row of figures for each setting, with 95 % intervals over videos."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import stats
from .client import LETTERS, Asking
from .collect import FLOOR
from .data import Item, plain_text
from .grid import PLAIN, Setting, plain
from .results import ANSWER, SCORE, TIME, Results
from .stats import Estimate

AGREEMENT, LIKELIHOOD = "agreement", "likelihood"


@dataclass
class Row:
    """What was found of a setting. Estimates are (value, low, high); None where there is nothing to tell from.

    Attributes:
        items, videos: that the plain model and this setting have answered.
        prompt_tokens: mean of an item, text included.
        first_token: seconds, median over videos; ``first_token_ratio`` to the plain model's, the same items.
        agreement: share of the answers that are the plain model's: the same choice, or the same first tokens.
        choices, free: how many items of either kind that is.
        common_tokens: mean number of first tokens that an answer in free text has in common with the plain one.
        logprob: mean log-probability of a token of the plain answers in free text, given the video in this setting;
            one below LEAST_LOGPROB (-50), such as the -9999 that vLLM gives an impossible token, counts as that.
        likelihood: where ``logprob`` lies between that given another item's video (0) and the plain video (1).
        scored: items that it is of.
        accuracy: share of right answers among the ``known`` items whose answer is known.
        mcnemar: p of the plain model being right as often, exact; None for the plain model itself.
    """

    setting: Setting
    items: int = 0
    videos: int = 0
    prompt_tokens: Estimate | None = None
    first_token: Estimate | None = None
    first_token_ratio: Estimate | None = None
    agreement: Estimate | None = None
    choices: int = 0
    free: int = 0
    common_tokens: float | None = None
    logprob: float | None = None
    likelihood: Estimate | None = None
    scored: int = 0
    accuracy: Estimate | None = None
    known: int = 0
    mcnemar: float | None = None

    def kept(self, by: str) -> Estimate | None:
        """The figure that decides: AGREEMENT or LIKELIHOOD."""
        return self.agreement if by == AGREEMENT else self.likelihood

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: an infinite end of an interval is null."""
        values = {name: value for name, value in asdict(self).items() if name != "setting"}
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = [round(float(v), 6) if math.isfinite(v) else None for v in value]
        setting = self.setting
        return {
            "name": setting.name, "request": dict(setting.request), "positions": setting.positions,
            "options": None if setting.is_plain else setting.options(), **values,
        }  # fmt: skip


@dataclass(frozen=True)
class Different:
    """An item to which some setting gave another answer: ``answers`` is setting's name -> answer, plain first."""

    item: Item
    answers: dict[str, str]
    differs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """Rows, the plain model's first; ``floor`` is the log-probability given another item's video."""

    rows: list[Row]
    floor: float | None
    by: str
    same_tokens: int
    different: list[Different]
    unscored: int  # items whose plain answer does not become the same tokens again


def summarize(
    results: Results,
    items: Sequence[Item],
    settings: Sequence[Setting],
    asking: Asking,
    same_tokens: int,
    by: str | None = None,
) -> Summary:
    """The figures of everything that was answered.

    Args:
        same_tokens: an answer in free text agrees if so many of its first tokens are the plain answer's.
        by: what decides; None: agreement if choices were answered, then of them alone, else likelihood where it was
            measured. In free text one other word early on ends agreement, whatever the answer says, so agreement there
            is a strict measure, and the likelihood of the plain answers the one that tells how much of the video is
            left.
    """
    table = _Table(results, items, asking, same_tokens)
    choices_only = table.has_choices(settings)
    rows = [table.row(setting, choices_only and by is None) for setting in (plain(), *settings)]
    scored = any(row.likelihood is not None for row in rows[1:])
    by = by or (LIKELIHOOD if not choices_only and scored else AGREEMENT)
    return Summary(rows, table.floor(), by, same_tokens, table.different(settings), table.unscored())


class _Table:
    def __init__(self, results: Results, items: Sequence[Item], asking: Asking, same_tokens: int) -> None:
        self.results, self.items, self.asking, self.same_tokens = results, items, asking, same_tokens

    def has_choices(self, settings: Sequence[Setting]) -> bool:
        """Whether any item with choices was answered both plain and in some setting."""
        return any(
            item.choices and self._said(item, plain()) and any(self._said(item, setting) for setting in settings)
            for item in self.items
        )

    def row(self, setting: Setting, choices_only: bool) -> Row:
        """``choices_only``: agreement is that of the items with choices."""
        said = [(item, self._said(item, plain()), self._said(item, setting)) for item in self.items]
        both = [(item, first, second) for item, first, second in said if first and second]
        row = Row(setting, len(both), len({item.video.digest for item, *_ in both}))
        if both:
            video = _videos([item for item, *_ in both])
            row.prompt_tokens = stats.mean(np.array([said["prompt_tokens"] for _, _, said in both]), video)
            self._agreement(row, both, choices_only)
            self._accuracy(row, both)
        self._likelihood(row)
        self._times(row)
        return row

    def floor(self) -> float | None:
        """The mean log-probability given another item's video."""
        found = [
            line["logprob"]
            for item in self.items
            if (line := self.results.get(SCORE, item.key, FLOOR)) and line["logprob"] is not None
        ]
        return float(np.mean(found)) if found else None

    def unscored(self) -> int:
        lines = [self.results.get(SCORE, item.key, PLAIN) for item in self.items]
        return sum(line is not None and line["logprob"] is None for line in lines)

    def different(self, settings: Sequence[Setting]) -> list[Different]:
        """Items that some setting answers otherwise, those that most settings do first."""
        found = []
        for item in self.items:
            first = self._said(item, plain())
            if first is None:
                continue
            said = {setting.name: line for setting in settings if (line := self._said(item, setting))}
            differs = [name for name, line in said.items() if not self._agree(item, first, line)]
            if differs:
                texts = {name: self._shown(item, line) for name, line in said.items()}
                found.append(Different(item, {PLAIN: self._shown(item, first), **texts}, differs))
        return sorted(found, key=lambda different: -len(different.differs))

    def _said(self, item: Item, setting: Setting) -> dict[str, Any] | None:
        return self.results.get(ANSWER, item.key, setting.key)

    def _shown(self, item: Item, line: dict[str, Any]) -> str:
        return self.asking.choice(item, line["text"]) if item.choices else str(line["text"])

    def _agree(self, item: Item, first: dict[str, Any], second: dict[str, Any]) -> bool:
        if item.choices:
            return self._same(item, self._shown(item, first), self._shown(item, second))
        return bool(first["ids"][: self.same_tokens] == second["ids"][: self.same_tokens])

    def _same(self, item: Item, first: str, second: str) -> bool:
        """Whether two texts are the same: a letter names a choice as it stands, words may be written otherwise."""
        if item.choices and self.asking.choices == LETTERS:
            return first == second
        return plain_text(first) == plain_text(second)

    def _agreement(self, row: Row, both: list[tuple[Item, dict[str, Any], dict[str, Any]]], choices_only: bool) -> None:
        counted = [entry for entry in both if entry[0].choices or not choices_only]
        row.choices = sum(bool(item.choices) for item, *_ in counted)
        row.free = len(counted) - row.choices
        if counted:
            agree = np.array([self._agree(*entry) for entry in counted], float)
            videos = _videos([item for item, *_ in counted])
            row.agreement = (1.0, 1.0, 1.0) if row.setting.is_plain else stats.share(agree, videos)
        common = [_common(a["ids"], b["ids"]) for item, a, b in both if not item.choices]
        row.common_tokens = float(np.mean(common)) if common else None

    def _accuracy(self, row: Row, both: list[tuple[Item, dict[str, Any], dict[str, Any]]]) -> None:
        known = [entry for entry in both if entry[0].answer is not None]
        row.known = len(known)
        if not known:
            return
        right = np.array([self._right(item, line) for item, _, line in known])
        row.accuracy = stats.share(right, _videos([item for item, *_ in known]))
        if not row.setting.is_plain:
            row.mcnemar = stats.mcnemar(np.array([self._right(item, line) for item, line, _ in known]), right)

    def _right(self, item: Item, line: dict[str, Any]) -> bool:
        assert item.answer is not None
        return self._same(item, self._shown(item, line), item.answer)

    def _likelihood(self, row: Row) -> None:
        found = []
        for item in self.items:
            lines = [self.results.get(SCORE, item.key, name) for name in (row.setting.key, PLAIN, FLOOR)]
            values = [line["logprob"] if line else None for line in lines]
            if values[0] is not None and values[1] is not None:
                found.append((item, values))
        row.scored = len(found)
        if not found:
            return
        row.logprob = float(np.mean([values[0] for _, values in found]))
        between = [(item, values) for item, values in found if values[2] is not None]
        if not between:
            return
        here, ceiling, floor = np.array([values for _, values in between], float).T
        if (ceiling - floor).sum() > 0:  # else the plain answers owe nothing to their videos
            row.likelihood = stats.ratio(here - floor, ceiling - floor, _videos([item for item, _ in between]))

    def _times(self, row: Row) -> None:
        found = []
        for item in self.items:
            mine, first = (self.results.get(TIME, item.key, key) for key in (row.setting.key, PLAIN))
            if mine and first:
                found.append((item, mine["seconds"], first["seconds"]))
        if found:
            video = _videos([item for item, *_ in found])
            mine, first = np.array([entry[1:] for entry in found], float).T
            row.first_token = stats.median(mine, video)
            row.first_token_ratio = stats.median(mine / first, video)


def _videos(items: Sequence[Item]) -> np.ndarray:
    return np.array([item.video.digest for item in items])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same
