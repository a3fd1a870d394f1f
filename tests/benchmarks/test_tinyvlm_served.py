# SPDX-License-Identifier: MIT
"""The directory of benchmarks.tinyvlm in vLLM with the plugin, against the torch path of its evaluation."""

from pathlib import Path

import pytest
import torch

from flashvid_vllm import FlashVidConfig, engine_args

from ..support.engine import engine, greedy, tokens_and_logprobs

pytest.importorskip("cv2")

from benchmarks.common import clip_model
from benchmarks.tinyvlm import answers, data, tokens
from benchmarks.tinyvlm.features import encode
from benchmarks.tinyvlm.grid import Cell
from benchmarks.tinyvlm.model import build, load_weights, pool
from benchmarks.tinyvlm.scenes import render

from .tinyvlm import model_of, noise, small_tower, torch_logits

pytestmark = pytest.mark.slow

FRAMES = 12
RATIOS = (1.0, 0.25, 0.1)


@pytest.mark.longer("an engine each")
@pytest.mark.parametrize("positions", [None, "consecutive", "original"])
def test_same_answers_in_vllm(positions: str | None, tmp_path: Path) -> None:
    """A wrong position, pooling, newline or attention shows: the model is untrained, but sharp. None: plain vLLM."""
    model, tower, frames = model_of(FRAMES), small_tower(), noise(FRAMES)
    directory = build(model, tmp_path / "model", tower=tower)
    features, attention = encode(tower, frames, True)
    with torch.no_grad():
        video = answers.Encoded(model.video_tokens(features), pool(attention))
    questions = [question for number in range(3) for question in data.questions("test", number)]
    metadata = {
        "fps": 1.0, "duration": float(FRAMES), "total_num_frames": FRAMES, "frames_indices": list(range(FRAMES)),
        "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip
    different = set()
    options = engine_args(retention_ratio=0.5, positions=positions) if positions else {}
    with engine(directory, **options) as llm:
        for ratio in RATIOS if positions else (1.0,):
            setting = Cell("", ratio, FlashVidConfig(retention_ratio=ratio), spread=positions == "original")
            rows, place = setting.tokens(video)
            at = (place, len(video.tokens.flatten(0, 1)))
            prompts = [
                {
                    "prompt": tokens.serving_prompt(question),
                    "multi_modal_data": {"video": [(frames, metadata)]},
                    "mm_processor_kwargs": {"flashvid": {"retention_ratio": ratio}} if positions else {},
                }
                for question in questions
            ]
            for question, output in zip(questions, greedy(llm, prompts, answers.MOST_TOKENS), strict=True):
                ids, steps = tokens_and_logprobs(output)
                expected = torch_logits(model, rows, question, *at)[-1].log_softmax(-1)
                assert max(abs(p - float(expected[i])) for i, p in steps[0].items()) < 1e-3
                end = tokens.encode(tokens.END)[0]
                ids = ids[: ids.index(end)] if end in ids else ids
                said = tokens.tokenizer().decode(ids)
                assert said == answers.greedy(model, rows, question, *at), (ratio, question)
                assert len(output.prompt_token_ids) == len(rows) + 2 + len(tokens.question_ids(question)[0])
                different.add(said)
    assert len(different) > 5


@pytest.mark.longer("half a minute of CLIP")
def test_the_committed_weights_answer_what_they_were_trained_for() -> None:
    """From pixels of test videos through the real tower; by guessing, 18 of 24 questions have a chance of 1e-6."""
    try:
        tower = clip_model.tower(clip_model.load())
        render(data.video("test", 0))
    except RuntimeError as error:
        pytest.skip(f"no package registry: {error}")
    model = load_weights()
    correct: list[bool] = []
    for number in range(100):
        frames = render(data.video("test", number))
        if len(frames) > FRAMES:
            continue
        features, attention = encode(tower, frames, True)
        with torch.no_grad():
            video = answers.Encoded(model.video_tokens(features), pool(attention))
        correct += answers.right(model, answers.kept(video, None), data.questions("test", number))
        if len(correct) >= 24:
            break
    assert sum(correct) >= 0.75 * len(correct)
