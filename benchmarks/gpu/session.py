# SPDX-License-Identifier: MIT
"""Parts that run one after the other, each in a process of its own, within one budget of time; finished ones are kept.

A part that fails, ends early or runs past its limit costs no other part anything. Its verdict:

passed, failed      it came to its end: not run again with the same command on the same code and device
broken              it ended before it had an answer
out of time         it was stopped at its limit
no time             it was not begun: less was left than it needs at least
not there           it was not begun: something that it needs is not on this machine
left out            it was not begun: it was not asked for
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FINISHED = ("passed", "failed")
WELL = ("passed", "not there", "left out")
PATIENCE = 45.0  # seconds for a part to end by itself once it is told to: a server takes 25 to stop


@dataclass(frozen=True)
class Found:
    """What a part's run came to: verdict, why in a line, Markdown lines for the report, and figures for its JSON."""

    verdict: str
    why: str = ""
    text: tuple[str, ...] = ()
    figures: Any = None


@dataclass(frozen=True)
class Ran:
    """A part's process that ended by itself: its exit status, its output, the folder that it wrote into."""

    code: int
    log: str
    out: Path


@dataclass(frozen=True)
class Part:
    """Something to run.

    Attributes:
        name: of its files.
        question: what it answers.
        command: what is run in the repository's root, without this Python in front unless ``program`` says otherwise.
        least, most: seconds that it needs to be worth beginning, and that it may take.
        read: what a run came to.
        env: variables on top of this process's.
        program: what runs the command: this Python, or a program that is handed it.
        missing: what it needs and this machine has not; it is not run then.
    """

    name: str
    question: str
    command: tuple[str, ...]
    least: float
    most: float
    read: Callable[[Ran], Found]
    env: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = (sys.executable,)
    missing: str = ""

    @property
    def shown(self) -> str:
        """The command for people and for comparison: no path of this machine."""
        words = [*(f"{name}={value}" for name, value in self.env.items())]
        words += ["python" if word == sys.executable else word for word in self.program]
        words[len(self.env)] = Path(words[len(self.env)]).name
        words += self.command
        return shlex.join(words).replace(f"{ROOT}/", "")


@dataclass(frozen=True)
class Result:
    """A part as the report has it; ``seconds`` of the clock, ``date`` of its run."""

    name: str
    question: str
    command: str
    verdict: str
    why: str
    seconds: float
    date: str
    text: list[str]
    figures: Any

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.verdict in FINISHED


def result_of(part: Part, found: Found, seconds: float = 0) -> Result:
    """The entry of a part that came to ``found``."""
    date = time.strftime("%Y-%m-%d %H:%M")
    return Result(
        part.name, part.question, part.shown, found.verdict, found.why, round(seconds, 1), date, list(found.text),
        found.figures,
    )  # fmt: skip


class Session:
    """The parts' results in a folder, and the time that is left.

    Args:
        folder: of this code on this device; each part has PART.json, PART.log and a folder PART there.
        seconds: for all parts together, from now on.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.end = folder, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds that a part may take, its end included."""
        return self.end - time.monotonic() - PATIENCE

    def kept(self, part: Part) -> Result | None:
        """The result of an earlier run of the same command that came to its end."""
        with suppress(OSError, ValueError, TypeError):
            found = Result(**json.loads((self.folder / f"{part.name}.json").read_text()))
            if found.finished and found.command == part.shown:
                return found
        return None

    def run_all(
        self,
        parts: Sequence[Part],
        only: Collection[str] | None = None,
        again: Collection[str] = (),
        after: Callable[[list[Result]], None] = lambda results: None,
    ) -> list[Result]:
        """A result for every part, in order. Ctrl-C ends the part that runs and all that follow; the results say so.

        Args:
            parts: all that there are.
            only: names of those to run; default: all.
            again: names of those to run although they have finished.
            after: called with the results so far, whenever there is another.
        """
        results, interrupted = [], False
        for part in parts:
            found = None if part.name in again else self.kept(part)
            if found:
                say(f"{part.name}: {found.verdict} on {found.date}, kept")
            elif only is not None and part.name not in only:
                found = result_of(part, Found("left out", "not asked for"))
            elif interrupted:
                found = result_of(part, Found("no time", "interrupted before it began"))
            else:
                try:
                    found = self.run(part)
                except KeyboardInterrupt:
                    found, interrupted = result_of(part, Found("broken", "interrupted")), True
                say(f"{part.name}: {found.verdict}{f', {found.why}' if found.why else ''} ({found.seconds:.0f} s)")
            results.append(found)
            after(results)
        return results

    def run(self, part: Part) -> Result:
        """Run a part, and keep its result if it comes to its end."""
        if part.missing:
            return result_of(part, Found("not there", part.missing))
        limit = min(part.most, self.left())
        if limit < part.least:
            said = f"it needs {part.least:.0f} s at least, {max(0, limit):.0f} s were left"
            return result_of(part, Found("no time", said))
        out, log = self.folder / part.name, self.folder / f"{part.name}.log"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (self.folder / f"{part.name}.json").unlink(missing_ok=True)
        say(f"{part.name}: {part.question} At most {limit:.0f} s; its output: {log}")
        start = time.monotonic()
        code = run_limited([*part.program, *part.command], limit, log, part.env)
        seconds = time.monotonic() - start
        if code is None:
            found = Found("out of time", f"stopped after {limit:.0f} s")
        else:
            found = read(part, Ran(code, log.read_text(errors="replace"), out))
        result = result_of(part, found, seconds)
        if result.finished:
            unfinished = self.folder / f"{part.name}.part"
            unfinished.write_text(json.dumps(asdict(result), indent=1))
            unfinished.rename(self.folder / f"{part.name}.json")
        return result


def read(part: Part, ran: Ran) -> Found:
    """What a run came to; one whose results cannot be read is broken."""
    try:
        return part.read(ran)
    except Exception as error:
        last = next((line for line in reversed(ran.log.splitlines()) if line.strip()), "it printed nothing")
        return Found(
            "broken", f"exit status {ran.code}, {type(error).__name__}: {error}; its last line: {last.strip()}"
        )


def run_limited(command: Sequence[str], seconds: float, log: Path, env: Mapping[str, str]) -> int | None:
    """The exit status of a command, its output in ``log``; None if it had to be stopped after ``seconds``.

    It has a process group of its own, of which nothing is left behind.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | dict(env), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            signal_group(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        signal_group(process.pid, signal.SIGKILL)
        process.wait()


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to what is left of a process group."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def say(text: str) -> None:
    """A line about what goes on."""
    print(text, file=sys.stderr, flush=True)
