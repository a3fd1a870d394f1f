# SPDX-License-Identifier: MIT
"""`make gpu` where there is no GPU: what is kept, the time, refusals, reports, and the commands that it would run."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import device, parts, read, report, sanitizer, session
from benchmarks.gpu.first_request import compiled
from benchmarks.gpu.session import Found, Part, Ran, Session
from benchmarks.ops.__main__ import Row

Make = Callable[..., Part]
H100 = device.Device("NVIDIA H100 80GB HBM3", "570.1", 81559, "9.0")


def by_code(ran: Ran) -> Found:
    """0 passed, 1 failed; whatever else has no results."""
    return Found({0: "passed", 1: "failed"}[ran.code], text=(ran.log.strip(),), figures=ran.code)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A line for each part that ran."""
    path = tmp_path / "runs"
    path.touch()
    return path


@pytest.fixture
def make(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(session, "PATIENCE", 0.5)

    def part(name: str, script: str = "exit 0", least: float = 0, most: float = 30, **others: Any) -> Part:
        script = f"echo {name} >> {runs}; {script}"
        return Part(name, "?", ("-c", script), least, most, by_code, program=("/bin/sh",), **others)

    return part


def verdicts(results: list[session.Result]) -> list[str]:
    return [result.verdict for result in results]


# --- what is kept


def test_what_has_finished_is_not_run_again_and_what_has_not_is(make: Make, runs: Path, tmp_path: Path) -> None:
    some = [make("well"), make("wrong", "exit 1"), make("crash", "kill -9 $$"), make("absent", missing="no tool")]
    for expected in (["well", "wrong", "crash"], ["crash"]):
        runs.write_text("")
        results = Session(tmp_path / "state", 60).run_all(some)
        assert verdicts(results) == ["passed", "failed", "broken", "not there"]
        assert runs.read_text().split() == expected
    assert [result.figures for result in results[:2]] == [0, 1]
    runs.write_text("")
    Session(tmp_path / "state", 60).run_all([some[0], make("wrong", "exit 0")], again=["well"])
    assert runs.read_text().split() == ["well", "wrong"]  # asked for; another command
    runs.write_text("")
    assert verdicts(Session(tmp_path / "state", 60).run_all(some, only=["absent"])) == [
        "passed", "left out", "left out", "not there",
    ]  # fmt: skip
    assert not runs.read_text()


def test_a_state_that_was_cut_off_is_run_again(make: Make, runs: Path, tmp_path: Path) -> None:
    Session(tmp_path, 60).run_all([make("well")])
    kept = tmp_path / "well.json"
    kept.write_text(kept.read_text()[:40])
    assert verdicts(Session(tmp_path, 60).run_all([make("well")])) == ["passed"]
    assert runs.read_text().split() == ["well", "well"]


def test_results_of_an_earlier_run_are_not_read_for_this_ones(make: Make, tmp_path: Path) -> None:
    Session(tmp_path, 60).run_all([make("well", f"touch {tmp_path}/well/rows.json; exit 2")])
    Session(tmp_path, 60).run_all([make("well", "exit 2")])
    assert not (tmp_path / "well" / "rows.json").exists()


def test_ctrl_c_ends_the_session_and_keeps_what_there_is(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited, seen = session.run_limited, []

    def run_limited(command: Any, *rest: Any) -> int | None:
        if "interrupt" in command[-1]:
            raise KeyboardInterrupt
        return limited(command, *rest)

    monkeypatch.setattr(session, "run_limited", run_limited)
    some = [make("well"), make("interrupted", "interrupt"), make("last")]
    results = Session(tmp_path, 60).run_all(some, after=lambda so_far: seen.append(len(so_far)))
    assert verdicts(results) == ["passed", "broken", "no time"]
    assert seen == [1, 2, 3]


# --- the time


def test_a_part_that_would_not_fit_is_not_begun(make: Make, runs: Path, tmp_path: Path) -> None:
    results = Session(tmp_path, 20).run_all([make("long", least=25), make("short")])
    assert verdicts(results) == ["no time", "passed"]
    assert results[0].why.startswith("it needs 25 s at least, 19 s were left")
    assert runs.read_text().split() == ["short"]


@pytest.mark.parametrize(("seconds", "most"), [(60, 0.3), (0.8, 30)], ids=["its own limit", "the session's"])
def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(
    make: Make, tmp_path: Path, seconds: float, most: float
) -> None:
    start = time.monotonic()
    hung = make("hung", f"trap '' TERM; (trap '' TERM; exec sleep 60) & echo $! > {tmp_path}/child; wait", most=most)
    (result,) = Session(tmp_path, seconds).run_all([hung])
    assert (result.verdict, result.finished) == ("out of time", False)
    assert time.monotonic() - start < 20
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    for _ in range(100):
        if not child.exists() or "(sleep) Z" in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("a process was left behind")


def test_the_budget_leaves_time_to_stop_what_runs(tmp_path: Path) -> None:
    assert session.PATIENCE >= 25  # a server's: VllmServer.stop
    assert Session(tmp_path, 100).left() <= 100 - session.PATIENCE
    everything = parts.parts(tmp_path, None, "")
    assert all(0 < part.least < part.most < 60 * gpu.MINUTES for part in everything)
    assert sum(part.least for part in everything) < 60 * gpu.MINUTES - session.PATIENCE  # all can be begun


# --- the GPU


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "tesla-t4"),
        ("NVIDIA RTX 6000 Ada/x", "rtx-6000-ada-x"), ("", "unnamed"),
    ],
)  # fmt: skip
def test_names_of_files(name: str, slug: str) -> None:
    assert replace(H100, name=name).slug == slug


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_gpu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 'NVIDIA H100 80GB HBM3, 570.1, 81559, 9.0'; echo 'NVIDIA T4, 1, 2, 3'", monkeypatch)
    assert device.find() == H100


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no nvidia-smi"),
        ("echo 'No devices were found'; exit 6", "it says 'No devices were found'"),
        ("exit 9", "it says 'nothing'"),
        ("echo 'Tesla T4, 570.1, 15360, 7.5'; exit 15", "it says 'Tesla T4"),  # a GPU that was lost
        ("echo 'Driver/library version mismatch'", "version mismatch"),
    ],
)
@pytest.mark.parametrize("main", [gpu.main, lambda _: device.main()], ids=["make gpu", "before set-up"])
def test_without_a_gpu_it_says_so_in_a_line(
    script: str | None, said: str, main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        nvidia_smi(tmp_path, script, monkeypatch)
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make gpu needs an NVIDIA GPU")
    assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_torch_that_does_not_see_the_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "find", lambda: H100)
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"torch {torch.__version__} does not see it: rm -rf .venv && make gpu DEVICE=cuda" in line


