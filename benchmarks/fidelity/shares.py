# SPDX-License-Identifier: MIT
"""How much of the real clips an encoder computes with `encoder_ratio` "auto", and what a share leaves unexplained.

    python -m benchmarks.fidelity.shares     into benchmarks/results/encoder-shares.md, in seconds: no tower runs

Pixels alone: 16 frames of each clip as CLIP ViT-B/16 gets them, chosen from as the plugin does. What copies cost in
answers is another question, which benchmarks/tinyvlm asks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.choice import choose
from flashvid_vllm.core.levels import PixelScale, frame_rows

from ..common.clip_model import MEAN, STD
from ..common.record import RESULTS, markdown_table
from .clips import SCENES, pixels

SHARES = (0.5, 0.25, 0.1)
COLUMNS = ["clip", "kind", "auto", "auto, whole frames", *(f"left at {share:g}" for share in SHARES), "left at auto"]
LEGEND = """\
16 frames of 196 patches a clip. **auto**: the share of patches that `encoder_ratio` "auto" computes, and of frames with
`encoder_reuse` "frames". **left at F**: how far, in levels of 255, patches are from what stands for them: mean, and in
brackets the 99th percentile of patches, with the share F of them computed.
"""


def measure(levels: Tensor) -> dict[str, Any]:
    """Of a video's levels [T, P, C]: shares with "auto", and (mean, 99th percentile) of what each share leaves."""
    rows = levels.flatten(0, 1).float()
    found: dict[str, Any] = {}
    for ratio in ("auto", *SHARES):
        reuse = choose(levels, [0], FlashVidConfig(encoder_ratio=ratio))
        distance = (rows[reuse.rows[reuse.source]] - rows).abs().mean(1)
        found[f"left {ratio}"] = (float(distance.mean()), float(distance.quantile(0.99)))
        found[f"share {ratio}"] = len(reuse.rows) / len(rows)
    frames = choose(levels, [0], FlashVidConfig(encoder_ratio="auto", encoder_reuse="frames"))
    return {**found, "frames auto": len(frames.rows) / len(rows)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.fidelity.shares", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for encoder-shares.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[list[str]] = []
    for name, clip in SCENES.items():
        found = measure(PixelScale(MEAN, STD).levels(frame_rows(pixels(name), 16)))
        left = [found[f"left {ratio}"] for ratio in (*SHARES, "auto")]
        shares = [f"{found['share auto']:.2f}", f"{found['frames auto']:.2f}"]
        lines.append([name, clip.kind, *shares, *(f"{mean:.1f} ({most:.0f})" for mean, most in left)])
    table = markdown_table(COLUMNS, lines)
    title = ["<!-- made by `python -m benchmarks.fidelity.shares` -->", "# What changes in real clips", "", LEGEND]
    (options.output / "encoder-shares.md").write_text("\n".join([*title, *table, ""]))
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
