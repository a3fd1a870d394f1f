# SPDX-License-Identifier: MIT
"""A real `vllm serve --plugin flashvid`, a real clip, the `openai` client."""

import concurrent.futures
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.ask import video_url
from benchmarks.common.clips import clip
from benchmarks.common.server import VllmServer
from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan

from ..core.test_settings import BAD_REQUESTS
from ..support.forks import Fork, forking, serve

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

QUESTION = "What happens in this clip?"
SERVE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "8192", "--max-num-batched-tokens", "8192"]


@pytest.fixture(scope="module")
def server(sharp_model: Path) -> Iterator[VllmServer]:
    options = ["--plugin", "flashvid", "--flashvid-retention-ratio", "0.25"]
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with ExitStack() as stack:
        with forking():
            server = stack.enter_context(VllmServer(sharp_model, *options, *tools, *SERVE))
        yield server


def ask(server: VllmServer, flashvid: Any = None, video: Path | list[Path] | None = None, **options: Any) -> Any:
    """One chat completion; ``video``, or each of them, as base64, ``flashvid`` as the request's own settings."""
    videos = video if isinstance(video, list) else [video] if video else []
    content: list[dict[str, Any]] = [{"type": "video_url", "video_url": {"url": video_url(v)}} for v in videos]
    content.append({"type": "text", "text": QUESTION})
    extra = {"ignore_eos": True} | options.pop("extra_body", {})
    if flashvid is not None:
        extra["mm_processor_kwargs"] = {"flashvid": flashvid}
    client: Any = server.client()
    return client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": content}], temperature=0,
        extra_body=extra, **{"max_tokens": 4, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def text_tokens(sharp_model: Path) -> int:
    """Tokens of the prompt that are not visual."""
    from transformers import AutoTokenizer

    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    tokenizer = AutoTokenizer.from_pretrained(sharp_model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return len(tokenizer.encode(text)) - 1


def metrics_of(server: VllmServer) -> dict[str, float]:
    """Our samples on /metrics: name -> value; the labels of the settings that are not empty in its name."""
    text = httpx.get(f"{server.base_url}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found: dict[str, float] = {}
    for sample in samples:
        if sample.name.startswith("flashvid:") and "le" not in sample.labels:
            name = "".join([sample.name, *(f" {k}={v}" for k, v in sorted(sample.labels.items()) if v)])
            assert name not in found, f"{name} twice"
            found[name] = sample.value
    return found


def test_metrics_count_what_is_compressed(server: VllmServer) -> None:
    """Once a video and setting: the second time a cache has it, as it would have one that a test before asked about.
    Plain videos and those kept whole do not count."""
    video, num_frames, tokens_per_frame = clip("carphone"), 4, 6 * 5
    before = metrics_of(server)
    info = "backend=native enabled=True encoder_ratio=1.0 encoder_reuse=tokens method=flashvid request_overrides=True"
    info += " retention_ratio=0.25"
    assert before[f"flashvid:settings_info {info}"] == 1
    for settings in (None, {"retention_ratio": 0.125}, None, {"enabled": False}, {"retention_ratio": 1}):
        ask(server, settings, video)
    gained = {name: value - before[name] for name, value in metrics_of(server).items()}
    tokens = num_frames * tokens_per_frame
    kept = [plan(num_frames, tokens_per_frame, FlashVidConfig(retention_ratio=r)).tokens for r in (0.25, 0.125)]
    assert gained["flashvid:videos_total"] == gained["flashvid:compression_seconds_count"] == 2
    assert gained["flashvid:video_tokens_in_total"] == 2 * tokens
    assert gained["flashvid:video_tokens_out_total"] == sum(kept)
    assert 0 < gained["flashvid:compression_seconds_sum"] < 10


# at 2 frames a second, merged in pairs; in cells of 28 x 28 pixels, resized to 256 cells at most
@pytest.mark.parametrize(("name", "num_frames", "tokens_per_frame"), [("bikes", 10, 23 * 10), ("carphone", 4, 6 * 5)])
def test_usage_falls_exactly_as_planned(
    server: VllmServer, text_tokens: int, name: str, num_frames: int, tokens_per_frame: int
) -> None:
    video = clip(name)
    plain = ask(server, {"enabled": False}, video).usage.prompt_tokens
    assert plain == text_tokens + num_frames * tokens_per_frame
    requests: list[tuple[Any, FlashVidConfig]] = [
        (None, FlashVidConfig(retention_ratio=0.25)),  # the server's
        ({"retention_ratio": 0.1}, FlashVidConfig(retention_ratio=0.1)),
        ({"retention_ratio": 1}, FlashVidConfig(retention_ratio=1)),
        ({"token_budget": 100}, FlashVidConfig(token_budget=100)),
        ({"alpha": 0.4}, FlashVidConfig(retention_ratio=0.25, alpha=0.4)),
    ]
    for _ in range(2):  # caches take part
        for request, config in requests:
            usage = ask(server, request, video).usage
            assert usage.prompt_tokens == text_tokens + plan(num_frames, tokens_per_frame, config).tokens


def test_bad_requests_get_400_while_another_is_answered(server: VllmServer) -> None:
    video = clip("bikes")
    stream = ask(server, video=video, stream=True, stream_options={"include_usage": True}, max_tokens=200)
    next(iter(stream))  # it is running
    bad: list[tuple[Any, str]] = [*BAD_REQUESTS, (None, "did you mean 'flashvid'"), (None, "disabled by default")]
    bodies: list[dict[str, Any]] = [{"mm_processor_kwargs": {"flashvid": settings}} for settings, _ in BAD_REQUESTS]
    bodies += [{"mm_processor_kwargs": {"flashvidd": {"alpha": 1}}}, {"mm_processor_kwargs": {"fps": 1}}]
    for index, (body, (_, message)) in enumerate(zip(bodies, bad, strict=True)):
        for with_video in (False, True) if index < 3 else (False,):
            if "nan" in str(body):  # JSON has no NaN; the client refuses to send it
                continue
            with pytest.raises(openai.BadRequestError) as info:
                ask(server, video=video if with_video else None, extra_body=body)
            assert re.search(message, str(info.value)), (body, str(info.value))
    assert [chunk.usage.completion_tokens for chunk in stream if chunk.usage] == [200]
    assert ask(server, video=video).usage.completion_tokens == 4


def test_nan_in_a_request_is_refused_too(server: VllmServer) -> None:
    """Python's json writes and reads it."""
    body = (
        f'{{"model": "{server.model}", "messages": [{{"role": "user", "content": "hello"}}],'
        ' "mm_processor_kwargs": {"flashvid": {"retention_ratio": NaN}}}'
    )
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.base_url}/v1/chat/completions", content=body, headers=headers, trust_env=False)
    assert response.status_code == 400, response.text


def test_a_broken_video_is_the_clients_fault(server: VllmServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    with pytest.raises(openai.APIStatusError) as info:
        ask(server, video=broken)
    assert 400 <= info.value.status_code < 500
    assert ask(server).choices


def test_many_at_once_answer_as_alone(server: VllmServer) -> None:
    """Videos and ratios mixed: every answer is the one that the request gets alone."""
    requests = [(clip(name), ratio) for name in ("bikes", "bigbuckbunny") for ratio in (0.05, 0.1, 0.3)]

    def answer(request: tuple[Path, float]) -> tuple[str, int]:
        done = ask(server, {"retention_ratio": request[1]}, request[0], max_tokens=8)
        return done.choices[0].message.content, done.usage.prompt_tokens

    alone = [answer(request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(answer, requests)) == alone


def post(server: VllmServer, route: str, **body: Any) -> httpx.Response:
    """What a route of the server answers."""
    return httpx.post(f"{server.base_url}{route}", json={"model": server.model, **body}, trust_env=False, timeout=600)


def settings_of(flashvid: Any) -> dict[str, Any]:
    return {} if flashvid is None else {"mm_processor_kwargs": {"flashvid": flashvid}}


def messages_with(video: Path) -> list[dict[str, Any]]:
    parts = [{"type": "video_url", "video_url": {"url": video_url(video)}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("flashvid", [None, {"retention_ratio": 0.5}, {"enabled": False}])
def test_what_a_prompt_has_is_the_same_everywhere(server: VllmServer, flashvid: Any) -> None:
    """Tokenized, in usage, as ids, as log-probabilities: one length, the compressed prompt's."""
    messages, settings = messages_with(clip("carphone")), settings_of(flashvid)
    tokenized = post(server, "/tokenize", messages=messages, **settings).json()
    asked = {"messages": messages, "max_tokens": 2, "temperature": 0, "return_token_ids": True, **settings}
    chat = post(server, "/v1/chat/completions", prompt_logprobs=1, **asked).json()
    ids = chat["prompt_token_ids"]
    assert ids == tokenized["tokens"]
    assert len(ids) == tokenized["count"] == chat["usage"]["prompt_tokens"] == len(chat["prompt_logprobs"])
    for place, entry in enumerate(chat["prompt_logprobs"][1:], 1):
        assert str(ids[place]) in entry


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"messages": [{"role": "user", "content": "hello"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}),
    ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "hello"}]] * 2, "max_tokens": 1}),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 1, "store": False}),
]


