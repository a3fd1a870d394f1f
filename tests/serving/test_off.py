# SPDX-License-Identifier: MIT
"""Installed but not asked for, the plugin changes no output bit and says nothing. With a vLLM that it does not support
it adds its options, which refuse, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.longer("two engines in processes of their own")]

ROOT = Path(__file__).parents[2]

# what was imported until a fork is every fork's
FORKS = """
import json, os, sys
from pathlib import Path
from tests.support.engine import (
    IMAGE, VIDEO, Clip, engine, greedy, picture, prepare_process, prompt_of, tokens_and_logprobs,
)

prompts = [
    prompt_of(f"{VIDEO}Describe the video.", [Clip(16, 112, 112)]),
    prompt_of(f"{IMAGE}then{VIDEO}and{VIDEO}seconds", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)], [picture()]),
    prompt_of("The quick brown fox"),
]
prepare_process()
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.utils.argparse_utils import FlexibleArgumentParser
assert "flashvid_vllm" not in sys.modules
for plugins in ("", None):
    print("NEXT", flush=True)
    if os.fork() == 0:  # plugins are loaded when an engine starts
        os.environ.pop("VLLM_PLUGINS", None) if plugins is None else os.environ.update(VLLM_PLUGINS=plugins)
        with engine(Path(sys.argv[1]), dtype="float32", logprobs_mode="raw_logprobs") as llm:
            answers = [tokens_and_logprobs(output) for output in greedy(llm, prompts, 8)]
            module = llm.apply_model(lambda model: type(model).__module__)[0]
        print("RESULT", json.dumps({"answers": answers, "loaded": "flashvid_vllm" in sys.modules, "module": module}))
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
print("NEXT", flush=True)
if os.fork() == 0:
    import flashvid_vllm, flashvid_vllm.serving.compat as compat
    compat.vllm_version = lambda: "0.31.0"
    start = EngineArgs.create_engine_config
    flashvid_vllm.register()
    assert EngineArgs.create_engine_config is start
    model = ModelRegistry.models["Qwen2_5_VLForConditionalGeneration"]
    assert model.module_name.startswith("vllm."), model
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args([]).plugin is None
    parser.parse_args(["--plugin", "flashvid"])  # ends the process
    os._exit(0)
print("STATUS", os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def printed(sharp_model: Path) -> list[str]:
    """What each fork printed."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(sharp_model)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.split("NEXT\n")[1:]


def result(text: str) -> tuple[dict[str, Any], str]:
    """An engine's result, and all else that it printed, but for where this clone lies."""
    line = next(line for line in text.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT ")), text.replace(line, "").replace(str(ROOT), "")


def test_the_same_bits_as_without_the_plugin(printed: list[str]) -> None:
    (without, _), (installed, said) = map(result, printed[:2])
    assert not without["loaded"]
    assert without["module"] == "vllm.model_executor.models.qwen2_5_vl"
    assert installed["loaded"]
    assert installed["module"] == "flashvid_vllm.models.families.qwen2_5_vl"
    assert installed["answers"] == without["answers"]  # token ids and logprobs, exactly
    assert "flashvid" not in said.lower()


def test_outside_the_range_only_the_options_are_added_and_refuse(printed: list[str]) -> None:
    assert "STATUS 2\n" in printed[2]
    assert "supports vllm>=0.32,<0.34 and found 0.31.0" in printed[2]
