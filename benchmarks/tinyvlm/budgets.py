# SPDX-License-Identifier: MIT
"""Budgets that follow the video: `adaptive` beside FlashVID and the best peers, by ratio, by `positions`, by family.

On the first model and on the second (`wide`).

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

from . import data
from .answers import Encoded
from .backgrounds import Split
from .evaluate import LEARNED, Questions, run
from .features import Store
from .grid import FEWER, PLAIN, Cell
from .model import TOKENS, TinyVlm
from .questions import FAMILIES
from .residuals import CHANGES, compress
from .stats import as_line, holm, interval, mcnemar, of_line, percent

RATIOS = (0.25, 0.20, 0.15, 0.10, 0.05)
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
ABLATION_RATIOS = (0.25, 0.10, 0.05)
# Frames of a long video, from each as many tokens as the fewest have. The LLM has seen 33 at most, and positions up to
# theirs.
FRAMES = {"consecutive": (16, 32, data.LONG_FRAMES), "original": (16, 32)}
FEW = "8 frames, all their tokens"


@dataclass(frozen=True)
class Page:
    """A model's page: the name of its file, what follows the title, the stage that makes it, and for each of GRIDS that
    it has the split and the videos that it asks about."""

    name: str
    title: str
    stage: str
    parts: dict[str, tuple[Split, range]]

    def numbers(self, part: str) -> str:
        """The videos, to be read."""
        videos = self.parts[part][1]
        return f"{videos.start} to {videos.stop - 1}"


# The test videos before these showed what earlier forms of `adaptive` lacked, and are not asked about again.
UNSEEN = range(160, 320)
FIRST = Page(
    "budgets",
    "",
    "budgets",
    {"test": ("test", UNSEEN), "validation": ("validation", range(31)), "frames": ("long", range(64))},
)
SECOND = Page(
    "budgets-wide",
    ", on the second model",
    "wide",
    {"test": ("wide-test", UNSEEN), "validation": ("wide-validation", range(31))},
)


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
        kept = compress(video.tokens, video.attention, budget.tokens, self.spread, **CHANGES[self.changed])
        return kept.tokens, kept.source_index if self.spread else None


def changes() -> list[Cell]:
    """Every change at the small ratios, with either `positions`."""
    return [
        Changed(f"{name}, {positions}", ratio, FlashVidConfig(ratio), spread=positions == "original", changed=name)
        for positions in POSITIONS
        for ratio in ABLATION_RATIOS
        for name in CHANGES
    ]


def expansions() -> list[Cell]:
    """Ever more frames of a long video, the same number of tokens."""
    tokens = FEWER * TOKENS
    return [Cell(FEW, 1.0, None, FEWER)] + [
        Cell(
            f"{name}, {positions}, {frames} frames",
            tokens / (frames * TOKENS),
            FlashVidConfig(token_budget=tokens, **given),
            frames,
            spread=positions == "original",
        )
        for positions, numbers in FRAMES.items()
        for frames in numbers
        for name, given in SETTINGS.items()
    ]


GRIDS = {"test": cells(), "validation": changes(), "frames": expansions()}


def answer(model: TinyVlm, page: Page, root: Path) -> dict[str, Any]:
    """Of each part: cell -> the answers as `stats.as_line` has them. Computes missing features."""
    return {part: _answers(model, *page.parts[part], GRIDS[part], root) for part in page.parts}


def _answers(model: TinyVlm, split: Split, videos: range, grid: list[Cell], root: Path) -> dict[str, str]:
    questions, store = asked_about(split, videos), Store(split, videos.stop, root)
    store.fill()
    found = {(entry["cell"], entry["video"]): entry["right"] for entry in run(model, store, grid, questions).cells}
    return {cell.key: as_line(x for n in questions for x in found[cell.key, n]) for cell in grid}


def asked_about(split: Split, videos: range) -> Questions:
    """All questions about the videos."""
    return {number: data.questions(split, number) for number in videos}


def markdown(found: dict[str, Any], page: Page) -> str:
    """The tables of what `answer` gives."""
    whole = Asked.about("test", page, found)
    asked = whole.learned(whole.right[f"{PLAIN}@1"])
    missed = [f for f in whole.families if f not in asked.families]
    counts = ", ".join(f"{f} {count}" for f, count in asked.families.items())
    plain = asked.right[f"{PLAIN}@1"]
    by_family = ", ".join(f"{f} {percent(plain[asked.family == f])}" for f in asked.families)
    lines = [
        f"# Budgets that follow the video{page.title}",
        "",
        f"{len(asked.family)} questions about test videos {page.numbers('test')}, in percent; all",
        f"tokens {percent(plain)} ({by_family}). Questions by family: {counts}.",
        *([f"Left out, as the model answers them in less than {LEARNED:.0%}: {', '.join(missed)}."] if missed else []),
        f"`- other`: {OURS} minus that setting on the same questions, with its 95 % interval (bootstrap over videos),",
        "and McNemar's p after Holm's correction over the settings of a table. By family: the setting's own accuracy,",
        f"with * where the interval of {OURS} minus it is above 0, with - where it is below; these marks are not",
        "corrected for their number. `adaptive` was settled on validation videos, after other test videos had shown",
        "what earlier forms of it lacked.",
        f"`python -m benchmarks.tinyvlm {page.stage}` makes this page and",
        f"[its answers]({page.name}.json).",
        "",
    ]
    for positions in POSITIONS:
        lines += [f"## `positions` {positions}", "", *_overview(asked, SETTINGS, positions, RATIOS), ""]
        for ratio in RATIOS:
            lines += [f"### {ratio:.0%}, {positions}", "", *_table(asked, positions, ratio), ""]
    learned = list(asked.families)
    asked = Asked.about("validation", page, found).only(learned)
    lines += [
        "## The ablation",
        "",
        f"{len(asked.family)} questions about validation videos {page.numbers('validation')}: few. What a change does",
        f"has a 95 % interval of {_reach(asked):.1f} points either way (median of the changes, against `as it is`).",
        "What is changed stands in `benchmarks/tinyvlm/residuals.py`.",
        "",
    ]
    for positions in POSITIONS:
        lines += [f"`positions` {positions}:", "", *_overview(asked, CHANGES, positions, ABLATION_RATIOS), ""]
    if "frames" in page.parts:
        lines += _expansion(Asked.about("frames", page, found).only(learned), page)
    return "\n".join(lines)


@dataclass(frozen=True)
class Asked:
    """Answers [questions] of each cell, with each question's family and video."""

    right: dict[str, np.ndarray]
    family: np.ndarray
    video: np.ndarray

    @classmethod
    def about(cls, part: str, page: Page, found: dict[str, Any]) -> "Asked":
        """A part of what `answer` gives."""
        questions = asked_about(*page.parts[part])
        right = {key: of_line(line) for key, line in found[part].items()}
        family = np.array([q.family for asked in questions.values() for q in asked])
        return cls(right, family, np.array([number for number, asked in questions.items() for _ in asked]))

    def only(self, families: Iterable[str]) -> "Asked":
        """The questions of these families."""
        of_them = np.isin(self.family, list(families))
        right = {key: answers[of_them] for key, answers in self.right.items()}
        return Asked(right, self.family[of_them], self.video[of_them])

    def learned(self, plain: np.ndarray) -> "Asked":
        """The questions of the families that are answered in LEARNED of the cases where nothing is compressed."""
        return self.only([f for f in self.families if plain[self.family == f].mean() >= LEARNED])

    @property
    def families(self) -> dict[str, int]:
        """Questions of each."""
        return {f: int((self.family == f).sum()) for f in FAMILIES if f in self.family}


