# SPDX-License-Identifier: MIT
"""`flashvid tune` on this model and its test questions, held against the benchmark's own tables."""

import json
import os
from pathlib import Path
from typing import Any

import cv2

from flashvid_vllm.core.settings import CONSECUTIVE, ORIGINAL
from flashvid_vllm.tools.tune.__main__ import main as tune

from ..common.clips import ROOT
from ..common.record import fingerprint as fingerprint_of_files
from ..common.record import fingerprint_of, plugin_sources
from . import data
from .answers import MOST_TOKENS
from .features import CACHE
from .features import fingerprint as features_fingerprint
from .grid import SPREAD, chosen
from .model import build, load_weights
from .scenes import render

VIDEOS = 80
RATIOS = (0.25, 0.10)
SERVER = ("--dtype", "float32", "--max-model-len", "4096", "--enforce-eager")


TOOLS = ("tools",)  # folders of the plugin that no answer depends on


def fingerprint(weights: Path) -> str:
    """What the answers depend on, as 12 hexadecimal digits: weights, frames, the plugin but for its tools."""
    package = ROOT / "flashvid_vllm"
    serving = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in TOOLS]
    files = {*plugin_sources(), *serving, weights}
    return fingerprint_of((fingerprint_of_files(files), features_fingerprint("test")))


def numbers(count: int) -> list[int]:
    """``count`` of the test videos at even distances: as those of the tables are, and not the first ones alone."""
    of_all = data.SIZES["test"]
    return [of_all * at // count for at in range(min(count, of_all))]


def export(count: int, folder: Path) -> Path:
    """Write videos as folders of PNG images, without loss, and the questions of the tables as tune's JSONL."""
    questions = chosen("test", data.SIZES["test"])
    lines = []
    for number in numbers(count):
        frames = folder / f"{number:03}"
        if not (frames / "done").exists():
            frames.mkdir(parents=True, exist_ok=True)
            for at, frame in enumerate(render(data.video("test", number))):
                cv2.imwrite(str(frames / f"{at:03}.png"), frame[..., ::-1])
            (frames / "done").touch()
        for question in questions.get(number, []):
            entry = {"video": frames.name, "question": question.prompt(), "choices": list(question.choices)}
            lines.append(json.dumps(entry | {"answer": question.answer}))
    path = folder / f"test-{count}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(weights: Path, count: int, results: Path) -> bool:
    """Tune on ``count`` videos with either ``positions``, write tune.md; whether it found what the tables say."""
    mark = fingerprint(weights)
    directory = CACHE / f"served-{mark}"
    if not (directory / "config.json").exists():
        build(load_weights(weights), directory)
    questions = export(count, CACHE / f"tune-{features_fingerprint('test')}")
    report = CACHE / f"tune-{count}-{mark}.html"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; else vLLM wants most of the memory that is free
    code = tune([
        str(questions), "--model", str(directory), "--ratios", *map(str, RATIOS), "--positions", CONSECUTIVE, ORIGINAL,
        "--choices", "words", "--max-tokens", str(MOST_TOKENS), "--concurrency", "2", "--timed", "4",
        "--results", str(CACHE / f"tune-{mark}.jsonl"), "-o", str(report), "--", *SERVER,
    ])  # fmt: skip
    if code:
        raise RuntimeError(f"flashvid tune ended with {code}")
    tables = json.loads((results / "accuracy.json").read_text())["test"]["rows"]
    text, held = compare(json.loads(report.with_suffix(".json").read_text()), tables)
    (results / "tune.md").write_text(text)
    print(text)
    return held


def compare(found: dict[str, Any], tables: list[dict[str, Any]]) -> tuple[str, bool]:
    """A document that holds tune's report against the rows of accuracy.json, and whether they say the same.

    They do if every accuracy of the tables, of 320 videos, lies within tune's interval, of some of these, and if tune
    orders the settings as the tables do wherever the tables' intervals are apart.
    """
    expected = {(row["name"], row["ratio"]): row["accuracy"] for row in tables}
    lines, pairs = [], []
    for row in found["rows"]:
        name = "plain" if row["options"] is None else f"flashvid{SPREAD if row['positions'] == ORIGINAL else ''}"
        ratio = row["request"].get("retention_ratio", 1.0)
        table, mine = expected[name, ratio], row["accuracy"]
        inside = mine[1] <= table[0] <= mine[2]
        pairs.append((mine, table, inside))
        shown = [row["name"], f"{row['prompt_tokens'][0]:.0f}", _percent(row["agreement"]), _percent(mine)]
        shown += [_percent(table), "yes" if inside else "NO"]
        lines.append(f"| {' | '.join(shown)} |")
    ordered = all(
        (a[0] > b[0]) == (s[0] > t[0]) for a, s, _ in pairs for b, t, _ in pairs if s[1] > t[2] or t[1] > s[2]
    )
    first = found["rows"][0]
    text = f"""# `flashvid tune` on the small video LLM, beside its own tables

`python -m benchmarks.tinyvlm tune`: {first["known"]} test questions about {first["videos"]} of the 320 test videos,
asked by `flashvid tune --positions consecutive original` of two servers in turn; the tables are those of
[accuracy.md](accuracy.md), from torch on all 320 videos. Percent, with 95 % intervals over videos. `inside`: the
accuracy of the tables lies in tune's interval.

| | prompt tokens | same answer as plain | accuracy, tune | accuracy, tables | inside |
|---|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

Where the tables' intervals are apart, tune {"has" if ordered else "DOES NOT HAVE"} the settings in the same order.

What tune says: {found["advice"]["sentence"].replace(found["model"], "MODEL")}

vLLM {found["vllm"]}. The tables have no agreement with the plain model; it lies above accuracy where plain answers that
are wrong are kept too.
"""
    return text, ordered and all(inside for _, _, inside in pairs)


def _percent(estimate: list[float]) -> str:
    value, low, high = (100 * v for v in estimate)
    return f"{value:.1f} ({low:.1f} to {high:.1f})"
