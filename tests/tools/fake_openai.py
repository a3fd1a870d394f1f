# SPDX-License-Identifier: MIT
"""A server with the OpenAI answers that `flashvid tune` reads, and a "model" whose answers follow from the ratio.

A video is the bytes that are sent. One that begins with b"fragile", or a question with that word, is answered
otherwise below a ratio of 0.2, others never; b"broken" is refused, as a video that cannot be decoded, b"unscored" where
the prompt is to be scored; b"crashing" is a 500, after which the connection is of no use, which it does not say. A
compressed b"impossible" gives a word of its answer no probability at all. Free text is
eight words, of which a fragile video's last 8 * (1 - ratio) change, and a token of the plain answer has the
log-probability -0.1 - (1 - ratio), or -2.1 if another video is shown.
"""

import base64
import hashlib
import http.server
import json
import threading
from typing import Any

PLUGIN, WITHOUT, TRUSTING, CLOSED, NO_ENABLED = "plugin", "without", "trusting", "closed", "no enabled"
END = 2  # the token that ends an answer
WORDS = [f"word{i}" for i in range(50)]
_REFUSALS = {
    WITHOUT: "`mm_processor_kwargs` of a request are refused; start the server with --trust-request-mm-kwargs",
    CLOSED: "this server takes no 'flashvid' settings from requests (--no-flashvid-request-overrides); leave them out",
}


class FakeServer:
    """Up until `close`.

    Attributes:
        mode: what it makes of settings.
        bodies: every request about a video, as it came.
        gone_after: so many of these are answered; then it hangs up. None: all.
        ends_after: so many are answered; then it ends.
        models: their names.
    """

    def __init__(self, mode: str = PLUGIN) -> None:
        self.mode, self.models = mode, ["fake"]
        self.bodies: list[dict[str, Any]] = []
        self.gone_after: int | None = None
        self.ends_after: int | None = None
        self.version, self.lock = "0.32.0", threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # head and body are two writes
            protocol_version = "HTTP/1.1"  # connections are kept, as vLLM keeps them
            failed = False  # whether this connection has had a 500

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                cards = [{"id": name, "root": name, "max_model_len": 4096} for name in outer.models]
                self._send(200, {"data": cards} if self.path == "/v1/models" else {"version": outer.version})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = (0, None) if self.failed else outer._answer(body)
                self.failed = status == 500
                if status == 0:
                    self.close_connection = True
                elif body.get("stream") and status == 200:
                    self._send(200, b"data: " + json.dumps(reply).encode() + b"\n\ndata: [DONE]\n\n")
                else:
                    self._send(status, reply)

            def _send(self, status: int, reply: Any) -> None:
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        if self._http.socket.fileno() < 0:
            return
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        request = body["mm_processor_kwargs"]["flashvid"]
        ratio = 1.0 if request.get("enabled") is False else float(request.get("retention_ratio", 0.25))
        if refused := self._refusal(request, ratio):
            return 400, {"error": {"message": refused}}
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            return 200, {"choices": [{"message": {"content": "Hi"}, "token_ids": [1]}], "usage": {"prompt_tokens": 3}}
        with self.lock:
            self.bodies.append(body)
            if self.ends_after is not None and len(self.bodies) > self.ends_after:
                self.close()
                return 0, None
            if self.gone_after is not None and len(self.bodies) > self.gone_after:
                return 0, None
        video = base64.b64decode(content[0]["video_url"]["url"].split(",", 1)[1])
        question = content[1]["text"]
        fragile = video.startswith(b"fragile") or "fragile" in question
        if video.startswith(b"broken"):
            return 400, {"error": {"message": "cannot decode <b>this</b> video"}}
        if video.startswith(b"crashing"):
            return 500, {"error": {"message": "engine error"}}
        usage = {"prompt_tokens": 10 + round(1000 * ratio)}
        changes = fragile and ratio < 0.2
        if "structured_outputs" in body:
            letters = body["structured_outputs"]["choice"]
            text = letters[(_number(video, question) + changes) % len(letters)]
            return 200, {"choices": [{"message": {"content": text}, "token_ids": [ord(text), END]}], "usage": usage}
        ids = words_of(video, question)
        if "prompt_logprobs" in body:
            said = body["messages"][1]["content"].split()
            mine = " ".join(WORDS[i - 3] for i in ids).split() == said
            value = -0.1 - (1 - ratio) if mine else -2.1
            if video.startswith(b"unscored"):
                return 400, {"error": {"message": "no score"}}
            tail = [WORDS.index(word) + 3 for word in said]
            values = [value] * len(tail)
            if video.startswith(b"impossible") and ratio < 1:
                values[0] = -9999.0
            steps = [None, *({str(i): {"logprob": value}} for i, value in zip(tail, values, strict=True))]
            return 200, {"choices": [{}], "usage": usage, "prompt_token_ids": [9, *tail], "prompt_logprobs": steps}
        kept = round(8 * ratio) if fragile else 8
        ids = [*ids[:kept], *(3 + (i - 2) % len(WORDS) for i in ids[kept:])]
        text = " ".join(WORDS[i - 3] for i in ids)
        message = {"message": {"content": text}, "delta": {"content": ""}, "token_ids": [*ids, END]}
        return 200, {"choices": [message], "usage": usage}

    def _refusal(self, request: dict[str, Any], ratio: float) -> str:
        if self.mode == TRUSTING:
            return ""
        if self.mode in _REFUSALS:
            return _REFUSALS[self.mode]
        if self.mode == NO_ENABLED and "enabled" in request:
            return "enabled: not here"
        if ratio > 1:
            return f"retention_ratio must be a number in (0, 1], got {ratio}"
        return "method='tome' cannot run here" if request.get("method") == "tome" else ""


def words_of(video: bytes, question: str) -> list[int]:
    """The tokens of the plain answer in free text."""
    start = _number(video, question)
    return [3 + (start + 7 * at) % len(WORDS) for at in range(8)]


def _number(video: bytes, question: str) -> int:
    return int.from_bytes(hashlib.sha256(video + question.encode()).digest()[:4], "big")
