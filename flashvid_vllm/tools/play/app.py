# SPDX-License-Identifier: MIT
"""The local server: the page, its clips, and answers that it streams from the model's server."""

import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...core.config import DEFAULT_RETENTION_RATIO, Method
from ..endpoint import data_url
from ..errors import UserError
from .clips import MIB, Shelf, find_samples
from .guard import KEPT_POLICY, Guard
from .kept import Drawer
from .upstream import Upstream

PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
DRAWN = Path(str(files(__package__) / "sample.webm"))  # benchmarks/demo/drawn_clip.py
MOST_BODY = 64 * 1024  # bytes of a question with its settings
MOST_TOKENS = 8192  # of an answer


@dataclass(frozen=True)
class Options:
    """How the page is served.

    Attributes:
        base_url, api_key: the model's server.
        host, names: the address bound to, and further names of it.
        samples: a folder with videos, None: the small clip that comes along.
        max_upload_mib: the largest clip.
        tower, clip, frames: what draws kept tokens (`kept.Drawer`); no tower: nothing is drawn.
    """

    base_url: str
    api_key: str | None = None
    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    samples: Path | None = None
    max_upload_mib: float = 100
    tower: str | None = None
    clip: bool = False
    frames: int = 16


class Lines(StreamingResponse):
    """JSON lines. When the reader goes, the source is cancelled at once, not at its next line."""

    media_type = "application/x-ndjson"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def cancel_when_gone() -> None:
                await self.listen_for_disconnect(receive)
                group.cancel_scope.cancel()

            group.start_soon(cancel_when_gone)
            await self.stream_response(send)
            group.cancel_scope.cancel()


class Play:
    """The routes' functions and what they share."""

    def __init__(self, options: Options) -> None:
        self.upstream = Upstream(options.base_url, options.api_key)
        self.samples = [DRAWN] if options.samples is None else find_samples(options.samples)
        self.drawer = Drawer(options.tower, options.clip, options.frames) if options.tower else None
        self.most_bytes = int(options.max_upload_mib * MIB)
        self.shelf: Shelf  # while the server runs

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """The temporary folder's life."""
        with tempfile.TemporaryDirectory(prefix="flashvid-play-") as name:
            self.shelf = Shelf(Path(name), self.most_bytes, self.samples)
            async with self.upstream.http:
                yield

    async def page(self, request: Request) -> Response:
        """One of the page's three files."""
        name = request.url.path.strip("/") or "page.html"
        return Response((files(__package__) / name).read_bytes(), media_type=PAGE[name])

    async def state(self, _: Request) -> Response:
        """What the page needs to know; the server's troubles among it."""
        error, models = None, []
        try:
            models = await self.upstream.models()
        except UserError as trouble:
            error = str(trouble)
        return JSONResponse(
            {
                "base_url": self.upstream.shown_url,
                "models": models,
                "error": error,
                "samples": self.shelf.list_samples(),
                "most_bytes": self.most_bytes,
                "most_tokens": MOST_TOKENS,
                "methods": get_args(Method),
                "retention_ratio": DEFAULT_RETENTION_RATIO,
                "tower": self.drawer and Path(self.drawer.tower).name,
                "frames": self.drawer and self.drawer.frames,
            }
        )

    async def check(self, request: Request) -> Response:
        """Whether settings of a request are taken."""
        model = field(await body_of(request), "model", str)
        await self.upstream.check(model)
        return JSONResponse({})

    async def upload(self, request: Request) -> Response:
        """Keep a clip, whose bytes are the body."""
        length = request.headers.get("content-length", "")
        name = request.query_params.get("name", "")
        clip = await self.shelf.add(name, int(length) if length.isdigit() else None, request.stream())
        return JSONResponse(clip.describe(), status_code=201)

    async def clip(self, request: Request) -> Response:
        """A clip's bytes, to be played. Opened on its own, it is still no page."""
        clip = self.shelf.get(request.path_params["id"])
        headers = {"content-security-policy": "default-src 'none'; media-src 'self'; sandbox"}
        return FileResponse(clip.path, media_type=clip.type, headers=headers)

    async def ask(self, request: Request) -> Response:
        """An answer as JSON lines (`Upstream.ask`); an error is the last of them: {"error", "status"}."""
        body = await body_of(request)
        clip = self.shelf.get(field(body, "clip", str))
        model, question = field(body, "model", str), field(body, "question", str)
        settings, most = field(body, "settings", dict), field(body, "max_tokens", int)
        identity = f"{clip.id}-{field(body, 'session', str)}"
        if not question.strip():
            raise UserError("type a question first")
        if not 1 <= most <= MOST_TOKENS:
            raise UserError(f"the longest answer must be from 1 to {MOST_TOKENS} tokens, got {most}")
        video = await run_in_threadpool(lambda: data_url(clip.type, clip.path.read_bytes()))

        async def lines() -> AsyncIterator[str]:
            events = self.upstream.ask(model, video, question, settings, most, identity)
            try:
                async with aclosing(events):
                    async for event in events:
                        yield json.dumps(event) + "\n"
            except UserError as error:
                yield json.dumps({"error": str(error), "status": error.status}) + "\n"

        return Lines(lines())

    async def draw(self, request: Request) -> Response:
        """Draw kept tokens."""
        if self.drawer is None:
            raise UserError("start flashvid play with --model DIR or --clip DIR to draw kept tokens")
        body = await body_of(request)
        clip, settings = self.shelf.get(field(body, "clip", str)), field(body, "settings", dict)
        return JSONResponse(await run_in_threadpool(self.drawer.draw, clip, settings))

    async def drawn(self, request: Request) -> Response:
        """What was drawn: viz's page, in a sandbox."""
        text = self.drawer and self.drawer.pages.get(request.path_params["id"])
        if not text:
            raise UserError("this picture is no longer held: draw it again", 404)
        return Response(text, media_type="text/html", headers={"content-security-policy": KEPT_POLICY})


def make_app(options: Options) -> Starlette:
    """The application. Raises UserError for options that cannot work."""
    play = Play(options)
    routes = [
        *(Route(path, play.page) for path in ("/", "/page.css", "/page.js")),
        Route("/api/state", play.state),
        Route("/api/check", play.check, methods=["POST"]),
        Route("/api/clips", play.upload, methods=["POST"]),
        Route("/api/clips/{id}", play.clip),
        Route("/api/ask", play.ask, methods=["POST"]),
        Route("/api/kept", play.draw, methods=["POST"]),
        Route("/api/kept/{id}", play.drawn),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, host=options.host, names=options.names)],
        exception_handlers={UserError: _refuse, HTTPException: _refuse, ClientDisconnect: _refuse},
        lifespan=play.lifespan,
    )


async def _refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, status_code=error.status_code)
    if isinstance(error, ClientDisconnect):  # nobody is there to read it
        return Response(status_code=400)
    assert isinstance(error, UserError)
    status = error.status if 400 <= error.status < 600 else 502
    return JSONResponse({"error": str(error)}, status_code=status)


async def body_of(request: Request) -> Mapping[str, Any]:
    """A request's JSON object. Raises UserError."""
    # a form of another site cannot send this type without being asked about first
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise UserError("the content type must be application/json", 415)
    text = b""
    async for chunk in request.stream():
        text += chunk
        if len(text) > MOST_BODY:
            raise UserError(f"the question is longer than {MOST_BODY // 1024} KiB: shorten it", 413)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):  # which nesting without end leads to
        body = None
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    return body


def field(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """``body[name]``, of the type ``kind``. Raises UserError."""
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value
