# SPDX-License-Identifier: MIT
"""The command line: python -m benchmarks.tinyvlm STAGE; see the package for the stages."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from . import __doc__, budgets, data, encoder, inner, report, served, tuned, wide
from .backgrounds import Split
from .blind import Result, text_only
from .evaluate import evaluate, evaluate_variants
from .features import CACHE, Store
from .model import WEIGHTS, Size, build, load_weights
from .train import Recipe, Training, run_folder

STAGES = (
    "all",
    "data",
    "blind",
    "features",
    "train",
    "build",
    "evaluate",
    "variants",
    "serve",
    "tune",
    "encoder",
    "budgets",
    "inner",
    "wide",
    "tables",
)
BLIND = 1500  # training videos whose questions are learned without them


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tinyvlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("directory", nargs="?", type=Path, help="of the model that `build` makes")
    parser.add_argument("--sheet", type=Path, help="of `data`: an image of the first test videos")
    parser.add_argument("--run", default="default", help="name of the training run")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of `build`")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    for split, count in data.SIZES.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"{split} videos ({count})")
    for field in fields(Recipe):
        if field.name not in ("videos", "validation"):
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"training ({field.default})")
    parser.add_argument("--tuned", type=int, default=tuned.VIDEOS, help=f"test videos of `tune` ({tuned.VIDEOS})")
    options = parser.parse_args()
    if options.stage == "build" and options.directory is None:
        parser.error("build needs the directory to make")
    return options


def show_data(options: argparse.Namespace) -> None:
    """Statistics of every split, and the sheet if asked for."""
    for split in data.SIZES:
        print(split, json.dumps(data.statistics(split, getattr(options, split)), indent=1))
    if options.sheet:
        data.sheet("test", range(12), options.sheet)


def check_blind(options: argparse.Namespace) -> None:
    """Raise RuntimeError if a family can be answered without the video; write what was found."""
    check_guesses(text_only(Size(), min(options.train, BLIND), options.test), options.results / "blind.json")


def check_guesses(found: dict[str, Result], path: Path) -> None:
    """Write what was guessed without the video. Raises RuntimeError if it is more than chance in a family."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f: vars(r) for f, r in found.items()}, indent=1) + "\n")
    for family, result in found.items():
        print(f"{family:10} {result.right / result.asked:6.1%} of {result.asked} questions right without the video")
    if leaks := [family for family, result in found.items() if not result.is_chance]:
        raise RuntimeError(f"answered above chance without the video: {', '.join(leaks)}")


def fill(options: argparse.Namespace, *splits: Split) -> None:
    """The tower's outputs of the splits, what is missing of them."""
    for split in splits:
        Store(split, getattr(options, split)).fill()


def train(options: argparse.Namespace) -> None:
    """Train, or go on."""
    fill(options, "train", "validation")
    chosen = {field.name: getattr(options, field.name) for field in fields(Recipe) if hasattr(options, field.name)}
    recipe = Recipe(**chosen, videos=options.train)
    Training(recipe, Size(), run_folder(options.run)).run(options.weights)


def compare_methods(options: argparse.Namespace) -> None:
    """Every method on the test and the long videos."""
    fill(options, "test", "long")
    report.write(evaluate(load_weights(options.weights), CACHE, options.test, options.long), options.results)
    print((options.results / "accuracy.md").read_text())


def compare_variants(options: argparse.Namespace) -> None:
    """Changes to FlashVID on the validation videos."""
    fill(options, "validation")
    found = evaluate_variants(load_weights(options.weights), CACHE, options.validation)
    report.write_variants(found, options.results)
    print((options.results / "variants.md").read_text())


def compare_served(options: argparse.Namespace) -> None:
    """Answers of a server against those in torch."""
    fill(options, "test")
    model, store = load_weights(options.weights), Store("test", options.test)
    served.write(served.compare(model, store, served_model(options.weights)), options.results)


def tune(options: argparse.Namespace) -> None:
    """`flashvid tune` against the tables. Raises RuntimeError if it does not find what they say."""
    if not tuned.run(options.weights, options.tuned, options.results):
        raise RuntimeError("flashvid tune does not say what the tables say; see tune.md")


def encode_less(options: argparse.Namespace) -> None:
    """Questions about the first test videos where the encoder computes a share of their patches."""
    videos = min(options.test, encoder.VIDEOS)
    Store("test", videos).fill()
    encoder.write(encoder.run(load_weights(options.weights), CACHE, videos), options.results)


def compare_budgets(options: argparse.Namespace) -> None:
    """Budgets that follow the video, and their ablation."""
    write_budgets(budgets.FIRST, options.weights, options.results)


def compare_again(options: argparse.Namespace) -> None:
    """The second model, trained if it is not there, and the same on it."""
    if not wide.WEIGHTS.exists():
        check_guesses(wide.without_videos(), options.results / "blind-wide.json")
        wide.train()
    write_budgets(budgets.SECOND, wide.WEIGHTS, options.results)


def write_budgets(page: budgets.Page, weights: Path, results: Path) -> None:
    """A model's answers, and its page."""
    budgets.write(budgets.answer(load_weights(weights), page, CACHE), page, results)


def write_tables(options: argparse.Namespace) -> None:
    """Every page of figures from the answers that are there."""

    def found(name: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((options.results / f"{name}.json").read_text())
        return read

    (options.results / "accuracy.md").write_text(report.markdown(found("accuracy")))
    report.write_variants(found("variants"), options.results)
    encoder.write(found("encoder"), options.results)
    inner.write(found("inner"), options.results)
    for page in (budgets.FIRST, budgets.SECOND):
        budgets.write(found(page.name), page, options.results)


def drop_inside(options: argparse.Namespace) -> None:
    """Tokens dropped inside the LLM, in torch and served."""
    Store("test", inner.VIDEOS).fill()
    found = inner.answer(load_weights(options.weights), CACHE)
    directory = served_model(options.weights)
    found["served"] = inner.serve(directory, directory.with_name(f"{directory.name}-inner.jsonl"))
    inner.write(found, options.results)


def served_model(weights: Path) -> Path:
    """The directory of the model as vLLM loads it, made if it is not there; in its name what answers depend on."""
    directory = CACHE / f"served-{served.fingerprint(weights)}"
    if not (directory / "config.json").exists():
        build(load_weights(weights), directory)
    return directory


def everything(options: argparse.Namespace) -> None:
    """All that the committed results are made of; what is there is not trained again."""
    if options.weights.exists():
        print(f"{options.weights} is there: not trained again (`train` does, without it)")
    else:
        check_blind(options)
        train(options)
    compare_methods(options)
    compare_variants(options)
    compare_served(options)


def main() -> int:
    """The command line."""
    options = parse()
    stages: dict[str, Callable[[argparse.Namespace], object]] = {
        "all": everything,
        "data": show_data,
        "blind": check_blind,
        "features": lambda options: fill(options, *data.SIZES),
        "train": train,
        "build": lambda options: print(
            build(load_weights(options.weights), options.directory, getattr(torch, options.dtype))
        ),
        "evaluate": compare_methods,
        "variants": compare_variants,
        "serve": compare_served,
        "tune": tune,
        "encoder": encode_less,
        "budgets": compare_budgets,
        "inner": drop_inside,
        "wide": compare_again,
        "tables": write_tables,
    }
    stages[options.stage](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
