# SPDX-License-Identifier: MIT
"""Prometheus metrics on vLLM's ``/metrics``: video tokens in and out, seconds of compression, settings.

Videos are compressed in the worker, ``/metrics`` is answered by the API server, and nothing that vLLM sends between
them takes a third party's figures. So the worker writes prometheus_client's files for several processes into a
folder whose name it inherits, and the API server reads them when it is asked: with several API servers vLLM's own
folder, which it reads already, otherwise one of ours.

Each video is counted where it is encoded and compressed, by the first of the ranks that share it; one that a cache
of vLLM's holds is not compressed again. The videos with which memory is measured at the start are not counted.
"""

import functools
import itertools
import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VLLM_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's name for it; vLLM sets it for several API servers
OUR_FOLDER = "FLASHVID_METRICS_DIR"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


_files_made = itertools.count()


@functools.cache
def publish() -> tempfile.TemporaryDirectory[str] | None:
    """Let this process's ``/metrics`` show what its workers will write. Call it before they are started.

    Returns the folder that was made for it, which goes when the process ends; None where there is one already.
    """
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    if VLLM_FOLDER in os.environ:
        return None
    made = None
    # an API server that another process has started, with the workers (data parallelism), reads what they write;
    # a variable that was only inherited from a shell or a test is another server's
    if multiprocessing.parent_process() is None or OUR_FOLDER not in os.environ:
        made = tempfile.TemporaryDirectory(prefix="flashvid-metrics-")
        os.environ[OUR_FOLDER] = made.name
    MultiProcessCollector(REGISTRY, os.environ[OUR_FOLDER])
    return made


def folder() -> str | None:
    """Where this worker writes; None if the server that started it has no folder on this machine."""
    name = os.environ.get(VLLM_FOLDER) or os.environ.get(OUR_FOLDER)
    return name if name and Path(name).is_dir() else None


class Metrics:
    """What a worker reports.

    Args:
        folder: where to write.
        settings: label -> value of ``flashvid:settings_info``, whose value is 1.
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


@contextmanager
def _files_in(folder: str) -> Iterator[None]:
    """Metrics made in this block live in files in ``folder``, whatever the process's other metrics do."""
    from prometheus_client import values

    # names of their own: the process may have files of vLLM's metrics in the folder, or have had an engine before
    number = next(_files_made)
    in_files = values.MultiProcessValue(lambda: f"flashvid-{os.getpid()}-{number}")
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
