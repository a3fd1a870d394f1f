# SPDX-License-Identifier: MIT
"""Tests that need a process of their own, run by a test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_inside(*arguments: str, **env: str) -> str:
    """What pytest prints with these arguments (tests relative to tests/) and variables. AssertionError unless all pass.

    What this run's pytest was told by PYTEST_ADDOPTS is not for it: budgets of files are those of a run outside.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT / "tests", env=os.environ | {"PYTEST_ADDOPTS": ""} | env,
        capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout
