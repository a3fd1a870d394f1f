# SPDX-License-Identifier: MIT
"""Training samples: a cached video, its frames chosen anew, with as many questions as fit, in one sequence.

The tower sees each frame alone, so frames of the cache can be put together anew: reversed, thinned out, held. The
questions are then made from the frames chosen. Each question sees the video and itself, at the positions that it
would have alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import data
from .backgrounds import Split, is_wide
from .features import Store
from .model import TOKENS, TinyVlm
from .questions import BRIEF, LONG, Question, ask
from .scenes import Video
from .scripts import INTERVAL, INTERVALS
from .tokens import USER, encode, question_ids, tokenizer

MOST_QUESTIONS = 12  # of a video in a sample
SHORT, FEW = (2, 4), (6, 9)  # frames
LONGEST = 24  # frames that a video of the kind event is stretched to
MOST_FRAMES = 120  # of a batch
IGNORED = -100

Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """Frames ``chosen`` of video ``number``, and questions about what they show."""

    number: int
    chosen: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Batch:
    """Samples with equally many frames.

    Attributes:
        samples: what it is made of.
        ids [B, Q]: the questions and answers, one after the other, padded.
        block [B, Q]: which question a token belongs to, from 1; 0 where padded.
        positions [B, Q]: as if each question were alone behind the video.
        targets [B, Q]: the id that a token must predict, IGNORED but for answers.
        hints [B, Q]: the answer's first id at the question's last word, IGNORED elsewhere: training asks for it there
            too, a step of attention before it is due.
    """

    samples: list[Sample]
    ids: Tensor
    block: Tensor
    positions: Tensor
    targets: Tensor
    hints: Tensor

    @property
    def frames(self) -> int:
        """Of each video."""
        return len(self.samples[0].chosen)


def rearrange(video: Video, kind: str, rng: Rng, short: bool, length: int | None = None) -> list[int]:
    """Indices of the frames to show, forwards or backwards: of a ``short`` video SHORT, else FEW or all.

    Short ones cost a third and teach what a frame can teach. If not short, one of the kind event is stretched,
    to ``length`` frames.
    """
    low, high = SHORT if short else FEW
    chosen = list(range(len(video)))
    if kind == "event" and not short:
        chosen = _stretched(video, rng, length)
    elif short or (kind != "count" and rng.random() < 0.7):  # fewer frames would make nearly every count 1
        chosen = sorted(int(t) for t in rng.permutation(len(video))[: int(rng.integers(low, high + 1))])
    return chosen[::-1] if rng.random() < 0.5 else chosen


def _stretched(video: Video, rng: Rng, length: int | None) -> list[int]:
    """A still video made longer: its frames repeated, but not those of the event beyond BRIEF."""
    usual = min(len(frame.marks) for frame in video)
    event = [t for t, frame in enumerate(video) if len(frame.marks) > usual][:BRIEF]
    still = [t for t, frame in enumerate(video) if len(frame.marks) == usual]
    if length is None:  # rather short than long
        length = min(int(rng.integers(LONG, LONGEST + 1)), int(rng.integers(LONG, LONGEST + 1)))
    place = int(rng.integers(2, length - len(event) - 1))
    held = [int(t) for t in rng.choice(still, length - len(event))]
    return [*held[:place], *event, *held[place:]]


def sample(split: Split, number: int, rng: Rng, short: bool = False) -> Sample:
    """Video ``number``, rearranged, with up to MOST_QUESTIONS questions."""
    script = data.script(split, number)
    chosen = rearrange(script.video, script.intent.kind, rng, short, INTERVALS * INTERVAL if is_wide(split) else None)
    questions = ask(tuple(script.video[t] for t in chosen), rng, split)
    questions = [question for question in questions if not (short and question.family == "count")]
    kept = sorted(int(i) for i in rng.permutation(len(questions))[:MOST_QUESTIONS])
    return Sample(number, chosen, [questions[i] for i in kept])


def as_it_is(split: Split, number: int) -> Sample:
    """Video ``number`` with all its frames and questions."""
    return Sample(number, list(range(len(data.video(split, number)))), data.questions(split, number))


def collate(samples: list[Sample], video: int | None = None) -> Batch:
    """A batch of samples with equally many frames; ``video``: the tokens that are left of them, None for all."""
    start = 1 + (len(samples[0].chosen) * TOKENS if video is None else video) + 1
    rows = []
    for one in samples:
        ids: list[int] = []
        block: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        hints: list[int] = []
        for number, question in enumerate(one.questions, start=1):
            asked, answer = question_ids(question)
            ids += asked + answer[:-1]
            block += [number] * (len(asked) + len(answer) - 1)
            positions += range(start, start + len(asked) + len(answer) - 1)
            targets += [IGNORED] * (len(asked) - 1) + answer
            hints += [IGNORED] * (len(asked) - 2) + [answer[0]] + [IGNORED] * len(answer)
        rows.append((ids, block, positions, targets, hints))
    length = max(len(row[0]) for row in rows)
    fill = (int(tokenizer().pad_token_id), 0, 0, IGNORED, IGNORED)
    columns = [torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows]) for i in range(len(fill))]
    return Batch(samples, *columns)


def epoch(split: Split, count: int, batch: int, rng: Rng, short: bool = False) -> list[Batch]:
    """Every video once, in batches of up to ``batch`` videos with equally many frames in each video of one.

    Batches of videos of more than MOST_FRAMES / ``batch`` frames are smaller.
    """
    samples = [sample(split, int(number), rng, short) for number in rng.permutation(count)]
    waiting: dict[int, list[Sample]] = {}
    batches: list[list[Sample]] = []
    for one in samples:
        same = waiting.setdefault(len(one.chosen), [])
        same.append(one)
        if len(same) >= min(batch, MOST_FRAMES // len(one.chosen)):
            batches.append(waiting.pop(len(one.chosen)))
    batches += waiting.values()
    return [collate(batches[place]) for place in rng.permutation(len(batches))]


def in_order(split: Split, numbers: Sequence[int]) -> Iterator[Batch]:
    """Every video once as it is, one a batch."""
    for number in numbers:
        yield collate([as_it_is(split, number)])


def may_see(block: Tensor, prefix: int) -> Tensor:
    """[B, 1, L, L] bool with L = prefix + Q: a token sees the video, and of its own question what is before it."""
    whole = torch.cat([block.new_zeros(len(block), prefix), block.masked_fill(block == 0, -1)], dim=1)
    length = whole.shape[1]
    same = (whole[:, :, None] == whole[:, None, :]) | (whole[:, None, :] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (same & causal)[:, None]


def video_tokens(model: TinyVlm, batch: Batch, store: Store) -> Tensor:
    """[B, T * 49, D] of the batch's videos, projected and pooled."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    features = [store.features(one.number)[one.chosen] for one in batch.samples]
    return model.video_tokens(torch.cat(features).to(dtype)).unflatten(0, (len(features), -1)).flatten(1, 2)


