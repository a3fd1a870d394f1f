# SPDX-License-Identifier: MIT
"""One cell of a load benchmark: clips sent to an OpenAI endpoint, some at a time or at a rate, and what came of it.

Requests, arrivals and percentiles are those of `vllm bench serve`. From a vLLM server come the peak use of the KV
cache too (/metrics) and, if it was started with `benchmarks.load.worker_times`, the times inside its worker.
"""

import asyncio
import contextlib
import io
import os
import re
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import numpy as np
import psutil
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_chat_completions,
)
from vllm.benchmarks.serve import calculate_metrics, get_request

from ..common.ask import video_url
from ..common.record import Cell

QUESTION = "What happens in this clip?"
PERCENTILES = (50, 95, 99)
POLL = 0.2  # seconds between two looks at /metrics and at the worker's memory
SEED = 0  # of the arrivals
USE = re.compile(r"^vllm:kv_cache_usage_perc\{[^}]*\} (\S+)", re.MULTILINE)
CACHE = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
MIB = 2**20


class LoadError(RuntimeError):
    """The endpoint is not there, refused a request, or does not tell what it should."""


@dataclass(frozen=True)
class Load:
    """How requests come: ``concurrency`` at a time, or ``rate`` a second (Poisson); exactly one of both is given."""

    requests: int
    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError(f"a load has a concurrency or a rate, got {self.concurrency} and {self.rate}")

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:g} a second"


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        url: up to before "/v1".
        model: the name that it serves under.
        version: vLLM's, None if it is another server.
        timed: whether it tells its worker's times.
        pid: of its worker, None if it does not tell or runs elsewhere.
        kv_tokens: that its KV cache holds, None if it does not tell.
    """

    url: str
    model: str
    version: str | None = None
    timed: bool = False
    pid: int | None = None
    kv_tokens: int | None = None


def connect(base_url: str, model: str | None = None, local: bool = False) -> Endpoint:
    """Find out what a server can tell. ``model``: its name there, None: the first one; ``local``: started by us.

    Raises LoadError if it does not answer as an OpenAI server does.
    """
    url = base_url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
    with httpx.Client(base_url=url, trust_env=not local, timeout=60, headers=headers) as http:
        try:
            served = [entry["id"] for entry in http.get("/v1/models").raise_for_status().json()["data"]]
            version = http.get("/version")
            is_vllm = version.status_code == 200 and "json" in version.headers.get("content-type", "")
            metrics = http.get("/metrics").text if is_vllm else ""
            times = http.post("/collective_rpc", json={"method": "worker_times"}) if is_vllm else version
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise LoadError(f"no OpenAI server at {url}: {error}; give --base-url http://HOST:PORT") from error
    if not served or (model is not None and model not in served):
        raise LoadError(f"{url} serves {', '.join(served) or 'nothing'}, not {model!r}")
    timed = is_vllm and times.status_code == 200
    info = dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if (found := CACHE.search(metrics)) else {}
    blocks = info.get("num_gpu_blocks", "")
    return Endpoint(
        url=url,
        model=model or served[0],
        version=str(version.json().get("version")) if is_vllm else None,
        timed=timed,
        pid=int(times.json()["results"][0]["pid"]) if timed and local else None,
        kv_tokens=int(blocks) * int(info["block_size"]) if blocks.isdigit() else None,
    )


class Monitor:
    """Looks at a server every POLL seconds: the share of its KV cache in use, its worker's resident memory."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        self.endpoint, self.session = endpoint, session
        self.process = psutil.Process(endpoint.pid) if endpoint.pid else None
        self.share: float | None = None
        self.rss = self.peak_rss = 0  # bytes, the highest seen: since somebody set it lower, and ever

    async def look(self) -> None:
        """Once."""
        if self.process is not None:
            now = self.process.memory_info().rss
            self.rss, self.peak_rss = max(self.rss, now), max(self.peak_rss, now)
        if self.endpoint.version is not None:
            async with self.session.get(f"{self.endpoint.url}/metrics") as response:
                if used := USE.findall(await response.text()):
                    self.share = max(self.share or 0.0, *map(float, used))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Monitor"]:
        """Look again and again while the context lasts. Raises what `look` does when it is left."""

        async def watch() -> None:
            while True:
                await self.look()
                await asyncio.sleep(POLL)

        task = asyncio.create_task(watch())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def worker_times(endpoint: Endpoint, session: aiohttp.ClientSession) -> Cell:
    """What the first worker measured since the last call. Raises LoadError if it does not tell."""
    async with session.post(f"{endpoint.url}/collective_rpc", json={"method": "worker_times"}) as response:
        if response.status != 200:
            raise LoadError(f"{endpoint.url} does not tell its worker's times: {await response.text()}")
        return dict((await response.json())["results"][0])


def request_for(endpoint: Endpoint, clip: Path, max_tokens: int) -> RequestFuncInput:
    """The question about a clip, as vLLM's benchmark sends it."""
    content = [{"type": "video_url", "video_url": {"url": video_url(clip)}}, {"type": "text", "text": QUESTION}]
    return RequestFuncInput(
        prompt="",
        chat_messages=[{"role": "user", "content": content}],
        api_url=f"{endpoint.url}/v1/chat/completions",
        prompt_len=0,
        output_len=max_tokens,
        model=endpoint.model,
        extra_body={"temperature": 0},
        ignore_eos=endpoint.version is not None,  # an answer of max_tokens from every server; others do not know it
    )


@dataclass
class Sent:
    """What a cell's requests gave: vLLM's outputs, worker times (one entry for all, or one for each), duration."""

    outputs: list[RequestFuncOutput]
    times: list[Cell]
    rises: list[int]  # bytes that the worker's memory rose by during each request, at one request at a time
    seconds: float = 0.0


