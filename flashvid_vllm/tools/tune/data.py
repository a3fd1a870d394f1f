# SPDX-License-Identifier: MIT
"""Videos and questions: from a JSONL file, or a folder of videos with general questions."""

import base64
import hashlib
import json
import mimetypes
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...core.config import shown
from ..endpoint import data_url
from ..errors import UserError

VIDEOS = (".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
IMAGES = (".png", ".jpg", ".jpeg")
URLS = ("http://", "https://", "data:", "file://")
# what a folder of videos is asked; free text, since nobody knows the answers
QUESTIONS = (
    "Describe what happens in this video.",
    "Which people, animals and objects can be seen, and what do they look like?",
    "What happens first, and what happens last?",
    "Where does this take place?",
    "Which text can be read in the video, if any?",
)
_KEYS = ("video", "question", "choices", "answer", "id")


@dataclass(frozen=True)
class Video:
    """A video as it is sent.

    Attributes:
        name: what it is called in reports: no folders, no query of a URL.
        source: a URL, a file, or a folder of images, which are its frames in the order of their names.
        digest: of its bytes (of a URL: of the URL), 16 hexadecimal digits.
    """

    name: str
    source: str | Path
    digest: str

    def url(self) -> str:
        """What a request takes: a URL as it is, a file in base64, images as vLLM's list of frames."""
        if isinstance(self.source, str):
            return self.source
        if self.source.is_dir():
            frames = [base64.b64encode(path.read_bytes()).decode() for path in frames_in(self.source)]
            return "data:video/jpeg;base64," + ",".join(frames)
        kind = mimetypes.guess_type(self.source.name)[0] or "video/mp4"
        return data_url(kind, self.source.read_bytes())


@dataclass(frozen=True)
class Item:
    """A question about a video.

    Attributes:
        choices: what the answer is one of; empty for free text.
        answer: the true one (of ``choices``, where there are any); None if nobody said.
    """

    video: Video
    question: str
    choices: tuple[str, ...] = ()
    answer: str | None = None

    @property
    def key(self) -> str:
        """What it is known by in the results, 16 hexadecimal digits; the true answer is no part of it."""
        return _digest(repr((self.video.digest, self.question, self.choices)).encode())

    def label(self) -> str:
        """How a message names it."""
        return f"{self.video.name}, {self.question[:60]!r}"


@dataclass(frozen=True)
class Data:
    """What there is to ask, and a line for each entry that cannot be asked or contradicts another."""

    items: list[Item]
    refused: list[str]


def load(path: Path, limit: int | None = None, words: bool = False) -> Data:
    """The items of a JSONL file or a folder.

    The same question twice is asked once; where its two answers differ, the first counts, and the other is refused.

    Args:
        limit: of so many videos, the first ones.
        words: choices are told apart by `plain_text` alone, as where the model answers in words.

    Raises:
        UserError: nothing there that could be asked, or a line that is no item: those are mistakes of the file, where a
            video that cannot be read is refused alone.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEOS)
        if not files:
            raise UserError(f"no videos in {path}; looked for {' '.join(VIDEOS)}")
        entries: list[tuple[str, dict[str, Any]]] = [
            (file.name, {"video": file.name, "question": question}) for file in files for question in QUESTIONS
        ]
        folder = path
    elif path.is_file():
        entries, folder = _lines(path, words), path.parent
    else:
        raise UserError(f"no such file or folder: {path}")
    data = Data([], [])
    videos: dict[str, Video | str] = {}
    known: dict[str, tuple[str, Item]] = {}  # key -> where it was first
    for where, entry in entries:
        source = entry["video"]
        if source not in videos:
            readable = sum(isinstance(video, Video) for video in videos.values())
            if limit is not None and readable >= limit:
                continue
            videos[source] = _video(source, folder)
            if isinstance(found := videos[source], str):
                data.refused.append(_printable(f"{where}: {found}"))
        video = videos[source]
        if isinstance(video, str):
            continue
        answer = entry.get("answer")
        choices = tuple(entry.get("choices") or ())
        item = Item(video, entry["question"], choices, _true(answer, choices, where))
        if item.key not in known:  # the same line again would be asked, and counted, twice
            known[item.key] = where, item
            data.items.append(item)
        elif item.answer != (first := known[item.key])[1].answer:
            was = "none" if first[1].answer is None else f"{first[1].answer!r:.80}"
            now = "none" if item.answer is None else f"{item.answer!r:.80}"
            data.refused.append(f"{where}: left out; {first[0]} asks the same, and its answer is {was}, not {now}")
    if not data.items:
        raise UserError(f"nothing to ask in {path}" + "".join(f"\n  {line}" for line in data.refused[:5]))
    return data


def plain_text(text: str) -> str:
    """A text for comparison: lower case, single spaces, no punctuation at either end."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def frames_in(folder: Path) -> list[Path]:
    """The images of a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)


def _lines(path: Path, words: bool) -> list[tuple[str, dict[str, Any]]]:
    entries = []
    try:
        # not splitlines(): U+2028, U+0085 and others may stand in a JSON string
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; DATA is a folder of videos or a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path.name}:{number}"
            entries.append((where, _entry(line, where, words)))
    if not entries:
        raise UserError(f"{path} is empty")
    return entries


def _entry(line: str, where: str, words: bool) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:  # of a number with thousands of digits too
        raise UserError(f"{where} is no JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is no JSON: nested too deeply") from None
    if not isinstance(entry, dict):
        raise UserError(
            f"{where} must be an object such as {{'video': 'a.mp4', 'question': '...'}}, got {shown(entry)}"
        )
    for name in ("video", "question"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise UserError(f"{where} needs a {name!r} that is text, got {shown(entry.get(name))}")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise UserError(f"{where} has {unknown[0]!r:.80}; known: {', '.join(_KEYS)}")
    choices = entry.get("choices")
    if choices is not None:
        texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
        if not texts or not 2 <= len(choices) <= 26 or len({choice.strip() for choice in choices}) < len(choices):
            raise UserError(f"{where}: choices must be a list of 2 to 26 different texts, got {shown(choices)}")
        if words and len({plain_text(choice) for choice in choices} - {""}) < len(choices):
            raise UserError(
                f"{where}: with --choices words case and punctuation at the ends do not count, and without them these "
                f"choices are not 2 or more different texts: {shown(choices)}"
            )
    if entry.get("answer") is not None and not isinstance(entry["answer"], str):
        raise UserError(f"{where}: answer must be text, got {shown(entry['answer'])}")
    for text in (entry["video"], entry["question"], *(choices or ()), entry.get("answer") or ""):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where} has half of a surrogate pair, which is no character: {shown(text)}") from None
    return entry


def _true(answer: str | None, choices: tuple[str, ...], where: str) -> str | None:
    """The true answer, with choices one of them: given as its text, or else as its letter."""
    if answer is None or not choices:
        return answer
    letter = plain_text(answer)
    exact = [choice for choice in choices if choice.strip() == answer.strip()]
    alike = [choice for choice in choices if letter and plain_text(choice) == letter]
    if exact or len(alike) == 1:
        return (exact or alike)[0]
    if alike:
        several = " or ".join(map(repr, alike))
        raise UserError(f"{where}: answer {answer!r:.80} may be {several:.120}; write it as it stands there")
    if len(letter) == 1 and letter in string.ascii_lowercase[: len(choices)]:
        return choices[string.ascii_lowercase.index(letter)]
    raise UserError(f"{where}: answer {answer!r:.80} is none of the choices {', '.join(choices)!r:.120}, nor a letter")


def _video(source: str, folder: Path) -> Video | str:
    """The video, or why it cannot be read."""
    if source.startswith(URLS):
        if source.startswith("data:"):
            return Video(f"data {_digest(source.encode())[:8]}", source, _digest(source.encode()))
        try:
            parts = urlsplit(source)
        except ValueError as error:
            return f"{source!r:.80} is no URL: {error}"
        return Video(Path(parts.path).name or parts.netloc, source, _digest(source.encode()))
    path = folder / source
    try:
        if path.is_dir():
            files = frames_in(path)
            if not files:
                return f"no images in the folder {path}; looked for {' '.join(IMAGES)}"
            return Video(_printable(path.name), path, _digest(b"".join(_hash(file) for file in files)))
        return Video(_printable(path.name), path, _hash(path).hex()[:16])
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    except ValueError as error:  # a name that no file can have
        return f"cannot read {source!r:.80}: {error}"


def _printable(text: str) -> str:
    """With escapes for the bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.digest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
