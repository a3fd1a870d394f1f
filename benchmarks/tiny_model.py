# SPDX-License-Identifier: MIT
"""Tiny video-language models with random weights, made offline: tokenizer, processor settings and weights.

    python -m benchmarks.tiny_model qwen2_5_vl DIRECTORY [--dtype float32] [--seed 0]

The directory is laid out like one from a model hub, so vLLM and transformers load it in the usual way.
The answers of such a model are noise; everything before the answer is the real thing.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

STAMP = "tiny_model.json"
CORPUS = (
    "You are a helpful assistant.",
    "Describe the video. Describe the image.",
    "What happens in this clip?",
    "system user assistant",
    "The quick brown fox jumps over the lazy dog.",
    "0 1 2 3 4 5 6 7 8 9 seconds",
)
# roles in any order; a message is a string or a list of texts, images and videos in any order
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- 'IMAGE' -}}
{%- elif part['type'] in ('video', 'video_url') -%}
{{- 'VIDEO' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Parts:
    """What a family's maker returns: all that goes into the directory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    jsons: dict[str, dict[str, Any]]  # file name without .json -> content


def make_tokenizer(special: Sequence[str], image: str, video: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 400 tokens; `image` and `video` stand for a medium in the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)
    return fast


QWEN_SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)


def make_qwen_tokenizer() -> tuple[PreTrainedTokenizerFast, int, dict[str, int]]:
    """The tokenizer of the Qwen-VL families, the size of its embedding table and the special tokens' ids."""
    pad = "<|vision_start|><|{}_pad|><|vision_end|>"
    tokenizer = make_tokenizer(QWEN_SPECIAL, pad.format("image"), pad.format("video"))
    names = {name: f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    ids = {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in names.items()}
    return tokenizer, -(-len(tokenizer) // 64) * 64, ids


def make_qwen2_5_vl(hidden: int = 128, layers: int = 4, head_dim: int = 32) -> Parts:
    """Qwen2.5-VL: up to 256 tokens (448 x 448 pixels) for each two frames, windows of 8 x 8 patches.

    `hidden`, `layers` and `head_dim` are the language model's; the encoder has 4 layers of width 128.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, vocabulary, ids = make_qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // head_dim,
            "num_key_value_heads": hidden // head_dim // 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
                "rope_theta": 1e6,
            },
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": hidden,
            # the last layer sees whole frames, as in the real model
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    pixels: dict[str, Any] = {
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    jsons: dict[str, dict[str, Any]] = {
        "preprocessor_config": {**pixels, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config": {**pixels, "video_processor_type": "Qwen2VLVideoProcessor"},
        "processor_config": {"processor_class": "Qwen2_5_VLProcessor"},
    }
    return Parts(Qwen2_5_VLForConditionalGeneration(config), tokenizer, jsons)


# kind -> its maker. A new family needs one function that returns Parts, and a line here.
KINDS: dict[str, Callable[[], Parts]] = {
    # for tests: 1 M parameters, an engine starts in seconds
    "qwen2_5_vl": make_qwen2_5_vl,
    # for the demo: 70 M parameters, nearly all in the language model, so that prefill takes most of the time
    "qwen2_5_vl_demo": functools.partial(make_qwen2_5_vl, hidden=768, layers=12, head_dim=64),
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
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
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


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    directory = make_tiny_model(options.kind, options.directory, dtype=dtype, seed=options.seed)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory}: {options.kind}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
