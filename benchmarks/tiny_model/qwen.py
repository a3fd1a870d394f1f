# SPDX-License-Identifier: MIT
"""Tiny models of the Qwen-VL families."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from .parts import Parts, make_tokenizer

QWEN_SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)


def make_qwen_tokenizer() -> tuple[PreTrainedTokenizerFast, int, dict[str, int]]:
    """The tokenizer of the Qwen-VL families, the size of its embedding table and the special tokens' ids."""
    pad = "<|vision_start|><|{}_pad|><|vision_end|>"
    tokenizer = make_tokenizer(QWEN_SPECIAL, pad.format("image"), pad.format("video"))
    names = {name: f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    ids = {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in names.items()}
    return tokenizer, -(-len(tokenizer) // 64) * 64, ids


def make_qwen2_5_vl(hidden: int = 128, layers: int = 4, head_dim: int = 32) -> Parts:
    """Qwen2.5-VL: up to 256 tokens (448 x 448 pixels) for each two frames, windows of 8 x 8 patches.

    `hidden`, `layers` and `head_dim` are the language model's; the encoder has 4 layers of width 128.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, vocabulary, ids = make_qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // head_dim,
            "num_key_value_heads": hidden // head_dim // 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
                "rope_theta": 1e6,
            },
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": hidden,
            # the last layer sees whole frames, as in the real model
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    pixels: dict[str, Any] = {
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    jsons: dict[str, dict[str, Any]] = {
        "preprocessor_config": {**pixels, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config": {**pixels, "video_processor_type": "Qwen2VLVideoProcessor"},
        "processor_config": {"processor_class": "Qwen2_5_VLProcessor"},
    }
    return Parts(Qwen2_5_VLForConditionalGeneration(config), tokenizer, jsons)
