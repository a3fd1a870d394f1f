# SPDX-License-Identifier: MIT
"""Accuracy on a video benchmark, plain and compressed, with the paper's figures beside it.

    python -m benchmarks.accuracy videomme --model Qwen/Qwen2.5-VL-7B-Instruct --plain --retention-ratio 0.25 0.1
    python -m benchmarks.accuracy mvbench --model ... -- --tensor-parallel-size 2      after --: for vllm serve
    python -m benchmarks.accuracy mine --include-path FOLDER --model ...               a task of your own

It starts `vllm serve MODEL --plugin flashvid`, and each request says for itself how much to keep. The guard ends the
run with exit code 3 if a prompt's length shows that a video was not compressed as asked. The same command again goes
on where an interrupted run ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
from rich.console import Console

from benchmarks.common.clips import clip, probe
from benchmarks.common.server import ServerError, VllmServer
from tests.env.install import SetupError

from .environment import check_lmms_python, lmms_python
from .evaluate import Job, hub_home, lmms_command, preflight, run_lmms, run_name
from .guard import GuardAbort, compare
from .recipes import RECIPES
from .results import Outcome, ResultsError, collect, lengths, outcomes_in, table

ABORTED = 3
STEP_TOKENS = 32768  # a whole video must fit into one step's budget


def say(text: str) -> None:
    """A line about what goes on."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Ends the program for what cannot be run."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help=f"{', '.join(RECIPES)}, or lmms-eval's name of another task")
    parser.add_argument("--model", required=True, help="a model on a hub or a directory")
    parser.add_argument("--plain", action="store_true", help="run the plain model, first if a ratio is given, too")
    parser.add_argument("--retention-ratio", type=float, nargs="+", metavar="R", help="default: 0.1, without --plain")
    parser.add_argument("--method", default="flashvid", help="how tokens are chosen (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="of each video, an even number (default: 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--include-path", type=Path, help="a folder with lmms-eval tasks of your own")
    parser.add_argument("--metric", help="lmms-eval's name of the score, if TASK is another one and has several")
    parser.add_argument("--base-url", help="a server that runs already, such as http://127.0.0.1:8000")
    parser.add_argument("--media-path", type=Path, help="where the server may read videos (default: HF_HOME)")
    parser.add_argument("--output", type=Path, default=Path("accuracy-results"), help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument("--check-every", type=int, default=25, metavar="N", help="exact check of 1 in N requests")
    parser.add_argument("--allow-failures", type=int, default=0, metavar="N", help="requests that may be refused")
    parser.add_argument("--probe", type=Path, help="a video for the first check (default: a clip out of a package)")
    parser.add_argument("--lmms-python", type=Path, help="the Python of an environment that has lmms-eval 0.7.3")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until it must serve, download included")
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    options.serve_args = given[end + 1 :]
    for ratio in options.retention_ratio or []:
        if not 0 < ratio < 1:
            parser.error(f"--retention-ratio must lie between 0 and 1, got {ratio}; the plain model is --plain")
    if options.base_url and (options.frames or options.serve_args or options.media_path):
        parser.error("--base-url leaves --frames, --media-path and arguments of vllm serve to the server that runs")
    options.frames = None if options.base_url else options.frames or 32
    if options.frames is not None and (options.frames < 4 or options.frames % 2):
        parser.error(f"--frames must be even and at least 4 (Qwen's encoders take pairs), got {options.frames}")
    for name in ("limit", "concurrency", "check_every"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if set(options.model) & set(",="):
        parser.error(f"lmms-eval cannot take a model's name with a comma or an equals sign: {options.model!r}")
    if not options.retention_ratio and not options.plain:
        options.retention_ratio = [0.1]
    return options


def serve_arguments(frames: int, media_path: Path, further: list[str]) -> list[str]:
    """Arguments of `vllm serve`. An image is refused: frames that were sent as images would not be compressed."""
    # Some families sample by number, others (Qwen) by rate up to a number: 30 a second reaches it in any video of
    # frames / 30 seconds.
    sampling = {"video": {"num_frames": frames, "fps": 30, "max_frames": frames}}
    arguments = ["--plugin", "flashvid", "--media-io-kwargs", json.dumps(sampling)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"video": 1, "image": 0})]
    arguments += ["--allowed-local-media-path", str(media_path), "--max-num-batched-tokens", str(STEP_TOKENS)]
    return [*arguments, *further]


@contextlib.contextmanager
def serving(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, openai.OpenAI]]:
    """The URL of the server, the model's name there, and a client."""
    if options.base_url:
        url = re.sub(r"/(v1/?)?$", "", options.base_url)
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=600, http_client=openai.DefaultHttpxClient(trust_env=False)
        )
        yield url, client.models.list().data[0].id, client
        return
    hub_home().mkdir(parents=True, exist_ok=True)  # vLLM refuses to start without it
    media_path = options.media_path.resolve() if options.media_path else hub_home()
    arguments = serve_arguments(options.frames, media_path, options.serve_args)
    log = folder / "serve.log"
    server = VllmServer(options.model, *arguments, log=log, timeout=options.timeout)
    say(f"$ vllm serve {server.model} {shlex.join(arguments)}   (log: {log})")
    with server:
        say(f"serving after {server.seconds_to_start:.0f} s")
        yield server.base_url, server.model, server.client()


