# SPDX-License-Identifier: MIT
"""What the reports of load benchmarks share: colours, the parts of a first token's time, where it ran."""

import statistics
from typing import Any

from ..common.record import Cell

STYLES = {  # colour and marker
    "plain": ("#444444", "o"), "evs": ("#1f77b4", "^"), "vidcom2": ("#2ca02c", "s"), "flashvid": ("#d62728", "D"),
    "endpoint": ("#9467bd", "P"), "flashvid-encoder-0.5": ("#e377c2", "v"), "flashvid-encoder-0.25": ("#8c564b", "<"),
    "flashvid-encoder-auto": ("#bcbd22", ">"), "flashvid-inner": ("#17becf", "X"), "fastv": ("#ff7f0e", "p"),
}  # fmt: skip
PARTS = {"encoder": "#a6bddb", "compression": "#d62728", "prefill": "#fdae6b", "rest": "#d9d9d9"}


def ratio_to_plain(cell: Cell, among: list[Cell], value: Any) -> str:
    """``value`` of a cell over that of plain under the same load; empty for plain itself, or without one."""
    plain = [other for other in among if other["server"] == "plain" and other["load"] == cell["load"]]
    return "" if cell["server"] == "plain" or not plain else f"{value(cell) / value(plain[0]):.2f}"


def split(cell: Cell) -> dict[str, float]:
    """The median TTFT of single requests and of its parts [ms]. Medians of parts need not add up: "rest" is its own."""
    found = {"ttft": statistics.median(entry["ttft_ms"] for entry in cell["each"])}
    if cell["worker"]:
        for part in list(PARTS)[:3]:
            found[part] = statistics.median(entry[f"{part}_ms"] for entry in cell["each"])
        rest = [entry["ttft_ms"] - sum(entry[f"{part}_ms"] for part in list(PARTS)[:3]) for entry in cell["each"]]
        found["rest"] = statistics.median(rest)
    return found


def split_row(cell: Cell, among: list[Cell]) -> list[str]:
    """A row under SPLIT_COLUMNS."""
    parts = split(cell)
    each = [entry["ttft_ms"] / 1e3 for entry in cell["each"]]
    times = [f"{parts[part]:.1f}" if part in parts else "?" for part in PARTS]
    share = f"{parts['compression'] / parts['ttft']:.2%}" if "compression" in parts else "?"
    total = f"{parts['ttft'] / 1e3:.2f} [{min(each):.2f}, {max(each):.2f}]"
    faster = ratio_to_plain(cell, among, lambda one: split(one)["ttft"])
    return [cell["server"], f"{cell['prompt_tokens']:.0f}", total, faster, *times, share]


def provenance(results: Cell) -> list[str]:
    """Where it ran, and with which options."""
    lines = ["## Where it ran", "", ", ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    threads = {cell["worker"]["threads"] for cell in results["cells"] if cell["worker"]}
    if threads:
        lines += [f"Threads that the worker computes with: {', '.join(map(str, sorted(threads)))}.", ""]
    for server in results["settings"]["servers"]:
        lines += [f"- {server['server']}, {server['model']}: `{server['arguments'] or 'started by others'}`"]
    return [*lines, ""]
