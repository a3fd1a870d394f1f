# SPDX-License-Identifier: MIT
"""LLaVA-Video's released config.json is read as it means; other configs of the type "llava" as ever."""

from typing import Any

import pytest
from transformers import LlavaConfig

from flashvid_vllm.models.families.llava_video_config import LlavaOrLlavaVideoConfig, LlavaVideoConfig

RELEASED: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "image_token_index": 151646,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384, 384], [384, 768]],
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
    "mm_newline_position": "grid",
}


def test_the_released_config() -> None:
    config = LlavaOrLlavaVideoConfig.from_dict(dict(RELEASED))
    assert isinstance(config, LlavaVideoConfig)
    assert config.architectures == ["LlavaQwenForCausalLM"]
    text, vision = config.text_config, config.vision_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (
        "qwen2",
        3584,
        28,
        4,
    )
    assert (text.vocab_size, text.rope_parameters["rope_theta"], text.rms_norm_eps) == (152064, 1e6, 1e-6)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size // vision.patch_size) == (1152, 27, 27)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "full")
    assert (config.image_token_index, config.video_token_index) == (151646, 151647)
    assert (config.mm_spatial_pool_mode, config.mm_newline_position) == ("bilinear", "grid")
    again = LlavaVideoConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_what_a_config_without_the_keys_means() -> None:
    left_out = ("mm_spatial_pool_mode", "mm_newline_position", "mm_vision_select_layer", "mm_projector_type")
    config = LlavaOrLlavaVideoConfig.from_dict({k: v for k, v in RELEASED.items() if k not in left_out})
    assert (config.mm_spatial_pool_mode, config.mm_newline_position, config.vision_feature_layer) == (
        "bilinear", "grid", -2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
            "mm_vision_tower='openai/clip-vit-large-patch14-336'",
        ),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode='max'"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride=4"),
        ({"mm_newline_position": "every"}, "mm_newline_position='every'"),
        ({"vocab_size": 151647}, "no id is left"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaOrLlavaVideoConfig.from_dict(RELEASED | change)


def test_other_configs_of_the_type_are_left_alone() -> None:
    plain = LlavaConfig().to_dict() | {"architectures": ["LlavaForConditionalGeneration"]}
    config = LlavaOrLlavaVideoConfig.from_dict(dict(plain))
    assert type(config) is LlavaConfig
    assert config.to_dict() == LlavaConfig.from_dict(dict(plain)).to_dict()
