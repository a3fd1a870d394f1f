# SPDX-License-Identifier: MIT
"""Tiny models whose answers depend on what they see and where.

With the usual initialisation attention is nearly uniform: a wrong position or a wrong token hardly moves
a logprob. Larger projections change that; much larger ones would also amplify rounding.
"""

import json
from pathlib import Path

import torch

Scales = dict[str, float]  # ending of a weight's name -> what it is multiplied by

VISION: Scales = {"attn.qkv.weight": 6}
CLIP: Scales = {"q_proj.weight": 6, "k_proj.weight": 6, "v_proj.weight": 6}
# SigLIP's are large as they are: 6 would cost half of the tests' tolerance
SIGLIP: Scales = {"q_proj.weight": 1.5, "k_proj.weight": 1.5}
QWEN2: Scales = {"q_proj.weight": 3, "k_proj.weight": 3, "v_proj.weight": 4, "o_proj.weight": 4}
# queries and keys are normed behind their projections, so there it is the norm that counts
QWEN3_VL: Scales = {"q_norm.weight": 3, "v_proj.weight": 4, "o_proj.weight": 4, "lm_head.weight": 2}
QWEN3_5: Scales = {"v_proj.weight": 4, "o_proj.weight": 4, "lm_head.weight": 3}
# kind -> of its language model
LANGUAGE_MODEL = {
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "llava_onevision": QWEN2,
    "llava_onevision_clip": QWEN2,
    "llava_video": QWEN2,
    "llava_video_frame": QWEN2,
}
# of Qwen3.5's query norm, on the quarter of a head's channels that positions turn
QUERIES = 5


def sharpen(directory: Path, kind: str) -> None:
    """Scale the weights in a directory that `make_tiny_model` has made."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    weights = load_file(path)
    tower = VISION
    if kind.startswith("llava"):
        tower = CLIP if any("class_embedding" in name for name in weights) else SIGLIP
    for name, weight in weights.items():
        if name == "lm_head.weight" and weight.dtype != torch.float32:
            continue  # it lifts faults above float32's rounding of a logprob; bf16's would grow with them
        scales = tower if "visual" in name or "vision_tower" in name else LANGUAGE_MODEL[kind]
        weight *= next((scale for ending, scale in scales.items() if name.endswith(ending)), 1)
        if kind.startswith("qwen3_5") and name.endswith("q_norm.weight"):
            text = json.loads((directory / "config.json").read_text())["text_config"]
            turned = int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"])
            weight[:turned] = QUERIES * (1 + weight[:turned]) - 1  # the norm multiplies by 1 + weight
    save_file(weights, path, metadata={"format": "pt"})


def make_sharp_model(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model of `kind` in the new or empty `directory`, sharpened."""
    from benchmarks.common.tiny_model import make_tiny_model

    directory = make_tiny_model(kind, directory, dtype=dtype)
    sharpen(directory, kind)
    return directory
