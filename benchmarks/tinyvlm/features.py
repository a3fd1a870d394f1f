# SPDX-License-Identifier: MIT
"""The tower's outputs of every frame, on disk: computed once, continued where it stopped.

The projector comes before the pooling and has a GELU, so all 196 patches of a frame are kept: 301 kB in bf16, twice
that in float32, which test videos have so that vLLM in float32 must answer the same. What may be compressed has the
received attention beside it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common import clip_model
from ..common.clips import CLIPS, ROOT
from ..common.machine import model_dtype
from . import data, tower
from .backgrounds import Split, base_of, is_wide
from .progress import progress
from .scenes import PIXELS, render

DEPTH = 11  # layers of the tower: LLaVA reads the last but one
PATCHES, WIDTH = 196, 768
BATCH = 8  # frames
SAVE_EVERY = 25  # batches
CACHE = ROOT / ".cache" / "tinyvlm"


Encode = Callable[..., list[Tensor]]  # see `encode`


@dataclass(frozen=True)
class Tower:
    """What makes a split's features.

    Attributes:
        tokens, width: of a frame's features.
        identity: what the features depend on.
        load: ready to run, for features that are to be exact or not.
    """

    tokens: int
    width: int
    identity: Callable[[], bytes]
    load: Callable[[bool], Encode]


def tower_of(split: Split) -> Tower:
    """CLIP, or in wide splits the second model's own."""
    if is_wide(split):
        return Tower(tower.TOKENS, tower.WIDTH, tower.weights, lambda _: partial(tower.encode, tower.load()))
    return Tower(PATCHES, WIDTH, f"{clip_model.SOURCE.sha256} {clip_model.VERSION} {DEPTH}".encode, _load_clip)


def _load_clip(exact: bool) -> Encode:
    dtype = torch.float32 if exact else getattr(torch, model_dtype())
    return partial(encode, clip_model.tower(clip_model.load()).to(dtype))


