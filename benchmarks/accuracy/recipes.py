# SPDX-License-Identifier: MIT
"""The five benchmarks of the paper by lmms-eval's names, and what lmms-eval calls their scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One benchmark.

    Attributes:
        task: lmms-eval's name of the task, or of a group of tasks whose mean counts.
        metric: lmms-eval's name of the score.
        scale: what makes per cent of it; 1 if it is that already.
        dataset: what lmms-eval fetches from the model hub.
        note: what is special.
    """

    task: str
    metric: str
    scale: float
    dataset: str
    note: str = ""


RECIPES = {
    "videomme": Recipe("videomme", "videomme_perception_score", 1, "lmms-eval/Video-MME", "without subtitles"),
    "egoschema": Recipe(
        "egoschema_subset", "score", 100, "lmms-eval/egoschema",
        "the 500 questions with public answers; all 5000 (`egoschema`) make a file to submit",
    ),
    "longvideobench": Recipe(
        "longvideobench_val_v", "lvb_acc", 100, "longvideobench/LongVideoBench",
        "the validation set as videos (`_v`; `_i` sends frames as images); gated: accept its terms, set HF_TOKEN",
    ),
    "mvbench": Recipe("mvbench", "mvbench_accuracy", 1, "OpenGVLab/MVBench", "the mean of its 20 tasks"),
    "mlvu": Recipe("mlvu_test", "mlvu_percetion_score", 1, "sy1998/MLVU_Test", "the mean of its 9 categories"),
}  # fmt: skip
