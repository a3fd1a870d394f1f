# SPDX-License-Identifier: MIT
"""Models put together from transformers by hand: what the engine tests compare with."""
