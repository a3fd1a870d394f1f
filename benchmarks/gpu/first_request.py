# SPDX-License-Identifier: MIT
"""What a first request waits for: kernels that are compiled while it does, with an empty Triton cache.

    python -m benchmarks.gpu.first_request --output FOLDER             a tiny model that is made here
    python -m benchmarks.gpu.first_request --model DIR --output FOLDER

One server, nothing cached between requests; the requests of REQUESTS in turn, each one's time to its first token, and
how many variants of our kernels were compiled meanwhile: before the first one by vLLM's start-up, which encodes a
dummy video. Where nothing is compiled (a CPU) there are none.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from flashvid_vllm.core.config import DEFAULT_RETENTION_RATIO

from ..common.ask import ask
from ..common.clips import clip, probe
from ..common.record import Cell, markdown_table, write_json
from ..common.server import VllmServer
from ..demo.__main__ import serve_arguments, tiny_model
from .kernels import known

FRAMES = 16
# what is asked, in this order: in words, the clip, the share of tokens to keep
REQUESTS = (
    ("the first of all", "bikes", DEFAULT_RETENTION_RATIO),
    ("the same again", "bikes", DEFAULT_RETENTION_RATIO),
    ("another ratio", "bikes", 0.1),
    ("another size", "speaker", DEFAULT_RETENTION_RATIO),
    ("the first once more", "bikes", DEFAULT_RETENTION_RATIO),
)
QUESTION = "What happens in this video?"
COLUMNS = [
    "request",
    "clip",
    "kept",
    "prompt tokens",
    "until ready, or the first token [s]",
    "variants compiled meanwhile",
]


def compiled(cache: Path, names: set[str]) -> int:
    """How many variants of the kernels of these names are in a Triton cache."""
    return sum(path.suffix in (".cubin", ".hsaco") and path.stem in names for path in cache.rglob("*"))


def measure(model: str, tiny: bool, log: Path) -> list[Cell]:
    """A cell for the start-up, and one for each of REQUESTS."""
    names, cells = known(), []
    clips = {name: clip(name) for _, name, _ in REQUESTS}
    arguments = serve_arguments(probe(clips["bikes"]), FRAMES, tiny)
    with tempfile.TemporaryDirectory(prefix="flashvid-triton-") as folder:
        cache = Path(folder)
        with VllmServer(model, *arguments, log=log, env={"TRITON_CACHE_DIR": folder}, timeout=400) as server:
            before = compiled(cache, names)
            cells.append({"request": "start-up", "seconds": server.seconds_to_start, "variants": before})
            for about, name, ratio in REQUESTS:
                settings = {"retention_ratio": ratio}
                answer = ask(server.client(), server.model, clips[name], QUESTION, settings, max_tokens=4)
                now = compiled(cache, names)
                cell = {"request": about, "clip": name, "ratio": ratio, "prompt_tokens": answer.prompt_tokens}
                cells.append({**cell, "seconds": answer.ttft_s, "variants": now - before})
                before = now
    return cells


def lines(cells: list[Cell]) -> list[str]:
    """The table."""
    rows = []
    for cell in cells:
        video = [cell["clip"], f"{cell['ratio']:.0%}", f"{cell['prompt_tokens']}"] if "clip" in cell else ["", "", ""]
        rows.append([cell["request"], *video, f"{cell['seconds']:.3f}", f"{cell['variants']}"])
    return markdown_table(COLUMNS, rows)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.first_request", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="a directory, or a model's name on a hub; default: one that is made here")
    parser.add_argument("--output", type=Path, required=True, help="folder for first_request.json and the server's log")
    return parser


def main() -> int:
    """The command line."""
    options = make_parser().parse_args()
    os.makedirs(options.output, exist_ok=True)
    model = options.model or str(tiny_model())
    cells = measure(model, not options.model, options.output / "serve.log")
    write_json({"cells": cells}, options.output / "first_request.json")
    print("\n".join(lines(cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
