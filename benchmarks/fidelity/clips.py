# SPDX-License-Identifier: MIT
"""The clips of `benchmarks.fidelity`: shots of real videos, what kind each is, and their CLIP features, cached.

The kind was told by looking at the frames. Two montages and one pan are edited here out of real frames, because no
video at hand has them; their names say so. Several clips come from one video: they are not independent.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..common.clip_model import SOURCE, VERSION, Encoded, encode, preprocess
from ..common.clips import CLIPS, cache_directory, pictures

Kind = Literal["static camera", "camera motion", "cuts", "montage"]
FRAMES = 16


@dataclass(frozen=True)
class Shot:
    """Frames ``start`` to before ``stop`` of a clip in CLIPS; ``pan``: a window of 60 % moves across."""

    source: str
    start: int
    stop: int
    pan: bool = False


@dataclass(frozen=True)
class Clip:
    """FRAMES frames, the same number from each of its shots, evenly spaced in it."""

    kind: Kind
    about: str
    shots: tuple[Shot, ...]


OVERHEAD, TAXI, TRAM = Shot("bikes", 0, 30), Shot("bikes", 30, 76), Shot("bikes", 76, 137)
FENCE, PASSERS = Shot("bikes", 137, 187), Shot("bikes", 187, 242)
TOWERS, SKYLINE = Shot("city", 0, 116), Shot("city", 117, 190)
SPEAKER, RABBIT = Shot("speaker", 0, 173), Shot("bigbuckbunny", 0, 132)
PAN, EARTH, CAR = Shot("bigbuckbunny", 0, 132, True), Shot("world", 0, 901), Shot("carphone", 0, 120)
SCENES = {
    "speaker": Clip("static camera", "a man speaks before a bookshelf", (SPEAKER,)),
    "rabbit": Clip("static camera", "a cartoon rabbit wakes before his burrow", (RABBIT,)),
    "earth": Clip("static camera", "the turning Earth before black", (EARTH,)),
    "fence": Clip("static camera", "traffic behind a fence", (FENCE,)),
    "overhead": Clip("static camera", "a van passes, seen from above", (OVERHEAD,)),
    "car": Clip("static camera", "a man talks in a moving car, the camera fixed in it", (CAR,)),
    "taxi": Clip("camera motion", "a man and a taxi cross a blurred street", (TAXI,)),
    "tram": Clip("camera motion", "hand-held: a cyclist waits, cars pass in front", (TRAM,)),
    "passers": Clip("camera motion", "hand-held: legs pass a parked bicycle", (PASSERS,)),
    "towers": Clip("camera motion", "towers at night, slowly nearer", (TOWERS,)),
    "skyline": Clip("camera motion", "two towers at night, slowly nearer", (SKYLINE,)),
    "rabbit-pan": Clip("camera motion", "the rabbit, a window panned over it here", (PAN,)),
    "street": Clip("cuts", "a town street, six shots as they were edited", (Shot("bikes", 0, 250),)),
    "city": Clip("cuts", "both shots of the towers as they were edited", (Shot("city", 0, 190),)),
    "montage-8": Clip(
        "montage",
        "eight shots of two frames each, cut together here",
        (SPEAKER, OVERHEAD, SKYLINE, CAR, RABBIT, TRAM, EARTH, PASSERS),
    ),
    "montage-4": Clip("montage", "four shots of four frames each, cut together here", (FENCE, RABBIT, TOWERS, SPEAKER)),
}  # fmt: skip


def take(shot: Shot, count: int) -> np.ndarray:
    """``count`` frames [count, h, w, 3] of a shot, evenly spaced from its first to its last."""
    index = np.linspace(shot.start, shot.stop - 1, count).round().astype(int)
    frames = pictures(shot.source)[index]
    if not shot.pan:
        return frames
    height, width = frames.shape[1] * 6 // 10, frames.shape[2] * 6 // 10
    lefts = np.linspace(0, frames.shape[2] - width, count).round().astype(int)
    top = (frames.shape[1] - height) // 2
    return np.stack([f[top : top + height, left : left + width] for f, left in zip(frames, lefts, strict=True)])


def pixels(name: str) -> torch.Tensor:
    """The clip ``name``, a key of SCENES, as the tower wants it: [FRAMES, 3, 224, 224] float32."""
    shots = SCENES[name].shots
    return torch.cat([preprocess(take(shot, FRAMES // len(shots))) for shot in shots])


def fingerprint(name: str, depth: int) -> str:
    """What the features of a clip depend on, as 12 hexadecimal digits."""
    files = [CLIPS[shot.source].sha256 for shot in SCENES[name].shots]
    what = repr((files, [asdict(shot) for shot in SCENES[name].shots], FRAMES, SOURCE.sha256, VERSION, depth))
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def features(name: str, model: Any, depth: int) -> Encoded:
    """What the first ``depth`` layers of the tower make of a clip; computed once, then read from the cache."""
    folder = cache_directory().parent / "fidelity"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{fingerprint(name, depth)}.pt"
    if not path.exists():
        encoded = encode(model, pixels(name), depth)
        new = path.with_suffix(".new")
        torch.save(vars(encoded), new)
        new.replace(path)
    return Encoded(**torch.load(path))
