# SPDX-License-Identifier: MIT
"""How many tokens a video keeps, before a pixel is encoded (ALGORITHM, Sec. 0): integers only, no torch."""

import math
from dataclasses import dataclass
from fractions import Fraction

from flashvid_vllm.core.config import FASTV, INNER_SETTINGS, FlashVidConfig


@dataclass(frozen=True)
class Budget:
    """What ``plan`` decided for a video of ``num_frames`` x ``tokens_per_frame`` tokens.

    Attributes:
        num_frames: temporal positions of the video [T].
        tokens_per_frame: tokens of each before compression [N].
        tokens: tokens that the video keeps, chosen and merged together [B].
        selected_per_frame: tokens that ADTS selects in each frame [K].
        inner_tokens: tokens that are left of these inside the LLM; ``tokens`` where nothing is dropped there.
    """

    num_frames: int
    tokens_per_frame: int
    tokens: int
    selected_per_frame: int
    inner_tokens: int

    @property
    def total(self) -> int:
        """Tokens before compression, T*N."""
        return self.num_frames * self.tokens_per_frame

    @property
    def selected(self) -> int:
        """Tokens that ADTS selects in the whole video, K*T."""
        return self.selected_per_frame * self.num_frames

    @property
    def merged(self) -> int:
        """Tokens that TSTM may leave in the whole video, M = B - K*T."""
        return self.tokens - self.selected

    @property
    def is_identity(self) -> bool:
        """Whether every token is kept as it is."""
        return self.tokens == self.total

    def merged_before(self, frame: int) -> int:
        """The share of ``merged`` that falls to the frames before ``frame``, floor(M*t/T)."""
        return self.merged * frame // self.num_frames


def plan(num_frames: int, tokens_per_frame: int, config: FlashVidConfig) -> Budget:
    """Plan the budget of one video.

    Args:
        num_frames: temporal positions [T], >= 1.
        tokens_per_frame: visual tokens of each, separators not counted [N], >= 1.
        config: gives R or B, and alpha.

    Raises:
        ValueError: ``num_frames`` or ``tokens_per_frame`` is below 1, or ``config`` drops tokens inside the LLM and
            does not say where and how many.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be >= 1, got {num_frames!r}")
    if tokens_per_frame < 1:
        raise ValueError(f"tokens_per_frame must be >= 1, got {tokens_per_frame!r}")
    if config.inner and config.method != FASTV:
        missing = [name for name in INNER_SETTINGS[1:] if getattr(config, name) is None]
        if missing:
            raise ValueError(f"inner needs {', '.join(missing)}; a server takes them from the model")
    total = num_frames * tokens_per_frame
    if config.token_budget is not None:
        wanted = Fraction(config.token_budget)
    else:
        wanted = _decimal(config.retention_ratio) * total
    tokens = inner_tokens = max(1, min(total, math.floor(wanted)))
    if config.method == FASTV:
        tokens = total
    elif config.inner:
        tokens, inner_tokens = _before_and_inside(config, wanted, total)
    selected = math.floor(_decimal(config.alpha) * tokens / num_frames + Fraction(1, 2))  # half goes up
    return Budget(num_frames, tokens_per_frame, tokens, min(selected, tokens // num_frames), inner_tokens)


def _before_and_inside(config: FlashVidConfig, wanted: Fraction, total: int) -> tuple[int, int]:
    """How many tokens enter an LLM of L layers, and how many of them its layers from K on have, for a mean of
    ``wanted``: floor(wanted L / (K + r (L - K))) of ``total``, and floor(r B) of these B."""
    layer, depth, left = config.inner_layer, config.inner_depth, _decimal(config.inner_ratio)
    assert layer is not None
    assert depth is not None
    tokens = max(1, min(total, math.floor(wanted * depth / (layer + left * (depth - layer)))))
    inside = max(1, math.floor(left * tokens))
    if tokens == total:  # all that there are: what the first layers leave of the mean is the others'
        inside = max(inside, min(total, math.floor((wanted * depth - layer * total) / (depth - layer))))
    return tokens, inside


def encoder_rows(num_frames: int, rows_per_frame: int, num_blocks: int, ratio: float) -> int:
    """Rows of a video that its encoder computes: ``ratio`` of all, and at least one frame of each block.

    Args:
        num_frames: temporal positions [T], >= 1.
        rows_per_frame: rows of each that the encoder computes or copies [P], >= 1.
        num_blocks: parts of the video that copy nothing from each other.
        ratio: in (0, 1].
    """
    return max(rows_per_frame * num_blocks, math.floor(_decimal(ratio) * num_frames * rows_per_frame))


def _decimal(value: float | None) -> Fraction:
    # The decimal that repr prints, not the double behind it: floor(0.7 * 1 * 360) is 251 in doubles.
    return Fraction(repr(value))
