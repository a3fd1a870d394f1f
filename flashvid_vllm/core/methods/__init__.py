# SPDX-License-Identifier: MIT
"""Peers of FlashVID under the same budget and interface: what is offered, and what each reads.

One module a peer, of the same name, imported on first use; no torch here. Its ``compress(features, attention,
budget, backend)``, and ``keeps_positions`` where it asks, returns a ``CompressedVideo`` of exactly ``budget.tokens``
tokens. Its constants are its paper's; FlashVID's own settings do not reach it. How each differs from its paper stands
in its docstring.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """What must be known of a method before it runs.

    Attributes:
        reads_attention: whether it needs the attention that tokens receive in the vision encoder.
        merges: whether a kept token may stand for others; else it is a copy of one token.
        asks_positions: whether it must know if kept tokens keep their positions.
    """

    reads_attention: bool
    merges: bool
    asks_positions: bool = False


PEERS = {
    "evs": Peer(reads_attention=False, merges=False),
    "vidcom2": Peer(reads_attention=False, merges=False),
    "visionzip": Peer(reads_attention=True, merges=True),
    "fastvid": Peer(reads_attention=True, merges=True),
    "prunevid": Peer(reads_attention=False, merges=True),
    "tome": Peer(reads_attention=False, merges=True),
    "divprune": Peer(reads_attention=False, merges=False),
    "vcast": Peer(reads_attention=False, merges=False),
    "gleanvid": Peer(reads_attention=False, merges=False),
    "adaptive": Peer(reads_attention=False, merges=True, asks_positions=True),
    "uniform": Peer(reads_attention=False, merges=False),
}


def load(name: str) -> Callable[..., Any]:
    """The ``compress`` function of the peer ``name``, a key of ``PEERS``."""
    compress: Callable[..., Any] = importlib.import_module(f"{__name__}.{name}").compress
    return compress
