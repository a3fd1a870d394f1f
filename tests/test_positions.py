# SPDX-License-Identifier: MIT
"""M-RoPE positions of a compressed prompt, in the call patterns of both of vLLM's model runners."""

from bisect import bisect_left

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvid_vllm.positions import (
    CHANNELS,
    Span,
    append_positions,
    compress_positions,
    delta_of,
    fill_positions,
    take_positions,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH = 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_survive_the_dtype(dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 255, 256, 257, 65_535, 65_536, 2**24 - 1]] * 3)
    positions[1] += torch.tensor([1, 1, 1, 1, 1, 1, -1])
    tokens = torch.randn(7, WIDTH).to(dtype)
    joined = append_positions(tokens, positions)
    assert joined.dtype == dtype
    assert joined.shape == (7, WIDTH + CHANNELS)
    assert torch.equal(joined[:, :WIDTH], tokens)
    assert torch.equal(take_positions(joined[:, WIDTH:]), positions)


class Prompt:
    """A prompt put together by brute force: text, videos and images with their full positions.

    A "stamped" video has two text tokens before each frame. Compressed, all of it takes embeddings, and
    its ids are those of its tokens first, then those of its text; plain, only its tokens do.
    """

    def __init__(self, items: list[tuple[str, int, int, int, int]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        full: list[list[int]] = []
        self.spans: list[Span] = []
        self.want: list[list[int]] = []
        self.media: list[bool] = []  # has the id of a visual token
        self.final: list[bool] = []  # has its position before anything is encoded
        self.embeddings: list[tuple[list[int], torch.Tensor]] = []
        for kind, a, b, c, step in items:
            base = max((max(p) for p in full), default=-1) + 1
            if kind == "text":
                grid, is_token = [[i] * 3 for i in range(a)], [False] * a
            elif kind == "stamped":
                grid, is_token = [], []
                for _ in range(a):
                    start = max((max(p) for p in grid), default=-1) + 1
                    grid += [[start] * 3, [start + 1] * 3]
                    grid += [[start + 2, start + 2 + y, start + 2 + x] for y in range(b) for x in range(c)]
                    is_token += [False, False] + [True] * (b * c)
            else:
                grid = [[t * step, y, x] for t in range(a) for y in range(b) for x in range(c)]
                is_token = [True] * len(grid)
            tokens = [i for i, of_token in enumerate(is_token) if of_token]
            dropped = set()
            if kind in ("video", "stamped"):
                count = int(torch.randint(1, len(tokens) + 1, (), generator=generator))
                order = torch.randperm(len(tokens), generator=generator).tolist()
                dropped = {tokens[i] for i in order[count:]}
            keep = [i for i in range(len(grid)) if i not in dropped]
            start = len(self.want)
            if dropped:
                self.spans.append(Span(len(full), len(grid), len(keep)))
                relative = torch.tensor([grid[i] for i in keep]).T
                slots = list(range(start, start + len(keep)))
                self.embeddings.append((slots, append_positions(torch.randn(len(keep), WIDTH), relative)))
                num_tokens = sum(is_token[i] for i in keep)
                self.media += [True] * num_tokens + [False] * (len(keep) - num_tokens)
            else:
                if tokens:
                    self.embeddings.append(([start + i for i in tokens], torch.randn(len(tokens), WIDTH)))
                self.media += is_token
            self.final += [not dropped] * len(keep)
            full += [[base + v for v in p] for p in grid]
            self.want += [[base + v for v in grid[i]] for i in keep]
        self.full = torch.tensor(full).T
        self.delta = int(self.full.max()) + 1 - len(self.want)

    def chunk(self, start: int, end: int) -> list[torch.Tensor]:
        """The embeddings of prompt tokens [start, end), as vLLM slices them."""
        out = []
        for slots, rows in self.embeddings:
            low, high = bisect_left(slots, start), bisect_left(slots, end)
            if low < high:
                out.append(rows[low:high])
        return out


item = st.one_of(
    st.tuples(st.just("text"), st.integers(1, 5), st.just(0), st.just(0), st.just(0)),
    st.tuples(
        st.sampled_from(["video", "video", "stamped", "stamped", "image"]),
        st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 200]),
    ).map(lambda i: (i[0], 1, *i[2:]) if i[0] == "image" else i),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(item, min_size=1, max_size=6), chunk=st.integers(1, 12), seed=st.integers(0, 99), shift=st.booleans()
)
def test_chunk_by_chunk_every_token_gets_its_full_prompt_position(
    items: list[tuple[str, int, int, int, int]], chunk: int, seed: int, shift: bool
) -> None:
    prompt = Prompt(items, seed)
    want, media = torch.tensor(prompt.want).T, torch.tensor(prompt.media)
    positions, delta = compress_positions(prompt.full, prompt.spans)
    assert positions.shape == want.shape
    assert delta == prompt.delta
    final = torch.tensor(prompt.final)
    assert torch.equal(positions[:, final], want[:, final])  # all but compressed videos, at once
    for start in range(0, len(media), chunk):
        end = min(start + chunk, len(media))
        assert delta_of(positions) == delta or final[-1]  # known as long as it is asked for
        positions = fill_positions(positions, media, prompt.chunk(start, end), WIDTH, start)
        assert torch.equal(positions[:, :end], want[:, :end])
        if shift:  # a drafter looks one token ahead; nothing that is final may change
            after = fill_positions(positions, media, prompt.chunk(start + 1, end + 1), WIDTH, start)
            assert torch.equal(after[:, :end], want[:, :end])
    assert torch.equal(positions, want)
    again = fill_positions(positions, media, prompt.chunk(0, len(media)), WIDTH, 0)
    assert torch.equal(again, want)  # as after preemption


def test_starting_in_the_middle_of_a_video() -> None:
    """A partial prefix-cache hit: the first chunk that runs starts inside the video."""
    prompt = Prompt([("text", 3, 0, 0, 0), ("video", 4, 3, 3, 2), ("text", 2, 0, 0, 0)], seed=1)
    want, media = torch.tensor(prompt.want).T, torch.tensor(prompt.media)
    positions, _ = compress_positions(prompt.full, prompt.spans)
    middle = 3 + len(prompt.embeddings[0][0]) // 2
    filled = fill_positions(positions, media, prompt.chunk(middle, len(media)), WIDTH, middle)
    assert torch.equal(filled[:, middle:], want[:, middle:])


def test_nothing_to_fill() -> None:
    positions = torch.arange(6).expand(3, 6)
    assert torch.equal(fill_positions(positions, torch.zeros(6, dtype=torch.bool), [], WIDTH, 2), positions)
