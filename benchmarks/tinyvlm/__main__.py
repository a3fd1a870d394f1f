# SPDX-License-Identifier: MIT
"""The command line: python -m benchmarks.tinyvlm STAGE; see the package for the stages."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

from . import __doc__, data, report, served
from .blind import text_only
from .evaluate import evaluate, evaluate_variants
from .features import CACHE, Store
from .model import WEIGHTS, Size, build, load_weights
from .train import Recipe, Training, run_folder

STAGES = ("all", "data", "blind", "features", "train", "build", "evaluate", "variants", "serve")
BLIND = 1500  # training videos whose questions are learned without them


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    found = text_only(Size(), min(options.train, BLIND), options.test)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "blind.json").write_text(json.dumps({f: vars(r) for f, r in found.items()}, indent=1) + "\n")
    for family, result in found.items():
        print(f"{family:10} {result.right / result.asked:6.1%} of {result.asked} questions right without the video")
    if leaks := [family for family, result in found.items() if not result.is_chance]:
        raise RuntimeError(f"answered above chance without the video: {', '.join(leaks)}")


def make_features(options: argparse.Namespace) -> None:
    """The tower's outputs of all splits."""
    for split in data.SIZES:
        Store(split, getattr(options, split)).fill()


def train(options: argparse.Namespace) -> None:
    """Train, or go on."""
    chosen = {field.name: getattr(options, field.name) for field in fields(Recipe) if hasattr(options, field.name)}
    recipe = Recipe(**chosen, videos=options.train)
    Training(recipe, Size(), run_folder(options.run)).run(options.weights)


def main() -> int:
    """The command line."""
    options = parse()
    stage = options.stage
    if stage == "data":
        show_data(options)
    if stage in ("all", "blind"):
        check_blind(options)
    if stage in ("all", "features"):
        make_features(options)
    if stage in ("all", "train"):
        train(options)
    if stage == "build":
        print(build(load_weights(options.weights), options.directory, getattr(torch, options.dtype)))
    if stage in ("all", "evaluate"):
        report.write(evaluate(load_weights(options.weights), CACHE, options.test, options.long), options.results)
        print((options.results / "accuracy.md").read_text())
    if stage in ("all", "variants"):
        found = evaluate_variants(load_weights(options.weights), CACHE, options.validation)
        report.write_variants(found, options.results)
        print((options.results / "variants.md").read_text())
    if stage in ("all", "serve"):
        model, store = load_weights(options.weights), Store("test", options.test)
        store.require()
        served.write(served.compare(model, store, CACHE / "model"), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
