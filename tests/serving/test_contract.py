# SPDX-License-Identifier: MIT
"""What we build on in vLLM is there and as recorded; and the checker that says so finds what is not.

After a change of ours that reaches for something new, or a look at what changed in vLLM:
``python -m tests.serving.contract --write``.
"""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.serving import contract, contract_releases
from tests.serving.contract import Finding, findings, read_record
from tests.serving.contract_derivation import Contract, Derivation

VLLM = """
class Config:
    rate: float

class Tower:
    def __init__(self):
        self.width = 3

class Base:
    def __init__(self, *, config: Config):
        self.config = config
        self.tower = Tower()

    def run(self, x):
        return self._hook(x, 1)

    def _hook(self, x, scale):
        return x

def helper(a, *, b=0) -> int:
    return a
"""

OURS = """
from vllm import base as upstream
from vllm.base import Config, helper

WORKER = "vllm.base.Tower"

class Mixin:
    def _hook(self, x, scale):
        helper(x, b=1)
        return super()._hook(x, scale) + self.tower.width

class Model(Mixin, upstream.Base):
    def speed(self):
        return self.config.rate

def later(config: Config):
    from vllm.base import helper as again
    return again(config.rate)
"""


def derive(folder: Path, vllm: str = VLLM, ours: str = OURS) -> Contract:
    for package, module, text in (("vllm", "base", vllm), ("ours", "model", ours)):
        (folder / package).mkdir(parents=True, exist_ok=True)
        (folder / package / "__init__.py").write_text("")
        (folder / package / f"{module}.py").write_text(text)
    return Derivation(folder / "vllm", {"ours": folder / "ours"}, by_hand=False).contract


def test_everything_that_we_reach_for_is_found_without_being_named(tmp_path: Path) -> None:
    made = derive(tmp_path)
    assert not made.faults
    assert made.symbols == {
        "vllm.base": "module",
        "vllm.base.Base": "class Base()",
        "vllm.base.Base._hook": "Base._hook(self, x, scale)",
        "vllm.base.Base._hook called by": "Base.run",
        "vllm.base.Base.config": "Base.config = config",
        "vllm.base.Base.config.rate": "Config.rate: float",
        "vllm.base.Base.tower": "Base.tower = Tower(...)",
        "vllm.base.Base.tower.width": "Tower.width = 3",
        "vllm.base.Config": "class Config()",
        "vllm.base.Config.rate": "Config.rate: float",
        "vllm.base.Tower": "class Tower()",
        "vllm.base.helper": "helper(a, *, b=0) -> int",
    }
    assert made.users["vllm.base.helper"] == {"model.py:3", "model.py:9", "model.py:17", "model.py:18"}


