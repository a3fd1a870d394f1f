# SPDX-License-Identifier: MIT
"""Models of the LLaVA families, tiny ones and two of realistic sizes: SigLIP or CLIP, and Qwen2."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .parts import Parts, make_tokenizer

# an odd grid, as the real 27 x 27: pooled by bilinear interpolation to 4 x 4, which is no mean of 2 x 2.
# Heads of 36 channels, no power of two, as the real 72
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 144,
    "intermediate_size": 288,
    "num_attention_heads": 4,
    "image_size": 98,
    "patch_size": 14,
}
# pooled from 8 x 8 to 4 x 4
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
LAYERS = 4  # of the tower that run, and of the language model
# What real checkpoints have in place of the tiny sizes; the tower's layers are those that run.
# CLIP ViT-B/16, pooled from 14 x 14 to 7 x 7, and a language model of 0.1 B
CLIP_B: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 11,
    "image_size": 224,
    "patch_size": 16,
}
TEXT_01B: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
# as deep as a model of 7 B, and narrow
TEXT_28: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
# llava-hf/llava-onevision-qwen2-0.5b-ov-hf: SigLIP so400m, pooled from 27 x 27 to 14 x 14, and Qwen2 0.5 B.
# Its embedding table is tied to its head; here the head has weights of its own, as many operations and more memory
SIGLIP_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "image_size": 384,
    "patch_size": 14,
}
TEXT_05B: dict[str, Any] = {
    "vocab_size": 152000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
# whole messages as strings, as in the checkpoint of LLaVA-Video
STRING_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_llava_tokenizer(*media: str) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer, with the special tokens `media`, and the size of its embedding table."""
    special = (*(f"<|{name}|>" for name in ("endoftext", "im_start", "im_end")), *media)
    tokenizer = make_tokenizer(special, "<image>\\n", "<video>\\n")
    return tokenizer, -(-(len(tokenizer) + 1) // 64) * 64  # room for one token more: LLaVA-Video has no <video>


def _text(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> dict[str, Any]:
    """The language model's part of a config, but for its rotary base, which old and new configs name differently."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _pinpoints(size: int) -> list[list[int]]:
    """The resolutions that an image may be cut into tiles at: up to 3 x 3 tiles (the real models: 6 x 6)."""
    return [[y * size, x * size] for y in range(1, 4) for x in range(1, 4)]


def _model(
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: int,
    vision: dict[str, Any],
    text: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:  # LlavaOnevisionForConditionalGeneration, imported only here
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer, vocabulary), "rope_parameters": rope, **(text or {})},
        vision_config=vision,
        image_grid_pinpoints=_pinpoints(vision["image_size"]),
        **options,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The weights, the beginnings of their names changed as `names` says."""
    renamed = {}
    for name, weight in weights.items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = weight
    return renamed


# weights as transformers saves them -> as in the checkpoints on the hub, and as in those of LLaVA-NeXT's code
HUB_NAMES = {"vision_tower.": "vision_tower.vision_model."}
ORIGINAL_NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
}


def make_llava_onevision(
    tower: Literal["siglip", "clip"] = "siglip",
    sizes: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> Parts:
    """LLaVA-OneVision: 16 tokens a frame and a newline token after the video.

    Args:
        tower: "siglip", features of the last layer; or "clip", features of the last layer but one, without
            the class token.
        sizes: of the tower, in place of the tiny ones; tokens of a frame follow from them.
        text: the same for the language model.
    """
    tokenizer, vocabulary = make_llava_tokenizer("<image>", "<video>")
    clip = tower == "clip"
    vision = {**(CLIP if clip else SIGLIP), "num_hidden_layers": LAYERS, **(sizes or {})}
    vision["num_hidden_layers"] += clip  # the last one is never run
    strategy = "default" if clip else "full"
    model = _model(
        tokenizer,
        vocabulary,
        vision | ({} if clip else {"vision_use_head": False}),
        text,
        image_token_index=int(tokenizer.convert_tokens_to_ids("<image>")),
        video_token_index=int(tokenizer.convert_tokens_to_ids("<video>")),
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy=strategy,
    )
    size = vision["image_size"]
    pixels: dict[str, Any] = {
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": size, "width": size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    jsons: dict[str, dict[str, Any]] = {
        "preprocessor_config": {
            **pixels,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": _pinpoints(size),
        },
        "video_preprocessor_config": {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config": {
            "processor_class": "LlavaOnevisionProcessor",
            # the class token counts here and is taken off again by the "default" strategy
            "num_image_tokens": (size // vision["patch_size"]) ** 2 + clip,
            "vision_feature_select_strategy": strategy,
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    }
    return Parts(model, tokenizer, jsons, functools.partial(_rename, names=HUB_NAMES))


def make_llava_video(pooling: str = "bilinear", newline: str = "grid") -> Parts:
    """LLaVA-Video as released (`lmms-lab/LLaVA-Video-7B-Qwen2`): the original config, weight names and tokenizer.

    Only ``vision_config`` is not in a released config, which names its tower and leaves its sizes to the
    hub. It is the tower's own, whole: the checkpoint lacks its last layer, which this family never runs.

    Args:
        pooling: ``mm_spatial_pool_mode``: "bilinear", 16 tokens a frame here, or "average", 9 tokens a frame,
            as the last row and column of an odd grid do not count.
        newline: ``mm_newline_position``: "grid", a newline after each row of a frame, "frame", "one_token"
            or "no_token".
    """
    tokenizer, vocabulary = make_llava_tokenizer("<image>")
    tokenizer.chat_template = STRING_TEMPLATE
    size = SIGLIP["image_size"]
    model = _model(tokenizer, vocabulary, {**SIGLIP, "num_hidden_layers": LAYERS, "vision_use_head": False})
    config: dict[str, Any] = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        **_text(tokenizer, vocabulary),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_window_layers": LAYERS,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "use_cache": True,
        "image_token_index": int(tokenizer.convert_tokens_to_ids("<image>")),
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": _pinpoints(size),
        "image_crop_resolution": None,
        "image_split_resolution": None,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": SIGLIP["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": newline,
        "mm_spatial_pool_mode": pooling,
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "add_faster_video": False,
        "faster_token_stride": 10,
        "add_time_instruction": True,
        "force_sample": True,
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "vision_config": {**SIGLIP, "num_hidden_layers": LAYERS + 1},
    }
    preprocessor: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    jsons = {"config": config, "preprocessor_config": preprocessor}
    return Parts(model, tokenizer, jsons, functools.partial(_rename, names=ORIGINAL_NAMES))


# as FlashVID's published experiments with LLaVA-Video override the released settings
make_llava_video_frame = functools.partial(make_llava_video, pooling="average", newline="frame")
