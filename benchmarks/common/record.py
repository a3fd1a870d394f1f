# SPDX-License-Identifier: MIT
"""What a benchmark keeps: results that need not be measured again, where they come from, and their files."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from flashvid_vllm import env_info

from .clips import ROOT

RESULTS = ROOT / "benchmarks" / "results"
Cell = dict[str, Any]


class Cells:
    """The results so far, a line each in a file: what is there is not measured again.

    Args:
        path: the file; it and its folder are made if need be. A line that was cut off is dropped.
        key: what tells a result from another.
    """

    def __init__(self, path: Path, key: Callable[[Cell], Any]) -> None:
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.cells: list[Cell] = [json.loads(line) for line in lines if line.endswith("}")]
        self.known = {key(cell) for cell in self.cells}
        if lines:
            path.write_text("".join(json.dumps(cell) + "\n" for cell in self.cells))

    def add(self, cell: Cell) -> None:
        """Keep a result."""
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.cells.append(cell)
        self.known.add(self.key(cell))


def fingerprint_of(value: Any) -> str:
    """What repr() tells of a value, as 12 hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def fingerprint(paths: Iterable[Path]) -> str:
    """The contents of files, in the order of their names, as 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def plugin_sources() -> list[Path]:
    """The files that make the compression: methods, operations, native code."""
    files = [ROOT / "flashvid_vllm" / "core" / f"{name}.py" for name in ("budget", "config", "compress")]
    for folder in (ROOT / "flashvid_vllm" / "core" / "methods", ROOT / "kernels" / "ops", ROOT / "csrc"):
        files += [path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu")]
    return files


def versions(*names: str) -> dict[str, str]:
    """The versions of installed packages; "absent" for one that is not."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def gpu() -> str:
    """The name of the first NVIDIA GPU, or "none"."""
    if not shutil.which("nvidia-smi"):
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return found.stdout.splitlines()[0].strip() if found.returncode == 0 and found.stdout.strip() else "none"


def machine() -> Cell:
    """Where and with what it ran."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu(),
        "python": platform.python_version(),
        **versions("torch", "transformers", "vllm", "numpy", "flashvid-vllm"),
        "backend": env_info()["backends"],
        "commit": commit + (" and changes that were not committed" if dirty else ""),
        "date": datetime.date.today().isoformat(),
    }


def write_json(results: Cell, path: Path) -> None:
    """The results, a line for each entry of a list, so that a change is a readable one."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(entry) for entry in value]
        return round(value, 5) if isinstance(value, float) else value

    parts = []
    for key, value in rounded(results).items():
        entries = [json.dumps(entry) for entry in value] if isinstance(value, list) else []
        lines = "[\n  " + ",\n  ".join(entries) + "\n ]" if entries else json.dumps(value)
        parts.append(f' "{key}": {lines}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        new = Path(file.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=metadata)
    new.chmod(0o644)
    new.replace(path)


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table, all columns but the first flush right."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]
