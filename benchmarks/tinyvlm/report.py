# SPDX-License-Identifier: MIT
"""The evaluation as Markdown, JSON and a plot."""

import json
from pathlib import Path
from typing import Any

from .data import LONG_FRAMES
from .grid import FEWER, METHODS, PLAIN, SPREAD

RESULTS = Path(__file__).parent / "results"


def write(results: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write accuracy.json, accuracy.md and accuracy.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "accuracy.md").write_text(markdown(results))
    plot(results, folder / "accuracy.png")


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    test, long = results["test"], results["long"]
    lines = ["# Accuracy of a small video LLM under compression", ""]
    lines += [
        f"{test['questions']} four-choice questions about {test['videos']} videos of "
        f"{results['frames of a test video']:.1f} frames on average, in percent with 95 % intervals",
        "(bootstrap over videos); chance is 25. What the figures say: [conclusions.md](conclusions.md).",
        f"Not learned and left out of every overall figure: {_left_out(test)}.",
        "",
        "## Methods by the share of tokens kept",
        "",
        *_overview(test["rows"]),
        "",
        "## Each ratio",
        "",
        "`minus plain` and `minus flashvid` are differences on the same questions, with 95 % intervals. `p`: exact",
        "McNemar test against flashvid at the same ratio, after Holm's correction over the ratio's tests. `density`:",
        "mean cosine of a video's tokens to the nearest kept one, the video's mean taken off; it is not quality.",
        "",
    ]
    lines += _ratios(test["rows"], test["learned"], "###")
    lines += [f"## Frame expansion: {FEWER} frames plain, or {LONG_FRAMES} at a tenth", ""]
    lines += [
        f"{long['questions']} questions about {long['videos']} videos of {LONG_FRAMES} frames. `{PLAIN}` gets all,",
        f"`{FEWER} frames` as many tokens as a tenth. `minus flashvid` and `p`: against flashvid at a tenth.",
        "",
    ]
    return "\n".join([*lines, *_table(long["rows"], long["learned"]), ""])


def write_variants(found: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write variants.json and variants.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "variants.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = ["# Changes to FlashVID, on the validation videos", ""]
    lines += [
        f"{found['questions']} questions about {found['videos']} videos; `benchmarks/tinyvlm/variants.py` says what",
        f"each change is. Left out: {_left_out(found)}.",
        "",
    ]
    (folder / "variants.md").write_text("\n".join([*lines, *_ratios(found["rows"], found["learned"], "##")]))


def _ratios(rows: list[dict[str, Any]], families: list[str], heading: str) -> list[str]:
    """A table of each ratio."""
    lines = []
    for ratio in sorted({row["ratio"] for row in rows if row["name"] != PLAIN}, reverse=True):
        of_it = [row for row in rows if row["name"] == PLAIN or row["ratio"] == ratio]
        lines += [f"{heading} {ratio:.0%} kept", "", *_table(of_it, families), ""]
    return lines


def _left_out(part: dict[str, Any]) -> str:
    named = [f"{family} ({accuracy:.0%} plain)" for family, accuracy in part["left out"].items()]
    return ", ".join(named) or "none"


def _overview(rows: list[dict[str, Any]]) -> list[str]:
    ratios = sorted({row["ratio"] for row in rows if row["name"] in METHODS}, reverse=True)
    plain = next(row["accuracy"][0] for row in rows if row["name"] == PLAIN)
    found = {(row["name"], row["ratio"]): row["accuracy"][0] for row in rows}
    lines = [
        f"| | {' | '.join(['100 %', *(f'{ratio:.0%}' for ratio in ratios)])} |",
        f"|---|{'---:|' * (len(ratios) + 1)}",
    ]
    asked = {method for method, _ in found}.intersection(METHODS)  # those that there were
    for method in sorted(asked, key=lambda method: (-sum(found[method, ratio] for ratio in ratios), method)):
        line = " | ".join(f"{100 * found[method, ratio]:.1f}" for ratio in ratios)
        lines.append(f"| {method} | {100 * plain:.1f} | {line} |")
    return lines


def _table(rows: list[dict[str, Any]], families: list[str]) -> list[str]:
    titles = ["all", *families, "minus plain", "minus flashvid", "p", "density"]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for row in sorted(rows, key=lambda row: -row["accuracy"][0]):
        mean, low, high = (100 * x for x in row["accuracy"])
        cells = [f"{mean:.1f} ({low:.1f} to {high:.1f})"]
        cells += [f"{100 * row['families'][family][0]:.0f}" for family in families]
        cells += [_difference(row.get(f"minus {other}")) for other in ("plain", "flashvid")]
        cells += [f"{row['p (Holm)']:.2g}" if "p" in row else "", f"{row['coverage']:.3f}"]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def _difference(values: list[float] | None) -> str:
    return "" if values is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in values))


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy over the share of tokens kept, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["test"]["rows"]
    figure, axes = pyplot.subplots(figsize=(9.5, 5))
    for place, method in enumerate(METHODS):
        points = sorted((row["ratio"], 100 * row["accuracy"][0]) for row in rows if row["name"] == method)
        width = 3.0 if method == "flashvid" else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, label=method, color=f"C{place % 10}",
                  ls="-" if place < 10 else "--")  # fmt: skip
    spread = sorted((row["ratio"], 100 * row["accuracy"][0]) for row in rows if row["name"] == f"flashvid{SPREAD}")
    axes.plot(*zip(*spread, strict=True), marker="s", ms=5, lw=3, ls=":", label=f"flashvid{SPREAD}", color="C0")
    plain = next(row["accuracy"][0] for row in rows if row["name"] == PLAIN)
    axes.axhline(100 * plain, color="black", lw=1, label="all tokens")
    axes.axhline(25, color="grey", lw=1, ls=":", label="chance")
    axes.set(xlabel="share of visual tokens kept", ylabel="accuracy [%]")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
