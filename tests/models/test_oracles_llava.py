# SPDX-License-Identifier: MIT
"""The oracles of the LLaVA families before anything relies on them: against plain vLLM, each other and by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..support.engine import Clip, engine, greedy, picture, prompt_of, tokens_and_logprobs
from ..support.oracles.llava import IMAGE, VIDEO, SeenAttention, kept_tokens
from ..support.sharp import make_sharp_model

pytestmark = [pytest.mark.slow, pytest.mark.longer("the oracles themselves; test_families holds them against ours")]

# vLLM and transformers agree to 1e-6 in fp32; any of the faults below moves a logprob by over 5e-4
TOLERANCE = 2e-5

HEAD, TAIL = "<|im_start|>user\n", "What happens in this clip?<|im_end|>\n<|im_start|>assistant\n"
LONG, OTHER = Clip(12, 112, 168), Clip(5, 84, 140, seed=1)
CASES: dict[str, tuple[str, list[Clip], list[np.ndarray]]] = {
    "video": (f"{HEAD}{VIDEO}\n{TAIL}", [LONG], []),
    "two videos": (f"{HEAD}The quick brown fox.{VIDEO}0 1 2 3{VIDEO}{TAIL}", [OTHER, LONG], []),
    # tiles in two columns, of which the image does not fill the height
    "image, video": (f"{HEAD}{IMAGE}\n{VIDEO}\n{TAIL}", [OTHER], [picture(90, 290)]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> directory of its tiny fp32 model, whose answers depend on what it sees and where."""
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_sharp_model(kind, tmp_path_factory.mktemp("llava") / kind)
        return made[kind]

    return model


def load(directory: Path) -> Any:
    """The oracle of a model's family."""
    from ..support.oracles import llava_onevision, llava_video

    return (llava_video if "video" in directory.name else llava_onevision).Oracle(directory)


@pytest.fixture(scope="module", params=["llava_onevision", "llava_onevision_clip"])
def served(request: pytest.FixtureRequest, models: Any) -> Iterator[tuple[Any, Any]]:
    """An engine of vLLM without the plugin's settings, and the oracle of the same weights."""
    directory = models(request.param)
    with engine(directory) as llm:
        yield llm, load(directory)


@pytest.mark.parametrize("name", CASES)
def test_plain_vllm_gives_the_same_answer(served: tuple[Any, Any], name: str) -> None:
    llm, oracle = served
    text, clips, images = CASES[name]
    output = greedy(llm, [prompt_of(text, clips, images)])[0]
    embeddings, positions = oracle.assemble(text, clips, images, None)
    assert len(output.prompt_token_ids) == len(embeddings)
    expected_ids, expected = oracle.greedy(embeddings, positions, 6)
    ids, steps = tokens_and_logprobs(output)
    assert ids == expected_ids
    for step, row in zip(steps, expected, strict=True):
        assert max(abs(value - float(row[token])) for token, value in step.items()) < TOLERANCE


