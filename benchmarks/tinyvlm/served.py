# SPDX-License-Identifier: MIT
"""The same answers from `vllm serve` with the plugin: answer for answer against torch on cached features."""

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flashvid_vllm import FlashVidConfig

from ..server import VllmServer
from . import data
from .answers import encoded, greedy, kept
from .features import Store
from .grid import chosen
from .model import TinyVlm, build
from .progress import progress
from .questions import Question
from .scenes import render

RATIOS = (1.0, 0.25, 0.10)
QUESTIONS = 300


def data_url(frames: np.ndarray) -> str:
    """Frames [T, H, W, 3] uint8 as a URL that vLLM takes, without loss: PNG images where it expects a list of JPEGs."""
    images = [cv2.imencode(".png", frame[..., ::-1])[1].tobytes() for frame in frames]
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(image).decode() for image in images)


def compare(model: TinyVlm, store: Store, directory: Path, count: int = QUESTIONS) -> dict[str, Any]:
    """Ask ``count`` test questions at each of RATIOS, served and in torch.

    Returns how many answers agree and how many are right, by ratio, and those that differ.
    """
    if not (directory / "config.json").exists():
        build(model, directory)
    asked = [(n, q) for n, questions in chosen(store.split, store.count).items() for q in questions][:count]
    results: dict[str, Any] = {"questions": len(asked), "agree": {}, "right": {}, "differ": []}
    arguments = ["--plugin", "flashvid", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    with VllmServer(directory, *arguments, env={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        client = server.client()
        for ratio in RATIOS:
            agree = right = 0
            with progress(f"served at {ratio:.0%}", len(asked)) as advance:
                for number, question in asked:
                    here = _here(model, store, number, question, ratio)
                    there = _there(client, server.model, number, question, ratio)
                    agree += here == there
                    right += there == question.answer
                    if here != there:
                        results["differ"].append([ratio, number, question.text, here, there])
                    advance()
            results["agree"][f"{ratio:g}"], results["right"][f"{ratio:g}"] = agree, right
    return results


def _here(model: TinyVlm, store: Store, number: int, question: Question, ratio: float) -> str:
    tokens = kept(encoded(model, store, number), FlashVidConfig(retention_ratio=ratio))
    return greedy(model, tokens, question)


def _there(client: Any, name: str, number: int, question: Question, ratio: float) -> str:
    content = [
        {"type": "video_url", "video_url": {"url": data_url(render(data.video("test", number)))}},
        {"type": "text", "text": question.prompt()},
    ]
    answer = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=5,
        extra_body={"mm_processor_kwargs": {"flashvid": {"retention_ratio": ratio}}},
    )
    return str(answer.choices[0].message.content).strip()


def write(results: dict[str, Any], folder: Path) -> None:
    """Write served.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "served.json").write_text(json.dumps(results, indent=1) + "\n")
