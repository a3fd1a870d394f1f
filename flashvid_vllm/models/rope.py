# SPDX-License-Identifier: MIT
"""Where the tokens of a compressed video are, for models whose positions are 1-D: LLaVA's.

``consecutive``, as published, counts what is left. ``original`` leaves every kept token, and all text, where it is in
the uncompressed prompt, as M-RoPE models (Qwen-VL) always have it. vLLM gives a model positions of its own only with
M-RoPE; with three equal rows that is RoPE. Can go when vLLM lets a 1-D model have its own.
"""

from collections.abc import Mapping
from typing import Any

from ..core.settings import CONSECUTIVE, ORIGINAL, POSITIONS
from . import FAMILIES

ROPE_TYPES = ("default", "yarn")  # that vLLM has with M-RoPE


def keeps_positions(architecture: str, settings: Mapping[str, Any]) -> bool:
    """Whether the LLM sees kept tokens at their positions in the whole video, by the server's ``settings``."""
    return not FAMILIES[architecture].consecutive or settings.get(POSITIONS) == ORIGINAL


def set_positions(model_config: Any, settings: Mapping[str, Any]) -> None:
    """Prepare the model's config for the server's choice of positions.

    Raises:
        ValueError: ``consecutive`` for an M-RoPE model, or ``original`` with a RoPE that vLLM lacks for M-RoPE.
    """
    chosen = settings.get(POSITIONS)
    if not FAMILIES[model_config.architecture].consecutive:
        if chosen == CONSECUTIVE:
            raise ValueError(
                f"{POSITIONS}={chosen!r}: {model_config.architecture} has M-RoPE, where kept tokens keep their "
                "positions; leave it out"
            )
        return
    if chosen != ORIGINAL:
        return
    text = model_config.hf_text_config
    parameters = text.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{POSITIONS}={chosen!r} works with RoPE of the types {', '.join(ROPE_TYPES)}; this model's is {kind!r}"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = int(head * parameters.get("partial_rotary_factor", 1.0)) // 2
    parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
