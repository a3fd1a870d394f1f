# SPDX-License-Identifier: MIT
"""FlashVID for vLLM."""
