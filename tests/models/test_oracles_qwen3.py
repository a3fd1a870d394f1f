# SPDX-License-Identifier: MIT
"""The oracles of Qwen3-VL and Qwen3.5 against plain vLLM, and whether they would notice a fault.

No plugin here: what the oracle does without compression is what vLLM does.
"""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ..support.engine import (
    IMAGE,
    VIDEO,
    Clip,
    engine,
    greedy,
    picture,
    prompt_of,
    record_positions,
    tokens_and_logprobs,
)
from ..support.sharp import make_sharp_model

pytestmark = [pytest.mark.slow, pytest.mark.longer("the oracles themselves; test_families holds them against ours")]

# measured: up to 9e-6; the weakest fault in test_the_oracle_is_sharp moves a logprob by 3e-4
TOLERANCE = 2e-5
# measured: up to 1.6e-2
BF16_TOLERANCE = 3e-2

HEAD, TAIL = "<|im_start|>user\n", "What happens in this clip?<|im_end|>\n<|im_start|>assistant\n"
LONG, ODD = Clip(32, 112, 168), Clip(11, 140, 84, 0.3, seed=2)  # 16 frames of 4 x 5 tokens, 6 of 4 x 3
CASES: dict[str, tuple[str, list[Clip], list[np.ndarray]]] = {
    "text and a video": (f"{HEAD}The quick brown fox.{VIDEO}0 1 2 3{TAIL}", [LONG], []),
    "two videos": (f"{HEAD}{VIDEO}seconds{VIDEO}{TAIL}", [ODD, LONG], []),
    "image, video": (f"{HEAD}{IMAGE}{VIDEO}{TAIL}", [ODD], [picture()]),
}
FULL = os.environ.get("FLASHVID_TESTS") == "full"
KINDS = ["qwen3_vl", "qwen3_5"]  # their experts are in test_families.py, against the same oracles


@dataclass(frozen=True)
class Sharp:
    """A sharp tiny model in float32 and its oracle."""

    kind: str
    directory: Path
    oracle: Any


