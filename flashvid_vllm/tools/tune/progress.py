# SPDX-License-Identifier: MIT
"""How far it is, with the time left: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 15  # seconds between lines where there is no terminal
WIDTH = 30


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show ``total`` requests, ``done`` of them behind; yields ``advance()``, for any thread."""
    terminal, lock, start = sys.stderr.isatty(), threading.Lock(), time.monotonic()
    state = {"done": done, "shown": start - (EVERY if terminal else 0)}

    def advance() -> None:
        with lock:
            state["done"] += 1
            now = time.monotonic()
            if now - state["shown"] < (0.2 if terminal else EVERY) and state["done"] < total:
                return
            state["shown"] = now
            text = line(what, int(state["done"]), total, (now - start) / (state["done"] - done))
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def line(what: str, done: int, total: int, each: float) -> str:
    """The state in a line: ``each`` is how many seconds a request took in this run."""
    full = WIDTH * done // max(total, 1)
    left = max(0, round(each * (total - done)))
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    clock = f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
    return f"{what} [{'=' * full}{' ' * (WIDTH - full)}] {done} of {total}, {clock} left"
