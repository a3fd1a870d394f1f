# SPDX-License-Identifier: MIT
"""Two stages of a pipeline on CPU, each of one rank or two: answers as of one process."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..serving.test_pressure import TIGHT, TOKENS, prompts_from
from ..support.engine import (
    Clip,
    Engines,
    engine,
    greedy,
    in_new_process,
    picture,
    prepare_process_of_ranks,
    prompt_of,
    same_answers,
    tokens_and_logprobs,
)
from ..support.families import (
    LLAVA_ONEVISION_ORIGINAL,
    QWEN2_5_VL,
    QWEN3_VL,
    Family,
)
from ..support.forks import in_fork

pytestmark = [pytest.mark.slow, pytest.mark.longer("10 s a start")]

CHUNKS = {"long_prefill_token_threshold": 32}


@dataclass(frozen=True)
class Case:
    """An engine of two stages.

    Args:
        layers: of the language model, of each stage; DeepStack's three levels have to be in the first.
        tight: a KV cache of hardly one prompt, so that requests are preempted.
    """

    family: Family
    runner: str = "v1"
    ranks: int = 1
    layers: str = "2,2"
    tight: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.runner, self.family.name, *["ranks"] * (self.ranks > 1), *["tight"] * self.tight])

    @property
    def engine_options(self) -> dict[str, Any]:
        """Of the one process, too."""
        return self.family.engine_options | (TIGHT if self.tight else {})


CASES = [
    Case(QWEN2_5_VL, layers="1,3", tight=True),
    Case(QWEN2_5_VL, ranks=2),
    Case(QWEN3_VL, layers="3,1"),
    Case(LLAVA_ONEVISION_ORIGINAL),
    Case(QWEN3_VL, "v2", layers="3,1"),
]


def answers_of(llm: Any, case: Case) -> list[Any]:
    """Greedy answers to prompts that run beside each other, and then to them again, their prefixes in the cache."""
    if case.tight:
        return [tokens_and_logprobs(output) for output in greedy(llm, prompts_from(100)[:4], TOKENS)]
    family, settings = case.family, {"retention_ratio": 0.2}
    clips = [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)]
    prompts = [
        prompt_of(f"{family.video}Describe the video.", [Clip(16, 112, 112)], flashvid=settings),
        prompt_of("A text alone, which is a little longer than the others are."),
        prompt_of(f"{family.image}then{family.video}and{family.video}s", clips, [picture()], settings),
        prompt_of(f"{family.image}Describe the image.", (), [picture(seed=6)]),
    ]
    for prompt in prompts:
        prompt["multi_modal_data"] or prompt.pop("multi_modal_data")
    outputs = greedy(llm, prompts, 6) + greedy(llm, prompts, 6, keep_prefixes=True)
    return [tokens_and_logprobs(output) for output in outputs]


def answers_of_stages(directories: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Runs in a process of its own."""
    from flashvid_vllm import engine_args
    from flashvid_vllm.serving.metrics import OUR_FOLDER

    prepare_process_of_ranks()
    os.environ.pop(OUR_FOLDER, None)  # of the process that this one is a fork of
    found: dict[str, Any] = {}
    before: set[Path] = set()
    for case in CASES:
        if case.name not in names:
            continue
        os.environ["VLLM_PP_LAYER_PARTITION"] = case.layers
        options = {
            **engine_args(retention_ratio=0.3, **case.family.settings),
            **(CHUNKS | case.engine_options),
            "pipeline_parallel_size": 2, "tensor_parallel_size": case.ranks, "disable_log_stats": False,
        }  # fmt: skip
        with engine(directories[case.family.name], **options) as llm:
            files = set(Path(os.environ[OUR_FOLDER]).glob("gauge_*.db"))
            found[case.name] = {
                "answers": answers_of(llm, case),
                "preempted": next(x.value for x in llm.get_metrics() if x.name == "vllm:num_preemptions"),
                "ranks that count": len(files - before),
            }
            before = files
    return found


@pytest.fixture(scope="module")
def stages(
    models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """What the stages of a runner answer: by case. All of a runner's engines run in one process."""
    made: dict[str, dict[str, Any]] = {}

    def answers(runner: str) -> dict[str, Any]:
        if runner not in made:
            cases = [case for case in CASES if case.runner == runner]
            directories = {case.family.name: str(models(case.family)) for case in cases}
            env = {"FLASHVID_RUNNER": "v2"} if runner == "v2" else {}
            folder, names = tmp_path_factory.mktemp(runner), [case.name for case in cases]
            run = in_new_process if runner == "v2" else in_fork
            made[runner] = run(answers_of_stages, folder, directories, names, env=env)
        return made[runner]

    return answers


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_two_stages_answer_as_one_process(
    case: Case, stages: Any, models: Callable[[Family], Path], engines: Engines
) -> None:
    """Prefilled in chunks on two stages, whole in one process; one rank of all counts the videos."""
    family = case.family
    llm = engines(models(family), {"retention_ratio": 0.3, **family.settings}, **case.engine_options)
    one, found = answers_of(llm, case), stages(case.runner)[case.name]
    assert (found["preempted"] > 0) == case.tight
    assert found["ranks that count"] == 1
    same_answers(one, found["answers"], 5 * family.tolerance)
