# SPDX-License-Identifier: MIT
"""Multiple-choice questions about a video, made from what its frames show, and their true answers.

Everything follows from the frames, so it holds for any selection of a video's frames too: reversed, thinned out, held.
The model gets the four choices and answers with the words of one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .backgrounds import SCENES, Split, base_of, is_wide
from .scenes import COLOURS, DOT, SHAPES, Mark, Video
from .scripts import DIRECTIONS, INTERVAL, INTERVALS, LETTERS, split_of_word

FIRST = ("attribute", "text", "small", "place", "motion", "order", "count", "event", "scene")
FAMILIES = (*FIRST, "when", "number", "print", "side")  # the last four of wide splits only
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
COUNTS = ("1", "2", "3", "4")
BRIEF, LONG = 2, 14  # an event takes at most BRIEF frames of a video of at least LONG
TIMES = tuple(f"{start}-{start + INTERVAL - 1}" for start in range(0, INTERVALS * INTERVAL, INTERVAL))
ASIDE = 40  # pixels that a shape must lie further along one axis than along the other
CLEARLY = 2  # times as far, but in training
MIDDLE, BORDER = 112, 14  # pixels; closer to the middle than BORDER a mark is in no corner

Rng = np.random.Generator


@dataclass(frozen=True)
class Question:
    """A question of a family of FAMILIES; ``answer`` is one of the four ``choices``."""

    family: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def prompt(self) -> str:
        """The choices and the question, as the model gets it: what is asked about comes last."""
        return f"{' , '.join(self.choices)} : {self.text}"


@dataclass(frozen=True)
class Facts:
    """What the questions are about.

    Attributes:
        frames: the video's length.
        tracks: shape, dot or word -> (frame, mark) of all frames that it is in, in order.
        scenes: what the background shows, once for each stretch.
    """

    frames: int
    tracks: dict[str, list[tuple[int, Mark]]]
    scenes: list[str]


def facts(video: Video) -> Facts:
    """Read the frames."""
    tracks: dict[str, list[tuple[int, Mark]]] = {}
    scenes: list[str] = []
    for t, frame in enumerate(video):
        for mark in frame.marks:
            tracks.setdefault(mark.name, []).append((t, mark))
        if not scenes or scenes[-1] != frame.scene:
            scenes.append(frame.scene)
    return Facts(len(video), tracks, scenes)


def ask(video: Video, rng: Rng, split: Split) -> list[Question]:
    """All questions that the video can answer, their choices in random order, in a fixed order of families."""
    seen = facts(video)
    families = FAMILIES if is_wide(split) else FIRST
    return [question for family in families for question in _ASK[family](seen, rng, split)]


def _question(rng: Rng, family: str, text: str, answer: str, near: Sequence[str], others: Sequence[str]) -> Question:
    """``near``: wrong choices to offer first, ``others``: those to fill up with."""
    wrong = [choice for choice in dict.fromkeys(near) if choice != answer][:3]
    rest = [choice for choice in dict.fromkeys(others) if choice != answer and choice not in wrong]
    wrong += [str(choice) for choice in rng.permutation(rest)[: 3 - len(wrong)]]
    choices = [str(choice) for choice in rng.permutation([answer, *wrong])]
    return Question(family, text, tuple(choices), answer)


def _shapes(seen: Facts) -> dict[str, list[tuple[int, Mark]]]:
    return {name: track for name, track in seen.tracks.items() if name in SHAPES}


def _brief(seen: Facts) -> list[str]:
    if seen.frames < LONG:
        return []
    return [name for name, track in _shapes(seen).items() if len(track) <= BRIEF]


def _runs(track: list[tuple[int, Mark]]) -> int:
    """How many times it comes."""
    return 1 + sum(later - earlier > 1 for (earlier, _), (later, _) in pairwise(track))


def _attribute(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    near = [track[0][1].colour for name, track in seen.tracks.items() if name in (*SHAPES, DOT)]
    for name, track in _shapes(seen).items():
        if name not in _brief(seen):
            yield _question(rng, "attribute", f"what colour is the {name}", track[0][1].colour, near, list(COLOURS))


def _small(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    if DOT in seen.tracks:
        near = [track[0][1].colour for track in _shapes(seen).values()]
        colour = seen.tracks[DOT][0][1].colour
        yield _question(rng, "small", "what colour is the small dot", colour, near, list(COLOURS))


def _text(seen: Facts, rng: Rng, split: Split) -> Iterator[Question]:
    for name, track in seen.tracks.items():
        if name.isupper() and not track[0][1].is_small:
            wrong = [_changed(name, rng, split) for _ in range(6)]
            yield _question(rng, "text", "which word is shown", spell(name), [], [spell(word) for word in wrong])


def _print(seen: Facts, rng: Rng, split: Split) -> Iterator[Question]:
    for name, track in seen.tracks.items():
        if track[0][1].is_small:
            wrong = [_changed(name, rng, split) for _ in range(12)]
            near: list[str] = []
            if base_of(split) != "train":  # the answer is no more like the others than they are like one another
                near = _all_different([name], [_changed(name, rng, split) for _ in range(60)])
            answer, near, wrong = spell(name), [spell(word) for word in near], [spell(word) for word in wrong]
            yield _question(rng, "print", "what is the small word", answer, near, wrong)


def _all_different(words: list[str], more: Sequence[str]) -> list[str]:
    """Three of ``more`` that differ in every letter from ``words`` and from one another, or others for want of them."""
    for word in more:
        if all(a != b for other in words for a, b in zip(other, word, strict=True)):
            words = [*words, word]
    return list(dict.fromkeys([*words[1:], *more]))[:3]


def spell(word: str) -> str:
    """A word as its letters, which are the tokens: "KAT" as "K A T"."""
    return " ".join(word)


def _changed(word: str, rng: Rng, split: Split) -> str:
    """A word of the split that differs from ``word`` in two letters or three."""
    while True:
        letters = list(word)
        for place in rng.permutation(len(word))[: int(rng.integers(2, 4))]:
            letters[place] = LETTERS[rng.integers(len(LETTERS))]
        changed = "".join(letters)
        if sum(a != b for a, b in zip(word, changed, strict=True)) >= 2 and split_of_word(changed) == base_of(split):
            return changed


def _corner(mark: Mark) -> str:
    """The corner that a mark is in, "" if it is near the middle lines."""
    return "" if min(abs(mark.x - MIDDLE), abs(mark.y - MIDDLE)) < BORDER else quarter(mark)


def quarter(mark: Mark) -> str:
    """The quarter of the picture that a mark's centre is in, of CORNERS."""
    return f"{'top' if mark.y < MIDDLE else 'bottom'}-{'left' if mark.x < MIDDLE else 'right'}"


