# SPDX-License-Identifier: MIT
"""Hugging Face transformers as the oracle of the Qwen-VL families: the compressed prompt put together by hand.

Nothing of the plugin but `flashvid_vllm.compress` (whose own oracles are the golden vectors and brute
force) is used: features, received attention, placement and positions are worked out here.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.video_utils import VideoMetadata

from flashvid_vllm import FlashVidConfig, compress

from ..engine import Clip

QWEN: dict[str, Any] = {"min_segments": 4, "selection": "attention_diversity"}


class Prompt:
    """A prompt as the language model receives it, written from left to right.

    Dropped tokens have no row and still take their share of the positions.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.ids: list[int] = []
        self.positions: list[list[int]] = []  # t, y, x of every row
        self.next_position = 0

    def text(self, ids: Sequence[int], rows: Iterable[Tensor]) -> None:
        """Tokens that follow each other: one position a token, the same in all three rows."""
        for token, row in zip(ids, rows, strict=True):
            self.ids.append(token)
            self.rows.append(row)
            self.positions.append([self.next_position] * 3)
            self.next_position += 1

    def grid(self, token: int, rows: Iterable[Tensor], where: Iterable[int], full: Sequence[Sequence[int]]) -> None:
        """The kept `rows` of an image, a video or a frame, of token id `token`.

        Args:
            where: which of its tokens each row is, ascending.
            full: position (t, y, x) of all its tokens, dropped ones too, counted from where it starts.
        """
        for row, index in zip(rows, where, strict=True):
            self.ids.append(token)
            self.rows.append(row)
            self.positions.append([self.next_position + p for p in full[index]])
        self.next_position += max(max(p) for p in full) + 1


