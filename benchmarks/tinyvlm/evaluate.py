# SPDX-License-Identifier: MIT
"""Every setting on every test question, from cached features; goes on where it stopped."""

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..common.record import Cells, plugin_sources
from ..common.record import fingerprint as code_of
from . import data
from .answers import encoded, right
from .backgrounds import Split, base_of
from .features import Store, fingerprint
from .grid import FEWER, PLAIN, QUESTIONS, Cell, cells, chosen, long_cells
from .model import TinyVlm
from .progress import progress
from .questions import FAMILIES, Question
from .stats import holm, interval, mcnemar
from .variants import variants

Questions = dict[int, list[Question]]  # of each video
VARIANT_QUESTIONS = 200  # of a family
LEARNED = 0.40  # least plain accuracy of a family that is compared; chance is 0.25


def answers_in(path: Path) -> Cells:
    """What was answered so far: in each setting, about each video, right or not, and `coverage` of what was kept."""
    return Cells(path, lambda answer: (answer["cell"], answer["video"]))


def results_file(model: TinyVlm, split: Split, questions: Questions, root: Path) -> Path:
    """Where the answers of this model to these questions are kept."""
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes() + repr(questions).encode())
    digest.update(f"{fingerprint(split)} {code_of(plugin_sources())}".encode())
    if base_of(split) == "validation":  # where variants are tried
        for changes in ("variants.py", "residuals.py"):
            digest.update(Path(__file__).with_name(changes).read_bytes())
    return root / "answers" / f"{split}-{digest.hexdigest()[:12]}.jsonl"


def run(model: TinyVlm, store: Store, grid: Sequence[Cell], questions: Questions) -> Cells:
    """Answer the questions in every setting of the grid."""
    answers = answers_in(results_file(model, store.split, questions, store.root))
    todo = {n: [cell for cell in grid if (cell.key, n) not in answers.known] for n in questions}
    with progress(f"{store.split} answers", sum(map(len, todo.values()))) as advance:
        for number, settings in todo.items():
            video = encoded(model, store, number) if settings else None
            for cell in settings:
                assert video is not None
                tokens, place = cell.tokens(video)
                everything = video.tokens.flatten(0, 1)
                shown = cell.shown(video).tokens
                found = right(model, tokens, questions[number], place, shown.shape[0] * shown.shape[1])
                covered = coverage(everything, tokens)
                answers.add({"cell": cell.key, "video": number, "right": found, "coverage": covered})
                advance()
    return answers


def coverage(tokens: Tensor, left: Tensor) -> float:
    """Mean cosine of the tokens [N, D] to their nearest of those left [B, D], the video's mean taken off both.

    It says how densely what is left lies among what was there; not how good it is (see the conclusions).
    """
    mean = tokens.mean(0)
    cosines = normalize(tokens - mean, dim=-1) @ normalize(left - mean, dim=-1).T
    return float(cosines.amax(1).mean())


def summarise(
    answers: Cells,
    grid: Sequence[Cell],
    questions: Questions,
    plain: str,
    against: str | None = None,
    families: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Accuracies with 95 % intervals over all and by family, and paired tests against FlashVID.

    ``plain``: the key of the setting without compression. ``against``: the key of the setting to test all others
    against, None for FlashVID at the same ratio. ``families``: those that count, None for all that ``plain`` answers in
    LEARNED of the cases; the others are named. Holm's correction is over a ratio's tests, with ``against`` over all.
    """
    family = np.array([q.family for asked in questions.values() for q in asked])
    video = np.array([n for n, asked in questions.items() for _ in asked])
    found = {(answer["cell"], answer["video"]): answer for answer in answers.cells}
    correct = {cell.key: np.array([x for n in questions for x in found[cell.key, n]["right"]]) for cell in grid}
    asked_about = [f for f in FAMILIES if (family == f).any()]
    if families is None:
        families = [f for f in asked_about if correct[plain][family == f].mean() >= LEARNED]
    learned = [f for f in asked_about if f in families]
    missed = [f for f in asked_about if f not in families]
    if not learned:
        raise RuntimeError(f"the model answers no family of questions in {LEARNED:.0%} of the cases: train it longer")
    counts = np.isin(family, learned)
    rows = []
    tests: dict[float, dict[str, float]] = defaultdict(dict)  # ratio -> key -> p
    for cell in grid:
        x = correct[cell.key]
        row: dict[str, Any] = {"name": cell.name, "ratio": cell.ratio, "accuracy": _accuracy(x[counts], video[counts])}
        row["families"] = {f: _accuracy(x[family == f], video[family == f]) for f in asked_about}
        row["coverage"] = statistics.mean(found[cell.key, n]["coverage"] for n in questions)
        if cell.key != plain:
            row["minus plain"] = _difference(x[counts], correct[plain][counts], video[counts])
        other = against or f"flashvid@{cell.ratio:g}"
        if other in correct and other != cell.key:
            row["minus flashvid"] = _difference(x[counts], correct[other][counts], video[counts])
            row["p"] = mcnemar(x[counts], correct[other][counts])
            tests[0.0 if against else cell.ratio][cell.key] = row["p"]
        rows.append(row)
    corrected = {key: p for together in tests.values() for key, p in holm(together).items()}
    for cell, row in zip(grid, rows, strict=True):
        if cell.key in corrected:
            row["p (Holm)"] = corrected[cell.key]
    return {
        "questions": int(counts.sum()),
        "videos": len(set(video[counts].tolist())),
        "learned": learned,
        "left out": {f: float(correct[plain][family == f].mean()) for f in missed},
        "rows": rows,
    }


def _difference(x: np.ndarray, y: np.ndarray, video: np.ndarray) -> list[float]:
    """[mean of x - y, low, high], paired."""
    return _accuracy(x.astype(float) - y, video)


def _accuracy(values: np.ndarray, video: np.ndarray) -> list[float]:
    """[accuracy, low, high]."""
    return [float(values.mean()), *interval(values.astype(float), video)]


def evaluate(model: TinyVlm, root: Path, videos: int, long_videos: int, quota: int = QUESTIONS) -> dict[str, Any]:
    """The whole grid and frame expansion, families as learned in the first. Raises RuntimeError without features."""
    questions = chosen("test", videos, quota)
    test = summarise(_answers(model, root, "test", videos, cells(), questions), cells(), questions, f"{PLAIN}@1")
    questions = chosen("long", long_videos, quota)
    found = _answers(model, root, "long", long_videos, long_cells(), questions)
    few, expanded = f"{FEWER} frames@1", f"flashvid@{FEWER / data.LONG_FRAMES:g}"
    long = summarise(found, long_cells(), questions, few, expanded, test["learned"])
    lengths = [len(data.video("test", number)) for number in range(videos)]
    return {"test": test, "long": long, "frames of a test video": statistics.mean(lengths)}


def evaluate_variants(model: TinyVlm, root: Path, videos: int, quota: int = VARIANT_QUESTIONS) -> dict[str, Any]:
    """Changes to FlashVID on the validation videos, families as learned there."""
    questions = chosen("validation", videos, quota)
    found = _answers(model, root, "validation", videos, variants(), questions)
    return summarise(found, variants(), questions, f"{PLAIN}@1")


def _answers(model: TinyVlm, root: Path, split: Split, videos: int, grid: list[Cell], questions: Questions) -> Cells:
    store = Store(split, videos, root)
    store.require()
    return run(model, store, grid, questions)
