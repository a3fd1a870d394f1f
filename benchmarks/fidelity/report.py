# SPDX-License-Identifier: MIT
"""The tables and the plot of `benchmarks.fidelity`, made from its JSON."""

from pathlib import Path
from typing import Any

from rich.table import Table

from ..common.record import markdown_table

FLOOR = "no tokens"
COLUMNS = {
    "clip": "clip",
    "frame_assigned": "frame, by assignment",
    "frame": "frame, by position",
    "clip_unweighted": "clip, sizes ignored",
    "clip_even": "clip, equal shares",
    "density": "density",
    "density_worst": "worst 5 %",
}
STYLES = {  # colour and marker: merging through time, merging in a frame, dropping
    "flashvid": ("#d62728", "o"), "tstm": ("#ff7f0e", "^"), "ttm": ("#e377c2", "v"), "fastvid": ("#9467bd", "s"),
    "prunevid": ("#8c564b", "D"), "tome": ("#bcbd22", "P"), "visionzip": ("#17becf", "X"), "adts": ("#2ca02c", "<"),
    "evs": ("#1f77b4", ">"), "vidcom2": ("#7f7f7f", "h"), "divprune": ("#000000", "x"), "uniform": ("#aaaaaa", "+"),
    "vcast": ("#005f73", "1"), "gleanvid": ("#9b2226", "2"), "adaptive": ("#ee9b00", "*"),
}  # fmt: skip
LINKING = {
    "same threshold": "At the same threshold:",
    "as many links": "TSTM's strongest links, as many as TTM makes at the threshold:",
}
LEGEND = """\
{clips} clips of {frames} frames x {tokens} tokens, compressed after layer {layers_before}; the {layers_after} layers
left run on the result. Cosine of the class embedding to the full run's, mean over clips, [95 % bootstrap interval over
clips]. Clips cut from one video are not independent, so the intervals are narrower than they should be.

- **clip**: all tokens of the clip attend to each other, each as often as the tokens it stands for (log of the size
  added to the logits), with the mean class token. The tables are sorted by it. What is dropped leaves no weight behind:
  the class token then attends more to itself.
- **frame, by assignment**: each frame by itself, with the tokens that stand for any of its tokens.
- **frame, by position**: each frame by itself, with the tokens whose position lies in it. Merging through time moves
  what is still to the first frame that shows it, and this view does not follow.
- **clip, sizes ignored**: as clip, every token counting once, as in an LLM.
- **clip, equal shares**: as clip, every token counting T*N/B times: sizes are ignored, and the class token keeps its
  share of the full run.
- *density*: mean cosine (centred) of each token to the one that stands for it, and of the worst 5 %. Not quality.
- `no tokens` is the floor: the class tokens alone.
- time: one compression, as a ratio to flashvid's on the same clip, median. The machine was shared: ratios only.
"""


def rows_of(results: dict[str, Any], ratio: float) -> list[dict[str, Any]]:
    """The rows of one ratio, the best by the leading measure first."""
    return sorted((row for row in results["summary"] if row["ratio"] == ratio), key=lambda row: -row["clip"][0])


def interval(triple: list[float], digits: int = 3) -> str:
    """mean [low, high]."""
    return f"{triple[0]:.{digits}f} [{triple[1]:.{digits}f}, {triple[2]:.{digits}f}]"


def paired(row: dict[str, Any], name: str, clips: int) -> str:
    """The difference to flashvid with its interval, and on how many clips it is better; empty for flashvid."""
    if f"{name}-flashvid" not in row:
        return ""
    mean, low, high = row[f"{name}-flashvid"]
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {row[f'{name}>flashvid']} of {clips}"


def table(results: dict[str, Any], ratio: float) -> Table:
    """The table of one ratio for a terminal: means, and the leading measure's paired difference."""
    shown = Table(title=f"{ratio:.0%} of the tokens, mean of {len(results['clips'])} clips", title_justify="left")
    for name in ("method", *COLUMNS.values(), "clip - flashvid, 95 %", "time / flashvid"):
        shown.add_column(name, justify="left" if name == "method" else "right")
    for row in [*rows_of(results, ratio), *rows_of(results, 0.0)]:
        values = [f"{row[name][0]:.3f}" if name in row else "" for name in COLUMNS]
        difference = paired(row, "clip", len(results["clips"]))
        shown.add_row(row["method"], *values, difference, f"{row['time/flashvid']:.1f} x" if "ms" in row else "")
    return shown


