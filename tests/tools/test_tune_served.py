# SPDX-License-Identifier: MIT
"""`flashvid tune --model`: a server of its own, from its start to its end, with free text and choices."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from flashvid_vllm.tools.tune.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.longer("starts a server")]


def test_a_real_server_is_started_asked_and_ended(sharp_model: Path, clips: list[Path], tmp_path: Path) -> None:
    """What vLLM itself makes of letters, scores, salts and names; the fake server takes our word for all of them."""
    lines: list[dict[str, Any]] = [{"video": str(clip), "question": "Describe this."} for clip in clips[:4]]
    lines += [
        {"video": str(clip), "question": "Which?", "choices": ["one", "two", "three"], "answer": "B"} for clip in clips
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = tmp_path / "report.html"
    command = [
        str(tmp_path / "data.jsonl"), "--model", str(sharp_model), "--ratios", "1.0", "0.25", "--timed", "2",
        "--max-tokens", "8", "--results", str(tmp_path / "results.jsonl"), "-o", str(report),
        "--", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--gpu-memory-utilization", "0.3",
    ]  # fmt: skip
    assert main(command) == 0
    found = json.loads(report.with_suffix(".json").read_text())
    plain, all_kept, quarter = found["rows"]
    assert found["failures"] == []
    assert found["unscored"] < 4
    assert plain["prompt_tokens"][0] == all_kept["prompt_tokens"][0] > quarter["prompt_tokens"][0]
    assert all_kept["agreement"][0] == 1  # every token kept is the plain model
    assert all_kept["logprob"] == pytest.approx(plain["logprob"], abs=1e-4)
    assert quarter["logprob"] != pytest.approx(plain["logprob"], abs=1e-4)
    assert quarter["first_token"][0] > 0
    said = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    asked = [line for line in said if line["kind"] == "answer"]
    assert len(asked) == 10 * 3
    assert {line["text"] for line in asked if len(line["text"]) == 1} <= set("ABC")
    assert sum(line["text"] in ("A", "B", "C") for line in asked) >= 6 * 3
