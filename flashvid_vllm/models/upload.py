# SPDX-License-Identifier: MIT
"""Tables that are made on the host and used on the device."""

import torch
from torch import Tensor


def upload(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on ``device``, without waiting for what that still computes: the host's copy lies in pinned memory,
    which torch keeps until it has been read."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
