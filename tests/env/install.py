#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make the environment in which the demo, the tests and the benchmarks run: `make setup`.

Standard library only, for any Python >= 3.10. It makes a virtual environment, installs vLLM for this machine
(the GPU build next to an NVIDIA GPU, otherwise the CPU build), the development tools and this project,
editable. A second run with nothing changed ends at once; an interrupted one starts afresh. An environment
that was made elsewhere (`make setup VENV=...`) is never cleared, and keeps the vLLM that it has.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the message

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from tests.env.pip_settings import pip_settings, uv_variables  # noqa: E402

STAMP = "flashvid-setup.json"
OLDEST_UV = (0, 8)  # `--group` and `--torch-backend`
DISK_GB = {"cpu": 5, "cuda": 16}  # 3.3 and about 12 GB installed, and room for what is unpacked
OLDEST_PYTHON = {"cpu": (3, 11), "cuda": (3, 10)}


class SetupError(Exception):
    """A failure that the user can act on; its text says how."""


class Steps:
    """Runs commands as named steps: shows the elapsed seconds, keeps their output in a log."""

    def __init__(self, log: Path) -> None:
        self.log, self.start = log, time.monotonic()

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"[setup {time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def run(self, title: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> bool:
        """Run `command` in tests/env and return whether it succeeded."""
        self.say(f"{title} ...")
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=HERE,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=False,  # the child holds the lock, too: should it outlive this script, others wait
            )
            try:
                self._wait(process)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        return process.returncode == 0

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        terminal, said = sys.stdout.isatty(), time.monotonic()
        while True:
            try:
                process.wait(timeout=1 if terminal else 15)
                break
            except subprocess.TimeoutExpired:
                status = f"... {time.monotonic() - said:.0f} s: {self.tail(1).strip()[:90]}"
                if terminal:
                    print(f"\r\033[K{status}", end="", flush=True)
                else:
                    self.say(status)
        if terminal:
            print("\r\033[K", end="", flush=True)

    def tail(self, lines: int) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def check(self, title: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        """Like `run`, but a failure ends the set-up with the end of the log."""
        if not self.run(title, command, env):
            raise SetupError(f"{title}: failed\n{self.tail(25)}\n(all of it: {self.log})")


def find_device() -> str:
    """What the machine has: "cuda", "rocm" or "cpu"."""
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
            if listing.returncode == 0 and "GPU" in listing.stdout:
                return "cuda"
    return "rocm" if Path("/dev/kfd").exists() else "cpu"


def recipe_hash() -> str:
    """A hash of all that decides what is installed: this folder, the project's metadata, its C++ sources."""
    files = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    files += [path for folder in (HERE, ROOT / "csrc") for path in folder.rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.exists() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Environment:
    """The virtual environment and the stamp in it that says how far it came."""

    def __init__(self, path: Path, device: str | None) -> None:
        self.path, self.python = path, path / "bin" / "python"
        self.wanted = {
            "recipe": recipe_hash(),
            "base": f"{sys.version_info.major}.{sys.version_info.minor} {path} {ROOT} {device or 'auto'}",
        }
        self.stamp = self._read_stamp()
        self.foreign = bool(self.stamp.get("foreign", path.exists() and any(path.iterdir()) and not self.stamp))

    def _read_stamp(self) -> dict[str, object]:
        try:
            return dict(json.loads((self.path / STAMP).read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            return {"state": "unfinished"}

    def ready(self) -> bool:
        """Whether nothing is left to do."""
        return self.stamp.get("state") == "ready" and all(self.stamp.get(k) == v for k, v in self.wanted.items())

    def write_stamp(self, state: str) -> None:
        """Record the state: "unfinished" before anything is changed, "ready" at the end."""
        self.path.mkdir(parents=True, exist_ok=True)
        new = self.path / f"{STAMP}.new"
        new.write_text(json.dumps({**self.wanted, "state": state, "foreign": self.foreign}))
        new.replace(self.path / STAMP)

    def clear_if_useless(self) -> bool:
        """Remove an environment of ours that was left unfinished, or was made by another Python or elsewhere."""
        if self.foreign or not self.stamp:
            return False
        if self.stamp.get("state") == "ready" and self.stamp.get("base") == self.wanted["base"]:
            return False
        for entry in self.path.iterdir():  # the stamp goes last, so that this can be interrupted, too
            if entry.name != STAMP:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return True

    def has_vllm(self) -> bool:
        """Whether some build of vLLM is installed."""
        code = "import importlib.metadata as m; m.version('vllm')"
        return subprocess.run([self.python, "-c", code], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold the lock file; a second set-up waits for the first."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("[setup] another set-up is at work here; waiting for it ...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_machine(environment: Environment, device: str) -> None:
    """Refuse early, with the way out, what would fail late."""
    oldest = OLDEST_PYTHON.get(device, OLDEST_PYTHON["cpu"])
    if sys.version_info < oldest and not environment.foreign:
        raise SetupError(
            f"vLLM needs Python >= {oldest[0]}.{oldest[1]} here and this is {sys.version.split()[0]} "
            f"({sys.executable}); name a newer one: make setup PYTHON=python3.12"
        )
    if device == "rocm" and not (environment.foreign and environment.has_vllm()):
        raise SetupError(
            "this machine has an AMD GPU, and the package registry has no vLLM for it. Install vLLM for ROCm into "
            "a virtual environment as its documentation says, then: make setup VENV=PATH"
        )
    if environment.foreign and not environment.python.exists():
        raise SetupError(f"{environment.path} is not a virtual environment; name another with VENV=PATH")


def check_disk(environment: Environment, device: str) -> None:
    """Refuse to start what would fill the disk."""
    free = shutil.disk_usage(environment.path).free / 1e9
    if not environment.python.exists() and free < DISK_GB[device]:
        raise SetupError(
            f"{free:.1f} GB free on the disk of {environment.path}, and the environment needs {DISK_GB[device]} GB; "
            "name a place with more: make setup VENV=PATH"
        )


def make_venv(steps: Steps, environment: Environment) -> None:
    """`python -m venv`, unless there is one."""
    if environment.python.exists():
        return
    base = getattr(sys, "_base_executable", None) or sys.executable
    if not steps.run(f"virtual environment in {environment.path}", [base, "-m", "venv", environment.path]):
        hint = "\nInstall the venv module (Debian, Ubuntu: apt-get install python3-venv) and try again."
        raise SetupError(steps.tail(12) + (hint if "ensurepip" in steps.tail(12) else ""))


def find_uv(steps: Steps, environment: Environment) -> Path:
    """A uv that is new enough: from PATH, from the environment, or installed into it."""
    for found in (shutil.which("uv"), environment.path / "bin" / "uv"):
        if found and Path(found).exists():
            version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
            if (match := re.search(r"(\d+)\.(\d+)", version)) and tuple(map(int, match.groups())) >= OLDEST_UV:
                return Path(found)
    steps.check("uv, the installer", [environment.python, "-m", "pip", "install", "--upgrade", "uv"])
    return environment.path / "bin" / "uv"


def install_vllm(steps: Steps, install: list[str | Path], env: Mapping[str, str], device: str) -> None:
    """vLLM for this machine."""
    if device == "cuda":
        steps.check("vLLM with CUDA (some 5 GB)", [*install, "-r", "requirements-cuda.txt"], env)
        return
    title, recipe = "vLLM for the CPU (some 0.6 GB)", [*install, "-r", "requirements-cpu.txt"]
    # torch's CPU build is not in the common registry: a local wheel house or mirror first, then torch's own index
    if not steps.run(title, recipe, env):
        steps.check(f"{title}, torch from its own index", [*recipe, "--torch-backend", "cpu"], env)


def set_up(environment: Environment, device: str) -> None:
    """Every step, from nothing or from an older recipe to a ready environment."""
    check_machine(environment, device)
    cleared = environment.clear_if_useless()
    environment.path.mkdir(parents=True, exist_ok=True)
    check_disk(environment, device)
    environment.write_stamp("unfinished")
    log = environment.path / "setup.log"
    log.write_text("")
    steps = Steps(log)
    steps.say(f"{environment.path} for {device}" + (" (started afresh)" if cleared else ""))
    make_venv(steps, environment)
    uv = find_uv(steps, environment)
    env = {**uv_variables(pip_settings(str(environment.python))), **os.environ}
    env |= {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    install: list[str | Path] = [uv, "pip", "install", "--python", environment.python]
    if not (environment.foreign and environment.has_vllm()):
        install_vllm(steps, install, env, device)
    tools = ["-r", "requirements-tools.txt"]
    for group in ("dev", "dist", "bench"):
        tools += ["--group", f"{ROOT / 'pyproject.toml'}:{group}"]
    steps.check("tools", [*install, *tools], env)
    steps.check("this project, editable", [*install, "--no-deps", "--editable", ROOT], env)
    environment.write_stamp("ready")
    steps.say("ready")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=os.environ.get("VENV") or ROOT / ".venv")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: what is there")
    options = parser.parse_args()
    # not resolve(): the last component may be a link that the user made on purpose
    path = Path(os.path.abspath(options.venv))
    chosen = None if options.device == "auto" else options.device
    try:
        if Environment(path, chosen).ready():
            return 0
        lock = ROOT / ".cache" / f"setup-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}.lock"
        with only_one(lock):
            environment = Environment(path, chosen)
            if not environment.ready():
                set_up(environment, chosen or find_device())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: {error} ({path})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
