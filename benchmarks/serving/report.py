# SPDX-License-Identifier: MIT
"""The tables and the plot of `benchmarks.serving`, made from its JSON."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..common.record import Cell, markdown_table
from ..load.report import PARTS, STYLES, provenance, ratio_to_plain, split, split_row

LOAD_COLUMNS = (
    "load", "server", "requests/s", "x plain", "TTFT p50 / p95 / p99 [s]", "p50 x plain", "TPOT p50 / p95 / p99 [ms]",
    "prompt tokens", "encoder / compression / prefill [ms a request]", "KV peak [tokens]",
)  # fmt: skip
SPLIT_COLUMNS = (
    "server", "prompt tokens", "TTFT [s], median [least, most]", "x plain", "encoder [ms]", "compression [ms]",
    "prefill [ms]", "the rest [ms]", "compression / TTFT",
)  # fmt: skip
LEGEND = """\
Times are those of this machine and of models with random weights where it says so: ratios are what carries over, and
they depend on how large the encoder is beside the language model. The encoder does the same work in every server, but
for those that are named for a share of it: as
far as its time differs between them, and TTFT and requests/s with it, that is this machine's noise. Every server got
the same {clips}, {max_tokens} tokens an answer, and the same options but for those of the compression (at the end).
TTFT: from sending a request, its video in base64, to the first token. TPOT: between two tokens after it. Percentiles
are of few requests: p99 is nearly the worst one.

Inside the worker, a request: **encoder** the vision tower, projector and pooling; **compression** choosing and merging
tokens, the reading of the encoder's attention included; **prefill** the steps with prompt tokens without both (input
preparation, forward pass, logits; answers of others that go on in such a step are in it). **The rest** of TTFT, one
request at a time: request and video decoding, resizing, tokenizing, scheduling, sampling, sending. KV peak: tokens in
the cache, looked at five times a second, so a short peak may be missed. All four servers carry the same timers; on a
GPU these wait for the device.
"""


def models(results: Cell) -> dict[str, str]:
    """The models of the results and what they are, in order."""
    return {cell["model"]: cell["about"] for cell in results["cells"]}


def cells_of(results: Cell, model: str, **fields: Any) -> list[Cell]:
    """The cells of a model with these values."""
    wanted = {"model": model, **fields}
    return [cell for cell in results["cells"] if all(cell[name] == value for name, value in wanted.items())]


def labels(results: Cell, model: str) -> dict[str, str]:
    """A server's name and whose implementation it ran."""
    return {cell["server"]: f"{cell['server']} ({cell['peer']})" for cell in cells_of(results, model)}


def load_row(cell: Cell, among: list[Cell]) -> list[str]:
    """A row under LOAD_COLUMNS."""
    ttft = " / ".join(f"{cell['ttft_ms'][p] / 1e3:.2f}" for p in ("p50", "p95", "p99"))
    tpot = " / ".join(f"{cell['tpot_ms'][p]:.0f}" for p in ("p50", "p95", "p99"))
    names = list(PARTS)[:3]
    parts = " / ".join(f"{cell['worker'][f'{part}_ms']:.1f}" for part in names) if cell["worker"] else "?"
    kv = f"{cell['kv']['peak_tokens']} ({cell['kv']['peak_share']:.1%})" if cell["kv"] else "?"
    faster = ratio_to_plain(cell, among, lambda one: one["requests_per_s"])
    sooner = ratio_to_plain(cell, among, lambda one: one["ttft_ms"]["p50"])
    load = f"{cell['load']} ({cell['requests']})"
    rate = f"{cell['requests_per_s']:.2f}"
    return [load, cell["server"], rate, faster, ttft, sooner, tpot, f"{cell['prompt_tokens']:.0f}", parts, kv]


