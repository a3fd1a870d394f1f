# SPDX-License-Identifier: MIT
"""Training of projector and LLM on cached features, on full tokens only; goes on where it stopped.

Three auxiliary losses take part: visual tokens are aligned with the words for what they show (`alignment`), a shape's
tokens tell what has become of it so far (`history`), and the answer is asked for at the question's last word too, one
token early. In trials of 400 steps all families but the scenes stayed at chance without the start that `TinyVlm` gives
its attention, with the first and the last of these losses or without them.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..common.machine import model_dtype
from . import data
from .alignment import Alignment, labels
from .backgrounds import Split
from .batches import IGNORED, Batch, epoch, in_order, question_states, states, video_tokens
from .features import CACHE, Store
from .history import DEPTH, History, count_facts
from .history import labels as history_labels
from .model import WEIGHTS, Size, TinyVlm, save_weights
from .progress import progress
from .questions import FAMILIES

HINTS, ALIGNMENT, HISTORY = 0.3, 0.5, 0.5  # weights of the auxiliary losses
FIT_FRAMES = 400  # whose features the projector starts from


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, beside the data.

    The first ``short`` of the ``epochs`` show a few frames of each video. ``batch`` is in videos, ``rate`` the peak of
    a cosine over the time after ``warmup`` steps.
    """

    epochs: int = 12
    short: int = 4
    batch: int = 12
    rate: float = 1.2e-3
    warmup: int = 200
    decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    videos: int = data.SIZES["train"]
    validation: int = 80


@dataclass
class Score:
    """Right answers and questions, of each family."""

    right: dict[str, int]
    asked: dict[str, int]

    def accuracy(self) -> dict[str, float]:
        """By family, those asked about only."""
        return {f: round(self.right[f] / self.asked[f], 4) for f in FAMILIES if self.asked[f]}


def tally(batches: Iterable[tuple[Batch, Tensor]]) -> Score:
    """Count the answers that greedy decoding would give right: every token of the answer is the likeliest.

    ``batches``: each with its logits' argmax [B, Q].
    """
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for batch, best in batches:
        wrong = (best != batch.targets) & (batch.targets != IGNORED)
        for row, sample in enumerate(batch.samples):
            for number, question in enumerate(sample.questions, start=1):
                asked[question.family] += 1
                right[question.family] += not bool(wrong[row][batch.block[row] == number].any())
    return Score(right, asked)


class Auxiliary(nn.Module):
    """What the auxiliary losses learn beside the model."""

    def __init__(self, model: TinyVlm, facts: int) -> None:
        super().__init__()
        self.alignment, self.history = Alignment(), History(model, facts)


