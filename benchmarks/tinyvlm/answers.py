# SPDX-License-Identifier: MIT
"""Answers in torch from a video's tokens, compressed or not, as vLLM with the plugin gives them.

The prompt is <user>, the video's tokens, the newline, the question. LLaVA's positions are 1-D and count what is there:
behind a compressed video they go on from the last kept token, unless they are to be those in the whole video.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvid_vllm import FlashVidConfig, compress

from .batches import IGNORED, Sample, collate, question_states
from .features import Store
from .model import TinyVlm, pool
from .questions import Question
from .tokens import END, USER, encode, question_ids, tokenizer

MOST_TOKENS = 5  # of an answer


@dataclass(frozen=True)
class Encoded:
    """A video as the LLM could get it.

    Attributes:
        tokens: [T, 49, D], projected and pooled.
        attention: [T, 49] float32, the received attention pooled alike.
    """

    tokens: Tensor
    attention: Tensor


@torch.no_grad()
def encoded(model: TinyVlm, store: Store, number: int, frames: Sequence[int] | None = None) -> Encoded:
    """Video ``number`` of the store; ``frames``: only these of it."""
    features, attention = store.features(number), store.attention(number)
    if frames is not None:
        features, attention = features[list(frames)], attention[list(frames)]
    return Encoded(model.video_tokens(features.float()), pool(attention))


def kept(video: Encoded, config: FlashVidConfig | None) -> Tensor:
    """The tokens [B, D] that the LLM gets, one after the other; None: all."""
    if config is None:
        return video.tokens.flatten(0, 1)
    return compress(video.tokens, video.attention, config, keeps_positions=False).tokens


@torch.no_grad()
def right(
    model: TinyVlm, tokens: Tensor, questions: Sequence[Question], place: Tensor | None = None, whole: int = 0
) -> list[bool]:
    """Whether greedy decoding answers each question behind the tokens [B, D] right.

    ``place`` [B]: their positions in a video of ``whole`` tokens; None: one after the other, as LLaVA's are.

    All questions run in one sequence, each sees the video and itself: an answer is right if every token of the true
    one is the likeliest behind those before it.
    """
    batch = collate([Sample(0, [], list(questions))], video=len(tokens) if place is None else whole)
    best = model.head(question_states(model, batch, tokens[None], place)).argmax(-1)
    wrong = (best != batch.targets) & (batch.targets != IGNORED)
    return [not bool(wrong[batch.block == number].any()) for number in range(1, len(questions) + 1)]


@torch.no_grad()
def greedy(model: TinyVlm, tokens: Tensor, question: Question, place: Tensor | None = None, whole: int = 0) -> str:
    """The answer that greedy decoding gives to one question behind the tokens [B, D], its words with spaces.

    ``place`` and ``whole`` as in `right`.
    """
    if place is None:
        place, whole = torch.arange(len(tokens)), len(tokens)
    user, ids = encode(USER), question_ids(question)[0]
    prefix = torch.cat([model.embed(torch.tensor(user)), tokens, model.newline[None]])
    before = torch.cat([torch.arange(len(user)), len(user) + place])
    answer: list[int] = []
    while len(answer) < MOST_TOKENS:
        rows = torch.cat([prefix, model.embed(torch.tensor(ids + answer))])[None]
        behind = len(user) + whole + torch.arange(1 + len(ids) + len(answer))  # the newline first
        seen = torch.ones(2 * rows.shape[1:2], dtype=torch.bool).tril()  # a gap in the positions is no new sequence
        states = model(rows, seen[None, None], torch.cat([before, behind])[None])[-1]
        answer.append(int(model.head(states[0, -1]).argmax()))
        if answer[-1] == encode(END)[0]:
            answer.pop()
            break
    return str(tokenizer().decode(answer))
