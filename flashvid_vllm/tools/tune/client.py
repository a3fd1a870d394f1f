# SPDX-License-Identifier: MIT
"""A server that runs the plugin, and the few questions put to it.

Choices are asked in one of two ways. By letters: the choices are listed under the question, and vLLM's structured
outputs let the model say nothing but one of the letters, so no answer has to be guessed out of a sentence. By words
(where a question lists its choices itself, and the model answers with one of them): the answer is free and greedy, and
is the choice whose text it is, but for case, spaces and punctuation at the ends; any other answer is none of them,
and agrees with nothing but itself.
"""

import importlib
import string
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.settings import KEY
from ..endpoint import host_of, is_loopback, message_of
from ..errors import UserError
from .data import Item, Video, plain_text

LETTERS, WORDS = "letters", "words"
_ASK_LETTER = "Answer with the letter of the right choice alone."


class Failed(Exception):
    """One request failed; the text says why. Others may succeed."""


class Gone(UserError):
    """The server does not answer any more."""


@dataclass(frozen=True)
class Answer:
    """What the model said: its text, the tokens that it is made of, and how long the prompt was."""

    text: str
    ids: list[int]
    prompt_tokens: int


@dataclass(frozen=True)
class Asking:
    """How questions are put: whatever here changes changes answers.

    Attributes:
        choices: LETTERS or WORDS.
        max_tokens: of an answer in free text or words.
        body: further fields of every request, such as chat_template_kwargs.
    """

    choices: str
    max_tokens: int
    body: Mapping[str, Any]

    def prompt(self, item: Item) -> str:
        """The text beside the video."""
        if not item.choices or self.choices == WORDS:
            return item.question
        lines = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, item.choices, strict=False)]
        return "\n".join([item.question, *lines, _ASK_LETTER])

    def fields(self, item: Item) -> dict[str, Any]:
        """The fields of a request that bound the answer."""
        if item.choices and self.choices == LETTERS:
            # the end of the answer is a token too, and a letter may take more than one
            letters = list(string.ascii_uppercase[: len(item.choices)])
            return {"structured_outputs": {"choice": letters}, "max_tokens": 8}
        return {"max_tokens": self.max_tokens}

    def choice(self, item: Item, text: str) -> str:
        """Which choice an answer is, as its text; the answer itself if it is none."""
        if self.choices == LETTERS:
            letter = text.strip()
            known = len(letter) == 1 and letter in string.ascii_uppercase[: len(item.choices)]
            return item.choices[string.ascii_uppercase.index(letter)] if known else text
        return next((choice for choice in item.choices if plain_text(choice) == plain_text(text)), text)