def keep_apart(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError if `folder` has runs on another server, whose answers must not be taken for this one's."""
    server = {
        "base_url": options.base_url,
        "serve_args": options.serve_args,
        "media_path": str(options.media_path or ""),
    }
    path = folder / "server.json"
    if path.exists() and (before := json.loads(path.read_text())) != server:
        raise ValueError(f"{folder} has runs on another server, {before}, and this is {server}; give another --output")
    path.write_text(json.dumps(server, indent=1))


def evaluate(options: argparse.Namespace, folder: Path, python: Path) -> list[Outcome]:
    """Every run that was asked for, and what earlier ones left in `folder`."""
    keep_apart(options, folder)
    recipe = RECIPES.get(options.task)
    task = recipe.task if recipe else options.task
    include = options.include_path.resolve() if options.include_path else None
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    job = Job(task, include, model, options.frames, options.limit, options.concurrency, options.check_every,
              options.allow_failures)  # fmt: skip
    ratios = ([None] if options.plain else []) + sorted(options.retention_ratio or [], reverse=True)
    video = options.probe or clip("carphone")
    probe(video)  # before a server is started for nothing
    with serving(options, folder) as (url, served, client):
        for ratio in ratios:
            name = run_name(ratio, options.method)
            home = folder / re.sub(r"[ %]+", "-", name)
            home.mkdir(exist_ok=True)
            seen = preflight(client, served, video, ratio, options.method)
            say(f"{name}: the first check passed, {seen.kept} of {seen.video_tokens} video tokens in the prompt")
            run_lmms(lmms_command(python, job, home, ratio, options.method), home, job, url, served)
            if ratio is not None and (plain := lengths(folder / "plain" / "ledger.jsonl")):
                both = compare(plain, lengths(home / "ledger.jsonl"))
                say(f"{name}: {both} requests are shorter than the same ones of the plain run")
            collect(home, name, ratio, options.frames, recipe, options.metric).write(home)
    return outcomes_in(folder)


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 finished, 1 failed, 3 ended by the guard."""
    options = parse(arguments)
    frames = f"{options.frames} frames" if options.frames else "frames as the server samples them"
    model = Path(options.model).name
    case = f"{options.task}, {frames}" + (f", the first {options.limit} questions" if options.limit else "")
    folder = (options.output / model / re.sub(r"[ ,]+", "-", case)).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        python = options.lmms_python.absolute() if options.lmms_python else lmms_python()
        check_lmms_python(python)
        outcomes = evaluate(options, folder, python)
    except KeyboardInterrupt:
        say("\ninterrupted; the same command again goes on from here")
        return 130
    except GuardAbort as abort:
        say(f"\naborted, no accuracy is reported: {abort}")
        return ABORTED
    except (ServerError, SetupError, ResultsError, ValueError, OSError, openai.APIError, httpx.HTTPError) as error:
        say(f"\nthe evaluation failed: {error}")
        return 1
    terminal = Console()
    console = Console(width=min(140, terminal.width) if terminal.is_terminal else 130)
    console.print(table(outcomes, options.model, options.task, f"{model}: {case}"))
    console.print(f"Samples, answers and logs: {folder}", soft_wrap=True)
    if options.limit:
        console.print("With --limit this is a trial, not the benchmark.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
