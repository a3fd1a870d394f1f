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
from flashvid_vllm.core.settings import CONSECUTIVE, ORIGINAL

from ..common.clips import ROOT
from ..common.record import Cell, Cells, fingerprint_of, plugin_sources, write_json
from ..common.record import fingerprint as fingerprint_of_files
from ..common.server import VllmServer
from . import data
from .answers import encoded, greedy
from .features import Store
from .features import fingerprint as features_fingerprint
from .grid import Cell as Setting
from .grid import chosen
from .model import TinyVlm
from .progress import progress
from .questions import Question
from .scenes import render

# the server's `positions` -> the ratios asked at; without compression they are the same
RATIOS = {CONSECUTIVE: (1.0, 0.25, 0.10), ORIGINAL: (0.25, 0.10)}
QUESTIONS = 300
SERVER = ("--plugin", "flashvid", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager")


def data_url(frames: np.ndarray) -> str:
    """Frames [T, H, W, 3] uint8 as a URL that vLLM takes, without loss: PNG images where it expects a list of JPEGs."""
    images = [cv2.imencode(".png", frame[..., ::-1])[1].tobytes() for frame in frames]
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(image).decode() for image in images)


def fingerprint(weights: Path) -> str:
    """What the answers about test videos depend on, as 12 hexadecimal digits: weights, frames, the plugin."""
    sources = {*plugin_sources(), *(ROOT / "flashvid_vllm").rglob("*.py"), weights}
    return fingerprint_of((fingerprint_of_files(sources), features_fingerprint("test")))


def compare(model: TinyVlm, store: Store, directory: Path, count: int = QUESTIONS) -> dict[str, Any]:
    """Ask ``count`` test questions in each setting of RATIOS, served and in torch; goes on where it stopped.

    ``directory``: the model as vLLM loads it; the answers are kept beside it. Returns how many answers
    agree and how many are right, by positions and ratio, and those that differ.
    """
    asked = chosen(store.split, store.count).items()
    questions = [(number, question) for number, of_it in asked for question in of_it][:count]
    cells = Cells(directory.with_name(f"{directory.name}.jsonl"), _key)
    for positions in RATIOS:
        _ask(model, store, directory, cells, positions, questions)
    found = {_key(cell): cell for cell in cells.cells}
    results: dict[str, Any] = {"questions": len(questions), "agree": {}, "right": {}, "differ": []}
    for positions, ratios in RATIOS.items():
        for ratio in ratios:
            of_it = [found[positions, ratio, number, question.prompt()] for number, question in questions]
            setting = f"{positions} {ratio:g}"
            results["agree"][setting] = sum(cell["torch"] == cell["vllm"] for cell in of_it)
            results["right"][setting] = sum(cell["vllm"] == cell["answer"] for cell in of_it)
            results["differ"] += [cell for cell in of_it if cell["torch"] != cell["vllm"]]
    return results


def _key(cell: Cell) -> tuple[str, float, int, str]:
    return cell["positions"], cell["ratio"], cell["video"], cell["question"]


def _ask(
    model: TinyVlm, store: Store, directory: Path, cells: Cells, positions: str, questions: list[tuple[int, Question]]
) -> None:
    """Ask what is not among the ``cells`` of a server with these positions."""
    ratios = RATIOS[positions]
    todo = [(r, n, q) for r in ratios for n, q in questions if (positions, r, n, q.prompt()) not in cells.known]
    if not todo:
        return
    count = len(ratios) * len(questions)
    with (
        VllmServer(directory, *SERVER, "--flashvid-config", json.dumps({"positions": positions})) as server,
        progress(f"served, {positions}", count, count - len(todo)) as advance,
        ThreadPoolExecutor(1) as beside,
    ):
        client = server.client()
        for ratio, number, question in todo:
            there = beside.submit(ask_server, client, server.model, number, question, ratio)
            here = _here(model, store, number, question, ratio, positions)
            cell = {"positions": positions, "ratio": ratio, "video": number, "question": question.prompt()}
            cells.add(cell | {"answer": question.answer, "torch": here, "vllm": there.result()})
            advance()


def _here(model: TinyVlm, store: Store, number: int, question: Question, ratio: float, positions: str) -> str:
    setting = Setting("served", ratio, FlashVidConfig(retention_ratio=ratio), spread=positions == ORIGINAL)
    video = encoded(model, store, number)
    tokens, place = setting.tokens(video)
    return greedy(model, tokens, question, place, len(video.tokens.flatten(0, 1)))


@lru_cache(maxsize=1)
def _url(number: int) -> str:
    return data_url(render(data.video("test", number)))


def ask_server(client: Any, name: str, number: int, question: Question, ratio: float) -> str:
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
    write_json(results, folder / "served.json")
