# SPDX-License-Identifier: MIT
"""Budgets that follow the video: `adaptive` beside FlashVID and the best peers, by ratio, by `positions`, by family.

The answers are kept beside the table, a character a question, so that the table can be made again without a tower.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan

from .answers import Encoded
from .backgrounds import Split
from .evaluate import run
from .features import Store
from .grid import PLAIN, Cell, chosen
from .model import TinyVlm
from .questions import FAMILIES
from .residuals import CHANGES, compress
from .stats import holm, interval, mcnemar, percent

VIDEOS, VALIDATION = 57, 16  # of the test split and for the ablation, from the first
RATIOS = (0.25, 0.15, 0.10, 0.05)
OURS = "adaptive"
SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {"method": OURS},
    "flashvid": {},
    "flashvid, one segment": {"min_segments": 1},
    "tstm": {"method": "tstm"},
    "evs": {"method": "evs"},
    "vidcom2": {"method": "vidcom2"},
    "vcast": {"method": "vcast"},
    "gleanvid": {"method": "gleanvid"},
}
POSITIONS = ("consecutive", "original")
ABLATION_RATIOS = (0.10, 0.05)


def cells() -> list[Cell]:
    """Every setting at every ratio, with either `positions`, and the whole video."""
    return [Cell(PLAIN, 1.0, None)] + [
        Cell(f"{name}, {positions}", ratio, FlashVidConfig(ratio, **given), spread=positions == "original")
        for positions in POSITIONS
        for ratio in RATIOS
        for name, given in SETTINGS.items()
    ]


@dataclass(frozen=True)
class Changed(Cell):
    """`adaptive` with one thing ``changed``, a name of `residuals.CHANGES`."""

    changed: str = ""

    def tokens(self, video: Encoded) -> tuple[Tensor, Tensor | None]:
        """As `Cell.tokens`."""
        assert self.config is not None
        num_frames, n, _ = video.tokens.shape
        budget = plan(num_frames, n, self.config)
        kept = compress(video.tokens, video.attention, budget.tokens, **CHANGES[self.changed])
        return kept.tokens, kept.source_index if self.spread else None


def changes() -> list[Cell]:
    """Every change at the small ratios, with either `positions`."""
    return [
        Changed(f"{name}, {positions}", ratio, FlashVidConfig(ratio), spread=positions == "original", changed=name)
        for positions in POSITIONS
        for ratio in ABLATION_RATIOS
        for name in CHANGES
    ]


def answer(model: TinyVlm, root: Path) -> dict[str, Any]:
    """Of either split the number of videos, and cell -> a string, "1" for each question that is answered right.

    Raises RuntimeError without the features.
    """
    splits: tuple[tuple[Split, int, list[Cell]], ...] = (
        ("test", VIDEOS, cells()),
        ("validation", VALIDATION, changes()),
    )
    return {split: _answers(model, Store(split, count, root), grid) for split, count, grid in splits}


def _answers(model: TinyVlm, store: Store, grid: list[Cell]) -> dict[str, Any]:
    questions = chosen(store.split, store.count)
    store.require()
    found = {(entry["cell"], entry["video"]): entry["right"] for entry in run(model, store, grid, questions).cells}
    lines = {cell.key: "".join(str(int(x)) for n in questions for x in found[cell.key, n]) for cell in grid}
    return {"videos": store.count, "answers": lines}


def markdown(found: dict[str, Any]) -> str:
    """The tables of what `answer` gives."""
    asked = Asked.about("test", found["test"])
    counts = ", ".join(f"{f} {count}" for f, count in asked.families.items())
    plain = asked.right[f"{PLAIN}@1"]
    lines = [
        "# Budgets that follow the video",
        "",
        f"{len(asked.family)} questions about the first {found['test']['videos']} test videos, in percent; all",
        f"tokens {percent(plain)}. Questions by family: {counts}.",
        f"`- other`: {OURS} minus that setting on the same questions, with its 95 % interval (bootstrap over videos),",
        "and McNemar's p after Holm's correction over the settings of a table. By family: the setting's own accuracy,",
        f"with * where the interval of {OURS} minus it is above 0, with - where it is below. `adaptive` was chosen on",
        "validation videos alone (below). `python -m benchmarks.tinyvlm budgets` makes this page and",
        "[its answers](budgets.json).",
        "",
    ]
    for positions in POSITIONS:
        lines += [f"## `positions` {positions}", "", *_overview(asked, SETTINGS, positions, RATIOS), ""]
        for ratio in RATIOS:
            lines += [f"### {ratio:.0%}, {positions}", "", *_table(asked, positions, ratio), ""]
    asked = Asked.about("validation", found["validation"])
    lines += [
        "## The ablation",
        "",
        f"{len(asked.family)} questions about the first {found['validation']['videos']} validation videos: few, and",
        "differences below 5 are noise. What is changed stands in `benchmarks/tinyvlm/residuals.py`; all but",
        "`as it is` were tried with the video's mean taken off.",
        "",
    ]
    for positions in POSITIONS:
        lines += [f"`positions` {positions}:", "", *_overview(asked, CHANGES, positions, ABLATION_RATIOS), ""]
    return "\n".join(lines)


@dataclass(frozen=True)
class Asked:
    """Answers [questions] of each cell, with each question's family and video."""

    right: dict[str, np.ndarray]
    family: np.ndarray
    video: np.ndarray

    @classmethod
    def about(cls, split: Split, part: dict[str, Any]) -> "Asked":
        """A split's part of what `answer` gives."""
        questions = chosen(split, part["videos"])
        right = {key: np.array([c == "1" for c in line]) for key, line in part["answers"].items()}
        family = np.array([q.family for asked in questions.values() for q in asked])
        return cls(right, family, np.array([number for number, asked in questions.items() for _ in asked]))

    @property
    def families(self) -> dict[str, int]:
        """Questions of each."""
        return {f: int((self.family == f).sum()) for f in FAMILIES if f in self.family}


