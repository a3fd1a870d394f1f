# SPDX-License-Identifier: MIT
"""``flashvid env``: what a bug report needs, without a path, a name or a variable of whoever sends it."""

import json
import platform
import re
from typing import Any

import torch

from ..models import FAMILIES
from ..ops import choose_backend, missing_for
from ..ops.env import env_info, installed_version
from ..serving import cpu
from ..serving.compat import VLLM_BELOW, VLLM_MIN, unsupported_vllm, vllm_version
from .command import Parser

HELP = """
usage: flashvid env [--json]

What a bug report needs: versions, the GPU or the CPU, the backend that will run
and why, the vLLM that is supported, the models. Works without vLLM. It prints
no path and no name of yours, so its output can be posted as it is.

  --json       the same for programs
  -h, --help   this text

examples:
  flashvid env
  flashvid env --json | jq .backend
"""
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][^\s:;,'\"()]+)+[\\/]?")


def main(argv: list[str]) -> int:
    """Print it; always 0."""
    options = _make_parser().parse_args(argv)
    found = environment()
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 0


def environment() -> dict[str, Any]:
    """The facts by name; versions are None where a package is not installed."""
    info = env_info()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = choose_backend("auto", device)
    return {
        "flashvid_vllm": info["flashvid_vllm"],
        "vllm": info["vllm"],
        "vllm_supported": f">={_dotted(VLLM_MIN)},<{_dotted(VLLM_BELOW)}",
        "vllm_problem": unsupported_vllm() if vllm_version() != "none" else "not installed",
        "torch": info["torch"],
        "triton": info["triton"],
        "transformers": installed_version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _gpu() if device.type == "cuda" else _cpu(),
        "bf16": _bf16(device),
        "backend": backend,
        "backends_missing": {
            name: without_paths(why) for name in ("native", "triton") if (why := missing_for(name, device))
        },
        "models": {name: family.examples for name, family in FAMILIES.items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """The lines that are pasted."""
    names = ("flashvid_vllm", "vllm", "torch", "triton", "transformers", "python", "system", "device", "bf16")
    shown = {name: found[name] or "not installed" for name in names}
    supported = f"(supported: {found['vllm_supported']})"
    problem = found["vllm_problem"]
    shown["vllm"] += f" {supported}" if problem in (None, "not installed") else f" {supported[:-1]}; this one is not)"
    missing = "; ".join(f"{name} cannot: {why}" for name, why in found["backends_missing"].items())
    shown["backend"] = f"{found['backend']}, the best that can run here" + (f" ({missing})" if missing else "")
    lines = [f"{name.replace('flashvid_vllm', 'flashvid-vllm'):<14} {value}" for name, value in shown.items()]
    models = [f"  {name} ({examples})" for name, examples in found["models"].items()]
    return "\n".join([*lines, "models", *models])


def without_paths(text: str) -> str:
    """A message with every path cut to its last name."""
    return _PATH.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], text)


def _bf16(device: torch.device) -> str:
    if device.type == "cuda":
        return "yes" if torch.cuda.is_bf16_supported() else "no: this GPU has none"
    slow = cpu.slow_products(torch.bfloat16)
    return "products as fast as in float32, or a CPU of no kind that we know" if slow is None else f"slow: {slow}"


def _gpu() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    driven = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{driven}, capability {'.'.join(map(str, torch.cuda.get_device_capability()))}, {runtime}"


def _cpu() -> str:
    found = torch.cpu.get_capabilities()
    sets = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16") if found.get(name)]
    return f"CPU {found.get('cpu_name') or platform.machine()} ({', '.join(sets) or 'no vector set that we know'})"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _make_parser() -> Parser:
    parser = Parser("flashvid env", HELP)
    parser.add_argument("--json", action="store_true")
    return parser
