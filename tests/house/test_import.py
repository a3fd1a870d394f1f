# SPDX-License-Identifier: MIT
"""torch is the only hard dependency: with it alone, everything but serving works."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "triton", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
USED = """
import torch
import flashvid_vllm
from flashvid_vllm import FlashVidConfig, compress, engine_args, ops

video = compress(torch.randn(4, 9, 16), torch.rand(4, 9), FlashVidConfig(retention_ratio=0.5))
assert video.tokens.shape == (18, 16)
assert ops.tree_roots(torch.full((2, 3), -1)).tolist() == [[0, 1, 2], [3, 4, 5]]
assert engine_args(token_budget=5)["mm_processor_kwargs"] == {"flashvid": {"token_budget": 5}}
flashvid_vllm.register()
"""
# all of core, and of the ops what is no kernel
ROOMS = """
import importlib, pkgutil
import flashvid_vllm.core

names = [found.name for found in pkgutil.walk_packages(flashvid_vllm.core.__path__, "flashvid_vllm.core.")]
assert {"flashvid_vllm.core.settings", "flashvid_vllm.core.methods.vidcom2"} <= set(names), names
for name in (*names, *(f"flashvid_vllm.ops.{module}" for module in ("env", "native", "reference"))):
    importlib.import_module(name)
"""
LOADED = """
loaded = [name for name in ("vllm", "triton", "transformers") if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize("code", [USED, ROOMS], ids=["used", "rooms"])
def test_with_torch_alone(code: str) -> None:
    command = [sys.executable, "-c", BLOCKED + code + LOADED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
