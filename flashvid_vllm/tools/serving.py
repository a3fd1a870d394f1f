# SPDX-License-Identifier: MIT
"""A `vllm serve MODEL --plugin flashvid` of our own, up while a context lasts."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

START_SECONDS = 1800  # a model may have to be downloaded
PATIENCE = 20  # seconds between SIGTERM and SIGKILL
_ERROR = re.compile(r"\b[A-Z]\w*Error: .*")
_OWN = ("--host", "--port", "--plugin", "--uds")


@contextlib.contextmanager
def serving(model: str, options: Sequence[str], seconds: float = START_SECONDS) -> Iterator[str]:
    """Yield the base URL of a server on the loopback interface that answers; every way out ends it.

    Args:
        model: a name on a model hub or a directory.
        options: further ones of ``vllm serve``.
        seconds: until it must answer.

    Raises:
        UserError: no vllm, an option that is ours to give, or the server ended or did not answer; with its last lines.
    """
    if given := next((option for option in options if option.split("=")[0] in _OWN), None):
        raise UserError(f"{given.split('=')[0]} is given to the server already; leave it out behind --")
    beside = Path(sys.executable).parent / "vllm"
    program = str(beside) if beside.exists() else shutil.which("vllm")
    if program is None:
        raise UserError("--model starts vllm serve, and there is no vllm here; install it, or give --base-url")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [program, "serve", model, "--plugin", "flashvid", "--host", "127.0.0.1", "--port", str(port), *options]
    log = Path(tempfile.mkstemp(prefix="flashvid-serve-", suffix=".log")[1])
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # vLLM imports 4000 modules in each process, twice as fast with bytecode
    with log.open("wb") as file, _signals_as_exceptions():
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}", log, seconds)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)
    log.unlink()  # kept, and named, where the server did not start


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    print(f"starting vllm serve (its log: {log}) ...", file=sys.stderr, flush=True)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    start = time.monotonic()
    while True:
        if process.poll() is not None:
            raise UserError(f"vllm serve ended with exit code {process.returncode}; its last lines:\n{_tail(log)}")
        if time.monotonic() - start > seconds:
            raise UserError(f"vllm serve did not answer within {seconds:.0f} s; its last lines:\n{_tail(log)}")
        with contextlib.suppress(OSError, urllib.error.URLError), direct.open(f"{url}/health", timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.5)


def _tail(log: Path, lines: int = 12) -> str:
    """The errors in the log, which vLLM tells long before its end, and the end."""
    text = log.read_text(errors="replace").splitlines()
    errors = [line[match.start() :] for line in text if (match := _ERROR.search(line))]
    return "\n".join([*list(dict.fromkeys(errors))[:3], "...", *text[-lines:], f"(all of it: {log})"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, which ends its processes in order; SIGKILL to what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the context in an orderly way, as Ctrl-C does."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
