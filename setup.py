# SPDX-License-Identifier: MIT
"""Where the packages lie, and the native extension; everything else is in pyproject.toml.

The extension is optional: without pybind11 or a working compiler the install says so in one line and succeeds,
and torch serves. FLASHVID_NATIVE=0 leaves it out, FLASHVID_CUDA=0 its CUDA part; FLASHVID_SANITIZE=1 builds it
with AddressSanitizer and UndefinedBehaviorSanitizer. FLASHVID_OPENMP=torch is for wheels (tests/house/wheel.py): the
extension names no OpenMP runtime and takes the one that torch has brought.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
TORCHS_OPENMP = os.environ.get("FLASHVID_OPENMP") == "torch"
SANITIZE = os.environ.get("FLASHVID_SANITIZE", "0") == "1"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Only these files use more than the baseline; dispatch.cpp calls them where the machine can.
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    # GCC 12's own header reads an undefined vector on purpose and warns of it.
    "amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-Wno-uninitialized"],
}
CPU = ["attention", "cluster", "compress", "distances", "explain", "memory", "products", "reuse", "segment"]
CPU += ["select_match", "shares", "trees"]
CUDA_ARCHITECTURES = ("80", "90", "100", "120")


def sources() -> list[str]:
    kernels = ["dispatch.cpp", "plain.cpp", *(ISA_FLAGS if X86 else [])]
    return [
        "csrc/bindings.cpp",
        *(f"csrc/cpu/{name}.cpp" for name in CPU),
        *(f"csrc/cpu/kernels/{name}" for name in kernels),
    ]


def nvcc() -> str | None:
    """The CUDA compiler, unless FLASHVID_CUDA=0."""
    if os.environ.get("FLASHVID_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def nvcc_command(compiler: str, source: str, output: str) -> list[str]:
    newest = CUDA_ARCHITECTURES[-1]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = ["-Icsrc", "-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC", "-Xptxas=-v", *codes]
    return [compiler, "-c", source, "-o", output, *flags]


class BuildNative(build_ext):
    """Compile each file with the flags of its instruction set, or say in one line that nothing was built."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            includes = [pybind11.get_include(), *self.compiler.include_dirs, *self.include_dirs]
            objects, libraries = self._compile_cuda() if not SANITIZE else ([], [])
            self._build(ext, includes, objects, libraries)
        except Exception as error:
            say(f"no native backend, torch serves instead ({one_line(error)})")
            self.extensions = []

    def _compile_cuda(self) -> tuple[list[str], list[str]]:
        """The object of the CUDA part and what to link it with; nothing where it cannot be built."""
        compiler = nvcc()
        if not compiler:
            return [], []
        try:
            library = cudart(compiler)
            output = str(self._folder() / "forest.cu.o")
            run(nvcc_command(compiler, "csrc/cuda/forest.cu", output))
            return [output], [str(library), "-lpthread", "-lrt", "-ldl"]
        except Exception as error:
            say(f"no CUDA part in the native backend ({one_line(error)})")
            return [], []

    def _build(self, ext: Extension, includes: list[str], objects: list[str], libraries: list[str]) -> None:
        command = [os.environ.get("CXX") or "c++"]
        flags = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # -z now: without a runtime the import fails, not a call later, which would end the process
        link = ["-shared", "-Wl,-z,now"] if TORCHS_OPENMP else ["-shared", "-fopenmp"]
        if X86:
            flags.append("-DFLASHVID_X86")
        if SANITIZE:
            checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
            flags += ["-O1", "-g1", "-DFLASHVID_SANITIZE", *checks]
            link += checks
        files = list(ext.sources)
        if objects:
            flags.append("-DFLASHVID_CUDA")
            files.append("csrc/cuda/bindings.cpp")
        flags += ["-Icsrc", *(f"-I{path}" for path in includes)]
        jobs = {str(self._folder() / source.replace("/", "-")) + ".o": source for source in files}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    lambda job: run(
                        [*command, *flags, *ISA_FLAGS.get(Path(job[1]).name, []), "-c", job[1], "-o", job[0]]
                    ),
                    jobs.items(),
                )
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*command, *link, *jobs, *objects, *libraries, "-o", str(target)])

    def _folder(self) -> Path:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()


def cudart(compiler: str) -> Path:
    """The static CUDA runtime that belongs to a compiler, which may be a script somewhere else."""
    told = subprocess.run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    home = next((line.split("TOP=", 1)[1].strip() for line in told.splitlines() if "TOP=" in line), None)
    places = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
    for path in [Path(home) / place / "libcudart_static.a" for place in places] if home else []:
        if path.exists():
            return path
    raise RuntimeError(f"libcudart_static.a not found beside {compiler}")


def say(message: str) -> None:
    print(f"flashvid_vllm: {message}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stdout or done.stderr:
        print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr or done.stdout}")


native = [] if os.environ.get("FLASHVID_NATIVE", "1") == "0" else [Extension("flashvid_vllm._native", sources())]

setup(
    packages=[
        "flashvid_vllm",
        "flashvid_vllm.core",
        "flashvid_vllm.core.methods",
        "flashvid_vllm.models",
        "flashvid_vllm.models.families",
        "flashvid_vllm.models.inner",
        "flashvid_vllm.ops",
        "flashvid_vllm.serving",
        "flashvid_vllm.tools",
        "flashvid_vllm.tools.play",
        "flashvid_vllm.tools.tune",
        "flashvid_vllm.tools.viz",
    ],
    package_data={
        "flashvid_vllm.tools.play": ["page.html", "page.css", "page.js", "sample.webm"],
        "flashvid_vllm.tools.tune": ["page.css"],
        "flashvid_vllm.tools.viz": ["page.html", "page.css", "page.js"],
    },
    # kernels/ must not be importable as a top-level `kernels`: Hugging Face ships one.
    package_dir={"flashvid_vllm": "flashvid_vllm", "flashvid_vllm.ops": "kernels/ops"},
    ext_modules=native,
    cmdclass={"build_ext": BuildNative},
)
