# SPDX-License-Identifier: MIT
"""Whether a server stays sound under a random mix of requests."""