# --- a session


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[Part]], None]:
    monkeypatch.setattr(gpu, "device_with_torch", lambda: H100)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def with_parts(some: list[Part]) -> None:
        monkeypatch.setattr(gpu.parts_module, "parts", lambda *_: some)

    return with_parts


def test_a_session_from_end_to_end(make: Make, runs: Path, tmp_path: Path, on_h100: Any) -> None:
    wrong = make("wrong", "echo '| a | b |'; exit 1")
    on_h100([wrong, make("well"), make("absent", missing="there is no tool")])
    for _ in range(2):
        assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    assert runs.read_text().split() == ["wrong", "well"]
    written = (tmp_path / "out" / "gpu-h100-80gb-hbm3.md").read_text()
    for expected in ("# On a GPU: NVIDIA H100 80GB HBM3", "| wrong | failed |", "| well | passed |",
                     "| absent | not there | 0 |", "there is no tool", "## wrong: failed", "\n| a | b |\n",
                     "driver 570.1", f"torch {torch.__version__}"):  # fmt: skip
        assert expected in written, expected
    found = json.loads((tmp_path / "out" / "gpu-h100-80gb-hbm3.json").read_text())
    assert [(part["name"], part["verdict"], part["figures"]) for part in found["parts"]] == [
        ("wrong", "failed", 1), ("well", "passed", 0), ("absent", "not there", None),
    ]  # fmt: skip
    assert found["machine"]["driver"] == "570.1"
    on_h100([make("well"), make("absent", missing="there is no tool")])
    assert gpu.main(["--output", str(tmp_path / "out")]) == 0
    assert gpu.main(["--output", str(tmp_path / "out"), "--again", "all"]) == 0
    assert runs.read_text().split() == ["wrong", "well", "well"]


