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
from typing import Any, NoReturn

from ...cli import number
from . import PACKAGES, PlayError
from .guard import is_loopback

PORT = 8741
EXAMPLES = """\
examples:
  flashvid play --base-url http://localhost:8000/v1
  flashvid play --base-url http://gpu:8000/v1 --samples clips/ --clip openai/clip-vit-base-patch16

The server is one that runs `vllm serve MODEL --plugin flashvid`. Needs pip install '.[play]', to draw '.[viz]' too.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    except PlayError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    """Run the server on ``listener``. Raises PlayError."""
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
    """A socket that listens. Raises PlayError if the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        hint = "; --port 0 takes one that is free" if port else ""
        raise PlayError(400, f"cannot listen at {host}:{port}: {error.strerror or error}{hint}") from None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashvid play",
        description="A page in the browser: one clip, one question, answered plain and compressed side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base-url", default="http://localhost:8000/v1", metavar="URL", help="model's server; default: %(default)s"
    )
    parser.add_argument("--api-key", metavar="KEY", help="for that server; default: $OPENAI_API_KEY; never on the page")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="clips to offer; default: a small one")
    parser.add_argument(
        "--max-upload-mib", type=_positive(float), default=100, metavar="N", help="largest clip; default: 100"
    )
    parser.add_argument("--port", type=_port, default=PORT, help="default: %(default)s; 0: any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; default: this machine alone")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name this machine is opened by"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    tower = parser.add_argument_group("to draw kept tokens over the frames (one of them, as in flashvid viz)")
    towers = tower.add_mutually_exclusive_group()
    towers.add_argument("--model", metavar="DIR", help="the served model's directory or hub name: its vision tower")
    towers.add_argument("--clip", metavar="DIR", help="a CLIP model, such as openai/clip-vit-base-patch16")
    tower.add_argument("--frames", type=_positive(int), default=16, metavar="F", help="frames drawn; default: 16")
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
