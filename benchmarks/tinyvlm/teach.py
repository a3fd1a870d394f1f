# SPDX-License-Identifier: MIT
"""Training of the second model's tower, on single frames: each token is told which words describe what it shows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..common.record import write_weights
from . import data
from .alignment import WORDS, described
from .progress import progress
from .scenes import Mark, render
from .tower import WEIGHTS, WIDTH, Tower

FIRST_VIDEO = 10**6  # of those that the tower learns from; the LLM learns from others
STEPS, FRAMES = 1800, 16  # of a step
CROWD = 4  # videos whose marks are in one frame: most tokens of a frame of one video show nothing but the background
RATE, WARMUP, DECAY, CLIP = 2e-3, 100, 0.02, 1.0
RARE, EARLY = 3.0, 0.5  # weights: of what a token shows against what it does not; of the convolutions by themselves


def train(path: Path = WEIGHTS, seed: int = 1) -> Tower:
    """Train from scratch, and write the weights."""
    torch.manual_seed(seed)
    tower, head, early = Tower(), nn.Linear(WIDTH, len(WORDS)), nn.Linear(WIDTH, len(WORDS))
    for last in (head, early):
        nn.init.constant_(last.bias, -3.0)  # most words do not describe a token
    parameters = [*tower.parameters(), *head.parameters(), *early.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=WARMUP / STEPS)
    with progress("tower", STEPS) as advance:
        for frames, shown in _steps(seed):
            convolved = tower.convolved(frames)
            logits = head(tower.attended(convolved)[0])
            loss = _loss(logits, shown) + EARLY * _loss(early(convolved), shown)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            advance(1, f"loss {float(loss.detach()):.3f}")
    write_weights(tower.state_dict(), path)
    return tower


def _loss(logits: Tensor, shown: Tensor) -> Tensor:
    """Of what each token [B, 49, W] is said to show."""
    return binary_cross_entropy_with_logits(logits, shown.float(), pos_weight=torch.tensor(RARE)) * len(WORDS)


def _steps(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames [B, 224, 224, 3] uint8 and what their tokens show [B, 49, W] bool, of videos drawn anew."""
    rng = np.random.default_rng(seed)
    number = FIRST_VIDEO
    for _ in range(STEPS):
        drawn = []
        for _ in range(FRAMES):
            videos = [data.video("wide-train", number + n) for n in range(CROWD)]
            number += CROWD
            picked = [video[rng.integers(len(video))] for video in videos]
            drawn.append(replace(picked[0], marks=_apart([mark for frame in picked for mark in frame.marks])))
        yield torch.from_numpy(render(tuple(drawn))), torch.stack([described(frame) for frame in drawn])


def _apart(marks: list[Mark]) -> tuple[Mark, ...]:
    """The marks that none before them lies under."""
    kept: list[Mark] = []
    for mark in marks:
        if not any(mark.overlaps(other) for other in kept):
            kept.append(mark)
    return tuple(kept)
