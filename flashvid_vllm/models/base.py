# SPDX-License-Identifier: MIT
"""What the models of all families share: the settings of the videos that are being encoded, and metrics."""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from .. import ops
from ..core.budget import plan
from ..core.compress import CompressedVideo, compress
from ..core.config import FlashVidConfig
from ..core.reuse import Reuse
from ..core.settings import (
    BACKEND,
    ENABLED,
    INNER_LAYER,
    INNER_RATIO,
    KEY,
    MAX_VIDEO_TOKENS,
    REQUEST_OVERRIDES,
    in_force,
)
from . import FAMILIES, counting, pieces
from .inner import rows
from .inner.install import Inner
from .measure import encode_longest_video
from .processor import MEASURE
from .processor_cache import FIELD, FULL_EMBEDS, INNER
from .reuse import take_reuses, why_not
from .rope import keeps_positions
from .settings_row import unpack_settings

logger = logging.getLogger("vllm.plugins.flashvid")
_SHOWN = ("method", "retention_ratio", "token_budget", "encoder_ratio", "encoder_reuse")  # in the metrics


class FlashVidModel:
    """Mixin, to stand before vLLM's class of the model: ``class Model(FlashVidModel, VllmsModel)``.

    Attributes:
        flashvid_on: whether the server was started with FlashVID; without it nothing here does anything.
        flashvid_backend: which implementation of the operations to use.
        flashvid_keeps_positions: whether the LLM sees kept tokens at their positions in the whole video.
        flashvid_configs: the settings of each video of the current call of `embed_multimodal`, None for one
            that stays as it is.
        flashvid_reuses: which rows of each of them the encoder computes, None for one of which it computes all.
        flashvid_piece: visual tokens that the encoder gets in one call.
        flashvid_metrics: where compressed videos are counted, None on ranks that count nothing.
        flashvid_inner: what drops tokens inside the LLM, None where nothing does.
        flashvid_places: of each video of the current call, which rows of what the encoder gives are visual tokens;
            None for all.
    """

    get_language_model: Any
    flashvid_inner: Inner | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        multimodal = vllm_config.model_config.multimodal_config
        settings = ((multimodal and multimodal.mm_processor_kwargs) or {}).get(KEY)
        self.flashvid_on = settings is not None
        self.flashvid_backend: str = (settings or {}).get("backend", "auto")
        self.flashvid_keeps_positions = keeps_positions(vllm_config.model_config.architecture, settings or {})
        self.flashvid_configs: Sequence[FlashVidConfig | None] = ()
        self.flashvid_reuses: Sequence[Reuse | None] = ()
        self.flashvid_vllm_config = vllm_config
        self.flashvid_piece = pieces.measured_tokens(vllm_config) if settings is not None else 0
        self.flashvid_metrics = _metrics(vllm_config, settings) if settings is not None else None
        self.flashvid_places: list[Tensor | None] = []
        if settings is not None and INNER_LAYER in settings:
            self.flashvid_inner = Inner(settings[INNER_LAYER], self._count_inner)
            self.flashvid_inner.install(self.get_language_model().model)
            self.get_model_state_cls = _state_v2  # which vLLM asks for if it is there

    def frames_per_piece(self, tokens_per_frame: int) -> int:
        """Temporal positions that the encoder gets in one call."""
        return pieces.frames_per_piece(self.flashvid_piece, tokens_per_frame)

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        """(T, N) of every video that `embed_multimodal` was given: temporal positions and visual tokens at each."""
        raise NotImplementedError

    def repeat_video(self, times: int, **kwargs: Any) -> dict[str, Any]:
        """The arguments of `embed_multimodal` for one video, ``times`` in succession."""
        raise NotImplementedError

    def by_rows(self, **kwargs: Any) -> dict[str, Any]:
        """The arguments of `embed_multimodal` for one video, its pixels by the rows that the encoder computes."""
        return kwargs

    def rows_per_frame(self, tokens_per_frame: int) -> int:
        """Rows of a temporal position that the encoder computes or copies."""
        return tokens_per_frame

    def pixel_rows(self) -> int:
        """Rows of the pixels that make one row of the encoder."""
        return 1

    def compile_kernels(self) -> None:
        """Compile all that a video may call for, where Triton compresses: else a request would wait for a compiler."""
        vllm = self.flashvid_vllm_config
        server = vllm.model_config.multimodal_config.mm_processor_kwargs[KEY]
        device = torch.device(vllm.device_config.device)
        if ops.choose_backend(self.flashvid_backend, device) != "triton":
            return
        from ..ops import warm_up

        least, most = MULTIMODAL_REGISTRY.create_processor(vllm.model_config).frame_sizes()
        attention = self.encoder_attention()
        sizes = (self.visual_width(), least, most, server[MAX_VIDEO_TOKENS], attention.num_heads, attention.head_size)
        start = time.monotonic()
        ranks = vllm.parallel_config.tensor_parallel_size
        warm_up.compile_all(warm_up.Videos(vllm.model_config.dtype, *sizes, ranks))
        logger.info("FlashVID: kernels compiled, or found in Triton's cache, in %.1f s", time.monotonic() - start)

    def encoder_attention(self) -> Any:
        """vLLM's attention module of the last layer of the vision tower that sees whole frames."""
        raise NotImplementedError

    def embedding_width(self) -> int:
        """Channels of an embedding."""
        raise NotImplementedError

    def visual_width(self) -> int:
        """Channels of a visual token where it is compressed."""
        raise NotImplementedError

    def attentions(self) -> list[Any]:
        """vLLM's attention modules of the vision tower."""
        raise NotImplementedError

    def encoder_is_compiled(self) -> bool:
        """Whether torch.compile has traced what is around them."""
        return False

    def refuse_rows(self) -> None:
        """ValueError if the encoder cannot compute single rows of a video; whole temporal positions it always can."""
        if (reason := why_not(self.attentions(), self.encoder_is_compiled())) is not None:
            raise ValueError(f"this vision encoder cannot compute some of a video's tokens alone: {reason}")

    def measure_longest_video(self) -> None:
        """Encode and compress what vLLM's own measurement of memory leaves out, and reserve what waits in the LLM."""
        config = self.flashvid_vllm_config
        if self.flashvid_inner is not None:
            settings = config.model_config.multimodal_config.mm_processor_kwargs[KEY]
            self.flashvid_inner.reserve(config, settings.get(INNER_RATIO))
        counted, self.flashvid_metrics = self.flashvid_metrics, None
        try:
            encode_longest_video(self)
        finally:
            self.flashvid_metrics = counted

    def _count_inner(self, tokens: int, kept: int) -> None:
        if self.flashvid_metrics is not None:
            self.flashvid_metrics.count_inner(tokens, kept)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        kwargs.pop(FULL_EMBEDS, None)  # the scheduler's
        kwargs.pop(INNER, None)  # the runner's
        # on a CPU vLLM measures nothing, and later stages of a pipeline encode nothing
        encodes = self.flashvid_piece and not current_platform.is_cpu() and get_pp_group().is_first_rank
        if kwargs.pop(MEASURE, None) is not None and encodes:
            self.compile_kernels()
            self.measure_longest_video()
        packed = kwargs.pop(FIELD, None)
        if packed is None:  # images, or FlashVID is not on
            self.flashvid_reuses = ()
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        configs = [unpack_settings(row) for row in packed]
        self.flashvid_configs = [
            None if config is None or plan(*grid, config).is_identity else config
            for config, grid in zip(configs, self.video_grids(**kwargs), strict=True)
        ]
        self.flashvid_reuses = take_reuses(kwargs) or [None] * len(configs)
        for reuse in self.flashvid_reuses:
            if reuse is not None and self.flashvid_metrics is not None:
                self.flashvid_metrics.count_rows(len(reuse.source), len(reuse.rows))
        self.flashvid_places = [None] * len(configs)
        with gpu_sync_allowed():
            out = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if self.flashvid_inner is None:
            return out
        return [rows.mark_rows(video, places) for video, places in zip(out, self.flashvid_places, strict=True)]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        if self.flashvid_inner is not None:
            visual = None
            if multimodal_embeddings and is_multimodal is not None:
                multimodal_embeddings = rows.take_marks(multimodal_embeddings, self.embedding_width())
                visual = rows.visual_tokens(multimodal_embeddings, is_multimodal, input_ids.device)
            self.flashvid_inner.see(visual)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def needs_attention(self) -> bool:
        """Whether the settings of a video of this call read the encoder's attention."""
        return any(config is not None and config.needs_attention for config in self.flashvid_configs)

    def compress_video(self, features: Tensor, attention: Tensor | None, config: FlashVidConfig) -> CompressedVideo:
        """`compress`, entered in the metrics."""
        kept = partial(compress, features, attention, config, keeps_positions=self.flashvid_keeps_positions)
        if self.flashvid_metrics is None:
            return kept()
        with self.flashvid_metrics.timed(features.device):
            video = kept()
        self.flashvid_metrics.count(features.shape[0] * features.shape[1], len(video.tokens))
        return video


def _state_v2() -> Any:
    from .inner.state_v2 import InnerModelState  # it imports what only Model Runner V2 needs

    return InnerModelState


def _metrics(vllm_config: VllmConfig, server: Mapping[str, Any]) -> counting.Counter | None:
    """The metrics of this worker, if it is the first of those that share its videos."""
    if get_tensor_model_parallel_rank() != 0 or not get_pp_group().is_first_rank:
        return None
    config = in_force(server, FAMILIES[vllm_config.model_config.architecture].preset)
    backend = ops.choose_backend(config.backend, vllm_config.device_config.device)
    shown = {name: getattr(config, name) for name in _SHOWN}
    on = {ENABLED: server.get(ENABLED, True), REQUEST_OVERRIDES: server.get(REQUEST_OVERRIDES, True)}
    return counting.make_counter({**shown, BACKEND: backend, **on})
