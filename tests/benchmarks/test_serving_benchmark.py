# SPDX-License-Identifier: MIT
"""benchmarks.serving and benchmarks.frames: the command lines, and small programmes on real servers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from benchmarks.common.record import Cells
from benchmarks.common.server import ServerError, VllmServer
from benchmarks.common.tiny_model import make_tiny_model
from benchmarks.frames import __main__ as frames
from benchmarks.load import runs as load_runs
from benchmarks.load.measure import Load
from benchmarks.load.runs import Group, Run, run_all
from benchmarks.load.servers import Target, common_arguments
from benchmarks.serving import __main__ as serving
from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan

# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--servers", "plain,best"], "fastv, got best"),
        (["--concurrency", "1,0"], "expected numbers above 0 such as 1,2,4, got '1,0'"),
        (["--rates", "fast"], "expected numbers above 0 such as 1,2,4, got 'fast'"),
        (["--shape", "clip-b-0.1b", "--model", "x"], "--shape makes a model of its own"),
        (["--base-url", "http://x", "--servers", "plain"], "--base-url starts no server"),
        (["--retention-ratio", "1.5"], "--retention-ratio must be above 0 and below 1, got 1.5"),
        (["--requests", "0"], "must be at least 1"),
    ],
)
def test_command_lines_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_model_needs_a_budget_for_frames(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        frames.parse(["--model", "x"])
    assert "--model needs --token-budget" in capsys.readouterr().err


def test_only_the_whole_programme_goes_over_the_committed_results() -> None:
    assert frames.parse(["--encoder-ratios", "0.25,auto"]).encoder_ratios == ("0.25", "auto")
    with pytest.raises(SystemExit):
        frames.parse(["--encoder-ratios", "0.3"])
    for module in (serving, frames):
        assert module.parse([]).output == module.RESULTS
        assert module.parse(["--fresh"]).output == module.RESULTS
        assert module.RESULTS not in (module.parse(["--requests", "2"]).output, module.parse(["--", "--x"]).output)


def test_the_programme() -> None:
    loads = serving.loads(serving.parse([]), "clip-b-0.1b")
    assert [load.concurrency for load in loads] == [1, 2, 4, 8, 16, 32, None, None, None]
    assert all(load.requests >= (load.concurrency or 0) for load in loads)
    assert [load.name for load in serving.loads(serving.parse([]), "llava-onevision-0.5b")] == ["1 at a time"]
    chosen = serving.loads(serving.parse(["--rates", "0.5", "--requests", "3"]), "clip-b-0.1b")
    assert chosen == [Load(3, rate=0.5)]
    paths = [Path(f"{number}.mp4") for number in range(serving.needed(loads, False))]
    sent = [clip for run in serving.runs_of({}, loads, paths, False) for clip in run.clips]
    assert sent == paths[1:]  # none twice, and the first is for warming up
    repeated = serving.runs_of({}, loads, paths[: serving.needed(loads, True)], True)
    assert all(run.clips == tuple(paths[1 : 1 + run.load.requests]) for run in repeated)


# --- real servers

FRAMES, PER_FRAME = 8, 16  # of the tiny LLaVA-OneVision
ANSWER = 256  # tokens: long enough for /metrics to be looked at meanwhile, on a busy machine too
TINY = ["--frames", f"{FRAMES}", "--requests", "3", "--max-tokens", f"{ANSWER}"]
SERVE = ["--enforce-eager", "--max-model-len", "2048"]


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cells go here, not to those of the developer's own runs."""
    monkeypatch.setattr(load_runs, "cache_directory", lambda: tmp_path / "clips")
    return tmp_path