def _overview(asked: Asked, settings: Iterable[str], positions: str, ratios: Sequence[float]) -> list[str]:
    """Accuracies by ratio, the best first."""
    rows = {name: [asked.right[f"{name}, {positions}@{ratio:g}"].mean() for ratio in ratios] for name in settings}
    lines = [f"| | {' | '.join(f'{ratio:.0%}' for ratio in ratios)} |", f"|---|{'---:|' * len(ratios)}"]
    for name, row in sorted(rows.items(), key=lambda row: -sum(row[1])):
        lines.append(f"| {name} | {' | '.join(f'{100 * x:.1f}' for x in row)} |")
    return lines


def _table(asked: Asked, positions: str, ratio: float) -> list[str]:
    """One ratio's rows, with differences from ours."""
    right = {name: asked.right[f"{name}, {positions}@{ratio:g}"] for name in SETTINGS}
    p = holm({name: mcnemar(right[OURS], right[name]) for name in right if name != OURS})
    lines = [
        f"| | all | - other | p | {' | '.join(asked.families)} |",
        f"|---|---:|---:|---:|{'---:|' * len(asked.families)}",
    ]
    for name in sorted(right, key=lambda name: -right[name].mean()):
        difference = right[OURS].astype(float) - right[name]
        shown = [name, percent(right[name]), "", ""]
        if name in p:
            low, high = (100 * x for x in interval(difference, asked.video))
            shown[2:] = [f"{100 * difference.mean():+.1f} ({low:+.1f} to {high:+.1f})", f"{p[name]:.2g}"]
        for family in asked.families:
            of_it = asked.family == family
            low, high = interval(difference[of_it], asked.video[of_it])
            shown.append(f"{100 * right[name][of_it].mean():.0f}{'*' if low > 0 else '-' if high < 0 else ''}")
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def write(found: dict[str, Any], folder: Path) -> None:
    """Write budgets.json and budgets.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "budgets.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "budgets.md").write_text(markdown(found))
