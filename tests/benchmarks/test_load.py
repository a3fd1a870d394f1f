# SPDX-License-Identifier: MIT
"""benchmarks.load: clips, the load put on an endpoint, its figures, and the worker's times."""

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from aiohttp import web
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

from benchmarks.common.clips import probe
from benchmarks.common.record import Cell
from benchmarks.load.clips import make_clips, windows
from benchmarks.load.measure import Endpoint, Load, LoadError, Monitor, Sent, connect, measure, summary
from benchmarks.load.worker_times import Stopwatch, WorkerTimes, prefill_tokens

# --- clips


def test_windows_are_all_different_and_the_sources_take_turns() -> None:
    found = windows({"a": 60, "b": 30}, 40, length=24, frames=8)
    assert len(set(found)) == 40
    assert [window.source for window in found[:6]] == ["a", "b"] * 3
    assert all(window.start + 24 <= {"a": 60, "b": 30}[window.source] for window in found)


def test_more_clips_than_can_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1000 different clips of 24 frames are wanted and 20 can be cut.*repeat"):
        windows({"a": 30}, 1000, length=24, frames=8)


@pytest.mark.longer("encodes clips twice")
def test_clips_are_distinct_and_the_same_every_time(tmp_path: Path) -> None:
    first, again = (make_clips(3, 24, 4, tmp_path / name) for name in ("a", "b"))
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in first}) == 3
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert {probe(path).frames for path in first} == {4}
    written = [path.stat().st_mtime_ns for path in first]
    assert make_clips(3, 24, 4, tmp_path / "a") == first
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


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets that many seconds pass on the clock that the worker reads."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("benchmarks.load.worker_times.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return sleep


def test_what_is_timed_inside_itself_counts_once(sleep: Callable[[float], None]) -> None:
    watch = Stopwatch(torch.device("cpu"))
    inner = watch.within("compression_s", lambda: sleep(0.05))
    watch.within("compression_s", inner)()
    assert watch.values["compression_s"] == pytest.approx(0.05)


def test_times_of_a_worker(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], None]) -> None:
    """A model that encodes for 40 ms, compresses for 20 ms and prefills for 60 ms."""
    module: Any = ModuleType("a_family")
    module.compress = lambda: sleep(0.02)
    monkeypatch.setitem(sys.modules, "a_family", module)

    class Model:
        def embed_multimodal(self, **kwargs: Any) -> None:
            sleep(0.04)
            module.compress()

    class Runner:
        model = Model()

        def get_model(self) -> Model:
            return self.model

        def execute_model(self, step: Any) -> None:
            if step.scheduled_new_reqs:
                self.model.embed_multimodal(pixels=1)
            sleep(0.06)

    Model.__module__ = "a_family"
    worker = WorkerTimes()
    worker.device, worker.model_runner = torch.device("cpu"), Runner()
    assert worker.worker_times()["videos"] == 0
    worker.model_runner.execute_model(step({"a": 100}, {}))
    worker.model_runner.execute_model(step({}, {"a": (1, 1)}))
    found = worker.worker_times()
    for name, seconds in (("encoder_s", 0.04), ("compression_s", 0.02), ("prefill_s", 0.06), ("decode_s", 0.06)):
        assert found[name] == pytest.approx(seconds), name
    counts = {name: found[name] for name in ("videos", "prefill_steps", "decode_steps", "prefill_tokens")}
    assert counts == {"videos": 1, "prefill_steps": 1, "decode_steps": 1, "prefill_tokens": 100}
    assert worker.worker_times()["encoder_s"] == 0


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
