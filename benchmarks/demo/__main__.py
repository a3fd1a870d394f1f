# SPDX-License-Identifier: MIT
"""One server, one video, one question, three times: plain, on a quarter and on a tenth of the video's tokens.

    make demo                                                        a tiny model with random weights
    make demo MODEL=Qwen/Qwen2.5-VL-7B-Instruct VIDEO=clip.mp4       your model, your video

It starts `vllm serve MODEL --plugin flashvid`, and each request says for itself how much to keep.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common.ask import Answer, ask
from ..common.clips import CLIPS, Video, clip, probe
from ..common.machine import dtype_option
from ..common.options import prompt_room
from ..common.server import ServerError, VllmServer

CACHE = Path(__file__).resolve().parents[2] / ".cache"
REAL_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
TINY_KIND = "qwen2_5_vl_demo"
MODES: dict[str, dict[str, Any]] = {
    "plain": {"enabled": False},
    "keep 25 %": {"retention_ratio": 0.25},
    "keep 10 %": {"retention_ratio": 0.10},
}


@dataclass(frozen=True)
class Result:
    """What a mode needed: the last answer, and the times to the first token."""

    answer: Answer
    ttft_s: list[float]

    @property
    def median_s(self) -> float:
        """The median time to the first token."""
        return statistics.median(self.ttft_s)


def tiny_model() -> Path:
    """The demo's own model, made once."""
    directory = CACHE / "models" / TINY_KIND
    if not directory.exists():
        say(f"making a tiny model with random weights in {directory} ...")
    from ..common.tiny_model import make_tiny_model

    return make_tiny_model(TINY_KIND, directory)


def say(text: str) -> None:
    """A line about what goes on."""
    print(text, file=sys.stderr, flush=True)


def serve_arguments(video: Video, frames: int, tiny: bool) -> list[str]:
    """Arguments of `vllm serve`. Nothing is cached between requests, so that a repeat costs what the first did."""
    room = str(prompt_room(video, frames))
    # some families sample by rate, some by number; a rate that is a hair too high is rounded down to `frames`
    sampling = {"num_frames": frames, "fps": 1.0001 * frames / video.seconds}
    arguments = ["--plugin", "flashvid", "--max-model-len", room, "--max-num-batched-tokens", room]
    arguments += ["--media-io-kwargs", json.dumps({"video": sampling})]
    arguments += ["--limit-mm-per-prompt", json.dumps({"video": 1, "image": 0})]
    arguments += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--max-num-seqs", "4"]
    return [*arguments, "--enforce-eager", *dtype_option()] if tiny else arguments


def measure(server: VllmServer, video: Path, question: str, repeats: int, tokens: int) -> tuple[int, dict[str, Result]]:
    """The prompt's length without the video, and each mode's result. The modes take turns after a warm-up."""
    client = server.client()
    text_tokens = ask(client, server.model, None, question, max_tokens=1).prompt_tokens
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    answers: dict[str, Answer] = {}
    *_, warm_up = MODES  # the shortest: what is done once does not depend on the prompt's length
    for turn in range(repeats + 1):
        for mode, settings in MODES.items() if turn else [(warm_up, MODES[warm_up])]:
            answer = ask(client, server.model, video, question, settings, tokens)
            if turn:
                times[mode].append(answer.ttft_s)
            answers[mode] = answer
            name = f"repeat {turn} of {repeats}" if turn else "warm-up"
            say(f"  {name}, {mode:9} {answer.prompt_tokens:6d} prompt tokens, first token after {answer.ttft_s:.2f} s")
    return text_tokens, {mode: Result(answers[mode], times[mode]) for mode in MODES}


def check(results: dict[str, Result]) -> None:
    """Raise ServerError if a mode was not compressed: vLLM serves on when a plugin cannot be loaded."""
    lengths = [result.answer.prompt_tokens for result in results.values()]
    if not lengths[0] > lengths[1] > lengths[2]:
        raise ServerError(f"the prompts were not compressed: {lengths} tokens for {', '.join(results)}")


