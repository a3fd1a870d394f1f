# SPDX-License-Identifier: MIT
"""The plugin without its refusal of releases outside its range: a pytest plugin, for `make compat` to see what breaks.

    python -m pytest -p tests.support.any_vllm ...

Servers that tests start are run by this file, too:  python tests/support/any_vllm.py serve MODEL ...
"""

import sys
from pathlib import Path


def take_any() -> None:
    """Let this process's plugin support whatever vLLM there is."""
    from flashvid_vllm.serving import compat

    compat.VLLM_MIN, compat.VLLM_BELOW = (0, 0), (sys.maxsize, 0)


def pytest_configure() -> None:
    """Later than tests/conftest.py, which has a word to say before Triton is imported."""
    from benchmarks.common.server import VllmServer

    take_any()
    VllmServer.program = [sys.executable, str(Path(__file__).resolve())]


if __name__ in ("__main__", "__mp_main__"):  # the server, and the engine that it spawns
    take_any()
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
