# SPDX-License-Identifier: MIT
"""What touches the model, from the processor to the positions; and the supported families: architecture -> where its
wiring lies in ``families``, and its preset.

Kept free of vLLM imports: this file is read in every process, before vLLM's model code is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What serves one vLLM architecture.

    Args:
        module: the file in ``families`` with the class that replaces vLLM's own under the same name.
        examples: checkpoints that have it, for messages.
        preset: the paper's settings for it where they differ from FlashVidConfig's defaults.
        consecutive: whether its positions are 1-D and count what is left, unless the server says otherwise.
        inner: where tokens are dropped inside the LLM, if so, the paper's settings: behind so many of so many layers,
            in proportion for others, and the share that is left.
    """

    module: str
    examples: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    consecutive: bool = False
    inner: tuple[int, int, float] = (20, 28, 0.3)


QWEN_PRESET = {"min_segments": 4, "selection": "attention_diversity"}
QWEN3_INNER = (28, 36, 0.1)

FAMILIES: dict[str, Family] = {
    "Qwen2_5_VLForConditionalGeneration": Family("qwen2_5_vl", "Qwen/Qwen2.5-VL-*", QWEN_PRESET),
    "Qwen3VLForConditionalGeneration": Family("qwen3_vl", "Qwen/Qwen3-VL-2B to 32B", QWEN_PRESET, inner=QWEN3_INNER),
    "Qwen3VLMoeForConditionalGeneration": Family("qwen3_vl", "Qwen/Qwen3-VL-*-A*B", QWEN_PRESET, inner=QWEN3_INNER),
    "Qwen3_5ForConditionalGeneration": Family("qwen3_5", "Qwen/Qwen3.5-*", QWEN_PRESET),
    "Qwen3_5MoeForConditionalGeneration": Family("qwen3_5", "Qwen/Qwen3.5-*-A*B", QWEN_PRESET),
    "LlavaOnevisionForConditionalGeneration": Family("llava_onevision", "llava-hf/llava-onevision-*", consecutive=True),
    "LlavaQwenForCausalLM": Family("llava_video", "lmms-lab/LLaVA-Video-*-Qwen2", consecutive=True),
}


def supported() -> str:
    """The supported architectures, for messages."""
    return ", ".join(f"{name} ({family.examples})" for name, family in FAMILIES.items())
