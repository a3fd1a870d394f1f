# SPDX-License-Identifier: MIT
"""benchmarks.tinyvlm: its videos and questions, and what its training is told of them."""

import math
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from benchmarks.tinyvlm import backgrounds, batches, data, history, tokens
from benchmarks.tinyvlm.alignment import covered
from benchmarks.tinyvlm.questions import COUNTS, FAMILIES, FIRST, Question, ask, spell
from benchmarks.tinyvlm.scenes import SHAPES
from benchmarks.tinyvlm.scripts import DIRECTIONS, split_of_word

VIDEOS = 150
SPLITS: tuple[backgrounds.Split, ...] = ("train", "validation", "test")
WIDE: tuple[backgrounds.Split, ...] = ("wide-train", "wide-validation", "wide-test")


@cache
def asked(split: backgrounds.Split) -> list[Question]:
    """All questions of VIDEOS videos."""
    return [question for number in range(VIDEOS) for question in data.questions(split, number)]


@pytest.mark.parametrize("split", SPLITS + WIDE)
def test_the_same_number_gives_the_same_video_and_questions(split: backgrounds.Split) -> None:
    for number in range(20):
        first, questions = data.script(split, number), data.questions(split, number)
        data.script.cache_clear()
        assert data.script(split, number) == first
        assert data.questions(split, number) == questions
    assert data.video(split, 0) != data.video(split, 1)
    assert data.video("train", 0) != data.video("test", 0)


def test_test_backgrounds_are_not_in_training() -> None:
    used = {
        split: {(f.view.source, f.view.index) for number in range(VIDEOS) for f in data.video(split, number)}
        for split in SPLITS + WIDE
    }
    trained = used["train"] | used["validation"] | used["wide-train"] | used["wide-validation"]
    assert not trained & (used["test"] | used["wide-test"])
    inside = {
        split: {(s.source, t) for s in backgrounds.shots(split) for t in range(s.start, s.stop)}
        for split in SPLITS + WIDE
    }
    assert all(used[split] <= inside[split] for split in SPLITS + WIDE)
    assert not inside["train"] & inside["test"]


def test_test_words_are_not_in_training_not_even_as_choices() -> None:
    words: dict[str, set[str]] = {
        split: {choice for q in asked(split) if q.family in ("text", "print") for choice in q.choices}
        for split in SPLITS + WIDE
    }
    assert min(len(of_split) for of_split in words.values()) > 50
    for split in SPLITS + WIDE:
        assert {split_of_word(word.replace(" ", "")) for word in words[split]} == {backgrounds.base_of(split)}


@pytest.mark.parametrize("split", SPLITS + WIDE)
def test_four_different_choices_with_the_answer_among_them(split: backgrounds.Split) -> None:
    questions = asked(split)
    for question in questions:
        assert len(set(question.choices)) == 4
        assert question.answer in question.choices
        tokens.question_ids(question)  # every word is in the vocabulary
    families = set(FAMILIES if split in WIDE else FIRST)
    assert families - {"event", "when"} <= {question.family for question in questions} <= families


def test_the_answers_place_is_balanced_in_every_family() -> None:
    for family, count in Counter(q.family for q in asked("test")).items():
        places = Counter(q.choices.index(q.answer) for q in asked("test") if q.family == family)
        spread = 4 * (count * 3 / 16) ** 0.5  # four standard deviations
        assert all(abs(places[place] - count / 4) < spread for place in range(4)), (family, places)


def test_questions_say_what_the_script_meant() -> None:
    """The questions are made from the frames alone; the script keeps what it meant to show."""
    held: Counter[str] = Counter()
    for number in range(VIDEOS):
        intent = data.script("test", number).intent
        for question in data.questions("test", number):
            words, family = question.text.split(), question.family
            if family == "motion":
                expected = intent.directions[words[4]]
            elif family == "count":
                expected = str(intent.count[words[5]])
            elif family == "text":
                expected = spell(intent.word)
            elif family == "event" and words[0] == "which":
                expected = intent.brief
            elif family == "order":
                place = intent.order.index(words[-1]) + 1 if "after" in words else {"first": 0, "last": -1}[words[-1]]
                expected = intent.order[place]
            else:
                continue
            held[family] += 1
            assert question.answer == expected, (number, question, intent)
    assert min(held[family] for family in ("motion", "count", "text", "event", "order")) > 20


def test_the_wide_splits_questions_say_what_the_frames_show() -> None:
    """Worked out from the marks by other means than the questions are made by."""
    held: Counter[str] = Counter()
    for number in range(VIDEOS):
        script = data.script("wide-test", number)
        first = {mark.name: mark for mark in script.video[0].marks}
        for question in data.questions("wide-test", number):
            words, family = question.text.split(), question.family
            if family == "print":
                expected = spell(script.intent.printed)
            elif family == "number":
                assert script.intent.kind == "crowd"
                expected = str(sum(name in SHAPES for name in first))
            elif family == "when":
                shown = [t for t, frame in enumerate(script.video) if words[-1] in {mark.name for mark in frame.marks}]
                start, end = (int(part) for part in question.answer.split("-"))
                assert words[-1] == script.intent.brief
                assert shown
                assert all(start <= t <= end for t in shown)
                expected = question.answer
            elif family == "side":
                other, mark = first[words[5]], first[words[8]]
                angle = math.degrees(math.atan2(mark.y - other.y, mark.x - other.x)) % 360  # 0 right, 90 down
                expected = ("right", "down", "left", "up")[round(angle / 90) % 4]
                assert min(angle % 90, 90 - angle % 90) < 27  # nowhere near a diagonal
            else:
                continue
            held[family] += 1
            assert question.answer == expected, (number, question)
    assert min(held[family] for family in FAMILIES[len(FIRST) :]) > 20


