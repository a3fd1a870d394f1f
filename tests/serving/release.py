# SPDX-License-Identifier: MIT
"""Our contract, engine oracles and a server on other vLLM releases: `make compat`, `make compat VLLM=0.33.0`.

    python -m tests.serving.release             the supported releases that are not installed
    python -m tests.serving.release 0.33.0      that one; also one outside the range, to see what breaks

For each: what we build on in its sources (tests/serving/contract.py), its Python over the installed compiled parts
(tests/serving/overlay.py), and in that the tests below, on either of vLLM's model runners. A refusal of ours is told
and then left out, in the tests' processes alone (tests/support/any_vllm.py).
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from flashvid_vllm.serving.compat import vllm_version
from tests.models.test_runner_v2 import SOME
from tests.serving.contract import hold, read_record, recorded_for
from tests.serving.contract_derivation import Derivation
from tests.serving.contract_releases import fetch, installed, releases
from tests.serving.overlay import ROOT, Overlay, make
from tests.support.junit import Row, rows_of

ENCODER = ["models/test_encode_less_answers.py"]
V1 = ["models/test_engine_oracle.py", "models/test_families.py", "models/test_stages.py", "serving/test_server.py"]


def run_tests(overlay: Overlay, runner: str, tests: Sequence[str], options: Iterable[str]) -> list[Row]:
    """Run tests in an overlay, shown as they run: a row for each file."""
    variables = overlay.variables | {"FLASHVID_TESTS": "quick"}
    variables |= {"FLASHVID_RUNNER": "v2"} if runner == "V2" else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--tb", "short"]
        command += [*options, f"--junit-xml={report}", *(f"tests/{test}" for test in tests)]
        done = subprocess.run(command, cwd=ROOT, env=variables, check=False)
        rows = rows_of(report, runner) if report.exists() else []
    broken = done.returncode not in (0, 1) or not any(row.passed or row.failed for row in rows)
    if broken and not any(row.failed for row in rows):
        rows.append(Row(f"{runner} pytest", failed=Counter([f"it ended with {done.returncode}"])))
    return rows


def check(release: str, workers: int) -> bool:
    """All there is to know of a release, and whether it is well."""
    sources, (here, compiled) = fetch(release), next(iter(installed().items()))
    minor = ".".join(release.split(".")[:2])
    record = read_record()
    if minor not in releases():
        record = dict(recorded_for(here, record))
    findings = hold({minor: Derivation(sources).contract}, record)

    overlay = make(sources, compiled, vllm_version())
    found = overlay.look()
    faults, refusal = overlay.faults(found), found.get("refusal")
    print(f"vLLM {overlay.version} on the compiled parts of {vllm_version()}: {found}", flush=True)
    rows = [Row("start", passed=not faults, failed=Counter(faults))]
    if "version" in found:
        options = ["-p", "tests.support.any_vllm"] if refusal else []
        split = ["-n", str(workers), "--dist", "loadscope", "--no-loadscope-reorder"] if workers > 1 else []
        rows += run_tests(overlay, "V1", V1 + ENCODER, [*options, *split])
        if importlib.util.find_spec("triton"):
            rows += run_tests(overlay, "V2", SOME + ENCODER, [*options, "-p", "no:xdist"])
        else:
            print("V2 needs Triton, which is not installed")
    print(table(f"vLLM {overlay.version}: its Python on the compiled parts of {vllm_version()}", rows))
    print(f"contract: {findings} findings" + (f"\nrefused, were it not for this command: {refusal}" if refusal else ""))
    return not findings and not any(row.failed for row in rows)


def table(title: str, rows: Sequence[Row]) -> str:
    """What passed and what failed, and the first line of each error with the number of its tests."""
    lines = ["", title, f"{'':<44} passed failed skipped", *map(str, rows)]
    errors: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for error, count in row.failed.items():
            errors[error][row.name] += count
    for error, where in errors.items():
        lines += [f"failed: {error}", *(f"    {count} of {name}" for name, count in where.items())]
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="0.33 (its latest patch) or 0.33.0")
    parser.add_argument("--workers", type=int, default=2, help="processes of the tests on V1")
    options = parser.parse_args()
    if not (places := installed()):
        raise SystemExit("no supported vLLM is installed, whose compiled parts others could run on: make setup")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    findings = hold({release: Derivation(vllm).contract for release, vllm in places.items()}, read_record())
    others = options.releases or [release for release in releases() if release not in places]
    well = [check(release, options.workers) for release in others]
    return 0 if all(well) and not findings else 1


if __name__ == "__main__":
    sys.exit(main())