def load_oracle(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return importlib.import_module(f"tests.support.oracles.{kind}").Oracle(directory, dtype)


@pytest.fixture(scope="module", params=KINDS)
def sharp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sharp:
    directory = make_sharp_model(request.param, tmp_path_factory.mktemp(request.param))
    return Sharp(request.param, directory, load_oracle(request.param, directory))


@pytest.fixture(scope="module")
def plain(sharp: Sharp) -> Iterator[Any]:
    """vLLM without the plugin."""
    from ..support.oracles.qwen3_5_float32 import float32_linear_attention

    with float32_linear_attention(), engine(sharp.directory) as llm:
        yield llm


@pytest.mark.parametrize("name", CASES)
def test_plain_vllm_and_the_oracle_agree(sharp: Sharp, plain: Any, name: str) -> None:
    text, clips, images = CASES[name]
    output = greedy(plain, [prompt_of(text, clips, images)])[0]
    embeddings, positions = sharp.oracle.assemble(text, clips, images, None)
    assert output.prompt_token_ids == sharp.oracle.ids
    ids, steps = tokens_and_logprobs(output)
    expected_ids, expected = sharp.oracle.greedy(embeddings, positions, 6)
    assert ids == expected_ids
    assert distance(steps, expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_positions_by_hand_are_those_of_vllm(sharp: Sharp, plain: Any, name: str) -> None:
    text, clips, images = CASES[name]
    received = torch.cat(record_positions(plain, [prompt_of(text, clips, images)]), dim=1)
    _, positions = sharp.oracle.assemble(text, clips, images, None)
    continued = torch.arange(sharp.oracle.next_position, sharp.oracle.next_position + 5).expand(3, 5)
    assert torch.equal(received, torch.cat([positions, continued], dim=1))


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_is_also_that_of_transformers(sharp: Sharp, name: str) -> None:
    from PIL import Image
    from transformers.video_utils import VideoMetadata

    text, clips, images = CASES[name]
    _, positions = sharp.oracle.assemble(text, clips, images, None)
    metadata = [{k: v for k, v in clip.metadata().items() if k != "do_sample_frames"} for clip in clips]
    inputs = sharp.oracle.processor(
        text=[text],
        images=[Image.fromarray(image) for image in images] or None,
        videos=[clip.frames() for clip in clips],
        video_metadata=[VideoMetadata(**fields) for fields in metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == sharp.oracle.ids
    fields = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    index, _ = sharp.oracle.model.model.get_rope_index(inputs["input_ids"], **{k: inputs.get(k) for k in fields})
    assert torch.equal(index[:, 0], positions)


@pytest.mark.parametrize(
    ("settings", "kept", "merges", "frames"),
    [
        ({"retention_ratio": 1}, 72, False, 6),
        ({"retention_ratio": 0.3}, 21, True, 6),
        ({"token_budget": 4}, 4, True, 4),
    ],
    ids=["all", "some", "less than frames"],
)
def test_compression_only_removes_tokens(
    sharp: Sharp, settings: dict[str, Any], kept: int, merges: bool, frames: int
) -> None:
    """What stays has the place and the position it had, separators of empty frames too; so has DeepStack."""
    text, clips, images = CASES["image, video"]
    full, full_positions = sharp.oracle.assemble(text, clips, images, None)
    full_ids, full_next = torch.tensor(sharp.oracle.ids), sharp.oracle.next_position
    embeddings, positions = sharp.oracle.assemble(text, clips, images, settings)
    features, attention, grid = sharp.oracle.video(clips[0])
    _, where = sharp.oracle.compress(features, attention, settings)
    assert len(where) == kept
    assert len({index // (grid[1] * grid[2]) for index in where}) == frames
    stays = full_ids != sharp.oracle.config.video_token_id
    stays[(~stays).nonzero().flatten()[where]] = True
    assert sharp.oracle.ids == full_ids[stays].tolist()
    assert torch.equal(positions, full_positions[:, stays])
    assert sharp.oracle.next_position == full_next
    width = sharp.oracle.width
    assert torch.equal(embeddings[:, width:], full[stays, width:])
    is_text = full_ids[stays] != sharp.oracle.config.video_token_id
    assert torch.equal(embeddings[is_text], full[stays][is_text])
    assert bool((embeddings != full[stays]).any()) == merges


def test_the_oracle_is_sharp(sharp: Sharp) -> None:
    """Faults of one position, one token or one row of DeepStack move a logprob by over 10 times the tolerance."""
    oracle = sharp.oracle
    settings = {"retention_ratio": 0.1}
    embeddings, positions = oracle.assemble(f"{HEAD}{VIDEO}{TAIL}", [LONG], [], settings)
    video = torch.tensor(oracle.ids) == oracle.config.video_token_id
    rows = video.nonzero().flatten().tolist()
    features, attention, grid = oracle.video(LONG)
    _, where = oracle.compress(features, attention, settings)
    right = oracle.greedy(embeddings, positions, 1)[1][0]
    top = right.topk(5).indices

    def moved(embeddings: torch.Tensor, positions: torch.Tensor) -> float:
        return float((oracle.greedy(embeddings, positions, 1)[1][0] - right)[top].abs().max())

    faults = {}
    shifted = positions.clone()
    shifted[:, rows[-1] + 1 :] += 1
    faults["text after the video by 1"] = moved(embeddings, shifted)
    size, width = grid[1] * grid[2], oracle.width
    for frame in {index // size for index in where}:
        for axis in range(3):
            shifted = positions.clone()
            shifted[axis, [row for row, index in zip(rows, where, strict=True) if index // size == frame]] += 1
            faults[f"frame {frame} by 1 in {'tyx'[axis]}"] = moved(embeddings, shifted)
    for row, index in zip(rows, where, strict=True):
        neighbour = index + 1 if (index + 1) % grid[2] else index - 1
        swapped = embeddings.clone()
        swapped[row, :width] = features.flatten(0, 1)[neighbour, :width]
        faults[f"token {index} for its neighbour"] = moved(swapped, positions)
        if embeddings.shape[1] > width:
            for name, deeper in {"of its neighbour": features.flatten(0, 1)[neighbour, width:], "left out": 0}.items():
                swapped = embeddings.clone()
                swapped[row, width:] = deeper
                faults[f"DeepStack of token {index} {name}"] = moved(swapped, positions)
    if embeddings.shape[1] > width:
        swapped = embeddings.clone()
        swapped[:, width:] = 0
        faults["DeepStack left out"] = moved(swapped, positions)
    weakest = min(faults, key=lambda name: faults[name])
    assert faults[weakest] > 10 * TOLERANCE, f"{weakest}: {faults[weakest]}"


@pytest.mark.longer("bf16, which some CPUs have no products for")
def test_qwen3_5_as_vllm_serves_it_in_bf16(tmp_path: Path) -> None:
    """With vLLM's own kernel for linear attention, which takes nothing but bf16.

    Rounding decides between near equals, so the oracle follows vLLM's choices. At this tolerance it
    notices a prompt that is numbered as if it had no media (0.3) or a video in the wrong order (0.1), and
    not one token or frame out of place (0.01): those are for float32 above.
    """
    directory = make_sharp_model("qwen3_5", tmp_path, torch.bfloat16)
    oracle = load_oracle("qwen3_5", directory, torch.bfloat16)
    with engine(directory, dtype="bfloat16") as llm:
        for text, clips, images in list(CASES.values())[:: 1 if FULL else 2]:
            output = greedy(llm, [prompt_of(text, clips, images)])[0]
            embeddings, positions = oracle.assemble(text, clips, images, None)
            assert output.prompt_token_ids == oracle.ids
            ids, steps = tokens_and_logprobs(output)
            _, expected = oracle.greedy(embeddings, positions, 6, follow=ids)
            assert distance(steps, expected) < BF16_TOLERANCE
            for chosen, row in zip(ids, expected, strict=True):
                assert float(row.max() - row[chosen]) < 2 * BF16_TOLERANCE
            wrong = torch.arange(len(embeddings)).expand(3, -1)
            _, unlike = oracle.greedy(embeddings, wrong, 1)
            assert distance(steps[:1], unlike) > 2 * BF16_TOLERANCE


def distance(steps: list[dict[int, float]], expected: list[torch.Tensor]) -> float:
    """The largest difference of a logprob that vLLM reports."""
    return max(
        abs(value - float(row[token]))
        for step, row in zip(steps, expected, strict=True)
        for token, value in step.items()
    )
