# SPDX-License-Identifier: MIT
"""A load put on servers, and what came of it: what `serving` and `frames` share."""
