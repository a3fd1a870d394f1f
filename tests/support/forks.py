# SPDX-License-Identifier: MIT
"""Processes that begin with vLLM imported: `vllm serve`, or a call, as forks of a process that does nothing else.

Importing vLLM takes 15 s and more of a slow core, and a server does it three times: its engine and its worker are
spawned on a CPU, for the sake of a pool of threads that the API server's process does not have. That the plugin finds
its way into spawned processes is for the servers that are left as they are (`make test-full`); two engines that are
forks tell no metrics.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .engine import let_vllm_fork

_FORKS = multiprocessing.get_context("forkserver")


class Fork:
    """A process in a session of its own, with what of `subprocess.Popen` is asked for.

    Args:
        run: what it does, a function of a module.
        arguments: its arguments.
        env: all its variables, but for those that are read when vLLM is imported: those are this process's.
        log: where it prints.
    """

    def __init__(self, run: Callable[..., Any], arguments: Sequence[Any], env: Mapping[str, str], log: Path) -> None:
        _FORKS.set_forkserver_preload([f"{__package__}.imported"])
        self._process = _FORKS.Process(target=_begin, args=(run, arguments, dict(env), str(log)))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return status


def _begin(run: Callable[..., Any], arguments: Sequence[Any], env: Mapping[str, str], log: str) -> None:
    """The first thing in a fork, which may fork itself."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    let_vllm_fork()
    run(*arguments)


def _look_again() -> None:
    """prometheus_client asks when it is imported whether processes share their metrics; vLLM decides it later."""
    from prometheus_client import values

    values.ValueClass = values.get_value_class()


def serve(arguments: Sequence[str]) -> None:
    """What `vllm` with these arguments does; in a fork."""
    os.register_at_fork(after_in_child=_look_again)
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()


@contextmanager
def forking() -> Iterator[None]:
    """Servers that are started in this block (`benchmarks.common.server.VllmServer`) are forks."""
    from benchmarks.common.server import VllmServer

    launch = VllmServer.launch

    def fork(server: VllmServer) -> Any:
        if type(server).command is not VllmServer.command or server.program:  # another program than vLLM's
            return launch(server)
        server.log.write_bytes(b"")
        return Fork(serve, [server.command[1:]], server.env, server.log)

    VllmServer.launch = fork  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        VllmServer.launch = launch  # type: ignore[method-assign]


def _call(function: Callable[..., Any], arguments: Sequence[Any], result: str) -> None:
    Path(result).write_text(json.dumps(function(*arguments)))


def in_fork(function: Callable[..., Any], directory: Path, *arguments: Any, env: Mapping[str, str] = {}) -> Any:
    """What a function of a test module returns in a process of its own, the result passed as JSON.

    ``directory``: where its result and what it prints go.
    """
    result, log = directory / "result.json", directory / "log"
    fork = Fork(_call, [function, arguments, str(result)], os.environ | env, log)
    assert fork.wait(1800) == 0, log.read_text(errors="replace")[-5000:]
    return json.loads(result.read_text())


def seconds_of_forks() -> float:
    """Processor seconds of the forks that have ended, and of the process that they come from."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    with contextlib.suppress(psutil.Error):
        return sum(psutil.Process(pid).cpu_times()[:4]) if pid else 0.0
    return 0.0
