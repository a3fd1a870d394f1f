# SPDX-License-Identifier: MIT
"""The dtype for models that we make, on this machine."""

import functools
import sys

import torch

from flashvid_vllm.serving.cpu import slow_products


@functools.cache
def model_dtype() -> str:
    """The name: bfloat16, or float32 on a CPU without products in it. A line on stderr says which and why, once."""
    if torch.cuda.is_available():
        return "bfloat16"
    reason = slow_products(torch.bfloat16)
    name, why = ("float32", reason) if reason else ("bfloat16", "this CPU multiplies in it")
    print(f"dtype {name}: {why}", file=sys.stderr, flush=True)
    return name


def dtype_option() -> list[str]:
    """`model_dtype` as an option of `vllm serve`, which takes bfloat16 on every CPU if not told otherwise."""
    return ["--dtype", model_dtype()]
