# SPDX-License-Identifier: MIT
"""Embeddings of prompts with videos (`--runner pooling`), in steps smaller than a video."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ..support.engine import VIDEO, Clip, prompt_of

pytestmark = pytest.mark.slow

TEXT = f"<|im_start|>user\n{VIDEO}Describe the video.<|im_end|>\n"
# 384 and 60 tokens before compression, and 96 tokens a step
CLIPS = [Clip(32, 112, 168), Clip(12, 140, 84, 0.25, seed=2)]
STEP = 96


@pytest.mark.longer("an engine")
def test_embeddings_in_steps_smaller_than_a_video(engines: Any, sharp_model: Path) -> None:
    """The last token's hidden state, as transformers has it from the compressed prompt; several ratios in a batch."""
    from ..support.oracles.qwen2_5_vl import Oracle

    oracle = Oracle(sharp_model)
    llm = engines(sharp_model, {"retention_ratio": 0.3}, runner="pooling", max_num_batched_tokens=STEP, max_num_seqs=8)
    cases = [(clip, settings) for clip in CLIPS for settings in (None, {"retention_ratio": 0.6}, {"enabled": False})]
    outputs = llm.embed([prompt_of(TEXT, [clip], flashvid=settings) for clip, settings in cases], use_tqdm=False)
    lengths = []
    for (clip, settings), output in zip(cases, outputs, strict=True):
        full = settings == {"enabled": False}
        embeddings, positions = oracle.assemble(
            TEXT, [clip], [], None if full else settings or {"retention_ratio": 0.3}
        )
        lengths.append(len(embeddings))
        assert len(output.prompt_token_ids) == len(embeddings)
        with torch.inference_mode():
            hidden = oracle.model.model.language_model(inputs_embeds=embeddings[None], position_ids=positions[:, None])
        expected = torch.nn.functional.normalize(hidden.last_hidden_state[0, -1], dim=0)
        assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=1e-5)
    assert max(lengths) > 4 * STEP
