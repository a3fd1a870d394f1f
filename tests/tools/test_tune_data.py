# SPDX-License-Identifier: MIT
"""What `flashvid tune` reads: a JSONL of questions or a folder of videos."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm.tools.errors import UserError
from flashvid_vllm.tools.tune.collect import spread
from flashvid_vllm.tools.tune.data import QUESTIONS, load


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "data.jsonl"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"pixels")
    return tmp_path


def test_a_folder_is_asked_general_questions(clip: Path) -> None:
    """In the order of the names; other files are no videos."""
    (clip / "B.MKV").write_bytes(b"others")
    (clip / "notes.txt").write_text("no video")
    data = load(clip)
    assert [item.video.name for item in data.items] == ["B.MKV"] * len(QUESTIONS) + ["a.mp4"] * len(QUESTIONS)
    assert {item.question for item in data.items} == set(QUESTIONS)
    assert {item.video.name for item in load(clip, limit=1).items} == {"B.MKV"}


def test_videos_are_sent_as_they_are(clip: Path) -> None:
    """A file by its bytes, a URL untouched; a report shows no folder and no query, which may have a key in it."""
    url = "https://example.com/videos/b.mp4?token=secret"
    items = load(write(clip, *({"video": v, "question": "?"} for v in ("a.mp4", str(clip / "a.mp4"), url)))).items
    assert [item.video.name for item in items] == ["a.mp4", "b.mp4"]  # the same file twice is asked once
    assert items[0].video.url() == "data:video/mp4;base64," + base64.b64encode(b"pixels").decode()
    assert items[1].video.url() == url


def test_answers_are_choices_or_letters(clip: Path) -> None:
    given = ("Blue", "b", "blue.", None)
    entries = [
        {"video": "a.mp4", "question": f"Q{i}", "choices": ["red", "blue"], "answer": a} for i, a in enumerate(given)
    ]
    assert [item.answer for item in load(write(clip, *entries)).items] == ["blue", "blue", "blue", None]


def test_the_key_follows_the_bytes_and_the_question_alone(clip: Path) -> None:
    """What is known of an item must not be taken for another's; its true answer may be added later."""
    entry = {"video": "a.mp4", "question": "Q", "choices": ["red", "blue"]}
    keys = [load(write(clip, entry | more)).items[0].key for more in ({}, {"answer": "red"}, {"question": "R"})]
    assert keys[0] == keys[1] != keys[2]
    (clip / "a.mp4").write_bytes(b"changed")
    assert load(write(clip, entry)).items[0].key != keys[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:2 is no JSON"),
        ("[]", "must be an object"),
        ('{"video": "a.mp4"}', "needs a 'question' that is text, got None"),
        ('{"video": 3, "question": "?"}', "needs a 'video' that is text, got 3"),
        ('{"video": "a.mp4", "question": "?", "options": []}', "has 'options'; known: video, question, choices"),
        ('{"video": "a.mp4", "question": "?", "choices": ["a"]}', "must be a list of 2 to 26 different texts"),
        ('{"video": "a.mp4", "question": "?", "choices": ["a", "a "]}', "must be a list of 2 to 26 different texts"),
        ('{"video": "a.mp4", "question": "?", "choices": ["x", "y"], "answer": "c"}', "answer 'c' is none of"),
        ('{"video": "a.mp4", "question": "?", "answer": 4}', "answer must be text, got 4"),
        ('{"video": "a.mp4", "question": "?", "id": ' + "9" * 5000 + "}", "is no JSON: Exceeds the limit"),
        ("[" * 20000, "is no JSON: nested too deeply"),
        ("[" * 300 + "]" * 300, "must be an object"),
        (r'{"video": "a.mp4", "question": "\ud800"}', r"half of a surrogate pair, which is no character: '\ud800'"),
        (r'{"video": "\ud800.mp4", "question": "?"}', "half of a surrogate pair"),
        (r'{"video": "data:\ud800", "question": "?"}', "half of a surrogate pair"),
        (r'{"video": "a.mp4", "question": "?", "choices": ["a", "\udfff"]}', "half of a surrogate pair"),
        (
            '{"video": "a.mp4", "question": "?", "choices": ["-5", "5", "0"], "answer": "5."}',
            "may be '-5' or '5'",
        ),
    ],
)
def test_lines_that_are_no_items(clip: Path, line: str, message: str) -> None:
    path = write(clip, {"video": "a.mp4", "question": "first"})
    path.write_text(path.read_text() + line)
    with pytest.raises(UserError) as error:
        load(path)
    assert message in str(error.value)


def test_nothing_to_ask(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "no videos in"), (tmp_path / "none", "no such file or folder")):
        with pytest.raises(UserError, match=message):
            load(path)
    with pytest.raises(UserError, match=r"nothing to ask in .*\n.*gone.mp4"):
        load(write(tmp_path, {"video": "gone.mp4", "question": "?"}))
    (tmp_path / "clip.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text"):
        load(tmp_path / "clip.bin")


def test_timed_items_are_of_as_many_videos(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]))
    items = load(tmp_path).items
    assert [item.video.name for item in spread(items, 3)] == ["0.mp4", "2.mp4", "4.mp4"]
    assert len({item.video.name for item in spread(items, 8)}) == 6
    assert len(spread(items, 8)) == 8


def test_separators_in_a_text_end_no_line(clip: Path) -> None:
    """U+2028, U+0085 and others are valid within a JSON string; a byte order mark is none of the first line's."""
    entry = {"video": "a.mp4", "question": "one\u2028two\u0085three"}
    (clip / "data.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert [item.question for item in load(clip / "data.jsonl").items] == [entry["question"]]


def test_choices_may_differ_in_punctuation_and_case(clip: Path) -> None:
    """A letter tells them apart; where the model answers in words they are the same."""
    for choices in (["C", "C++", "C#"], ["-5", "5"], ["50", "50%"], ["us", "US"], ["+", "-"]):
        path = write(clip, {"video": "a.mp4", "question": "?", "choices": choices, "answer": choices[1]})
        assert load(path).items[0].answer == choices[1]
        with pytest.raises(UserError, match="with --choices words case and punctuation"):
            load(path, words=True)


@pytest.mark.parametrize("video", ["a\0.mp4", "http://["])
def test_names_that_no_video_has(clip: Path, video: str) -> None:
    """Refused alone: the others are asked."""
    data = load(write(clip, {"video": "a.mp4", "question": "?"}, {"video": video, "question": "?"}))
    assert len(data.items) == 1
    assert data.refused[0].startswith("data.jsonl:2: ")
    assert repr(video)[1:-1] in data.refused[0]


def test_another_answer_to_the_same_question_is_told(clip: Path) -> None:
    """Whichever counts, accuracy depends on it; the same answer twice, once as a letter, is no contradiction."""
    entry = {"video": "a.mp4", "question": "?", "choices": ["x", "y"]}
    data = load(write(clip, *(entry | {"answer": answer} for answer in ("x", "A", "y"))))
    assert [item.answer for item in data.items] == ["x"]
    assert data.refused == ["data.jsonl:3: left out; data.jsonl:1 asks the same, and its answer is 'x', not 'y'"]


def test_a_name_that_is_no_utf8_can_be_shown(tmp_path: Path) -> None:
    """A report with it could not be written, after everything was asked."""
    with open(bytes(tmp_path) + b"/\xe9.mp4", "wb") as file:
        file.write(b"pixels")
    item = load(tmp_path).items[0]
    assert item.video.name == r"\udce9.mp4"
    assert item.video.url().endswith(base64.b64encode(b"pixels").decode())
