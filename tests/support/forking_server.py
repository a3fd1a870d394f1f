# SPDX-License-Identifier: MIT
"""`vllm serve` whose engine and workers are forks of the API server: vLLM is imported once and not three times.

    python tests/support/forking_server.py serve MODEL ...

On a CPU vLLM spawns them, for the sake of a pool of threads that the API server's process does not have. Saves 30 s of
a slow core for each server. That the plugin finds its way into spawned processes is for the servers that are left
as they are (`make test-full`); two engines that are forks tell no metrics.
"""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def forking() -> Iterator[None]:
    """Servers that are started in this block (`benchmarks.common.server.VllmServer`) are such servers."""
    from benchmarks.common.server import VllmServer

    program = VllmServer.program
    # `make compat` on a release out of range has a program of its own (any_vllm.py)
    VllmServer.program = program or [sys.executable, __file__]
    try:
        yield
    finally:
        VllmServer.program = program


if __name__ == "__main__":
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _=None: get_context("fork")  # type: ignore[assignment]
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
