# SPDX-License-Identifier: MIT
"""What was asked so far, a line each in a file: what is there is not asked again."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

ANSWER, SCORE, TIME = "answer", "score", "time"  # kinds of lines
_VERSION = 1
Key = tuple[str, str, str]  # kind, item, setting


class Results:
    """The results in ``path``.

    Args:
        run: what they depend on beside item and setting: the model, the versions, how questions are put.
        fresh: drop what is there.

    Raises:
        UserError: the file holds those of another run, or is no such file.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], fresh: bool = False) -> None:
        self.path, self._lock = path, threading.Lock()
        self.lines: dict[Key, dict[str, Any]] = {}
        head = {"kind": "run", "version": _VERSION, **run}
        try:
            old = [] if fresh or not path.exists() else path.read_bytes().split(b"\n")
            if old and old != [b""]:
                self._take(old, head)
            self._write(head)
        except OSError as error:
            raise UserError(f"cannot keep results in {path}: {error.strerror or error}") from None

    def _take(self, old: list[bytes], head: Mapping[str, Any]) -> None:
        try:
            # behind the last line's end is what was cut off
            lines = [(number, json.loads(line)) for number, line in enumerate(old[:-1], 1) if line]
            found = lines[0][1]
            if found["kind"] != "run":
                raise ValueError
        except (ValueError, RecursionError, IndexError, KeyError, TypeError):
            raise UserError(f"{self.path} holds no results of flashvid tune; give another --results") from None
        for name in {**found, **head}:
            if found.get(name) != head.get(name):
                raise UserError(
                    f"{self.path} holds answers with {name} {found.get(name)!r}, and now it is {head.get(name)!r}; "
                    "give another --results, or --fresh to drop them"
                )
        for number, line in lines[1:]:
            if not _is_result(line):
                raise UserError(
                    f"{self.path}:{number} is no result of flashvid tune: {json.dumps(line)[:80]}; delete that line, "
                    "or give another --results"
                )
        self.lines = {self._key(line): line for _, line in lines[1:]}

    def _write(self, head: Mapping[str, Any]) -> None:
        new = self.path.with_name(self.path.name + ".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in (head, *self.lines.values())))
        new.replace(self.path)

    @staticmethod
    def _key(line: Mapping[str, Any]) -> Key:
        return line["kind"], line["item"], line["setting"]

    def get(self, kind: str, item: str, setting: str) -> dict[str, Any] | None:
        """What is known, or None."""
        return self.lines.get((kind, item, setting))

    def add(self, kind: str, item: str, setting: str, **values: Any) -> dict[str, Any]:
        """Keep a result; from any thread."""
        line = {"kind": kind, "item": item, "setting": setting, **values}
        with self._lock:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.lines[self._key(line)] = line
        return line


def _is_result(line: Any) -> bool:
    """Whether a line has what is read of its kind."""
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("kind", "item", "setting")):
        return False
    if line["kind"] == ANSWER:
        ids = line.get("ids")
        whole = isinstance(ids, list) and all(isinstance(token, int) for token in ids)
        return whole and isinstance(line.get("text"), str) and isinstance(line.get("prompt_tokens"), int)
    if line["kind"] == SCORE:
        return "logprob" in line and isinstance(line["logprob"], int | float | None)
    return line["kind"] == TIME and isinstance(line.get("seconds"), int | float) and line["seconds"] > 0
