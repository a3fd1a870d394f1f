# SPDX-License-Identifier: MIT
"""Tests of Model Runner V2 alone; tests/models/test_runner_v2.py starts them in a process of their own."""

import os

collect_ignore_glob = [] if os.environ.get("FLASHVID_RUNNER") == "v2" else ["test_*.py"]
