# SPDX-License-Identifier: MIT
"""What a shape's tokens say of the frames before them, and the loss that has the LLM's first layers work it out.

Which way the shape has moved, as which of the shapes it came and after which, how many times it has come; in wide
splits also when that is, how many shapes have been seen, and which shape lies on which side. Without it
the questions about time stayed at chance in 800 steps: each gives one word of a signal a video, this gives one at every
token of a shape. It takes part in training only, as `alignment` does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from . import data
from .alignment import SIDE, covered
from .backgrounds import Split, is_wide
from .model import TOKENS, TinyVlm
from .questions import COUNTS, TIMES, side_of
from .scenes import SHAPES, Mark
from .scripts import DIRECTIONS, INTERVAL

DEPTH = 2  # layers of the LLM that the facts are read behind
FAR = 15  # pixels that a shape must have moved by
MOST_SHAPES = 4
FACTS = len(DIRECTIONS) + MOST_SHAPES + len(COUNTS) + len(SHAPES)
WIDE_FACTS = len(TIMES) + MOST_SHAPES + len(DIRECTIONS) * len(SHAPES)  # more, in wide splits


def labels(split: Split, number: int, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the frames ``chosen`` of a video: the facts [T, 49, F] bool, and the tokens [T, 49] bool that have any.

    F is `count_facts` of the split.
    """
    video = data.video(split, number)
    facts = torch.zeros(len(chosen), TOKENS, count_facts(split), dtype=torch.bool)
    known = torch.zeros(len(chosen), TOKENS, dtype=torch.bool)
    first: dict[str, tuple[int, Mark]] = {}  # shape -> where it was first seen
    last: dict[str, int] = {}  # shape -> the frame that it was last seen in
    times: dict[str, int] = {}
    for t, place in enumerate(chosen):
        marks = [mark for mark in video[place].marks if mark.name in SHAPES]
        for mark in marks:
            first.setdefault(mark.name, (t, mark))
            times[mark.name] = times.get(mark.name, 0) + (last.get(mark.name, -2) < t - 1)
            last[mark.name] = t
        for mark in marks:
            earlier = [name for name in first if first[name][0] < first[mark.name][0]]
            says = [*_moved(first[mark.name][1], mark), *_one(len(earlier), MOST_SHAPES)]
            says += _one(times[mark.name] - 1, len(COUNTS))
            latest = max(earlier, key=lambda name: first[name][0], default="")
            says += [name == latest for name in SHAPES]
            if is_wide(split):
                says += _one(t // INTERVAL, len(TIMES)) + _one(len(first) - 1, MOST_SHAPES)
                around = {side_of(other, mark) + other.name for other in marks if other.name != mark.name}
                says += [way + name in around for way in DIRECTIONS for name in SHAPES]
            where = covered(mark).flatten()
            facts[t, where] = torch.tensor(says)
            known[t, where] = True
    return facts, known


def count_facts(split: Split) -> int:
    """How many facts there are in a split."""
    return FACTS + WIDE_FACTS * is_wide(split)


def _moved(start: Mark, now: Mark) -> list[bool]:
    return [(now.x - start.x) * dx + (now.y - start.y) * dy >= FAR for dx, dy in DIRECTIONS.values()]


def _one(place: int, size: int) -> list[bool]:
    """One of ``size``; the last one for all beyond."""
    return [n == min(place, size - 1) for n in range(size)]


class History(nn.Module):
    """The loss, with its two linear probes: the facts behind DEPTH layers, and in front of them where a token is."""

    def __init__(self, model: TinyVlm, facts: int = FACTS) -> None:
        super().__init__()
        self.facts = nn.Linear(model.size.hidden, facts)
        self.row, self.column = (nn.Linear(model.size.hidden, SIDE) for _ in range(2))

    def forward(self, tokens: Tensor, states: Tensor, facts: Tensor, known: Tensor) -> Tensor:
        """Cross-entropy of the facts at a ``known`` token, summed over the facts, and of each token's row and column.

        tokens: [B, T * 49, D], as the LLM gets them; states: the same behind DEPTH layers; facts [B, T * 49, F]
        and known [B, T * 49] bool.
        """
        place = torch.arange(TOKENS).repeat(tokens.shape[1] // TOKENS).expand(len(tokens), -1).flatten()
        where = cross_entropy(self.row(tokens).flatten(0, 1).float(), place // SIDE)
        where = where + cross_entropy(self.column(tokens).flatten(0, 1).float(), place % SIDE)
        logits = self.facts(states[known]).float()
        said = binary_cross_entropy_with_logits(logits, facts[known].float(), reduction="sum")
        return where + said / max(len(logits), 1)
