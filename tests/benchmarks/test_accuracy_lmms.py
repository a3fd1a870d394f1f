# SPDX-License-Identifier: MIT
"""The accuracy recipes end to end: lmms-eval 0.7.3, a tiny model, four questions about real clips."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.environment import lmms_python
from benchmarks.accuracy.evaluate import Job, lmms_command, run_lmms
from benchmarks.accuracy.guard import GuardAbort
from benchmarks.accuracy.recipes import RECIPES
from benchmarks.accuracy.results import outcomes_in
from benchmarks.common.clips import clip
from benchmarks.common.tiny_model import make_tiny_model

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.longer("installs lmms-eval"),
    pytest.mark.usefixtures("forking_servers"),
]

FRAMES = 8
SMALL = ["--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "4096"]
NOBODY = "http://127.0.0.1:9"  # no server listens there
UTILS = """
def videos(doc):
    return [doc["video"]]

def frames(doc):
    from PIL import Image
    return [Image.new("RGB", (56, 56)) for _ in range(4)]

def question(doc, kwargs=None):
    return doc["question"] + " Answer A or B."

def score(doc, answers):
    return {"clips_score": 100.0 * (doc["answer"] in ("any", answers[0].strip()[:1]))}

def mean(scores):
    return sum(scores) / len(scores)
"""
TASK = """
task: NAME
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.VISUAL
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
metric_list:
  - metric: clips_score
    aggregation: !function utils.mean
    higher_is_better: true
"""
QUESTIONS = [
    ("carphone", "Does a man talk?", "A"), ("carphone", "Is it night?", "B"),
    ("bikes", "Are there bikes?", "any"), ("speaker", "Is there a shelf?", "any"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task on videos, `clips`, and the same one with frames as images, `clips_as_frames`."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"video": str(clip(name)), "question": text, "answer": answer} for name, text, answer in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "utils.py").write_text(UTILS)
    for name, visual in (("clips", "videos"), ("clips_as_frames", "frames")):
        text = TASK.replace("NAME", name).replace("FOLDER", str(folder)).replace("VISUAL", visual)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def python() -> Path:
    return lmms_python()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model") / "tiny")


def test_plain_and_a_quarter(
    tasks: Path, python: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command as a user types it."""
    arguments = ["clips", "--model", str(model), "--plain", "--retention-ratio", "0.25", "--frames", str(FRAMES)]
    arguments += ["--include-path", str(tasks), "--media-path", str(clip("bikes").parent), "--output", str(tmp_path)]
    assert main([*arguments, "--concurrency", "2", "--lmms-python", str(python), "--", *SMALL]) == 0
    shown = capsys.readouterr()
    assert "25 % flashvid: 4 requests are shorter than the same ones of the plain run" in shown.err
    folder = tmp_path / model.name / f"clips-{FRAMES}-frames"
    plain, quarter = outcomes_in(folder)
    for outcome in (plain, quarter):
        assert (outcome.metric, outcome.questions, outcome.failures, outcome.witnesses) == ("clips_score", 4, 0, 4)
        assert outcome.video_tokens == plain.kept  # of FRAMES frames: carphone has 6 x 5 tokens to each pair
        assert outcome.accuracy in (50, 75, 100)  # two questions take any answer
        assert f"│ {outcome.run} " in shown.out
    assert quarter.kept == plain.kept / 4
    assert quarter.prompt_tokens == plain.prompt_tokens - 0.75 * plain.kept
    carphone = [line for line in (folder / "plain" / "ledger.jsonl").read_text().splitlines() if '"kept": 120' in line]
    assert len(carphone) == 2


def test_frames_as_images_end_the_run(tasks: Path, python: Path, tmp_path: Path) -> None:
    """Within lmms-eval, which catches what it can: the guard must get through it."""
    job = Job("clips_as_frames", tasks, "m", FRAMES, None)
    with pytest.raises(GuardAbort, match=r"a request carries 4 images.*doc_to_visual returns paths"):
        run_lmms(lmms_command(python, job, tmp_path, 0.25, "flashvid"), tmp_path, job, NOBODY, "m")
    assert not list(tmp_path.rglob("*_results.json"))


def config_of(name: str, paths: dict[str, Path]) -> dict[str, Any]:
    """A task's settings, those that it includes below its own; of a group its first task's."""
    config = yaml.load(paths[name].read_text(), Loader=_Loader)
    if isinstance(config.get("task"), list):
        return config_of(config["task"][0], paths)
    while "include" in config:
        included = paths[name].parent / config.pop("include")
        config = {**yaml.load(included.read_text(), Loader=_Loader), **config}
    return config


class _Loader(yaml.SafeLoader):
    """Takes `!function` for its text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
TASK_NAME = re.compile(r"^(?:task|group): *[\"']?(\w+)", re.MULTILINE)


def test_recipes_name_what_lmms_eval_has(python: Path) -> None:
    """Tasks, scores and data sets, by lmms-eval's own files."""
    (tasks,) = python.parents[1].glob("lib/python*/site-packages/lmms_eval/tasks")
    files = [*tasks.rglob("*.yaml")]
    paths = {name: file for file in files for name in TASK_NAME.findall(file.read_text())}
    for recipe in RECIPES.values():
        config = config_of(recipe.task, paths)
        assert config["dataset_path"] == recipe.dataset
        assert [metric["metric"] for metric in config["metric_list"]] == [recipe.metric]
        assert config.get("output_type", "generate_until") == "generate_until"
