# SPDX-License-Identifier: MIT
"""vLLM's Model Runner V2, the default on a GPU, on a CPU: its Triton kernels interpreted.

With FLASHVID_RUNNER=v2 in the environment tests/conftest.py, and tests/support/engine.py in a process of its own, call
`install` before anything imports vLLM or Triton; all engines of that process then have V2, which is vLLM's own class
(vllm/v1/worker/cpu/), not patched.
"""

import os
import sys

from .interpreter import hasten, take_any_mask

installed: list[bool] = []


class _Driver:
    """What vllm.triton_utils asks of a backend named cpu; it compiles nothing."""

    @staticmethod
    def is_active() -> bool:
        return True


def install() -> None:
    """Let engines that this process starts have Model Runner V2. A second call changes nothing."""
    if installed:
        return
    installed.append(True)
    assert not {"vllm", "triton"} & set(sys.modules), "too late"
    os.environ["TRITON_INTERPRET"] = "1"  # @triton.jit makes Python that works on CPU tensors
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=_Driver)
    take_any_mask()
    hasten()

    from vllm.model_executor.models import qwen3_vl

    qwen3_vl.HAS_TRITON = False  # one interpreted program a patch; torch has the same
