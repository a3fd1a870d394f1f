# SPDX-License-Identifier: MIT
"""Tokens dropped inside the LLM: FlashVID's hybrid and FastV against compression before the LLM alone, at equal R.

R is the mean over the LLM's layers. FastV's is what is left behind its K layers, as its paper counts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import Budget, plan

from ..common.record import Cells, fingerprint
from ..common.server import VllmServer
from . import answers, inside
from .encoder import asked
from .evaluate import answers_in, results_file
from .features import Store
from .grid import PLAIN, SPREAD, Cell
from .model import Size, TinyVlm
from .progress import progress
from .questions import FAMILIES, Question
from .served import SERVER, ask_server
from .stats import as_line, holm, interval, mcnemar, of_line, percent

VIDEOS = 48
SERVED_VIDEOS = 40  # some 300 questions
RATIOS = (0.25, 0.20, 0.15, 0.10, 0.05)
DEPTH = Size().layers
BEFORE = "before the LLM"
PAPERS = (3, 0.3)  # of 4 layers, as the paper's 20 of 28
HYBRIDS = (PAPERS, (3, 0.1), (3, 0.5), (2, 0.3), (1, 0.3))
FASTV = (2, 1)  # its paper's K, and the same share of the layers
SAME_KV = f"{BEFORE}, as many as hybrid {PAPERS[0]}, {PAPERS[1]:g}"
SERVED = {
    "hybrid": {"inner_layer": PAPERS[0], "inner_ratio": PAPERS[1]},
    "fastv": {"method": "fastv", "inner_layer": FASTV[0]},
}
SERVED_RATIOS = {"hybrid": (0.25, 0.10), "fastv": (0.10,)}


def hybrid(layer: int, left: float) -> str:
    """Its name."""
    return f"hybrid {layer}, {left:g}"


def _more() -> float:
    """How many times R enters with PAPERS."""
    layer, left = PAPERS
    return DEPTH / (layer + left * (DEPTH - layer))


def config(name: str, ratio: float) -> FlashVidConfig:
    """The settings of a row of the tables."""
    if name == BEFORE:
        return FlashVidConfig(ratio)
    if name == SAME_KV:
        return FlashVidConfig(round(ratio * _more(), 6))
    for layer, left in HYBRIDS:
        if name == hybrid(layer, left):
            return FlashVidConfig(ratio, inner=True, inner_layer=layer, inner_ratio=left, inner_depth=DEPTH)
    return FlashVidConfig(ratio, method="fastv", inner_layer=int(name.split()[-1]), inner_depth=DEPTH)


def names(positions: str) -> list[str]:
    """The rows of a table. With FastV all tokens enter, so that `positions` are the same."""
    own = [BEFORE, SAME_KV, *(hybrid(*pair) for pair in HYBRIDS)]
    return own if positions == "original" else [*own, *(f"fastv {layer}" for layer in FASTV)]


@dataclass(frozen=True)
class Inside(Cell):
    """A cell whose ``config`` may drop tokens inside the LLM."""

    def budget(self, video: answers.Encoded) -> Budget:
        """How many tokens enter, and how many are left."""
        assert self.config is not None
        num_frames, n, _ = video.tokens.shape
        return plan(num_frames, n, self.config)


def cells() -> list[Cell]:
    """Every setting at every ratio, with either `positions`, and the whole video."""
    return [Cell(PLAIN, 1.0, None)] + [
        Inside(f"{name}{end}", ratio, config(name, ratio), spread=bool(end))
        for end, positions in (("", "consecutive"), (SPREAD, "original"))
        for ratio in RATIOS
        for name in names(positions)
    ]


def answer(model: TinyVlm, root: Path, videos: int = VIDEOS) -> dict[str, Any]:
    """Cell -> a string, "1" for each question about the first ``videos`` test videos that is answered right, and the
    share of the tokens that enters the LLM; goes on where it stopped. Raises RuntimeError without the features."""
    store, questions, grid = Store("test", videos, root), asked(videos), cells()
    store.require()
    path = results_file(model, "test", questions, root)
    code = fingerprint([Path(inside.__file__)])
    found = answers_in(path.with_stem(f"inner-{code}-{path.stem}"))
    todo = {n: [cell for cell in grid if (cell.key, n) not in found.known] for n in questions}
    with progress("inside the LLM", sum(map(len, todo.values()))) as advance:
        for number, settings in todo.items():
            video = answers.encoded(model, store, number) if settings else None
            for cell in settings:
                assert video is not None
                found.add({"cell": cell.key, "video": number, **_answer(model, video, cell, questions[number])})
                advance()
    return _together(found, grid, questions)


def _answer(model: TinyVlm, video: answers.Encoded, cell: Cell, questions: Sequence[Question]) -> dict[str, Any]:
    whole = video.tokens.shape[0] * video.tokens.shape[1]
    if not isinstance(cell, Inside):
        return {"right": answers.right(model, video.tokens.flatten(0, 1), questions), "entering": 1.0}
    budget, chosen = cell.budget(video), cell.config
    assert chosen is not None
    tokens, place = cell.tokens(video)
    found = inside.right(model, tokens, questions, chosen.inner_layer or DEPTH, budget.inner_tokens, place, whole)
    return {"right": found, "entering": budget.tokens / whole}


def _together(found: Cells, grid: Sequence[Cell], questions: dict[int, list[Question]]) -> dict[str, Any]:
    entries = {(entry["cell"], entry["video"]): entry for entry in found.cells}
    lines = {cell.key: as_line(x for n in questions for x in entries[cell.key, n]["right"]) for cell in grid}
    shares = {cell.key: float(np.mean([entries[cell.key, n]["entering"] for n in questions])) for cell in grid}
    return {"videos": len(questions), "answers": lines, "entering": shares}


def serve(directory: Path, cells_file: Path, videos: int = SERVED_VIDEOS) -> dict[str, str]:
    """The same questions to `vllm serve` with the plugin: server@ratio -> a string as from `answer`; goes on where it
    stopped. ``directory``: the model as `model.build` makes it."""
    found = Cells(cells_file, lambda cell: (cell["server"], cell["settings"], cell["ratio"], cell["video"]))
    todo = list(_todo(found, videos))
    with progress("served", len(todo)) as advance:
        for server, settings in SERVED.items():
            of_it = [entry for entry in todo if entry[0] == server]
            if not of_it:
                continue
            with VllmServer(directory, *SERVER, "--flashvid-config", json.dumps(settings)) as running:
                client = running.client()
                for _, ratio, number, questions in of_it:
                    line = "".join(
                        str(int(ask_server(client, running.model, number, q, ratio) == q.answer)) for q in questions
                    )
                    named = {"server": server, "settings": json.dumps(settings), "ratio": ratio, "video": number}
                    found.add({**named, "right": line})
                    advance()
    lines = {found.key(cell): cell["right"] for cell in found.cells}
    return {
        f"{server}@{ratio:g}": "".join(lines[server, json.dumps(settings), ratio, n] for n in asked(videos))
        for server, settings in SERVED.items()
        for ratio in SERVED_RATIOS[server]
    }


def _todo(found: Cells, videos: int) -> Iterator[tuple[str, float, int, list[Question]]]:
    for server, settings in SERVED.items():
        for ratio in SERVED_RATIOS[server]:
            for number, questions in asked(videos).items():
                if (server, json.dumps(settings), ratio, number) not in found.known:
                    yield server, ratio, number, questions


def markdown(found: dict[str, Any]) -> str:
    """The tables of what `answer` gives, with what `serve` gives as ``served``."""
    pairs = [(n, question) for n, entries in asked(found["videos"]).items() for question in entries]
    video, family = np.array([n for n, _ in pairs]), np.array([q.family for _, q in pairs])
    lines = {key: of_line(line) for key, line in found["answers"].items()}
    text = [
        "# Inside the LLM",
        "",
        f"{len(pairs)} questions about the first {found['videos']} test videos, in percent, all tokens "
        f"{percent(lines[f'{PLAIN}@1'])}.",
        f"The LLM has {DEPTH} layers, R is the mean over them. **enter**: the share of a video that enters it, and",
        "that the KV cache holds. `hybrid K, r`: behind K layers r of them are left.",
        f"`{SAME_KV}`: as many enter (or one fewer) and all stay, so",
        f"that its mean is {_more():.2f} R. `fastv K` counts as its paper does: all enter, R of them are left behind",
        f"K layers; the mean at 10 % is {_mean(FASTV[0])} and {_mean(FASTV[1])}. Difference: from `{BEFORE}` at the",
        "same R, on the same questions, with its 95 % interval (bootstrap over videos), * where McNemar's p is below",
        "0.05 after Holm's correction over the table.",
        "`python -m benchmarks.tinyvlm inner` makes this page and [its answers](inner.json).",
        "",
    ]
    for end, positions in (("", "consecutive"), (SPREAD, "original")):
        text += [f"## `positions` {positions}", "", *_table(lines, found["entering"], video, end, positions), ""]
    text += ["## By family", "", *_by_family(lines, family), ""]
    if served := found.get("served"):
        text += [
            "## Served",
            "",
            "The first of these questions to `vllm serve` with the plugin, `positions` consecutive:",
            "",
        ]
        text += ["| | in torch | served | right or wrong alike |", "|---|---:|---:|---:|"]
        for key, line in served.items():
            name, ratio = key.split("@")
            own = lines[f"{hybrid(*PAPERS) if name == 'hybrid' else f'fastv {FASTV[0]}'}@{ratio}"]
            there = of_line(line)
            own = own[: len(there)]
            row = [f"{name}, {float(ratio):.0%}", percent(own), percent(there)]
            text.append(f"| {' | '.join(row)} | {(own == there).sum()} of {len(own)} |")
        text.append("")
    return "\n".join(text)


def _table(
    lines: dict[str, np.ndarray], entering: dict[str, float], video: np.ndarray, end: str, positions: str
) -> list[str]:
    rows = {(name, ratio): lines[f"{name}{end}@{ratio:g}"] for name in names(positions) for ratio in RATIOS}
    tests = {f"{name}@{ratio}": mcnemar(x, rows[BEFORE, ratio]) for (name, ratio), x in rows.items() if name != BEFORE}
    p = holm(tests)
    text = [
        f"| | {' | '.join(f'{ratio:.0%}' for ratio in RATIOS)} | enter at 10% |",
        f"|---|{'---:|' * (len(RATIOS) + 1)}",
    ]
    for name in names(positions):
        shown = [name]
        for ratio in RATIOS:
            x, y = rows[name, ratio], rows[BEFORE, ratio]
            cell = percent(x)
            if name != BEFORE:
                difference = x.astype(float) - y
                low, high = (100 * bound for bound in interval(difference, video))
                star = "*" if p[f"{name}@{ratio}"] < 0.05 else ""
                cell += f" ({100 * difference.mean():+.1f}: {low:+.1f} to {high:+.1f}){star}"
            shown.append(cell)
        shown.append(f"{entering[f'{name}{end}@0.1']:.1%}")
        text.append(f"| {' | '.join(shown)} |")
    return text


def _by_family(lines: dict[str, np.ndarray], family: np.ndarray) -> list[str]:
    """At a quarter and a tenth, with either `positions`."""
    there = [f for f in FAMILIES if (family == f).any()]
    counts = [f"{f} ({(family == f).sum()})" for f in there]
    text = [f"| | {' | '.join(counts)} |", f"|---|{'---:|' * len(there)}"]
    for end, positions in (("", "consecutive"), (SPREAD, "original")):
        for ratio in (0.25, 0.10):
            for name in names(positions):
                x = lines[f"{name}{end}@{ratio:g}"]
                shown = [f"{100 * x[family == f].mean():.0f}" for f in there]
                text.append(f"| {name}, {positions}, {ratio:.0%} | {' | '.join(shown)} |")
    return text


def _mean(layer: int, ratio: float = 0.10) -> str:
    """FastV's, over the layers."""
    return f"{(layer + (DEPTH - layer) * ratio) / DEPTH:.1%}"


def write(found: dict[str, Any], folder: Path) -> None:
    """Write inner.json and inner.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inner.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "inner.md").write_text(markdown(found))
