# SPDX-License-Identifier: MIT
"""How much of the real clips an encoder computes with `encoder_ratio` "auto", and what a share leaves unexplained.

    python -m benchmarks.fidelity.shares     into benchmarks/results/encoder-shares.md, in ten minutes on two cores

16 frames of each clip as CLIP ViT-B/16 gets them, chosen from as the plugin does: how far pixels are from what stands
for them, and features from those of the whole tower. What copies cost in answers is another question, which
benchmarks/tinyvlm asks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.choice import choose
from flashvid_vllm.core.levels import PixelScale, frame_rows

from ..common import clip_model
from ..common.clip_model import MEAN, STD
from ..common.record import RESULTS, markdown_table
from ..tinyvlm.encoder import encode
from .clips import SCENES, pixels

SHARES = (0.5, 0.25, 0.1)
ENCODED: tuple[float | Literal["auto"], ...] = (0.5, 0.25, "auto")
COLUMNS = ["clip", "kind", "auto", "auto, whole frames", *(f"left at {share:g}" for share in SHARES), "left at auto"]
COLUMNS += [f"features at {share}" for share in ENCODED]
LEGEND = """\
16 frames of 196 patches a clip. **auto**: the share of patches that `encoder_ratio` "auto" computes, and of frames with
`encoder_reuse` "frames". **left at F**: how far, in levels of 255, patches are from what stands for them: mean, and in
brackets the 99th percentile of patches, with the share F of them computed. **features at F**: cosine of each patch's
feature, behind the last layer but one, to the whole tower's, the clip's mean taken off both: mean, and in brackets the
worst percentile.
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


def cosines(tower: Any, frames: Tensor, levels: Tensor) -> dict[str, tuple[float, float]]:
    """(mean, worst percentile) over patches, of pixels [T, 3, 224, 224] with levels [T, P, C], for each of ENCODED."""
    num_frames, patches, _ = levels.shape
    own = torch.arange(num_frames)[:, None].expand(-1, patches)
    whole = encode(tower, frames, own)[0].flatten(0, 1)
    found = {}
    for ratio in ENCODED:
        reuse = choose(levels, [0], FlashVidConfig(encoder_ratio=ratio))
        position = (reuse.rows[reuse.source] // patches).view(num_frames, patches)
        features = encode(tower, frames, position)[0].flatten(0, 1)
        cosine = cosine_similarity(features - whole.mean(0), whole - whole.mean(0), dim=-1)
        found[f"{ratio}"] = (float(cosine.mean()), float(cosine.quantile(0.01)))
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.fidelity.shares", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for encoder-shares.md")
    options = parser.parse_args()
    tower = clip_model.tower(clip_model.load())
    lines: list[list[str]] = []
    for name, clip in SCENES.items():
        frames = pixels(name)
        levels = PixelScale(MEAN, STD).levels(frame_rows(frames, 16))
        found, features = measure(levels), cosines(tower, frames, levels)
        left = [found[f"left {ratio}"] for ratio in (*SHARES, "auto")]
        shares = [f"{found['share auto']:.2f}", f"{found['frames auto']:.2f}"]
        pixel_columns = [f"{mean:.1f} ({most:.0f})" for mean, most in left]
        feature_columns = [f"{mean:.3f} ({worst:.2f})" for mean, worst in features.values()]
        lines.append([name, clip.kind, *shares, *pixel_columns, *feature_columns])
    table = markdown_table(COLUMNS, lines)
    title = ["<!-- made by `python -m benchmarks.fidelity.shares` -->", "# What changes in real clips", "", LEGEND]
    (options.output / "encoder-shares.md").write_text("\n".join([*title, *table, ""]))
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
