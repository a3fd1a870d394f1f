# SPDX-License-Identifier: MIT
"""`vllm serve` whose engine and workers are forks of the API server: vLLM is imported once and not three times.

    python tests/support/forking_server.py serve MODEL ...

On a CPU vLLM spawns them, for the sake of a pool of threads that the API server's process does not have. Saves 30 s of
a slow core for each server. That the plugin finds its way into spawned processes is for tests/serving/test_server.py,
and two engines tell no metrics that are forks.
"""

import multiprocessing
import sys

if __name__ == "__main__":
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _=None: get_context("fork")  # type: ignore[assignment]
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
