# SPDX-License-Identifier: MIT
"""Answers where the encoder computes a share of a video's patches, from CLIP's own layers; goes on where it stopped.

The tower of transformers runs layer by layer, the class token of every frame and the computed patches through the
projections and the MLP, keys and values of all gathered around attention: what vLLM's towers do with the plugin,
written a second time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.ops.reuse import choose_rows

from ..common import clip_model
from ..common.record import Cells
from . import data
from .answers import Encoded, pool, right
from .evaluate import answers_in, results_file
from .features import PATCHES, Store
from .grid import PLAIN, SPREAD, Cell, chosen
from .model import TinyVlm
from .progress import progress
from .questions import FAMILIES, Question
from .scenes import render
from .stats import interval, mcnemar

VIDEOS = 60
SHARES: dict[str, float | None] = {"all": 1.0, "0.5": 0.5, "0.25": 0.25, "auto": None}
PATCH = 16  # pixels of a side


def settings() -> list[Cell]:
    """What is compressed behind the encoder."""
    cells = [Cell(PLAIN, 1.0, None)]
    for ratio in (0.25, 0.10):
        cells += [Cell(f"flashvid{end}", ratio, FlashVidConfig(ratio), spread=bool(end)) for end in ("", SPREAD)]
    return cells


def patches(frames: np.ndarray) -> Tensor:
    """Frames [T, 224, 224, 3] uint8 -> their patches [T, 196, 768] uint8, channels first in each."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@torch.inference_mode()
