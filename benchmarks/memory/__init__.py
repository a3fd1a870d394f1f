# SPDX-License-Identifier: MIT
"""How much memory the encoder needs over the number of frames."""
