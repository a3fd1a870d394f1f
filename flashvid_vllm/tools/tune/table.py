# SPDX-License-Identifier: MIT
"""The figures as text, for the terminal and for other documents."""

import math
from collections.abc import Sequence

from .stats import Estimate
from .summary import LIKELIHOOD, Row, Summary

Cell = tuple[str, str]  # value, interval


def columns(summary: Summary) -> list[tuple[str, list[Cell]]]:
    """Heading -> a cell for each row; a column that nothing is known of is left out."""
    rows = summary.rows
    plain = rows[0].prompt_tokens
    found: list[tuple[str, list[Cell]]] = [
        ("tokens", [_cell(row.prompt_tokens, "{:.0f}") for row in rows]),
        ("of plain", [_share_of(row.prompt_tokens, plain) for row in rows]),
        ("TTFT, s", [_cell(row.first_token, "{:.3g}") for row in rows]),
        ("x plain", [_cell(row.first_token_ratio, "{:.2f}") for row in rows]),
        (_agreement(rows), [_cell(row.agreement, "{:.1%}") for row in rows]),
        ("same tokens", [_number(row.common_tokens, "{:.1f}") for row in rows]),
        ("log-prob.", [_number(row.logprob, "{:.3f}") for row in rows]),
        ("likelihood", [_cell(row.likelihood, "{:.1%}") for row in rows]),
        ("accuracy", [_cell(row.accuracy, "{:.1%}") for row in rows]),
        ("McNemar p", [_number(row.mcnemar, "{:.2g}") for row in rows]),
    ]
    return [(name, cells) for name, cells in found if any(value for value, _ in cells)]


def as_text(summary: Summary) -> str:
    """A table that fits a terminal: the intervals in a line below their values."""
    found = columns(summary)
    names = [row.setting.name for row in summary.rows]
    width = max(len(name) for name in names)
    widths = [max(len(name), *(max(map(len, cell)) for cell in cells)) for name, cells in found]
    lines = ["  ".join([" " * width, *(name.rjust(w) for (name, _), w in zip(found, widths, strict=True))])]
    for at, name in enumerate(names):
        for part in (0, 1):
            cells = [cells[at][part].rjust(w) for (_, cells), w in zip(found, widths, strict=True)]
            line = "  ".join([(name if not part else "").ljust(width), *cells]).rstrip()
            lines += [line] if line.strip() else []
    return "\n".join(lines)


def notes(summary: Summary) -> list[str]:
    """What the figures are, in lines."""
    row = summary.rows[0]
    lines = [
        f"{row.items} questions about {row.videos} videos; 95 % intervals are over videos. Tokens are the prompt's.",
        *([_agrees(summary)] if any(r.agreement for r in summary.rows) else []),
    ]
    if row.first_token:
        lines.append(
            "TTFT, time to the first token: median, one request at a time, each with a video that no cache knows: "
            "sending, decoding, processor, encoder, compression and prefill."
        )
    if row.logprob is not None and summary.floor is not None:
        lines.append(
            f"Log-prob.: of the plain answers' tokens, mean; {summary.floor:.3f} given another item's video. "
            "Likelihood: where it lies between that (0) and the plain video (100 %)."
        )
    if summary.unscored:
        lines.append(f"{summary.unscored} plain answers have no likelihood: their text becomes other tokens.")
    if summary.by == LIKELIHOOD:
        lines.append("The likelihood decides: in free text one other word ends agreement, whatever the answer says.")
    return lines


def _agreement(rows: Sequence[Row]) -> str:
    return "same answer" if rows[0].choices else f"same {'' if not rows[0].free else 'beginning'}".strip()


def _agrees(summary: Summary) -> str:
    row = summary.rows[0]
    if row.choices and row.free:
        return f"Same answer: the plain model's choice, or in free text its first {summary.same_tokens} tokens."
    if row.choices:
        return f"Same answer: the plain model's choice, of {row.choices} questions with choices."
    return (
        f"Same beginning: the plain answer's first {summary.same_tokens} tokens. Same tokens: how many are the same "
        "before the first other one, mean."
    )


def _cell(found: Estimate | None, form: str) -> Cell:
    if found is None:
        return "", ""
    value, low, high = found
    if not (math.isfinite(low) and math.isfinite(high)):
        return form.format(value), "?"
    if low == high:
        return form.format(value), ""
    return form.format(value), f"{form.format(low).rstrip('%')} to {form.format(high).rstrip('%')}"


def _share_of(found: Estimate | None, plain: Estimate | None) -> Cell:
    return (f"{found[0] / plain[0]:.1%}", "") if found and plain else ("", "")


def _number(value: float | None, form: str) -> Cell:
    return ("" if value is None else form.format(value)), ""
