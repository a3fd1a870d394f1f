# SPDX-License-Identifier: MIT
"""What the tests cost: the slowest at the end of a run, and with ``--budget`` a failure where a file costs too much.

Seconds are the processor's, of the test and of the processes that it started and ended, so that a busy machine does
not fail what a quiet one passes. Budgets are twice and more what a core of a Zen 1 took, the slowest tried; a file's
first test pays for its engine and, in each process, for importing vLLM.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Generator, Mapping
from typing import Any

import pytest

COST = "cpu_seconds"
SHOWN = 20
# what a file may cost where `make test` (quick) or `make test-full` (full) runs it, unless BUDGETS says otherwise
DEFAULT = {"quick": 120, "full": 200}
BUDGETS: dict[str, dict[str, int]] = {
    "quick": {
        "benchmarks/test_tinyvlm_served.py": 160, "models/test_families.py": 200, "ops/test_triton.py": 200,
        "serving/test_server.py": 220,
    },
    "full": {
        "benchmarks/test_accuracy_lmms.py": 600, "benchmarks/test_serving_benchmark.py": 500,
        "models/test_compiled.py": 400, "models/test_families.py": 400, "models/test_runner_v2.py": 800,
        "models/test_pipeline_parallel.py": 450, "models/test_speculative.py": 400,
        "models/test_tensor_parallel.py": 400,
        "ops/interpreted/test_ops.py": 250, "ops/interpreted/test_pipeline.py": 300, "ops/test_compile_gate.py": 450,
        "ops/test_native_build.py": 450, "ops/test_triton.py": 550, "serving/test_server_families.py": 500,
    },
}  # fmt: skip


def seconds() -> float:
    """Processor seconds of this process and of its children and forks (support/forks.py) that have ended."""
    times, forks = os.times(), sys.modules.get(f"{__package__}.support.forks")
    return sum(times[:4]) + (forks.seconds_of_forks() if forks else 0)


def over_budget(costs: Mapping[str, float], kind: str) -> list[str]:
    """A line for every file of ``costs`` that costs more than its budget."""
    lines = []
    for file, cost in sorted(costs.items()):
        budget = BUDGETS[kind].get(file, DEFAULT[kind])
        if cost > budget:
            lines.append(f"{file} cost {cost:.0f} s of processor time, its budget is {budget} s (tests/times.py)")
    return lines


class Times:
    """A pytest plugin; with pytest-xdist each worker measures and the controller adds up."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.costs: dict[str, float] = defaultdict(float)  # by test
        self.lines: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        item.stash[_START] = seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report: Any = yield
        if call.when == "teardown":
            report.user_properties.append((COST, seconds() - item.stash[_START]))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.costs[report.nodeid] += sum(float(str(value)) for name, value in report.user_properties if name == COST)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput") or not self.config.getoption("--budget"):
            return
        kind = "full" if os.environ.get("FLASHVID_TESTS") == "full" else "quick"
        self.lines = over_budget(self.files(), kind)
        if self.lines and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def files(self) -> dict[str, float]:
        """What each file cost."""
        files: dict[str, float] = defaultdict(float)
        for test, cost in self.costs.items():
            files[test.split("::")[0].removeprefix("tests/")] += cost
        return files

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        total = sum(self.costs.values())
        terminalreporter.section(f"{SHOWN} slowest tests, in seconds of processor time ({total:.0f} in all)")
        for test, cost in sorted(self.costs.items(), key=lambda item: -item[1])[:SHOWN]:
            terminalreporter.line(f"{cost:7.1f}  {test}")
        files = sorted(self.files().items(), key=lambda item: -item[1])
        terminalreporter.line("by file: " + ", ".join(f"{file} {cost:.0f}" for file, cost in files[:SHOWN]))
        folders: dict[str, float] = defaultdict(float)
        for file, cost in files:
            folders[file.split("/")[0]] += cost
        terminalreporter.line("by folder: " + ", ".join(f"{name} {cost:.0f}" for name, cost in sorted(folders.items())))
        for line in self.lines:
            terminalreporter.line(f"OVER BUDGET: {line}", red=True)


_START = pytest.StashKey[float]()
