# SPDX-License-Identifier: MIT
"""Scripts: what happens in a video. Each draws marks over time from a seeded generator.

move      two shapes cross the picture, each its own way
sequence  three or four shapes, one after the other
count     a shape that comes and goes one to four times beside one that stays
event     a long still video in which a shape is seen in one frame or two
crowd     one to four shapes that stay, each in a quarter of its own
timed     an event in one of the four intervals that questions ask about, in each as often
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from .backgrounds import Split, background, base_of, is_wide
from .scenes import COLOURS, DOT, PIXELS, PLATE, SHAPES, SMALL_PLATE, SMALL_PRINT, Frame, Mark, Video

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LETTERS = "ABEHKLNORT"
WORD_LENGTH = 3
INTERVALS, INTERVAL = 4, 6  # of frames, that an event is asked to be in
CUTS = 0.2  # share of running videos whose background is cut to another shot

Rng = np.random.Generator
Marks = list[list[Mark]]  # of every frame


@dataclass
class Intent:
    """What a script meant to show, for holding questions against: they are made from the frames, not from this."""

    kind: str
    directions: dict[str, str] = field(default_factory=dict)  # shape -> where it moves
    order: list[str] = field(default_factory=list)  # shapes as they come
    count: dict[str, int] = field(default_factory=dict)  # shape -> times that it comes
    brief: str = ""  # the shape that is seen for a moment
    word: str = ""
    printed: str = ""  # the word in small print


@dataclass(frozen=True)
class Script:
    """A video and what it was meant to show."""

    video: Video
    intent: Intent


def split_of_word(word: str) -> Split:
    """A word is shown, and offered as a choice, in one split only: 6 of 10 in training, 1 in validation, 3 in test."""
    number = 0
    for letter in word:
        number = number * 31 + LETTERS.index(letter) + 7
    place = number * 2654435761 % 2**32 * 10 // 2**32
    return "train" if place < 6 else "validation" if place < 7 else "test"


def draw_word(rng: Rng, split: Split, length: int = WORD_LENGTH) -> str:
    """A word of the split."""
    while True:
        word = "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), length))
        if split_of_word(word) == base_of(split):
            return word


def write(rng: Rng, split: Split, kind: str, frames: int | None = None) -> Script:
    """A video of a ``kind`` (move, sequence, count, event, crowd, timed); ``frames``: how many, else drawn."""
    intent = Intent(kind)
    marks = _SCRIPTS[kind](rng, intent, frames)
    still = kind in ("event", "crowd", "timed") or rng.random() < 0.35
    views = background(rng, split, len(marks), still)
    if not still and rng.random() < CUTS:
        cut = int(rng.integers(3, len(marks) - 2))
        views = views[:cut] + background(rng, split, len(marks) - cut, still=False)
    noise = int(rng.integers(2**31))
    if rng.random() < 0.6:
        _add_word(rng, split, marks, intent)
    if rng.random() < 0.6:
        _add_dot(rng, marks)
    if is_wide(split) and rng.random() < 0.6:
        _add_print(rng, split, marks, intent)
    video = tuple(
        Frame(view, scene, tuple(shown), noise + t)
        for t, ((view, scene), shown) in enumerate(zip(views, marks, strict=True))
    )
    return Script(video, intent)


def _shapes(rng: Rng, count: int) -> Iterator[Mark]:
    """``count`` marks of different shapes and colours, not placed yet."""
    names, colours = rng.permutation(SHAPES), rng.permutation(list(COLOURS))
    for name, colour in zip(names[:count], colours, strict=False):
        yield Mark(str(name), str(colour), 0, 0, rng.uniform(17, 28))


def _anywhere(rng: Rng, mark: Mark) -> Mark:
    margin = mark.radius + 4
    x, y = rng.uniform(margin, PIXELS - margin, 2)
    return replace(mark, x=float(x), y=float(y))


def _apart(a: Mark, b: Mark) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius + 4) ** 2


def _move(rng: Rng, intent: Intent, frames: int | None) -> Marks:
    count = frames or int(rng.integers(8, 12))
    while True:
        paths = [_path(rng, mark, count, intent) for mark in _shapes(rng, 2)]
        if all(_apart(a, b) for a, b in zip(*paths, strict=True)):
            return [list(shown) for shown in zip(*paths, strict=True)]
        intent.directions.clear()


def _path(rng: Rng, mark: Mark, count: int, intent: Intent) -> list[Mark]:
    name = str(rng.choice(list(DIRECTIONS)))
    intent.directions[mark.name] = name
    dx, dy = DIRECTIONS[name]
    way, margin = rng.uniform(90, 150), mark.radius + 4
    along, across = rng.uniform(margin, PIXELS - margin - way), rng.uniform(margin, PIXELS - margin)
    steps = np.linspace(0, way, count) + along
    if dx + dy < 0:
        steps = PIXELS - steps
    return [replace(mark, x=float(step if dx else across), y=float(step if dy else across)) for step in steps]


def _sequence(rng: Rng, intent: Intent, frames: int | None) -> Marks:
    shown = list(_shapes(rng, int(rng.integers(3, 5))))
    intent.order = [mark.name for mark in shown]
    marks: Marks = []
    for mark in shown:
        placed = _anywhere(rng, mark)
        marks += [[placed] for _ in range(int(rng.integers(2, 4)))]
        marks += [[] for _ in range(int(rng.integers(0, 2)))]
    marks = [[] for _ in range(max(0, 8 - len(marks)))] + marks
    return marks if frames is None else [marks[t * len(marks) // frames] for t in range(frames)]


def _count(rng: Rng, intent: Intent, frames: int | None) -> Marks:
    times = int(rng.integers(1, 5))
    comes, stays = _two_apart(rng)
    intent.count[comes.name] = times
    on = [int(n) for n in rng.integers(1, 3, times)]
    total = frames or int(rng.integers(max(9, sum(on) + times), 14))
    gaps = _shares(rng, total - sum(on), times + 1)
    marks: Marks = []
    for off, stay in zip(gaps, [*on, 0], strict=True):
        marks += [[stays] for _ in range(off)] + [[stays, comes] for _ in range(stay)]
    return marks


def _shares(rng: Rng, total: int, parts: int) -> list[int]:
    """``total`` as a sum of ``parts`` numbers of at least 1 (the first and the last may be 0)."""
    inner = rng.multinomial(total - (parts - 2), [1 / parts] * parts)
    return [int(n) + (0 < place < parts - 1) for place, n in enumerate(inner)]


def _event(rng: Rng, intent: Intent, frames: int | None) -> Marks:
    total = frames or int(rng.integers(16, 33))
    comes, stays = _two_apart(rng)
    intent.brief = comes.name
    length = int(rng.integers(1, 3))
    return _for_a_moment(comes, stays, total, int(rng.integers(2, total - length - 1)), length)


def _for_a_moment(comes: Mark, stays: Mark, total: int, start: int, length: int) -> Marks:
    return [[stays, comes] if start <= t < start + length else [stays] for t in range(total)]


def _timed(rng: Rng, intent: Intent, _: int | None) -> Marks:
    total, length = INTERVALS * INTERVAL, int(rng.integers(1, 3))
    comes, stays = _two_apart(rng)
    intent.brief = comes.name
    first = int(rng.integers(INTERVALS)) * INTERVAL
    start = int(rng.integers(max(2, first), min(first + INTERVAL, total - 1) - length + 1))
    return _for_a_moment(comes, stays, total, start, length)


def _crowd(rng: Rng, _: Intent, frames: int | None) -> Marks:
    half, quarters = PIXELS / 2, rng.permutation(4)
    shown = []
    for mark, quarter in zip(_shapes(rng, int(rng.integers(1, 5))), quarters, strict=False):
        x, y = rng.uniform(mark.radius + 4, half - mark.radius - 4, 2)
        shown.append(replace(mark, x=float(x + half * (quarter % 2)), y=float(y + half * (quarter // 2))))
    return [list(shown) for _ in range(frames or int(rng.integers(8, 12)))]


def _two_apart(rng: Rng) -> tuple[Mark, Mark]:
    while True:
        first, second = (_anywhere(rng, mark) for mark in _shapes(rng, 2))
        if _apart(first, second):
            return first, second


def _add_word(rng: Rng, split: Split, marks: Marks, intent: Intent) -> None:
    """A printed word in all frames, behind the shapes if there is no room beside them."""
    intent.word = draw_word(rng, split)
    for _ in range(30):
        x = float(rng.uniform(PLATE[0] / 2 + 2, PIXELS - PLATE[0] / 2 - 2))
        y = float(rng.uniform(PLATE[1] / 2 + 2, PIXELS - PLATE[1] / 2 - 2))
        reach = PLATE[0] / 2, PLATE[1] / 2
        covered = (
            abs(mark.x - x) < reach[0] + mark.radius and abs(mark.y - y) < reach[1] + mark.radius
            for shown in marks
            for mark in shown
        )
        if not any(covered):
            for shown in marks:
                shown.insert(0, Mark(intent.word, "black", x, y))
            return
    intent.word = ""


def _add_dot(rng: Rng, marks: Marks) -> None:
    """A dot of 12 to 16 pixels in all frames, where nothing else comes."""
    dot = Mark(DOT, str(rng.choice(list(COLOURS))), 0, 0, rng.uniform(6, 8))
    for _ in range(30):
        placed = _anywhere(rng, dot)
        others = [mark for shown in marks for mark in shown]
        if all(_apart(placed, m) for m in others if not m.is_word) and not any(
            abs(m.x - placed.x) < PLATE[0] / 2 + 10 and abs(m.y - placed.y) < PLATE[1] / 2 + 10
            for m in others
            if m.is_word
        ):
            for shown in marks:
                shown.append(placed)
            return


def _add_print(rng: Rng, split: Split, marks: Marks, intent: Intent) -> None:
    """A word in small print in all frames, where nothing else comes."""
    word = draw_word(rng, split, SMALL_PRINT)
    (across, down), margin = SMALL_PLATE, 2
    others = {mark for shown in marks for mark in shown}
    for _ in range(30):
        x, y = (float(rng.uniform(edge, PIXELS - edge)) for edge in (across / 2 + margin, down / 2 + margin))
        placed = Mark(word, "black", x, y)
        if not any(placed.overlaps(mark, margin) for mark in others):
            intent.printed = word
            for shown in marks:
                shown.append(placed)
            return


_SCRIPTS: dict[str, Callable[[Rng, Intent, int | None], Marks]] = {
    "move": _move,
    "sequence": _sequence,
    "count": _count,
    "event": _event,
    "crowd": _crowd,
    "timed": _timed,
}
