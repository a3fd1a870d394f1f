# SPDX-License-Identifier: MIT
"""The report as one HTML file: no script, nothing from a network, and nothing that a video or a model says is HTML."""

import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .advice import FOUND, Advice
from .grid import ENCODER_RATIO
from .summary import AGREEMENT, Different, Row, Summary
from .table import columns, notes

_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 340, 60, 24, 20, 48


def page(
    title: str,
    facts: str,
    summary: Summary,
    advice: Advice,
    keep: float,
    frames: Mapping[str, Sequence[str]],
    shown: Sequence[Different],
    failures: Sequence[str],
) -> str:
    """The file's text.

    Args:
        title, facts: the model and the versions, as text.
        frames: a video's digest -> its frames as data URIs.
        shown: of `Summary.different`, those that are drawn.
        failures: a line each.
    """
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">',
        f"<title>flashvid tune: {_text(title)}</title>", f"<style>\n{style}</style></head><body>",
        f"<h1>How small may the ratio be? {_text(title)}</h1>", f'<p class="facts">{_text(facts)}</p>',
        f'<p class="advice{"" if advice.verdict == FOUND else " open"}">{_text(advice.sentence)}</p>',
        _figure(summary, keep),
        "<h2>Figures</h2>", _table(summary),
        '<ul class="notes">', *(f"<li>{_text(note)}</li>" for note in notes(summary)), "</ul>",
        _different(summary, frames, shown),
    ]  # fmt: skip
    if failures:
        parts += ["<h2>Failed</h2>", '<ul class="notes">', *(f"<li>{_text(line)}</li>" for line in failures), "</ul>"]
    return "\n".join([*parts, "</body></html>", ""])


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _table(summary: Summary) -> str:
    found = columns(summary)
    head = "".join(f"<th>{_text(name)}</th>" for name, _ in found)
    lines = [f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>']
    for at, row in enumerate(summary.rows):
        cells = "".join(f"<td>{_text(c[at][0])}<small>{_text(c[at][1])}</small></td>" for _, c in found)
        lines.append(f"<tr><td>{_text(row.setting.name)}</td>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _different(summary: Summary, frames: Mapping[str, Sequence[str]], shown: Sequence[Different]) -> str:
    total = len(summary.different)
    if not total:
        return "<h2>Other answers</h2><p>Every setting gives the plain model's answer to every question.</p>"
    some = f", {len(shown)} of them shown" if len(shown) < total else ""
    lines = [f"<h2>Other answers: {total} question{'s' if total != 1 else ''}{some}</h2>"]
    for different in shown:
        item = different.item
        lines.append(f"<article><h3>{_text(item.video.name)}: {_text(item.question)}</h3>")
        if pictures := frames.get(item.video.digest):
            lines += ['<div class="frames">', *(f'<img src="{_text(uri)}" alt="frame">' for uri in pictures), "</div>"]
        if item.answer is not None:
            lines.append(f'<p class="facts">true answer: {_text(item.answer)}</p>')
        lines.append('<div class="answers">')
        for name, answer in different.answers.items():
            kind = ' class="differs"' if name in different.differs else ""
            lines.append(f"<div{kind}><b>{_text(name)}</b>{_text(answer) or '(nothing)'}</div>")
        lines.append("</div></article>")
    return "\n".join(lines)


def _figure(summary: Summary, keep: float) -> str:
    """What is kept over the prompt's tokens (a logarithmic axis), with intervals; a line for each method."""
    rows = [row for row in summary.rows if row.kept(summary.by) is not None and row.prompt_tokens is not None]
    if len(rows) < 2:
        return ""
    tokens = [row.prompt_tokens[0] for row in rows if row.prompt_tokens]
    ends = [v for row in rows for v in row.kept(summary.by) or () if math.isfinite(v)]
    left, right = math.log(min(tokens)), max(math.log(max(tokens)), math.log(min(tokens)) + 0.1)
    margin = 0.04 * (right - left)
    low, high = min(*ends, keep), max(*ends, 1.0)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, math.inf) if (high - low) / s <= 8)
    low = math.floor(low / step + 1e-9) * step

    def x(value: float) -> float:
        return _LEFT + (math.log(value) - left + margin) / (right - left + 2 * margin) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        value = min(max(value, low), high)
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    what = "Same answer as the plain model" if summary.by == AGREEMENT else "Likelihood of the plain answers kept"
    svg = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">']
    svg.append(f"<title>{what}, by prompt tokens, with 95 % intervals</title>")
    for number in range(math.floor((high - low) / step + 1e-9) + 1):
        value = low + number * step
        svg.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        svg.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{100 * value:g} %</text>')
    svg.append(f'<line class="bar" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(keep):.1f}" y2="{y(keep):.1f}"/>')
    svg.append(f'<text class="soft" x="{_LEFT + 4}" y="{y(keep) + 14:.1f}">--keep {keep:g}</text>')
    beside: dict[int, int] = {}  # pixels: settings of as many tokens would lie on each other
    for number, line in enumerate(_lines(rows)):
        beside |= {id(row): 6 * number for row in line if row is not rows[0]}
        points = " ".join(
            f"{x(_first(row.prompt_tokens)) + beside.get(id(row), 0):.1f},{y(_first(row.kept(summary.by))):.1f}"
            for row in line
        )
        svg.append(f'<polyline class="line" points="{points}"/>')
    for row in rows:
        value, lower, upper = row.kept(summary.by) or (0, 0, 0)
        at = x(_first(row.prompt_tokens)) + beside.get(id(row), 0)
        svg.append(f'<line class="range" x1="{at:.1f}" x2="{at:.1f}" y1="{y(lower):.1f}" y2="{y(upper):.1f}"/>')
        svg.append(f'<circle class="point" cx="{at:.1f}" cy="{y(value):.1f}" r="4">')
        svg.append(f"<title>{_text(row.setting.name)}: {100 * value:.1f} %</title></circle>")
    last = -math.inf
    for value in sorted({round(token) for token in tokens}):
        if x(value) - last < 36:  # pixels; the numbers would overlap
            continue
        last = x(value)
        svg.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    svg.append(f'<text class="soft" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">prompt tokens</text></svg>')
    return f'<figure class="wide">{"".join(svg)}<figcaption>{what}; bars are 95 % intervals.</figcaption></figure>'


def _first(found: tuple[float, float, float] | None) -> float:
    return found[0] if found else math.nan


def _lines(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their size alone, each line ending at the plain model."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows[1:]:
        key = (row.setting.positions, row.setting.request.get("method"), row.setting.request.get(ENCODER_RATIO))
        groups.setdefault(key, []).append(row)
    return [sorted([*group, rows[0]], key=lambda row: _first(row.prompt_tokens)) for group in groups.values()]
