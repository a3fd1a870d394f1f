# SPDX-License-Identifier: MIT
"""Which requests of a step drop tokens, and how many: integers on the host, before the forward pass. No vLLM here.

A prompt's visual tokens are ranked by its last token, which only its last chunk has. So the chunks before wait in
front of layer K, and with the last one the whole prompt goes through the layers from K on, without what is dropped.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Video:
    """Where a video is in its prompt, rows between its frames included, and how many of its ``tokens`` visual ones
    are ``kept`` inside the LLM."""

    offset: int
    length: int
    tokens: int
    kept: int


@dataclass
class Prompt:
    """A request that drops tokens, from its first chunk on: ``length`` tokens with ``videos``.

    Attributes:
        waiting: tokens of the chunks that wait in front of layer K; `held` has what is kept of them.
        is_ranked: whether its tokens are dropped.
    """

    length: int
    videos: Sequence[Video]
    waiting: int = 0
    is_ranked: bool = False
    held: list[Any] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """Visual tokens that the layers from K on do not have."""
        return sum(video.tokens - video.kept for video in self.videos)


@dataclass(frozen=True)
class Row:
    """One request of a step.

    Args:
        start: its first token among those of the step.
        scheduled: its tokens in the step.
        computed: its tokens before the step.
        prompt: None if it drops nothing.
        queries: its tokens in the layers from K on.
        dropped: tokens that these layers do not have of all up to here.
    """

    start: int
    scheduled: int
    computed: int
    prompt: Prompt | None
    queries: int
    dropped: int

    @property
    def waits(self) -> bool:
        """Whether this is a chunk before the prompt's last one."""
        return self.queries == 0

    @property
    def ranks(self) -> bool:
        """Whether this chunk holds the prompt's last token."""
        return self.prompt is not None and self.computed < self.prompt.length and not self.waits


@dataclass(frozen=True)
class Plan:
    """A step."""

    rows: Sequence[Row]

    @property
    def splits(self) -> bool:
        """Whether the layers from K on run on other tokens than those before."""
        return any(row.waits or row.ranks for row in self.rows)

    @property
    def drops(self) -> bool:
        """Whether the layers from K on have fewer tokens of any request."""
        return any(row.dropped or row.waits for row in self.rows)


class Tracker:
    """The requests that drop tokens; of a worker, and the same in all that share a model."""

    def __init__(self) -> None:
        self._prompts: dict[str, Prompt] = {}

    def plan(
        self, step: Iterable[tuple[str, int, int]], prompt_of: Callable[[str], tuple[int, Sequence[Video]]]
    ) -> Plan:
        """The plan of a step, in the order of its tokens.

        Args:
            step: of each request its id, its tokens that are computed, and those that are scheduled.
            prompt_of: length of the prompt and its videos, asked for when a request starts, again after a preemption.
        """
        rows, start = [], 0
        for request_id, computed, scheduled in step:
            if computed == 0:
                length, videos = prompt_of(request_id)
                self._prompts.pop(request_id, None)
                if any(video.kept < video.tokens for video in videos):
                    self._prompts[request_id] = Prompt(length, videos)
            rows.append(_row(start, scheduled, computed, self._prompts.get(request_id)))
            start += scheduled
        return Plan(rows)

    def forget_all_but(self, request_ids: Container[str]) -> None:
        """Let go of what is known of requests that have ended."""
        for request_id in [name for name in self._prompts if name not in request_ids]:
            del self._prompts[request_id]


def _row(start: int, scheduled: int, computed: int, prompt: Prompt | None) -> Row:
    if prompt is None:
        return Row(start, scheduled, computed, None, scheduled, 0)
    if prompt.is_ranked:
        return Row(start, scheduled, computed, prompt, scheduled, prompt.dropped)
    if prompt.waiting != computed:
        raise RuntimeError(
            f"FlashVID: a prompt whose tokens are dropped inside the LLM has {computed} computed tokens, and "
            f"{prompt.waiting} wait"
        )
    prompt.waiting += scheduled
    if prompt.waiting < prompt.length:
        return Row(start, scheduled, computed, prompt, 0, 0)
    prompt.is_ranked = True
    return Row(start, scheduled, computed, prompt, prompt.waiting - prompt.dropped, prompt.dropped)