@pytest.mark.parametrize(("route", "body"), ROUTES, ids=[route for route, _ in ROUTES])
def test_every_route_that_takes_our_key_checks_it(server: VllmServer, route: str, body: dict[str, Any]) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"flashvid": {"retention_ratio": 2}}, "retention_ratio must be a number in"),
        ({"flashvidd": {"alpha": 1}}, "did you mean 'flashvid'"),
        ({"fps": 1}, "disabled by default"),
    ]
    for kwargs, message in bad:
        response = post(server, route, mm_processor_kwargs=kwargs, **body)
        assert response.status_code == 400, response.text
        assert message in response.text
    response = post(server, route, mm_processor_kwargs={"flashvid": {"retention_ratio": 0.1}}, **body)
    assert response.status_code == 200, response.text


def test_routes_whose_schema_has_no_videos(server: VllmServer) -> None:
    """vLLM's: /v1/messages (Anthropic's) and /v1/responses take text and images. A video is refused, not left out."""
    for route, more in (("/v1/messages", {"max_tokens": 1}), ("/v1/messages/count_tokens", {})):
        assert post(server, route, messages=[{"role": "user", "content": "hello"}], **more).status_code == 200
        response = post(server, route, messages=messages_with(clip("carphone")), **more)
        assert response.status_code == 400, response.text
    response = post(server, "/v1/responses", input=messages_with(clip("carphone")), max_output_tokens=1, store=False)
    assert response.status_code == 400, response.text