def test_a_part_that_is_not_there_is_refused(make: Make, on_h100: Any, capsys: pytest.CaptureFixture[str]) -> None:
    on_h100([make("a"), make("b")])
    assert gpu.main(["--again", "c,a"]) == 2
    assert capsys.readouterr().err == "parts are a, b, got c\n"


def test_a_change_of_the_code_is_another_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    source = tmp_path / "kernels" / "ops" / "a.py"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    first = gpu.code_key()
    (tmp_path / "benchmarks").mkdir()
    assert gpu.code_key() == first
    source.write_text("2")
    assert gpu.code_key() != first


def test_a_report_is_no_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each run would begin anew, in the folder of the code with its report."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "benchmarks" / "results")
    before = gpu.code_key()
    report.write(gpu.RESULTS, H100, {"device": "a"}, [])
    assert gpu.code_key() == before


# --- the commands


@pytest.mark.longer("imports vLLM's benchmarks")
@pytest.mark.parametrize("model", [None, "Qwen/Some-Model"])
def test_every_command_is_one_that_there_is(model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module, and options that it takes with values that it takes."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):  # which benchmarks.memory sets
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    seen = {}
    for part in parts.parts(tmp_path, model, "none is there"):
        dash, module, *arguments = part.command
        assert dash == "-m"
        if module == "pytest":
            continue
        main = importlib.import_module(module)
        main = importlib.import_module(f"{module}.__main__") if hasattr(main, "__path__") else main
        seen[part.name] = main.parse(arguments) if hasattr(main, "parse") else main.make_parser().parse_args(arguments)
    assert set(seen) == {*sanitizer.TOOLS, "ops", "first-request", "serving", "frames", "memory"}
    for name in ("serving", "frames"):
        assert seen[name].model == model
        assert (seen[name].shape == parts.SHAPE) == (model is None)
    assert all(getattr(options, "output", tmp_path).is_relative_to(tmp_path) for options in seen.values())


def test_the_sanitizers_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: str(tmp_path / "compute-sanitizer"))
    part = parts.watched("racecheck")
    assert part.shown == (
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --report-api-errors no "
        "--launch-timeout 600 --error-exitcode 9 python -m benchmarks.gpu.kernels"
    )
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    (result,) = Session(tmp_path, 60).run_all([parts.watched("memcheck")])
    assert (result.verdict, "CUDA toolkit" in result.why) == ("not there", True)


def hub_of(folder: Path, models: dict[str, tuple[str, int]]) -> Path:
    for name, (architecture, size) in models.items():
        snapshot = folder / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        if size:
            (snapshot / "model.safetensors").write_bytes(b"x" * size)
    return folder


