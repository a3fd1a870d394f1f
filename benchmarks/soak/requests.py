# SPDX-License-Identifier: MIT
"""What a soak test sends: clips that are made here, sound and broken, in a random mix of requests with a fixed seed."""

import base64
import io
import random
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..common.ask import video_url
from ..common.clips import write

Kind = Literal["answer", "refused", "abort while streaming", "abort while waiting"]
# (frames, height, width): few frames and many, wide and high. Not a single one: vLLM 0.32 answers 500 to that, with
# the plugin or without (its frame sampler for Qwen divides by the 0 pairs of frames in it)
SIZES = ((2, 112, 112), (5, 160, 96), (8, 96, 128), (16, 112, 168), (24, 64, 64), (40, 56, 84), (12, 224, 308))
FPS = 2.0  # of the files, and of what vLLM takes from them
QUESTIONS = ("What happens in this clip?", "Describe the video.", "The quick brown fox jumps over the lazy dog.")
SETTINGS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"retention_ratio": 0.1},
    {"retention_ratio": 0.5},
    {"retention_ratio": 1},
    {"token_budget": 7},
    {"token_budget": 60},
    {"alpha": 0.2},
    {"min_segments": 1, "retention_ratio": 0.3},
    {"enabled": False},
    *({"method": method, "retention_ratio": 0.2} for method in ("ttm", "adts", "evs", "vidcom2", "uniform")),
)
# what a request says, and what its refusal must say
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"mm_processor_kwargs": {"flashvid": {"retention_ratio": 1.5}}}, "retention_ratio"),
    ({"mm_processor_kwargs": {"flashvid": {"token_budget": 0}}}, "token_budget"),
    ({"mm_processor_kwargs": {"flashvid": {"retention_ration": 0.1}}}, "did you mean 'retention_ratio'"),
    ({"mm_processor_kwargs": {"flashvid": {"retention_ratio": 0.1, "token_budget": 5}}}, "exclude each other"),
    ({"mm_processor_kwargs": {"flashvid": {"method": "fastv"}}}, "FastV"),
    ({"mm_processor_kwargs": {"flashvid": {"backend": "torch"}}}, "the server chooses the backend"),
    ({"mm_processor_kwargs": {"flashvid": [0.1]}}, "must be an object"),
    ({"mm_processor_kwargs": {"flashvidd": {"alpha": 1}}}, "did you mean 'flashvid'"),
    ({"mm_processor_kwargs": {"fps": 1}}, "disabled by default"),
)
# of what is drawn: the share of each kind
SHARES = {"answer": 0.6, "refused": 0.2, "abort while streaming": 0.12, "abort while waiting": 0.08}


@dataclass(frozen=True)
class Case:
    """A request: its name, the body of a chat completion but for the model, and what must come of it.

    Attributes:
        message: what a refusal must say; "" where whatever it said alone will do (a broken video).
    """

    name: str
    kind: Kind
    body: dict[str, Any]
    message: str = ""


def moving_noise(num_frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """[num_frames, height, width, 3] uint8: a patch of noise that moves over a still scene."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(rng.integers(0, 255, (1, height, width, 3), dtype=np.uint8), num_frames, 0)
    for t in range(num_frames):
        y, x = (28 * t) % (height - 27), (42 * t) % (width - 27)
        frames[t, y : y + 28, x : x + 28] = rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)
    return frames


def make_clips(folder: Path) -> list[Path]:
    """Sound clips of all SIZES, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed, size in enumerate(SIZES):
        paths.append(folder / f"{'x'.join(map(str, size))}.mp4")
        write(moving_noise(*size, seed), paths[-1], FPS)
    return paths


def make_broken_clips(folder: Path, sound: Path) -> list[Path]:
    """A file that ends too early, one of sound alone, one that is no video, an empty one."""
    data = sound.read_bytes()
    audio = io.BytesIO()
    with wave.open(audio, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    contents = {
        "truncated": data[: len(data) // 2],
        "audio": audio.getvalue(),
        "text": b"not a video " * 100,
        "empty": b"",
    }
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.mp4")
        paths[-1].write_bytes(content)
    return paths


def _image(seed: int) -> dict[str, Any]:
    import cv2

    rng = np.random.default_rng(seed)
    size = (int(rng.integers(2, 7)) * 28, int(rng.integers(2, 7)) * 28)
    _, png = cv2.imencode(".png", rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png.tobytes()).decode()}"},
    }


def _video(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": video_url(path)}}


def _body(content: list[dict[str, Any]], max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 2,
        "return_tokens_as_token_ids": True,
        **more,
    }


def _settings(settings: dict[str, Any] | None) -> dict[str, Any]:
    return {} if settings is None else {"mm_processor_kwargs": {"flashvid": settings}}


def answered(clips: list[Path], count: int, rng: random.Random) -> list[Case]:
    """``count`` requests that are answered: videos, images and text in several orders, all settings."""
    cases = []
    for index in range(count):
        settings = SETTINGS[index % len(SETTINGS)]
        question = {"type": "text", "text": rng.choice(QUESTIONS)}
        shape = rng.choices(("v", "vv", "iv", "vi", "i", ""), (60, 15, 8, 4, 5, 8))[0]
        media = [_video(rng.choice(clips)) if letter == "v" else _image(rng.randrange(10**6)) for letter in shape]
        name = f"{index}: {shape or 'text'} {settings or ''}".strip()
        cases.append(Case(name, "answer", _body([*media, question], rng.randint(1, 24), **_settings(settings))))
    return cases


def refused(clips: list[Path], broken: list[Path], max_model_len: int) -> list[Case]:
    """Requests that are refused: bad settings with and without a video, broken videos, prompts that are too long."""
    question = {"type": "text", "text": QUESTIONS[0]}
    cases = []
    for index, (more, message) in enumerate(REFUSED):
        for media in ([], [_video(clips[index % len(clips)])]):
            cases.append(Case(f"{more}"[:80], "refused", _body([*media, question], 4, **more), message))
    for path in broken:
        cases.append(Case(f"{path.stem} video", "refused", _body([_video(path), question], 4)))
        # beside a sound one, which is fetched at the same time
        content = [_video(clips[0]), _video(path), question]
        cases.append(Case(f"{path.stem} video beside another", "refused", _body(content, 4)))
    long = {"type": "text", "text": "fox " * (2 * max_model_len)}
    for media in ([], [_video(clips[0])]):
        cases.append(Case("too long", "refused", _body([*media, long], 4), "maximum (context|model) length"))
    return cases


def aborted(clips: list[Path], rng: random.Random) -> list[Case]:
    """Requests with a long answer, whose client will leave."""
    cases: list[Case] = []
    kinds: tuple[Kind, ...] = ("abort while streaming", "abort while waiting")
    for kind in kinds:
        for settings in SETTINGS:
            content = [_video(rng.choice(clips)), {"type": "text", "text": rng.choice(QUESTIONS)}]
            cases.append(Case(f"{settings}", kind, _body(content, 300, stream=True, **_settings(settings))))
    return cases


def mix(cases: list[Case], seed: int) -> Iterator[Case]:
    """Cases without end, each kind in its share: the same for the same seed."""
    rng = random.Random(seed)
    by_kind = {kind: [case for case in cases if case.kind == kind] for kind in SHARES}
    while True:
        yield rng.choice(by_kind[rng.choices(list(SHARES), list(SHARES.values()))[0]])
