# SPDX-License-Identifier: MIT
"""What each visual token shows, in words, and the loss that aligns the projector's tokens with those words' embeddings.

The stage in which LLaVA fits its projector to captions, made dense: every token is told which words describe it. With
it a question's word finds the tokens that show it as it would find itself. It takes part in training only.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from . import data
from .backgrounds import SCENES, Split
from .model import TOKENS, TinyVlm
from .questions import CORNERS, quarter
from .scenes import COLOURS, DOT, PIXELS, SHAPES, Frame, Mark
from .scripts import LETTERS
from .tokens import encode

WORDS = (*SHAPES, DOT, *COLOURS, *LETTERS, *SCENES, *CORNERS)
SIDE = int(TOKENS**0.5)
CELL = PIXELS / SIDE
COVERED = 0.15  # share of a token's square that a mark's square must cover


@cache
def _number() -> dict[str, int]:
    return {word: number for number, word in enumerate(WORDS)}


@lru_cache(maxsize=8192)
def labels(split: Split, number: int) -> Tensor:
    """[T, 49, W] bool: which of WORDS describe each token of a video. A token without a mark shows its scene alone."""
    return torch.stack([described(frame) for frame in data.video(split, number)])


def described(frame: Frame) -> Tensor:
    """[49, W] bool: which of WORDS describe each token of a frame."""
    shown = torch.zeros(SIDE, SIDE, len(WORDS), dtype=torch.bool)
    shown[..., _number()[frame.scene]] = True
    for mark in frame.marks:
        if mark.is_word:
            for letter, x in mark.letters:
                shown[int(mark.y / CELL), min(int(x / CELL), SIDE - 1), _number()[letter]] = True
            continue
        where = covered(mark)
        for word in (mark.name, mark.colour, quarter(mark)):
            shown[..., _number()[word]] |= where
    return shown.flatten(0, 1)


def covered(mark: Mark) -> Tensor:
    """[7, 7] bool: the tokens that a mark covers enough of, the one of its centre among them."""
    edges = torch.arange(SIDE) * CELL

    def overlap(centre: float) -> Tensor:
        low, high = centre - mark.radius, centre + mark.radius
        return ((edges + CELL).clamp(max=high) - edges.clamp(min=low)).clamp(min=0)

    where = overlap(mark.y)[:, None] * overlap(mark.x)[None, :] >= COVERED * CELL**2
    where[min(int(mark.y / CELL), SIDE - 1), min(int(mark.x / CELL), SIDE - 1)] = True
    return where


class Alignment(nn.Module):
    """The loss; its scale and bias are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = torch.tensor([encode(word)[0] for word in WORDS])
        self.scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.full((len(WORDS),), -2.0))

    def forward(self, model: TinyVlm, tokens: Tensor, shown: Tensor) -> Tensor:
        """Mean cross-entropy of each word for each token, times the words: tokens [..., D], shown [..., W] bool."""
        logits = (tokens @ model.embed(self.ids).T) * self.scale.exp() + self.bias
        return binary_cross_entropy_with_logits(logits.float(), shown.float()) * len(WORDS)
