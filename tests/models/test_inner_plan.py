# SPDX-License-Identifier: MIT
"""Dropping inside the LLM, piece by piece: plans, ranks, lengths and slots. Only this has ties, drafts beside a drop,
and a prompt that is recomputed with its answer, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashvid_vllm.models.inner import metadata, rank
from flashvid_vllm.models.inner.plan import Plan, Row, Tracker, Video
from flashvid_vllm.models.inner.rows import keep_marks, mark_rows, marks_of, take_marks, visual_tokens

VIDEOS = [Video(offset=2, length=6, tokens=5, kept=2), Video(offset=10, length=4, tokens=4, kept=1)]


def plan_of(tracker: Tracker, *step: tuple[str, int, int], length: int = 16, videos: Any = VIDEOS) -> Plan:
    return tracker.plan(step, lambda name: (length, [] if name == "text" else videos))


def seen(plan: Plan) -> list[tuple[int, int, bool, bool]]:
    return [(row.queries, row.dropped, row.waits, row.ranks) for row in plan.rows]


def test_chunks_wait_for_the_last_one() -> None:
    tracker = Tracker()
    assert seen(plan_of(tracker, ("text", 0, 4), ("a", 0, 7))) == [(4, 0, False, False), (0, 0, True, False)]
    assert seen(plan_of(tracker, ("a", 7, 8), ("text", 4, 1))) == [(0, 0, True, False), (1, 0, False, False)]
    plan = plan_of(tracker, ("text", 5, 1), ("a", 15, 1))
    assert seen(plan) == [(1, 0, False, False), (10, 6, False, True)]
    assert plan.rows[1].start == 1
    assert plan.splits
    plan = plan_of(tracker, ("text", 6, 1), ("a", 16, 4))  # three drafts
    assert seen(plan) == [(1, 0, False, False), (4, 6, False, False)]
    assert plan.drops
    assert not plan.splits
    assert not plan_of(tracker, ("text", 7, 1)).drops


def test_a_preempted_prompt_starts_again_with_its_answer() -> None:
    tracker = Tracker()
    plan_of(tracker, ("a", 0, 16))
    assert seen(plan_of(tracker, ("a", 0, 9))) == [(0, 0, True, False)]
    assert seen(plan_of(tracker, ("a", 9, 11))) == [(14, 6, False, True)]  # 4 of them are answered
    assert seen(plan_of(tracker, ("a", 20, 1))) == [(1, 6, False, False)]
    plan_of(tracker, ("a", 0, 5))
    tracker.forget_all_but({"b"})
    assert seen(plan_of(tracker, ("a", 5, 1))) == [(1, 0, False, False)]
    plan_of(tracker, ("c", 0, 5))
    with pytest.raises(RuntimeError, match="has 4 computed tokens, and 5 wait"):
        plan_of(tracker, ("c", 4, 5))


def test_nothing_to_drop() -> None:
    whole = [Video(0, 4, 4, 4)]
    assert seen(plan_of(Tracker(), ("a", 0, 3), videos=whole)) == [(3, 0, False, False)]


def test_the_best_of_each_video_ties_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    visual = torch.zeros(18, dtype=torch.bool)
    visual[[2, 3, 5, 6, 7, 10, 11, 12, 13]] = True  # 4 stands between two frames
    attention = torch.full((16,), 0.5)
    attention[[4, 6]] = 0.9
    attention[12] = 0.6
    assert rank.kept_order(attention, visual, VIDEOS).tolist() == [0, 1, 2, 4, 6, 8, 9, 12, 14, 15, 16, 17]
    ends = [Video(offset=12, length=4, tokens=4, kept=1)]
    visual = torch.arange(16) >= 12
    assert rank.kept_order(attention, visual, ends).tolist() == [*range(12), 15]  # the prompt's last token


def test_attention_is_that_of_all_ranks_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(8, 4), torch.randn(5, 4, 4)
    expected = torch.zeros(5)
    for head in range(8):
        expected += torch.stack([query[head] @ keys[i, head // 2] * 0.5 for i in range(5)]).softmax(0) / 8
    monkeypatch.setattr(rank, "get_tensor_model_parallel_world_size", lambda: 1)
    torch.testing.assert_close(rank.attention_of_last(query, keys, 0.5), expected)
    ranks = [(query[:4], keys[:, :2]), (query[4:], keys[:, 2:])]
    shares = [4 * rank.attention_of_last(*part, 0.5) for part in ranks]
    monkeypatch.setattr(rank, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(rank, "tensor_model_parallel_all_gather", lambda mine, dim: torch.stack(shares))
    for part in ranks:
        torch.testing.assert_close(rank.attention_of_last(*part, 0.5), expected)


def test_later_layers_have_shorter_sequences_in_the_first_slots() -> None:
    """A request that waits is left out, one that ranks brings all of its prompt, decoding goes on behind it."""
    rows = [Row(0, 4, 8, None, 0, 0), Row(4, 2, 5, None, 2, 0), Row(6, 3, 6, None, 5, 4), Row(9, 2, 11, None, 2, 6)]
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, 4, 6, 9, 11], dtype=torch.int32)
    lengths = torch.tensor([12, 7, 9, 13], dtype=torch.int32)
    table = torch.arange(4 * 4, dtype=torch.int32).view(4, 4).flip(1) + 1
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, seq_lens_cpu_upper_bound=lengths,
        num_reqs=4, num_actual_tokens=11, max_query_len=4, max_seq_len=13, block_table_tensor=table,
        slot_mapping=torch.zeros(11, dtype=torch.int64),
    )  # fmt: skip
    out = metadata.packed(common, Plan(rows), block_size=4)
    assert out.query_start_loc.tolist() == out.query_start_loc_cpu.tolist() == [0, 2, 7, 9]
    assert out.seq_lens.tolist() == out.seq_lens_cpu_upper_bound.tolist() == [7, 5, 7]
    assert (out.num_reqs, out.num_actual_tokens, out.max_query_len, out.max_seq_len) == (3, 9, 5, 7)
    assert torch.equal(out.block_table_tensor, table[1:])
    places = [(1, 5), (1, 6), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 5), (3, 6)]
    assert out.slot_mapping.tolist() == [int(table[row, place // 4]) * 4 + place % 4 for row, place in places]


def test_marks_go_along_with_rows() -> None:
    video = mark_rows(torch.randn(4, 8), torch.tensor([0, 3]))
    plain = mark_rows(torch.randn(2, 8), None)
    image = torch.randn(1, 8)
    taken = take_marks([video[1:], image, plain], 8)
    assert [e.shape[1] for e in taken] == [8, 8, 8]
    assert marks_of(image) is None
    is_media = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert visual_tokens(taken, is_media, torch.device("cpu")).tolist() == [0, 0, 0, 1, 0, 0, 1, 1]
    assert marks_of(keep_marks(image[:, :4], None)) is None


def test_a_backend_of_their_own_for_each_worker() -> None:
    """vLLM groups layers by the name of their backend."""

    class Backend:
        @staticmethod
        def get_builder_cls() -> Any:
            return SimpleNamespace

    one, other = (metadata.backend_of_later_layers(Backend, SimpleNamespace()) for _ in range(2))
    assert one is not other  # of the next model in this process
    assert (one.__module__, one.__qualname__) != (Backend.__module__, Backend.__qualname__)
