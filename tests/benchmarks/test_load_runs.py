# SPDX-License-Identifier: MIT
"""benchmarks.load.runs and benchmarks.load.servers: what is started, and what is not measured again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from benchmarks.common.record import Cells
from benchmarks.common.tiny_model import KINDS, make_tiny_model
from benchmarks.load import runs as load_runs
from benchmarks.load.measure import Load
from benchmarks.load.runs import Group, Run, code_fingerprint, key_of, run_all
from benchmarks.load.servers import SHAPES, Target, compression, vllms_own_pruning


def test_vllms_own_pruning_is_used_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    assert vllms_own_pruning("not even looked at") == ()
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    own = vllms_own_pruning(str(make_tiny_model("qwen3_vl", tmp_path / "qwen")))
    assert own == ("evs", "vidcom2")
    assert vllms_own_pruning(str(make_tiny_model("llava_onevision", tmp_path / "llava"))) == ()
    vllms = ["--video-pruning-rate", "0.9", "--video-pruning-method", "vidcom2"]
    assert compression("vidcom2", 0.1, own) == ("vLLM's", vllms)
    ours = ["--plugin", "flashvid", "--flashvid-retention-ratio", "0.1", "--flashvid-method", "evs"]
    assert compression("evs", 0.1, ()) == ("through the plugin", ours)
    assert compression("flashvid", 0.1, own) == ("this plugin's", ours[:4])
    assert compression("plain", 0.1, own)[1] == []


def test_shapes_have_the_tokens_that_they_say() -> None:
    for shape in SHAPES.values():
        sizes = KINDS[shape.kind].args[1]  # type: ignore[attr-defined]
        grid = sizes["image_size"] // sizes["patch_size"]
        assert shape.tokens_per_frame == (-(-grid // 2)) ** 2


def group(clips: list[Path], *loads: Load, server: str = "plain") -> Group:
    about = {"server": server, "model": "m", "about": "a model", "peer": "p", "frames": 8, "ratio": 0.1}
    runs = tuple(Run(about, load, tuple(clips[1 : 1 + load.requests])) for load in loads)
    return Group(runs, 4, clips[0], Target("m", "a model", "m", "m"), ("--flag", server))


def test_what_is_there_is_not_measured_again(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    interrupt_at: list[str] = ["2 at a time"]

    def fake(group: Group, missing: list[tuple[Run, str]], cells: Cells, *_: Any) -> None:
        for run, key in missing:
            if run.load.name in interrupt_at:
                raise KeyboardInterrupt
            measured.append(f"{run.about['server']}, {run.load.name}")
            cells.add({**run.about, "key": key})

    monkeypatch.setattr(load_runs, "run_group", fake)
    groups = [group(clips, Load(2, 1), Load(2, 2), server=server) for server in ("plain", "flashvid")]
    path = tmp_path / "cells.jsonl"

    def cells() -> Cells:
        return Cells(path, lambda cell: cell["key"])

    with pytest.raises(KeyboardInterrupt):
        run_all(groups, cells())
    with path.open("a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    interrupt_at.clear()
    assert [cell["server"] for cell in run_all(groups, cells())] == ["plain", "plain", "flashvid", "flashvid"]
    expected = [f"{server}, {number} at a time" for server in ("plain", "flashvid") for number in (1, 2)]
    assert measured == expected
    assert len(run_all(groups, cells())) == 4
    assert measured == expected


def test_a_key_is_of_all_that_a_figure_depends_on(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = group(clips, Load(2, 1))

    def key(changed: Group) -> str:
        return key_of(changed, changed.runs[0])

    assert key(base) == key(group(clips, Load(2, 1)))
    others = [
        group(clips, Load(2, 2)),
        group(clips, Load(2, rate=1.0)),
        group(clips[1:], Load(2, 1)),
        group(clips, Load(2, 1), server="evs"),
        replace(base, max_tokens=5),
        replace(base, arguments=("--other",)),
        replace(base, target=replace(base.target, identity="another seed")),  # type: ignore[type-var]
    ]
    keys = {key(base), *map(key, others)}
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    keys.add(key(base))
    monkeypatch.setattr(load_runs, "code_fingerprint", lambda: code_fingerprint() + "x")
    keys.add(key(base))
    assert len(keys) == len(others) + 3
    elsewhere = replace(base, target=None, base_url="http://x")
    assert key(elsewhere) != key(elsewhere)  # nobody knows how it was started
