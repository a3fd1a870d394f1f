# SPDX-License-Identifier: MIT
"""Answers where the encoder computes a share of a video's patches, from CLIP's own layers; goes on where it stopped.

The tower of transformers runs layer by layer, the class token of every frame and the computed patches through the
projections and the MLP, keys and values of all gathered around attention: what vLLM's towers do with the plugin,
written a second time.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.choice import choose
from flashvid_vllm.core.levels import PixelScale, frame_rows

from ..common import clip_model
from ..common.record import Cells
from . import data
from .answers import Encoded, right
from .evaluate import answers_in, results_file
from .features import PATCHES, Store
from .grid import PLAIN, SPREAD, Cell, chosen
from .model import TinyVlm, pool
from .progress import progress
from .questions import FAMILIES, Question
from .scenes import Video, render
from .stats import interval, mcnemar

VIDEOS = 160
ENCODERS = {
    "all": FlashVidConfig(),
    "0.5": FlashVidConfig(encoder_ratio=0.5),
    "0.25": FlashVidConfig(encoder_ratio=0.25),
    "auto": FlashVidConfig(encoder_ratio="auto"),
    "frames 0.5": FlashVidConfig(encoder_ratio=0.5, encoder_reuse="frames"),
    "frames 0.25": FlashVidConfig(encoder_ratio=0.25, encoder_reuse="frames"),
}
CAMERAS = ("still", "running", "panned", "cut")
PATCH = 16  # pixels of a side


def settings() -> list[Cell]:
    """What is compressed behind the encoder."""
    cells = [Cell(PLAIN, 1.0, None)]
    for ratio in (0.25, 0.10):
        cells += [Cell(f"flashvid{end}", ratio, FlashVidConfig(ratio), spread=bool(end)) for end in ("", SPREAD)]
    return cells


def standing(frames: np.ndarray, config: FlashVidConfig) -> Tensor:
    """The frame [T, 196] whose patch stands for each of frames [T, 224, 224, 3] uint8, as the plugin chooses it."""
    rows = frame_rows(torch.from_numpy(frames).permute(0, 3, 1, 2), PATCH)
    reuse = choose(PixelScale([0.0] * 3, [1.0] * 3).levels(rows), [0], config)
    return (reuse.rows[reuse.source] // PATCHES).unflatten(0, (len(frames), -1))


def camera(video: Video) -> str:
    """What a video's background does: one of CAMERAS. What a running one shows may move by itself, the camera too."""
    views = [frame.view for frame in video]
    if len({(view.source, view.side, view.mirror) for view in views}) > 1:
        return "cut"
    if len({view.left for view in views}) > 1:
        return "panned"
    return "running" if len({view.index for view in views}) > 1 else "still"


