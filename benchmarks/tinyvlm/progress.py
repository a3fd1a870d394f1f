# SPDX-License-Identifier: MIT
"""A progress bar with what is left of the time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar of ``total`` units, ``done`` of them behind; yields ``advance(units=1, note="")``."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, *times) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(units: int = 1, note: str = "") -> None:
            bar.update(task, advance=units, note=note)

        yield advance