def test_the_largest_model_that_fits_is_served(tmp_path: Path) -> None:
    qwen = "Qwen2_5_VLForConditionalGeneration"
    hub = hub_of(
        tmp_path / "hub",
        {"a/large": (qwen, 90), "a/small": (qwen, 5), "a/fits": (qwen, 60), "a/text": ("GPT2LMHeadModel", 61),
         "a/settings": (qwen, 0)},
    )  # fmt: skip
    choose = partial(parts.choose_model, hub=hub, memory_bytes=100)
    assert choose(None) == ("a/fits", "")
    assert choose("a/large") == ("a/large", "")
    assert parts.choose_model(None, hub, 1)[1].endswith("or it does not fit")
    assert parts.choose_model(None, tmp_path / "none", 100)[0] is None
    snapshot = hub / "models--a--small" / "snapshots" / "abc"
    assert choose(str(snapshot)) == (str(snapshot), "")
    for asked, message in (
        ("a/other", r"hf download a/other\); there: a/small, a/fits, a/large"),
        (str(hub), "MODEL must hold weights of Qwen2_5_VL"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(asked)


# --- what is read

DONE = "every kernel ran: 14 in 600 launches, Triton's alone\n"
CLEAN = f"========= COMPUTE-SANITIZER\n{DONE}========= ERROR SUMMARY: 0 errors\n"
INVALID = f"""========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at match_kernel+0x1230 in match.py:52
=========     by thread (33,0,0) in block (1,0,0)
=========
{DONE}========= ERROR SUMMARY: 1 error
"""
RACES = "========= RACECHECK SUMMARY: {} hazard{} displayed ({} error{}, {} warnings)\n"


@pytest.mark.parametrize(
    ("tool", "log", "count"),
    [
        ("memcheck", CLEAN, 0), ("memcheck", INVALID, 1), ("initcheck", CLEAN.replace("0 errors", "12 errors"), 12),
        ("racecheck", DONE + RACES.format(0, "s", 0, "s", 0), 0),
        ("racecheck", DONE + RACES.format(1, "", 1, "", 0), 1),
        ("racecheck", DONE + RACES.format(3, "s", 0, "s", 3), 3),
        ("memcheck", CLEAN + CLEAN.replace("0 errors", "2 errors"), 2),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(tool: str, log: str, count: int, tmp_path: Path) -> None:
    found = read.watched(Ran(9 if count else 0, log, tmp_path), tool)
    assert found.figures["count"] == count
    assert found.verdict == ("failed" if count else "passed")
    assert "every kernel ran: 14" in found.why
    if log == INVALID:
        assert found.figures["kernels"] == ("match_kernel",)
        assert found.text[0] == "- Invalid __global__ read of size 4 bytes"


@pytest.mark.parametrize(
    ("tool", "log", "message"),
    [
        ("memcheck", DONE, "no summary"),
        ("racecheck", CLEAN, "no summary"),  # of another tool
        ("memcheck", "Segmentation fault\n========= ERROR SUMMARY: 0 errors\n", "did not come to its end"),
        ("racecheck", "Traceback\n" + RACES.format(0, "s", 0, "s", 0), "did not come to its end"),
    ],
)
def test_a_sanitizer_that_watched_nothing_is_no_pass(tool: str, log: str, message: str, tmp_path: Path) -> None:
    part = replace(parts.watched(tool), program=(sys.executable,))
    found = session.read(part, Ran(0, log, tmp_path))
    assert found.verdict == "broken"
    assert message in found.why


def test_a_clean_summary_of_a_program_that_failed_is_no_pass(tmp_path: Path) -> None:
    assert read.watched(Ran(1, CLEAN, tmp_path), "memcheck").verdict == "failed"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_gpu" name="test_x[1]"><properties>
<property name="near tie" value="select: frame 3"/><property name="figure" value="812 MiB"/>
<property name="cpu_seconds" value="1"/></properties></testcase>
<testcase classname="tests.ops.test_gpu" name="test_y"><skipped message="no CUDA part"/></testcase>{}
</testsuite></testsuites>"""
FAILURE = '<testcase classname="tests.ops.test_gpu" name="test_z"><failure message="assert 1 == 2&#10;x"/></testcase>'


@pytest.mark.parametrize("failure", ["", FAILURE])
def test_what_the_tests_came_to(failure: str, tmp_path: Path) -> None:
    (tmp_path / read.REPORT).write_text(JUNIT.format(failure))
    found = read.tests(Ran(int(bool(failure)), "", tmp_path))
    assert found.verdict == ("failed" if failure else "passed")
    assert f"| ops/test_gpu.py | 1 | {int(bool(failure))} | 1 |" in found.text
    for line in ("- skipped: no CUDA part (1)", "- near tie: test_x[1]: select: frame 3", "- test_x[1]: 812 MiB"):
        assert line in found.text
    assert ("- failed: assert 1 == 2 (1 of ops/test_gpu.py)" in found.text) == bool(failure)


def test_no_test_that_ran_is_no_pass(tmp_path: Path) -> None:
    skipped = '<testsuites><testsuite><testcase classname="tests.a" name="b"><skipped message="no GPU"/></testcase>'
    (tmp_path / read.REPORT).write_text(f"{skipped}</testsuite></testsuites>")
    with pytest.raises(RuntimeError, match="ran 0 tests"):
        read.tests(Ran(0, "", tmp_path))


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_rows_of_the_operations(by: str, tmp_path: Path) -> None:
    row = Row("8 x 4 x 2 scene", "compress", by, 0.002, 0.001, 0.003, 1e-4, 12, 1.0, {"EVS": 0.5, "VidCom2": 0.25})
    length = {"frames": 16, "method": "flashvid", "by": by, "median_s": 1, "fastest_s": 1, "slowest_s": 1,
              "features_bytes": 2**20, "peak_bytes": None}  # fmt: skip
    about = {"device": "x", "commit": "y"}
    entries = [about | entry for entry in (vars(row), length)]
    (tmp_path / read.ROWS).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = read.operations(Ran(0, "", tmp_path))
    assert found.verdict == ("passed" if by == "triton" else "failed")  # a GPU's row is what it is for
    text = "\n".join(found.text)
    for expected in ("### The whole compression", f"| {by} | 2 |", "| 0.25 | 0.50 |", "### The cost in the number"):
        assert expected in text, text
    assert "Op by op" not in text


@pytest.mark.parametrize("variants", [0, 9])
def test_a_first_request_that_compiled_nothing_had_no_triton(variants: int, tmp_path: Path) -> None:
    request = {"clip": "bikes", "ratio": 0.1, "prompt_tokens": 214, "variants": 0}
    cells = [{"request": "start-up", "seconds": 30.0, "variants": variants}]
    cells += [{"request": name, "seconds": seconds, **request} for name, seconds in (("first", 4.0), ("again", 0.5))]
    (tmp_path / "first_request.json").write_text(json.dumps({"cells": cells}))
    found = read.first_request(Ran(0, "", tmp_path))
    assert found.verdict == ("passed" if variants else "failed")
    assert f"| start-up |  |  |  | 30.000 | {variants} |" in found.text
    assert "| first | bikes | 10% | 214 | 4.000 | 0 |" in found.text
    assert ("4.00 s to its first token, 0.50 s again" in found.why) == bool(variants)


def test_variants_of_other_kernels_do_not_count(tmp_path: Path) -> None:
    for name in ("abc/gram_kernel.cubin", "abc/gram_kernel.ptx", "def/gram_kernel.cubin", "ghi/vllms_kernel.cubin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert compiled(tmp_path, {"gram_kernel", "select_kernel"}) == 2


@pytest.mark.parametrize("name", ["operations", "first_request", "memory", "serving", "frames"])
def test_what_failed_is_not_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="it failed"):
        getattr(read, name)(Ran(1, "", tmp_path))


@pytest.mark.longer("imports vLLM's benchmarks")
@pytest.mark.parametrize("name", ["serving", "frames"])
def test_committed_results_are_read(name: str, tmp_path: Path) -> None:
    """The same files as those of a CPU's run, which are there."""
    (tmp_path / f"{name}.json").write_text((gpu.RESULTS / f"{name}.json").read_text())
    found = getattr(read, name)(Ran(0, "", tmp_path))
    assert found.verdict == "passed"
    assert sum(line.startswith("|") for line in found.text) > 8


def test_the_memorys_table_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "encoder-memory.md").write_text((gpu.RESULTS / "encoder-memory.md").read_text())
    found = read.memory(Ran(0, "", tmp_path))
    assert found.figures[0].startswith("| frames |")
    assert len(found.figures) >= 5
    assert not any(line.startswith("# ") for line in found.text)
