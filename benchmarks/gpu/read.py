# SPDX-License-Identifier: MIT
"""What the parts' processes have left behind, as verdicts, Markdown and figures.

Each takes what a part's process came to and raises where that is no result: the part is broken then.
"""

import json
from dataclasses import asdict, fields

from tests.support.junit import remarks_of, rows_of, skips_of

from ..common.record import markdown_table
from . import kernels, sanitizer
from .session import Found, Ran

REPORT = "report.xml"
ROWS = "rows.json"
NEAR_TIE, FIGURE = "near tie", "figure"  # properties that tests record


def tests(ran: Ran) -> Found:
    """A pytest with a JUnit report."""
    report = ran.out / REPORT
    rows, skips = rows_of(report), skips_of(report)
    passed, failed = sum(row.passed for row in rows), sum(row.failed.total() for row in rows)
    if ran.code not in (0, 1) or not passed + failed:
        raise RuntimeError(f"pytest ran {passed + failed} tests and ended with {ran.code}")
    table = [[row.name, str(row.passed), str(row.failed.total()), str(row.skipped)] for row in rows]
    ties, figures = remarks_of(report, NEAR_TIE), remarks_of(report, FIGURE)
    text = markdown_table(["file", "passed", "failed", "skipped"], table)
    text += [f"- failed: {error} ({count} of {row.name})" for row in rows for error, count in row.failed.items()]
    text += [f"- skipped: {reason} ({count})" for reason, count in skips.items()]
    text += [f"- near tie: {line}" for line in ties] + [f"- {line}" for line in figures]
    found = {"rows": [asdict(row) for row in rows], "skipped": dict(skips), "near_ties": ties, "figures": figures}
    return Found("failed" if failed else "passed", f"{passed} passed, {failed} failed", tuple(text), found)


def watched(ran: Ran, tool: str) -> Found:
    """compute-sanitizer over `benchmarks.gpu.kernels`."""
    found = sanitizer.parse(ran.log, tool)
    done = [line for line in ran.log.splitlines() if line.startswith(kernels.DONE)]
    if not done and not found.count:
        raise RuntimeError("the watched program did not come to its end")
    kinds = "hazards" if tool == "racecheck" else "errors"
    why = f"{found.count} {kinds}; {done[0] if done else 'the program did not come to its end'}"
    text = [f"- {line}" for line in found.lines]
    if found.kernels:
        text.append(f"- kernels named: {', '.join(found.kernels)}")
    clean = not found.count and ran.code == 0
    return Found("passed" if clean else "failed", why, tuple(text), asdict(found))


def operations(ran: Ran) -> Found:
    """`benchmarks.ops --json`."""
    _expect_success(ran)
    from ..ops import lengths
    from ..ops.__main__ import WHOLE, Row, line_of

    entries = [json.loads(line) for line in (ran.out / ROWS).read_text().splitlines()]
    rows = [Row(**{field.name: entry[field.name] for field in fields(Row)}) for entry in entries if "op" in entry]
    text: list[str] = []
    for title, some in (
        ("The whole compression", [line_of(row) for row in rows if row.op in WHOLE]),
        ("Op by op", [line_of(row) for row in rows if row.op not in WHOLE]),
        ("The cost in the number of frames", [lengths.line_of(entry) for entry in entries if "frames" in entry]),
    ):
        text += [f"### {title}", "", *table_of(some)] if some else []
    if not any(row.by == "triton" and row.op == "compress" for row in rows):
        return Found("failed", "the Triton backend is not among those that ran", tuple(text), entries)
    return Found("passed", f"{len(rows)} rows", tuple(text), entries)


def first_request(ran: Ran) -> Found:
    """`benchmarks.gpu.first_request`."""
    _expect_success(ran)
    from .first_request import lines

    cells = json.loads((ran.out / "first_request.json").read_text())["cells"]
    start, first, again, *_ = cells
    if not sum(cell["variants"] for cell in cells):
        return Found(
            "failed", "no variant of our kernels was compiled: another backend served", tuple(lines(cells)), cells
        )
    why = f"{start['variants']} variants compiled at the start, {first['variants']} in the first request: "
    why += f"{first['seconds']:.2f} s to its first token, {again['seconds']:.2f} s again"
    return Found("passed", why, tuple(lines(cells)), cells)


def memory(ran: Ran) -> Found:
    """`benchmarks.memory`, whose report is Markdown."""
    _expect_success(ran)
    lines = (ran.out / "encoder-memory.md").read_text().splitlines()
    body = [line for line in lines if not line.startswith(("<!--", "# "))]
    return Found("passed", "", (*body, ""), [line for line in lines if line.startswith("|")])


def serving(ran: Ran) -> Found:
    """`benchmarks.serving`."""
    _expect_success(ran)
    from ..serving.report import sections

    results = json.loads((ran.out / "serving.json").read_text())
    text: list[str] = []
    for title, columns, rows in sections(results):
        text += [f"### {title}", "", *markdown_table(list(columns), rows)]
    return Found("passed", f"{len(results['cells'])} cells", tuple(text), results)


def frames(ran: Ran) -> Found:
    """`benchmarks.frames`."""
    _expect_success(ran)
    from ..frames.__main__ import COLUMNS, rows_of

    results = json.loads((ran.out / "frames.json").read_text())
    text = markdown_table(list(COLUMNS), rows_of(results))
    return Found("passed", f"{len(results['cells'])} cells", tuple(text), results)


def table_of(lines: list[dict[str, str]]) -> list[str]:
    """A Markdown table without the columns that no line has."""
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    return markdown_table(columns, [[line[name] for name in columns] for line in lines])


def _expect_success(ran: Ran) -> None:
    if ran.code:
        raise RuntimeError("it failed")
