# SPDX-License-Identifier: MIT
"""What a stage of a pipeline hands to the next: positions beside the hidden states, into the runner's own buffer."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.sequence import IntermediateTensors

from flashvid_vllm.models import stages
from flashvid_vllm.models.full_positions import FullPositionsModel

ROOM, TOKENS = 12, 5  # of a buffer, of a step


class Stage:
    """One of vLLM's models: the hidden states go one up."""

    last = False

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Any]] = []

    def forward(
        self, input_ids: Any, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        self.seen.append((positions.clone(), intermediate_tensors))
        hidden = inputs_embeds if intermediate_tensors is None else intermediate_tensors["hidden_states"]
        return hidden + 1 if self.last else IntermediateTensors({"hidden_states": hidden + 1})


class Model(FullPositionsModel, Stage):
    def __init__(self, last: bool, staged: bool = True) -> None:
        Stage.__init__(self)
        self.last, self.flashvid_staged = last, staged


def buffer(value: int) -> Tensor:
    """As both runners have it: a column more than there are tokens."""
    return torch.full((3, ROOM + 1), value)


def test_a_step_of_two_stages() -> None:
    """The last stage's own positions, marks among them, are replaced where its runner, a drafter and CUDA graphs read
    them; what the first stage sends is no part of its runner's buffer, which may be the next step's by then."""
    first, last = Model(last=False), Model(last=True)
    known, marks = buffer(0), buffer(-7)
    known[:, :TOKENS] = torch.tensor([[0, 1, 5, 5, 6], [0, 1, 2, 3, 6], [0, 1, 9, 8, 2**24 + 1]])
    sent = first.forward(None, known[:, :TOKENS], None, torch.zeros(TOKENS, 4))
    expected = known[:, :TOKENS].clone()
    known.fill_(-1)
    # as both runners receive: into what they have made, for as many tokens as there are
    made = stages.with_room(lambda n, dtype, device: IntermediateTensors({"hidden_states": torch.zeros(n, 4)}))
    room = made(ROOM, torch.bfloat16, torch.device("cpu"))
    assert room.tensors.keys() == sent.tensors.keys()
    for name, x in sent.items():
        assert room[name].dtype == x.dtype
        room[name][:TOKENS].copy_(x)
    own = marks[:, :TOKENS]
    output = last.forward(None, own, room[:TOKENS])
    assert torch.equal(output, torch.full((TOKENS, 4), 2.0))
    (seen, received), *_ = last.seen
    assert torch.equal(seen, expected)
    assert list(received.tensors) == ["hidden_states"]
    assert torch.equal(marks[:, :TOKENS], expected)
    assert int(marks[:, TOKENS:].max()) == -7


def test_without_stages_nothing_is_added() -> None:
    """Of models whose positions every stage knows, and of engines without FlashVID."""
    positions = torch.arange(TOKENS)
    first, last = (Model(last=last, staged=False) for last in (False, True))
    sent = first.forward(None, positions, None, torch.zeros(TOKENS, 4))
    assert list(sent.tensors) == ["hidden_states"]
    last.forward(None, positions, sent)
    assert last.seen[0][1] is sent
