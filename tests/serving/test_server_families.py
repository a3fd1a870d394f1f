# SPDX-License-Identifier: MIT
"""`vllm serve --plugin flashvid` for every processor of videos: usage as planned. And two engines behind one server."""

import concurrent.futures
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.clips import clip
from benchmarks.common.server import VllmServer
from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan

from ..support.families import LLAVA_ONEVISION, LLAVA_VIDEO, QWEN3_VL, Family
from .test_server import SERVE, ask, metrics_of

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.longer("a server for each"),
]

# of the clip "bikes" (10 s of 640 x 272): temporal positions, tokens at each, and by how much the separators' number
# falls when the video is compressed, for what each family's vLLM processor makes of it (Qwen3.5's is Qwen3-VL's)
GRIDS: list[tuple[Family, int, int, Callable[[int], int]]] = [
    (QWEN3_VL, 10, 160, lambda _: 0),
    (LLAVA_ONEVISION, 32, 16, lambda _: 0),
    (LLAVA_VIDEO, 32, 16, lambda t: t * 4 - t),  # a newline after each of 4 rows; compressed, after each frame
]


@pytest.mark.usefixtures("forking_servers")
@pytest.mark.parametrize(("family", "num_frames", "n", "fewer_separators"), GRIDS, ids=[g[0].kind for g in GRIDS])
def test_usage_falls_exactly_as_planned(
    family: Family, num_frames: int, n: int, fewer_separators: Callable[[int], int], tmp_path: Path
) -> None:
    directory = family.make(tmp_path / family.kind)
    serve = [*SERVE, "--dtype", family.engine_options["dtype"]]
    with VllmServer(directory, "--plugin", "flashvid", "--flashvid-retention-ratio", "0.25", *serve) as server:
        video = clip("bikes")
        plain = ask(server, {"enabled": False}, video).usage.prompt_tokens
        requests: list[tuple[Any, dict[str, Any]]] = [
            (None, {"retention_ratio": 0.25}),
            ({"retention_ratio": 0.1}, {"retention_ratio": 0.1}),
            ({"token_budget": 7}, {"token_budget": 7}),  # fewer than frames
            ({"retention_ratio": 1}, {"retention_ratio": 1}),
        ]
        for request, settings in requests:
            kept = plan(num_frames, n, FlashVidConfig(**settings)).tokens
            dropped = num_frames * n - kept
            expected = plain - dropped - (fewer_separators(num_frames) if dropped else 0)
            assert ask(server, request, video).usage.prompt_tokens == expected
        assert plain > num_frames * n


@pytest.mark.usefixtures("forking_servers")
def test_original_positions_refuse_what_goes_beyond_the_models(tmp_path: Path) -> None:
    """Videos that fit once compressed get 400 with the remedy; other requests, with them too, never notice."""
    directory = LLAVA_ONEVISION.make(tmp_path / "model")
    limits = ["--max-model-len", "600", "--hf-overrides", '{"text_config": {"max_position_embeddings": 600}}']
    settings = ["--flashvid-retention-ratio", "0.25", "--flashvid-config", '{"positions": "original"}']
    bikes, rabbit = clip("bikes"), clip("bigbuckbunny")
    with VllmServer(directory, "--plugin", "flashvid", *settings, *SERVE, *limits) as server:
        stream = ask(server, stream=True, stream_options={"include_usage": True}, max_tokens=200)
        next(iter(stream))  # it is running
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match=r"before compression this prompt has 10\d\d tokens.*600"):
                ask(server, video=[bikes, rabbit])
        # neither is in the engine, whatever the API server's cache of processed media has
        assert [ask(server, video=video).usage.completion_tokens for video in (bikes, rabbit, bikes)] == [4, 4, 4]
        with pytest.raises(openai.BadRequestError, match="the server chooses the positions"):
            ask(server, {"positions": "consecutive"}, bikes)
        assert [chunk.usage.completion_tokens for chunk in stream if chunk.usage] == [200]


def finished_by_engine(server: VllmServer) -> dict[str, float]:
    """Engine -> the requests that it has finished."""
    text = httpx.get(f"{server.base_url}/metrics", trust_env=False).text
    finished: dict[str, float] = {"0": 0, "1": 0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                finished[sample.labels["engine"]] += sample.value
    return finished


@pytest.mark.usefixtures("forking_servers")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each engine")
def test_two_data_parallel_engines(tmp_path: Path) -> None:
    """Whichever engine answers, the answer and the usage are those of one engine."""
    directory = QWEN3_VL.make(tmp_path / "model")
    requests = [(clip(name), ratio) for name in ("bikes", "bigbuckbunny") for ratio in (0.05, 0.1, 0.3)]
    # one video at two ratios, many times: it is in both engines' caches, at both
    requests += [(clip("bikes"), 0.1), (clip("bikes"), 0.3)] * 4
    answers = []
    for engines in (1, 2):
        options = ["--plugin", "flashvid", *SERVE]
        if engines == 2:
            options += ["--data-parallel-size", "2"]
        with VllmServer(directory, *options) as server:

            def answer(request: tuple[Path, float], server: VllmServer = server) -> tuple[str, int]:
                done = ask(server, {"retention_ratio": request[1]}, request[0], max_tokens=8)
                return done.choices[0].message.content, done.usage.prompt_tokens

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers.append(list(pool.map(answer, requests * 2)))
            if engines == 2:
                assert min(finished_by_engine(server).values()) > 0
                assert metrics_of(server)["flashvid:videos_total"] >= len(set(requests))  # of both engines together
    assert answers[0] == answers[1]
