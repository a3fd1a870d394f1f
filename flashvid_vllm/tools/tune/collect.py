# SPDX-License-Identifier: MIT
"""Ask every item in every setting: answers at once as many as the user allows, times one after the other."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ..errors import UserError
from .client import Answer, Asking, Client, Failed
from .data import Item, Video
from .grid import PLAIN, Setting, plain
from .progress import progress
from .results import ANSWER, SCORE, TIME, Results

FLOOR = "floor"  # the setting of a score that was given another item's video
LEAST_LOGPROB = -50.0  # of a token; vLLM says -9999 of one that is impossible
_OTHERS = 3  # other videos that are tried for the floor
_HOPELESS = 10  # failures without one success: nothing will work
_Found = TypeVar("_Found")
_Job = tuple[Item, Sequence[Callable[[], None]]]  # an item and what is to be asked of it, in order


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
        """The plain answer and that of each setting, and the scores. Raises UserError if nothing works.

        The floors come last: only then is it known which videos can be answered about.
        """
        jobs = [(item, steps) for item in self.items if (steps := self._steps(client, item, settings))]
        floors: list[_Job] = [(item, [partial(self._floor, client, item)]) for item in self.items if self._lacks(item)]
        todo = sum(len(steps) for _, steps in jobs) + len(floors)
        total = len(self.items) * (1 + len(settings)) + sum(map(self._is_scored, self.items)) * (2 + len(settings))
        if not todo:
            return
        with progress("answers", max(total, todo), max(total, todo) - todo) as advance:
            self._run(jobs, advance)
            self._run([(item, steps) for item, steps in floors if self._answered(item)], advance)

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

    def _run(self, jobs: Sequence[_Job], advance: Callable[[], None]) -> None:
        """Each item's steps in turn, ``concurrency`` items at once."""
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency)
        futures = [pool.submit(self._item, item, steps, stop, advance) for item, steps in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _is_scored(self, item: Item) -> bool:
        return self.likelihood and not item.choices

    def _steps(self, client: Client, item: Item, settings: Sequence[Setting]) -> list[Callable[[], None]]:
        """What is missing of an item but its floor. The plain answer comes first: the scores are its."""
        steps: list[Callable[[], None]] = [
            partial(self._answer, client, item, setting)
            for setting in (plain(), *settings)
            if self.results.get(ANSWER, item.key, setting.key) is None
        ]
        if not self._is_scored(item):
            return steps
        return steps + [
            partial(self._score, client, item, setting.key, setting, [item.video])
            for setting in (plain(), *settings)
            if self.results.get(SCORE, item.key, setting.key) is None
        ]

    def _lacks(self, item: Item) -> bool:
        """Whether an item's floor is missing, and there is another video to take it with."""
        if not self._is_scored(item) or self.results.get(SCORE, item.key, FLOOR) is not None:
            return False
        return any(other.video.digest != item.video.digest for other in self.items)

    def _answered(self, item: Item) -> bool:
        return self.results.get(ANSWER, item.key, PLAIN) is not None

    def _other_videos(self, item: Item) -> list[Video]:
        """The next _OTHERS videos that are not this item's, of those about which the plain model has answered."""
        at = self.items.index(item)
        others = (*self.items[at + 1 :], *self.items[:at])
        found: dict[str, Video] = {}
        for other in others:
            if other.video.digest != item.video.digest and self._answered(other):
                found.setdefault(other.video.digest, other.video)
            if len(found) == _OTHERS:
                break
        return list(found.values())

    def _item(
        self, item: Item, steps: Sequence[Callable[[], None]], stop: threading.Event, advance: Callable[[], None]
    ) -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                step()
                advance()
                if not self._answered(item):  # nothing else of it could be compared
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

    def _floor(self, client: Client, item: Item) -> None:
        if videos := self._other_videos(item):
            self._score(client, item, FLOOR, plain(), videos)

    def _score(self, client: Client, item: Item, name: str, setting: Setting, videos: Sequence[Video]) -> None:
        """The mean log-probability of the plain answer's tokens, given the first of the videos that does not fail.

        A token counts LEAST_LOGPROB at least: one that is impossible would outweigh all others of all answers.
        """
        known = self.results.lines[ANSWER, item.key, PLAIN]
        said = Answer(known["text"], known["ids"], known["prompt_tokens"])
        found = self._try(
            item,
            f"the score of {name if name == FLOOR else setting.name}",
            lambda: (self._logprobs(client, item, setting, videos, said),),
        )
        if found is not None:
            (steps,) = found
            mean = None if steps is None else round(sum(max(step, LEAST_LOGPROB) for step in steps) / len(steps), 6)
            self.results.add(SCORE, item.key, name, logprob=mean, tokens=0 if steps is None else len(steps))

    def _logprobs(
        self, client: Client, item: Item, setting: Setting, videos: Sequence[Video], said: Answer
    ) -> list[float] | None:
        for video in videos[:-1]:
            with contextlib.suppress(Failed):  # of another video; the last one's failure is told
                return client.logprobs(item, video, setting.request, self.asking, said)
        return client.logprobs(item, videos[-1], setting.request, self.asking, said)

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
