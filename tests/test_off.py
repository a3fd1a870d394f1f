# SPDX-License-Identifier: MIT
"""Installed but not asked for, the plugin changes no output bit and says nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ANSWER = """
import json, logging, sys
from pathlib import Path
from tests.engine import IMAGE, VIDEO, Clip, engine, greedy, picture, prompt_of, tokens_and_logprobs

prompts = [
    prompt_of(f"{VIDEO}Describe the video.", [Clip(16, 112, 112)]),
    prompt_of(f"{IMAGE}then{VIDEO}and{VIDEO}seconds", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)], [picture()]),
    prompt_of("The quick brown fox"),
]
with engine(Path(sys.argv[1]), dtype="bfloat16", logprobs_mode="raw_logprobs") as llm:
    answers = [tokens_and_logprobs(output) for output in greedy(llm, prompts, 8)]
    module = llm.apply_model(lambda model: type(model).__module__)[0]
print("RESULT", json.dumps({"answers": answers, "loaded": "flashvid_vllm" in sys.modules, "module": module}))
"""


def answer(model: Path, plugins: str | None) -> tuple[dict[str, Any], str]:
    """Run ANSWER in a fresh process; its result and all that it printed."""
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(model)], env=env, capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT ")), printed.replace(line, "")


def test_the_same_bits_as_without_the_plugin(sharp_model: Path) -> None:
    without, _ = answer(sharp_model, plugins="")
    installed, printed = answer(sharp_model, plugins=None)
    assert not without["loaded"]
    assert without["module"] == "vllm.model_executor.models.qwen2_5_vl"
    assert installed["loaded"]
    assert installed["module"] == "flashvid_vllm.models.qwen2_5_vl"
    assert installed["answers"] == without["answers"]  # token ids and logprobs, exactly
    assert "flashvid" not in printed.lower()