async def send(
    endpoint: Endpoint,
    clips: Sequence[Path],
    load: Load,
    max_tokens: int,
    monitor: Monitor,
    session: aiohttp.ClientSession,
    done: Callable[[], None],
) -> Sent:
    """Send a request for each clip. Alone (a concurrency of 1), each one's times and memory are read after it."""
    requests = [request_for(endpoint, clip, max_tokens) for clip in clips]
    slots = asyncio.Semaphore(load.concurrency or len(requests))
    alone = load.concurrency == 1
    sent = Sent([RequestFuncOutput() for _ in requests], [], [])

    async def one(index: int) -> None:
        async with slots:
            if alone and monitor.process:
                before = monitor.rss = monitor.process.memory_info().rss
            sent.outputs[index] = await async_request_openai_chat_completions(requests[index], session)
            if not sent.outputs[index].success:
                raise LoadError(f"request {index} ({clips[index].name}) failed: {sent.outputs[index].error}")
            if alone and endpoint.timed:
                sent.times.append(await worker_times(endpoint, session))
            if alone and monitor.process:
                sent.rises.append(monitor.rss - before)
            done()

    np.random.seed(SEED)  # vLLM's arrivals are drawn from it
    rate = load.rate or float("inf")
    samples = [SampleRequest(prompt="", prompt_len=0, request_id=str(index)) for index in range(len(requests))]
    tasks = []
    start = time.perf_counter()
    try:
        async for sample, _ in get_request(samples, rate):
            tasks.append(asyncio.create_task(one(int(sample.request_id or 0))))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    sent.seconds = time.perf_counter() - start
    if endpoint.timed and not alone:
        sent.times.append(await worker_times(endpoint, session))
    return sent


async def measure(
    endpoint: Endpoint, clips: Sequence[Path], load: Load, max_tokens: int, done: Callable[[], None] = lambda: None
) -> Cell:
    """Run a cell: a request for each clip, ``done`` called after each.

    Returns:
        ``requests_per_s``, ``output_tokens_per_s``, ``prompt_tokens`` (median), ``completion_tokens``; ``ttft_ms`` and
        ``tpot_ms``: mean, p50, p95, p99 (tpot over answers of two tokens and more); ``kv``; ``worker``: milliseconds
        a request; at one request at a time ``each``: a list of what each took. What the endpoint does not tell is None.

    Raises:
        LoadError: a request failed, or the worker timed nothing.
    """
    if len(clips) != load.requests:
        raise ValueError(f"{load.requests} requests need as many clips, got {len(clips)}")
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=6 * 3600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        monitor = Monitor(endpoint, session)
        if endpoint.timed:
            await worker_times(endpoint, session)
        async with monitor.running():
            sent = await send(endpoint, clips, load, max_tokens, monitor, session, done)
    return summary(sent, endpoint, load, monitor)


def summary(sent: Sent, endpoint: Endpoint, load: Load, monitor: Monitor) -> Cell:
    """A cell's figures; as `measure` returns them."""
    with contextlib.redirect_stdout(io.StringIO()):  # it advertises
        metrics, lengths = calculate_metrics([], sent.outputs, sent.seconds, None, list(PERCENTILES), {})
    cell: Cell = {"seconds": sent.seconds, "requests_per_s": metrics.request_throughput}
    cell |= {"output_tokens_per_s": metrics.output_throughput, "completion_tokens": statistics.median(lengths)}
    cell["prompt_tokens"] = statistics.median(output.prompt_len for output in sent.outputs)
    for name in ("ttft", "tpot"):
        values = {f"p{p}": float(value) for p, value in getattr(metrics, f"percentiles_{name}_ms")}
        cell[f"{name}_ms"] = {"mean": float(getattr(metrics, f"mean_{name}_ms")), **values}
    share, size = monitor.share, endpoint.kv_tokens
    cell["kv"] = None
    if share is not None and size is not None:
        cell["kv"] = {"peak_share": share, "peak_tokens": round(share * size), "size_tokens": size}
    cell["worker"] = worker(sent.times, load.requests) if endpoint.timed else None
    cell["each"] = None
    if load.concurrency == 1:
        cell["each"] = [{"ttft_ms": 1e3 * output.ttft} for output in sent.outputs]
        for entry, times in zip(cell["each"], sent.times, strict=False):
            entry.update({f"{name}_ms": 1e3 * times[f"{name}_s"] for name in ("encoder", "compression", "prefill")})
        for entry, rise in zip(cell["each"], sent.rises, strict=False):
            entry["rss_rise_mib"] = rise / MIB
    cell["peak_rss_mib"] = monitor.peak_rss / MIB if monitor.process else None
    return cell


def worker(times: list[Cell], requests: int) -> Cell:
    """The worker's times: milliseconds a request, counts of the whole cell. Raises LoadError if there are none."""
    total = {name: sum(entry[name] for entry in times) for name in times[0] if name not in ("pid", "threads")}
    if not total["videos"] or not total["prefill_steps"]:
        raise LoadError(f"the worker timed no encoder or no prefill: {total}; this vLLM runs them in another way")
    names = ("encoder", "compression", "prefill", "decode")
    cell: Cell = {f"{name}_ms": 1e3 * total[f"{name}_s"] / requests for name in names}
    cell |= {name: total[name] for name in ("videos", "prefill_steps", "decode_steps", "prefill_tokens")}
    cell["threads"] = times[0]["threads"]
    cell["gpu_peak_mib"] = max(entry["peak_bytes"] for entry in times) / MIB if "peak_bytes" in times[0] else None
    return cell
