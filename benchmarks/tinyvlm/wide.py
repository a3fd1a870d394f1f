# SPDX-License-Identifier: MIT
"""The second model: another tower, another LLM, another seed, other videos and four more families of questions.

What is found on one small model may be that model's. This one shares the clips, the marks and the training's losses
with the first. Its tower is trained from scratch (`tower`, `teach`) and not CLIP's, and gives 49 tokens of its own
instead of 196 that are pooled; its LLM has three layers of 192; its videos are others, of other shares, a fifth of them
events in 24 frames. Its questions add when something happens, how many things there are, small print, and on which side
of one thing another is.
"""

from pathlib import Path

from . import data, teach, tower
from .blind import Result, text_only
from .features import Store
from .model import WEIGHTS as FIRST_WEIGHTS
from .model import Size
from .train import Recipe, Training, run_folder

WEIGHTS = FIRST_WEIGHTS.with_name("wide.safetensors")
SIZE = Size(hidden=192, layers=3, heads=4, intermediate=576, width=tower.WIDTH)
RECIPE = Recipe(epochs=6, short=2, rate=1.5e-3, seed=1, videos=data.WIDE_SIZES["wide-train"])


def without_videos() -> dict[str, Result]:
    """How far the questions lead alone, by family."""
    sizes = data.WIDE_SIZES["wide-train"] // 2, data.WIDE_SIZES["wide-test"]
    return text_only(SIZE, *sizes, ("wide-train", "wide-test"))


def train(weights: Path = WEIGHTS, recipe: Recipe = RECIPE) -> None:
    """Train the tower if it has no weights, compute its features, train the LLM on them; goes on where it stopped."""
    if not tower.WEIGHTS.exists():
        teach.train()
    Store("wide-train", recipe.videos).fill()
    Store("wide-validation", recipe.validation).fill()
    Training(recipe, SIZE, run_folder("wide"), ("wide-train", "wide-validation")).run(weights)
