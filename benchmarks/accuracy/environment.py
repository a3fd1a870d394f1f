# SPDX-License-Identifier: MIT
"""lmms-eval's environment, apart from vLLM's: made once in .cache/lmms-eval, some 2 GB."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.env.install import Environment, SetupError, Steps, find_uv, make_venv, only_one
from tests.env.pip_settings import pip_settings, uv_variables

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
# torchvision as the common registry has it looks for CUDA; see the hook
HOOK = ROOT / "tests" / "env" / "torchvision_cpu_hook"


class LmmsEnvironment(Environment):
    """A virtual environment that is ready when it was made from these requirements by this Python."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "cpu")
        recipe = hashlib.sha256(REQUIREMENTS.read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
        self.wanted = {"recipe": recipe, "base": f"{sys.version_info.major}.{sys.version_info.minor} {path} {recipe}"}


def lmms_python(path: Path = ROOT / ".cache" / "lmms-eval") -> Path:
    """The interpreter of lmms-eval's environment at `path`, which is made if need be.

    Raises:
        SetupError: it could not be made, or holds something else; the text says what to do.
    """
    if not LmmsEnvironment(path).ready():
        with only_one(path.with_name(f"{path.name}.lock")):
            environment = LmmsEnvironment(path)
            if not environment.ready():
                _make(environment)
    return path / "bin" / "python"


def _make(environment: LmmsEnvironment) -> None:
    if environment.foreign:
        raise SetupError(f"{environment.path} was not made by benchmarks.accuracy; remove it, or give --lmms-python")
    environment.clear_if_useless()
    environment.write_stamp("unfinished")
    log = environment.path / "setup.log"
    log.write_text("")
    steps = Steps(log)
    make_venv(steps, environment)
    uv = find_uv(steps, environment)
    env = {**uv_variables(pip_settings(str(environment.python))), **os.environ}
    env |= {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    install: list[str | Path] = [uv, "pip", "install", "--python", environment.python]
    install += ["-r", REQUIREMENTS, "-c", CONSTRAINTS, HOOK]
    title = "lmms-eval (some 0.7 GB)"
    # as for vLLM: torch's CPU build from a local wheel house or mirror first, then from torch's own index
    if not steps.run(title, install, env):
        steps.check(f"{title}, torch from its own index", [*install, "--torch-backend", "cpu"], env)
    environment.write_stamp("ready")
    steps.say(f"lmms-eval is ready in {environment.path}")


def check_lmms_python(python: Path) -> None:
    """Raise SetupError unless `python` has the lmms-eval that REQUIREMENTS pins."""
    pin = re.search(r"^lmms-eval.*==(.*)$", REQUIREMENTS.read_text(), re.MULTILINE)
    assert pin
    code = "import importlib.metadata; print(importlib.metadata.version('lmms-eval'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.stdout.strip() != pin[1]:
        raise SetupError(f"{python} has lmms-eval {done.stdout.strip() or '(none)'}, and {pin[1]} is needed")
