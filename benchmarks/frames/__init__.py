# SPDX-License-Identifier: MIT
"""What more frames of a video cost under one budget."""
