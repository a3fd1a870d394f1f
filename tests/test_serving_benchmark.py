# SPDX-License-Identifier: MIT
"""benchmarks.serving and benchmarks.frames: clips, figures, resuming, reports; and small programmes on real servers."""

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from aiohttp import web
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.platforms import current_platform

from benchmarks import frames, load_runs, serving, serving_report
from benchmarks.clips import probe
from benchmarks.load import Endpoint, Load, LoadError, Monitor, Sent, connect, measure, summary
from benchmarks.load_clips import make_clips, windows
from benchmarks.load_runs import Group, Run, code_fingerprint, key_of, run_all
from benchmarks.load_servers import SHAPES, Target, common_arguments, compression, vllms_own_pruning
from benchmarks.record import Cell, Cells, write_json
from benchmarks.server import ServerError, VllmServer
from benchmarks.tiny_model import KINDS, make_tiny_model
from benchmarks.worker_times import Stopwatch, WorkerTimes, prefill_tokens
from flashvid_vllm import FlashVidConfig
from flashvid_vllm.budget import plan

# --- clips


def test_windows_are_all_different_and_the_sources_take_turns() -> None:
    found = windows({"a": 60, "b": 30}, 40, length=24, frames=8)
    assert len(set(found)) == 40
    assert [window.source for window in found[:6]] == ["a", "b"] * 3
    assert all(window.start + 24 <= {"a": 60, "b": 30}[window.source] for window in found)


def test_more_clips_than_can_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1000 different clips of 24 frames are wanted and 20 can be cut.*repeat"):
        windows({"a": 30}, 1000, length=24, frames=8)


def test_clips_are_distinct_and_the_same_every_time(tmp_path: Path) -> None:
    first, again = (make_clips(13, 24, 8, tmp_path / name) for name in ("a", "b"))
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in first}) == 13
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert {probe(path).frames for path in first} == {8}
    written = [path.stat().st_mtime_ns for path in first]
    assert make_clips(13, 24, 8, tmp_path / "a") == first
    assert [path.stat().st_mtime_ns for path in first] == written


# --- figures


def output(ttft: float, latency: float, tokens: int, prompt: int) -> RequestFuncOutput:
    return RequestFuncOutput(success=True, ttft=ttft, latency=latency, output_tokens=tokens, prompt_len=prompt)


def times(**values: Any) -> Cell:
    base = {"encoder_s": 0.2, "compression_s": 0.01, "prefill_s": 0.1, "decode_s": 0.05, "videos": 1}
    return base | {"prefill_steps": 1, "decode_steps": 3, "prefill_tokens": 90, "pid": 1, "threads": 1} | values


def test_percentiles_are_numpys() -> None:
    draw = np.random.default_rng(0)
    ttft, rest = draw.uniform(0.1, 2, 40), draw.uniform(0.1, 1, 40)
    outputs = [output(float(a), float(a + b), 11, 100) for a, b in zip(ttft, rest, strict=True)]
    endpoint = Endpoint("http://x", "m", "0.32", timed=True, kv_tokens=1000)
    monitor = Monitor(endpoint, SimpleNamespace())  # type: ignore[arg-type]
    monitor.share = 0.25
    cell = summary(Sent(outputs, [times(), times()], [], 8.0), endpoint, Load(40, concurrency=4), monitor)
    for name, values in (("ttft_ms", 1e3 * ttft), ("tpot_ms", 1e3 * rest / 10)):
        expected = {f"p{p}": np.percentile(values, p) for p in (50, 95, 99)} | {"mean": values.mean()}
        assert cell[name] == pytest.approx(expected)
    assert cell["requests_per_s"] == 5
    assert cell["output_tokens_per_s"] == pytest.approx(55)
    assert cell["kv"] == {"peak_share": 0.25, "peak_tokens": 250, "size_tokens": 1000}
    assert cell["worker"]["encoder_ms"] == pytest.approx(10)  # two readings of 0.2 s over 40 requests
    assert cell["worker"]["prefill_tokens"] == 180
    assert cell["each"] is None


def test_a_worker_that_timed_nothing_is_an_error() -> None:
    endpoint = Endpoint("http://x", "m", "0.32", timed=True)
    monitor = Monitor(endpoint, SimpleNamespace())  # type: ignore[arg-type]
    sent = Sent([output(0.1, 0.2, 4, 9)], [times(videos=0)], [], 1.0)
    with pytest.raises(LoadError, match="timed no encoder or no prefill"):
        summary(sent, endpoint, Load(1, concurrency=1), monitor)


