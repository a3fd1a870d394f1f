# SPDX-License-Identifier: MIT
"""The accuracy recipes' guard: its arithmetic against the plugin's budgets, and requests to servers honest and not."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy.chat import FIRST, GuardedCompletions
from benchmarks.accuracy.guard import LEAST, MOST, GuardAbort, Witness, compare, examine, kept_of, videos_in
from benchmarks.accuracy.results import lengths
from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan

TEXT = 57  # tokens of a prompt that are not visual
VIDEO_PART = {"type": "video_url", "video_url": {"url": "file:///clip.mp4"}}


def prompt_tokens(settings: dict[str, Any], sizes: list[int]) -> int:
    """What a server with the plugin reports for videos of these sizes."""
    if settings.get("enabled") is False:
        return TEXT + sum(sizes)
    return TEXT + sum(plan(1, size, FlashVidConfig(**settings)).tokens for size in sizes)


RATIOS = st.decimals("0.01", "0.99", places=3).map(float)


@given(tokens=st.integers(1, 10**6), ratio=RATIOS)
def test_kept_tokens_are_the_plugins(tokens: int, ratio: float) -> None:
    assert kept_of(tokens, ratio) == plan(1, tokens, FlashVidConfig(retention_ratio=ratio)).tokens


@given(sizes=st.lists(st.integers(10, 20000), min_size=1, max_size=3), ratio=st.none() | RATIOS)
def test_witness_of_an_honest_server_passes(sizes: list[int], ratio: float | None) -> None:
    settings = {"enabled": False} if ratio is None else {"retention_ratio": ratio}
    asked = prompt_tokens(settings, sizes)
    seen = examine(lambda probe: prompt_tokens(dict(probe), sizes), asked, ratio, len(sizes))
    assert seen.video_tokens == sum(sizes)
    assert seen.kept == asked - TEXT


@given(size=st.integers(100, 20000), ratio=st.sampled_from([0.1, 0.25, 0.5]), off=st.sampled_from([-1, 1]))
def test_one_token_too_many_or_too_few_is_found(size: int, ratio: float, off: int) -> None:
    asked = prompt_tokens({"retention_ratio": ratio}, [size]) + off
    with pytest.raises(GuardAbort, match=f"were not compressed to {ratio:g}.*does another setting"):
        Witness(asked, prompt_tokens(LEAST, [size]), prompt_tokens(MOST, [size])).check(ratio)


@pytest.mark.parametrize("ratio", [None, 0.1])
def test_settings_that_do_not_arrive_are_found(ratio: float | None) -> None:
    with pytest.raises(GuardAbort, match=r"make no difference.*900 prompt tokens.*sent as images.*--plugin flashvid"):
        Witness(900, 900, 900).check(ratio)


def test_plain_run_that_is_compressed_is_found() -> None:
    with pytest.raises(GuardAbort, match=r"plain prompt is shorter.*250 of 1000"):
        Witness(TEXT + 250, TEXT + 1, TEXT + 999).check(None)


def test_content_of_a_request() -> None:
    text = {"type": "text", "text": "What?"}
    assert videos_in([{"role": "user", "content": [VIDEO_PART, text, VIDEO_PART]}]) == 2
    with pytest.raises(GuardAbort, match=r"carries 2 images.*doc_to_visual"):
        videos_in([{"role": "user", "content": [{"type": "image_url"}, {"type": "image_url"}, text]}])
    for content in ([text], "What?"):
        with pytest.raises(GuardAbort, match="carries no video, only text"):
            videos_in([{"role": "system", "content": "Hi."}, {"role": "user", "content": content}])


def test_runs_are_compared_request_by_request() -> None:
    assert compare({"a": 900, "b": 800, "c": 1}, {"a": 100, "b": 90}) == 2
    with pytest.raises(GuardAbort, match="took 800 prompt tokens compressed and 800 plain"):
        compare({"a": 900, "b": 800}, {"a": 100, "b": 800})


class Server:
    """Answers chat completions with the usage of a video of 1000 tokens; `mode` says how honestly."""

    def __init__(self, mode: str) -> None:
        self.mode, self.bodies = mode, list[dict[str, Any]]()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                settings = body["mm_processor_kwargs"]["flashvid"]
                if outer.mode == "deaf" or (outer.mode == "deaf later" and len(outer.bodies) > 3 * FIRST):
                    settings = {"enabled": False}
                usage = {"prompt_tokens": prompt_tokens(settings, [1000]), "completion_tokens": 1, "total_tokens": 0}
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "B"}}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                self.send_response(400 if outer.mode == "refusing" else 200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps({**reply, "usage": usage}).encode())

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def completions(self, tmp_path: Path, ratio: float | None = 0.1, **options: Any) -> GuardedCompletions:
        """What lmms-eval's model would use."""
        options = {"ledger": str(tmp_path / "ledger.jsonl"), "check_every": 5, "allow_failures": 0, **options}
        return GuardedCompletions(ratio, "flashvid", {"base_url": self.url, **options})


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(request.param)
    yield server
    server.http.shutdown()
    server.http.server_close()


def question(number: int) -> dict[str, Any]:
    """As lmms-eval's `openai` model builds it, with what vLLM would refuse."""
    content = [VIDEO_PART, {"type": "text", "text": f"Question {number}"}]
    extra = {"media_io_kwargs": {"video": {"num_frames": 10}}}
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 16, "extra_body": extra}


@pytest.mark.parametrize("server", ["honest"], indirect=True)
def test_answers_are_checked_and_kept(server: Server, tmp_path: Path) -> None:
    """The first four and every fifth request get two more each; none of them is sent again by a second run."""
    chat = server.completions(tmp_path)
    for number in range(11):
        response = chat.create(**question(number))
        assert response.choices[0].message.content == "B"
        assert response.usage.prompt_tokens == TEXT + 100
    assert len(server.bodies) == 11 + 2 * (FIRST + 2)
    assert all("media_io_kwargs" not in body for body in server.bodies)
    assert server.bodies[0]["mm_processor_kwargs"] == {"flashvid": {"retention_ratio": 0.1, "method": "flashvid"}}
    assert [body["max_tokens"] for body in server.bodies[:3]] == [16, 1, 1]
    again = server.completions(tmp_path)
    assert again.create(**question(3)).usage.prompt_tokens == TEXT + 100
    assert len(server.bodies) == 11 + 2 * (FIRST + 2)
    assert set(lengths(tmp_path / "ledger.jsonl").values()) == {TEXT + 100}
    again.create(**{**question(3), "max_tokens": 32})  # another request
    assert len(lengths(tmp_path / "ledger.jsonl")) == 12


@pytest.mark.parametrize(("server", "answered"), [("deaf", 0), ("deaf later", 5)], indirect=["server"])
def test_a_server_that_does_not_compress_ends_the_run(server: Server, answered: int, tmp_path: Path) -> None:
    chat = server.completions(tmp_path)
    for number in range(answered):
        chat.create(**question(number))
    with pytest.raises(GuardAbort, match="make no difference"):
        chat.create(**question(answered))  # the first, and the sixth, are witnesses
    assert len(lengths(tmp_path / "ledger.jsonl")) == answered


@pytest.mark.parametrize("server", ["refusing"], indirect=True)
def test_a_refused_request_ends_the_run_unless_allowed(server: Server, tmp_path: Path) -> None:
    chat = server.completions(tmp_path, allow_failures=1)
    with pytest.raises(openai.BadRequestError):
        chat.create(**question(0))
    with pytest.raises(GuardAbort, match=r"a request failed.*--allow-failures"):
        chat.create(**question(1))
