# SPDX-License-Identifier: MIT
"""Model Runner V2's call pattern (it needs Triton, so on a CPU its own pruner runs on a fake state).

It asks for positions of the whole prompt into int32 rows, hands over ids as a tensor, calls the recompute only in
steps with media, and never on a full prefix hit.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashvid_vllm import engine_args

from ..support.engine import IMAGE, VIDEO, engine, greedy, prompt_of
from ..support.families import LLAVA_VIDEO_ORIGINAL, QWEN2_5_VL, QWEN3_VL, Family
from .test_engine_oracle import CASES

pytestmark = pytest.mark.slow

FAMILIES = [QWEN2_5_VL, QWEN3_VL, LLAVA_VIDEO_ORIGINAL]


class FakeRopeState:
    """What RopeState keeps for one request, without its Triton kernels."""

    def __init__(self, model: Any, ids: list[int], features: list[Any]) -> None:
        positions, self.delta = model.get_mrope_input_positions(ids, features)
        self.positions = torch.stack([torch.tensor(row.tolist(), dtype=torch.int32) for row in positions])

    def read_prefill_positions(self, req_idx: int, length: int) -> torch.Tensor:
        return self.positions[:, :length]

    def update_prefill_positions(self, req_idx: int, positions: torch.Tensor, delta: int) -> None:
        self.positions[:, : positions.shape[1]].copy_(positions)
        self.delta = delta


@pytest.fixture(
    scope="module",
    params=[FAMILIES[0], *(pytest.param(family, marks=pytest.mark.longer("a variant")) for family in FAMILIES[1:])],
    ids=lambda family: family.name,
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Family, Any, Any]]:
    """A family, an engine, and the oracle of the same weights."""
    family = request.param
    directory = family.make(tmp_path_factory.mktemp("model") / family.kind)
    with engine(directory, **engine_args(retention_ratio=0.3, **family.settings)) as llm:
        yield family, llm, family.load_oracle(directory)


def named(text: str, image: str, video: str) -> str:
    """A text of CASES with a family's names for its media."""
    if (image, video) == (IMAGE, VIDEO):
        return text
    return text.replace(IMAGE, image).replace(VIDEO, video).replace("<|video_pad|>", video)


@pytest.mark.parametrize("chunk", [7, 50, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_positions_and_delta(
    served: tuple[Family, Any, Any], name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, llm, oracle = served
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    seen: dict[str, Any] = {}
    original = model.get_mrope_input_positions

    def keep(ids: list[int], features: list[Any]) -> Any:
        seen.update(ids=list(ids), features=list(features))
        return original(ids, features)

    monkeypatch.setattr(model, "get_mrope_input_positions", keep)
    text, clips, images = CASES[name]
    settings = {"retention_ratio": 0.3}
    greedy(llm, [prompt_of(named(text, family.image, family.video), clips, images)], max_tokens=1)
    monkeypatch.undo()
    ids, features = seen["ids"], sorted(seen["features"], key=lambda f: f.mm_position.offset)
    encoded = [encode(model, feature) for feature in features]

    state = FakeRopeState(model, ids, features)
    text = family.for_oracle(named(text, family.image, family.video), len(clips))
    want_embeddings, want = oracle.assemble(text, clips, images, settings)
    expected_delta = oracle.next_position - len(ids)
    assert state.delta == expected_delta
    rows = want_embeddings.clone()
    pruner = MultiModalPruner(model, state, SimpleNamespace(mm_features={"r": features}), rows.shape[1])
    for start in range(0, len(ids), chunk):
        end = min(start + chunk, len(ids))
        window: list[torch.Tensor] = []
        slots: list[int] = []
        for feature, rows_of_feature in zip(features, encoded, strict=True):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            low, high = max(start, offset), min(end, offset + length)
            if low < high:
                window.append(rows_of_feature[low - offset : high - offset])
                slots += range(low, high)
        if window:
            batch = SimpleNamespace(
                req_ids=["r"], idx_mapping_np=torch.tensor([0]).numpy(),
                prefill_len_np=torch.tensor([len(ids)]).numpy(),
                num_computed_prefill_tokens_np=torch.tensor([start]).numpy(),
                num_scheduled_tokens=torch.tensor([end - start]).numpy(),
            )  # fmt: skip
            requests = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.tensor([ids], dtype=torch.int32)))
            cleaned = pruner.recompute(window, batch, requests)
            rows[slots] = torch.cat(cleaned)
            # a drafter has no DeepStack: it gets the first channels
            assert all(
                torch.equal(a, b[:, : rows.shape[1]]) for a, b in zip(pruner.strip(window), cleaned, strict=True)
            )
        assert torch.equal(state.positions[:, :end].long(), want[:, :end])
        assert state.delta == expected_delta
    assert torch.allclose(rows, want_embeddings, atol=1e-5)


def encode(model: Any, feature: Any) -> torch.Tensor:
    """The encoder's output for one item, as the runner batches and calls it."""
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

    _, _, kwargs = next(iter(group_and_batch_mm_kwargs([(feature.modality, feature.data)], device="cpu")))
    with torch.inference_mode():
        return model.embed_multimodal(**kwargs)[0]
