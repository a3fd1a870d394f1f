# SPDX-License-Identifier: MIT
"""The command line: flashvid play --base-url http://localhost:8000/v1."""

import argparse
import importlib
import os
import signal
import socket
import sys
import webbrowser
from pathlib import Path
from typing import Any

from ...serving.cli import number
from ..command import Parser
from ..endpoint import is_loopback
from ..errors import UserError
from . import PACKAGES

PORT = 8741
HELP = """
usage: flashvid play [--base-url URL] [--model DIR | --clip DIR] [options]

A page in the browser: one clip, one question, answered plain and compressed,
side by side, by a server that runs `vllm serve MODEL --plugin flashvid`.

  --base-url URL        that server; default: http://localhost:8000/v1
  --api-key KEY         for that server; default: $OPENAI_API_KEY
  --samples DIR         clips to offer; default: a small one
  --max-upload-mib N    largest clip; default: 100
  --host H, --port P    where the page is; default: 127.0.0.1 and 8741; port 0:
                        any free one. Other machines see it where H lets them
  --allow-host NAME     a further name that this machine is opened by
  --open                open the page in the browser
what draws the kept tokens over the frames, as for flashvid viz, one of them:
  --model DIR           the served model's directory or hub name: its own tower
  --clip DIR            a CLIP model
  --frames F            frames drawn; default: 16
  -h, --help            this text; needs pip install 'flashvid-vllm[play]'

examples:
  flashvid play --base-url http://localhost:8000/v1 --open
  flashvid play --samples clips/ --clip openai/clip-vit-base-patch16
"""


def main(argv: list[str] | None = None) -> int:
    """Serve the page until interrupted; 2 where the user can put it right."""
    parser = _make_parser()
    options = parser.parse_args(argv)
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            packages = " ".join(PACKAGES.values())
            parser.error(f"this needs {package}: pip install {packages}, or '.[play]' in a clone of flashvid-vllm")
    try:
        listener = _listen(options.host, options.port)
        with listener:
            _serve(options, listener)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    """Run the server on ``listener``. Raises UserError."""
    import uvicorn

    from .app import Options, make_app

    app = make_app(
        Options(
            base_url=options.base_url,
            api_key=options.api_key or os.environ.get("OPENAI_API_KEY") or None,
            host=options.host,
            names=tuple(options.allow_host),
            samples=options.samples,
            max_upload_mib=options.max_upload_mib,
            tower=options.model or options.clip,
            clip=options.clip is not None,
            frames=options.frames,
        )
    )
    url = address(options.host, listener.getsockname()[1])

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.should_exit:
                return
            print(f"flashvid play: {url}   (Ctrl-C ends it)", flush=True)
            if not is_loopback(options.host):
                print(
                    f"flashvid play: --host {options.host}: whoever reaches this machine can use the page, and through "
                    "it the model's server with your key",
                    file=sys.stderr,
                    flush=True,
                )
            if options.open:
                webbrowser.open(url)

    # the end of the terminal ends it in an orderly way, too; uvicorn sees to the other signals
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listener])


def address(host: str, port: int) -> str:
    """What to open: an address that stands for all is this machine's."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        hint = "; --port 0 takes one that is free" if port else ""
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror or error}{hint}") from None


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser("flashvid play", HELP)
    add = parser.add_argument
    add("--base-url", default="http://localhost:8000/v1")
    add("--api-key")
    add("--samples", type=Path)
    add("--max-upload-mib", type=_positive(float), default=100)
    add("--port", type=_port, default=PORT)
    add("--host", default="127.0.0.1")
    add("--allow-host", action="append", default=[])
    add("--open", action="store_true")
    towers = parser.add_mutually_exclusive_group()
    towers.add_argument("--model")
    towers.add_argument("--clip")
    add("--frames", type=_positive(int), default=16)
    return parser


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = number(kind)(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
        return value

    return parse


def _port(text: str) -> int:
    value = int(number(int)(text))
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
