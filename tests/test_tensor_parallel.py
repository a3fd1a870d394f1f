# SPDX-License-Identifier: MIT
"""Two tensor-parallel ranks on CPU: the same answers as one, with the encoder shared by heads and by videos."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.longer,
    pytest.mark.skipif(os.environ.get("FLASHVID_TESTS") == "quick", reason="30 s a start; make test-full"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank"),
]

ANSWER = """
import json, os, sys
from pathlib import Path
from flashvid_vllm import engine_args
from tests.engine import IMAGE, VIDEO, Clip, engine, greedy, picture, prompt_of, tokens_and_logprobs

if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    if options:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    prompts = [
        prompt_of(f"{VIDEO}Describe the video.", [Clip(16, 112, 112)]),
        prompt_of(f"{IMAGE}then{VIDEO}and{VIDEO}s", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)], [picture()]),
    ]
    with engine(Path(sys.argv[1]), **engine_args(retention_ratio=0.2), **options) as llm:
        answers = [tokens_and_logprobs(output) for output in greedy(llm, prompts, 6)]
    print("RESULT", json.dumps(answers))
"""


def answer(model: Path, tmp_path: Path, **options: Any) -> list[Any]:
    script = tmp_path / "answer.py"  # a file: the ranks are spawned and import their parent's main module
    script.write_text(ANSWER)
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if options else {}
    done = subprocess.run(
        [sys.executable, str(script), str(model), json.dumps(options)],
        env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.fixture(scope="module")
def one_rank(sharp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return answer(sharp_model, tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("encoder", ["weights", "data"])
def test_two_ranks_answer_as_one(sharp_model: Path, one_rank: list[Any], encoder: str, tmp_path: Path) -> None:
    two = answer(sharp_model, tmp_path, tensor_parallel_size=2, mm_encoder_tp_mode=encoder)
    for (ids, steps), (other_ids, other_steps) in zip(one_rank, two, strict=True):
        assert ids == other_ids
        for step, other in zip(steps, other_steps, strict=True):
            assert max(abs(step[i] - other[i]) for i in step.keys() & other.keys()) < 1e-4
