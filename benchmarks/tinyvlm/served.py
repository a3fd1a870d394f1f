# SPDX-License-Identifier: MIT
"""The same answers from `vllm serve` with the plugin: answer for answer against torch on cached features."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flashvid_vllm import FlashVidConfig

from ..clips import ROOT
from ..record import fingerprint as fingerprint_of_files
from ..record import fingerprint_of, plugin_sources
from ..server import VllmServer
from . import data
from .answers import encoded, greedy, kept
from .features import Store
from .features import fingerprint as features_fingerprint
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


def fingerprint(weights: Path) -> str:
    """What the answers about test videos depend on, as 12 hexadecimal digits: weights, frames, the plugin."""
    sources = {*plugin_sources(), *(ROOT / "flashvid_vllm").rglob("*.py"), weights}
    return fingerprint_of((fingerprint_of_files(sources), features_fingerprint("test")))


def compare(model: TinyVlm, store: Store, directory: Path, count: int = QUESTIONS) -> dict[str, Any]:
    """Ask ``count`` test questions at each of RATIOS, served and in torch; goes on where it stopped.

    ``directory``: where the model as vLLM loads it is made; the answers are kept beside it. Returns how many answers
    agree and how many are right, by ratio, and those that differ.
    """
    if not (directory / "config.json").exists():
        build(model, directory)
    asked = chosen(store.split, store.count).items()
    questions = [(number, question) for number, of_it in asked for question in of_it][:count]
    path = directory.with_name(f"{directory.name}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(line["ratio"], line["video"], line["question"]): line for line in lines}
    todo = [(r, n, q) for r in RATIOS for n, q in questions if (r, n, q.prompt()) not in known]
    if todo:
        arguments = ["--plugin", "flashvid", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
        with VllmServer(directory, *arguments, env={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server, path.open("a") as file:
            client, bar = server.client(), progress("served", len(RATIOS) * len(questions), len(known))
            with bar as advance, ThreadPoolExecutor(1) as beside:
                for ratio, number, question in todo:
                    line = {"ratio": ratio, "video": number, "question": question.prompt(), "answer": question.answer}
                    there = beside.submit(_there, client, server.model, number, question, ratio)
                    line["torch"] = _here(model, store, number, question, ratio)
                    line["vllm"] = there.result()
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    known[ratio, number, question.prompt()] = line
                    advance()
    results: dict[str, Any] = {"questions": len(questions), "agree": {}, "right": {}, "differ": []}
    for ratio in RATIOS:
        of_it = [known[ratio, number, question.prompt()] for number, question in questions]
        results["agree"][f"{ratio:g}"] = sum(line["torch"] == line["vllm"] for line in of_it)
        results["right"][f"{ratio:g}"] = sum(
            line["vllm"] == question.answer for line, (_, question) in zip(of_it, questions, strict=True)
        )
        results["differ"] += [line for line in of_it if line["torch"] != line["vllm"]]
    return results


def _here(model: TinyVlm, store: Store, number: int, question: Question, ratio: float) -> str:
    tokens = kept(encoded(model, store, number), FlashVidConfig(retention_ratio=ratio))
    return greedy(model, tokens, question)


@lru_cache(maxsize=1)
def _url(number: int) -> str:
    return data_url(render(data.video("test", number)))


def _there(client: Any, name: str, number: int, question: Question, ratio: float) -> str:
    content = [
        {"type": "video_url", "video_url": {"url": _url(number)}},
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