def sections(results: Cell) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Every table: its title, its columns, its rows."""
    found: list[tuple[str, tuple[str, ...], list[list[str]]]] = []
    for model in models(results):
        single = cells_of(results, model, concurrency=1)
        if single:
            title = f"{model}: one request at a time, {single[0]['requests']} clips, {_videos(single[0])}"
            found.append((title, SPLIT_COLUMNS, [split_row(cell, single) for cell in single]))
        everything = cells_of(results, model)
        order = list(dict.fromkeys(cell["load"] for cell in everything))
        if len(order) > 1:
            rows = [load_row(c, everything) for c in sorted(everything, key=lambda cell: order.index(cell["load"]))]
            found.append((f"{model}: load (requests of a cell), {_videos(everything[0])}", LOAD_COLUMNS, rows))
    return found


def _videos(cell: Cell) -> str:
    return f"{cell['frames']} frames, {cell['ratio']:.0%} kept" if cell["frames"] else "frames as the server takes them"


def tables(results: Cell) -> list[Table]:
    """The tables for a terminal."""
    found = []
    for title, columns, rows in sections(results):
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(escape(name), justify="left" if name in ("load", "server") else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        found.append(table)
    return found


def write_markdown(results: Cell, path: Path) -> None:
    """All tables."""
    settings = results["settings"]
    clips = "real clips, repeated in every cell" if settings["clips"] == "repeated" else "real clips, none twice"
    lines = ["<!-- made by `make serving` from serving.json -->", "# Serving under load", ""]
    lines += [LEGEND.format(clips=clips, max_tokens=settings["max_tokens"])]
    lines += [f"- **{model}**: {about}" for model, about in models(results).items()]
    for model in models(results):
        lines += ["", f"Servers of {model}: {', '.join(labels(results, model).values())}."]
    for title, columns, rows in sections(results):
        lines += ["", f"## {title}", "", *markdown_table(list(columns), rows)[:-1]]
    lines.append("")
    path.write_text("\n".join([*lines, *provenance(results)]))


def write_plot(results: Cell, path: Path) -> None:
    """A row for each model: latency over throughput, latency over the rate of arrivals, what a first token takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(model, draw) for model in models(results) for draw in _panels(results, model)]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (6.2 * columns, 4.6 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    for axis, (model, draw) in zip(grid.flat, panels, strict=False):
        draw(axis, results, model)
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    machine = results["machine"]
    where = machine["gpu"] if machine.get("gpu", "none") != "none" else f"{machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(f"Serving: {where}", fontsize=12)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panels(results: Cell, model: str) -> list[Any]:
    """What can be drawn of a model."""
    cells = cells_of(results, model)
    found: list[Any] = []
    if len({cell["concurrency"] for cell in cells if cell["concurrency"]}) > 1:
        found.append(draw_concurrency)
    if any(cell["rate"] for cell in cells):
        found.append(draw_rates)
    if any(cell["each"] and cell["worker"] for cell in cells):
        found.append(draw_split)
    return found or [draw_rates]


def log_scale(axis: Any) -> None:
    """A logarithmic scale of seconds with plain numbers at it."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def draw_concurrency(axis: Any, results: Cell, model: str) -> None:
    """Median TTFT over requests a second, a point for each concurrency."""
    for server, label in labels(results, model).items():
        cells = [cell for cell in cells_of(results, model, server=server) if cell["concurrency"]]
        colour, marker = STYLES[server]
        x, y = [c["requests_per_s"] for c in cells], [c["ttft_ms"]["p50"] / 1e3 for c in cells]
        axis.plot(x, y, color=colour, marker=marker, label=label, lw=1.6, ms=6)
        if server in ("plain", "flashvid", "endpoint"):
            for cell, *point in zip(cells, x, y, strict=True):
                side = (-8, 5, "right") if server == "plain" else (8, -10, "left")
                place = {"xytext": side[:2], "textcoords": "offset points", "ha": side[2], "fontsize": 8}
                axis.annotate(f"{cell['concurrency']}", point, color=colour, **place)
    axis.set(title=f"{model}: requests at a time (numbers)", xlabel="requests/s", ylabel="median TTFT [s]")
    log_scale(axis)
    axis.margins(x=0.12)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def draw_rates(axis: Any, results: Cell, model: str) -> None:
    """Median and 95th percentile of TTFT over the rate of arrivals."""
    for server, label in labels(results, model).items():
        cells = [cell for cell in cells_of(results, model, server=server) if cell["rate"]]
        colour, marker = STYLES[server]
        x = [cell["rate"] for cell in cells]
        for percentile, style in (("p50", "-"), ("p95", ":")):
            y = [cell["ttft_ms"][percentile] / 1e3 for cell in cells]
            name = label if percentile == "p50" else None
            axis.plot(x, y, style, color=colour, marker=marker, label=name, lw=1.6, ms=5)
    axis.set(title=f"{model}: Poisson arrivals", xlabel="requests/s asked", ylabel="TTFT [s], median and 95 % (dotted)")
    log_scale(axis)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def draw_split(axis: Any, results: Cell, model: str) -> None:
    """Where the time to the first token of a single request goes."""
    cells = [cell for cell in cells_of(results, model, concurrency=1) if cell["worker"]]
    names = [cell["server"] for cell in cells]
    left = [0.0] * len(cells)
    for part, colour in PARTS.items():
        widths = [split(cell)[part] / 1e3 for cell in cells]
        axis.barh(names, widths, left=left, color=colour, label=part, edgecolor="white", lw=0.4)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, (cell, end) in enumerate(zip(cells, left, strict=True)):
        parts = split(cell)
        note = f" {parts['ttft'] / 1e3:.2f} s"
        if parts["compression"]:
            note += f", compression {parts['compression'] / parts['ttft']:.1%}"
        axis.text(end, row, note, va="center", fontsize=8)
    axis.set(title=f"{model}: TTFT of one request, {_videos(cells[0])}", xlabel="seconds (medians)")
    axis.set_xlim(0, 1.4 * max(left))
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
