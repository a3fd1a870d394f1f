# SPDX-License-Identifier: MIT
"""One question about a video, put to a server.

with VllmServer(model, "--plugin", "flashvid") as server:
    answer = ask(server.client(), server.model, "clip.mp4", "What happens?", {"retention_ratio": 0.1})
"""

import mimetypes
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from flashvid_vllm.tools.endpoint import data_url

from .server import ServerError


@dataclass(frozen=True)
class Answer:
    """An answer and what it took; `ttft_s` is the time from sending the request to the first token."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    total_s: float


def video_url(video: str | os.PathLike[str]) -> str:
    """A URL as it is; a file as a base64 data URL."""
    if str(video).startswith(("http://", "https://", "data:")):
        return str(video)
    kind = mimetypes.guess_type(str(video))[0] or "video/mp4"
    return data_url(kind, Path(video).read_bytes())


def ask(
    client: openai.OpenAI,
    model: str,
    video: str | os.PathLike[str] | None,
    question: str,
    flashvid: Mapping[str, Any] | None = None,
    max_tokens: int = 64,
    **options: Any,
) -> Answer:
    """Ask `question` about `video` (a path, a URL, or None for text alone) and stream the answer.

    `flashvid` goes into the request's mm_processor_kwargs; None leaves the server's settings. `options` are
    further fields of the request. Raises openai.APIError as the client does.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": video_url(video)}})
    body = dict(options)
    if flashvid is not None:
        body["mm_processor_kwargs"] = {"flashvid": dict(flashvid)}
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": body,
    }
    start = time.perf_counter()
    first, text, usage = 0.0, [], None
    for chunk in _chunks(client, request):
        # vLLM sends the first chunk, which has the role and no text, together with the first token
        first = first or time.perf_counter() - start
        text += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    if usage is None:
        raise ServerError("the answer broke off: the server sent no token counts")
    total = time.perf_counter() - start
    return Answer("".join(text), usage.prompt_tokens, usage.completion_tokens, first, total)


def _chunks(client: openai.OpenAI, request: Mapping[str, Any]) -> Iterator[Any]:
    with client.chat.completions.create(**request) as stream:
        yield from stream
