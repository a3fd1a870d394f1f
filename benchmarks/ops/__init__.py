# SPDX-License-Identifier: MIT
"""How long every operation takes, and how fast it could be."""
