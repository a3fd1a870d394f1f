# SPDX-License-Identifier: MIT
"""Answers in torch where tokens are dropped inside the LLM: what the plugin does on vLLM's KV cache, a second time.

The LLM's layers run one by one, a question at a time behind the video. From layer K on nobody sees the tokens that the
prompt's last token attended to least in layer K - 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from .batches import IGNORED, Batch, Sample, collate, laid_out
from .model import TinyVlm
from .questions import Question


@torch.no_grad()
def right(
    model: TinyVlm,
    tokens: Tensor,
    questions: Sequence[Question],
    layer: int,
    kept: int,
    place: Tensor | None,
    whole: int,
) -> list[bool]:
    """As `answers.right`, where from ``layer`` on ``kept`` of the ``tokens`` are left, for each question others."""
    batch = collate([Sample(0, [], [q]) for q in questions], video=len(tokens) if place is None else whole)
    best = model.head(question_states(model, batch, tokens, layer, kept, place)).argmax(-1)
    wrong = (best != batch.targets) & (batch.targets != IGNORED)
    return [not bool(row.any()) for row in wrong]


def question_states(
    model: TinyVlm, batch: Batch, tokens: Tensor, layer: int, kept: int, place: Tensor | None
) -> Tensor:
    """Last hidden states [B, Q, D] of a batch of one question each behind the tokens [n, D] of the same video."""
    rows, seen, positions = laid_out(model, batch, tokens.expand(len(batch.ids), -1, -1), place)
    text = model.language_model.model
    turned = text.rotary_emb(rows, positions)
    prefix = rows.shape[1] - batch.ids.shape[1]
    last = prefix + (batch.targets != IGNORED).int().argmax(1)  # it gives the answer's first token
    hidden = rows
    for index, block in enumerate(text.layers):
        then = seen
        if index == layer - 1:
            received = attention_of_last(block, hidden, turned, seen, last)[:, 1 : 1 + len(tokens)]
            gone = received.sort(descending=True, stable=True).indices[:, kept:]
            then = seen.clone()
            then[torch.arange(len(rows))[:, None], 0, :, 1 + gone] = False
        hidden = block(hidden, attention_mask=seen, position_ids=positions, position_embeddings=turned)
        seen = then
    states: Tensor = text.norm(hidden)[:, prefix:]
    return states


def attention_of_last(block: Any, hidden: Tensor, turned: tuple[Tensor, Tensor], seen: Tensor, last: Tensor) -> Tensor:
    """What token ``last`` [B] of each row attends to in a layer with input [B, L, D], mean over its heads: [B, L]."""
    attention, x = block.self_attn, block.input_layernorm(hidden)
    query, key = (
        projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *turned)
    one = torch.arange(len(x))
    logits = torch.einsum("bhd,bhld->bhl", query[one, :, last], key) * attention.scaling
    return logits.masked_fill(~seen[one, 0, last][:, None], float("-inf")).softmax(-1).mean(1)
