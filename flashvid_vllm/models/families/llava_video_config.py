# SPDX-License-Identifier: MIT
"""LLaVA-Video's released config.json, read as LLaVA-OneVision's: neither transformers nor vLLM knows it.

It calls itself "llava", as LLaVA-1.5 does, and has the language model's fields at its top.
"""

from typing import Any

from transformers import LlavaConfig, LlavaOnevisionConfig, Qwen2Config

ARCHITECTURE = "LlavaQwenForCausalLM"
# the released config names its tower and leaves the sizes to the hub
TOWERS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
POOLINGS = ("bilinear", "average")
NEWLINES = ("grid", "frame", "one_token", "no_token")
_KNOWN: dict[str, tuple[Any, ...]] = {  # the first is what a config without the key means
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_spatial_pool_mode": POOLINGS,
    "mm_spatial_pool_stride": (2,),
    "mm_newline_position": NEWLINES,
}


class LlavaVideoConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's config and what LLaVA-Video says besides.

    Attributes:
        mm_spatial_pool_mode: how 2 x 2 patches of a frame become a token, one of POOLINGS.
        mm_newline_position: where a video's newline tokens go, one of NEWLINES: after each row of each frame, after
            each frame, after the video, nowhere.
    """

    model_type = "llava_video"
    mm_spatial_pool_mode: str = "bilinear"
    mm_newline_position: str = "grid"

    @classmethod
    def from_released(cls, released: dict[str, Any], **kwargs: Any) -> Any:
        """From the released config.json. ValueError for what it may say and we do not know."""
        for key, known in _KNOWN.items():
            if (value := released.get(key, known[0])) not in known:
                raise ValueError(f"config.json: {key}={value!r} is not supported; known: {known}")
        tower = released.get("mm_vision_tower")
        vision = released.get("vision_config") or TOWERS.get(str(tower))
        if vision is None:
            raise ValueError(
                f"config.json: mm_vision_tower={tower!r} is not one of {', '.join(TOWERS)}; "
                'put its sizes into config.json as "vision_config"'
            )
        image_token = int(released["image_token_index"])
        if image_token + 1 >= released["vocab_size"]:
            raise ValueError(f"config.json: no id is left for videos behind image_token_index={image_token}")
        text = {key: value for key, value in released.items() if key in Qwen2Config.__annotations__}
        rope = {
            "rope_type": "default",
            "rope_theta": released.get("rope_theta", 1e6),
            **(released.get("rope_scaling") or {}),
        }
        config: dict[str, Any] = {
            "text_config": {**text, "model_type": "qwen2", "rope_parameters": rope},
            "vision_config": {**vision, "vision_use_head": False},
            "vision_feature_layer": released.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": "full",  # SigLIP has no class token
            "image_token_index": image_token,
            "video_token_index": image_token + 1,  # unused by the released tokenizer
            "image_grid_pinpoints": released["image_grid_pinpoints"],
            "vision_aspect_ratio": released["image_aspect_ratio"],
            "tie_word_embeddings": released.get("tie_word_embeddings", False),
            **{key: released[key] for key in ("mm_spatial_pool_mode", "mm_newline_position") if key in released},
            "architectures": [ARCHITECTURE],
        }
        for key in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"):
            if key in released:
                config[key] = released[key]
        return cls.from_dict(config, **kwargs)


class LlavaOrLlavaVideoConfig(LlavaConfig):
    """Reads every config.json of the type "llava": LLaVA-Video's as above, any other one as transformers does."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if ARCHITECTURE in (config_dict.get("architectures") or ()):
            return LlavaVideoConfig.from_released(config_dict, **kwargs)
        return LlavaConfig.from_dict(config_dict, **kwargs)
