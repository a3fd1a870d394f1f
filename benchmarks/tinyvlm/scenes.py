# SPDX-License-Identifier: MIT
"""What a video shows, frame by frame, and how it is drawn: marks on frames of real clips."""

import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from ..common.clips import pictures

PIXELS = 224
NOISE = 2.0  # standard deviation of the camera's noise, of 255
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 170, 50),
    "blue": (30, 70, 230),
    "yellow": (250, 220, 30),
    "orange": (250, 130, 20),
    "purple": (150, 40, 190),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DOT = "dot"
LETTER = 38  # pixels from a letter of a printed word to the next
PLATE = (3 * LETTER + 14, 52)  # width, height of a printed word's plate
SMALL_PRINT = 2  # letters; printed small
SMALL_LETTER = 13
SMALL_PLATE = (SMALL_PRINT * SMALL_LETTER + 6, 20)


@dataclass(frozen=True)
class View:
    """A background: a window of one frame of a clip of `benchmarks.common.clips`.

    Attributes:
        source, index: the clip and its frame.
        left, top, side: the window, as shares of the frame's width and height.
        mirror: left and right exchanged.
        gain: factor on the brightness.
    """

    source: str
    index: int
    left: float
    top: float
    side: float
    mirror: bool
    gain: float


@dataclass(frozen=True)
class Mark:
    """Something drawn: a shape of SHAPES, DOT, or a word of capital letters. Centre and radius in pixels."""

    name: str
    colour: str
    x: float
    y: float
    radius: float = 0.0

    @property
    def is_word(self) -> bool:
        """Whether it is a printed word."""
        return self.name.isupper()

    @property
    def letters(self) -> list[tuple[str, float]]:
        """A word's letters, and where the middle of each is from left to right, in pixels."""
        pitch, middle = SMALL_LETTER if self.is_small else LETTER, (len(self.name) - 1) / 2
        return [(letter, self.x + (place - middle) * pitch) for place, letter in enumerate(self.name)]

    @property
    def reach(self) -> tuple[float, float]:
        """How far it goes from its centre, across and down, in pixels."""
        across, down = SMALL_PLATE if self.is_small else PLATE
        return (across / 2, down / 2) if self.is_word else (self.radius, self.radius)

    def overlaps(self, other: "Mark", margin: float = 0.0) -> bool:
        """Whether the squares around both are nearer than ``margin`` pixels, across and down."""
        (a, b), (c, d) = self.reach, other.reach
        return abs(self.x - other.x) <= a + c + margin and abs(self.y - other.y) <= b + d + margin

    @property
    def is_small(self) -> bool:
        """Whether it is a word in small print."""
        return self.is_word and len(self.name) == SMALL_PRINT


@dataclass(frozen=True)
class Frame:
    """One frame. ``scene`` is what the background shows, ``noise`` seeds the camera's noise."""

    view: View
    scene: str
    marks: tuple[Mark, ...]
    noise: int


Video = tuple[Frame, ...]


def render(video: Video) -> np.ndarray:
    """[T, 224, 224, 3] uint8 RGB."""
    return np.stack([_render(frame) for frame in video])


def _render(frame: Frame) -> np.ndarray:
    image = _background(frame.view)
    for mark in frame.marks:
        (_draw_word if mark.is_word else _draw_shape)(image, mark)
    rng = np.random.default_rng(frame.noise)
    rows, columns = rng.integers(0, PIXELS, 2)
    noise = np.roll(_noise(), (int(rows), int(columns)), (0, 1))
    return (image.astype(np.int16) + noise).clip(0, 255).astype(np.uint8)


def _background(view: View) -> np.ndarray:
    whole = pictures(view.source)[view.index]
    height, width = whole.shape[:2]
    top, left = round(view.top * height), round(view.left * width)
    window = whole[top : top + round(view.side * height), left : left + round(view.side * width)]
    image = cv2.resize(window, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)
    image = cv2.convertScaleAbs(image, alpha=view.gain)
    return np.ascontiguousarray(image[:, ::-1] if view.mirror else image)


@cache
def _noise() -> np.ndarray:
    """[224, 224, 3] int16; each frame takes it shifted by its own amount."""
    return np.random.default_rng(0).normal(0, NOISE, (PIXELS, PIXELS, 3)).round().astype(np.int16)


def _draw_shape(image: np.ndarray, mark: Mark) -> None:
    colour = COLOURS[mark.colour]
    edge = (0, 0, 0) if sum(colour) > 380 else (255, 255, 255)  # seen on any background
    centre, radius = (round(mark.x), round(mark.y)), round(mark.radius)
    if mark.name in ("circle", DOT):
        cv2.circle(image, centre, radius, colour, -1, cv2.LINE_AA)
        cv2.circle(image, centre, radius, edge, 1, cv2.LINE_AA)
    elif mark.name == "ring":
        width = max(4, radius // 3)
        cv2.circle(image, centre, radius - width // 2, edge, width + 2, cv2.LINE_AA)
        cv2.circle(image, centre, radius - width // 2, colour, width, cv2.LINE_AA)
    else:
        points = np.array([(mark.x + mark.radius * x, mark.y + mark.radius * y) for x, y in _outline(mark.name)])
        corners = [points.round().astype(np.int32)]
        cv2.fillPoly(image, corners, colour, cv2.LINE_AA)
        cv2.polylines(image, corners, True, edge, 1, cv2.LINE_AA)


@cache
def _outline(name: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 around 0."""
    if name == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if name == "triangle":
        return [(0, -1), (0.95, 0.8), (-0.95, 0.8)]
    if name == "cross":
        arm = 0.33
        quarter = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm)]
        return [_turned(x, y, quarters) for quarters in range(4) for x, y in quarter[:3]]
    if name == "star":
        radii = [1 if corner % 2 == 0 else 0.42 for corner in range(10)]
        angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")


def _turned(x: float, y: float, quarters: int) -> tuple[float, float]:
    for _ in range(quarters):
        x, y = -y, x
    return x, y


def _draw_word(image: np.ndarray, mark: Mark) -> None:
    (across, down), size, thick = (SMALL_PLATE, 0.5, 1) if mark.is_small else (PLATE, 1.5, 3)
    left, top = round(mark.x - across / 2), round(mark.y - down / 2)
    cv2.rectangle(image, (left, top), (left + across, top + down), (250, 250, 250), -1)
    for letter, middle in mark.letters:
        (width, height), _ = cv2.getTextSize(letter, cv2.FONT_HERSHEY_DUPLEX, size, thick)
        corner = round(middle - width / 2), round(mark.y + height / 2)
        cv2.putText(image, letter, corner, cv2.FONT_HERSHEY_DUPLEX, size, (10, 10, 10), thick, cv2.LINE_AA)
