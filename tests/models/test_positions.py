# SPDX-License-Identifier: MIT
"""M-RoPE positions of a compressed prompt, in the call patterns of both of vLLM's model runners."""

from bisect import bisect_left

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvid_vllm.models.positions import (
    CHANNELS,
    LIMIT,
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
    positions = torch.tensor([[0, 255, 256, 257, 65_535, 65_536, LIMIT - 1]] * 3)
    positions[1] += torch.tensor([1, 1, 1, 1, 1, 1, -1])
    tokens = torch.randn(7, WIDTH).to(dtype)
    joined = append_positions(tokens, positions)
    assert joined.dtype == dtype
    assert joined.shape == (7, WIDTH + CHANNELS)
    assert torch.equal(joined[:, :WIDTH], tokens)
    taken, rows = take_positions(joined[:, WIDTH:])
    assert torch.equal(taken, positions)
    assert rows.tolist() == list(range(7))


def test_rows_survive_the_dtype() -> None:
    """Which row of its video an embedding is: past what bf16 counts to."""
    joined = append_positions(torch.zeros(70_000, 0, dtype=torch.bfloat16), torch.zeros(3, 70_000, dtype=torch.int64))
    assert torch.equal(take_positions(joined)[1], torch.arange(70_000))


class Prompt:
    """A prompt put together by brute force: text, videos and images with their full positions.

    A "stamped" video has two text tokens before each frame. Compressed, all of it takes embeddings;
    plain, only its tokens do.
    """

    def __init__(self, items: list[tuple[str, int, int, int, int]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        full: list[list[int]] = []
        self.spans: list[Span] = []
        self.want: list[list[int]] = []
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
                most = 1 if step == 1 else len(tokens)  # often one: where a video ends and the next begins is close
                count = int(torch.randint(1, most + 1, (), generator=generator))
                order = torch.randperm(len(tokens), generator=generator).tolist()
                dropped = {tokens[i] for i in order[count:]}
            keep = [i for i in range(len(grid)) if i not in dropped]
            start = len(self.want)
            if dropped:
                self.spans.append(Span(len(full), len(grid), len(keep)))
                relative = torch.tensor([grid[i] for i in keep]).T
                slots = list(range(start, start + len(keep)))
                self.embeddings.append((slots, append_positions(torch.randn(len(keep), WIDTH), relative)))
            elif tokens:
                self.embeddings.append(([start + i for i in tokens], torch.randn(len(tokens), WIDTH)))
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


class RunnerV1:
    """Model Runner V1: one tensor a request for good, which carries what we hang on it."""

    def __init__(self, prompt: Prompt) -> None:
        self.positions, _ = compress_positions(prompt.full, prompt.spans)
        self.marks = self.positions.clone()

    def resume(self) -> None:
        """Without a new layout."""

    def ask(self, embeddings: list[torch.Tensor], start: int) -> None:
        self.positions.copy_(fill_positions(self.positions, self.marks, embeddings, WIDTH, start))

    def delta(self) -> int:
        return delta_of(self.marks)


class RunnerV2:
    """Model Runner V2: rows of int32, laid out anew whenever a request starts; drafters do not ask."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.resume()

    def resume(self) -> None:
        self.positions = compress_positions(self.prompt.full, self.prompt.spans)[0].int()

    def ask(self, embeddings: list[torch.Tensor], start: int) -> None:
        given = self.positions.long()
        self.positions.copy_(fill_positions(given, given, embeddings, WIDTH, start))

    def delta(self) -> int:
        return delta_of(self.positions)


@settings(max_examples=200, deadline=None)
@given(items=st.lists(item, min_size=1, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_every_token_gets_its_full_prompt_position(
    items: list[tuple[str, int, int, int, int]], seed: int, data: st.DataObject
) -> None:
    """In chunks of any size, begun anywhere (prefix hits), preempted at any point, with and without drafters."""
    prompt = Prompt(items, seed)
    want, final = torch.tensor(prompt.want).T, torch.tensor(prompt.final)
    positions, delta = compress_positions(prompt.full, prompt.spans)
    assert positions.shape == want.shape
    assert delta == prompt.delta
    assert torch.equal(positions[:, final], want[:, final])  # all but compressed videos, at once
    assert bool((positions[:, ~final] < 0).all())

    length = want.shape[1]
    is_v1 = data.draw(st.booleans(), label="Model Runner V1")
    runner = RunnerV1(prompt) if is_v1 else RunnerV2(prompt)
    drafts = is_v1 and data.draw(st.booleans(), label="drafts")
    preemptions, begun, start = data.draw(st.integers(0, 3), label="preemptions"), 0, 0
    while start < length:
        end = min(start + data.draw(st.integers(1, 12), label="chunk"), length)
        assert runner.delta() == delta
        runner.ask(prompt.chunk(start, end), start)
        assert torch.equal(runner.positions[:, begun:end].long(), want[:, begun:end])
        if drafts:  # one token ahead; what is final stays, and so do marks or they get the right value
            runner.ask(prompt.chunk(start + 1, end + 1), start)
            is_right = (runner.positions == want).all(0) | (runner.positions == positions).all(0)
            assert bool(is_right.all())
            assert torch.equal(runner.positions[:, begun:end].long(), want[:, begun:end])
        start = end
        if preemptions and data.draw(st.booleans(), label="preempt"):
            preemptions -= 1
            begun = start = data.draw(st.integers(0, end), label="cached")
            runner.resume()


def test_starting_in_the_middle_of_a_video() -> None:
    """A partial prefix-cache hit: the first chunk that runs starts inside the video."""
    prompt = Prompt([("text", 3, 0, 0, 0), ("video", 4, 3, 3, 2), ("text", 2, 0, 0, 0)], seed=1)
    want = torch.tensor(prompt.want).T
    positions, _ = compress_positions(prompt.full, prompt.spans)
    middle = 3 + len(prompt.embeddings[0][0]) // 2
    filled = fill_positions(positions, positions, prompt.chunk(middle, want.shape[1]), WIDTH, middle)
    assert torch.equal(filled[:, middle:], want[:, middle:])


def test_nothing_to_fill() -> None:
    positions = torch.arange(6).expand(3, 6)
    assert torch.equal(fill_positions(positions, positions, [], WIDTH, 2), positions)
