# SPDX-License-Identifier: MIT
"""Positions on their way through the stages of a pipeline.

Only the first stage runs the encoder and learns where kept tokens stand (see ``positions``). Each stage hands the
positions of a step's tokens, of all its tokens, to the next one beside their hidden states, and the next one puts
them where its runner has its own: a buffer that CUDA graphs read, and a drafter on the last stage.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.sequence import IntermediateTensors

POSITIONS = "flashvid_positions"
"""Their name beside the hidden states: [n, 3] int64, tokens first as in all that stages hand on."""


def with_room(make_empty: Callable[..., IntermediateTensors]) -> Callable[..., IntermediateTensors]:
    """A model's ``make_empty_intermediate_tensors``, with room for positions."""

    def make_empty_intermediate_tensors(
        batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        room = torch.zeros(batch_size, 3, dtype=torch.int64, device=device)
        return IntermediateTensors({**make_empty(batch_size, dtype, device).tensors, POSITIONS: room})

    return make_empty_intermediate_tensors


def receive(received: IntermediateTensors, positions: Tensor) -> IntermediateTensors:
    """What a stage has received without the positions, which replace ``positions`` [3, n] in place."""
    positions.copy_(received[POSITIONS].T)
    return IntermediateTensors({name: x for name, x in received.items() if name != POSITIONS})


def hand_on(output: Any, positions: Tensor) -> Any:
    """What a stage's forward pass gave, with the ``positions`` [3, n] of its tokens if another stage follows."""
    if not isinstance(output, IntermediateTensors):
        return output
    # a copy: the runner's own positions are the next step's before this one is sent
    return IntermediateTensors({**output.tensors, POSITIONS: positions.T.contiguous()})
