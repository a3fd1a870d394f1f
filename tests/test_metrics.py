# SPDX-License-Identifier: MIT
"""What workers write for `/metrics`, read as the API server reads it. With servers: test_server.py."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

prometheus = pytest.importorskip("prometheus_client")

from prometheus_client.multiprocess import MultiProcessCollector  # noqa: E402

from flashvid_vllm import metrics  # noqa: E402

CPU = torch.device("cpu")


def read(folder: Path) -> dict[str, float]:
    """Sample -> value, of every process together; label values are part of the name."""
    families = MultiProcessCollector(None, str(folder)).collect()
    samples = [sample for family in families for sample in family.samples]
    return {"|".join([sample.name, *map(str, sample.labels.values())]): sample.value for sample in samples}


def work(folder: str, videos: list[tuple[int, int]]) -> None:
    worker = metrics.Metrics(folder, {"method": "flashvid", "token_budget": None})
    for tokens_in, tokens_out in videos:
        with worker.timed(CPU):
            pass
        worker.count(tokens_in, tokens_out)


def test_workers_add_up(tmp_path: Path) -> None:
    """Two processes, and one of them with two engines."""
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=work, args=(str(tmp_path), [(100, 10)]))
    other.start()
    other.join()
    assert other.exitcode == 0
    work(str(tmp_path), [(30, 3), (20, 20)])
    work(str(tmp_path), [(1, 1)])
    found = read(tmp_path)
    assert found["flashvid:videos_total"] == 4
    assert found["flashvid:video_tokens_in_total"] == 151
    assert found["flashvid:video_tokens_out_total"] == 34
    assert found["flashvid:settings_info|flashvid|"] == 1
    assert found["flashvid:compression_seconds_count"] == 4
    assert found["flashvid:compression_seconds_bucket|+Inf"] == 4
    assert 0 < found["flashvid:compression_seconds_sum"] < 1


def test_seconds_fall_into_their_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = metrics.Metrics(str(tmp_path), {"method": "flashvid"})
    clock = iter([10.0, 10.003, 20.0, 20.7])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        with worker.timed(CPU):
            pass
    buckets = [read(tmp_path)[f"flashvid:compression_seconds_bucket|{le}"] for le in ("0.002", "0.005", "0.5", "1.0")]
    assert buckets == [0, 1, 1, 2]
    assert read(tmp_path)["flashvid:compression_seconds_sum"] == pytest.approx(0.703)


def test_a_failed_compression_is_not_timed(tmp_path: Path) -> None:
    worker = metrics.Metrics(str(tmp_path), {"method": "flashvid"})
    with pytest.raises(ZeroDivisionError), worker.timed(CPU):
        raise ZeroDivisionError
    assert read(tmp_path)["flashvid:compression_seconds_count"] == 0


class Event:
    """A CUDA event that passes when it is told to; `elapsed_time` as CUDA's, in milliseconds."""

    made: ClassVar[list[Any]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.passed, self.recorded = False, False
        self.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        return self.passed

    def elapsed_time(self, end: Any) -> float:
        assert self.passed
        assert end.passed
        return 40.0


def test_a_gpu_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", [])
    worker = metrics.Metrics(str(tmp_path), {"method": "flashvid"})
    counts = []
    for video in range(4):
        if video == 2:  # the first and the second have ended meanwhile
            for event in Event.made:
                event.passed = True
        with worker.timed(torch.device("cuda")):
            pass
        counts.append(read(tmp_path)["flashvid:compression_seconds_count"])
    assert counts == [0, 0, 2, 2]
    assert read(tmp_path)["flashvid:compression_seconds_sum"] == pytest.approx(0.08)


def test_other_metrics_of_the_process_stay_in_memory(tmp_path: Path) -> None:
    before = dict(os.environ)
    metrics.Metrics(str(tmp_path), {"method": "flashvid"})
    assert dict(os.environ) == before
    prometheus.Counter("elsewhere", "", registry=None).inc()
    assert not any("elsewhere" in name for name in read(tmp_path))


PUBLISH = """
import multiprocessing, os, sys
from prometheus_client import REGISTRY, generate_latest
from flashvid_vllm import metrics

def shows(tokens):
    return f"flashvid:video_tokens_in_total {tokens}.0" in generate_latest(REGISTRY).decode()

def api_server():
    metrics.publish()
    assert shows(7)

if __name__ == "__main__":
    metrics.publish()
    metrics.publish()
    assert metrics.folder() != os.environ.get("ELSEWHERE")
    metrics.Metrics(metrics.folder(), {"method": "flashvid"}).count(7, 1)
    assert shows(7)
    child = multiprocessing.get_context("spawn").Process(target=api_server)
    child.start()
    child.join()
    assert child.exitcode == 0
    print(metrics.folder())
"""


def test_published_by_the_server_and_by_its_children_and_gone_with_it(tmp_path: Path) -> None:
    """And a server started by a process that has another server's folder does not show what is in that."""
    metrics.Metrics(str(tmp_path), {"method": "flashvid"}).count(1000, 1)
    script = tmp_path / "server.py"
    script.write_text(PUBLISH)
    env = {name: value for name, value in os.environ.items() if name != metrics.VLLM_FOLDER}
    env |= {metrics.OUR_FOLDER: str(tmp_path), "ELSEWHERE": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()


def test_vllms_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    monkeypatch.setenv(metrics.OUR_FOLDER, str(ours))
    monkeypatch.delenv(metrics.VLLM_FOLDER, raising=False)
    assert metrics.folder() is None  # another machine's
    ours.mkdir()
    assert metrics.folder() == str(ours)
    theirs.mkdir()
    monkeypatch.setenv(metrics.VLLM_FOLDER, str(theirs))
    assert metrics.folder() == str(theirs)
    assert metrics.publish.__wrapped__() is None
