# SPDX-License-Identifier: MIT
"""What was asked so far, a line each in a file: what is there is not asked again."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..viz import UserError

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
            lines = [json.loads(line) for line in old[:-1] if line]  # behind the last line's end is what was cut off
            found = lines[0]
            if found["kind"] != "run":
                raise ValueError
        except (ValueError, IndexError, KeyError, TypeError):
            raise UserError(f"{self.path} holds no results of flashvid tune; give another --results") from None
        for name in {**found, **head}:
            if found.get(name) != head.get(name):
                raise UserError(
                    f"{self.path} holds answers with {name} {found.get(name)!r}, and now it is {head.get(name)!r}; "
                    "give another --results, or --fresh to drop them"
                )
        self.lines = {self._key(line): line for line in lines[1:]}

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
