# SPDX-License-Identifier: MIT
"""Dropping visual tokens inside the LLM: the layers from K on attend to, and cache, fewer tokens of a prompt.

which requests, how many tokens?   plan.py       on the host, before the forward pass; the same on every rank
-> what the later layers see       metadata.py   their own lengths and slots over the same block table
-> layer K - 1 ranks them          rank.py       attention of the prompt's last token, over all ranks' heads
-> the later layers run on fewer   text_model.py chunks of a prompt wait there for its last one
rows that are visual tokens        rows.py       a mark on every row of a video that the encoder gives
all of it, put into a model        install.py
"""

from collections.abc import Callable


def nothing() -> None:
    """There is no Model Runner V1."""


plan_on_v1: Callable[[], None] = nothing
"""Has Model Runner V1 plan its steps. ``serving/compat.py`` puts it here, which may import the runner."""