class MropeOracle:
    """The same weights in transformers. A family says how it encodes and lays out a video.

    An embedding is a row [C]: the language model's input [D], and behind it what DeepStack adds in
    the language model's layers, where the family has it.
    """

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.config = self.model.config
        self.width: int = self.config.text_config.hidden_size  # D

    # --- what a family says

    def tower(self, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        """Rows [n, C] of the output tokens of one image or video, in raster order."""
        raise NotImplementedError

    def last_full_block(self) -> Any:
        """The last block of the tower that attends over whole frames."""
        return self.model.model.visual.blocks[-1]

    def raster_index(self, grid: tuple[int, int, int]) -> list[int]:
        """Raster index of every output token in the order in which the tower's blocks see them."""
        return list(range(grid[0] * grid[1] * grid[2]))

    def lay_out(self, prompt: Prompt, clip: Clip, grid: tuple[int, int, int], rows: Tensor, where: list[int]) -> None:
        """Write a video's kept `rows` [B, C], its tokens `where`, with whatever separates its frames."""
        raise NotImplementedError

    def deepstack(self, extra: Tensor) -> dict[str, Any]:
        """The language model's arguments for what follows the embeddings in the rows: [L', C - D]."""
        return {}

    # --- what the families share

    @torch.inference_mode()
    def assemble(
        self, text: str, clips: list[Clip], images: list[np.ndarray], settings: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """The prompt as the language model must receive it; `settings` None keeps everything.

        A media token in `text` behind those of the last clip or image is text like any other.

        Returns:
            embeddings [L', C] and positions [3, L'] (those of the full prompt, for what is kept);
            `ids` and `next_position` are what it leaves behind.
        """
        clips, images = list(clips), list(images)
        prompt = Prompt()
        for token in self.processor.tokenizer(text, add_special_tokens=False).input_ids:
            if token == self.config.video_token_id and clips:
                clip = clips.pop(0)
                features, attention, grid = self.video(clip)
                self.lay_out(prompt, clip, grid, *self.compress(features, attention, settings))
            elif token == self.config.image_token_id and images:
                rows, (_, height, width) = self.image(images.pop(0))
                full = [(0, y, x) for y in range(height) for x in range(width)]
                prompt.grid(token, rows, range(len(rows)), full)
            else:
                prompt.text([token], self.embed([token]))
        assert not clips
        assert not images
        self.ids, self.next_position = prompt.ids, prompt.next_position
        return torch.stack(prompt.rows), torch.tensor(prompt.positions).T

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Rows [n, C] of text tokens: DeepStack adds nothing to them."""
        rows = self.model.get_input_embeddings()(torch.tensor(ids))
        return torch.cat([rows, rows.new_zeros(len(ids), self.channels() - self.width)], dim=1)

    def channels(self) -> int:
        """C."""
        return self.width

    def compress(self, features: Tensor, attention: Tensor, settings: dict[str, Any] | None) -> tuple[Tensor, Any]:
        """Rows [B, C] of the kept tokens and which they are: the input merged, DeepStack's rows picked."""
        rows = features.flatten(0, 1)
        if settings is None:
            return rows, list(range(len(rows)))
        config = FlashVidConfig(**settings if "method" in settings else QWEN | settings)  # a peer has no preset
        video = compress(features[..., : self.width].contiguous(), attention, config)
        kept = torch.cat([video.tokens, rows[video.source_index, self.width :]], dim=1)
        return kept, video.source_index.tolist()

    def video(self, clip: Clip) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """features [T, N, C], received attention [T, N] and the grid of output tokens."""
        inputs = self.processor.video_processor(
            videos=[clip.frames()],
            video_metadata=[VideoMetadata(**{k: v for k, v in clip.metadata().items() if k != "do_sample_frames"})],
            do_sample_frames=False,
            return_tensors="pt",
        )
        return self._encode(inputs["pixel_values_videos"], inputs["video_grid_thw"])

    def image(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int, int]]:
        """Rows [n, C] of an image and its grid of output tokens."""
        inputs = self.processor.image_processor(images=[image], return_tensors="pt")
        features, _, grid = self._encode(inputs["pixel_values"], inputs["image_grid_thw"])
        return features.flatten(0, 1), grid

    @torch.inference_mode()
    def _encode(self, pixels: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        frames, height, width = grid_thw[0].tolist()
        grid = (frames, height // 2, width // 2)
        seen = {}
        block = self.last_full_block().attn

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]
            seen["rotary"] = kwargs["position_embeddings"]

        hook = block.register_forward_pre_hook(keep, with_kwargs=True)
        features = self.tower(pixels.to(self.model.dtype), grid_thw)
        hook.remove()
        q, k, _ = block.qkv(seen["hidden"]).unflatten(1, (3, block.num_heads, -1)).unbind(1)
        q, k = (x.float() for x in apply_rotary_pos_emb_vision(q, k, *seen["rotary"]))
        q, k = (x.unflatten(0, (frames, -1)).transpose(1, 2) for x in (q, k))
        weights = (q @ k.transpose(-1, -2) * block.scaling).softmax(-1)
        received = weights.mean((1, 2)).flatten()  # over heads and queries; patches in the blocks' order
        merged = received.unflatten(0, (-1, 4)).mean(1)
        attention = torch.empty_like(merged)
        attention[self.raster_index(grid)] = merged
        return features.unflatten(0, (frames, -1)), attention.unflatten(0, (frames, -1)), grid

    @torch.inference_mode()
    def greedy(
        self, embeddings: Tensor, positions: Tensor, max_tokens: int, follow: Sequence[int] = ()
    ) -> tuple[list[int], list[Tensor]]:
        """Chosen ids and log-probabilities [vocabulary] of every step; no cache, the whole sequence again.

        With `follow` these ids are taken in place of its own choice: where rounding decides between two.
        """
        next_position = self.next_position
        chosen: list[int] = []
        logprobs: list[Tensor] = []
        for _ in range(max_tokens):
            out = self.model.model.language_model(
                inputs_embeds=embeddings[None, :, : self.width],
                position_ids=positions[:, None],
                use_cache=False,
                **self.deepstack(embeddings[:, self.width :]),
            ).last_hidden_state[0, -1]
            step = self.model.lm_head(out).float().log_softmax(-1)
            chosen.append(follow[len(chosen)] if follow else int(step.argmax()))
            logprobs.append(step)
            embeddings = torch.cat([embeddings, self.embed(chosen[-1:])])
            positions = torch.cat([positions, torch.full((3, 1), next_position)], dim=1)
            next_position += 1
        return chosen, logprobs
