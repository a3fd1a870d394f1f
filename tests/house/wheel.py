# SPDX-License-Identifier: MIT
"""Make the source distribution and the wheel: `make wheel`.

The wheel is made from the source distribution, so that what the one lacks the other lacks. It holds the native CPU
extension for every instruction set, and

- no OpenMP runtime: the extension takes torch's, which is in the process before it. A copy of its own would be a second
  pool of threads, which spin on the cores of the first after every loop, and which neither torch.set_num_threads nor
  vLLM's binding of threads to cores reaches. Which name torch's has differs from release to release: so it is not
  linked by name, and without torch the extension does not load.
- no CUDA part, unless FLASHVID_CUDA=1 asks for it: two ops that no server calls and that no GPU has run, in code for
  four architectures, that would depend on whether nvcc is there.

The tag is what the compiler's libraries ask for, as auditwheel finds it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..env.pip_settings import pip_settings, uv_variables

ROOT = Path(__file__).resolve().parents[2]


class WheelError(Exception):
    """Why there is no wheel; its text says what to do."""


def make(output: Path, source: Path = ROOT) -> list[Path]:
    """The source distribution and the wheel of ``source``, written to ``output``.

    Raises:
        WheelError: a step failed, or the wheel lacks the extension.
    """
    output.mkdir(parents=True, exist_ok=True)
    environment = {**uv_variables(pip_settings(sys.executable)), "FLASHVID_CUDA": "0", **os.environ}
    environment |= {"FLASHVID_OPENMP": "torch", "FLASHVID_NATIVE": "1", "FLASHVID_SANITIZE": "0"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    with tempfile.TemporaryDirectory(prefix="flashvid-wheel-") as folder:
        made, repaired = Path(folder, "made"), Path(folder, "repaired")
        installer = "uv" if shutil.which("uv", path=environment["PATH"]) else "pip"
        _run(["build", "--installer", installer, "--outdir", str(made), str(source)], environment)
        (wheel,), (archive,) = made.glob("*.whl"), made.glob("*.tar.gz")
        if not any(name.startswith("flashvid_vllm/_native.") for name in contents(wheel)):
            raise WheelError("the wheel has no native extension: install a C++ compiler (Debian: apt-get install g++)")
        _run(["auditwheel", "repair", "--only-plat", "--wheel-dir", str(repaired), str(wheel)], environment)
        (wheel,) = repaired.glob("*.whl")
        return [Path(shutil.copy(path, output)) for path in (archive, wheel)]


def contents(wheel: Path) -> list[str]:
    """The names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def _run(module: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *module], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise WheelError(f"{module[0]} failed:\n{(done.stdout + done.stderr).strip()[-4000:]}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist/")
    try:
        for path in make(parser.parse_args().output):
            print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    except WheelError as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
