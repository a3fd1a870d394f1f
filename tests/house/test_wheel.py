# SPDX-License-Identifier: MIT
"""`make wheel`, and what it makes in an environment that has nothing else: no compiler, no source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from flashvid_vllm.tools.__main__ import COMMANDS

from ..env.install import ROOT, Steps, find_uv
from ..env.install import Environment as SetUp
from ..env.pip_settings import pip_settings, uv_variables
from ..ops.test_native_build import copy_source, package_files
from .wheel import contents, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.longer("builds a wheel, and an environment with it"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]

# What the package does without vLLM; printed as JSON. torch comes first, and its OpenMP runtime with it.
CHECK = """
import importlib.resources, json, pathlib, sys
import flashvid_vllm, torch
from flashvid_vllm.ops import native

torch.manual_seed(0)
features, attention = torch.randn(8, 49, 64), torch.rand(8, 49)
videos = {}
for backend in ("torch", "native"):
    config = flashvid_vllm.FlashVidConfig(retention_ratio=0.25, backend=backend)
    videos[backend] = flashvid_vllm.compress(features, attention, config)
torch.testing.assert_close(videos["native"].tokens, videos["torch"].tokens)
assert torch.equal(videos["native"].source_index, videos["torch"].source_index)
for isa in native.isas():
    native.use_isa(isa)
    flashvid_vllm.compress(features, attention, config)
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
flashvid_vllm.compress(features, attention, config)
maps = pathlib.Path("/proc/self/maps").read_text().split("\\n")
print(json.dumps({
    "file": flashvid_vllm.__file__,
    "env": flashvid_vllm.env_info(),
    "openmp": sorted({line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}),
    "page": all(importlib.resources.files("flashvid_vllm.tools.viz").joinpath(f"page.{end}").is_file()
                for end in ("html", "css", "js")),
    "isas": native.isas(),
}))
"""


@dataclass(frozen=True)
class Installed:
    """The wheel, the source distribution, and the environment with the wheel and torch alone."""

    wheel: Path
    archive: Path
    bin: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, far from the source and with nothing on PATH."""
        empty = self.bin.parent / "empty"
        empty.mkdir(exist_ok=True)
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]], cwd=empty, env={"PATH": str(empty), "OMP_NUM_THREADS": "2"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    archive, wheel = make(folder / "dist", copy_source(folder / "source"))
    steps = Steps(folder / "log")
    steps.log.write_text("")
    uv = find_uv(steps, SetUp(Path(sys.executable).parents[1], None))
    environment = {**uv_variables(pip_settings(sys.executable)), **os.environ, "CXX": "/no/such/compiler"}
    made = folder / "venv"
    torch = next(
        line for line in (ROOT / "tests/env/requirements-cpu.txt").read_text().splitlines() if line.startswith("torch=")
    )
    subprocess.run([uv, "venv", "--python", sys.executable, made], env=environment, check=True)
    install: list[str | Path] = [uv, "pip", "install", "--python", made / "bin" / "python", torch, wheel]
    if subprocess.run(install, env=environment, capture_output=True).returncode:
        # torch's CPU build from its own index, as in tests/env/install.py
        subprocess.run([*install, "--torch-backend", "cpu"], env=environment, check=True)
    return Installed(wheel, archive, made / "bin")


def test_it_holds_the_extension_and_no_openmp(installed: Installed) -> None:
    names = contents(installed.wheel)
    assert [name for name in names if name.endswith(".so")] == [
        name for name in names if re.fullmatch(r"flashvid_vllm/_native\.[\w-]+\.so", name)
    ]
    assert any(name.endswith(".so") for name in names)
    assert re.search(r"-manylinux_2_\d+_(x86_64|aarch64)\.whl$", installed.wheel.name)
    assert set(package_files(ROOT)) <= set(names)


def test_the_source_distribution_has_what_the_package_is(installed: Installed) -> None:
    with tarfile.open(installed.archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert tracked | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels/ops/reference.py"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_it_compresses_where_there_is_no_compiler(installed: Installed) -> None:
    """With the native backend, in every instruction set that this machine runs, on torch's threads alone."""
    done = installed.run("python", "-I", "-c", CHECK)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"].startswith(str(installed.bin.parent))
    assert "native" in found["env"]["backends"]
    assert found["env"]["vllm"] is None
    assert found["page"]
    assert len(found["isas"]) >= 1
    assert len(found["openmp"]) == 1, "one OpenMP runtime in the process"
    assert "/torch/lib/" in found["openmp"][0]


def test_the_commands_are_there(installed: Installed) -> None:
    usage = installed.run("flashvid", "--help")
    assert usage.returncode == 0, usage.stderr
    for name in COMMANDS:
        told = installed.run("flashvid", name, "--help")
        assert told.returncode == 0, told.stderr
        assert name in usage.stdout
        assert name in told.stdout
    if "env" in COMMANDS:
        told = installed.run("flashvid", "env")
        assert told.returncode == 0, told.stderr
        assert "native" in told.stdout
