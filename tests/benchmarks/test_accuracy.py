# SPDX-License-Identifier: MIT
"""The accuracy recipes without lmms-eval and without a server: the command lines, the results, the table."""

import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.accuracy import evaluate, paper
from benchmarks.accuracy.__main__ import keep_apart, main, parse, serve_arguments
from benchmarks.accuracy.evaluate import Job, lmms_command, run_name
from benchmarks.accuracy.recipes import RECIPES
from benchmarks.accuracy.results import Outcome, ResultsError, collect, outcomes_in, score, table


def test_command_lines(tmp_path: Path) -> None:
    options = parse(["videomme", "--model", "m", "--frames", "16", "--", "--tensor-parallel-size", "2"])
    assert (options.retention_ratio, options.plain) == ([0.1], False)
    served = serve_arguments(options.frames, tmp_path, options.serve_args)
    assert served[-2:] == ["--tensor-parallel-size", "2"]
    assert served[:2] == ["--plugin", "flashvid"]
    sampling = json.loads(served[served.index("--media-io-kwargs") + 1])["video"]
    assert sampling["num_frames"] == sampling["max_frames"] == 16
    job = Job("videomme", None, "a/model", 16, limit=8)
    command = lmms_command(Path("/python"), job, tmp_path, 0.1, "evs")
    assert command[:3] == ["/python", "-m", "benchmarks.accuracy.inside"]
    assert command[command.index("--model_args") + 1] == "model=a/model,frames=16,method=evs,retention_ratio=0.1"
    assert command[-2:] == ["--limit", "8"]
    assert "retention_ratio" not in " ".join(lmms_command(Path("/python"), job, tmp_path, None, "evs"))
    assert parse(["mlvu", "--model", "m", "--plain"]).retention_ratio is None
    assert parse(["mlvu", "--model", "m", "--base-url", "http://x"]).frames is None
    # inside.py cannot be imported here
    inside = Path(evaluate.__file__).with_name("inside.py").read_text()
    for name in ("OPTIONS", "ABORTED"):
        assert f"{name} = {getattr(evaluate, name)!r}".replace("'", '"') in inside
    assert f'NAME = "{evaluate.MODEL}"' in inside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retention-ratio", "1.5"], r"between 0 and 1, got 1\.5"),
        (["--retention-ratio", "1"], "the plain model is --plain"),
        (["--frames", "7"], "must be even and at least 4 .* got 7"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--base-url", "http://x", "--frames", "8"], "leaves --frames, .* to the server that runs"),
        (["--base-url", "http://x", "--", "--enforce-eager"], "arguments of vllm serve to the server"),
        (["--model", "a,b"], "comma or an equals sign: 'a,b'"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["videomme", "--model", "m", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_runs_on_different_servers_are_kept_apart(tmp_path: Path) -> None:
    keep_apart(parse(["mlvu", "--model", "m"]), tmp_path)
    keep_apart(parse(["mlvu", "--model", "m", "--plain"]), tmp_path)
    with pytest.raises(ValueError, match=r"another server.*give another --output"):
        keep_apart(parse(["mlvu", "--model", "m", "--", "--dtype", "float16"]), tmp_path)


def test_a_python_without_lmms_eval_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    arguments = ["mlvu", "--model", "m", "--output", str(tmp_path), "--lmms-python"]
    assert main([*arguments, str(python)]) == 1
    assert "has lmms-eval (none), and 0.7.3 is needed" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "absent")]) == 1
    assert "No such file" in capsys.readouterr().err


def outcome(run: str, ratio: float | None, accuracy: float) -> Outcome:
    return Outcome(run, ratio, 32, "m", accuracy, 2700, 0, 700.0, 6272.0, 627.0, 108)