def encode(tower: Any, frames: np.ndarray, position: Tensor) -> tuple[Tensor, Tensor]:
    """Features [T, 196, 768] and received attention [T, 196], float32, of frames [T, 224, 224, 3] uint8.

    ``position`` [T, 196] int64: the frame whose patch stands for each, its own where it is computed.
    """
    num_frames = len(frames)
    everything = position * PATCHES + torch.arange(PATCHES)  # [T, 196] as rows of all
    rows, source = everything.flatten().unique(return_inverse=True)
    pixels = clip_model.preprocess(frames)
    cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[rows]
    embeddings = tower.embeddings
    table = embeddings.position_embedding.weight
    own = embeddings.patch_embedding(cut).flatten(1) + table[1 + rows % PATCHES]
    hidden = torch.cat([(embeddings.class_embedding + table[0]).expand(num_frames, -1), own])
    hidden = tower.pre_layrnorm(hidden)
    # of each frame its class token, then its patches: where they lie in `hidden`
    whole = torch.cat([torch.arange(num_frames)[:, None], num_frames + source.view(num_frames, -1)], dim=1)
    back = torch.cat([torch.arange(num_frames) * (1 + PATCHES), rows // PATCHES * (1 + PATCHES) + 1 + rows % PATCHES])
    received = torch.empty(0)
    *layers, _ = tower.encoder.layers  # LLaVA reads the last but one
    for layer in layers:
        x, attention = layer.layer_norm1(hidden), layer.self_attn
        query, key, value = (
            clip_model.heads(layer, projection(x)[whole])
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if layer is layers[-1]:
            logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            received = logits.softmax(-1).mean((1, 2))[:, 1:]
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)[back]
        hidden = hidden + attention.out_proj(mixed)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden[whole[:, 1:]], received


def run(model: TinyVlm, root: Path, videos: int = VIDEOS) -> dict[str, Any]:
    """Every share on the first ``videos`` test videos. Raises RuntimeError without the features of the whole."""
    store, questions = Store("test", videos, root), chosen("test", videos)
    store.require()
    tower = clip_model.tower(clip_model.load())
    path = results_file(model, "test", questions, root)
    answers = answers_in(path.with_stem(f"encoder-{path.stem}"))
    keys = {name: [f"{name}: {cell.key}" for cell in settings()] for name in SHARES}
    with progress("answers", len(SHARES) * len(questions)) as advance:
        for number in questions:
            frames = render(data.video("test", number))
            for name, share in SHARES.items():
                if any((key, number) not in answers.known for key in keys[name]):
                    found = _answer(model, tower, store, frames, share, number, questions[number])
                    for key, entry in zip(keys[name], found, strict=True):
                        answers.add({"cell": key, "video": number, **entry})
                advance()
    return summarise(answers, questions, keys)


def _answer(
    model: TinyVlm,
    tower: Any,
    store: Store,
    frames: np.ndarray,
    share: float | None,
    number: int,
    questions: Sequence[Question],
) -> list[dict[str, Any]]:
    rows = frames.shape[0] * PATCHES
    if share == 1:
        features, attention, computed = store.features(number), store.attention(number), rows
    else:
        least = None if share is None else max(PATCHES, int(share * rows))
        position = choose_rows(patches(frames), [0], least)
        features, attention = encode(tower, frames, position)
        computed = int((position == torch.arange(len(frames))[:, None]).sum())
    video = Encoded(model.video_tokens(features), pool(attention))
    entries = []
    for cell in settings():
        tokens, place = cell.tokens(video)
        found = right(model, tokens, questions, place, video.tokens.shape[0] * video.tokens.shape[1])
        entries.append({"right": found, "computed": computed / rows})
    return entries


def summarise(answers: Cells, questions: dict[int, list[Question]], keys: dict[str, list[str]]) -> dict[str, Any]:
    """Accuracies, and paired differences from the same compression behind the whole encoder, with 95 % intervals."""
    family = np.array([q.family for asked in questions.values() for q in asked])
    video = np.array([n for n, asked in questions.items() for _ in asked])
    found = {(answer["cell"], answer["video"]): answer for answer in answers.cells}
    right_of = {
        key: np.array([x for n in questions for x in found[key, n]["right"]]) for part in keys.values() for key in part
    }
    rows = []
    for name, part in keys.items():
        for cell, key, whole in zip(settings(), part, keys["all"], strict=True):
            x, y = right_of[key], right_of[whole]
            difference = x.astype(float) - y
            row: dict[str, Any] = {"encoder": name, "setting": cell.key, "accuracy": float(x.mean())}
            row["computed"] = float(np.mean([found[key, n]["computed"] for n in questions]))
            row["minus whole"] = [float(difference.mean()), *interval(difference, video)]
            row["p"] = mcnemar(x, y)
            row["families"] = {
                f: [float(x[family == f].mean()), float(difference[family == f].mean())]
                for f in FAMILIES
                if f in family
            }
            rows.append(row)
    return {"questions": len(family), "videos": len(questions), "rows": rows}


def write(found: dict[str, Any], folder: Path) -> None:
    """Write encoder.json and encoder.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps(found, indent=1) + "\n")
    families = list(found["rows"][0]["families"])
    lines = [
        "# A share of the encoder's work",
        "",
        f"{found['questions']} questions about the first {found['videos']} test videos, in percent. `computed`: the",
        "patches that went through CLIP's projections and MLPs. `- whole`: the difference, on the same questions, from",
        "the same compression behind the whole encoder, with its 95 % interval (bootstrap over videos) and McNemar's",
        "p; by family the accuracy, and that difference.",
        "",
        "| encoder | computed | behind it | accuracy | - whole | p | " + " | ".join(families) + " |",
        "|---|---:|---|---:|---:|---:|" + "---:|" * len(families),
    ]
    for row in found["rows"]:
        mean, low, high = (100 * x for x in row["minus whole"])
        cells = [row["encoder"], f"{row['computed']:.3f}", row["setting"], f"{100 * row['accuracy']:.1f}"]
        cells += [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{row['p']:.2f}"]
        cells += [f"{100 * a:.0f} ({100 * d:+.0f})" for a, d in row["families"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "encoder.md").write_text("\n".join([*lines, ""]))
