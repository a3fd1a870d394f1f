# SPDX-License-Identifier: MIT
"""Imported once by the process that tests' processes are forks of (forks.py): what they would import one by one."""

import contextlib
import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; the tests' models are directories

from .engine import prepare_process

# what servers and engines import when they must, and no sooner; what a release of vLLM lacks comes when it is used
MODULES = [
    "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker",
]  # fmt: skip
for module in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
prepare_process()
