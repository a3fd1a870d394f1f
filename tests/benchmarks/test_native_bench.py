# SPDX-License-Identifier: MIT
"""The benchmark tool: who is in its tables, and what it calls memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ops.__main__ import PEERS, SHAPES, WHOLE, line_of, measure, table
from benchmarks.ops.timer import Timer
from flashvid_vllm import env_info


def test_every_backend_stands_beside_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", (16, 64, 2, 16, 32))
    timer = Timer(0)
    rows = measure("tiny", 4, "scene", torch.bfloat16, timer, (1e9, 1e12), each_op=True)
    backends = set(env_info()["backends"])
    by = {op: {row.by for row in rows if row.op == op} for op in {row.op for row in rows}}
    assert len(by) == 10
    assert by.pop("compress") >= backends | {"torch", "two bmm"}
    assert by.pop("adaptive") == backends | {"FlashVID"}
    assert all(found == backends for found in by.values())
    for row in rows:
        peers = [peer for peer in PEERS if peer in {other.by for other in rows if other.op == row.op}]
        assert list(row.ratios) == [peer for peer in peers if peer != row.by]
        assert row.fastest_s <= row.median_s <= row.slowest_s
        assert (row.as_torch == 1) == (row.op in WHOLE and row.by not in PEERS)
    assert table("", [line_of(row) for row in rows]).row_count == len(rows)


def test_peak_memory() -> None:
    timer = Timer(0)
    if timer.device.type == "cuda":
        pytest.skip("torch counts it")
    held = []

    def hold() -> None:
        held.append(torch.ones(2**22))  # 16 MiB, of which half stays
        torch.ones(2**22)

    peak = timer.peak_bytes(hold)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 30 * 2**20 <= peak <= 40 * 2**20


@pytest.mark.longer("the whole command")
def test_the_command_ends(tmp_path: Path) -> None:
    """It measures lengths in processes of their own, which import what they are to run."""
    options = [
        "--shape",
        "small",
        "--frames",
        "2",
        "--seconds",
        "0",
        "--lengths",
        "16",
        "--json",
        str(tmp_path / "rows"),
    ]
    command = [sys.executable, "-m", "benchmarks.ops", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    lengths = [(row["method"], row["frames"]) for row in rows if "op" not in row]
    assert lengths == [("flashvid", 16), ("adaptive", 16)]
    assert {row["op"] for row in rows if "op" in row} == set(WHOLE)
