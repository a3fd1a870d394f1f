# SPDX-License-Identifier: MIT
"""The LLM's layers in a step that drops tokens: those before K on all tokens, the others on fewer.

In any other step vLLM's own forward pass runs, compiled if it is. The decoder's layers take one token or many, so
decoding after a drop is such a step: only lengths and slots differ.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from .plan import Plan, Prompt, Row
from .rank import attention_of_last, kept_order


@dataclass
class Step:
    """A step: its ``plan``, which of its tokens are a video's [L] (None: none), and the slots of the layers from K on,
    where they differ."""

    plan: Plan
    visual: Tensor | None = None
    slots: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """Tokens in front of layer K, n of them: hidden states and residuals [n, D], positions [n] or [3, n], keys of layer
    K - 1 [n, G * d], and which are a video's [n]."""

    hidden: Tensor
    residual: Tensor
    positions: Tensor
    keys: Tensor
    visual: Tensor

    def part(self, start: int, stop: int) -> "Tokens":
        """Tokens ``start`` to ``stop``, copied: what they are cut from is the next step's."""
        return Tokens(
            self.hidden[start:stop].clone(),
            self.residual[start:stop].clone(),
            self.positions[..., start:stop].clone(),
            self.keys[start:stop].clone(),
            self.visual[start:stop].clone(),
        )


def joined(parts: list[Tokens]) -> Tokens:
    """Tokens of several chunks."""
    return Tokens(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.positions for part in parts], dim=-1),
        torch.cat([part.keys for part in parts]),
        torch.cat([part.visual for part in parts]),
    )


class InnerTextModel:
    """Mixin that stands before vLLM's class of the layers, whose object it becomes part of (see ``install``)."""

    flashvid_inner: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.flashvid_inner.take_step()
        if step is None or not step.plan.drops:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        get_forward_context().slot_mapping.update(step.slots)
        if not step.plan.splits:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return self.flashvid_split(step, *args, **kwargs)

    def flashvid_split(
        self,
        step: Step,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        deepstack_input_embeds: Any = None,
    ) -> Tensor:
        """The hidden states [L, D] of a step; zeros for tokens that wait or are dropped, which nobody reads."""
        model: Any = self
        hidden = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        first, later = model.layers[: self.flashvid_inner.layer], model.layers[self.flashvid_inner.layer :]
        residual: Any = None
        seen: dict[str, Tensor] = {}
        attention = first[-1].self_attn.attn

        def keep(module: Any, args: Any) -> None:
            seen["query"], seen["key"] = args[:2]

        hook = attention.register_forward_pre_hook(keep)
        try:
            for index, layer in enumerate(first):
                hidden, residual = layer(positions, hidden, residual)
                if deepstack_input_embeds is not None and index < len(deepstack_input_embeds):
                    hidden = hidden + deepstack_input_embeds[f"deepstack_input_embeds_{index}"]
        finally:
            hook.remove()
        visual = step.visual
        if visual is None:
            visual = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        key = seen["key"].view(len(hidden), -1)
        tokens = Tokens(hidden, residual, positions, key, visual)
        query = seen["query"].view(len(hidden), -1)
        rows = [self._row(row, tokens, query, attention) for row in step.plan.rows]
        taken = [row for row in rows if row is not None]
        out = hidden.new_zeros(len(hidden) + 1, hidden.shape[1])  # the last row takes what nobody asks for
        if taken:
            hidden = torch.cat([source.hidden[index] for source, index, _ in taken])
            residual = torch.cat([source.residual[index] for source, index, _ in taken])
            positions = torch.cat([source.positions[..., index] for source, index, _ in taken], dim=-1)
            target = torch.cat([target for _, _, target in taken])
            del rows, taken  # of whole prompts
            context = get_forward_context()
            padding, context.is_padding = context.is_padding, None  # of the tokens before
            for layer in later:
                hidden, residual = layer(positions, hidden, residual)
            context.is_padding = padding
            hidden, _ = model.norm(hidden, residual)
            out.index_copy_(0, target, hidden)
        return out[:-1]

    def _row(self, row: Row, tokens: Tokens, query: Tensor, attention: Any) -> tuple[Tokens, Tensor, Tensor] | None:
        """What the layers from K on have of one request: which of what tokens, and where in the step each of them
        belongs (L: nowhere). None: nothing, it waits."""
        start, stop, nowhere = row.start, row.start + row.scheduled, len(tokens.hidden)
        if not row.waits and not row.ranks:
            own = torch.arange(start, stop, device=tokens.hidden.device)
            return tokens, own, own
        prompt = row.prompt
        assert prompt is not None
        prompt.held.append(tokens.part(start, stop))
        if row.waits:
            return None
        whole = joined(prompt.held)
        prompt.held.clear()
        last = query[start + prompt.length - 1 - row.computed]
        order = self._kept(prompt, whole, last, attention)
        return whole, order, torch.where(order >= row.computed, order - row.computed + start, nowhere)

    def _kept(self, prompt: Prompt, whole: Tokens, query: Tensor, attention: Any) -> Tensor:
        size = attention.head_size
        keys = whole.keys[: prompt.length].unflatten(1, (-1, size))
        received = attention_of_last(query.unflatten(0, (-1, size)), keys, attention.impl.scale)
        self.flashvid_inner.count(prompt)
        return kept_order(received, whole.visual, prompt.videos)
