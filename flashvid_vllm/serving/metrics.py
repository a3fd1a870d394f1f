# SPDX-License-Identifier: MIT
"""Prometheus metrics on vLLM's ``/metrics``: video tokens in and out, seconds of compression, settings; of videos that
are encoded less their rows, and seconds of their choice; tokens that are dropped inside the LLM.

Videos are compressed in the worker, ``/metrics`` is answered by the API server, and nothing that vLLM sends between
them takes a third party's figures. So the worker writes prometheus_client's files for several processes into a
folder whose name it inherits, and the API server reads them when it is asked: with several API servers vLLM's own
folder, which it reads already, otherwise one of ours. Can go when vLLM carries a plugin's figures to ``/metrics``.

Each video is counted where it is encoded and compressed, by the first of the ranks that share it; one that a cache
of vLLM's holds is not compressed again. The videos with which memory is measured at the start are not counted.

What serves must not fail for what is only told: where the folder cannot be made, written or read, a warning says so
once, and the rest of ``/metrics`` stays.
"""

import contextlib
import fcntl
import functools
import itertools
import logging
import multiprocessing
import os
import shutil
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VLLM_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's name for it; vLLM sets it for several API servers
OUR_FOLDER = "FLASHVID_METRICS_DIR"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_PREFIX = "flashvid-metrics-"
_FILE_BYTES = 1 << 14  # of each file; ours need 3 KB and never grow

logger = logging.getLogger("vllm.plugins.flashvid")
_files_made = itertools.count()
_lock = threading.Lock()


@functools.cache
def publish() -> tempfile.TemporaryDirectory[str] | None:
    """Let this process's ``/metrics`` show what its workers will write. Call it before they are started.

    Returns the folder that was made for it, which goes when the process ends; None where there is one already, or
    none can be made.
    """
    from prometheus_client import REGISTRY

    if VLLM_FOLDER in os.environ:
        return None
    made = None
    # an API server that another process has started, with the workers (data parallelism), reads what they write;
    # a variable that was only inherited from a shell or a test is another server's
    if multiprocessing.parent_process() is None or OUR_FOLDER not in os.environ:
        os.environ[OUR_FOLDER] = ""
        try:
            made = _make_folder()
        except OSError as error:
            _warn_missing(f"no folder can be made for them ({error})")
            return None
        os.environ[OUR_FOLDER] = made.name
    if os.environ[OUR_FOLDER]:
        REGISTRY.register(_Collector(os.environ[OUR_FOLDER]))
    return made


def of_worker(settings: Mapping[str, Any]) -> "Metrics | None":
    """This worker's metrics; None, with a warning, where they cannot be written.

    Args:
        settings: as for `Metrics`.
    """
    name = os.environ.get(VLLM_FOLDER) or os.environ.get(OUR_FOLDER)
    if name == "":  # the API server has said why
        return None
    if name is None or not Path(name).is_dir():
        _warn_missing("the API server runs on another machine" if name is None else f"there is no folder {name}")
        return None
    try:
        return Metrics(name, settings)
    except OSError as error:
        _warn_missing(f"they cannot be written to {name} ({error.strerror or error})")
        return None


def _warn_missing(why: str) -> None:
    logger.warning("FlashVID's metrics are missing from /metrics: %s", why)


def _make_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes with this process, whose lock this process holds; those of processes that were killed go."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # a process id would not do: in a container that shares the folder it is another process's, or nobody's
        with contextlib.suppress(OSError):
            if old.lstat().st_uid == os.getuid() and old.is_dir():
                with (old / "lock").open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old)
    made = tempfile.TemporaryDirectory(prefix=_PREFIX)
    held = os.open(Path(made.name, "unlocked"), os.O_CREAT | os.O_WRONLY, 0o600)  # until the process ends
    fcntl.flock(held, fcntl.LOCK_EX)
    Path(made.name, "unlocked").rename(Path(made.name, "lock"))
    return made


class _Collector:
    """What the workers wrote to a folder; nothing, and a warning the first time, if that cannot be read."""

    def __init__(self, folder: str) -> None:
        self._folder, self._warned = folder, False

    def collect(self) -> Iterable[Any]:
        from prometheus_client.multiprocess import MultiProcessCollector

        try:
            return list(MultiProcessCollector(None, self._folder).collect())
        except (OSError, ValueError, RuntimeError, struct.error) as error:
            if not self._warned:
                gone = not Path(self._folder).is_dir()
                _warn_missing(f"{self._folder} " + ("was removed" if gone else f"cannot be read ({error})"))
                self._warned = True
            return []


