# SPDX-License-Identifier: MIT
"""Ask every item in every setting: answers at once as many as the user allows, times one after the other."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ..viz import UserError
from .client import Answer, Asking, Client, Failed
from .data import Item, Video
from .grid import PLAIN, Setting, plain
from .progress import progress
from .results import ANSWER, SCORE, TIME, Results

FLOOR = "floor"  # the setting of a score that was given another item's video
_HOPELESS = 10  # failures without one success: nothing will work
_Found = TypeVar("_Found")


@dataclass
class Collector:
    """Asks a server.

    Attributes:
        items: all of them, in order.
        asking: how questions are put.
        concurrency: items at a time.
        likelihood: whether plain answers in free text are scored in every setting.
        failures: a line for each request that failed; they are asked again by the next run.
    """

    results: Results
    items: Sequence[Item]
    asking: Asking
    concurrency: int
    likelihood: bool
    failures: list[str] = field(default_factory=list)
    _asked: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answers(self, client: Client, settings: Sequence[Setting]) -> None:
        """The plain answer and that of each setting, and the scores. Raises UserError if nothing works."""
        jobs = [(item, steps) for item in self.items if (steps := self._steps(client, item, settings))]
        todo = sum(len(steps) for _, steps in jobs)
        total = len(self.items) * (1 + len(settings)) + self._scored() * (2 + len(settings))
        if not todo:
            return
        stop = threading.Event()
        with progress("answers", max(total, todo), max(total, todo) - todo) as advance:
            pool = ThreadPoolExecutor(self.concurrency)
            futures = [pool.submit(self._item, item, steps, stop, advance) for item, steps in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def times(self, client: Client, settings: Sequence[Setting], count: int) -> None:
        """The time to the first token of ``count`` items, of as many videos as there are, nothing else being asked.

        The settings change places from one item to the next, and the first request of all does not count.
        """
        order = (plain(), *settings)
        missing = [
            (item, order[(turn + at) % len(order)])
            for turn, item in enumerate(spread(self.items, count))
            for at in range(len(order))
        ]
        missing = [(i, s) for i, s in missing if self.results.get(TIME, i.key, s.key) is None]
        if not missing:
            return
        total = min(count, len(self.items)) * len(order)
        with progress("times", total, total - len(missing)) as advance:
            item, setting = missing[0]
            self._try(item, "the first request", partial(client.first_token, item, setting.request, self.asking))
            for item, setting in missing:
                ask = partial(client.first_token, item, setting.request, self.asking)
                seconds = self._try(item, f"the time of {setting.name}", ask)
                if seconds is not None:
                    self.results.add(TIME, item.key, setting.key, seconds=round(seconds, 5))
                advance()

    def _scored(self) -> int:
        return sum(not item.choices for item in self.items) if self.likelihood else 0

    def _steps(self, client: Client, item: Item, settings: Sequence[Setting]) -> list[Callable[[], None]]:
        """What is missing of an item. The plain answer comes first: the scores are its."""
        steps: list[Callable[[], None]] = [
            partial(self._answer, client, item, setting)
            for setting in (plain(), *settings)
            if self.results.get(ANSWER, item.key, setting.key) is None
        ]
        if not self.likelihood or item.choices:
            return steps
        given: list[tuple[str, Video, Setting]] = [(s.key, item.video, s) for s in (plain(), *settings)]
        if (other := self._other_video(item)) is not None:
            given.append((FLOOR, other, plain()))
        return steps + [
            partial(self._score, client, item, name, video, setting)
            for name, video, setting in given
            if self.results.get(SCORE, item.key, name) is None
        ]

    def _other_video(self, item: Item) -> Video | None:
        """The next item's video that is not this one's; None: all are of one video."""
        at = self.items.index(item)
        others = (*self.items[at + 1 :], *self.items[:at])
        return next((other.video for other in others if other.video.digest != item.video.digest), None)

    def _item(
        self, item: Item, steps: Sequence[Callable[[], None]], stop: threading.Event, advance: Callable[[], None]
    ) -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                step()
                advance()
                if self.results.get(ANSWER, item.key, PLAIN) is None:  # nothing else of it could be compared
                    return
        except BaseException:
            stop.set()
            raise

    def _answer(self, client: Client, item: Item, setting: Setting) -> None:
        answer = self._try(item, setting.name, partial(client.ask, item, setting.request, self.asking))
        if answer is not None:
            self.results.add(
                ANSWER, item.key, setting.key, text=answer.text, ids=answer.ids, prompt_tokens=answer.prompt_tokens
            )

    def _score(self, client: Client, item: Item, name: str, video: Video, setting: Setting) -> None:
        known = self.results.lines[ANSWER, item.key, PLAIN]
        said = Answer(known["text"], known["ids"], known["prompt_tokens"])
        found = self._try(
            item,
            f"the score of {name if name == FLOOR else setting.name}",
            lambda: (client.logprobs(item, video, setting.request, self.asking, said),),
        )
        if found is not None:
            (steps,) = found
            mean = None if steps is None else round(sum(steps) / len(steps), 6)
            self.results.add(SCORE, item.key, name, logprob=mean, tokens=0 if steps is None else len(steps))

    def _try(self, item: Item, what: str, ask: Callable[[], _Found]) -> _Found | None:
        """What ``ask`` returns, or None and a line among the failures."""
        try:
            found = ask()
        except Failed as error:
            with self._lock:
                self.failures.append(f"{item.label()}, {what}: {error}")
                if not self._asked and len(self.failures) >= _HOPELESS:
                    raise UserError(
                        f"the first {_HOPELESS} requests all failed; the last one: {self.failures[-1]}"
                    ) from None
            return None
        self._asked += 1
        return found


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` items at even distances, each of another video as long as there are any."""
    first = {item.video.digest: item for item in reversed(items)}
    firsts = [item for item in items if first[item.video.digest] is item]
    rest = [item for item in items if first[item.video.digest] is not item]
    if count >= len(firsts):
        return [*firsts, *rest][:count]
    return [firsts[len(firsts) * at // count] for at in range(count)]
