# SPDX-License-Identifier: MIT
"""Imports run one way through the package: ops <- core <- models <- serving, and tools on top of all."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flashvid_vllm"
PLACES = {"flashvid_vllm": PACKAGE, "flashvid_vllm.ops": ROOT / "kernels" / "ops"}
DOOR = "(flashvid_vllm/__init__.py)"  # what is offered to all
ROOMS = ("ops", "core", "models", "serving", DOOR, "tools")  # each imports itself and what stands before it


def sources() -> dict[str, Path]:
    """Module -> file, of all that is ours."""
    found = {}
    for package, folder in PLACES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


MODULES = sources()


def room_of(module: str) -> str:
    """Where a module is; the compiled extension is the ops'."""
    name = [*module.split("."), ""][1]
    return "ops" if name == "_native" else name if name in ROOMS else DOOR


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Our modules that a module imports, inside functions too, or names in a text as those do that import it later."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flashvid_vllm")
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: None if is_package else -1]
            start = above[: len(above) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            if base.split(".")[0] == "flashvid_vllm":
                names = [f"{base}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else base for name in names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"flashvid_vllm(\.\w+)+\.?", str(node.value)):
            yield str(node.value).rstrip(".")


def backwards(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module that run back."""
    most = ROOMS.index(room_of(module))
    return [name for name in imported(source, module, is_package) if ROOMS.index(room_of(name)) > most]


def test_no_import_runs_back() -> None:
    found = {
        module: backwards(file.read_text(), module, file.name == "__init__.py") for module, file in MODULES.items()
    }
    assert not {module: names for module, names in found.items() if names}


def test_the_imports_are_seen() -> None:
    """Without this a finder that finds nothing would pass."""
    arrows = {
        (room_of(module), room_of(name))
        for module, file in MODULES.items()
        for name in imported(file.read_text(), module, file.name == "__init__.py")
    }
    assert arrows >= set(zip(ROOMS[1:4], ROOMS[:3], strict=True)) | {("tools", room) for room in ROOMS[:5]}


def test_everything_is_in_a_room() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"ops"} == {"__init__.py", *ROOMS} - {"ops", DOOR}
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.native", "from flashvid_vllm.core.config import FlashVidConfig"),
        ("ops.native", "from ..core import config"),
        ("ops.native", "from .. import core"),
        ("core.budget", "from ..models import pieces"),
        ("core.budget", "from .. import models"),
        ("core.methods.evs", "def compress():\n    import flashvid_vllm.serving.metrics"),
        ("core.compress", "from flashvid_vllm import env_info"),
        ("models.base", "from ..serving import metrics"),
        ("models.families.llava", "from ...tools.errors import UserError"),
        ("models.rope", "if TYPE_CHECKING:\n    from ..serving.compat import install"),
        ("serving.compat", "from flashvid_vllm.tools import env"),
        ("serving.cli", "import importlib\nimportlib.import_module('flashvid_vllm.tools.viz')"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str) -> None:
    assert backwards(source, f"flashvid_vllm.{module}")


def test_the_door_is_shut_to_the_tools() -> None:
    assert backwards("def play():\n    from .tools.play import PACKAGES", "flashvid_vllm", is_package=True)
    assert not backwards("from .core.compress import compress", "flashvid_vllm", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.native", "import importlib\nimportlib.import_module('flashvid_vllm._native')\nfrom . import reference"),
        ("core.compress", "import flashvid_vllm.ops as ops\nfrom flashvid_vllm.core.budget import plan"),
        ("models.base", "from .. import ops\nfrom ..core.budget import plan\nfrom . import FAMILIES"),
        ("serving.compat", "from ..models import FAMILIES, counting\nimport vllm, flashvid"),
        ("tools.tune.__main__", "from ... import __version__\nfrom ...serving.cli import number"),
    ],
)
def test_what_runs_forwards_is_free(module: str, source: str) -> None:
    assert not backwards(source, f"flashvid_vllm.{module}")
