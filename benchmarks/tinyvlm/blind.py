# SPDX-License-Identifier: MIT
"""How far the questions alone lead: the same LLM trained to answer without any video."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ..common.machine import model_dtype
from . import data
from .backgrounds import Split
from .batches import IGNORED, Sample, collate, question_states
from .model import Size, TinyVlm
from .progress import progress
from .questions import FAMILIES
from .train import Score, tally

VIDEOS = 32  # of a batch


@dataclass(frozen=True)
class Result:
    """Of a family: right answers and questions."""

    right: int
    asked: int

    @property
    def is_chance(self) -> bool:
        """Whether no more than a guess among four, with one chance in 2000 to be wrong about it."""
        return self.right <= self.asked / 4 + 3.3 * math.sqrt(self.asked * 3 / 16)


def text_only(
    size: Size,
    train: int,
    test: int,
    splits: tuple[Split, Split] = ("train", "test"),
    epochs: int = 4,
    rate: float = 1.2e-3,
) -> dict[str, Result]:
    """Train on the questions of ``train`` training videos, answer those of ``test`` test videos; by family."""
    torch.manual_seed(0)
    model = TinyVlm(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    rng = np.random.default_rng(0)
    with progress("without the video", epochs * -(-train // VIDEOS)) as advance:
        for _ in range(epochs):
            order = rng.permutation(train)
            for start in range(0, train, VIDEOS):
                batch = collate(_asked(splits[0], order[start : start + VIDEOS].tolist()), video=0)
                with torch.autocast("cpu", torch.bfloat16, enabled=model_dtype() == "bfloat16"):
                    states = question_states(model, batch, torch.zeros(len(batch.samples), 0, size.hidden))
                    wanted = batch.targets != IGNORED
                    loss = cross_entropy(model.head(states[wanted]).float(), batch.targets[wanted])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                advance(1, f"loss {float(loss.detach()):.3f}")
    score = _score(model.eval(), splits[1], test)
    return {family: Result(score.right[family], score.asked[family]) for family in FAMILIES if score.asked[family]}


def _asked(split: Split, numbers: list[int]) -> list[Sample]:
    asked = [Sample(number, [], data.questions(split, number)) for number in numbers]
    return [sample for sample in asked if sample.questions]


@torch.no_grad()
def _score(model: TinyVlm, split: Split, count: int) -> Score:
    batches = [collate([sample], video=0) for sample in _asked(split, list(range(count)))]
    nothing = torch.zeros(1, 0, model.size.hidden)
    return tally((batch, model.head(question_states(model, batch, nothing)).argmax(-1)) for batch in batches)
