# SPDX-License-Identifier: MIT
"""Inputs that tests and benchmarks share: golden vectors, awkward shapes, and videos with a known trait."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = sorted(path.stem for path in GOLDEN_FOLDER.glob("*.npz"))

# T, N, D: one frame, one token, and sizes beside the powers of two that kernels tile by.
SHAPES = [(1, 1, 8), (1, 7, 33), (2, 1, 16), (2, 63, 65), (5, 7, 64), (5, 65, 40)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """At fp32 tolerance: a few ulp of a sum of some 80 products of order 1, added up in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Golden:
    """One file of golden/: arrays as tensors, the settings they were made with."""

    arrays: dict[str, Tensor]
    params: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def segment_id(self) -> Tensor:
        lengths = self["segment_lengths"]
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    @property
    def candidate(self) -> Tensor:
        """[T, N] bool: the tokens that ADTS did not pick."""
        features = self["features"]
        return torch.ones(features.shape[:2], dtype=torch.bool).scatter_(1, self["selected"], False)


def golden(name: str) -> Golden:
    with np.load(GOLDEN_FOLDER / f"{name}.npz") as file:
        params = json.loads(str(file["params"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "params"}
    return Golden(arrays, params)


VIDEOS = ("scene", "noise", "static", "letterbox", "zeros", "nan", "infinite")


def video(
    kind: str, num_frames: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A video of a kind, and the attention that its tokens receive.

    Args:
        kind: "scene" drifts and has a cut in the middle; "noise" has nothing in common from frame to frame;
            "static" repeats one frame; "letterbox" is one colour in three quarters of every frame; "zeros";
            "nan" and "infinite" are scenes in which single tokens and a whole frame are not finite.

    Returns:
        features [T, N, D] of ``dtype`` and attention [T, N] float32.
    """
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(num_frames, n, generator=generator).add_(0.05)
    attention /= attention.sum(-1, keepdim=True)
    features = torch.randn(num_frames, n, d, generator=generator)
    if kind in ("scene", "letterbox", "nan", "infinite"):
        cut = (num_frames + 1) // 2
        features[:cut] = features[0] + 0.3 * features[:cut].cumsum(0)
        features[cut:] = features[cut:].cumsum(0) * 0.3 + features[cut:][:1]
    if kind == "static":
        features[:] = features[0].clone()
    elif kind == "letterbox":
        features[:, : -(-3 * n // 4)] = features[0, 0].clone()
    elif kind == "zeros":
        features.zero_()
    elif kind in ("nan", "infinite"):
        value = torch.nan if kind == "nan" else torch.inf
        features[:, n // 2, 0] = value
        features[num_frames // 2] = value
    elif kind not in VIDEOS:
        raise ValueError(f"kind must be one of {', '.join(VIDEOS)}; got {kind!r}")
    return features.to(dtype), attention
