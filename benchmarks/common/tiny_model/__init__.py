# SPDX-License-Identifier: MIT
"""Tiny video-language models with random weights, made offline: tokenizer, processor settings and weights.

    python -m benchmarks.common.tiny_model qwen2_5_vl DIRECTORY [--dtype float32] [--seed 0]

The directory is laid out like one from a model hub, so vLLM and transformers load it in the usual way.
The answers of such a model are noise; everything before the answer is the real thing.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from .llava import (
    CLIP_B,
    SIGLIP_SO400M,
    TEXT_01B,
    TEXT_05B,
    TEXT_28,
    make_llava_onevision,
    make_llava_video,
    make_llava_video_frame,
)
from .parts import Parts
from .qwen import make_qwen2_5_vl, make_qwen3_5, make_qwen3_5_moe, make_qwen3_vl, make_qwen3_vl_moe

STAMP = "tiny_model.json"

# kind -> its maker. A new family needs one function that returns Parts, and a line here.
KINDS: dict[str, Callable[[], Parts]] = {
    # for tests: 1 M parameters, an engine starts in seconds
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "qwen3_5": make_qwen3_5,
    "qwen3_5_moe": make_qwen3_5_moe,
    "llava_onevision": make_llava_onevision,
    "llava_onevision_clip": functools.partial(make_llava_onevision, tower="clip"),
    "llava_video": make_llava_video,
    "llava_video_frame": make_llava_video_frame,
    # for the demo: 30 M parameters, nearly all in the language model, so that prefill takes most of the time
    "qwen2_5_vl_demo": functools.partial(make_qwen2_5_vl, hidden=512, layers=12, head_dim=64),
    # for the encoder's memory, which the number of layers does not change
    "llava_onevision_wide": functools.partial(
        make_llava_onevision, "clip", {**CLIP_B, "num_hidden_layers": 1}, {"hidden_size": 768, "num_hidden_layers": 1}
    ),
    # for the load benchmarks, of realistic proportions: 0.2 B and 1 B parameters
    "llava_onevision_load": functools.partial(make_llava_onevision, "clip", CLIP_B, TEXT_01B),
    "llava_onevision_deep": functools.partial(
        make_llava_onevision, "clip", {**CLIP_B, "num_hidden_layers": 2}, TEXT_28
    ),
    "llava_onevision_0.5b": functools.partial(make_llava_onevision, "siglip", SIGLIP_SO400M, TEXT_05B),
}


def save(parts: Parts, directory: Path, dtype: torch.dtype) -> None:
    """Write the files of a model directory."""
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # for a second of work
    try:
        parts.model.to(dtype).save_pretrained(directory)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    if parts.released is not None:
        path = directory / "model.safetensors"
        save_file(parts.released(load_file(path)), path, metadata={"format": "pt"})
    parts.tokenizer.save_pretrained(directory)
    tokenizer = parts.tokenizer
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    for name, content in {**parts.jsons, "generation_config": generation}.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=1))
    (directory / "chat_template.jinja").write_text(str(tokenizer.chat_template))


def make_tiny_model(
    kind: str, directory: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Make a model of `kind` (a key of KINDS) in `directory` and return its path.

    The same kind, dtype and seed give the same weights, so a directory that has them already is left as it is.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    directory = Path(directory).resolve()
    files = sorted(Path(__file__).parent.glob("*.py"))
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    stamp = json.dumps({"kind": kind, "dtype": str(dtype), "seed": seed, "source": source})
    if (directory / STAMP).exists() and (directory / STAMP).read_text() == stamp:
        return directory
    if directory.exists() and any(directory.iterdir()) and not (directory / STAMP).exists():
        raise ValueError(f"directory must be new or hold a tiny model, and {directory} holds something else")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save(KINDS[kind](), unfinished, dtype)
        (unfinished / STAMP).write_text(stamp)
        unfinished.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
