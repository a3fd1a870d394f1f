# SPDX-License-Identifier: MIT
"""What the models of all families share: the settings of the videos that are being encoded."""

from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from ..budget import plan
from ..config import FlashVidConfig
from ..processor import FIELD, unpack_settings
from ..settings import KEY


class FlashVidModel:
    """Mixin, to stand before vLLM's class of the model: ``class Model(FlashVidModel, VllmsModel)``.

    Attributes:
        flashvid_on: whether the server was started with FlashVID; without it nothing here does anything.
        flashvid_backend: which implementation of the operations to use.
        flashvid_configs: the settings of each video of the current call of `embed_multimodal`, None for one
            that stays as it is.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        multimodal = vllm_config.model_config.multimodal_config
        settings = ((multimodal and multimodal.mm_processor_kwargs) or {}).get(KEY)
        self.flashvid_on = settings is not None
        self.flashvid_backend: str = (settings or {}).get("backend", "auto")
        self.flashvid_configs: Sequence[FlashVidConfig | None] = ()

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        """(T, N) of every video that `embed_multimodal` was given: temporal positions and visual tokens at each."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        rows = kwargs.pop(FIELD, None)
        if rows is None:  # images, or FlashVID is not on
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        configs = [unpack_settings(row) for row in rows]
        self.flashvid_configs = [
            None if config is None or plan(*grid, config).is_identity else config
            for config, grid in zip(configs, self.video_grids(**kwargs), strict=True)
        ]
        with gpu_sync_allowed():
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def needs_attention(self) -> bool:
        """Whether the settings of a video of this call read the encoder's attention."""
        return any(config is not None and config.needs_attention for config in self.flashvid_configs)
