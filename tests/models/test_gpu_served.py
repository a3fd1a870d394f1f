# SPDX-License-Identifier: MIT
"""A served video on a GPU, in engines with processes of their own: Model Runner V2 does not wait, and its CUDA graphs
answer as its eager mode does."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from flashvid_vllm import engine_args

from ..support.engine import VIDEO, Clip, in_new_process, prompt_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

# error: RuntimeError in vLLM's worker where the host waits in a step after start-up
CHECKED = {"VLLM_GPU_SYNC_CHECK": "error", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TEXT = f"Look: {VIDEO} What moves?"


def excuse_nothing(model: Any) -> str:
    """Let a compression be checked, though vLLM excuses what encodes: `_allow_depth` is how it does. Its function."""
    from vllm.utils import gpu_sync_debug

    compress = model.compress_video

    def compress_video(*given: Any) -> Any:
        token = gpu_sync_debug._allow_depth.set(0)
        try:
            return compress(*given)
        finally:
            gpu_sync_debug._allow_depth.reset(token)

    model.compress_video = compress_video
    return str(compress.__qualname__)


def served(directory: str, settings: dict[str, Any] | None, eager: bool) -> dict[str, Any]:
    """Token ids of the answers to two videos, which runner it was, MiB and seconds."""
    from vllm import LLM, SamplingParams

    flashvid = {} if settings is None else engine_args(**settings)
    llm = LLM(
        directory, dtype="bfloat16", max_model_len=4096, enforce_eager=eager, seed=0, max_num_seqs=4,
        gpu_memory_utilization=0.4, limit_mm_per_prompt={"video": 1, "image": 0}, enable_prefix_caching=False,
        **flashvid,
    )  # fmt: skip
    if settings is not None:
        llm.apply_model(excuse_nothing)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    torch.cuda.reset_peak_memory_stats()
    answers, seconds = [], []
    for seed in (0, 1):
        start = time.perf_counter()
        (output,) = llm.generate([prompt_of(TEXT, [Clip(8, 224, 280, seed=seed)])], params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        answers.append([list(output.prompt_token_ids), list(output.outputs[0].token_ids)])
    runner = llm.llm_engine.vllm_config.use_v2_model_runner
    return {"v2": runner, "answers": answers, "seconds": seconds, "mib": torch.cuda.max_memory_allocated() / 2**20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's: head sizes that every attention backend has."""
    from benchmarks.common.tiny_model import make_tiny_model

    return make_tiny_model("qwen2_5_vl_demo", tmp_path_factory.mktemp("model") / "model", dtype=torch.bfloat16)


def test_plain_vllm_does_not_wait(model: Path, tmp_path: Path) -> None:
    """Without us. Where this fails, the next test says nothing about us."""
    assert in_new_process(served, tmp_path, model, None, True, env=CHECKED)["v2"]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "CUDA graphs"])
def test_a_compressed_video_does_not_wait(model: Path, tmp_path: Path, eager: bool, record_property: Any) -> None:
    found = in_new_process(served, tmp_path, model, {"retention_ratio": 0.25}, eager, env=CHECKED)
    assert found["v2"]
    lengths = [len(prompt) for prompt, _ in found["answers"]]
    assert lengths[0] == lengths[1] < 8 // 2 * (224 // 28) * (280 // 28)
    assert all(len(answer) == 8 for _, answer in found["answers"])
    first, second = found["seconds"]
    record_property("figure", f"{first:.2f} s for a first video, {second:.2f} s for a second, {found['mib']:.0f} MiB")