@cache
def fingerprint(split: Split) -> str:
    """What a split's frames depend on, as 12 hexadecimal digits: clips, tower, and what is written and drawn."""
    digest = hashlib.sha256(repr([source.sha256 for source in CLIPS.values()]).encode())
    digest.update(tower_of(split).identity())
    for number in range(200):
        digest.update(repr(data.video(split, number)).encode())
    for number in range(8):
        digest.update(render(data.video(split, number)).tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Store:
    """The features of the first ``count`` videos of a split, float32 in the split "test", bf16 in others.

    A frame has the tokens N and the width C of the split's `Tower`.
    """

    split: Split
    count: int
    root: Path = CACHE

    @property
    def exact(self) -> bool:
        """Whether float32."""
        return self.split == "test"

    @property
    def compressible(self) -> bool:
        """Whether the attention is kept: training never compresses."""
        return base_of(self.split) != "train"

    @property
    def tower(self) -> Tower:
        """What makes the features."""
        return tower_of(self.split)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.root / f"{self.split}-{fingerprint(self.split)}"

    @cached_property
    def starts(self) -> list[int]:
        """Of each video its first frame in the files; one more for the end."""
        lengths = (len(data.video(self.split, number)) for number in range(self.count))
        return [0, *accumulate(lengths)]

    @property
    def done(self) -> int:
        """Frames in the files."""
        path = self.folder / "done.json"
        return int(json.loads(path.read_text())["frames"]) if path.exists() else 0

    def require(self) -> None:
        """Raise RuntimeError if frames are missing."""
        if self.done < self.starts[-1]:
            raise RuntimeError(
                f"{self.folder} holds {self.done} of {self.starts[-1]} frames of {self.count} {self.split} videos; "
                "python -m benchmarks.tinyvlm features computes the others"
            )

    def features(self, number: int) -> Tensor:
        """[T, N, C] of video ``number``, float32 or bf16, read from disk when used."""
        return self._rows(self._features, number)

    def attention(self, number: int) -> Tensor:
        """[T, N] float32, the attention that each token receives in its last layer; not of training videos."""
        return self._rows(self._attention, number)

    def _rows(self, memory: Tensor, number: int) -> Tensor:
        if not 0 <= number < self.count:
            raise ValueError(f"video must be in [0, {self.count}), got {number}")
        return memory[self.starts[number] : self.starts[number + 1]]

    @cached_property
    def _features(self) -> Tensor:
        return self._map(
            "features", (self.tower.tokens, self.tower.width), torch.float32 if self.exact else torch.bfloat16
        )

    @cached_property
    def _attention(self) -> Tensor:
        if not self.compressible:
            raise ValueError("the attention of training videos is not kept; that of all others is")
        return self._map("attention", (self.tower.tokens,), torch.float32)

    def _map(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        kind: Any = np.float32 if dtype == torch.float32 else np.int16  # numpy has no bf16
        memory = np.memmap(self.folder / f"{name}.bin", kind, "r+")
        return torch.from_numpy(memory).view(dtype).view(-1, *shape)

    def fill(self) -> None:
        """Compute what is missing, with a progress bar."""
        total = self.starts[-1]
        if self.done >= total:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        run = self.tower.load(self.exact)
        files = [(self.folder / f"{name}.bin", size) for name, size in self._sizes().items()]
        with progress(f"{self.split} frames", total, self.done) as advance:
            while (done := self.done) < total:
                stop = min(done + BATCH * SAVE_EVERY, total)
                outputs = run(self._frames(done, stop), self.compressible, advance)
                outputs[0] = outputs[0].to(torch.float32 if self.exact else torch.bfloat16)
                for (path, size), output in zip(files, outputs, strict=True):
                    with path.open("r+b" if path.exists() else "wb") as file:
                        file.seek(done * size)
                        file.write(output.contiguous().view(torch.uint8).numpy().tobytes())
                self._mark(stop)

    def _sizes(self) -> dict[str, int]:
        """Bytes a frame in each file."""
        features = self.tower.tokens * self.tower.width * (4 if self.exact else 2)
        return {"features": features} | ({"attention": 4 * self.tower.tokens} if self.compressible else {})

    def _frames(self, start: int, stop: int) -> np.ndarray:
        """Frames ``start`` to before ``stop`` of the split's, [n, 224, 224, 3] uint8."""
        parts = []
        for number in range(self.count):
            first, end = self.starts[number : number + 2]
            if first < stop and end > start:
                video = data.video(self.split, number)
                parts.append(render(video[max(start - first, 0) : stop - first]))
        return np.concatenate(parts)

    def _mark(self, frames: int) -> None:
        new = self.folder / "done.new"
        new.write_text(json.dumps({"frames": frames}))
        new.replace(self.folder / "done.json")


@torch.inference_mode()
def encode(
    tower: Any, frames: np.ndarray, attend: bool, advance: Callable[[int], None] = lambda _: None
) -> list[Tensor]:
    """Frames [n, 224, 224, 3] uint8 -> [features [n, 196, 768]], and with ``attend`` the received attention [n, 196].

    Both are those of the tower's last layer but one, which LLaVA reads. Features have the tower's dtype, the attention
    is float32. ``advance`` is told how many frames are done.
    """
    if frames.shape[1:] != (PIXELS, PIXELS, 3):
        raise ValueError(f"frames must be [n, {PIXELS}, {PIXELS}, 3], got {list(frames.shape)}")
    features, attention = [], []
    for start in range(0, len(frames), BATCH):
        pixels = clip_model.preprocess(frames[start : start + BATCH]).to(next(tower.parameters()).dtype)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        *layers, last, _ = tower.encoder.layers  # the last one never runs
        for layer in layers:
            hidden = clip_model.run_layer(layer, hidden)
        if attend:
            attention.append(_received(last, hidden))
        features.append(clip_model.run_layer(last, hidden)[:, 1:])
        advance(len(pixels))
    return [torch.cat(parts) for parts in (features, attention) if parts]


def _received(layer: Any, hidden: Tensor) -> Tensor:
    """The attention [n, 196] that patches receive in a layer with input [n, 197, 768], worked out in float32."""
    x = layer.layer_norm1(hidden)
    query, key = (clip_model.heads(layer, project(x)) for project in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    logits = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(-1).mean((1, 2))[:, 1:]