def _expansion(asked: Asked, page: Page) -> list[str]:
    """Accuracies by frames: against those of few frames whole, and against ours."""
    few = asked.right[f"{FEW}@1"]
    lines = [
        "## More frames, the same number of tokens",
        "",
        f"{len(asked.family)} questions about {len(page.parts['frames'][1])} videos of {data.LONG_FRAMES} frames, of",
        f"which the LLM gets {FEWER * TOKENS} tokens: {FEWER} frames whole ({percent(few)}), or of more frames what a",
        "setting keeps. In brackets the difference from the few frames, with its 95 % interval. `positions` original",
        "ends where training does, at 33 frames.",
        "",
    ]
    columns = [(positions, frames) for positions, numbers in FRAMES.items() for frames in numbers]
    right = {
        name: [asked.right[f"{name}, {positions}, {frames} frames@{FEWER / frames:g}"] for positions, frames in columns]
        for name in SETTINGS
    }
    head = [
        f"| | {' | '.join(f'{frames}, {positions}' for positions, frames in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]

    def against(answers: np.ndarray, others: np.ndarray) -> str:
        difference = answers.astype(float) - others
        low, high = (100 * x for x in interval(difference, asked.video))
        return f"{100 * difference.mean():+.1f}, {low:+.1f} to {high:+.1f}"

    order = sorted(right, key=lambda name: -sum(answers.mean() for answers in right[name]))
    lines += head
    for name in order:
        lines.append(f"| {name} | {' | '.join(f'{percent(x)} ({against(x, few)})' for x in right[name])} |")
    lines += ["", f"{OURS} minus each of the others:", "", *head]
    for name in order:
        if name != OURS:
            pairs = zip(right[OURS], right[name], strict=True)
            lines.append(f"| {name} | {' | '.join(against(ours, other) for ours, other in pairs)} |")
    return [*lines, ""]


def _overview(asked: Asked, settings: Iterable[str], positions: str, ratios: Sequence[float]) -> list[str]:
    """Accuracies by ratio, the best first."""
    rows = {name: [asked.right[f"{name}, {positions}@{ratio:g}"].mean() for ratio in ratios] for name in settings}
    lines = [f"| | {' | '.join(f'{ratio:.0%}' for ratio in ratios)} |", f"|---|{'---:|' * len(ratios)}"]
    for name, row in sorted(rows.items(), key=lambda row: -sum(row[1])):
        lines.append(f"| {name} | {' | '.join(f'{100 * x:.1f}' for x in row)} |")
    return lines


def _reach(asked: Asked) -> float:
    """Half the median width of the intervals of the changes' differences from `as it is`, in percent."""
    widths = []
    for positions in POSITIONS:
        for ratio in ABLATION_RATIOS:
            first, *others = (asked.right[f"{name}, {positions}@{ratio:g}"].astype(float) for name in CHANGES)
            widths += [float(np.ptp(interval(other - first, asked.video))) for other in others]
    return 100 * float(np.median(widths)) / 2


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


def write(found: dict[str, Any], page: Page, folder: Path) -> None:
    """Write the page and its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{page.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{page.name}.md").write_text(markdown(found, page))
