# SPDX-License-Identifier: MIT
"""Tiny models of the Qwen-VL families."""

import functools
from typing import Any

from torch import Tensor
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


def _qwen3_vision(hidden: int) -> dict[str, Any]:
    """The vision tower that Qwen3-VL and Qwen3.5 share: 4 layers of width 128, 16 x 16 pixels a patch."""
    return {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "num_position_embeddings": 256,
    }


def _qwen3_jsons() -> dict[str, dict[str, Any]]:
    """The processor of Qwen3-VL, which Qwen3.5 uses too: up to 256 tokens an image and 2048 a video.

    Unlike Qwen2.5-VL's, a video's limits hold for all its frames together.
    """
    pixels: dict[str, Any] = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 256}
    video = {"shortest_edge": 64 * 64, "longest_edge": 2 * 32 * 32 * 2048}
    return {
        "preprocessor_config": {**pixels, "image_processor_type": "Qwen2VLImageProcessor", "size": image},
        "video_preprocessor_config": {**pixels, "video_processor_type": "Qwen3VLVideoProcessor", "size": video},
        "processor_config": {"processor_class": "Qwen3VLProcessor"},
    }


def _token_ids(ids: dict[str, int]) -> dict[str, int]:
    """The special tokens as a model's config names them."""
    return {
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
    }


def _qwen3_text(tokenizer: PreTrainedTokenizerFast, vocabulary: int, hidden: int, head_dim: int) -> dict[str, Any]:
    """What the language models of Qwen3-VL and Qwen3.5 share: 4 layers, 4 heads and 2 key heads."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


# 4 experts: two for each of two ranks
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192}


def _released_expert_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Qwen3-VL's experts as released, input channels first. transformers saves them the other way round,
    though it loads both, and vLLM loads nothing else."""
    fused = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    return {name: w.mT.contiguous() if name.endswith(fused) else w for name, w in weights.items()}


def make_qwen3_vl(moe: bool = False) -> Parts:
    """Qwen3-VL, dense or mixture of experts: DeepStack from 3 of the tower's 4 layers, interleaved M-RoPE."""
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    hidden, head_dim = 128, 32
    tokenizer, vocabulary, ids = make_qwen_tokenizer()
    text = _qwen3_text(tokenizer, vocabulary, hidden, head_dim) | {
        "intermediate_size": 2 * hidden,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
            "rope_theta": 5e6,
        },
    }
    if moe:
        # transformers always scales the chosen experts' weights to 1, vLLM reads it from the config
        text |= {**EXPERTS, "norm_topk_prob": True}
    config = (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        text_config=text,
        vision_config=_qwen3_vision(hidden) | {"deepstack_visual_indexes": [0, 1, 2]},
        **_token_ids(ids),
    )
    model = (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(config)
    return Parts(model, tokenizer, _qwen3_jsons(), _released_expert_layout if moe else None)


def make_qwen3_5(moe: bool = False) -> Parts:
    """Qwen3.5, dense or mixture of experts: every other layer has linear attention in place of attention.

    vLLM's linear attention runs on CPU in bfloat16 alone and with heads of 128 channels.
    """
    from transformers import (
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
    )

    hidden, head_dim = 128, 128
    tokenizer, vocabulary, ids = make_qwen_tokenizer()
    text = _qwen3_text(tokenizer, vocabulary, hidden, head_dim) | {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
            # not the real 1e7: with a quarter of its frequencies the fast ones, which tell neighbours apart, are few
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
    }
    text |= {**EXPERTS, "shared_expert_intermediate_size": 192} if moe else {"intermediate_size": 2 * hidden}
    config = (Qwen3_5MoeConfig if moe else Qwen3_5Config)(
        text_config=text,
        # empty, as in the released models' files: vLLM then takes DeepStack for on, with 0 levels
        vision_config=_qwen3_vision(hidden) | {"deepstack_visual_indexes": []},
        **_token_ids(ids),
    )
    model = (Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration)(config)
    return Parts(model, tokenizer, _qwen3_jsons())


make_qwen3_vl_moe = functools.partial(make_qwen3_vl, moe=True)
make_qwen3_5_moe = functools.partial(make_qwen3_5, moe=True)
