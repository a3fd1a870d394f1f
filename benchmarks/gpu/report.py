# SPDX-License-Identifier: MIT
"""The report of `make gpu`: where it ran, each part's verdict and figures, and what was not run and why."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..common.record import Cell, machine, markdown_table
from .device import Device
from .session import Result

HEADING = "# On a GPU: {name}"
LEGEND = """\
Made by `make gpu`. **passed** and **failed** parts came to their end; **broken** ones ended before they had an answer,
**out of time** ones were stopped at their limit, for **no time** ones too little was left, and for those **not there**
this machine lacks something; those **left out** were not asked for.
"""


def about(device: Device) -> Cell:
    """Where and with what it ran."""
    import torch

    found = machine()
    cuda = {"driver": device.driver, "memory_mib": device.memory_mib, "capability": device.capability}
    return {"device": device.name, **cuda, "cuda": torch.version.cuda, **found}


def markdown(where: Cell, results: Sequence[Result]) -> str:
    """The report."""
    lines = ["<!-- made by `make gpu` -->", HEADING.format(name=where["device"]), "", LEGEND]
    rows = [[r.name, r.verdict, f"{r.seconds:.0f}", r.date, cell(r.why)] for r in results]
    lines += markdown_table(["part", "verdict", "seconds", "when", "why, or what came of it"], rows)
    for result in results:
        lines += [f"## {result.name}: {result.verdict}", "", result.question, "", f"`{result.command}`", ""]
        lines += [f"{result.why}.", ""] if result.why else []
        lines += [*result.text, ""] if result.text else []
    lines += ["## Where it ran", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text that a table's cell can hold."""
    return " ".join(text.split()).replace("|", "\\|")


def write(folder: Path, device: Device, where: Cell, results: Sequence[Result]) -> None:
    """Write gpu-NAME.json and .md into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{device.slug}.md"
    path.write_text(markdown(where, results))
    kept = {"machine": where, "parts": [{k: v for k, v in asdict(r).items() if k != "text"} for r in results]}
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