def test_reversed_frames_turn_directions_and_order_round() -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = 0
    for number in range(VIDEOS):
        video = data.video("train", number)
        rng = np.random.default_rng(0)
        there = {q.text: q.answer for q in ask(video, rng, "train")}
        back = {q.text: q.answer for q in ask(video[::-1], rng, "train")}
        for text, answer in there.items():
            if text.startswith("which way"):
                assert back[text] == opposite[answer]
                turned += 1
        if "which shape comes first" in there:
            assert there["which shape comes first"] == back["which shape comes last"]
            turned += 1
    assert turned > 50


def test_history_says_at_a_shapes_last_token_what_the_script_meant() -> None:
    """The facts that a training loss asks for; each is one of a group, of directions, ranks, times and shapes."""
    ends = (4, 4 + history.MOST_SHAPES, 4 + history.MOST_SHAPES + len(COUNTS), history.FACTS)
    held: Counter[str] = Counter()
    for number in range(VIDEOS):
        script = data.script("train", number)
        facts, known = history.labels("train", number, range(len(script.video)))
        for name in {mark.name for frame in script.video for mark in frame.marks if mark.name in SHAPES}:
            t, mark = [(t, m) for t, frame in enumerate(script.video) for m in frame.marks if m.name == name][-1]
            token = int(mark.y // 32) * 7 + int(mark.x // 32)
            assert known[t, token]
            way, rank, times, before = (facts[t, token, a:b].tolist() for a, b in pairwise((0, *ends)))
            if name in script.intent.directions:
                assert way == [direction == script.intent.directions[name] for direction in DIRECTIONS]
                held["way"] += 1
            if name in script.intent.count:
                assert times == [count == str(script.intent.count[name]) for count in COUNTS]
                held["times"] += 1
            if name in script.intent.order:
                place = script.intent.order.index(name)
                assert rank == [place == n for n in range(history.MOST_SHAPES)]
                earlier = script.intent.order[place - 1] if place else ""
                assert before == [shape == earlier for shape in SHAPES]
                held["rank"] += 1
    assert min(held[what] for what in ("way", "times", "rank")) > 20


def test_history_of_wide_splits_says_when_how_many_and_on_which_side() -> None:
    held: Counter[str] = Counter()
    for number in range(60):
        video = data.video("wide-test", number)
        facts, known = history.labels("wide-test", number, range(len(video)))
        assert facts.shape[-1] == history.FACTS + history.WIDE_FACTS
        sides = [q for q in data.questions("wide-test", number) if q.family == "side"]
        seen: set[str] = set()
        for t, frame in enumerate(video):
            shapes = [mark for mark in frame.marks if mark.name in SHAPES]
            seen |= {mark.name for mark in shapes}
            for mark in shapes:
                token = int(mark.y // 32) * 7 + int(mark.x // 32)
                own = facts[t, token, history.FACTS :].tolist()
                held["shapes"] += bool(known[t, token])
                if sum(covered(other).flatten()[token] for other in shapes) == 1:  # else the later one's facts
                    assert own[:4] == [t // 6 == n for n in range(4)]
                    assert own[4:8] == [len(seen) == n for n in range(1, 5)]
                    for question in sides if t == 0 else ():
                        words = question.text.split()
                        if words[5] == mark.name:
                            place = list(DIRECTIONS).index(question.answer) * len(SHAPES) + SHAPES.index(words[8])
                            others = [own[8 + SHAPES.index(words[8]) + way * len(SHAPES)] for way in range(4)]
                            assert own[8 + place]
                            assert sum(others) == 1
                            held["side"] += 1
    assert held["shapes"] > 500
    assert held["side"] > 20


def test_history_counts_from_the_frames_chosen() -> None:
    """Reversed, a shape moves the other way; what was left out has not come."""
    number = next(n for n in range(VIDEOS) if data.script("train", n).intent.directions)
    intent, video = data.script("train", number).intent, data.video("train", number)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    there, known = history.labels("train", number, [0, len(video) - 1])
    back, _ = history.labels("train", number, [len(video) - 1, 0])
    for t, facts, turn in ((len(video) - 1, there, False), (0, back, True)):
        for mark in (mark for mark in video[t].marks if mark.name in SHAPES):
            meant = opposite[intent.directions[mark.name]] if turn else intent.directions[mark.name]
            token = int(mark.y // 32) * 7 + int(mark.x // 32)
            assert facts[1, token, :4].tolist() == [direction == meant for direction in DIRECTIONS]
    assert known.any(1).all()
    assert not there[0, :, :4].any()


@pytest.mark.parametrize("split", ["train", "wide-train"])
def test_rearranged_videos_still_have_questions_of_their_kind(split: backgrounds.Split) -> None:
    families = Counter(
        question.family
        for number in range(VIDEOS)
        for question in batches.sample(split, number, np.random.default_rng(number)).questions
    )
    assert min(families[family] for family in (FAMILIES if split in WIDE else FIRST)) > 20


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        tokens.encode("what colour is the elephant")
