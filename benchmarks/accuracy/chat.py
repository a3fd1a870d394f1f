# SPDX-License-Identifier: MIT
"""What stands between lmms-eval's chat model and the server: settings, checks, and a ledger of answers."""

import hashlib
import itertools
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai

from benchmarks.accuracy.guard import GuardAbort, examine, settings_of, videos_in

FIRST = 4  # so many requests are witnesses from the start


class GuardedCompletions:
    """`client.chat.completions` as lmms-eval's model calls it.

    Args:
        ratio: share of the video tokens to keep; None is the plain model.
        method: how they are chosen.
        options: base_url; ledger, the file that gets a line for each answer, and whose answers are not asked for
            again; check_every, see `create`; allow_failures, how many requests may fail.
    """

    def __init__(self, ratio: float | None, method: str, options: dict[str, Any]) -> None:
        http = openai.DefaultHttpxClient(trust_env=False)
        client = openai.OpenAI(base_url=options["base_url"], api_key="none", timeout=3600, http_client=http)
        self.send, self.ratio, self.settings = client.chat.completions.create, ratio, settings_of(ratio, method)
        self.ledger, self.check_every = Path(options["ledger"]), options["check_every"]
        self.failures_left = options["allow_failures"]
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        self.answered = {line["content"]: line for line in map(json.loads, lines)}
        self.numbers, self.lock = itertools.count(), threading.Lock()

    def create(self, **payload: Any) -> Any:
        """Send one request with the settings of the run, unless the ledger has its answer, and enter it there.

        The first FIRST and every `check_every`-th are witnesses: sent twice more, for the exact check.
        """
        payload.pop("extra_body", None)
        videos = videos_in(payload["messages"])
        asked = {name: value for name, value in payload.items() if name != "model"}
        content = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if content in self.answered:
            return answer(self.answered[content])

        def ask(settings: Any, **changes: Any) -> Any:
            extra = {"mm_processor_kwargs": {"flashvid": dict(settings)}}
            return self.send(**{**payload, **changes}, extra_body=extra)

        try:
            response = ask(self.settings)
            usage, text = response.usage, response.choices[0].message.content or ""
            line = {"text": text, "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            number = next(self.numbers)
            if number < FIRST or number % self.check_every == 0:
                witness = examine(
                    lambda settings: int(ask(settings, max_tokens=1).usage.prompt_tokens),
                    usage.prompt_tokens, self.ratio, videos,
                )  # fmt: skip
                line |= {"video_tokens": witness.video_tokens, "kept": witness.kept}
        except openai.APIError as error:
            with self.lock:
                self.failures_left -= 1
                if self.failures_left < 0:
                    raise GuardAbort(
                        f"a request failed, and lmms-eval would score that as a wrong answer: {error} "
                        "(--allow-failures N lets N of them pass. The exact check asks for nearly all of a video's "
                        "tokens: --max-model-len must hold an uncompressed prompt)"
                    ) from error
            raise
        with self.lock, self.ledger.open("a") as file:
            file.write(json.dumps({"content": content, **line}) + "\n")
        return answer(line)


def answer(line: Mapping[str, Any]) -> Any:
    """A line of the ledger as lmms-eval reads a response."""
    usage = SimpleNamespace(prompt_tokens=line["prompt_tokens"], completion_tokens=line["completion_tokens"])
    return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=line["text"]))], usage=usage)
