# SPDX-License-Identifier: MIT
"""benchmarks.serving.report and benchmarks.frames: tables and plots of figures known beforehand."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")


from benchmarks.common.record import Cell, write_json
from benchmarks.frames import __main__ as frames
from benchmarks.load.measure import Load
from benchmarks.serving import report as serving_report


def fabricated(server: str, load: Load, ttft: float, frame_count: int = 16) -> Cell:
    """A cell whose TTFT [ms] is 70 % encoder, 20 % prefill and, but for plain, 1 % compression."""
    share = 0.0 if server == "plain" else 0.01
    parts = {"encoder_ms": 0.7 * ttft, "compression_ms": share * ttft, "prefill_ms": 0.2 * ttft}
    single = load.concurrency == 1
    return {
        "server": server, "peer": "vLLM's", "model": "m", "about": "a model", "frames": frame_count, "ratio": 0.1,
        "budget": 784, "load": load.name, "requests": load.requests, "concurrency": load.concurrency,
        "rate": load.rate, "seconds": 1.0, "requests_per_s": 1000 / ttft, "prompt_tokens": 800, "each": None,
        "output_tokens_per_s": 1.0, "completion_tokens": 16, "key": "k", "peak_rss_mib": 2000.0,
        "ttft_ms": {"mean": ttft, "p50": ttft, "p95": 2 * ttft, "p99": 3 * ttft},
        "tpot_ms": {"mean": 20.0, "p50": 20.0, "p95": 30.0, "p99": 40.0},
        "kv": {"peak_share": 0.5, "peak_tokens": 4321, "size_tokens": 8642},
        "worker": {**parts, "threads": 1, "gpu_peak_mib": None},
    } | ({"each": [{"ttft_ms": ttft, **parts, "rss_rise_mib": 0.1 * ttft}] * 2} if single else {})  # fmt: skip


def results(cells: list[Cell]) -> Cell:
    servers = [{"server": "plain", "model": "m", "arguments": "--a-flag"}]
    settings = {"max_tokens": 16, "clips": "no clip twice", "servers": servers, "environment": {}}
    return {"machine": {"cpu": "a CPU", "cores": 2, "gpu": "none"}, "settings": settings, "cells": cells}


def row(text: str, *start: str) -> list[str]:
    """The cells of the one row of a Markdown table that starts like this."""
    (found,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return [part.strip() for part in found.strip("|").split("|")]


def test_tables_and_plot_of_serving(tmp_path: Path) -> None:
    loads = [Load(6, concurrency=1), Load(6, concurrency=8), Load(12, rate=0.5), Load(12, rate=1.0)]
    speed = {"plain": 2000.0, "evs": 1000.0, "vidcom2": 1100.0, "flashvid": 500.0}
    cells = [fabricated(server, load, ttft) for server, ttft in speed.items() for load in loads]
    write_json(results(cells), tmp_path / "serving.json")
    found = json.loads((tmp_path / "serving.json").read_text())
    serving_report.write_markdown(found, tmp_path / "serving.md")
    text = (tmp_path / "serving.md").read_text()
    single = ["flashvid", "800", "0.50 [0.50, 0.50]", "0.25", "350.0", "5.0", "100.0", "45.0", "1.00%"]
    assert row(text, "flashvid", "800") == single
    assert row(text, "plain", "800")[3] == ""
    eight = row(text, "8 at a time (6)", "flashvid")
    assert eight[2:6] == ["2.00", "4.00", "0.50 / 1.00 / 1.50", "0.25"]
    assert eight[-2:] == ["350.0 / 5.0 / 100.0", "4321 (50.0%)"]
    assert "--a-flag" in text
    assert str(tmp_path) not in text
    serving_report.write_plot(found, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 20_000
    assert [len(table.rows) for table in serving_report.tables(found)] == [4, 16]


def test_what_an_endpoint_does_not_tell_is_a_question_mark(tmp_path: Path) -> None:
    cells = [fabricated("endpoint", load, 500.0) for load in (Load(2, concurrency=1), Load(2, rate=1.0))]
    for cell in cells:
        cell |= {"worker": None, "kv": None, "frames": 0}
    serving_report.write_markdown(results(cells), tmp_path / "serving.md")
    text = (tmp_path / "serving.md").read_text()
    assert row(text, "endpoint", "800")[3:] == ["", "?", "?", "?", "?", "?"]
    assert row(text, "1 a second (2)", "endpoint")[-2:] == ["?", "?"]
    serving_report.write_plot(results(cells), tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 5_000


def test_table_and_plot_of_frames(tmp_path: Path) -> None:
    load = Load(2, concurrency=1)
    speed = {"plain": 100.0, "flashvid": 60.0}
    cells = [fabricated(server, load, s * n, n) for server, s in speed.items() for n in (16, 160)]
    found = results(cells)
    frames.write_markdown(found, tmp_path / "frames.md")
    text = (tmp_path / "frames.md").read_text()
    assert "at most 784\nvisual tokens" in text
    expected = ["800", "9.60 [9.60, 9.60]", "0.60", "6720.0 / 96.0 / 1920.0 / 864.0", "4321", "960", "2000"]
    assert row(text, "160", "flashvid")[2:] == expected
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| 1")]
    assert order == ["16", "16", "160", "160"]
    frames.write_plot(found, tmp_path / "frames.png")
    assert (tmp_path / "frames.png").stat().st_size > 20_000
    assert len(frames.table(found).rows) == 4
