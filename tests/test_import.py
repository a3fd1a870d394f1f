# SPDX-License-Identifier: MIT
"""torch is the only hard dependency: with it alone, everything but serving works."""

import subprocess
import sys

ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "triton", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
import flashvid_vllm
from flashvid_vllm import FlashVidConfig, compress, engine_args, ops

video = compress(torch.randn(4, 9, 16), torch.rand(4, 9), FlashVidConfig(retention_ratio=0.5))
assert video.tokens.shape == (18, 16)
assert ops.tree_roots(torch.full((2, 3), -1)).tolist() == [[0, 1, 2], [3, 4, 5]]
assert engine_args(token_budget=5)["mm_processor_kwargs"] == {"flashvid": {"token_budget": 5}}
flashvid_vllm.register()
loaded = [name for name in ("vllm", "triton", "transformers") if name in sys.modules]
assert not loaded, loaded
import flashvid_vllm.core.compress
assert callable(flashvid_vllm.compress)
"""


def test_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