def test_tools_schemas_and_several_answers_with_a_video(server: VllmServer) -> None:
    """Penalised, constrained, several at once: as each would be alone."""
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    asked = {"messages": messages_with(clip("carphone")), "temperature": 0, "max_tokens": 60}
    asked |= {"presence_penalty": 1, "repetition_penalty": 1.2, **settings_of({"retention_ratio": 0.5})}
    formats = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    chosen = {"tools": [tool], "tool_choice": "required"}

    def answers(_: int) -> list[Any]:
        formatted = post(server, "/v1/chat/completions", response_format=formats, **asked).json()
        called = post(server, "/v1/chat/completions", **chosen, **asked).json()
        drawn = post(server, "/v1/chat/completions", **(asked | {"temperature": 1, "n": 4, "seed": 3, "max_tokens": 5}))
        texts = [choice["message"]["content"] for choice in drawn.json()["choices"]]
        message = called["choices"][0]["message"]
        call = [call["function"] for call in message["tool_calls"] or []] or message["content"]  # cut off: as text
        return [formatted["choices"][0]["message"]["content"], call, *texts]

    alone = answers(0)
    assert set(json.loads(alone[0])) == {"a"}
    assert "count" in str(alone[1])
    assert len(set(alone[2:])) == 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answers, range(4))) == [alone] * 4


def test_the_log_says_once_what_is_on(server: VllmServer) -> None:
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if "FlashVID" in line]
    active, ran = ([line for line in lines if what in line] for what in ("is active", "compresses with its"))
    assert len(active) == 1, lines
    assert "INFO" in active[0]
    assert "retention_ratio=0.25" in active[0]
    assert len(ran) <= 1  # and once, when a video has come, which backend served it
    assert len(lines) == len(active) + len(ran)


@pytest.mark.longer("a process of its own; tests/serving/test_cli.py has the refusals")
def test_a_refusal_ends_the_command(sharp_model: Path, tmp_path: Path) -> None:
    command = ["serve", str(sharp_model), "--plugin", "flashvid", "--video-pruning-rate", "0.5"]
    assert Fork(serve, [command], os.environ, tmp_path / "log").wait(120) == 2
    assert "--video-pruning-rate 0.5" in (tmp_path / "log").read_text()


@pytest.mark.longer("one more server")
def test_a_server_closed_to_requests(sharp_model: Path) -> None:
    """Of two API servers, whose metrics come from vLLM's folder."""
    options = ["--plugin", "flashvid", "--flashvid-token-budget", "50", "--no-flashvid-request-overrides"]
    options += ["--api-server-count", "2"]
    with VllmServer(sharp_model, *options, *SERVE) as server:
        before = metrics_of(server)
        budgeted = ask(server, video=clip("bikes")).usage.prompt_tokens
        assert 50 < budgeted < 120
        gained = {name: value - before.get(name, 0) for name, value in metrics_of(server).items()}
        assert gained["flashvid:videos_total"] == gained["flashvid:compression_seconds_count"] == 1
        assert gained["flashvid:video_tokens_in_total"] == 10 * 23 * 10
        assert gained["flashvid:video_tokens_out_total"] == 50
        labels = "backend=native enabled=True encoder_ratio=1.0 encoder_reuse=tokens method=flashvid"
        labels += " request_overrides=False token_budget=50"
        assert before[f"flashvid:settings_info {labels}"] == 1
        for settings in ({"retention_ratio": 0.5}, {"enabled": False}):
            with pytest.raises(openai.BadRequestError, match="--no-flashvid-request-overrides"):
                ask(server, settings, clip("bikes"))
