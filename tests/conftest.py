# SPDX-License-Identifier: MIT
"""Fixtures that several test files share."""

import functools
import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: tiny tensors take longer on two threads, a hundred times longer on cores that others use.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

if os.environ.get("FLASHVID_RUNNER") == "v2":
    from .support import v2_on_cpu

    v2_on_cpu.install()

import pytest
import torch

from flashvid_vllm import ops

from .times import Times


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--longer", action="store_true", help="only the tests that FLASHVID_TESTS=full makes longer")
    parser.addoption("--budget", action="store_true", help="fail where a file costs more than tests/times.py allows")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Times(config))


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what tests/support/engine.py has frozen: it would be reported as leaked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if os.environ.get("FLASHVID_TESTS") == "quick" else []:
        if (longer := item.get_closest_marker("longer")) and longer.args:
            item.add_marker(pytest.mark.skip(reason=f"{longer.args[0]}; make test-full"))
    if config.getoption("longer"):
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("longer")])
        items[:] = [item for item in items if item.get_closest_marker("longer")]
    items.sort(key=lambda item: not item.get_closest_marker("slow"))  # so that no engine starts when all else is done


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What one of pytest-xdist's processes runs in a row: a file's tests, or those of a model, which share engines."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            model = re.search(r"(?<=\[)(qwen|llava)\w*", nodeid)
            runs_others = nodeid.endswith(".py]")  # in a pytest of its own, for a minute
            return model.group() if model else nodeid if runs_others else nodeid.split("::")[0]

    return ByModel(config, log)


@pytest.fixture(scope="module")
def torch_backend() -> Iterator[None]:
    """Let "auto" be the torch reference, whatever else is built: for the tests of the reference itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "missing_for", lambda name, device: "" if name == "torch" else "left out of this test")
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forking_servers() -> Iterator[None]:
    """Every server of a test is a fork of a process that has imported vLLM."""
    from .support.forks import forking

    with forking():
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """The directory of a family's tiny model (`tests.support.families.Family`), made once."""
    made: dict[Any, Path] = {}

    def model(family: Any) -> Path:
        key = (family.kind, family.dtype)
        if key not in made:
            made[key] = family.make(tmp_path_factory.mktemp("models") / family.kind)
        return made[key]

    return model


@pytest.fixture(scope="session")
def oracles(models: Callable[[Any], Path]) -> Callable[[Any], Any]:
    """A family's oracle, loaded once."""
    return functools.cache(lambda family: family.load_oracle(models(family)))


@pytest.fixture(scope="session")
def engines() -> Iterator[Any]:
    """Engines that files share (`tests.support.engine.Engines`): called with a model's directory, settings,
    options."""
    from .support.engine import ENGINES

    yield ENGINES
    ENGINES.close()


@pytest.fixture(scope="session")
def sharp_model(models: Callable[[Any], Path]) -> Path:
    """A tiny fp32 Qwen2.5-VL whose answers depend on what it sees and where."""
    from .support.families import QWEN2_5_VL

    return models(QWEN2_5_VL)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six different clips of 8 frames."""
    from benchmarks.load.clips import make_clips

    return make_clips(6, 24, 8, tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny CLIP tower of 7 x 7 patches."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    return folder
