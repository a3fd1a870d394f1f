# SPDX-License-Identifier: MIT
"""The model's server: one streamed chat completion about a clip, timed, with errors in words."""

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from ..endpoint import host_of, is_loopback, message_of
from ..errors import UserError

Event = dict[str, Any]
CLOSED = "takes no 'flashvid' settings from requests"  # settings.check_request
UNTRUSTED = "--trust-request-mm-kwargs"  # vLLM's own refusal of every setting
NO_PLUGIN = "The server runs without the plugin: vllm serve MODEL --plugin flashvid."


class Upstream:
    """An OpenAI server.

    Args:
        base_url: with or without the ending "/v1".
        api_key: sent to it and to nobody else, or None.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self.url, self.api_key = with_version(base_url), api_key
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # an answer may be long in coming: how long to wait is the user's to say, who has a button to stop it
        timeout = httpx.Timeout(None, connect=10)
        proxy = not is_loopback(host_of(self.url) or "")
        self.http = httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=proxy)

    @property
    def shown_url(self) -> str:
        """The URL without a password that may be in it."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    async def models(self) -> list[str]:
        """The names that it serves. Raises UserError if it does not answer as an OpenAI server."""
        try:
            response = await self.http.get(f"{self.url}/models", timeout=10)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise self._refused(response.status_code, response.content)
        try:
            names = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if not names:
            raise UserError(f"{self.shown_url} answers, but not as an OpenAI server does: is the URL right?", 502)
        return names

    async def check(self, model: str) -> None:
        """Ask for one token with a setting of ours. Raises UserError if settings are not taken."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
            "mm_processor_kwargs": {"flashvid": {"enabled": False}},
        }
        try:
            response = await self.http.send(self._request(body))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise self._refused(response.status_code, response.content)

    async def ask(
        self, model: str, video: str, question: str, settings: Mapping[str, Any], max_tokens: int, identity: str
    ) -> AsyncGenerator[Event, None]:
        """Stream an answer about ``video`` (a data URL), greedy.

        ``identity`` and the settings name the video to vLLM's caches: two settings never find what the other left
        there, so that each pays for all of its first request; a repeat finds its own.

        Yields:
            {"text"} or {"thought"}: a piece of the answer; {"first_s"}: seconds from sending the request to the
            first token, before the first piece; at the end {"prompt_tokens", "cached_tokens" (None where the server
            does not tell), "completion_tokens", "total_s", "tokens_per_s" (after the first one, None for one alone)}.

        Raises:
            UserError: it does not answer, refuses, or breaks off.
        """
        known_as = f"{identity}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
        content = [
            {"type": "video_url", "video_url": {"url": video}, "uuid": known_as},
            {"type": "text", "text": question},
        ]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "mm_processor_kwargs": {"flashvid": dict(settings)},
        }
        request = self._request(body)
        start = time.perf_counter()
        first = last = None
        usage: Mapping[str, Any] | None = None
        try:
            async with aclosing(self._chunks(request)) as chunks:
                async for chunk in chunks:
                    now = time.perf_counter() - start
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        # vLLM sends the first chunk, which has the role and no text, together with the first token
                        if first is None:
                            first = now
                            yield {"first_s": first}
                        last = now
                        delta = choice.get("delta") or {}
                        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
                            yield {"thought": str(thought)}
                        if text := delta.get("content"):
                            yield {"text": str(text)}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"the server sent what is no chat completion ({type(error).__name__}: {error})", 502
            ) from None
        except httpx.HTTPError as error:
            if first is None:
                raise self._unreachable(error) from None
            raise UserError(f"the answer broke off: {error or type(error).__name__}", 502) from None
        if usage is None or first is None or last is None:
            raise UserError("the answer broke off: the server sent no token counts", 502)
        try:
            count, prompt = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"the server sent no token counts, but {str(usage)[:200]}", 502) from None
        yield {
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "completion_tokens": count,
            "total_s": time.perf_counter() - start,
            "tokens_per_s": (count - 1) / (last - first) if count > 1 and last > first else None,
        }

    async def _chunks(self, request: httpx.Request) -> AsyncGenerator[Mapping[str, Any], None]:
        """The chunks of a streamed completion. Left early, it closes the connection, which ends the request there."""
        response = await self.http.send(request, stream=True)
        try:
            if response.status_code != 200:
                raise self._refused(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                try:
                    chunk = json.loads(data)
                except ValueError:
                    raise UserError(f"the server sent what is not JSON: {data[:200]}", 502) from None
                if not isinstance(chunk, dict):
                    raise UserError(f"the server sent what is no chat completion: {data[:200]}", 502)
                if "error" in chunk:
                    raise self._refused(int(_code(chunk["error"])), data.encode())
                yield chunk
        finally:
            await response.aclose()

    def _request(self, body: Mapping[str, Any]) -> httpx.Request:
        """A chat completion. Raises UserError for what JSON cannot carry."""
        try:
            return self.http.build_request("POST", f"{self.url}/chat/completions", json=body)
        except ValueError as error:  # NaN, half a surrogate pair
            raise UserError(f"this cannot be sent as JSON: {error}") from None

    def _unreachable(self, error: Exception) -> UserError:
        why = str(error) or type(error).__name__
        said = f"No server answers at {self.shown_url} ({why}). Is vllm serve running there?"
        return UserError(self._safe(said), 502)

    def _refused(self, status: int, body: bytes) -> UserError:
        """The server's own message, and what to do where that is known."""
        message = message_of(body) or f"HTTP {status} without a message"
        hint = ""
        if CLOSED in message:
            hint = "Start it without --no-flashvid-request-overrides to compare here."
        elif UNTRUSTED in message:
            hint = NO_PLUGIN
        elif status in (401, 403):
            hint = "Start flashvid play with --api-key KEY, or OPENAI_API_KEY in its environment."
        return UserError(self._safe(f"The server refused (HTTP {status}): {message}\n{hint}".strip()), status)

    def _safe(self, message: str) -> str:
        return message.replace(self.api_key, "***") if self.api_key else message


def with_version(url: str) -> str:
    """``url`` without a slash at its end; a server alone gets "/v1". Raises UserError for what is no URL."""
    url = url.rstrip("/")
    if host_of(url) is None:
        raise UserError(f"--base-url must be such as http://localhost:8000/v1, got {url!r}")
    return url if urlsplit(url).path else f"{url}/v1"


def _code(error: Any) -> Any:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500
