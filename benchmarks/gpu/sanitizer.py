# SPDX-License-Identifier: MIT
"""NVIDIA's compute-sanitizer over `benchmarks.gpu.kernels`: where it is, how it is called, what it says."""

import os
import re
import shutil
from dataclasses import dataclass

TOOLS = {
    "memcheck": "Does a kernel read or write outside its tensors, or misaligned?",
    "racecheck": "Do threads of a kernel race for shared memory?",
    "initcheck": "Does a kernel read memory that nobody has written?",
}
# torch and Triton try calls that may fail; the first launch comes after Python has imported torch
OPTIONS = ("--report-api-errors", "no", "--launch-timeout", "600", "--error-exitcode", "9")
ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
HAZARDS = re.compile(
    r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)
HEADINGS = re.compile(r"^=+ (COMPUTE-SANITIZER|(RACECHECK |LEAK |ERROR )SUMMARY)|^=+$")
SHOWN = 12  # lines of findings in the report


@dataclass(frozen=True)
class Findings:
    """What a tool reported: how often, its first lines, and which kernels these name."""

    count: int
    lines: tuple[str, ...]
    kernels: tuple[str, ...]


def find() -> str | None:
    """The program: of $CUDA_HOME or $CUDA_PATH, on PATH, or where the toolkit is by default."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def parse(output: str, tool: str) -> Findings:
    """What ``tool`` found, from its output and its program's, mixed.

    Raises:
        ValueError: it has no summary: the sanitizer did not come to its end, or watched nothing.
    """
    summaries = (HAZARDS if tool == "racecheck" else ERRORS).findall(output)
    if not summaries:
        raise ValueError(f"{tool} has printed no summary")
    counts = [int(summary[0] if isinstance(summary, tuple) else summary) for summary in summaries]
    said = [line for line in output.splitlines() if line.startswith("====") and not HEADINGS.match(line)]
    kernels = sorted({name for line in said for name in re.findall(r"\b\w+_kernel\w*\b|\bflashvid::[\w:]+", line)})
    lines = tuple(line.lstrip("= ").rstrip() for line in said if line.strip("= "))
    return Findings(sum(counts), lines[:SHOWN], tuple(kernels))
