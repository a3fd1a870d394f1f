# SPDX-License-Identifier: MIT
"""Every setting on every test question, from cached features; goes on where it stopped."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clips import ROOT
from . import data
from .answers import Encoded, encoded, kept, right
from .backgrounds import Split
from .features import Store, fingerprint
from .grid import FEWER, PLAIN, QUESTIONS, Cell, cells, chosen, long_cells
from .model import TinyVlm
from .progress import progress
from .questions import FAMILIES, Question
from .stats import holm, interval, mcnemar

Questions = dict[int, list[Question]]  # of each video
LEARNED = 0.40  # least plain accuracy of a family that is compared; chance is 0.25


def code_fingerprint() -> str:
    """What the answers depend on in the plugin, as 12 hexadecimal digits."""
    files = [ROOT / "flashvid_vllm" / f"{name}.py" for name in ("budget", "config", "compress")]
    for folder in (ROOT / "flashvid_vllm" / "methods", ROOT / "kernels" / "ops", ROOT / "csrc"):
        files += [path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


class Answers:
    """Right and wrong by setting and video, a line each in a file: what is there is not asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]  # a cut line is dropped
        self.known: dict[tuple[str, int], list[bool]] = {(e["cell"], e["video"]): e["right"] for e in entries}
        if lines:
            path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def add(self, cell: str, video: int, answers: list[bool]) -> None:
        """Keep what was answered about a video."""
        with self.path.open("a") as file:
            file.write(json.dumps({"cell": cell, "video": video, "right": answers}) + "\n")
        self.known[cell, video] = answers


def results_file(weights: Tensor, split: Split, questions: Questions, root: Path) -> Path:
    """Where the answers of these weights to these questions are kept."""
    digest = hashlib.sha256(weights.numpy().tobytes() + repr(questions).encode())
    digest.update(f"{fingerprint(split)} {code_fingerprint()}".encode())
    return root / "answers" / f"{split}-{digest.hexdigest()[:12]}.jsonl"


def run(model: TinyVlm, store: Store, grid: Sequence[Cell], questions: Questions) -> Answers:
    """Answer the questions in every setting of the grid."""
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    answers = Answers(results_file(weights, store.split, questions, store.root))
    todo = {n: [cell for cell in grid if (cell.key, n) not in answers.known] for n in questions}
    with progress(f"{store.split} answers", sum(map(len, todo.values()))) as advance:
        for number, settings in todo.items():
            video = encoded(model, store, number) if settings else None
            for cell in settings:
                assert video is not None
                tokens = kept(_frames(video, cell), cell.config)
                answers.add(cell.key, number, right(model, tokens, questions[number]))
                advance()
    return answers


def _frames(video: Encoded, cell: Cell) -> Encoded:
    if cell.frames is None:
        return video
    index = torch.from_numpy(np.linspace(0, len(video.tokens) - 1, cell.frames).round().astype(int))
    return Encoded(video.tokens[index], video.attention[index])


def summarise(answers: Answers, grid: Sequence[Cell], questions: Questions, base: str) -> dict[str, Any]:
    """Accuracies with 95 % intervals over all and by family, and paired tests against FlashVID at the same ratio.

    ``base``: the key of the setting that tells whether a family was learned. Families below LEARNED there count in
    no comparison and are named.
    """
    family = np.array([q.family for asked in questions.values() for q in asked])
    video = np.array([n for n, asked in questions.items() for _ in asked])
    correct = {cell.key: np.array([x for n in questions for x in answers.known[cell.key, n]]) for cell in grid}
    learned = [f for f in FAMILIES if (family == f).any() and correct[base][family == f].mean() >= LEARNED]
    missed = [f for f in FAMILIES if (family == f).any() and f not in learned]
    if not learned:
        raise RuntimeError(f"the model answers no family of questions in {LEARNED:.0%} of the cases: train it longer")
    counts = np.isin(family, learned)
    rows = []
    for cell in grid:
        x = correct[cell.key]
        row: dict[str, Any] = {"name": cell.name, "ratio": cell.ratio, "accuracy": _accuracy(x[counts], video[counts])}
        row["families"] = {f: _accuracy(x[family == f], video[family == f]) for f in FAMILIES if (family == f).any()}
        same = f"flashvid@{cell.ratio:g}"
        if same in correct and same != cell.key:
            y = correct[same]
            difference = x[counts].astype(float) - y[counts]
            row["minus flashvid"] = [float(difference.mean()), *interval(difference, video[counts])]
            row["p"] = mcnemar(x[counts], y[counts])
        rows.append(row)
    for ratio in {row["ratio"] for row in rows}:
        corrected = holm({row["name"]: row["p"] for row in rows if row["ratio"] == ratio and "p" in row})
        for row in rows:
            if row["ratio"] == ratio and "p" in row:
                row["p (Holm)"] = corrected[row["name"]]
    return {
        "questions": int(counts.sum()),
        "videos": len(set(video[counts].tolist())),
        "learned": learned,
        "left out": {f: float(correct[base][family == f].mean()) for f in missed},
        "rows": rows,
    }


def _accuracy(values: np.ndarray, video: np.ndarray) -> list[float]:
    """[accuracy, low, high]."""
    return [float(values.mean()), *interval(values.astype(float), video)]


def evaluate(model: TinyVlm, root: Path, videos: int, long_videos: int, quota: int = QUESTIONS) -> dict[str, Any]:
    """The whole grid and frame expansion. Raises RuntimeError where features are missing."""
    results: dict[str, Any] = {}
    for split, count, grid, base in (
        ("test", videos, cells(), f"{PLAIN}@1"),
        ("long", long_videos, long_cells(), f"{FEWER} frames@1"),
    ):
        store = Store(split, count, root)  # type: ignore[arg-type]
        store.require()
        questions = chosen(store.split, count, quota)
        results[split] = summarise(run(model, store, grid, questions), grid, questions, base)
    lengths = [len(data.video("test", number)) for number in range(videos)]
    return results | {"frames of a test video": statistics.mean(lengths)}
