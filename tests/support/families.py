# SPDX-License-Identifier: MIT
"""The model families, as the tests see them: tiny model, independent oracle, how a prompt names its media."""

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .engine import IMAGE, VIDEO


@dataclass(frozen=True)
class Family:
    """A family to test.

    Args:
        kind: of tiny model.
        oracle: its module in tests/support/oracles.
        image, video: what a prompt of vLLM's has where the media go.
        oracle_video: the same in a prompt of the oracle's.
        tolerance: of a log-probability.
        original: whether LLaVA's kept tokens keep their positions in the uncompressed prompt.
    """

    kind: str
    oracle: str
    image: str = IMAGE
    video: str = VIDEO
    oracle_video: str = VIDEO
    dtype: torch.dtype = torch.float32
    tolerance: float = 2e-5
    original: bool = False

    def make(self, directory: Path) -> Path:
        """The tiny model in a new ``directory``, its answers sharp."""
        from .sharp import make_sharp_model

        return make_sharp_model(self.kind, directory, self.dtype)

    def for_oracle(self, text: str, num_videos: int) -> str:
        """A prompt of vLLM's for the oracle: of further videos than there are the text only speaks."""
        first, *rest = text.split(self.video)
        names = [self.oracle_video] * num_videos + [self.video] * len(rest)
        return first + "".join(name + part for name, part in zip(names, rest, strict=False))

    def load_oracle(self, directory: Path) -> Any:
        """The oracle of the model in ``directory``."""
        oracle = importlib.import_module(f"tests.support.oracles.{self.oracle}").Oracle(directory, self.dtype)
        if self.original:
            oracle.original = True
        return oracle

    @property
    def name(self) -> str:
        """For ids of tests."""
        return f"{self.kind}-original" if self.original else self.kind

    @property
    def settings(self) -> dict[str, Any]:
        """FlashVID's settings that belong to it."""
        return {"positions": "original"} if self.original else {}

    @property
    def engine_options(self) -> dict[str, Any]:
        """What `tests.support.engine.engine` needs for it."""
        return {"dtype": str(self.dtype).removeprefix("torch.")}


def _llava(kind: str, oracle: str, video: str = "<video>") -> Family:
    return Family(kind, oracle, "<image>", video, "<video>")


QWEN2_5_VL = Family("qwen2_5_vl", "qwen2_5_vl")
QWEN3_VL = Family("qwen3_vl", "qwen3_vl")
QWEN3_VL_MOE = Family("qwen3_vl_moe", "qwen3_vl")
# in float32 inside `float32_linear_attention` alone
QWEN3_5 = Family("qwen3_5", "qwen3_5")
QWEN3_5_MOE = Family("qwen3_5_moe", "qwen3_5")
# as vLLM's own linear attention on a CPU has it
QWEN3_5_BF16 = Family("qwen3_5", "qwen3_5", dtype=torch.bfloat16, tolerance=3e-2)
LLAVA_ONEVISION = _llava("llava_onevision", "llava_onevision")
LLAVA_ONEVISION_CLIP = _llava("llava_onevision_clip", "llava_onevision")
LLAVA_VIDEO = _llava("llava_video", "llava_video", "<|endoftext|><image>")
LLAVA_VIDEO_FRAME = _llava("llava_video_frame", "llava_video", "<|endoftext|><image>")
LLAVA_ONEVISION_ORIGINAL = replace(LLAVA_ONEVISION, original=True)
LLAVA_VIDEO_ORIGINAL = replace(LLAVA_VIDEO, original=True)
LLAVA_VIDEO_FRAME_ORIGINAL = replace(LLAVA_VIDEO_FRAME, original=True)
EXACT = [
    *(QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE),
    *(LLAVA_ONEVISION, LLAVA_ONEVISION_CLIP, LLAVA_VIDEO, LLAVA_VIDEO_FRAME),
    *(LLAVA_ONEVISION_ORIGINAL, LLAVA_VIDEO_ORIGINAL, LLAVA_VIDEO_FRAME_ORIGINAL),
]