def test_table_has_the_papers_figures(tmp_path: Path) -> None:
    for run, ratio, accuracy in (("10 % flashvid", 0.1, 56.4), ("10 % evs", 0.1, 50.0), ("plain", None, 58.5)):
        (tmp_path / run).mkdir()
        outcome(run, ratio, accuracy).write(tmp_path / run)
    found = outcomes_in(tmp_path)
    assert [one.run for one in found] == ["plain", "10 % evs", "10 % flashvid"]
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(table(found, "llava-hf/llava-onevision-qwen2-7b-ov-hf", "videomme", "title"))
    lines = console.export_text().splitlines()
    row = {
        name: next(line for line in lines if f"│ {name} " in line) for name in ("plain", "10 % evs", "10 % flashvid")
    }
    assert "58.5 (32 frames, Table 1)" in row["plain"]
    assert "96.4%" in row["10 % flashvid"]
    assert "57.8 (32 frames, Table 1)" in row["10 % flashvid"]
    assert "Table" not in row["10 % evs"]  # the paper's figure is FlashVID's
    assert any("56.5 (32 frames, Table 14, before the LLM alone)" in line for line in lines)


def test_the_papers_table() -> None:
    """The models that are in it, and no figure far from the plain model's."""
    names = {
        "llava-hf/llava-onevision-qwen2-7b-ov-hf": "LLaVA-OneVision", "lmms-lab/LLaVA-Video-7B-Qwen2": "LLaVA-Video",
        "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL", "Qwen/Qwen2.5-VL-72B-Instruct": None, "Qwen/Qwen3-VL-8B": None,
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": None, "lmms-lab/LLaVA-Video-72B-Qwen2": None,
    }  # fmt: skip
    assert {name: paper.family_of(name) for name in names} == names
    assert paper.rows_for("qwen2.5-vl-7b", "mlvu", 0.1)[0].of("mlvu") == 47.5
    assert set(paper.BENCHMARKS) == set(RECIPES)
    plain = {(row.family, row.frames): row for row in paper.ROWS if row.ratio is None}
    for row in paper.ROWS:
        assert len(row.scores) == len(paper.BENCHMARKS)
        base = plain.get((row.family, row.frames))
        if base:  # nothing in the paper falls below 92 % or rises above 104 % of the plain model
            pairs = [(a, b) for a, b in zip(row.scores, base.scores, strict=True) if a is not None and b is not None]
            assert all(0.92 < a / b < 1.04 for a, b in pairs), row


def test_score_of_lmms_evals_results() -> None:
    first: dict[str, object] = {"acc,none": 40.0, "acc_stderr_clustered,none": 1.0, "alias": "a"}
    tasks = {"a": first, "b": {"acc,none": 60.0}, "all": {" ": ""}}
    samples = {"a": {"effective": 3}, "b": {"effective": 4}}
    assert score({"results": tasks, "n-samples": samples}, None) == ("acc", 50.0, 7)
    first["other,none"] = 1.0
    with pytest.raises(ResultsError, match=r"--metric acc\|other"):
        score({"results": tasks, "n-samples": samples}, None)
    assert score({"results": tasks, "n-samples": samples}, "other") == ("other", 1.0, 3)


def test_a_run_without_results_or_answers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="wrote no results"):
        collect(tmp_path, "plain", None, 32, None, None)
    results = {"results": {"a": {"acc,none": 40.0}}, "n-samples": {"a": {"effective": 3}}}
    (tmp_path / "1_results.json").write_text(json.dumps(results))
    with pytest.raises(ResultsError, match="no answer went through the guard"):
        collect(tmp_path, "plain", None, 32, None, None)
    line = {"content": "a", "prompt_tokens": 100, "video_tokens": 80, "kept": 40}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"content": "b", "prompt_tokens": 50}))
    failed = {"filtered_resps": "[LMMS_EVAL_REQUEST_FAILED after 1 retries] no"}
    (tmp_path / "1_samples_a.jsonl").write_text(json.dumps(failed) + "\n" + json.dumps({"filtered_resps": "B"}))
    found = collect(tmp_path, run_name(0.5, "flashvid"), 0.5, 32, None, None)
    assert found == Outcome("50 % flashvid", 0.5, 32, "acc", 40.0, 3, 1, 75, 80, 40, 1)
