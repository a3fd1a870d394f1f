# SPDX-License-Identifier: MIT
"""The NVIDIA GPU of this machine, by Python's own library alone: it is asked before anything is installed.

python3 -m benchmarks.gpu.device    its name; or what is missing in one line, and exit status 2
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

QUERY = ("name", "driver_version", "memory.total", "compute_cap")


class NoDeviceError(RuntimeError):
    """There is no NVIDIA GPU; the text is one line that says what is missing."""


@dataclass(frozen=True)
class Device:
    """The first GPU, as its driver calls it: ``memory_mib`` in MiB, ``capability`` such as 9.0."""

    name: str
    driver: str
    memory_mib: int
    capability: str

    @property
    def slug(self) -> str:
        """The name for files: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return words.removeprefix("nvidia-").removeprefix("geforce-") or "unnamed"


def find() -> Device:
    """The first GPU.

    Raises:
        NoDeviceError: no driver, or it finds no GPU.
    """
    if not (program := shutil.which("nvidia-smi")):
        raise NoDeviceError(
            "make gpu needs an NVIDIA GPU, and there is no nvidia-smi: run it where a driver is installed"
        )
    query = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if done.returncode or len(values) != len(QUERY) or not values[2].isdigit():
        said = lines[0].strip() if lines else "nothing"
        raise NoDeviceError(f"make gpu needs an NVIDIA GPU, and nvidia-smi finds none: it says {said!r}")
    return Device(values[0], values[1], int(values[2]), values[3])


def main() -> int:
    """The command line."""
    try:
        print(find().name)
    except NoDeviceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