def call(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line's exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    return int(module.main())


@pytest.mark.slow
@pytest.mark.longer("several servers")
@pytest.mark.usefixtures("forking_servers")
def test_a_small_programme(
    own_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_tiny_model("llava_onevision_clip", own_store / "tiny"))
    programme = ["--model", model, "--servers", "plain,flashvid", "--concurrency", "1,2", "--rates", "4", *TINY]
    programme += ["--output", str(own_store / "out"), "--", *SERVE]
    assert call(serving, monkeypatch, *programme) == 0, capsys.readouterr().err
    found = json.loads((own_store / "out" / "serving.json").read_text())
    assert str(own_store) not in json.dumps(found["cells"])
    assert [(cell["server"], cell["load"]) for cell in found["cells"]] == [
        (server, load) for server in ("plain", "flashvid") for load in ("1 at a time", "2 at a time", "4 a second")
    ]
    kept = plan(FRAMES, PER_FRAME, FlashVidConfig(retention_ratio=0.1)).tokens
    prompts = {server: {c["prompt_tokens"] for c in found["cells"] if c["server"] == server} for server in
               ("plain", "flashvid")}  # fmt: skip
    assert prompts["flashvid"] == {prompts["plain"].pop() - FRAMES * PER_FRAME + kept}
    for cell in found["cells"]:
        assert cell["completion_tokens"] == ANSWER
        assert cell["requests_per_s"] > 0
        assert 0 < cell["ttft_ms"]["p50"] <= cell["ttft_ms"]["p95"] <= cell["ttft_ms"]["p99"]
        assert cell["tpot_ms"]["p50"] > 0
        assert 0 <= cell["kv"]["peak_tokens"] < cell["kv"]["size_tokens"]
        assert cell["peak_rss_mib"] > 100
        worker = cell["worker"]
        assert worker["encoder_ms"] > 0
        assert worker["prefill_ms"] > 0
        assert worker["decode_ms"] > 0
        assert (worker["compression_ms"] > 0) == (cell["server"] == "flashvid")
        assert worker["prefill_tokens"] == pytest.approx(3 * cell["prompt_tokens"], abs=3 * 128)  # a cached block
        if cell["concurrency"] == 1:
            assert len(cell["each"]) == 3
            for entry in cell["each"]:
                assert entry["encoder_ms"] + entry["compression_ms"] + entry["prefill_ms"] < entry["ttft_ms"]
    # of 3 ms a token: on a busy machine vLLM tells all of an answer at its end, and the use of the cache never
    assert max(cell["kv"]["peak_tokens"] for cell in found["cells"]) > 0
    assert {path.name for path in (own_store / "out").iterdir()} == {"serving.json", "serving.md", "serving.png"}

    monkeypatch.setattr(load_runs, "VllmServer", None)  # no server is started for what is there
    assert call(serving, monkeypatch, *programme) == 0, capsys.readouterr().err
    assert json.loads((own_store / "out" / "serving.json").read_text())["cells"] == found["cells"]


@pytest.mark.slow
@pytest.mark.longer("several servers")
@pytest.mark.usefixtures("forking_servers")
def test_evs_of_a_qwen_and_an_endpoint_of_others(
    own_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_tiny_model("qwen2_5_vl", own_store / "tiny"))
    out = ["--output", str(own_store / "out")]
    evs = ["--model", model, "--servers", "evs", "--concurrency", "1", *TINY, *out, "--", *SERVE[:1]]
    assert call(serving, monkeypatch, *evs) == 0, capsys.readouterr().err
    (cell,) = json.loads((own_store / "out" / "serving.json").read_text())["cells"]
    assert cell["peer"] == ("through the plugin" if current_platform.is_cpu() else "vLLM's")
    assert cell["worker"]["compression_ms"] > 0
    with VllmServer(model, *SERVE, log=own_store / "log") as server:
        url = ["--base-url", server.base_url, "--rates", "4", *TINY[2:]]
        assert call(serving, monkeypatch, *url, *out) == 0, capsys.readouterr().err
        bad = ["--base-url", server.base_url, "--model", "another", *out]
        assert call(serving, monkeypatch, *bad) == 1
        assert "not 'another'" in capsys.readouterr().err
    (endpoint,) = json.loads((own_store / "out" / "serving.json").read_text())["cells"]
    assert (endpoint["server"], endpoint["worker"], endpoint["model"]) == ("endpoint", None, model)
    assert endpoint["kv"]["size_tokens"] > 0
    assert endpoint["prompt_tokens"] > cell["prompt_tokens"]


@pytest.mark.slow
@pytest.mark.longer("several servers")
@pytest.mark.usefixtures("forking_servers")
def test_frames_under_one_budget(
    own_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_tiny_model("llava_onevision_clip", own_store / "tiny"))
    budget = 16 * PER_FRAME
    options = ["--model", model, "--token-budget", f"{budget}", "--frames", "16,48", "--requests", "2"]
    options += ["--max-tokens", "32", "--output", str(own_store / "out"), "--", *SERVE]
    assert call(frames, monkeypatch, *options) == 0, capsys.readouterr().err
    cells = json.loads((own_store / "out" / "frames.json").read_text())["cells"]
    prompts = {(cell["server"], cell["frames"]): cell["prompt_tokens"] for cell in cells}
    assert prompts["plain", 48] == prompts["plain", 16] + 32 * PER_FRAME
    assert prompts["flashvid", 48] == prompts["flashvid", 16] == prompts["plain", 16]
    assert all("rss_rise_mib" in entry for cell in cells for entry in cell["each"])


class Refusing(VllmServer):
    """In place of a server: ends as one that does not know its last option."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", "import sys; sys.exit(f'unrecognized: {sys.argv[-1]}')", *super().command[1:]]


@pytest.mark.longer("encodes clips; tests/benchmarks/test_serving_tools.py has servers that do not start")
def test_a_server_that_does_not_start_says_why(
    own_store: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_runs, "VllmServer", Refusing)
    model = str(make_tiny_model("llava_onevision_clip", own_store / "tiny"))
    target = Target("tiny", "tiny", model, "tiny")
    arguments = (*common_arguments(target, FRAMES, clips[0], False), "--no-such-option")
    about = {"server": "plain", "model": "tiny", "frames": FRAMES}
    asked = Group((Run(about, Load(1, 1), tuple(clips[1:2])),), 4, clips[0], target, arguments)
    with pytest.raises(ServerError, match="unrecognized: --no-such-option"):
        run_all([asked], Cells(own_store / "cells.jsonl", lambda cell: cell["key"]))
