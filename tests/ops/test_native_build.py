# SPDX-License-Identifier: MIT
"""How the extension is built: without a compiler, under the sanitizers, and its CUDA part by nvcc."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_INPUTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "flashvid_vllm", "kernels")
FULL = os.environ.get("FLASHVID_TESTS") == "full"


def full(test: Callable[..., None]) -> Callable[..., None]:
    """Only under FLASHVID_TESTS=full: it takes a minute; early, so that no core waits for it at the end."""
    marked = pytest.mark.skipif(not FULL, reason="takes a minute; make test-full")(test)
    return pytest.mark.longer(pytest.mark.slow(marked))


compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


# An editable install of this project finds in the source tree what a wheel has not.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source without anything built."""
    return copy_source(tmp_path / "source")


def copy_source(to: Path) -> Path:
    """The source as it would be cloned."""
    for name in BUILD_INPUTS:
        source, target = ROOT / name, to / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return to


def setup(tree: Path, *command: str, **environment: str) -> str:
    """Run setup.py, which must succeed; its output."""
    pytest.importorskip("setuptools", "70.1", reason="needs setuptools with bdist_wheel")
    given = {key: value for key, value in os.environ.items() if not key.startswith("FLASHVID_")}
    done = subprocess.run(
        [sys.executable, "setup.py", *command], cwd=tree, env=given | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def package_files(tree: Path) -> Iterator[str]:
    """Every file of a source tree that belongs into the package, by its name there."""
    for folder, package in (("flashvid_vllm", "flashvid_vllm"), ("kernels/ops", "flashvid_vllm/ops")):
        for path in (tree / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                yield f"{package}/{path.relative_to(tree / folder)}"


def wheel_of(tree: Path) -> list[str]:
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


@pytest.mark.parametrize("environment", [{"CXX": "/no/such/compiler"}, {"CXX": "false"}])
def test_without_a_compiler_torch_serves(tree: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("pybind11")
    output = setup(tree, "bdist_wheel", FLASHVID_CUDA="0", **environment)
    said = [line for line in output.splitlines() if "no native backend, torch serves instead" in line]
    assert len(said) == 1
    names = wheel_of(tree)
    assert "flashvid_vllm/ops/native.py" in names
    assert not any(name.endswith(".so") for name in names)
    check = (
        "import torch, flashvid_vllm; from flashvid_vllm.ops import native; assert 'not built' in native.MISSING\n"
        "assert len(flashvid_vllm.compress(torch.ones(2, 4, 8), torch.ones(2, 4)).tokens) == 2"
    )
    (wheel,) = (tree / "dist").glob("*.whl")
    code = f"{ALONE}sys.path.insert(0, {str(wheel)!r})\n{check}"
    subprocess.run([sys.executable, "-c", code], cwd=tree.parent, check=True)


def test_it_can_be_left_out(tree: Path) -> None:
    output = setup(tree, "bdist_wheel", FLASHVID_NATIVE="0")
    assert "no native backend" not in output
    names = wheel_of(tree)
    assert not any(name.endswith(".so") for name in names)
    missing = set(package_files(tree)) - set(names)
    assert not missing, f"not in setup.py's packages or package_data: {missing}"


def test_the_source_distribution_carries_the_source(tree: Path) -> None:
    setup(tree, "sdist")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= names


@full
@compiled
def test_sanitizers_find_nothing(tree: Path) -> None:
    """The op tests once more, with AddressSanitizer and UndefinedBehaviorSanitizer in the extension."""
    pytest.importorskip("pybind11")
    setup(tree, "build_ext", "--inplace", FLASHVID_SANITIZE="1")
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")  # exceptions need the C++ library beside ASan
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FLASHVID_TESTS": "quick",
        # The package of this tree, not an installed one.
        "PYTHONPATH": str(tree),
    }
    prepare = (
        f"{ALONE}import flashvid_vllm\n"
        f"assert flashvid_vllm.__file__.startswith({str(tree)!r}), flashvid_vllm.__file__\n"
        "from flashvid_vllm.ops import native\n"
        f"assert native._native.__file__.startswith({str(tree)!r})\n"
        "import pytest\n"
        "tests = ['tests/ops/test_native.py', 'tests/ops/test_explain.py']\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *tests]))\n"
    )
    ops = tree / "flashvid_vllm" / "ops"
    ops.symlink_to(tree / "kernels" / "ops")  # what package_dir does in an install
    done = subprocess.run([sys.executable, "-c", prepare], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


@full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_compiles_without_spills(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pybind11")
    output = setup(tree, "build_ext", "--inplace")
    assert "no CUDA part" not in output
    report = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        output,
        flags=re.DOTALL,
    )
    with capsys.disabled():
        for kernel, architecture, stack, _, _, registers in report:
            print(f"\n{architecture} {kernel}: {registers} registers, {stack} bytes of stack", end="")
    assert {architecture for _, architecture, *_ in report} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert all(int(stores) == int(loads) == 0 for _, _, _, stores, loads, _ in report)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    symbols = subprocess.run(
        [sys.executable, "-c", "import _native; print(hasattr(_native, 'tree_roots_cuda'))"],
        cwd=tree / "flashvid_vllm",
        capture_output=True,
        text=True,
        check=True,  # the module loads without a GPU or driver
    )
    assert symbols.stdout.strip() == "True", suffix
