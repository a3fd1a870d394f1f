# SPDX-License-Identifier: MIT
"""A `vllm serve` that is always stopped.

with VllmServer(model, "--plugin", "flashvid") as server:
    server.client().models.list()
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar

import httpx
import openai
import psutil

# "(EngineCore pid=12) INFO 01-31 10:20:30 [core.py:12] Text" -> "Text"
LOG_LINE = re.compile(r"INFO \S+ \S+ \[[^\]]*\] ([A-Z].*)")
MARK = "FLASHVID_SERVER"  # a variable that the processes of one server have in common
# a part of a process's command line, or of the title that it gives itself -> what it does while the server starts
DOING = {
    "vllm.model_executor.models.registry": "looking at the model's class, once for a version",
    "VLLM::Worker": "the worker loads the model and tries it",
    "VLLM::EngineCore": "the engine sets up its caches",
    "multiprocessing": "a process of the engine imports vLLM",
    "vllm serve": "the API server imports vLLM, reads the model's settings",
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class ServerError(RuntimeError):
    """The server did not start or died; the text ends with the end of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class VllmServer:
    """`vllm serve MODEL ARGS...`, up and answering while the context lasts.

    The server runs in a process group of its own, and leaving the context in any way (an exception, Ctrl-C,
    SIGTERM, the end of the program) ends every process of it.

    Args:
        model: a model directory or a name on a model hub.
        args: further arguments of `vllm serve`.
        log: where its output goes; a temporary file that is left behind, if None.
        env: variables on top of this process's; None as a value removes one.
        timeout: seconds until it must answer. A model that has to be downloaded needs more.
        progress: tell on stderr what it is doing until then.

    Attributes:
        program: the words that are run before "serve", in place of this environment's `vllm`.
    """

    program: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        model: str | os.PathLike[str],
        *args: str,
        log: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 600,
        progress: bool = True,
    ) -> None:
        self.local = Path(model).is_dir()
        self.model = str(Path(model).resolve()) if self.local else str(model)
        self.args, self.timeout, self.progress = args, timeout, progress
        self.log = log or Path(tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")[1])
        self.env = self._environment(env or {})
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds_to_start = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self._used: dict[int, float] = {}  # seconds of processor time of each process at the last look

    def _environment(self, changes: Mapping[str, str | None]) -> dict[str, str]:
        env = dict(os.environ)
        env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_COLOR": "0", "PYTHONUNBUFFERED": "1"}
        env[MARK] = uuid.uuid4().hex
        if self.local:
            env["HF_HUB_OFFLINE"] = "1"
        # vLLM imports 4000 modules in each of its processes: 34 s of a slow core without their bytecode, 14 s with it
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, read by the CPU build only; its default is 4
        for name, value in changes.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    @property
    def command(self) -> list[str]:
        """What is run: the `vllm` of this interpreter's environment."""
        program = self.program or [str(Path(sys.executable).parent / "vllm")]
        return [*program, "serve", self.model, "--host", "127.0.0.1", "--port", str(self.port), *self.args]

    def client(self, timeout: float = 600) -> openai.OpenAI:
        """A client of this server: without retries, which would spoil timings, and without a proxy."""
        http = openai.DefaultHttpxClient(trust_env=False)
        url = f"{self.base_url}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout, http_client=http)

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ServerError: it ended, or did not answer in time. It is stopped then.
        """
        self.seconds_to_start = 0.0
        atexit.register(self.stop)
        self._catch_signals()
        try:
            self.process = self.launch()
            self._wait_until_up(self.process)
        except BaseException:
            self.stop()
            raise

    def launch(self) -> subprocess.Popen[bytes]:
        """The first process of the server, in a session of its own."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        start = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5) as http, Progress(self) as progress:
            while True:
                seconds = time.monotonic() - start
                if process.poll() is not None:
                    raise ServerError(f"vllm serve ended with exit code {process.returncode}\n{self.tail()}")
                if seconds > self.timeout:
                    raise ServerError(f"vllm serve did not answer within {self.timeout:.0f} s\n{self.tail()}")
                with contextlib.suppress(httpx.TransportError):
                    if http.get(f"{self.base_url}/health").status_code == 200:
                        self.seconds_to_start = seconds
                        return
                progress.show(seconds)
                time.sleep(0.25)

    def tail(self, lines: int = 40) -> str:
        """The end of the log, and where all of it is."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([*text, f"(all of it: {self.log})"])

    def last_message(self) -> str:
        """The last thing that vLLM said it is doing."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            if found := LOG_LINE.findall(file.read().decode(errors="replace")):
                return str(found[-1]).strip()
        return "starting"

    def busiest(self) -> str:
        """What the process does that has used the processors most since the last call, or nothing if none did."""
        used, most = {}, (0.2, "")  # seconds
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                times, command = process.cpu_times(), " ".join(process.cmdline())
                used[process.pid] = times.user + times.system
                doing = next((doing for mark, doing in DOING.items() if mark in command), "a process of the server")
                most = max(most, (used[process.pid] - self._used.get(process.pid, 0.0), doing))
        self._used = used
        return most[1]

    def processes(self) -> list[psutil.Process]:
        """Every live process of the server: of its group, and those that left it but carry its mark."""
        if self.process is None:
            return []
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # a process that sets its title overwrites its environment, one that makes a session leaves the group
                member = os.getpgid(process.pid) == self.process.pid or process.environ().get(MARK) == self.env[MARK]
                if member and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stop(self, patience: float = 20) -> None:
        """End every process of the server. Harmless if repeated.

        SIGTERM to the first one, which ends the others in order; after `patience` seconds, or if it was gone
        already, SIGKILL to what is left. A server that is not up yet does not listen: it gets 3 seconds.
        """
        atexit.unregister(self.stop)
        process, members = self.process, self.processes()
        try:
            if process is not None and process.poll() is None:
                if self.progress:
                    print("stopping vllm serve ...", file=sys.stderr, flush=True)
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience if self.seconds_to_start else 3)
                psutil.wait_procs(members, timeout=2)
        finally:  # also when Ctrl-C is pressed again
            self._kill(tracker=False)
            self._kill(tracker=True)
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
            self.process = None
            self._release_signals()

    def _kill(self, tracker: bool) -> None:
        """SIGKILL to what is left, but time to end by itself for Python's tracker of shared memory.

        That one waits for the others to end, and then removes the segments that they left.
        """
        left = self.processes()
        if tracker:
            left = psutil.wait_procs(left, timeout=2)[1]
        for process in left:
            with contextlib.suppress(psutil.Error):
                if tracker or "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
        psutil.wait_procs(left, timeout=10 if tracker else 0)

    def _catch_signals(self) -> None:
        """Turn SIGTERM and SIGHUP into SystemExit, so that the context is left in an orderly way."""
        if threading.current_thread() is not threading.main_thread():
            return

        def leave(number: int, _frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        self._handlers = {number: signal.signal(number, leave) for number in STOP_SIGNALS}

    def _release_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers = {}

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Progress:
    """Shows what a starting server does: one line that changes on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, server: VllmServer) -> None:
        self.server, self.terminal, self.shown = server, sys.stderr.isatty(), -1.0
        self.message, self.since, self.looked, self.doing = "", 0.0, 0.0, ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server.progress and self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self, seconds: float) -> None:
        """Show the state after `seconds`, if it is time."""
        if not self.server.progress or seconds - self.shown < (1 if self.terminal else 10):
            return
        self.shown = seconds
        message = self.server.last_message()
        if message != self.message:
            self.message, self.since, self.doing = message, seconds, ""
        if seconds - self.looked >= 5:
            self.looked, self.doing = seconds, self.server.busiest()
        text = f"vllm serve, {seconds:3.0f} s: {message[:90]}"
        if seconds - self.since >= 5:  # it is long done with that
            text = f"vllm serve, {seconds:3.0f} s: {self.doing or 'nothing is busy'} (last said: {message[:40]})"
        start, end = ("\r\033[K", "") if self.terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
