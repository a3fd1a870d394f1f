# SPDX-License-Identifier: MIT
"""Who counts compressed videos: nobody, until what serves says who.

``serving/compat.py`` does, when it installs itself: in every process of vLLM, before a model is made there.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Counter(Protocol):
    """What a worker tells its compressed videos."""

    def count(self, tokens_in: int, tokens_out: int) -> None:
        """Enter one video."""

    def count_rows(self, rows_in: int, rows_computed: int) -> None:
        """Enter one video that is encoded less."""

    def count_inner(self, tokens_in: int, tokens_kept: int) -> None:
        """Enter one video of which tokens are dropped inside the LLM."""

    def timed(self, device: torch.device) -> AbstractContextManager[None]:
        """Enter the seconds that the block takes on ``device``."""


def nobody(settings: Mapping[str, Any]) -> Counter | None:
    """Counts nothing."""
    return None


make_counter: Callable[[Mapping[str, Any]], Counter | None] = nobody
"""This worker's counter, from the settings that it tells beside; None where it has none."""
time_choice: Callable[[], AbstractContextManager[None]] = nullcontext
"""Enters the seconds that the block takes, in which the rows of one video are chosen that its encoder computes."""
