# SPDX-License-Identifier: MIT
"""benchmarks.tinyvlm's model, small and sharp, with a tower and a video for it."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tinyvlm import batches, tokens
from benchmarks.tinyvlm.features import encode
from benchmarks.tinyvlm.model import Size, TinyVlm
from benchmarks.tinyvlm.questions import Question

# weight's ending -> its factor: attention that is not nearly uniform and counts
SHARP = {"q_proj.weight": 10, "k_proj.weight": 10, "v_proj.weight": 4, "o_proj.weight": 4}
SHARP_CLIP = {"q_proj.weight": 6, "k_proj.weight": 6, "v_proj.weight": 6}


@cache
def small_tower() -> Any:
    """A CLIP tower of two layers, random, its attention sharp: as wide as the real one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"hidden_size": 768, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=224, patch_size=16, hidden_act="quick_gelu"))
    for name, weight in tower.state_dict().items():
        weight *= next((scale for ending, scale in SHARP_CLIP.items() if name.endswith(ending)), 1)
    return tower.eval().requires_grad_(False)


def sharp_model(features: Tensor) -> TinyVlm:
    """An untrained model whose answers depend on what it sees and where."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = TinyVlm(Size(64, 2, 2, 128)).eval().requires_grad_(False)
        model.fit_projector(features)
        for weight in model.language_model.parameters():
            if weight.ndim == 2:  # not as training starts, which repeats the last word whatever it sees
                torch.nn.init.normal_(weight, std=0.02)
    for name, weight in model.language_model.state_dict().items():
        weight *= next((scale for ending, scale in SHARP.items() if name.endswith(ending)), 1)
    head, words = model.language_model.lm_head.weight, len(tokens.tokenizer())
    head[words:] = head[words - 1]  # rows that stand for no word: none of them is ever the likeliest alone
    return model


def noise(frames: int) -> np.ndarray:
    """[frames, 224, 224, 3] uint8: blocks of colours, some of which change."""
    rng = np.random.default_rng(3)
    blocks = np.repeat(rng.integers(0, 255, (1, 7, 7, 3)), frames, 0)
    for t in range(frames):
        blocks[t, t % 7, :3] = rng.integers(0, 255, (3, 3))
    return blocks.repeat(32, 1).repeat(32, 2).astype(np.uint8)


def model_of(frames: int = 6) -> TinyVlm:
    return sharp_model(encode(small_tower(), noise(frames), True)[0])


@torch.no_grad()
def torch_logits(
    model: TinyVlm, rows: Tensor, question: Question, place: Tensor | None = None, whole: int = 0
) -> Tensor:
    """[Q, vocabulary] of the question's tokens behind a video's rows [B, D], by training's code.

    ``place`` and ``whole`` as in `benchmarks.tinyvlm.answers.right`.
    """
    batch = batches.collate([batches.Sample(0, [], [question])], video=len(rows) if place is None else whole)
    states = batches.question_states(model, batch, rows[None], place)
    return model.head(states)[0, : len(tokens.question_ids(question)[0])]
