# SPDX-License-Identifier: MIT
"""Put into a model, when it is made: its layers from K on get a backend of their own, the class around them a mixin."""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import inner as hooks
from ..processor_cache import INNER
from .metadata import BACKENDS, backend_of_later_layers
from .plan import Prompt, Tracker, Video
from .text_model import InnerTextModel, Step


class Inner:
    """What a worker knows of tokens that are dropped inside the LLM.

    Attributes:
        layer: layers that have all tokens [K].
        step: of the forward pass that is being prepared, None where nothing is scheduled.
    """

    def __init__(self, layer: int, count: Callable[[int, int], None]) -> None:
        self.layer = layer
        self.step: Step | None = None
        self.tracker = Tracker()
        self._visual: Tensor | None = None
        self._reserved: Tensor | None = None
        self._width = 0
        self._count = count

    def install(self, text: Any) -> None:
        """``text``: vLLM's module around the LLM's layers.

        Raises:
            ValueError: an attention backend whose metadata we do not know how to shorten.
        """
        attentions = [layer.self_attn.attn for layer in text.layers]
        for attention in attentions:
            name = attention.attn_backend.get_name()
            if name not in BACKENDS:
                raise ValueError(
                    f"tokens can be dropped inside the LLM with the attention backends {', '.join(BACKENDS)}, and this "
                    f"model has {name}; choose one with --attention-backend, or leave inner_layer and inner out"
                )
        later = attentions[self.layer :]
        made = {backend: backend_of_later_layers(backend, self) for backend in {one.attn_backend for one in later}}
        for attention in later:
            attention.attn_backend = made[attention.attn_backend]
        last = attentions[self.layer - 1]
        self._width = 2 * text.config.hidden_size + last.num_kv_heads * last.head_size  # of `Tokens`
        kind = type(text)
        text.__class__ = type(kind.__name__, (InnerTextModel, kind), {"__module__": __name__})
        text.flashvid_inner = self
        hooks.plan_on_v1()

    def reserve(self, config: Any, ratio: float | None) -> None:
        """While start-up measures memory: what the longest prompt whose chunks wait takes, twice, as it is joined.

        The first step lets go of it.

        Args:
            config: vLLM's.
            ratio: share of a video that is left inside [r], None where requests choose it. With it no prompt comes of
                which more than a step's tokens would be left.
        """
        tokens = config.model_config.max_model_len
        if ratio is not None:
            tokens = min(tokens, math.ceil(config.scheduler_config.max_num_batched_tokens / ratio))
        options = {"dtype": config.model_config.dtype, "device": config.device_config.device}
        self._reserved = torch.empty(2, tokens, self._width, **options)

    def prepare(
        self,
        step: Iterable[tuple[str, int, int]],
        living: Container[str],
        prompt_of: Callable[[str], tuple[int, Iterable[Any]]],
    ) -> None:
        """A step is about to run.

        Args:
            step: as for `Tracker.plan`.
            living: ids of all requests that have not ended.
            prompt_of: length of a request's prompt, and vLLM's features of its media.
        """

        def videos(request_id: str) -> tuple[int, Sequence[Video]]:
            length, features = prompt_of(request_id)
            return length, videos_of(features)

        self._reserved = None
        self.tracker.forget_all_but(living)
        self.step = Step(self.tracker.plan(step, videos))

    def nothing(self) -> None:
        """What is about to run has no requests."""
        self.step = None

    def see(self, visual: Tensor | None) -> None:
        """Which tokens of the step are a video's."""
        self._visual = visual

    def take_step(self) -> Step | None:
        """The step that runs now, once: a run without requests, to measure or to compile, has none."""
        step, self.step = self.step, None
        if step is not None:
            step.visual = self._visual
        return step

    def count(self, prompt: Prompt) -> None:
        """Enter what a prompt dropped in the metrics."""
        for video in prompt.videos:
            self._count(video.tokens, video.kept)


def videos_of(features: Iterable[Any]) -> list[Video]:
    """Videos of a request, from vLLM's features of its media."""
    videos = []
    for feature in features:
        if feature.modality == "video":
            tokens, kept = feature.data[INNER].data.tolist()
            place = feature.mm_position
            videos.append(Video(place.offset, place.length, tokens, kept))
    return videos