def legible(text: str) -> str:
    """An answer on one line, without what a terminal would take for a command."""
    line = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in text)
    line = " ".join(line.split())
    return escape(line[:400]) or "(nothing legible)"


def table(results: dict[str, Result], text_tokens: int, title: str) -> Table:
    """The results as a table."""
    plain = results["plain"]
    shown = Table(title=title, title_justify="left")
    for name in ("", "prompt tokens", "video tokens saved", "time to first token"):
        shown.add_column(name, justify="right" if name else "left")
    shown.add_column("answer", overflow="fold")
    for mode, result in results.items():
        saved = plain.answer.prompt_tokens - result.answer.prompt_tokens
        share = saved / max(1, plain.answer.prompt_tokens - text_tokens)
        shown.add_row(
            mode,
            f"{result.answer.prompt_tokens}",
            f"{saved} ({share:.0%})" if saved else "-",
            f"{result.median_s:.2f} s ({result.median_s / plain.median_s:.2f} x)",
            legible(result.answer.text),
        )
    return shown


def device() -> str:
    """What the server runs on, for the title."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.splitlines()[0].strip()
    return f"{len(os.sched_getaffinity(0))} cores of {torch.cpu.get_capabilities().get('cpu_name', 'a CPU')}"


def run(options: argparse.Namespace) -> None:
    """The demo from start to end."""
    start = time.monotonic()
    path = Path(options.video) if options.video else clip(options.clip)
    video = probe(path)
    if not video.seconds:
        raise ValueError(f"the video tells no frame rate: {path}")
    tiny = options.model is None
    model = tiny_model() if tiny else options.model
    log = CACHE / "demo" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # a real model on a CPU needs more than the 1 GiB that does for a tiny one; a GPU does not read this
    env = {} if tiny or "VLLM_CPU_KVCACHE_SPACE" in os.environ else {"VLLM_CPU_KVCACHE_SPACE": "4"}
    arguments = serve_arguments(video, options.frames, tiny)
    server = VllmServer(model, *arguments, *options.serve_args, log=log, env=env, timeout=options.timeout)
    say(f"$ vllm serve {server.model} {' '.join(arguments[:2])} ...   (log: {log})")
    with server:
        say(f"serving after {server.seconds_to_start:.0f} s; asking: {options.question}")
        tokens = options.max_tokens or (16 if tiny else 64)
        text_tokens, results = measure(server, path, options.question, options.repeats, tokens)
    check(results)
    name = f"{path.name}: {video.seconds:.0f} s, {video.width} x {video.height}, {options.frames} frames of it"
    title = f"{'tiny random Qwen2.5-VL' if tiny else model} on {device()}; {name}"
    console = Console()
    console = Console(width=min(120, console.width) if console.is_terminal else 110)
    console.print(table(results, text_tokens, title))
    console.print(f"Median of {options.repeats}, taking turns. The whole demo took {time.monotonic() - start:.0f} s.")
    if tiny:
        console.print(
            "[bold]The answers are noise: this model's weights are random.[/bold] Tokens and times are real, but the "
            f"times are a tiny model's. A real model is one variable away: [bold]make demo MODEL={REAL_MODEL}[/bold]"
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model on a hub or a directory; default: a tiny one with random weights")
    parser.add_argument("--video", help="a video file; default: a clip out of a Python package")
    parser.add_argument("--clip", choices=tuple(CLIPS), default="bikes", help="which clip (default: %(default)s)")
    parser.add_argument("--question", default="What happens in this video? Answer in two sentences.")
    parser.add_argument("--frames", type=int, default=32, help="frames to take of the video (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests a mode (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="length of an answer (default: 64, tiny model 16)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until it must serve, download included")
    parser.add_argument("serve_args", nargs="*", help="after --: further arguments of vllm serve")
    options = parser.parse_args()
    if options.frames < 4 or options.repeats < 1:
        parser.error("--frames must be at least 4 and --repeats at least 1")
    try:
        run(options)
    except KeyboardInterrupt:
        say("\ninterrupted; the server is stopped")
        return 130
    except (ServerError, ValueError, RuntimeError, OSError, openai.APIError) as error:
        say(f"\nthe demo failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
