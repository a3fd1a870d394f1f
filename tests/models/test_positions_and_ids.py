# SPDX-License-Identifier: MIT
"""Positions of a prompt do not depend on which ids its text has: those of media are the user's to write too."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from flashvid_vllm.models.families.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from flashvid_vllm.models.families.qwen3_5 import Qwen3_5ForConditionalGeneration
from flashvid_vllm.models.families.qwen3_vl import Qwen3VLForConditionalGeneration
from flashvid_vllm.models.positions import append_positions

IMAGE, VIDEO, START, END = range(90, 94)
SPECIAL = (IMAGE, VIDEO, START, END)
WIDTH = 4
MODELS = [Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration, Qwen3_5ForConditionalGeneration]


def bare_model(cls: Any) -> Any:
    """A model with what positions take of one."""
    model = object.__new__(cls)
    model.__dict__.update(
        flashvid_on=True,
        config=SimpleNamespace(
            image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
            vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2),
        ),
        visual=SimpleNamespace(out_hidden_size=WIDTH),
        _tokenizer=SimpleNamespace(encode=lambda text, **options: [7, 8, 9]),
    )  # fmt: skip
    return model


@dataclass
class Item:
    """An image, or a video of which ``keep`` of its tokens are left (all of them: it is not compressed)."""

    modality: str
    grid: tuple[int, int, int]
    keep: int

    @property
    def data(self) -> Any:
        thw = torch.tensor([self.grid[0], 2 * self.grid[1], 2 * self.grid[2]])
        fields = {f"{self.modality}_grid_thw": thw, "second_per_grid_ts": torch.tensor(1.5)}
        fields["timestamps"] = torch.arange(self.grid[0])
        return {name: SimpleNamespace(data=value) for name, value in fields.items()}


@st.composite
def items(draw: st.DrawFn) -> Item:
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        return Item("image", (1, height, width), height * width)
    grid = (draw(st.integers(1, 4)), height, width)
    return Item("video", grid, draw(st.integers(1, grid[0] * height * width)))


def feature(item: Item, offset: int, length: int) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    position = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(data=item.data, modality=item.modality, identifier="", mm_position=position)


text = st.lists(st.sampled_from([1, 2, *SPECIAL]), max_size=5)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
@settings(max_examples=30, deadline=None)
@given(prompt=st.lists(st.tuples(text, items()), min_size=1, max_size=4), last=text, data=st.data())
def test_any_text(cls: Any, prompt: list[tuple[list[int], Item]], last: list[int], data: st.DataObject) -> None:
    model = bare_model(cls)
    ids: list[int] = []
    neutral: list[int] = []
    features, embeddings = [], []
    rows: list[int] = []  # of the full prompt, in the order of the compressed one
    full: list[int] = []
    full_features = []
    for words, item in [*prompt, (last, None)]:
        rows += range(len(full), len(full) + len(words))
        ids, neutral, full = ids + words, neutral + [1] * len(words), full + [1] * len(words)
        if item is None:
            break
        layout = model.full_layout(item.data) if item.modality == "video" else [IMAGE] * item.keep
        tokens = [i for i, token in enumerate(layout) if token in (IMAGE, VIDEO)]
        kept = sorted(data.draw(st.permutations(tokens))[: item.keep])
        left = [i for i in range(len(layout)) if i not in tokens or i in kept]
        compressed = len(left) < len(layout)
        features.append(feature(item, len(ids), len(left)))
        full_features.append(feature(item, len(full), len(layout)))
        if compressed:
            alone, _ = model.plain_positions(layout, [feature(item, 0, len(layout))])
            embeddings.append((len(ids), append_positions(torch.zeros(len(left), WIDTH), alone[:, left])))
        placeholder = sorted((layout[i] for i in left), key=lambda i: i != VIDEO) if compressed else layout
        rows += [len(full) + i for i in left]
        ids, neutral, full = ids + placeholder, neutral + placeholder, full + layout
    positions, _ = model.plain_positions(full, full_features)
    want, largest = positions[:, rows], int(positions.max())

    first, delta = model.get_mrope_input_positions(ids, features)
    again, same_delta = model.get_mrope_input_positions(neutral, features)
    assert torch.equal(first, again)
    assert delta == same_delta == largest + 1 - len(ids)
    start = data.draw(st.integers(0, len(ids)))
    again_to = data.draw(st.integers(0, start))  # of what was final when the request was preempted
    for begin, end in ((0, start), (0, again_to), (again_to, len(ids))):
        chunk = [
            part for offset, rows_of in embeddings
            if len(part := rows_of[max(begin - offset, 0) : max(end - offset, 0)])
        ]  # fmt: skip
        answers = [
            model.recompute_mrope_positions(given, chunk, first, begin)
            for given in (ids, torch.tensor(ids, dtype=torch.int32), None)
        ]
        for stripped, positions, found in answers:
            assert found == delta
            assert torch.equal(positions[:, :end], want[:, :end])
            assert all(rows_of.shape[1] == WIDTH for rows_of in stripped)
        first.copy_(answers[0][1])
    assert torch.equal(first, want)