class Client:
    """An OpenAI-compatible server.

    Args:
        base_url: with or without its /v1.
        model: the served model; None: the only one that there is.
        key: its API key, if it wants one.
        timeout: seconds that a request may take.

    Raises:
        UserError: no httpx, no such server, a key that no header can hold, or it serves several models and none was
            named.
    """

    def __init__(self, base_url: str, model: str | None, key: str | None, timeout: float) -> None:
        try:
            httpx: Any = importlib.import_module("httpx")
        except ImportError:
            raise UserError("flashvid tune needs httpx: pip install 'flashvid-vllm[tune]'") from None
        host = host_of(base_url)
        if host is None:
            raise UserError(f"--base-url must be a URL such as http://localhost:8000/v1, got {base_url!r}")
        if key and not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has characters that no HTTP header can hold; only printable ASCII will do")
        self._httpx, self.root = httpx, base_url.rstrip("/").removesuffix("/v1").rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=15),
            headers=headers,
            trust_env=not is_loopback(host),
            # a connection for each request: vLLM closes one after a 500 without saying so, and the next item, sent
            # over it, would fail in its place
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self.card = self._card(model)
        self.model = str(self.card["id"])

    def close(self) -> None:
        """Break off whatever is still asked."""
        self._http.close()

    def _card(self, model: str | None) -> Mapping[str, Any]:
        """What the server says of the model."""
        try:
            cards = self._get("/v1/models")["data"]
            names = [str(card["id"]) for card in cards]
        except (Failed, KeyError, TypeError) as error:
            raise UserError(f"{self.root} is no OpenAI-compatible server: {error}") from None
        if model is None and len(cards) == 1:
            return dict(cards[0])
        if model not in names:
            given = "name one of them with --model" if model is None else f"--model {model} is none of them"
            raise UserError(f"the server has the models {', '.join(names)}; {given}")
        return dict(cards[names.index(model)])

    def version(self) -> str:
        """vLLM's, "unknown" where a proxy does not tell it."""
        try:
            return str(self._get("/version")["version"])
        except (Failed, KeyError, TypeError):
            return "unknown"

    def check(self, request: Mapping[str, Any]) -> None:
        """Ask for nothing, in text alone, with a setting: Failed with the server's message if it refuses that."""
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
        self._post({**body, "mm_processor_kwargs": {KEY: dict(request)}})

    def ask(self, item: Item, request: Mapping[str, Any], asking: Asking) -> Answer:
        """The greedy answer to an item. Raises Failed."""
        body = {**self._body(item, item.video, request, asking), **asking.fields(item), "return_token_ids": True}
        reply = self._post(body)
        try:
            choice = reply["choices"][0]
            text, ids = choice["message"]["content"] or "", choice["token_ids"]
            return Answer(text, [int(i) for i in ids], int(reply["usage"]["prompt_tokens"]))
        except (KeyError, IndexError, TypeError) as error:
            raise Failed(f"an answer without {error}: is this vLLM?") from None

    def logprobs(
        self, item: Item, video: Video, request: Mapping[str, Any], asking: Asking, answer: Answer
    ) -> list[float] | None:
        """The log-probability of each token of an answer to an item, given a video (the item's or another).

        The answer is sent as the beginning of the assistant's message, and vLLM tells what it thinks of each token of
        the prompt. It computes those of the whole prompt, not from the prefix cache, in as much memory as the
        vocabulary times the tokens of a step take. None: the answer's text does not become the same tokens again.
        Raises Failed.
        """
        body = self._body(item, video, request, asking)
        body["messages"] = [*body["messages"], {"role": "assistant", "content": answer.text}]
        body |= {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 1}
        reply = self._post({**body, "prompt_logprobs": 0, "return_token_ids": True})
        try:
            ids, steps = reply["prompt_token_ids"], reply["prompt_logprobs"]
            for said in (answer.ids, answer.ids[:-1]):  # the last one ends the answer, or it was cut off
                if said and ids[-len(said) :] == said:
                    told = zip(said, steps[-len(said) :], strict=True)
                    return [float(step[str(token)]["logprob"]) for token, step in told]
        except (KeyError, TypeError, ValueError) as error:
            raise Failed(f"an answer without {error}: is this vLLM?") from None
        return None

    def first_token(self, item: Item, request: Mapping[str, Any], asking: Asking) -> float:
        """Seconds from sending an item to its first token, with none of the server's caches of any use.

        The video gets a name that was never used, which is what vLLM's caches of decoded videos, of embeddings and of
        KV know it by, and the text a salt, so the time has in it: the video's way to the server, decoding,
        the processor, the encoder, compression and prefill. Raises Failed.
        """
        body = self._body(item, item.video, request, asking)
        body["messages"][0]["content"][0]["uuid"] = uuid.uuid4().hex
        body |= {"max_tokens": 1, "stream": True, "cache_salt": uuid.uuid4().hex}
        start = time.perf_counter()
        for line in self._stream(body):
            # vLLM sends the first chunk, which has the role and no text, together with the first token
            if line.startswith("data:") and "[DONE]" not in line:
                if '"error"' in line:
                    raise Failed(_message(line.removeprefix("data:")))
                return time.perf_counter() - start
        raise Failed("the server ended the answer before its first token")

    def _body(self, item: Item, video: Video, request: Mapping[str, Any], asking: Asking) -> dict[str, Any]:
        try:
            url = video.url()
        except OSError as error:
            raise Failed(f"cannot read {video.name}: {error.strerror or error}") from None
        content = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "text", "text": asking.prompt(item)},
        ]
        return {
            "temperature": 0,
            **asking.body,
            "messages": [{"role": "user", "content": content}],
            "mm_processor_kwargs": {**asking.body.get("mm_processor_kwargs", {}), KEY: dict(request)},
        }

    def _get(self, path: str) -> Any:
        with self._failures():
            return self._read(self._http.get(self.root + path, timeout=15))

    def _post(self, body: Mapping[str, Any]) -> Any:
        with self._failures():
            return self._read(self._http.post(f"{self.root}/v1/chat/completions", json={"model": self.model, **body}))

    def _stream(self, body: Mapping[str, Any]) -> Iterator[str]:
        url, body = f"{self.root}/v1/chat/completions", {"model": self.model, **body}
        with self._failures(), self._http.stream("POST", url, json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                self._read(reply)
            yield from reply.iter_lines()

    def _read(self, reply: Any) -> Any:
        if reply.status_code == 401:
            raise UserError("the server wants an API key (401): set OPENAI_API_KEY")
        if reply.status_code != 200:
            raise Failed(f"HTTP {reply.status_code}: {_message(reply.text)}")
        try:
            return reply.json()
        except ValueError:
            raise Failed(f"HTTP 200, but no JSON: {reply.text[:100]!r}") from None

    def _failures(self) -> Any:
        return _Failures(self._httpx, self.root)


class _Failures:
    """Turns httpx's errors into ours: without a connection nothing else will work, a timeout is one request's."""

    def __init__(self, httpx: Any, root: str) -> None:
        self._httpx, self._root = httpx, root

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout):
            raise Gone(f"nothing answers at {self._root} ({error}); is the server running?") from None
        if isinstance(error, self._httpx.TimeoutException):
            raise Failed("no answer within the time that --timeout allows") from None
        if isinstance(error, self._httpx.RequestError):
            raise Failed(f"the connection broke off ({error or type(error).__name__})") from None


def _message(text: str) -> str:
    """What an error's body says, on one line."""
    return " ".join(message_of(text, 500).split())
