# SPDX-License-Identifier: MIT
"""The supported model families: architecture -> where its wiring lies, and its preset.

Kept free of vLLM imports: it is read in every process, before vLLM's model code is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One vLLM architecture that we serve.

    Args:
        model: "module:Class" of the class that replaces vLLM's own under the same name.
        examples: checkpoints that have it, for messages.
        preset: the paper's settings for it where they differ from FlashVidConfig's defaults.
    """

    model: str
    examples: str
    preset: Mapping[str, Any] = field(default_factory=dict)


QWEN_PRESET = {"min_segments": 4, "selection": "attention_diversity"}

FAMILIES: dict[str, Family] = {
    "Qwen2_5_VLForConditionalGeneration": Family(
        "flashvid_vllm.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        "Qwen/Qwen2.5-VL-*",
        QWEN_PRESET,
    ),
}


def supported() -> str:
    """The supported architectures, for messages."""
    return ", ".join(f"{name} ({family.examples})" for name, family in FAMILIES.items())