class Metrics:
    """What a worker reports.

    Args:
        folder: where to write.
        settings: label -> value of ``flashvid:settings_info``, whose value is 1.

    Raises:
        OSError: there is no room for the files.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        with _files_in(folder):
            labels = {name: "" if value is None else str(value) for name, value in settings.items()}
            Gauge(
                "flashvid:settings_info",
                "Settings in force for a request that says nothing.",
                tuple(labels),
                registry=None,
                multiprocess_mode="max",
            ).labels(**labels).set(1)
            self._videos = Counter("flashvid:videos", "Videos compressed.", registry=None)
            self._tokens_in = Counter(
                "flashvid:video_tokens_in", "Visual tokens of these videos before compression.", registry=None
            )
            self._tokens_out = Counter(
                "flashvid:video_tokens_out", "Visual tokens of these videos after compression.", registry=None
            )
            self._rows_in = Counter(
                "flashvid:encoder_rows_in", "Rows of patches of videos that were encoded less.", registry=None
            )
            self._rows_out = Counter(
                "flashvid:encoder_rows_computed", "Rows of these videos that the encoder computed.", registry=None
            )
            self._inner_in = Counter(
                "flashvid:inner_tokens_in", "Visual tokens of prompts that drop some inside the LLM.", registry=None
            )
            self._inner_out = Counter(
                "flashvid:inner_tokens_out", "Visual tokens of these prompts that are left inside it.", registry=None
            )
            self._seconds = Histogram(
                "flashvid:compression_seconds",
                "Compression of one video: from the encoder's output to the kept tokens.",
                buckets=SECONDS,
                registry=None,
            )
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def count(self, tokens_in: int, tokens_out: int) -> None:
        """Enter one video."""
        self._videos.inc()
        self._tokens_in.inc(tokens_in)
        self._tokens_out.inc(tokens_out)

    def count_rows(self, rows_in: int, rows_computed: int) -> None:
        """Enter one video of which the encoder computed fewer rows than it has."""
        self._rows_in.inc(rows_in)
        self._rows_out.inc(rows_computed)

    def count_inner(self, tokens_in: int, tokens_kept: int) -> None:
        """Enter one video of a prompt of which tokens are dropped inside the LLM."""
        self._inner_in.inc(tokens_in)
        self._inner_out.inc(tokens_kept)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Enter the seconds that the block takes on ``device``.

        A GPU is never waited for: its time is taken by events, and entered when a later video finds them passed.
        """
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds.observe(time.perf_counter() - start)
            return
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._seconds.observe(begin.elapsed_time(end) / 1000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._running.append((begin, end))


class Choices:
    """What the process reports in which videos are processed: the API server's, or a ``vllm.LLM``'s.

    Args and errors: as for `Metrics`.
    """

    def __init__(self, folder: str) -> None:
        from prometheus_client import Histogram

        with _files_in(folder):
            self.seconds = Histogram(
                "flashvid:choice_seconds",
                "Choice of the rows that the encoder computes of one video.",
                buckets=SECONDS,
                registry=None,
            )


@functools.cache
def _choices() -> Choices | None:
    name = os.environ.get(VLLM_FOLDER) or os.environ.get(OUR_FOLDER)
    if not name:  # nobody serves, or it was said why there are no metrics
        return None
    try:
        return Choices(name)
    except OSError as error:
        _warn_missing(f"they cannot be written to {name} ({error.strerror or error})")
        return None


@contextmanager
def time_choice() -> Iterator[None]:
    """Enter the seconds that the block takes, in which the rows of one video are chosen."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    with _lock:  # videos are processed in threads
        choices = _choices()
    if choices is not None:
        choices.seconds.observe(seconds)


@contextmanager
def _files_in(folder: str) -> Iterator[None]:
    """Metrics made in this block live in files in ``folder``, whatever the process's other metrics do.

    Raises:
        OSError: there is no room for them.
    """
    from prometheus_client import values

    # names of their own: the process may have files of vLLM's metrics in the folder, or have had an engine before
    name = f"flashvid-{os.getpid()}-{next(_files_made)}"
    _reserve([Path(folder, f"{kind}_{name}.db") for kind in ("counter", "gauge_max", "histogram")])
    in_files = values.MultiProcessValue(lambda: name)
    in_memory, before = values.ValueClass, os.environ.get(VLLM_FOLDER)
    values.ValueClass, os.environ[VLLM_FOLDER] = in_files, folder
    try:
        yield
    finally:
        values.ValueClass = in_memory
        if before is None:
            del os.environ[VLLM_FOLDER]
        else:
            os.environ[VLLM_FOLDER] = before


def _reserve(paths: list[Path]) -> None:
    """Make prometheus_client's files, empty, with all their bytes.

    It would make them with a hole and map them into memory: the first write to a page for which the file system has
    no room ends the process with SIGBUS.
    """
    try:
        for path in paths:
            new = path.with_suffix(".new")  # a reader never sees one without its bytes
            new.write_bytes(bytes(_FILE_BYTES))
            new.rename(path)
    except OSError:
        for path in paths:
            for file in (path, path.with_suffix(".new")):
                with contextlib.suppress(OSError):
                    file.unlink()
        raise