def write_markdown(results: dict[str, Any], path: Path) -> None:
    """All tables."""
    machine, settings, clips = results["machine"], results["settings"], results["clips"]
    lines = [
        "<!-- made by `make fidelity` from fidelity.json; conclusions: fidelity-conclusions.md -->",
        "# Fidelity on real clips, real CLIP ViT-B/16",
        "",
        LEGEND.format(clips=len(clips), **settings),
    ]
    for ratio in sorted({row["ratio"] for row in results["summary"]} - {0.0}):
        lines += [f"## {ratio:.0%}", ""]
        rows = []
        for row in [*rows_of(results, ratio), *rows_of(results, 0.0)]:
            values = [interval(row[name]) if name in row else "" for name in COLUMNS]
            rows.append([row["method"], *values, f"{row['time/flashvid']:.1f}" if "ms" in row else ""])
        lines += markdown_table(["method", *COLUMNS.values(), "time / flashvid"], rows)
        lines += ["Paired differences to flashvid, and on how many clips the method is better:", ""]
        names = list(COLUMNS)[:5]
        rows = [
            [row["method"], *(paired(row, name, len(clips)) for name in names)]
            for row in rows_of(results, ratio)
            if row["method"] != "flashvid"
        ]
        lines += markdown_table(["method", *(COLUMNS[name] for name in names)], rows)
    lines += [*_linking(results), *_by_clip(results)]
    lines += ["## Where it ran", "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    path.write_text("\n".join(lines))


def _linking(results: dict[str, Any]) -> list[str]:
    """TSTM against TTM."""
    names = {"merged": "tokens merged", "to_parent": "cosine to the parent", "to_tree": "cosine to the tree's mean"}
    lines = [
        "## TSTM against TTM",
        "",
        "All tokens linked to the frame before (no ADTS, no budget), in the same segments.",
        "",
    ]
    for kind, title in LINKING.items():
        rows = []
        for row in (row for row in results["linking"] if row["kind"] == kind):
            for name in names if kind == "same threshold" else ("to_parent", "to_tree"):
                better, of = row[f"higher_{name}"]
                digits = 3 if name == "merged" else 4
                triple = [interval(row[f"{how}_{name}"], digits) for how in ("tstm", "ttm", "difference")]
                rows.append([f"{row['threshold']}", names[name], *triple, f"{better} of {of}"])
        header = ["threshold", "", "TSTM", "TTM", "TSTM - TTM", "TSTM higher"]
        lines += [title, "", *markdown_table(header, rows)]
    return lines


def _by_clip(results: dict[str, Any]) -> list[str]:
    """The leading measure, clip by clip, at the smallest ratio."""
    ratio = min(row["ratio"] for row in results["summary"] if row["ratio"])
    methods = [row["method"] for row in rows_of(results, ratio)]
    at = {(cell["video"], cell["method"]): cell for cell in results["cells"] if cell["ratio"] in (ratio, 0.0)}
    rows = [
        [name, clip["kind"], clip["about"], *(f"{at[name, method]['clip']:.3f}" for method in [*methods, FLOOR])]
        for name, clip in results["clips"].items()
    ]
    return [f"## Clip by clip at {ratio:.0%}", "", *markdown_table(["clip", "kind", "", *methods, FLOOR], rows)]


def write_plot(results: dict[str, Any], path: Path) -> None:
    """The leading measures over the ratio, and each method's leading measure against its density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "clip": "whole clip, tokens weighted by size",
        "frame_assigned": "frame by frame, by assignment, weighted by size",
        "frame": "frame by frame, by position, weighted by size",
        "clip_unweighted": "whole clip, sizes ignored (as an LLM)",
        "clip_even": "whole clip, equal shares",
    }
    figure, grid = pyplot.subplots(2, 3, figsize=(17, 10), constrained_layout=True)
    axes = list(grid.flat)
    ratios = sorted({row["ratio"] for row in results["summary"]} - {0.0})
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        for number, (method, (colour, marker)) in enumerate(STYLES.items()):
            rows = [next(r for r in rows_of(results, ratio) if r["method"] == method) for ratio in ratios]
            loss = [[1 - value for value in row[name]] for row in rows]  # of the mean, the low and the high end
            mean, high, low = zip(*loss, strict=True)
            spread = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
            x = [100 * ratio + 0.12 * (number - len(STYLES) / 2) for ratio in ratios]
            wide = 2.4 if method == "flashvid" else 1.1
            axis.errorbar(x, mean, spread, label=method, color=colour, marker=marker, lw=wide, elinewidth=0.7, ms=6)
        axis.set(title=title, xlabel="tokens kept [%]", xticks=[100 * ratio for ratio in ratios], yscale="log")
        axis.invert_yaxis()
        axis.grid(alpha=0.3, which="both")
    for axis in (axes[0], axes[3]):
        axis.set_ylabel("1 - cosine to the full run's class embedding (up is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncol=len(STYLES), loc="outside lower center")
    for row in rows_of(results, ratios[0]):
        colour, marker = STYLES[row["method"]]
        axes[5].scatter(row["density"][0], row["clip"][0], color=colour, marker=marker, s=60)
        place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
        axes[5].annotate(row["method"], (row["density"][0], row["clip"][0]), **place)
    axes[5].set(
        title=f"density is not quality ({ratios[0]:.0%})",
        xlabel="density",
        ylabel="cosine, whole clip, tokens weighted by size",
    )
    axes[5].grid(alpha=0.3)
    figure.suptitle(
        f"CLIP ViT-B/16, {len(results['clips'])} real clips x {results['settings']['frames']} frames: the last "
        f"{results['settings']['layers_after']} layers on compressed tokens; 95 % bootstrap over clips"
    )
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
