# SPDX-License-Identifier: MIT
"""One file a family, with what its processor and its model do differently from vLLM's own; two bases beside them,
``mrope`` (Qwen-VL) and ``llava``."""
