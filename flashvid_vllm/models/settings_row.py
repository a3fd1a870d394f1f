# SPDX-License-Identifier: MIT
"""A request's settings as they travel beside a video's pixels, from the API server to the model."""

import json

import torch
from torch import Tensor

from ..core.config import ENCODER_SETTINGS, INNER_SETTINGS, FlashVidConfig

_ROW_BYTES = 512


def pack_settings(config: FlashVidConfig | None) -> Tensor:
    """The settings as one uint8 row of JSON: vLLM carries tensors, and casts floats to the model's dtype."""
    settings = None
    if config is not None:  # names are what they were without the settings that are off
        off = (() if config.encodes_less else ENCODER_SETTINGS) + (() if config.inner else INNER_SETTINGS)
        settings = {name: value for name, value in config.to_dict().items() if name not in off}
    text = json.dumps(settings).encode()
    if len(text) > _ROW_BYTES:
        raise ValueError(f"FlashVID settings of {len(text)} bytes exceed {_ROW_BYTES}: {text!r}")
    return torch.frombuffer(bytearray(text.ljust(_ROW_BYTES)), dtype=torch.uint8)


def unpack_settings(row: Tensor) -> FlashVidConfig | None:
    """The inverse of `pack_settings`; None: this video stays as it is."""
    settings = json.loads(bytes(row.flatten().tolist()))
    return FlashVidConfig(**settings) if settings is not None else None