@torch.inference_mode()
def encode(tower: Any, pixels: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Features [T, 196, 768] and received attention [T, 196], float32, of pixels [T, 3, 224, 224].

    ``position`` [T, 196] int64: the frame whose patch stands for each, its own where it is computed.
    """
    num_frames = len(pixels)
    everything = position * PATCHES + torch.arange(PATCHES)  # [T, 196] as rows of all
    rows, source = everything.flatten().unique(return_inverse=True)
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


def asked(videos: int) -> dict[int, list[Question]]:
    """All questions about each of the first test videos: what it costs is to encode them."""
    everything = chosen("test", data.SIZES["test"], quota=sys.maxsize)
    return {number: questions for number, questions in everything.items() if number < videos}


def run(model: TinyVlm, root: Path, videos: int = VIDEOS) -> dict[str, Any]:
    """Every setting on the first ``videos`` test videos. Raises RuntimeError without the features of the whole."""
    return summarise(answer(model, root, videos), asked(videos))


def answer(model: TinyVlm, root: Path, videos: int) -> Cells:
    """The answers that `run` sums up, those that are missing made."""
    store, questions = Store("test", videos, root), asked(videos)
    store.require()
    tower = clip_model.tower(clip_model.load())
    path = results_file(model, "test", asked(data.SIZES["test"]), root)
    answers = answers_in(path.with_stem(f"encoder-{path.stem}"))
    todo = [
        (number, name)
        for number in questions
        for name in ENCODERS
        if any((key, number) not in answers.known for key in keys_of(name))
    ]
    with progress("answers", len(todo)) as advance:
        for number, name in todo:
            found = _answer(model, tower, store, ENCODERS[name], number, questions[number])
            for key, entry in zip(keys_of(name), found, strict=True):
                answers.add({"cell": key, "video": number, **entry})
            advance()
    return answers


def keys_of(name: str) -> list[str]:
    """The names in files of everything that is answered behind one encoder."""
    return [f"{name}: {cell.key}" for cell in settings()]


def _answer(
    model: TinyVlm, tower: Any, store: Store, config: FlashVidConfig, number: int, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    features, attention, computed = store.features(number), store.attention(number), 1.0
    if config.encodes_less:
        frames = render(data.video("test", number))
        position = standing(frames, config)
        own = torch.arange(len(frames))[:, None]
        computed = float((position == own).float().mean())
        if config.encoder_reuse == "frames":  # a frame attends within itself alone
            features, attention = features[position[:, 0]], attention[position[:, 0]]
        else:
            features, attention = encode(tower, clip_model.preprocess(frames), position)
    video = Encoded(model.video_tokens(features), pool(attention))
    entries = []
    for cell in settings():
        tokens, place = cell.tokens(video)
        found = right(model, tokens, questions, place, video.tokens.shape[0] * video.tokens.shape[1])
        entries.append({"right": found, "computed": computed})
    return entries


def summarise(answers: Cells, questions: dict[int, list[Question]]) -> dict[str, Any]:
    """Accuracies, and paired differences from the same compression behind the whole encoder, with 95 % intervals."""
    found = {(answer["cell"], answer["video"]): answer for answer in answers.cells}
    pairs = [(n, question) for n, entries in questions.items() for question in entries]
    family = np.array([question.family for _, question in pairs])
    video = np.array([n for n, _ in pairs])
    numbers = np.unique(video).tolist()
    moves = np.array([camera(data.video("test", n)) for n, _ in pairs])
    rows = []
    for name in ENCODERS:
        for cell, key, whole in zip(settings(), keys_of(name), keys_of("all"), strict=True):
            x, y = (np.array([r for n in numbers for r in found[k, n]["right"]]) for k in (key, whole))
            difference = x.astype(float) - y
            row: dict[str, Any] = {"encoder": name, "setting": cell.key, "accuracy": float(x.mean())}
            row["computed"] = float(np.mean([found[key, n]["computed"] for n in numbers]))
            row["minus whole"] = [float(difference.mean()), *interval(difference, video)]
            row["p"] = mcnemar(x, y)
            for part, kinds, names in (("families", family, FAMILIES), ("cameras", moves, CAMERAS)):
                row[part] = {
                    kind: {
                        "questions": int(mask.sum()),
                        "accuracy": float(x[mask].mean()),
                        "minus whole": [float(difference[mask].mean()), *interval(difference[mask], video[mask])],
                        "computed": float(
                            np.mean([found[key, n]["computed"] for n in np.unique(video[mask]).tolist()])
                        ),
                    }
                    for kind in names
                    if (mask := kinds == kind).any()
                }
            rows.append(row)
    return {"questions": len(pairs), "videos": len(numbers), "rows": rows}


INTRODUCTION = """\
# A share of the encoder's work

{questions} questions about the first {videos} test videos, in percent. **computed**: patches that went through CLIP's
projections and MLPs, chosen as the plugin does; `frames`: whole frames. **- whole**: the difference, on
the same questions, from the same compression behind the whole encoder, with its 95 % interval (bootstrap over videos)
and McNemar's p. `spread`: `positions` original. By family the accuracy, and that difference.
"""
BY_CAMERA = """
## By what the camera does

A video's background is one frame of a real clip (still), the clip (running: streets, towers, men, the Earth; some of
these cameras move), a window that moves over the clip (panned), or two of these (cut). The share computed, and the
difference from the whole encoder with its interval.
"""


def write(found: dict[str, Any], folder: Path) -> None:
    """Write encoder.json and encoder.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = found["rows"]
    families, cameras = (list(rows[0][part]) for part in ("families", "cameras"))
    head = ["encoder", "computed", "behind it", "accuracy", "- whole", "p", *families]
    lines = [INTRODUCTION.format(**found), _line(head), _rule(3, len(head))]
    for row in rows:
        cells = [row["encoder"], f"{row['computed']:.3f}", row["setting"], f"{100 * row['accuracy']:.1f}"]
        cells += [_difference(row["minus whole"]), f"{row['p']:.2f}"]
        cells += [f"{100 * f['accuracy']:.0f} ({100 * f['minus whole'][0]:+.0f})" for f in row["families"].values()]
        lines.append(_line(cells))
    counts = rows[0]["cameras"]
    head = ["encoder", "behind it", *(f"{kind} ({counts[kind]['questions']} questions)" for kind in cameras)]
    lines += [BY_CAMERA, _line(head), _rule(2, len(head))]
    for row in rows:
        if row["encoder"] != "all":
            cells = [f"{c['computed']:.2f}: {_difference(c['minus whole'])}" for c in row["cameras"].values()]
            lines.append(_line([row["encoder"], row["setting"], *cells]))
    (folder / "encoder.md").write_text("\n".join([*lines, ""]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(left: int, columns: int) -> str:
    return "|" + "---|" * left + "---:|" * (columns - left)


def _difference(found: Sequence[float]) -> str:
    mean, low, high = (100 * x for x in found)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