def laid_out(model: TinyVlm, batch: Batch, video: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The videos' tokens [B, n, D] with the questions behind them, for `TinyVlm.forward`: embeddings, who sees whom,
    positions.

    ``place``: [n], where each token was in the video that `collate` was told about; None: they are that video.
    """
    size = len(video)
    head = model.embed(torch.tensor(encode(USER))).expand(size, -1, -1)
    newline = model.newline.expand(size, 1, -1)
    rows = torch.cat([head, video, newline, model.embed(batch.ids)], dim=1)
    prefix = rows.shape[1] - batch.ids.shape[1]
    before = torch.arange(prefix)
    if place is not None:
        before = torch.cat([before[:1], 1 + place, batch.positions[0, :1] - 1])  # <user>, the video, the newline
    positions = torch.cat([before.expand(size, -1), batch.positions], dim=1)
    return rows, may_see(batch.block, prefix), positions


def states(
    model: TinyVlm, batch: Batch, video: Tensor, place: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """States [B, ..., D] of what `laid_out` puts together: see `TinyVlm.forward`.

    Returns the questions' behind the last layer [B, Q, D], and the videos' of all layers [B, n, D].
    """
    layers = model(*laid_out(model, batch, video, place))
    prefix = layers[-1].shape[1] - batch.ids.shape[1]
    return layers[-1][:, prefix:], tuple(layer[:, 1 : 1 + video.shape[1]] for layer in layers)


def question_states(model: TinyVlm, batch: Batch, video: Tensor, place: Tensor | None = None) -> Tensor:
    """The questions' last hidden states [B, Q, D] behind the videos' tokens [B, T * 49, D]; see `states`."""
    return states(model, batch, video, place)[0]
