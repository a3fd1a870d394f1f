# SPDX-License-Identifier: MIT
"""What the oracles of the LLaVA families share: the compressed prompt put together by hand.

Nothing of the plugin but `flashvid_vllm.compress` (whose own oracles are the golden vectors and brute
force) is used: features, received attention, newlines and positions are worked out here.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashvid_vllm import FlashVidConfig, compress

from ..engine import Clip

IMAGE, VIDEO = "<image>", "<video>"


class LlavaOracle:
    """The same weights in transformers. A family says how it encodes and where its newline tokens are.

    Attributes:
        tokenizer, language_model (without its head), lm_head: to be set by the family.
        newline: [D], the embedding of the newline token.
        next_position: the position of the first answered token, once a prompt is assembled.
        original: whether tokens are to be at their positions in the uncompressed prompt.
    """

    original = False

    tokenizer: Any
    language_model: nn.Module
    lm_head: nn.Module
    newline: Tensor

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        raise NotImplementedError

    # --- what a family says

    def video(self, clip: Clip) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """Features [T, N, D] as the language model gets them, received attention [T, N], grid (T, height, width)."""
        raise NotImplementedError

    def image(self, image: np.ndarray) -> Tensor:
        """Rows [n, D] of an image, newlines included."""
        raise NotImplementedError

    def lay_out(self, rows: Tensor, where: list[int], grid: tuple[int, int, int]) -> list[Tensor]:
        """A video's kept `rows` [B, D], its tokens `where` (ascending), with the newlines that belong there."""
        raise NotImplementedError

    # --- what the families share

    @torch.inference_mode()
    def assemble(
        self, text: str, clips: list[Clip], images: list[np.ndarray], settings: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """The prompt as the language model must receive it; `settings` None keeps everything.

        Returns:
            embeddings [L', D] and positions [L'], which count from 0 over what is kept, or with `original` over all;
            then [3, L'], as vLLM has them.
        """
        clips, images = list(clips), list(images)
        rows: list[Tensor] = []
        places: list[int] = []
        start = 0  # of the next piece, in the uncompressed prompt
        for piece in re.split(f"({IMAGE}|{VIDEO})", text):
            if piece == VIDEO and clips:
                features, attention, grid = self.video(clips.pop(0))
                kept, where = kept_tokens(features, attention, settings, self.original)
                rows += self.lay_out(kept, where, grid)
                inside, length = self.places(where, grid)
                places += [start + place for place in inside]
                start += length
                continue
            before = len(rows)
            if piece == IMAGE and images:
                rows += list(self.image(images.pop(0)))
            else:
                rows += list(self.embed(self.tokenizer(piece, add_special_tokens=False).input_ids))
            places += range(start, start + len(rows) - before)
            start += len(rows) - before
        assert not clips
        assert not images
        if self.original:
            self.next_position = start
            return torch.stack(rows), torch.tensor(places).repeat(3, 1)
        self.next_position = len(rows)
        return torch.stack(rows), torch.arange(len(rows))

    def places(self, where: list[int], grid: tuple[int, int, int]) -> tuple[list[int], int]:
        """Where the rows of a video that keeps the tokens `where` stand among those of the whole one, and how many
        these are. Of the whole one's newlines each kept one is the last of its frame."""
        everything = list(range(grid[0] * grid[1] * grid[2]))
        full = self.lay_out(torch.tensor(everything), everything, grid)
        token = {int(row): place for place, row in enumerate(full) if row is not self.newline}
        newlines = [place for place, row in enumerate(full) if row is self.newline]
        left = self.lay_out(torch.tensor(where), where, grid)
        count = sum(row is self.newline for row in left)
        ends = iter(newlines[len(newlines) // max(count, 1) - 1 :: len(newlines) // max(count, 1)] if count else [])
        return [next(ends) if row is self.newline else token[int(row)] for row in left], len(full)

    def embed(self, ids: list[int]) -> Tensor:
        """Rows [n, D] of text tokens."""
        embeddings: Tensor = self.language_model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))  # type: ignore[operator]
        return embeddings

    @torch.inference_mode()
    def greedy(self, embeddings: Tensor, positions: Tensor, max_tokens: int) -> tuple[list[int], list[Tensor]]:
        """Chosen ids and log-probabilities [vocabulary] of every step; no cache, the whole sequence again."""
        next_position, chosen, logprobs = self.next_position, [], []
        for _ in range(max_tokens):
            hidden = self.language_model(
                inputs_embeds=embeddings[None],
                position_ids=positions.view(-1, positions.shape[-1])[:1],
                # without a mask transformers takes a gap in the positions for the start of another sequence
                attention_mask=torch.ones(1, len(embeddings), dtype=torch.long),
                use_cache=False,
            ).last_hidden_state[0, -1]
            step = self.lm_head(hidden).float().log_softmax(-1)
            chosen.append(int(step.argmax()))
            logprobs.append(step)
            embeddings = torch.cat([embeddings, self.embed(chosen[-1:])])
            positions = torch.cat([positions, torch.full_like(positions[..., :1], next_position)], dim=-1)
            next_position += 1
        return chosen, logprobs


def kept_tokens(
    features: Tensor, attention: Tensor, settings: dict[str, Any] | None, original: bool
) -> tuple[Tensor, list[int]]:
    """Rows [B, D] of the kept tokens and which they are; FlashVidConfig's defaults are these families' own."""
    if settings is None:
        return features.flatten(0, 1), list(range(features.shape[0] * features.shape[1]))
    video = compress(features, attention, FlashVidConfig(**settings), keeps_positions=original)
    return video.tokens, video.source_index.tolist()


class SeenAttention:
    """Received attention of one layer of a transformers tower, from its input while the tower runs.

    >>> with SeenAttention(layer.self_attn) as seen: ...
    >>> seen.received()  # [frames, tokens]

    Every token is a query and a key, the class token of a CLIP tower too: the softmax is the tower's
    own. The class token's column is the caller's to drop, as its feature is.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __enter__(self) -> "SeenAttention":
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden: Tensor = args[0] if args else kwargs["hidden_states"]

        self.hook = self.attention.register_forward_pre_hook(keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def received(self) -> Tensor:
        """[frames, tokens] fp32: the mean over heads and queries."""
        heads = self.attention.num_heads
        q, k = (
            projection(self.hidden).float().unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection in (self.attention.q_proj, self.attention.k_proj)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # [frames, heads, queries, keys]
        return weights.mean((1, 2))
