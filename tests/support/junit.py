# SPDX-License-Identifier: MIT
"""What a pytest's JUnit report says, a row for each file."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """What came of one kind of tests: a line of the table."""

    name: str
    passed: int = 0
    skipped: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # first line of the error -> how many tests

    def __str__(self) -> str:
        return f"{self.name:<44} {self.passed:>6} {self.failed.total():>6} {self.skipped:>7}"


def rows_of(report: Path, runner: str = "") -> list[Row]:
    """A row for each file of a pytest's JUnit report; ``runner`` stands before its name."""
    rows: dict[str, Row] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # of a file that cannot be imported the class is empty and the name its module
        module = [part for part in (case.get("classname") or case.get("name") or "").split(".") if part != "tests"]
        name = f"{runner} {'/'.join(module)}.py".strip()
        row = rows.setdefault(name, Row(name))
        problem = next((part for kind in ("failure", "error") for part in case.findall(kind)), None)
        if problem is not None:
            row.failed[first_line(problem)] += 1
        elif case.find("skipped") is not None:
            row.skipped += 1
        else:
            row.passed += 1
    return list(rows.values())


def first_line(problem: ElementTree.Element) -> str:
    """Of an error in a JUnit report; where it has only said where, the error's own line."""
    message = (problem.get("message") or "").strip()
    errors = [line[1:].strip() for line in (problem.text or "").splitlines() if line.startswith("E  ")]
    if errors and message in ("", "collection failure"):
        message = errors[-1]
    return (message.splitlines() or ["no message"])[0][:300]


def skips_of(report: Path) -> Counter[str]:
    """Why tests were skipped -> how many."""
    skipped = ElementTree.parse(report).iter("skipped")
    return Counter((entry.get("message") or "no reason").splitlines()[0] for entry in skipped)


def remarks_of(report: Path, name: str) -> list[str]:
    """What tests recorded with ``record_property(name, ...)``: "test: value"."""
    return [
        f"{case.get('name')}: {entry.get('value')}"
        for case in ElementTree.parse(report).iter("testcase")
        for entry in case.iter("property")
        if entry.get("name") == name
    ]