def test_a_load_has_a_concurrency_or_a_rate() -> None:
    with pytest.raises(ValueError, match="a concurrency or a rate, got None and None"):
        Load(3)
    with pytest.raises(ValueError, match=r"a concurrency or a rate, got 2 and 0\.5"):
        Load(3, 2, 0.5)


# --- the worker's times


def step(new: dict[str, int], running: dict[str, tuple[int, int]]) -> Any:
    """A scheduler's output: tokens of new requests; (tokens, answered so far) of running ones."""
    cached = SimpleNamespace(req_ids=list(running), num_output_tokens=[made for _, made in running.values()])
    scheduled = new | {name: tokens for name, (tokens, _) in running.items()}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
    )


def test_prompt_tokens_of_a_step() -> None:
    assert prefill_tokens(step({"a": 100}, {"b": (40, 0), "c": (1, 3)})) == 140
    assert prefill_tokens(step({}, {"b": (1, 1), "c": (4, 3)})) == 0


def test_what_is_timed_inside_itself_counts_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    inner = watch.within("compression_s", lambda: time.sleep(0.05))
    watch.within("compression_s", inner)()
    assert 0.05 <= watch.values["compression_s"] < 0.09


def test_times_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that encodes for 40 ms, compresses for 20 ms and prefills for 60 ms."""
    module: Any = ModuleType("a_family")
    module.compress = lambda: time.sleep(0.02)
    monkeypatch.setitem(sys.modules, "a_family", module)

    class Model:
        def embed_multimodal(self, **kwargs: Any) -> None:
            time.sleep(0.04)
            module.compress()

    class Runner:
        model = Model()

        def get_model(self) -> Model:
            return self.model

        def execute_model(self, step: Any) -> None:
            if step.scheduled_new_reqs:
                self.model.embed_multimodal(pixels=1)
            time.sleep(0.06)

    Model.__module__ = "a_family"
    worker = WorkerTimes()
    worker.device, worker.model_runner = torch.device("cpu"), Runner()
    assert worker.worker_times()["videos"] == 0
    worker.model_runner.execute_model(step({"a": 100}, {}))
    worker.model_runner.execute_model(step({}, {"a": (1, 1)}))
    found = worker.worker_times()
    for name, seconds in (("encoder_s", 0.04), ("compression_s", 0.02), ("prefill_s", 0.06), ("decode_s", 0.06)):
        assert seconds <= found[name] < seconds + 0.03, name  # a shared machine sleeps longer
    counts = {name: found[name] for name in ("videos", "prefill_steps", "decode_steps", "prefill_tokens")}
    assert counts == {"videos": 1, "prefill_steps": 1, "decode_steps": 1, "prefill_tokens": 100}
    assert worker.worker_times()["encoder_s"] == 0


# --- servers


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


# --- cells


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    return make_clips(6, 24, 8, tmp_path / "clips")


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


# --- any endpoint


Handler = Callable[[web.Request], Any]


def endpoint_of(answer: Handler, check: Callable[[str], Any], **more: Handler) -> None:
    """Run ``check`` with the URL of an OpenAI server that answers chats with ``answer``, and ``more`` paths."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "some-model"}]})

    async def run() -> None:
        app = web.Application(client_max_size=2**26)
        app.add_routes([web.route("*", f"/{name}", handler) for name, handler in more.items()])
        app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            await check(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    asyncio.run(run())


async def stream(request: web.Request) -> web.StreamResponse:
    """An answer of four words, 50 ms each."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for index in range(4):
        await asyncio.sleep(0.05)
        chunk = {"choices": [{"index": 0, "delta": {"content": f"word {index}"}}]}
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
    usage = {"prompt_tokens": 77, "completion_tokens": 4}
    await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
    return response


def test_what_vllm_tells(clips: list[Path]) -> None:
    shares = iter([0.0, 0.25, 0.125, *[0.0] * 100])
    calls: list[Any] = []

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def metrics(_: web.Request) -> web.Response:
        share = next(shares)
        text = 'vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="10"} 1.0\n'
        return web.Response(text=f'{text}vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {share}\n')

    async def collective_rpc(request: web.Request) -> web.Response:
        calls.append(await request.json())
        return web.json_response({"results": [times()]})

    async def check(url: str) -> None:
        endpoint = await asyncio.to_thread(connect, url)
        assert endpoint == Endpoint(url, "some-model", "0.32.0", timed=True, kv_tokens=1280)
        cell = await measure(endpoint, clips[:3], Load(3, concurrency=1), 4)
        assert cell["kv"] == {"peak_share": 0.25, "peak_tokens": 320, "size_tokens": 1280}
        assert calls == [{"method": "worker_times"}] * 5  # connecting, beginning, after each request
        assert cell["worker"]["encoder_ms"] == pytest.approx(200)
        assert [entry["prefill_ms"] for entry in cell["each"]] == pytest.approx([100] * 3)

    endpoint_of(stream, check, version=version, metrics=metrics, collective_rpc=collective_rpc)


def test_any_openai_endpoint_will_do(clips: list[Path]) -> None:
    bodies: list[Any] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await stream(request)

    async def check(url: str) -> None:
        endpoint = await asyncio.to_thread(connect, url + "/v1/")
        assert endpoint == Endpoint(url, "some-model")
        done: list[int] = []
        for load in (Load(3, concurrency=1), Load(3, rate=50.0)):
            cell = await measure(endpoint, clips[:3], load, 4, lambda: done.append(1))
            assert cell["prompt_tokens"] == 77
            assert 45 <= cell["ttft_ms"]["p50"] < 500
            assert 45 <= cell["tpot_ms"]["p50"] < 500
            assert (cell["kv"], cell["worker"]) == (None, None)
        assert len(done) == 6
        assert not any("ignore_eos" in body for body in bodies)
        urls = [body["messages"][0]["content"][0]["video_url"]["url"] for body in bodies[:3]]
        assert len(set(urls)) == 3
        with pytest.raises(LoadError, match="serves some-model, not 'another'"):
            await asyncio.to_thread(connect, url, "another")

    endpoint_of(chat, check)


def test_a_request_that_fails_ends_the_cell(clips: list[Path]) -> None:
    async def chat(_: web.Request) -> web.Response:
        return web.Response(status=500, reason="Out of tokens")

    async def check(url: str) -> None:
        with pytest.raises(LoadError, match=r"request 0 \(.*mp4\) failed: Out of tokens"):
            await measure(Endpoint(url, "some-model"), clips[:2], Load(2, concurrency=1), 4)

    endpoint_of(chat, check)


def test_nothing_listens() -> None:
    with pytest.raises(LoadError, match=r"no OpenAI server at http://127\.0\.0\.1:9: .*--base-url"):
        connect("http://127.0.0.1:9/v1")


# --- reports


def fabricated(server: str, load: Load, ttft: float, frame_count: int = 16) -> Cell:
    """A cell whose TTFT [ms] is 70 % encoder, 20 % prefill and, but for plain, 1 % compression."""
    share = 0.0 if server == "plain" else 0.01
    parts = {"encoder_ms": 0.7 * ttft, "compression_ms": share * ttft, "prefill_ms": 0.2 * ttft}
    single = load.concurrency == 1
    return {
        "server": server, "peer": "vLLM's", "model": "m", "about": "a model", "frames": frame_count, "ratio": 0.1,
        "budget": 784, "load": load.name, "requests": load.requests, "concurrency": load.concurrency,
        "rate": load.rate, "seconds": 1.0, "requests_per_s": 1000 / ttft, "prompt_tokens": 800, "each": None,
        "output_tokens_per_s": 1.0, "completion_tokens": 16, "key": "k", "peak_rss_mib": 2000.0,
        "ttft_ms": {"mean": ttft, "p50": ttft, "p95": 2 * ttft, "p99": 3 * ttft},
        "tpot_ms": {"mean": 20.0, "p50": 20.0, "p95": 30.0, "p99": 40.0},
        "kv": {"peak_share": 0.5, "peak_tokens": 4321, "size_tokens": 8642},
        "worker": {**parts, "threads": 1, "gpu_peak_mib": None},
    } | ({"each": [{"ttft_ms": ttft, **parts, "rss_rise_mib": 0.1 * ttft}] * 2} if single else {})  # fmt: skip


def results(cells: list[Cell]) -> Cell:
    servers = [{"server": "plain", "model": "m", "arguments": "--a-flag"}]
    settings = {"max_tokens": 16, "clips": "no clip twice", "servers": servers, "environment": {}}
    return {"machine": {"cpu": "a CPU", "cores": 2, "gpu": "none"}, "settings": settings, "cells": cells}


def row(text: str, *start: str) -> list[str]:
    """The cells of the one row of a Markdown table that starts like this."""
    (found,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return [part.strip() for part in found.strip("|").split("|")]


def test_tables_and_plot_of_serving(tmp_path: Path) -> None:
    loads = [Load(6, concurrency=1), Load(6, concurrency=8), Load(12, rate=0.5), Load(12, rate=1.0)]
    speed = {"plain": 2000.0, "evs": 1000.0, "vidcom2": 1100.0, "flashvid": 500.0}
    cells = [fabricated(server, load, ttft) for server, ttft in speed.items() for load in loads]
    write_json(results(cells), tmp_path / "serving.json")
    found = json.loads((tmp_path / "serving.json").read_text())
    serving_report.write_markdown(found, tmp_path / "serving.md")
    text = (tmp_path / "serving.md").read_text()
    single = ["flashvid", "800", "0.50 [0.50, 0.50]", "0.25", "350.0", "5.0", "100.0", "45.0", "1.00%"]
    assert row(text, "flashvid", "800") == single
    assert row(text, "plain", "800")[3] == ""
    eight = row(text, "8 at a time (6)", "flashvid")
    assert eight[2:6] == ["2.00", "4.00", "0.50 / 1.00 / 1.50", "0.25"]
    assert eight[-2:] == ["350.0 / 5.0 / 100.0", "4321 (50.0%)"]
    assert "--a-flag" in text
    assert str(tmp_path) not in text
    serving_report.write_plot(found, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 20_000
    assert [len(table.rows) for table in serving_report.tables(found)] == [4, 16]


def test_what_an_endpoint_does_not_tell_is_a_question_mark(tmp_path: Path) -> None:
    cells = [fabricated("endpoint", load, 500.0) for load in (Load(2, concurrency=1), Load(2, rate=1.0))]
    for cell in cells:
        cell |= {"worker": None, "kv": None, "frames": 0}
    serving_report.write_markdown(results(cells), tmp_path / "serving.md")
    text = (tmp_path / "serving.md").read_text()
    assert row(text, "endpoint", "800")[3:] == ["", "?", "?", "?", "?", "?"]
    assert row(text, "1 a second (2)", "endpoint")[-2:] == ["?", "?"]
    serving_report.write_plot(results(cells), tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 5_000


def test_table_and_plot_of_frames(tmp_path: Path) -> None:
    load = Load(2, concurrency=1)
    speed = {"plain": 100.0, "flashvid": 60.0}
    cells = [fabricated(server, load, s * n, n) for server, s in speed.items() for n in (16, 160)]
    found = results(cells)
    frames.write_markdown(found, tmp_path / "frames.md")
    text = (tmp_path / "frames.md").read_text()
    assert "at most 784\nvisual tokens" in text
    expected = ["800", "9.60 [9.60, 9.60]", "0.60", "6720.0 / 96.0 / 1920.0 / 864.0", "4321", "960", "2000"]
    assert row(text, "160", "flashvid")[2:] == expected
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| 1")]
    assert order == ["16", "16", "160", "160"]
    frames.write_plot(found, tmp_path / "frames.png")
    assert (tmp_path / "frames.png").stat().st_size > 20_000
    assert len(frames.table(found).rows) == 4


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--servers", "plain,best"], "servers are plain, evs, vidcom2, flashvid, got best"),
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


def several_servers(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that takes a minute or more."""
    quick = pytest.mark.skipif(os.environ.get("FLASHVID_TESTS") == "quick", reason="several servers; make test-full")
    return pytest.mark.slow(pytest.mark.longer(quick(test)))


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cells go here, not to those of the developer's own runs."""
    monkeypatch.setattr(load_runs, "cache_directory", lambda: tmp_path / "clips")
    return tmp_path


def call(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line's exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    return int(module.main())


@several_servers
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


@several_servers
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


@several_servers
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


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(
    own_store: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(make_tiny_model("llava_onevision_clip", own_store / "tiny"))
    target = Target("tiny", "tiny", model, "tiny")
    arguments = (*common_arguments(target, FRAMES, clips[0], False), "--no-such-option")
    about = {"server": "plain", "model": "tiny", "frames": FRAMES}
    asked = Group((Run(about, Load(1, 1), tuple(clips[1:2])),), 4, clips[0], target, arguments)
    with pytest.raises(ServerError, match="no-such-option"):
        run_all([asked], Cells(own_store / "cells.jsonl", lambda cell: cell["key"]))
