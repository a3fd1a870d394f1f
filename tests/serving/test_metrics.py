# SPDX-License-Identifier: MIT
"""What workers write for `/metrics`, read as the API server reads it. With servers: test_server.py."""

import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

prometheus = pytest.importorskip("prometheus_client")

from prometheus_client.multiprocess import MultiProcessCollector  # noqa: E402

from flashvid_vllm.serving import metrics  # noqa: E402

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
    worker = metrics.Metrics(str(tmp_path), {"method": "flashvid", "token_budget": None})
    worker.count_rows(400, 100)
    worker.count_rows(40, 20)
    found = read(tmp_path)
    assert found["flashvid:videos_total"] == 4
    assert found["flashvid:video_tokens_in_total"] == 151
    assert found["flashvid:video_tokens_out_total"] == 34
    assert found["flashvid:encoder_rows_in_total"] == 440
    assert found["flashvid:encoder_rows_computed_total"] == 120
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


def test_choices_are_timed_where_videos_are_processed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the folder that is published; without one, of nothing."""
    monkeypatch.delenv(metrics.VLLM_FOLDER, raising=False)
    monkeypatch.setenv(metrics.OUR_FOLDER, str(tmp_path))
    metrics._choices.cache_clear()
    for _ in range(2):
        with metrics.time_choice():
            pass
    assert read(tmp_path)["flashvid:choice_seconds_count"] == 2
    monkeypatch.setenv(metrics.OUR_FOLDER, "")
    metrics._choices.cache_clear()
    with metrics.time_choice():
        pass
    metrics._choices.cache_clear()
    assert read(tmp_path)["flashvid:choice_seconds_count"] == 2


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
from flashvid_vllm.serving import metrics

def shows(tokens):
    return f"flashvid:video_tokens_in_total {tokens}.0" in generate_latest(REGISTRY).decode()

def api_server():
    metrics.publish()
    assert shows(7)

if __name__ == "__main__":
    metrics.publish()
    metrics.publish()
    assert os.environ[metrics.OUR_FOLDER] != os.environ.get("ELSEWHERE")
    metrics.of_worker({"method": "flashvid"}).count(7, 1)
    assert shows(7)
    child = multiprocessing.get_context("spawn").Process(target=api_server)
    child.start()
    child.join()
    assert child.exitcode == 0
    print(os.environ[metrics.OUR_FOLDER])
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
    assert metrics.of_worker({"method": "flashvid"}) is None  # another machine's
    ours.mkdir()
    assert metrics.of_worker({"method": "flashvid"}) is not None
    assert list(ours.iterdir())
    theirs.mkdir()
    monkeypatch.setenv(metrics.VLLM_FOLDER, str(theirs))
    assert metrics.of_worker({"method": "flashvid"}) is not None
    assert len(list(theirs.iterdir())) == len(list(ours.iterdir())) == 3
    assert metrics.publish.__wrapped__() is None


# --- a folder that is no good


ALONE = f"""
import importlib.util, sys, types
sys.modules["torch"] = types.SimpleNamespace(device=None)  # which takes seconds, and only types need it
spec = importlib.util.spec_from_file_location("metrics", {metrics.__file__!r})
metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics)
"""


def start(code: str, **env: str) -> subprocess.Popen[str]:
    """``code`` in a Python of its own, with `metrics` alone."""
    env = {name: value for name, value in os.environ.items() if name != metrics.VLLM_FOLDER} | env
    command, pipe = [sys.executable, "-c", ALONE + code], subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(code: str, **env: str) -> tuple[str, str]:
    """What it prints to stdout and stderr; it must end well."""
    process = start(code, **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


WORKER = """
import resource
{limit}
worker = metrics.of_worker({{"method": "flashvid"}})
print(worker is None)
if worker is not None:
    worker.count(7, 1)
"""


def test_a_worker_that_may_not_write_serves_without(tmp_path: Path) -> None:
    """It did not start."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, 1 << 13))"
    out, err = run(WORKER.format(limit=limit), **{metrics.OUR_FOLDER: str(tmp_path)})
    assert out == "True\n"
    assert err.count("missing from /metrics: they cannot be written to") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two pages."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    (tmp_path / "other").write_bytes(bytes(56 << 10))
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_does_not_kill_the_worker(small_disk: Path) -> None:
    """prometheus_client maps files with holes: SIGBUS at the first write that finds no room."""
    out, err = run(WORKER.format(limit=""), **{metrics.OUR_FOLDER: str(small_disk)})
    assert out == "True\n"
    assert "No space left" in err
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_the_files_have_room_for_all_that_is_written(tmp_path: Path) -> None:
    """One that grows would have a hole."""
    labels = dict.fromkeys(("method", "retention_ratio", "token_budget", "backend", "enabled"), "a long value" * 9)
    metrics.Metrics(str(tmp_path), labels).count(7, 1)
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {metrics._FILE_BYTES}
    assert all(path.stat().st_blocks * 512 >= metrics._FILE_BYTES for path in tmp_path.iterdir())
    assert max(struct.unpack_from("i", path.read_bytes())[0] for path in tmp_path.iterdir()) < metrics._FILE_BYTES / 2


PUBLISHED = """
import logging, os, shutil, sys, tempfile
logging.basicConfig()
from prometheus_client import REGISTRY, Counter, generate_latest
Counter("others", "").inc()
{before}
metrics.publish()
{after}
for _ in range(2):
    text = generate_latest(REGISTRY).decode()
    assert "others_total 1.0" in text
    assert "flashvid" not in text
print(metrics.of_worker({{"method": "flashvid"}}) is None)
"""


@pytest.mark.parametrize(
    ("before", "after", "warnings"),
    [
        ("tempfile.tempdir = '/no/such/folder'", "", ["no folder can be made"]),
        ("", "shutil.rmtree(os.environ[metrics.OUR_FOLDER])", ["was removed", "there is no folder"]),
        ("", "open(os.environ[metrics.OUR_FOLDER] + '/counter_1.db', 'wb').write(b'no'); "
             "shutil.rmtree = print; os.environ[metrics.OUR_FOLDER] = ''", ["cannot be read"]),
    ],
)  # fmt: skip
def test_a_server_without_a_folder_shows_the_other_metrics(before: str, after: str, warnings: list[str]) -> None:
    """It did not start, or answered /metrics with 500; and it says once what is missing."""
    out, err = run(PUBLISHED.format(before=before, after=after))
    assert out == "True\n"
    found = [line for line in err.splitlines() if "missing from /metrics" in line]
    assert len(found) == len(warnings), err
    assert all(said in line for said, line in zip(warnings, found, strict=True))


SERVER = """
import os
metrics.publish()
metrics.of_worker({"method": "flashvid"})
print(os.environ[metrics.OUR_FOLDER], flush=True)
sys.stdin.read()
"""


def test_what_a_killed_server_left_goes_with_the_next_start(tmp_path: Path) -> None:
    """And nothing of one that lives."""
    servers: list[subprocess.Popen[str]] = []
    folders: list[Path] = []
    for number in range(3):
        servers.append(start(SERVER, TMPDIR=str(tmp_path)))
        stdout = servers[-1].stdout
        assert stdout is not None
        folders.append(Path(stdout.readline().strip()))
        if number == 1:
            servers[1].kill()
            servers[1].communicate()
            assert len(list(folders[1].iterdir())) == 4
    assert folders[0].is_dir()
    assert not folders[1].exists()
    for server in (servers[0], servers[2]):
        server.communicate("", timeout=60)
    assert not list(tmp_path.iterdir())
