# SPDX-License-Identifier: MIT
"""Installed but not asked for, the plugin changes no output bit and says nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ANSWER = """
import json, os, sys
from pathlib import Path
from tests.engine import IMAGE, VIDEO, Clip, engine, greedy, picture, prepare_process, prompt_of, tokens_and_logprobs

prompts = [
    prompt_of(f"{VIDEO}Describe the video.", [Clip(16, 112, 112)]),
    prompt_of(f"{IMAGE}then{VIDEO}and{VIDEO}seconds", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)], [picture()]),
    prompt_of("The quick brown fox"),
]
prepare_process()
assert "flashvid_vllm" not in sys.modules
for name, plugins in (("without", ""), ("installed", None)):
    print("NEXT", flush=True)
    if os.fork() == 0:  # plugins are loaded when an engine starts; what was imported until then is both's
        os.environ.pop("VLLM_PLUGINS", None) if plugins is None else os.environ.update(VLLM_PLUGINS=plugins)
        with engine(Path(sys.argv[1]), dtype="float32", logprobs_mode="raw_logprobs") as llm:
            answers = [tokens_and_logprobs(output) for output in greedy(llm, prompts, 8)]
            module = llm.apply_model(lambda model: type(model).__module__)[0]
        print("RESULT", json.dumps({"answers": answers, "loaded": "flashvid_vllm" in sys.modules, "module": module}))
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


def answers(model: Path) -> list[tuple[dict[str, Any], str]]:
    """Run ANSWER; for the engine without and the one with the plugin, its result and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(model)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found = []
    for printed in done.stdout.split("NEXT\n")[1:]:
        line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
        found.append((json.loads(line.removeprefix("RESULT ")), printed.replace(line, "")))
    return found


def test_the_same_bits_as_without_the_plugin(sharp_model: Path) -> None:
    (without, _), (installed, printed) = answers(sharp_model)
    assert not without["loaded"]
    assert without["module"] == "vllm.model_executor.models.qwen2_5_vl"
    assert installed["loaded"]
    assert installed["module"] == "flashvid_vllm.models.families.qwen2_5_vl"
    assert installed["answers"] == without["answers"]  # token ids and logprobs, exactly
    assert "flashvid" not in printed.lower()