@pytest.mark.parametrize(
    ("old", "new", "symbol", "says"),
    [
        ("def helper(", "def assistant(", "helper", "not there"),
        ("b=0", "c=0", "helper", "our call in model.py:9 does not fit: got an unexpected keyword argument 'b'"),
        ("rate: float", "pace: float", "Base.config.rate", "not there"),
        ("class Base:", "class Root:", "Base", "not there"),
        ("class Tower:", "class Spire:", "Tower", "not there"),
        ("self.width", "self.breadth", "Base.tower.width", "not there"),
        ("def _hook(self, x, scale)", "def _hook(self, x, scale, y)", "Base._hook", "does not take what vLLM's takes"),
        ("def _hook(self, x, scale)", "def _hook(self, x, factor)", "Base._hook", "does not take what vLLM's takes"),
        ("def _hook(self, x, scale)", "def _hook(self, x, scale, **more)", "Base._hook", "it takes no **arguments"),
        ("    def _hook", "    @property\n    def _hook", "Base._hook", "of another kind"),
        ("self._hook(x, 1)", "self._hook(x)", "Base._hook", "the call in Base.run for our override"),
        ("self._hook(x, 1)", "x", "Base._hook", "vLLM no longer calls this method, which model.py:8 overrides"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_reported(tmp_path: Path, old: str, new: str, symbol: str, says: str) -> None:
    assert old in VLLM
    before = derive(tmp_path / "before")
    found = findings("0.99", derive(tmp_path / "after", VLLM.replace(old, new)), dict(before.symbols))
    faults = [finding for finding in found if finding.symbol == f"vllm.base.{symbol}"]
    assert len(faults) == 1, found
    text = str(faults[0])
    assert says in text
    assert text.startswith(f"vLLM 0.99: vllm.base.{symbol}\n")
    assert f"recorded: {before.symbols[f'vllm.base.{symbol}']}\n" in text
    assert "model" in text.rpartition("used by:")[2]


@pytest.mark.parametrize(
    ("old", "new", "symbol"),
    [
        ("rate: float", "rate: str", "Config.rate"),
        ("helper(a, *, b=0)", "helper(a, *, b=1)", "helper"),
        ("class Base:", "class Base(Config):", "Base"),
        ("    def run", "    def again(self):\n        return self._hook(1, 2)\n\n    def run", "Base._hook called by"),
        ("_hook", "_other", "Base._hook called by"),  # ours would be an override no longer
    ],
)
def test_a_difference_from_the_record_is_reported(tmp_path: Path, old: str, new: str, symbol: str) -> None:
    before = derive(tmp_path / "before")
    found = findings("0.99", derive(tmp_path / "after", VLLM.replace(old, new)), dict(before.symbols))
    assert f"vllm.base.{symbol}" in {finding.symbol for finding in found}


def test_what_we_begin_to_use_has_to_be_recorded(tmp_path: Path) -> None:
    made = derive(tmp_path)
    record: dict[str, str | dict[str, str]] = {s: text for s, text in made.symbols.items() if s != "vllm.base.helper"}
    assert [finding.symbol for finding in findings("0.99", made, record)] == ["vllm.base.helper"]


def test_a_record_keeps_the_releases_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "RECORD", tmp_path / "contract.json")
    monkeypatch.setattr(contract, "releases", lambda: ["1.0", "1.1"])
    old, new = derive(tmp_path / "old"), derive(tmp_path / "new", VLLM.replace("b=0", "b=1"))
    contract.write_record({"1.0": old})
    assert read_record()["vllm.base.helper"] == "helper(a, *, b=0) -> int"  # taken for both
    assert [finding.symbol for finding in findings("1.1", new, read_record())] == ["vllm.base.helper"]
    contract.write_record({"1.0": old, "1.1": new})
    assert read_record()["vllm.base.helper"] == {"1.0": "helper(a, *, b=0) -> int", "1.1": "helper(a, *, b=1) -> int"}
    contract.write_record({"1.0": old})
    for release, made in (("1.0", old), ("1.1", new)):
        assert not findings(release, made, read_record())


@pytest.fixture(scope="module")
def installed() -> tuple[str, Derivation]:
    for release, vllm in contract_releases.installed().items():
        return release, Derivation(vllm)
    pytest.skip("no supported vLLM is installed")


def report(found: list[Finding]) -> str:
    return "\n".join(["", *map(str, found), "", "when you have looked: python -m tests.serving.contract --write"])


def test_the_installed_vllm_is_as_recorded(installed: tuple[str, Derivation]) -> None:
    release, derivation = installed
    found = findings(release, derivation.contract, read_record())
    assert not found, report(found)
    assert len(derivation.contract.symbols) > 100


@pytest.mark.longer("the contract again, on a copy")
def test_a_change_planted_in_a_copy_of_vllm_is_reported(installed: tuple[str, Derivation], tmp_path: Path) -> None:
    release, derivation = installed
    source = derivation.sources.roots["vllm"]
    for module in derivation.sources.modules.values():
        if module is not None and module.file.is_relative_to(source):
            target = tmp_path / "vllm" / module.file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(module.file, target)
    edits: Mapping[str, tuple[str, str]] = {
        "distributed/communication_op.py": ("def tensor_model_parallel_all_reduce(", "def sum_over_ranks("),
        "v1/worker/gpu_model_runner.py": ("num_computed_tokens=req_state.num_computed_tokens", "start=0"),
        "model_executor/models/qwen2_5_vl.py": ("self.fullatt_block_indexes", "self.full_blocks"),
    }
    for file, (old, new) in edits.items():
        text = (tmp_path / "vllm" / file).read_text()
        assert old in text
        (tmp_path / "vllm" / file).write_text(text.replace(old, new))
    found = findings(release, Derivation(tmp_path / "vllm").contract, read_record())
    by_symbol = {finding.symbol.removeprefix("vllm."): str(finding) for finding in found}
    model = "model_executor.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration"
    call = "v1.worker.gpu_model_runner uses recompute_mrope_positions"
    assert set(by_symbol) == {
        "distributed.tensor_model_parallel_all_reduce", f"{model}.visual.fullatt_block_indexes", call
    }  # fmt: skip
    assert "missing a required argument: 'num_computed_tokens'" in by_symbol[call]
    assert "flashvid_vllm/models/" in by_symbol["distributed.tensor_model_parallel_all_reduce"]


def test_another_release_is_unpacked_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("pip"):
        pytest.skip("no pip here")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("0.33.1", "0.33.7", "0.34.0"):
        with zipfile.ZipFile(wheels / f"vllm-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("vllm/version.py", f"version = '{version}'")
            wheel.writestr("vllm/_C.so", "not wanted")
            wheel.writestr(
                f"vllm-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            )
            wheel.writestr(
                f"vllm-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"vllm-{version}.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(contract_releases, "CACHE", tmp_path / "cache")
    folder = contract_releases.fetch("0.33")
    assert [path.name for path in folder.iterdir()] == ["version.py"]
    assert "0.33.7" in (folder / "version.py").read_text()
    assert (folder.parent / "vllm-0.33.7.dist-info" / "METADATA").exists()
    patch = contract_releases.fetch("0.33.1")
    assert "0.33.1" in (patch / "version.py").read_text()
    shutil.rmtree(wheels)
    assert contract_releases.fetch("0.33") == contract_releases.fetch("0.33.7") == folder
    assert contract_releases.fetch("0.33.1") == patch
    with pytest.raises(SystemExit, match=r"no wheel of vLLM 0\.35"):
        contract_releases.fetch("0.35")
