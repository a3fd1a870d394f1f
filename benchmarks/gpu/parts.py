# SPDX-License-Identifier: MIT
"""The parts of `make gpu`, in the order of what is asked first: each a command that there is, and how it is read."""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flashvid_vllm.models import FAMILIES

from . import read, sanitizer
from .session import Part

SHAPE = "llava-onevision-0.5b"  # of the serving benchmarks where there is no real model: its sizes, random weights
SERVERS = "plain,evs,vidcom2,flashvid"
BUDGET = 2048  # visual tokens, of a real model's more frames
FITS = 0.7  # of the GPU's memory, for weights


def parts(folder: Path, model: str | None, why_no_model: str) -> list[Part]:
    """All parts; each writes into ``folder``/NAME.

    Args:
        folder: of the session.
        model: a directory or a name in the Hugging Face cache for the serving benchmarks, or None.
        why_no_model: what is said of them without one.
    """

    def out(name: str, file: str = "") -> str:
        return str(folder / name / file)

    offline = {"HF_HUB_OFFLINE": "1"} if model and not Path(model).is_dir() else {}
    of_model = ("--model", model) if model else ()
    pytest = ("-m", "pytest", "tests", "-m", "gpu", "-q", "--tb", "short", "-p", "no:cacheprovider")
    ops = ("-m", "benchmarks.ops", "--shape", "LLaVA-OneVision-7B", "--shape", "Qwen2.5-VL-7B", "--frames", "32")
    serving = of_model or ("--shape", SHAPE)
    frames = (*of_model, "--token-budget", f"{BUDGET}", "--frames", "16,64,128") if model else ()
    served = f"a real model, {Path(model).name}" if model else f"random weights ({why_no_model})"
    return [
        Part(
            "tests", "Are the kernels exact, do they never wait, can they be captured, and is a video served so?",
            (*pytest, "--junit-xml", out("tests", read.REPORT)), 60, 600, read.tests,
        ),
        Part(
            "ops", "How long does compression take, beside EVS, VidCom2 and the published arithmetic in torch?",
            (*ops, "--seconds", "2", "--json", out("ops", read.ROWS)), 60, 240, read.operations,
        ),
        *(watched(tool) for tool in sanitizer.TOOLS),
        Part(
            "first-request", "What does a first request wait for, with nothing compiled before?",
            ("-m", "benchmarks.gpu.first_request", *of_model, "--output", out("first-request")), 90, 300,
            read.first_request, offline,
        ),
        Part(
            "serving", f"Encoder, compression, prefill, and requests a second: {served}.",
            ("-m", "benchmarks.serving", *serving, "--servers", SERVERS, "--concurrency", "1,8", "--requests", "8",
             "--output", out("serving")), 180, 600, read.serving, offline,
        ),
        Part(
            "frames", f"What do more frames cost under one budget? {served[0].upper()}{served[1:]}.",
            ("-m", "benchmarks.frames", *(frames or ("--shape", SHAPE, "--frames", "16,64,160")), "--requests", "3",
             "--output", out("frames")), 120, 420, read.frames, offline,
        ),
        Part(
            "memory", "How much memory does a video's encoding and compression need at most?",
            ("-m", "benchmarks.memory", "--frames", "16,96,384", "--output", out("memory", "encoder-memory.md")),
            60, 240, read.memory,
        ),
    ]  # fmt: skip


def watched(tool: str) -> Part:
    """A tool of compute-sanitizer over every kernel; memory is not cached, so that every tensor's bounds are known."""
    program = sanitizer.find()
    return Part(
        tool, sanitizer.TOOLS[tool], ("-m", "benchmarks.gpu.kernels"), 45, 240, partial(read.watched, tool=tool),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        (program or "compute-sanitizer", "--tool", tool, *sanitizer.OPTIONS, sys.executable),
        "" if program else "there is no compute-sanitizer: it comes with the CUDA toolkit (CUDA_HOME, PATH)",
    )  # fmt: skip


def architectures(directory: Path) -> set[str]:
    """Those of ours that a model's directory names; none without its weights."""
    try:
        named = set(json.loads((directory / "config.json").read_text()).get("architectures") or ())
    except (OSError, ValueError):
        return set()
    return named & set(FAMILIES) if weight_bytes(directory) else set()


def weight_bytes(directory: Path) -> int:
    """The size of the safetensors in a model's directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors") if path.exists())


def cached_models(hub: Path) -> dict[str, int]:
    """The models that we serve in a Hugging Face cache -> bytes of their weights, the smallest first."""
    found = {}
    for config in hub.glob("models--*/snapshots/*/config.json"):
        if architectures(config.parent):
            name = config.relative_to(hub).parts[0].removeprefix("models--").replace("--", "/")
            found[name] = weight_bytes(config.parent)
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def choose_model(asked: str | None, hub: Path, memory_bytes: float) -> tuple[str | None, str]:
    """The model of the serving benchmarks, and without one why: the one that is asked for, or the largest that fits.

    Raises:
        ValueError: the model that is asked for is not on this disk, or none that we serve.
    """
    there = cached_models(hub)
    if asked:
        if os.path.isdir(asked):
            if not architectures(Path(asked)):
                raise ValueError(f"MODEL must hold weights of {', '.join(FAMILIES)}, and {asked} does not")
            return str(Path(asked).resolve()), ""
        if asked not in there:
            known = f"there: {', '.join(there)}" if there else "none is there"
            raise ValueError(f"MODEL must be a directory or be in {hub} already (hf download {asked}); {known}")
        return asked, ""
    fitting = [name for name, size in there.items() if size <= FITS * memory_bytes]
    if fitting:
        return fitting[-1], ""
    return None, "no model that we serve is in the Hugging Face cache" + (", or it does not fit" if there else "")


def names(chosen: Sequence[Part]) -> str:
    """For messages."""
    return ", ".join(part.name for part in chosen)
