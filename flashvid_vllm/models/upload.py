# SPDX-License-Identifier: MIT
"""Tables that are made on the host and used on the device."""

import torch
from torch import Tensor
from vllm.utils.platform_utils import is_pin_memory_available


def upload(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on ``device``, without waiting for what that still computes: the host's copy lies in pinned memory,
    which torch keeps until it has been read. Where there is none to be had (WSL), it waits."""
    if device.type == "cpu":
        return table
    return (table.pin_memory() if is_pin_memory_available() else table).to(device, non_blocking=True)