@torch.inference_mode()
def test_llava_video_with_one_newline_is_llava_onevision(models: Any) -> None:
    """The same random numbers made both models, so transformers' LLaVA-OneVision checks the plain torch forward."""
    video, onevision = load(models("llava_video")), load(models("llava_onevision"))
    for one, other in zip(video.language_model.parameters(), onevision.language_model.parameters(), strict=True):
        assert torch.equal(one, other)
    video.config["mm_newline_position"] = "one_token"
    for text, clips, images in CASES.values():
        for settings in (None, {"retention_ratio": 0.2}):
            embeddings, positions = video.assemble(text, clips, images, settings)
            expected, expected_positions = onevision.assemble(text, clips, images, settings)
            torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-6)
            assert torch.equal(positions, expected_positions)
            answer, expected_answer = (o.greedy(embeddings, positions, 1)[1][0] for o in (video, onevision))
            torch.testing.assert_close(answer, expected_answer, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llava_onevision", "llava_onevision_clip"])
def test_received_attention_is_the_towers_own(models: Any, kind: str) -> None:
    tower = load(models(kind)).model.model.vision_tower
    size = tower.config.image_size
    with SeenAttention(tower.encoder.layers[-2].self_attn) as seen:
        out = tower(torch.randn(3, 3, size, size, generator=torch.manual_seed(0)), output_attentions=True)
    received = seen.received()
    torch.testing.assert_close(received, out.attentions[-2].mean((1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(received.sum(1), torch.ones(3), rtol=0, atol=1e-5)


def test_pooling_of_an_odd_grid(models: Any) -> None:
    """7 x 7 patches: "average" is the mean of 2 x 2 without the last row and column, "bilinear" rounds up."""
    oracle = load(models("llava_video_frame"))
    patches = torch.randn(2, 49, 3, generator=torch.manual_seed(0))
    grid = patches.view(2, 7, 7, 3)
    expected = torch.stack(
        [grid[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2)) for y in range(3) for x in range(3)]
    )
    torch.testing.assert_close(oracle.pool(patches).flatten(1, 2), expected.transpose(0, 1))
    oracle.config["mm_spatial_pool_mode"] = "bilinear"
    # 4 samples a side, 1.75 patches apart from 0.375 on; a corner lies between the first two of a side
    corner = torch.einsum("y,x,fyxc->fc", *[torch.tensor([0.625, 0.375])] * 2, grid[:, :2, :2])
    torch.testing.assert_close(oracle.pool(patches)[:, 0, 0], corner)
    assert oracle.pool(patches).shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("position", "whole", "compressed"),
    [
        ("grid", "0 1 n 2 3 n 4 5 n 6 7 n 8 9 n 10 11 n", "1 3 n n 8 n"),
        ("frame", "0 1 2 3 n 4 5 6 7 n 8 9 10 11 n", "1 3 n n 8 n"),
        ("one_token", "0 1 2 3 4 5 6 7 8 9 10 11 n", "1 3 8 n"),
        ("no_token", "0 1 2 3 4 5 6 7 8 9 10 11", "1 3 8"),
    ],
)
def test_where_the_newlines_of_llava_video_are(models: Any, position: str, whole: str, compressed: str) -> None:
    """3 frames of 2 x 2 tokens; of the second none is kept."""
    oracle = load(models("llava_video"))
    oracle.config["mm_newline_position"] = position
    oracle.newline = torch.tensor([-1.0])
    for where, expected in ((list(range(12)), whole), ([1, 3, 8], compressed)):
        rows = oracle.lay_out(torch.tensor(where, dtype=torch.float32)[:, None], where, (3, 2, 2))
        assert [int(row) for row in rows] == [-1 if word == "n" else int(word) for word in expected.split()]


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_onevision_clip", "llava_video", "llava_video_frame"])
def test_the_attention_decides(models: Any, kind: str) -> None:
    """Of a fifth of the tokens, other ones are kept without it or with the frames' weights upside down."""
    oracle = load(models(kind))
    features, attention, _ = oracle.video(LONG)
    wrong = {"none": torch.ones_like(attention), "upside down": attention.flip(1)}
    settings = {"retention_ratio": 0.2}
    right = set(kept_tokens(features, attention, settings, False)[1])
    for name, weights in wrong.items():
        assert set(kept_tokens(features, weights, settings, False)[1]) != right, name


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_onevision_clip", "llava_video", "llava_video_frame"])
def test_the_oracles_are_sharp(models: Any, kind: str) -> None:
    """Faults of one position, one token or one newline move a logprob by more than 10 times the tolerance."""
    oracle = load(models(kind))
    text, clips, images = CASES["video"]
    settings = {"retention_ratio": 0.1}
    embeddings, positions = oracle.assemble(text, clips, images, settings)
    right = oracle.greedy(embeddings, positions, 1)[1][0]
    top = right.topk(5).indices

    def moved(embeddings: Tensor, positions: Tensor) -> float:
        return float((oracle.greedy(embeddings, positions, 1)[1][0] - right)[top].abs().max())

    features, attention, grid = oracle.video(clips[0])
    tokens, where = kept_tokens(features, attention, settings, False)
    before = len(oracle.tokenizer(HEAD, add_special_tokens=False).input_ids)
    end = before + len(oracle.lay_out(tokens, where, grid))
    newlines = [row for row in range(before, end) if torch.equal(embeddings[row], oracle.newline)]
    kept = [row for row in range(before, end) if row not in newlines]
    assert len(newlines) == (1 if "onevision" in kind else grid[0])
    assert len(kept) == len(where)

    shifted = positions.clone()
    shifted[end:] += 1
    faults = {"text after the video by 1": moved(embeddings, shifted)}
    uncompressed = positions.clone()
    uncompressed[kept] = before + torch.tensor(where)
    uncompressed[end:] += before + grid[0] * grid[1] * grid[2] + 1 - end
    faults["positions of the uncompressed prompt"] = moved(embeddings, uncompressed)
    flat = features.flatten(0, 1)
    for row, source in zip(kept, where, strict=True):
        swapped = embeddings.clone()
        swapped[row] = flat[source + 1 if source + 1 < len(flat) else source - 1]
        faults[f"token {row} for its neighbour"] = moved(swapped, positions)
    for row in range(before, end):
        without = torch.cat([embeddings[:row], embeddings[row + 1 :]])
        what = "newline" if row in newlines else "token"
        faults[f"without {what} {row}"] = moved(without, positions[:-1])
        if row in newlines and row - 1 in kept:
            early = embeddings.clone()
            early[[row - 1, row]] = embeddings[[row, row - 1]]
            faults[f"newline {row} one token early"] = moved(early, positions)
    weakest = min(faults, key=lambda name: faults[name])
    assert faults[weakest] > 10 * TOLERANCE, f"{weakest}: {faults[weakest]}"
