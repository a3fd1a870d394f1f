# SPDX-License-Identifier: MIT
"""One evaluation: the check before it, lmms-eval in its own process, and what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from benchmarks.common.ask import ask

from .guard import GuardAbort, Witness, examine, settings_of
from .results import ResultsError

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What happens in this video?"
# as in inside.py, which needs lmms-eval to be imported
MODEL, OPTIONS, ABORTED = "flashvid_chat", "FLASHVID_ACCURACY", 3


@dataclass(frozen=True)
class Job:
    """What to evaluate.

    Attributes:
        task: lmms-eval's name of it.
        include_path: where lmms-eval looks for tasks of one's own.
        model: its name, for lmms-eval's file names.
        frames: of each video, for lmms-eval's records; None where a running server decides.
        limit: questions; None for all.
        concurrency: requests under way at once.
        check_every: every so many requests one gets the exact check.
        allow_failures: requests that the server may refuse.
    """

    task: str
    include_path: Path | None
    model: str
    frames: int | None
    limit: int | None
    concurrency: int = 16
    check_every: int = 25
    allow_failures: int = 0


def hub_home() -> Path:
    """Where lmms-eval puts videos. Its tasks do not agree on a default, so it is always told."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser().resolve()


def run_name(ratio: float | None, method: str) -> str:
    """What a run is called in tables: "plain", or "10 % flashvid"."""
    return "plain" if ratio is None else f"{ratio * 100:g} % {method}"


def preflight(client: openai.OpenAI, served: str, clip: Path, ratio: float | None, method: str) -> Witness:
    """Ask about one clip with the settings of the run, and twice more to check them exactly.

    Raises GuardAbort: it was not compressed as asked, or the server refuses the settings.
    """

    def count(settings: Mapping[str, Any]) -> int:
        return ask(client, served, clip, QUESTION, settings, max_tokens=1).prompt_tokens

    try:
        return examine(count, count(settings_of(ratio, method)), ratio)
    except openai.BadRequestError as error:
        raise GuardAbort(
            f"the server refuses a video with FlashVID's settings: {error} (the server must run with --plugin "
            "flashvid and without --no-flashvid-request-overrides)"
        ) from error


def lmms_command(python: Path, job: Job, folder: Path, ratio: float | None, method: str) -> list[str]:
    """lmms-eval's command line for one run. Without its cache: it writes when all is answered; the ledger resumes."""
    arguments = f"model={job.model},frames={job.frames or 0},method={method}"
    if ratio is not None:
        arguments += f",retention_ratio={ratio!r}"
    command = [str(python), "-m", "benchmarks.accuracy.inside", "--model", MODEL, "--model_args", arguments]
    command += ["--tasks", job.task, "--batch_size", "1", "--output_path", str(folder), "--log_samples"]
    if job.include_path:
        command += ["--include_path", str(job.include_path)]
    return [*command, "--limit", str(job.limit)] if job.limit else command


def run_lmms(command: list[str], folder: Path, job: Job, base_url: str, served: str) -> None:
    """Run lmms-eval; what it says goes to lmms-eval.log in `folder`.

    Raises:
        GuardAbort: the guard ended it.
        ResultsError: it failed.
    """
    log, ledger = folder / "lmms-eval.log", folder / "ledger.jsonl"
    options = {"base_url": f"{base_url}/v1", "model": served, "ledger": str(ledger), "concurrency": job.concurrency}
    options |= {"check_every": job.check_every, "allow_failures": job.allow_failures}
    env = {**os.environ, OPTIONS: json.dumps(options), "PYTHONPATH": str(ROOT), "HF_HOME": str(hub_home())}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            _wait(process, ledger)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    said = log.read_text(errors="replace")
    if process.returncode == ABORTED:
        raise GuardAbort(said.rpartition("the guard ended the run: ")[2].strip())
    if process.returncode or "Error during evaluation" in said:  # which lmms-eval ends with exit code 0
        tail = "\n".join(said.splitlines()[-25:])
        raise ResultsError(f"lmms-eval failed with exit code {process.returncode}:\n{tail}\n(all of it: {log})")


def _wait(process: subprocess.Popen[bytes], ledger: Path) -> None:
    start = told = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() - told >= 30:
            told = time.monotonic()
            answered = len(ledger.read_text().splitlines()) if ledger.exists() else 0
            print(f"  lmms-eval, {told - start:4.0f} s: {answered} answers", file=sys.stderr, flush=True)
