# SPDX-License-Identifier: MIT
"""Dropping inside the LLM, in transformers: the tokens stay where they are, and from layer K on nobody attends to them.

Over the oracle of a family: budget, rank and choice are worked out here, one number after the other, with nothing of
the plugin's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


class InnerOracle:
    """``oracle`` of a family, whose LLM keeps ``ratio`` of a video's tokens behind its first ``layer`` layers.

    With ``entering`` all of a video's tokens enter it, as FastV has it, and ``ratio`` is R. After `greedy`, ``dropped``
    are the rows of the prompt that it has dropped, chosen by the first step.
    """

    def __init__(self, oracle: Any, layer: int, ratio: float, entering: bool = False) -> None:
        self.oracle, self.layer, self.ratio, self.entering = oracle, layer, Fraction(str(ratio)), entering
        self.is_llava = hasattr(oracle, "language_model")
        text = oracle.language_model if self.is_llava else oracle.model.model.language_model
        self.layers = text.layers
        self.videos: list[list[int]] = []
        self.dropped: list[int] = []

    def budget(self, total: int, ratio: Fraction) -> int:
        """Tokens of a video that enter the LLM."""
        depth = len(self.layers)
        worth = Fraction(depth) / (self.layer + self.ratio * (depth - self.layer))
        return max(1, min(total, int(ratio * total * worth)))

    def assemble(self, text: str, clips: Any, images: Any, settings: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
        """As the family's; ``settings`` with a ``retention_ratio``. `videos` is then where their visual tokens are."""
        self.videos, blocks = [], []
        given, ratio = None, Fraction(1)
        if settings is not None and not self.entering:
            given = {name: value for name, value in settings.items() if name != "retention_ratio"}
            ratio = Fraction(str(settings["retention_ratio"]))
        video, lay_out = self.oracle.video, self.oracle.lay_out

        def sized(clip: Any) -> Any:
            out = video(clip)
            if given is not None:
                given["token_budget"] = self.budget(out[0].shape[0] * out[0].shape[1], ratio)
            return out

        def noted(*args: Any) -> Any:
            if self.is_llava:
                out = lay_out(*args)
                if args[0].dim() == 2:
                    blocks.append(out)
                return out
            prompt = args[0]
            before = len(prompt.rows)
            lay_out(*args)
            token = self.oracle.config.video_token_id
            self.videos.append([i for i in range(before, len(prompt.rows)) if prompt.ids[i] == token])
            return None

        self.oracle.video, self.oracle.lay_out = sized, noted
        try:
            embeddings, positions = self.oracle.assemble(text, clips, images, given)
        finally:
            del self.oracle.video, self.oracle.lay_out
        start = 0
        for block in blocks:
            rows = torch.stack(list(block))
            while not torch.equal(embeddings[start : start + len(rows)], rows):
                start += 1
            self.videos.append([start + i for i, row in enumerate(block) if row is not self.oracle.newline])
            start += len(rows)
        return embeddings, positions

    def greedy(self, embeddings: Tensor, positions: Tensor, max_tokens: int) -> tuple[list[int], list[Tensor]]:
        """As the family's, with what the prompt's last token attends to least in layer K - 1 dropped."""
        self.dropped = []
        with self._dropping(len(embeddings)):
            return self.oracle.greedy(embeddings, positions, max_tokens)

    def greedy_with(
        self, dropped: list[int], embeddings: Tensor, positions: Tensor, max_tokens: int
    ) -> tuple[list[int], list[Tensor]]:
        """The same, but that just these rows are dropped."""
        self.dropped = dropped
        with self._dropping(len(embeddings)):
            return self.oracle.greedy(embeddings, positions, max_tokens)

    def _choose(self, weights: Tensor) -> list[int]:
        """Rows to drop, from the last token's attention [H, L]."""
        score = [sum(weights[:, i].tolist()) / len(weights) for i in range(weights.shape[1])]
        score[-1] = float("inf")  # the last token itself, where that is a video's
        dropped: list[int] = []
        for rows in self.videos:
            kept = max(1, int(self.ratio * len(rows)))
            best = sorted(rows, key=lambda i: (-score[i], i))
            dropped += best[kept:]
        return sorted(dropped)

    @contextmanager
    def _dropping(self, length: int) -> Iterator[None]:
        def rank(module: Any, args: Any, output: Any) -> None:
            if not self.dropped and output[1].shape[-1] == length:
                self.dropped = self._choose(output[1][0, :, -1].double())

        def hide(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"].clone()
            assert mask.dim() == 4
            mask[..., self.dropped] = torch.finfo(mask.dtype).min
            for row in self.dropped:
                mask[..., row, row] = 0  # it sees itself: a row of nothing but minus infinity has no softmax
            return args, {**kwargs, "attention_mask": mask}

        hooks = [self.layers[self.layer - 1].self_attn.register_forward_hook(rank)]
        hooks += [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in self.layers[self.layer :]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
