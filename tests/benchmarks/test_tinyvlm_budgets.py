# SPDX-License-Identifier: MIT
"""The tables of budgets that follow the video: made from answers alone, and what is committed is what they say."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("transformers")

import torch

from benchmarks.tinyvlm import budgets
from benchmarks.tinyvlm.__main__ import write_tables
from benchmarks.tinyvlm.report import RESULTS
from benchmarks.tinyvlm.residuals import CHANGES, compress
from flashvid_vllm import FlashVidConfig
from flashvid_vllm import compress as compress_video
from tests.support.cases import video


def test_a_table_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "SETTINGS", {"adaptive": {}, "flashvid": {}, "evs": {}})
    family = np.array(["motion"] * 20 + ["count"] * 20)
    right = {
        "adaptive, original@0.1": np.array([True] * 20 + [False] * 20),
        "flashvid, original@0.1": np.array([False] * 20 + [True] * 20),
        "evs, original@0.1": np.array([True] * 10 + [False] * 30),
    }
    asked = budgets.Asked(right, family, np.arange(40))
    head, _, *rows = budgets._table(asked, "original", 0.1)
    assert head == "| | all | - other | p | motion | count |"
    cells = {row.split(" | ")[0].strip("| "): [part.strip(" |") for part in row.split(" | ")[1:]] for row in rows}
    assert cells["adaptive"] == ["50.0", "", "", "100", "0"]
    assert cells["flashvid"][0] == "50.0"
    assert cells["flashvid"][2:] == ["1", "0*", "100-"]  # ahead in one family, behind in the other
    assert cells["evs"][1].startswith("+25.0 (")
    assert cells["evs"][2:] == [f"{2 * 2 / 2**10:.2g}", "50*", "0"]  # ten questions, all for it; two tests
    assert rows[-1].startswith("| evs ")  # the best first


def test_what_is_changed_is_the_method_but_for_the_change() -> None:
    features, attention = video("noise", 7, 25, 33)
    features[1:, :15] = features[:1, :15]  # most of it is still
    config = FlashVidConfig(token_budget=30, method="adaptive")
    for keeps_positions in (False, True):
        ours = compress_video(features, attention, config, keeps_positions=keeps_positions)
        same = compress(features, attention, 30, keeps_positions)
        assert torch.equal(same.source_index, ours.source_index)
        assert torch.equal(same.assignment, ours.assignment)
    found = {name: compress(features, attention, 30, True, **change) for name, change in CHANGES.items()}
    assert all(len(out.tokens) == 30 for out in found.values())
    chosen = {tuple(out.source_index.tolist()) for out in found.values()}
    assert len(chosen) >= 9  # noise has no past, so what is changed through time may choose alike
    floor = found["one token at least of every frame"].source_index // 25
    assert len(set(floor.tolist())) == 7


@pytest.mark.parametrize("page", [budgets.FIRST, budgets.SECOND], ids=lambda page: page.name)
def test_the_committed_answers_are_to_what_is_asked(page: budgets.Page) -> None:
    found = json.loads((RESULTS / f"{page.name}.json").read_text())
    assert {part: list(answers) for part, answers in found.items()} == {
        part: [cell.key for cell in budgets.GRIDS[part]] for part in page.parts
    }


@pytest.mark.longer("every table")
def test_the_committed_pages_are_what_the_committed_answers_say(tmp_path: Path) -> None:
    for answers in RESULTS.glob("*.json"):
        shutil.copy(answers, tmp_path)
    write_tables(Namespace(results=tmp_path))
    pages = {page.name: page.read_text() for page in tmp_path.glob("*.md")}
    assert len(pages) == 6
    assert pages == {name: (RESULTS / name).read_text() for name in pages}
