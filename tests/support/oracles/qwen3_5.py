# SPDX-License-Identifier: MIT
"""The oracle of Qwen3.5, dense and mixture of experts: Qwen3-VL's prompt without DeepStack.

Linear attention sees no positions; in transformers as in vLLM only the other layers use them.
"""

from typing import Any

from torch import Tensor

from . import qwen3_vl


class Oracle(qwen3_vl.Oracle):
    """The same weights in transformers."""

    def channels(self) -> int:
        """C = D."""
        return self.width

    def tower(self, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        """Rows [n, D]."""
        return self.model.model.visual(pixels, grid_thw=grid_thw).pooler_output

    def deepstack(self, extra: Tensor) -> dict[str, Any]:
        """Nothing."""
        return {}