def _place(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    for name, track in seen.tracks.items():
        if name.isupper() or (_moves(track) and len(track) > 1) or name in _brief(seen):
            continue
        if corner := _corner(track[0][1]):
            what = "small dot" if name == DOT else name
            yield _question(rng, "place", f"where is the {what}", corner, [], CORNERS)


def _moves(track: list[tuple[int, Mark]]) -> str:
    """The direction of DIRECTIONS that a mark moves in, by 50 pixels at least and along one axis; "" if it does not."""
    (_, first), (_, last) = track[0], track[-1]
    way = {name: (last.x - first.x) * dx + (last.y - first.y) * dy for name, (dx, dy) in DIRECTIONS.items()}
    best = max(way, key=lambda name: way[name])
    return best if way[best] >= 50 else ""


def _motion(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    for name, track in _shapes(seen).items():
        if direction := _moves(track):
            yield _question(rng, "motion", f"which way moves the {name}", direction, [], list(DIRECTIONS))


def _in_turn(seen: Facts) -> list[str]:
    """The shapes by their coming, if there are three or more and each is gone before the next comes; else none."""
    tracks = _shapes(seen)
    names = sorted(tracks, key=lambda name: tracks[name][0][0])
    alone = all(tracks[a][-1][0] < tracks[b][0][0] for a, b in pairwise(names))
    return names if len(names) >= 3 and alone else []


def _order(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    names = _in_turn(seen)
    if not names:
        return
    yield _question(rng, "order", "which shape comes first", names[0], names, SHAPES)
    yield _question(rng, "order", "which shape comes last", names[-1], names, SHAPES)
    before = int(rng.integers(len(names) - 1))
    others = [name for name in SHAPES if name != names[before]]
    near = [name for name in names if name != names[before]]
    text = f"which shape comes right after the {names[before]}"
    yield _question(rng, "order", text, names[before + 1], near, others)


def _count(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    tracks = _shapes(seen)
    if len(tracks) != 2 or _brief(seen) or any(_moves(track) for track in tracks.values()):
        return
    stays = [name for name, track in tracks.items() if len(track) == seen.frames]
    for name, track in tracks.items():
        if len(stays) == 1 and name not in stays and _runs(track) <= len(COUNTS):
            text = f"how many times comes the {name}"
            yield _question(rng, "count", text, str(_runs(track)), [], COUNTS)


def _event(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    brief = _brief(seen)
    if len(brief) != 1:
        return
    colour = seen.tracks[brief[0]][0][1].colour
    others = [name for name in _shapes(seen) if name not in brief]
    colours = [seen.tracks[name][0][1].colour for name in others]
    yield _question(rng, "event", "which shape is seen for a moment", brief[0], others, SHAPES)
    text = "what colour is the shape seen for a moment"
    yield _question(rng, "event", text, colour, colours, list(COLOURS))


def _when(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    if seen.frames != len(TIMES) * INTERVAL:
        return
    for name in _brief(seen):
        intervals = {t // INTERVAL for t, _ in seen.tracks[name]}
        if len(intervals) == 1:
            yield _question(rng, "when", f"when comes the {name}", TIMES[intervals.pop()], [], TIMES)


def _crowded(seen: Facts) -> dict[str, Mark]:
    """The shapes, if all are there from the first frame to the last and none goes far; else none."""
    tracks = _shapes(seen)
    if any(len(track) < seen.frames or _moves(track) for track in tracks.values()):
        return {}
    return {name: track[0][1] for name, track in tracks.items()}


def _number(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    if there := _crowded(seen):
        yield _question(rng, "number", "how many shapes are shown", str(len(there)), [], COUNTS)


def _side(seen: Facts, rng: Rng, split: Split) -> Iterator[Question]:
    there, training = _crowded(seen), base_of(split) == "train"
    pairs = [(name, other) for name in there for other in there if name != other]
    if not training:  # of two that say the same one, and none that is nearly diagonal
        pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs if pair[0] < pair[1]]
    for name, other in pairs:
        near, far = sorted(abs(x) for x in (there[name].x - there[other].x, there[name].y - there[other].y))
        direction = side_of(there[name], there[other])
        if direction and (training or far >= CLEARLY * near):
            text = f"on which side of the {other} is the {name}"
            yield _question(rng, "side", text, direction, [], list(DIRECTIONS))


def side_of(mark: Mark, other: Mark) -> str:
    """The direction of DIRECTIONS that ``mark`` lies in from ``other``, "" if it is not clear which."""
    right, down = mark.x - other.x, mark.y - other.y
    if abs(abs(right) - abs(down)) < ASIDE:
        return ""
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _scene(seen: Facts, rng: Rng, _: Split) -> Iterator[Question]:
    if len(seen.scenes) == 1:
        yield _question(rng, "scene", "what is in the background", seen.scenes[0], [], SCENES)
    elif len(seen.scenes) == 2:
        first, last = seen.scenes
        yield _question(rng, "scene", "what is in the background first", first, [last], SCENES)
        yield _question(rng, "scene", "what is in the background last", last, [first], SCENES)


_ASK: dict[str, Callable[[Facts, Rng, Split], Iterator[Question]]] = {
    "attribute": _attribute,
    "text": _text,
    "small": _small,
    "place": _place,
    "motion": _motion,
    "order": _order,
    "count": _count,
    "event": _event,
    "scene": _scene,
    "when": _when,
    "number": _number,
    "print": _print,
    "side": _side,
}
