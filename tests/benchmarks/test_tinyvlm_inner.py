# SPDX-License-Identifier: MIT
"""Dropping inside the LLM, written a second time: what is masked there is taken away here, a question at a time."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from transformers import Qwen2ForCausalLM

from benchmarks.tinyvlm import answers, batches, inner, inside, tokens
from benchmarks.tinyvlm.model import TinyVlm
from benchmarks.tinyvlm.questions import Question
from benchmarks.tinyvlm.report import RESULTS

from .tinyvlm import model_of


def questions() -> list[Question]:
    """Two of a real video: of different lengths."""
    found = inner.asked(3)
    several = [question for of_it in found.values() for question in of_it]
    several.sort(key=lambda question: len(tokens.question_ids(question)[0]))
    return [several[0], several[-1]]


@pytest.fixture(scope="module")
def model() -> TinyVlm:
    return model_of()


@pytest.fixture(scope="module")
def video(model: TinyVlm) -> Tensor:
    return torch.randn(40, model.size.hidden, generator=torch.Generator().manual_seed(0))


def taken_away(model: TinyVlm, video: Tensor, question: Question, kept: int) -> Tensor:
    """Last hidden states of the question's tokens, where behind layer 1 the others are no longer there; eager."""
    asked, answer = tokens.question_ids(question)
    ids = [*asked, *answer[:-1]]
    head = model.embed(torch.tensor(tokens.encode(tokens.USER)))
    rows = torch.cat([head, video, model.newline[None], model.embed(torch.tensor(ids))])[None]
    eager = Qwen2ForCausalLM._from_config(model.language_model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.language_model.state_dict())
    text = eager.model
    positions = torch.arange(rows.shape[1])[None]
    seen: list[Tensor] = []
    hook = text.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    turned = text.rotary_emb(rows, positions)
    mask = torch.full(2 * rows.shape[1:2], float("-inf")).triu(1)[None, None]
    hidden = text.layers[0](rows, attention_mask=mask, position_ids=positions, position_embeddings=turned)
    hook.remove()
    last = len(head) + len(video) + len(asked)  # the newline between
    received = seen[0][0, :, last, 1 : 1 + len(video)].mean(0)
    keep = torch.ones(rows.shape[1], dtype=torch.bool)
    keep[1 : 1 + len(video)] = False
    keep[1 + received.topk(kept).indices] = True
    hidden, turned = hidden[:, keep], (turned[0][:, keep], turned[1][:, keep])
    mask = torch.full(2 * hidden.shape[1:2], float("-inf")).triu(1)[None, None]
    hidden = text.layers[1](hidden, attention_mask=mask, position_ids=positions[:, keep], position_embeddings=turned)
    return text.norm(hidden)[0, -len(ids) :]


@torch.no_grad()
def test_what_is_masked_might_as_well_be_taken_away(model: TinyVlm, video: Tensor) -> None:
    asked = questions()
    batch = batches.collate([batches.Sample(0, [], [question]) for question in asked], video=len(video))
    ours = inside.question_states(model, batch, video, 1, 9, None)
    for row, question in zip(ours, asked, strict=True):
        expected = taken_away(model, video, question, 9)
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-4)
        whole = taken_away(model, video, question, len(video))
        assert (whole - expected).abs().max() > 0.01  # the drop is seen


@pytest.mark.parametrize("spread", [False, True])
def test_of_all_tokens_it_is_what_training_sees(model: TinyVlm, video: Tensor, spread: bool) -> None:
    """One question a row, with positions of their own where the video was longer."""
    place, whole = (3 * torch.arange(len(video)), 3 * len(video)) if spread else (None, len(video))
    batch = batches.collate([batches.Sample(0, [], [question]) for question in questions()], video=whole)
    ours = inside.question_states(model, batch, video, 1, len(video), place)
    theirs = batches.question_states(model, batch, video.expand(2, -1, -1), place)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if spread:
        consecutive = batches.question_states(model, batch, video.expand(2, -1, -1), torch.arange(len(video)))
        assert (ours - consecutive).abs().max() > 0.01  # positions count


def test_budgets_are_equal_on_the_mean() -> None:
    """Of 64 frames of 49 tokens each layer's tokens, added up, are R of all; with FastV those behind its K layers."""
    shape = torch.zeros(64, 49, 1)
    for cell in inner.cells():
        if isinstance(cell, inner.Inside) and inner.SAME_KV not in cell.name:
            assert cell.config is not None
            budget, layer = cell.budget(answers.Encoded(shape, shape[..., 0])), cell.config.inner_layer or inner.DEPTH
            mean = (layer * budget.tokens + (inner.DEPTH - layer) * budget.inner_tokens) / inner.DEPTH
            found = budget.inner_tokens if "fastv" in cell.name else mean
            assert found / budget.total == pytest.approx(cell.ratio, abs=2e-3)


def test_the_committed_page_is_what_the_committed_answers_say() -> None:
    found = json.loads((RESULTS / "inner.json").read_text())
    assert set(found["answers"]) == {cell.key for cell in inner.cells()}
    assert (RESULTS / "inner.md").read_text() == inner.markdown(found)
    assert np.isclose(found["entering"]["fastv 2@0.1"], 1)
