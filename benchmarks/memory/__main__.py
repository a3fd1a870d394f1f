# SPDX-License-Identifier: MIT
"""Memory that encoding and compressing a video needs over its number of frames: in pieces, and in one call.

    python -m benchmarks.memory                    into benchmarks/results/encoder-memory.md
    python -m benchmarks.memory --frames 16,96

A tower of CLIP ViT-B/16's width in float32, of one layer: more would use the same memory in turn. The model is
called as by vLLM's runner, in this process; on a GPU torch's peak is shown, on a CPU the resident set's.
"""

import argparse
import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch

from ..common.clips import cache_directory
from ..common.options import listed
from ..common.record import RESULTS, machine, markdown_table
from ..common.tiny_model import make_tiny_model

FRAMES = (16, 48, 96, 192, 384, 768)
RATIO = 0.1
MIB = 2**20
COLUMNS = ["frames", "tokens before", "pixels that come in [MiB]", "features [MiB]", "beyond the pixels, in one call",
           "in pieces", "in pieces without the features"]  # fmt: skip
LEGEND = """\
LLaVA-OneVision with a CLIP tower of ViT-B/16's width (one layer of 768 channels, float32) and {n} tokens of {width}
channels a frame; {ratio:.0%} kept. Peak memory in MiB while one video is encoded and compressed, beyond what was held
before. **In one call**: all frames through the tower together, as vLLM does it. **In pieces**: {piece} frames a call,
as many as vLLM measured memory for at the start. What is left to grow are the features until they are compressed and
compression's copies; `--flashvid-max-video-tokens` bounds it. Measured on: {device}.
"""


class Peak:
    """The highest memory in MiB since it was made, beyond what was held then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / MIB
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = _status("VmRSS")

    def rise(self) -> float:
        """Until now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.before
        return _status("VmHWM") - self.before


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure(model: Any, device: torch.device, num_frames: int, piece: int) -> tuple[float, float, float]:
    """MiB of a video's pixels, of its features, and the peak beyond the pixels with ``piece`` tokens a call."""
    from flashvid_vllm import FlashVidConfig
    from flashvid_vllm.models.processor_cache import FIELD
    from flashvid_vllm.models.settings_row import pack_settings

    side = model.config.vision_config.image_size
    pixels = torch.rand(1, num_frames, 3, side, side, device=device)
    settings = pack_settings(FlashVidConfig(retention_ratio=RATIO))[None]
    usual, model.flashvid_piece = model.flashvid_piece, piece
    peak = Peak(device)
    with torch.inference_mode():
        model.embed_multimodal(pixel_values_videos=pixels, **{FIELD: settings})
    risen = peak.rise()
    model.flashvid_piece = usual
    features = num_frames * model.tokens_per_frame() * model.config.text_config.hidden_size * pixels.element_size()
    return pixels.nbytes / MIB, features / MIB, risen


def run(frames: Sequence[int]) -> str:
    """The report."""
    from vllm import LLM

    from flashvid_vllm import engine_args

    directory = make_tiny_model(
        "llava_onevision_wide", cache_directory().parent / "models" / "llava_onevision_wide", dtype=torch.float32
    )
    llm = LLM(str(directory), dtype="float32", max_model_len=4096, enforce_eager=True, **engine_args())
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    device = next(model.parameters()).device
    n, piece = model.tokens_per_frame(), model.flashvid_piece
    measure(model, device, frames[0], piece)  # what is loaded when it is first used
    rows = []
    for count in frames:
        pixels, features, pieces = measure(model, device, count, piece)
        whole = measure(model, device, count, count * n)[2]
        values = (pixels, features, whole, pieces, pieces - features)
        rows.append([f"{count}", f"{count * n}", *(f"{value:.0f}" for value in values)])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    where = machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{where['cpu']}, {where['cores']} cores"
    text = LEGEND.format(
        n=n, width=model.config.text_config.hidden_size, ratio=RATIO, piece=model.frames_per_piece(n), device=name
    )
    head = ["<!-- made by `python -m benchmarks.memory` -->", "# Memory of the encoder over frames", "", text]
    versions = ", ".join(f"{key} {where[key]}" for key in ("torch", "vllm", "commit", "date"))
    return "\n".join([*head, *markdown_table(COLUMNS, rows), f"{versions}.", ""])


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=listed(int), default=FRAMES, help="numbers of frames (default: 16 to 768)")
    parser.add_argument("--output", type=Path, default=RESULTS / "encoder-memory.md", help="(default: %(default)s)")
    return parser


def main() -> int:
    """The command line."""
    options = make_parser().parse_args()
    report = run(sorted(options.frames))
    options.output.write_text(report)
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
