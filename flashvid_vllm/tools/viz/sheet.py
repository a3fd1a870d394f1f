# SPDX-License-Identifier: MIT
"""A scene as one picture: up to 16 frames and the time line."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from . import need
from .scene import PALETTE, Scene

MOST_FRAMES = 16
DPI = 100
WIDTH = 16.0  # inches, as all lengths here
MARGIN, GAP, LABEL, HEAD, TIME = 0.3, 0.12, 0.24, 1.45, 2.1
GREY = 0.8  # how much of the picture's colour goes
SINGLE, SEVERAL = "#7b8494", "#d9480f"  # as in page.css


def sheet_size(scene: Scene) -> tuple[int, int]:
    """Width and height of the picture in pixels."""
    _, rows, _, height = _layout(scene)
    return round(WIDTH * DPI), round((HEAD + rows * (height + LABEL) + TIME) * DPI)


def write_sheet(scene: Scene, path: Path) -> None:
    """Write the picture as PNG."""
    need("matplotlib")
    from matplotlib.figure import Figure

    columns, _, width, height = _layout(scene)
    total = sheet_size(scene)[1] / DPI
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")

    def area(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / WIDTH, 1 - (top + high) / total, wide / WIDTH, high / total))

    _head(figure, scene, total)
    for i, t in enumerate(_shown(scene)):
        left, top = MARGIN + i % columns * (width + GAP), HEAD + i // columns * (height + LABEL)
        axes = area(left, top, width, height)
        _frame(axes, scene, t, width)
        single, several = scene.kept()
        label = f"{t + 1} · {scene.labels[t]} · {single[t] + several[t]} kept"
        label += f" · segment {scene.segment[t] + 1}" if scene.segment else ""
        label += f" · {100 * scene.computed[t].mean():.0f} % encoded" if scene.computed is not None else ""
        axes.set_title(label, fontsize=8, color="#444", pad=3, loc="left")
    _time_line(area(MARGIN + 0.5, total - TIME + 0.3, WIDTH - 2 * MARGIN - 0.5, TIME - 0.85), scene)
    figure.savefig(path, format="png", dpi=DPI)


def _shown(scene: Scene) -> list[int]:
    """The frames in the picture: all, or as many as fit at even distances."""
    count = min(scene.grid[0], MOST_FRAMES)
    return np.linspace(0, scene.grid[0] - 1, count).round().astype(int).tolist()


def _layout(scene: Scene) -> tuple[int, int, float, float]:
    """Columns and rows of frames, width and height of one."""
    tall, wide = scene.pictures.shape[1:3]
    count = len(_shown(scene))
    columns = 8 if tall > wide else 4
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    return columns, -(-count // columns), width, width * tall / wide


def _head(figure: Any, scene: Scene, total: float) -> None:
    left = MARGIN / WIDTH
    figure.text(left, 1 - 0.2 / total, scene.title, fontsize=15, weight="bold", va="top")
    facts = [f"{name}: {value}" for name, value in scene.facts]
    text = "    ".join(facts[:-1]) + "\n" + facts[-1]
    figure.text(left, 1 - 0.52 / total, text, fontsize=9, color="#333", va="top", linespacing=1.5)
    legend = (
        "boxed: a kept token, white where it stands for itself alone; tinted: merged into the boxed token of the "
        "same colour; dark: dropped"
    )
    if scene.computed is not None:
        legend += "; hatched: not encoded, a copy from another frame (kept tokens are drawn as if all were encoded)"
    figure.text(left, 1 - 0.98 / total, legend, fontsize=9, color="#777", va="top", style="italic")


def _frame(axes: Any, scene: Scene, t: int, inches: float) -> None:
    """One frame: tints, lines around the parts of trees, boxes of kept tokens."""
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    _, rows, columns = scene.grid
    n = rows * columns
    assignment = scene.video.assignment[t].view(rows, columns).numpy()
    size, colours = scene.video.size.numpy(), [PALETTE[i] if i >= 0 else "#ffffff" for i in scene.colour]
    # one unit a token, the first row on top
    picture = scene.pictures[t] / 255
    grey = picture @ np.array([0.299, 0.587, 0.114])  # lets the trees' colours tell themselves apart
    picture = GREY * grey[..., None] + (1 - GREY) * picture
    axes.imshow(picture, extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
    tint = np.zeros((rows, columns, 4))
    tint[assignment < 0] = to_rgba("#08090c", 0.72)
    for y, x in np.argwhere(assignment >= 0):
        if size[assignment[y, x]] > 1:
            tint[y, x] = to_rgba(colours[assignment[y, x]], 0.4)
    axes.imshow(tint, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")

    point = columns / inches / 72  # of a line's width, in tokens
    line = min(1.6, 72 * inches / columns / 14)
    inset = line * point / 2 * np.array([1, rows / columns * scene.pictures.shape[2] / scene.pictures.shape[1]])
    around = np.pad(assignment, 1, constant_values=-2)
    ends, edge_colours = [], []
    for y, x in np.argwhere(assignment >= 0):
        row = assignment[y, x]
        (left, top), (right, bottom) = np.array([x, y]) + inset, np.array([x + 1, y + 1]) - inset
        for other, start, end in (
            (around[y, x + 1], (x, top), (x + 1, top)),
            (around[y + 2, x + 1], (x, bottom), (x + 1, bottom)),
            (around[y + 1, x], (left, y), (left, y + 1)),
            (around[y + 1, x + 2], (right, y), (right, y + 1)),
        ):
            if size[row] > 1 and other != row:
                ends.append((start, end))
                edge_colours.append(colours[row])
    axes.add_collection(LineCollection(ends, colors=edge_colours, linewidths=line))

    if scene.computed is not None:
        high, wide = rows / scene.computed.shape[1], columns / scene.computed.shape[2]
        copied = [Rectangle((x * wide, y * high), wide, high) for y, x in np.argwhere(~scene.computed[t])]
        axes.add_collection(
            PatchCollection(copied, facecolors="none", edgecolors="#ffffff90", linewidths=0, hatch="////")
        )

    kept = [(row, int(i) % n) for row, i in enumerate(scene.video.source_index) if int(i) // n == t]
    boxes = [Rectangle((i % columns + 0.14, i // columns + 0.14), 0.72, 0.72) for _, i in kept]
    widths = np.array([line * (1.9 if size[row] > 1 else 1.2) for row, _ in kept])
    for colour, extra in (["black"] * len(kept), 1.2), ([colours[row] for row, _ in kept], 0.0):
        axes.add_collection(PatchCollection(boxes, facecolors="none", edgecolors=colour, linewidths=widths + extra))
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _time_line(axes: Any, scene: Scene) -> None:
    """Kept tokens of every frame as bars, segments as bands, cuts as lines."""
    single, several = scene.kept()
    frame = np.arange(1, scene.grid[0] + 1)
    starts = [0, *scene.cuts(), scene.grid[0]]
    for i, (start, end) in enumerate(pairwise(starts if scene.segment else [])):
        axes.axvspan(start + 0.5, end + 0.5, color=("#eceff4", "#dde3ec")[i % 2], zorder=0)
        axes.text(
            (start + end + 1) / 2, 1.02, str(i + 1), transform=axes.get_xaxis_transform(), ha="center", fontsize=8
        )
    for cut in scene.cuts():
        axes.axvline(cut + 0.5, color="#1b1d22", linestyle="--", linewidth=1)
    axes.bar(frame, single, 0.7, color=SINGLE, label="kept as they are")
    axes.bar(frame, several, 0.7, bottom=single, color=SEVERAL, label="kept for several")
    axes.set_xlim(0.5, scene.grid[0] + 0.5)
    axes.set_ylim(0, max(1, (single + several).max()) * 1.08)
    axes.set_ylabel("kept tokens", fontsize=9)
    axes.set_xlabel("frame" + ("; segments above, dashed lines are the cuts" if scene.segment else ""), fontsize=9)
    axes.set_xticks(frame[:: -(-len(frame) // 32)])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.08), ncols=2, frameon=False, borderaxespad=0)
