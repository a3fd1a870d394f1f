# SPDX-License-Identifier: MIT
"""Servers in this process for the tests of `flashvid play`: the page's own, and one that answers as vLLM does."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flashvid_vllm.core.budget import plan
from flashvid_vllm.core.settings import check_request, resolve

TEXT_TOKENS, FRAMES, TOKENS = 20, 10, 100  # of a prompt: its text; frames of a video, and tokens of each
NO_PLUGIN = (  # vLLM 0.32's words
    "Per-request mm_processor_kwargs are disabled by default because they can change multimodal preprocessing resource "
    "usage. Start the server with --trust-request-mm-kwargs only when clients are trusted."
)


@contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """Serve ``app`` on the loopback interface, by default on a free port; its URL."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        assert not thread.is_alive()


class FakeVllm:
    """An OpenAI server whose prompts are as long as the plugin would make them, and whose refusals are the plugin's.

    Attributes:
        plugin: "open", "closed" (--no-flashvid-request-overrides), "absent", or "ignored": settings without effect.
        answer: the pieces of every answer.
        ending: "usage", "none" (it breaks off), "error" (it says so), or any other line that is sent as data.
        stalls: "" or where an answer stops and waits for its client to go: "prefill", "decode".
        key: what it wants as API key, or None.
        asked: the bodies of all streamed requests; gone: set when a client went before the end.
    """

    def __init__(self) -> None:
        self.plugin, self.answer, self.ending, self.stalls = "open", ["A ball ", "rolls."], "usage", ""
        self.key: str | None = None
        self.models = ["tiny"]
        self.asked: list[dict[str, Any]] = []
        self.waiting, self.gone = threading.Event(), threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/elsewhere", self.elsewhere),
            ]
        )

    async def elsewhere(self, _: Request) -> Response:
        """A page of another site."""
        return HTMLResponse("<title>elsewhere</title>")

    async def list_models(self, request: Request) -> Response:
        return self._locked_out(request) or JSONResponse({"data": [{"id": name} for name in self.models]})

    def _locked_out(self, request: Request) -> Response | None:
        given = request.headers.get("authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": f"Unauthorized: {given}"}}, status_code=401)

    async def complete(self, request: Request) -> Response:
        if locked_out := self._locked_out(request):
            return locked_out
        body = await request.json()
        settings = body.get("mm_processor_kwargs", {}).get("flashvid")
        try:
            if settings is not None and self.plugin == "absent":
                raise ValueError(NO_PLUGIN)
            if settings is not None:
                check_request(settings, {"request_overrides": False} if self.plugin == "closed" else {})
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, status_code=400)
        if not body.get("stream"):
            return JSONResponse({"choices": [], "usage": {}})
        self.asked.append(body)
        config = None if self.plugin == "ignored" else resolve({}, settings, {})
        kept = plan(FRAMES, TOKENS, config).tokens if config else FRAMES * TOKENS
        return StreamingResponse(self._stream(request, TEXT_TOKENS + kept), media_type="text/event-stream")

    async def _stream(self, request: Request, prompt_tokens: int) -> AsyncIterator[str]:
        try:
            if self.stalls == "prefill":
                await self._wait()
            yield sse({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for piece in self.answer:
                yield sse({"choices": [{"delta": {"content": piece}}]})
                await asyncio.sleep(0.01)
            if self.stalls == "decode":
                await self._wait()
            if self.ending == "error":
                yield sse({"error": {"message": "the engine is dead", "code": 500}})
            if self.ending not in ("usage", "none", "error"):
                yield f"data: {self.ending}\n\n"
            if self.ending == "usage":
                usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(self.answer)}
                yield sse({"choices": [], "usage": usage})
                yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise

    async def _wait(self) -> None:
        self.waiting.set()
        await asyncio.sleep(60)


def sse(data: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


@contextmanager
def fake_vllm(port: int = 0) -> Iterator[tuple[FakeVllm, str]]:
    """A running FakeVllm and its URL."""
    fake = FakeVllm()
    with running(fake.app, port) as url:
        yield fake, url


def folder_of(app: Any) -> Path:
    """The temporary folder of a running `flashvid play`."""
    play = next(route.endpoint.__self__ for route in app.routes if route.path == "/api/ask")
    return Path(play.shelf.folder)
