# SPDX-License-Identifier: MIT
"""What FlashVID does not go with: refused before anything is loaded. Of dropping inside the LLM: ``inner.refuse``."""

from collections.abc import Mapping
from typing import Any

from ..core.settings import KEY
from ..models import FAMILIES, supported


def refuse_unsupported(config: Any) -> None:
    """ValueError for a model or an option that FlashVID cannot serve correctly."""
    from vllm import envs

    model = config.model_config
    if model.architecture not in FAMILIES:
        raise ValueError(
            f"FlashVID does not support {model.architecture} ({model.model}); it supports {supported()}. "
            "Leave --plugin flashvid out to serve this model without it"
        )
    _check_backend(config.model_config.multimodal_config.mm_processor_kwargs[KEY])
    refused = [
        (
            config.ec_transfer_config is not None,
            "an external encoder cache (--ec-transfer-config): it would share compressed videos with "
            "engines that do not expect them",
        ),
        (
            bool(config.lora_config and config.lora_config.enable_tower_connector_lora),
            "LoRA on the vision tower (enable_tower_connector_lora): vLLM derives the tower's token "
            "count from the compressed one",
        ),
        (
            bool(envs.VLLM_USE_RUST_FRONTEND),
            "the Rust frontend (VLLM_USE_RUST_FRONTEND=1): it counts placeholders without this plugin; "
            "use the Python one",
        ),
        (
            bool(config.compilation_config.cudagraph_mm_encoder),
            "CUDA graphs of the encoder (compilation_config.cudagraph_mm_encoder): vLLM would record them and use none "
            "where videos are compressed; leave it out",
        ),
    ]
    for is_set, what in refused:
        if is_set:
            raise ValueError(f"FlashVID does not work with {what}")
    refuse_shared_kv(config.kv_transfer_config)


def refuse_drift(config: Any) -> None:
    """ValueError where vLLM's Model Runner V1 gives steps behind a rejected draft too high positions.

    It corrects them on the device and then, where a model prunes, copies the uncorrected ones over them.
    """
    drafts = config.speculative_config is not None and config.scheduler_config.async_scheduling
    if drafts and config.model_config.uses_mrope and not config.use_v2_model_runner:
        raise ValueError(
            "FlashVID does not work with speculation under async scheduling on vLLM's Model Runner V1: it loses count "
            "of positions where a draft is rejected; start with --no-async-scheduling or VLLM_USE_V2_MODEL_RUNNER=1"
        )


# They look up KV by token ids. All videos have the same, which is wrong without this plugin too, but with a budget the
# prompts of all videos are of one length as well, whatever they show and however long they are
_KV_BY_TOKEN_IDS = ("HF3FSKVConnector", "LMCacheMPConnector", "FlexKVConnectorV1")


def refuse_shared_kv(kv_transfer_config: Any | None) -> None:
    """ValueError for a KV connector that would give one video's KV to another."""
    if kv_transfer_config is None:
        return
    names = [kv_transfer_config.kv_connector]
    parts = kv_transfer_config.kv_connector_extra_config.get("connectors", [])  # of a MultiConnector
    names += [part.get("kv_connector") for part in parts]
    for name in names:
        if name in _KV_BY_TOKEN_IDS:
            raise ValueError(
                f"FlashVID does not work with the KV connector {name}: it knows KV by token ids, and those of all "
                "videos are the same; use one that knows the videos too, such as OffloadingConnector"
            )


def _check_backend(settings: Mapping[str, Any]) -> None:
    """ValueError for a backend that is not to be had here: found out later it would stop the engine."""
    import torch
    from vllm.platforms import current_platform

    from .. import ops

    if "backend" in settings:
        ops.choose_backend(settings["backend"], torch.device(current_platform.device_type))
