# SPDX-License-Identifier: MIT
"""The `flashvid` command: what helps to decide about compression and to look at it, beside `vllm serve`."""