def loss_of(model: TinyVlm, auxiliary: Auxiliary, batch: Batch, store: Store) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, the weighted auxiliary losses, the likeliest ids [B, Q].

    The ids are -1 where none is wanted.
    """
    video = video_tokens(model, batch, store)
    shown = [labels(store.split, one.number)[one.chosen].flatten(0, 1) for one in batch.samples]
    told = [history_labels(store.split, one.number, one.chosen) for one in batch.samples]
    facts, known = (torch.stack(part).flatten(1, 2) for part in zip(*told, strict=True))
    questions, layers = states(model, batch, video)
    wanted = batch.targets != IGNORED
    hinted = batch.hints != IGNORED
    logits = model.head(questions[wanted]).float()
    early = cross_entropy(model.head(questions[hinted]).float(), batch.hints[hinted])
    more = HINTS * early + ALIGNMENT * auxiliary.alignment(model, video, torch.stack(shown))
    more = more + HISTORY * auxiliary.history(video, layers[DEPTH], facts, known)
    best = torch.full_like(batch.targets, -1)
    best[wanted] = logits.detach().argmax(-1)
    return cross_entropy(logits, batch.targets[wanted]), more, best


@torch.no_grad()
def validate(model: TinyVlm, store: Store, count: int) -> Score:
    """Accuracy on the videos of ``store`` as they are."""
    model.eval()
    split: Split = store.split
    with torch.autocast("cpu", torch.bfloat16, enabled=model_dtype() == "bfloat16"):
        score = tally(
            (batch, model.head(question_states(model, batch, video_tokens(model, batch, store))).argmax(-1))
            for batch in in_order(split, range(count))
        )
    model.train()
    return score


class Training:
    """A run in ``folder``: its checkpoint and its log, a JSON object a line.

    ``splits``: to learn and to validate on.
    """

    def __init__(
        self, recipe: Recipe, size: Size, folder: Path, splits: tuple[Split, Split] = ("train", "validation")
    ) -> None:
        self.recipe, self.size, self.folder = recipe, size, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self.checkpoint = folder / "log.jsonl", folder / "checkpoint.pt"
        self.train, self.held = Store(splits[0], recipe.videos), Store(splits[1], recipe.validation)
        self.train.require()
        self.held.require()
        torch.manual_seed(recipe.seed)
        self.model = TinyVlm(size)
        self.auxiliary = Auxiliary(self.model, count_facts(splits[0]))
        everything = [*self.model.parameters(), *self.auxiliary.parameters()]
        matrices = [p for p in everything if p.ndim == 2]
        others = [p for p in everything if p.ndim != 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": recipe.decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
        self.done, self.step, self.seconds = 0, 0, 0.0

    def resume(self) -> None:
        """Load the checkpoint, or begin. Raises ValueError if the checkpoint is another recipe's."""
        run = {"recipe": asdict(self.recipe), "size": asdict(self.size)}
        if not self.checkpoint.exists():
            chosen = np.linspace(0, self.recipe.videos - 1, min(FIT_FRAMES, self.recipe.videos)).astype(int)
            self.model.fit_projector(torch.stack([self.train.features(int(number))[0] for number in chosen]))
            self._log({"run": run, "parameters": sum(p.numel() for p in self.model.parameters())})
            return
        state = torch.load(self.checkpoint)
        if state["run"] != run:
            raise ValueError(f"{self.checkpoint} is of another run: {state['run']}; give another --run or remove it")
        self.model.load_state_dict(state["model"])
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.step, self.seconds = state["done"], state["step"], state["seconds"]

    def _save(self) -> None:
        state = {
            "run": {"recipe": asdict(self.recipe), "size": asdict(self.size)},
            "model": self.model.state_dict(),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "step": self.step,
            "seconds": self.seconds,
        }
        new = self.checkpoint.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.checkpoint)

    def _log(self, entry: dict[str, Any]) -> None:
        with self.log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def run(self, weights: Path = WEIGHTS) -> None:
        """Train to the end, write the weights, with the log beside them."""
        self.resume()
        while self.done < self.recipe.epochs:
            self._epoch()
        save_weights(self.model, weights)
        log = weights.with_suffix(".jsonl")
        if log != self.log_path:
            log.write_text(self.log_path.read_text())

    def _epoch(self) -> None:
        recipe, start, losses = self.recipe, time.perf_counter(), []
        seen: list[tuple[Batch, Tensor]] = []
        rng = np.random.default_rng([recipe.seed, 1, self.done])
        batches = epoch(self.train.split, recipe.videos, recipe.batch, rng, short=self.done < recipe.short)
        with progress(f"epoch {self.done + 1} of {recipe.epochs}", len(batches)) as advance:
            for place, batch in enumerate(batches):
                loss, auxiliary, best = self._update(batch, (self.done + place / len(batches)) / recipe.epochs)
                losses.append((loss, auxiliary))
                seen.append((batch, best))
                advance(1, "loss {:.3f}, auxiliary {:.3f}".format(*np.mean(losses[-30:], axis=0)))
        self.done += 1
        self.seconds += time.perf_counter() - start
        entry = {
            "epoch": self.done,
            "step": self.step,
            "seconds": round(self.seconds),
            "loss": round(float(np.mean(losses, axis=0)[0]), 4),
            "auxiliary": round(float(np.mean(losses, axis=0)[1]), 4),
            "train": tally(seen).accuracy(),
            "validation": validate(self.model, self.held, recipe.validation).accuracy(),
        }
        self._log(entry)
        print(json.dumps(entry), flush=True)
        self._save()

    def _update(self, batch: Batch, done: float) -> tuple[float, float, Tensor]:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, done, recipe)
        with torch.autocast("cpu", torch.bfloat16, enabled=model_dtype() == "bfloat16"):
            loss, auxiliary, best = loss_of(self.model, self.auxiliary, batch, self.train)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach()), float(auxiliary.detach()), best


def rate(step: int, done: float, recipe: Recipe) -> float:
    """The learning rate when ``done`` of the epochs are behind: up over the warm-up, along a cosine to a twentieth."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return warm * recipe.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def run_folder(name: str) -> Path:
    """Where the run ``name`` keeps its checkpoint and log."""
    return CACHE / "runs" / name
