# SPDX-License-Identifier: MIT
"""What vLLM keeps on disk about our classes (supports_pp, ...) does not outlive the sources that it was read from."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
import json, os, pickle, sys
from pathlib import Path
import cloudpickle
import flashvid_vllm
from flashvid_vllm.serving import compat
flashvid_vllm.register()
from vllm.model_executor.models import ModelRegistry, registry

tree = Path(sys.argv[1])
assert Path(registry.__file__).is_relative_to(tree) and Path(flashvid_vllm.__file__).is_relative_to(tree)
looked = []
registry._run_in_subprocess = lambda function: looked.append(1) or inspect(function)

def look(name):
    looked.clear()
    info = ModelRegistry.models["Qwen2_5_VLForConditionalGeneration"].inspect_model_cls()
    seen[name] = [len(looked), info.supported_video_pruning_methods[0], info.supports_mm_device_do_normalize]
    return info

def inspect(function):  # as vLLM's own does, but in a fork, which spares 10 s of imports
    read, write = os.pipe()
    if os.fork() == 0:
        function = pickle.loads(cloudpickle.dumps(function))
        os.write(write, pickle.dumps(function()))
        os._exit(0)
    os.wait()
    return pickle.loads(os.read(read, 65536))

def edit(file, line):
    with (tree / file).open("a") as text:
        text.write(line)

seen = {}
look("cold")
look("warm")
edit("flashvid_vllm/models/base.py", "FlashVidModel.supported_video_pruning_methods = ('ours',)")
look("ours edited")
edit("vllm/model_executor/models/qwen2_5_vl.py",
     "Qwen2_5_VLForConditionalGeneration.supports_mm_device_do_normalize = 'theirs'")
look("vLLM edited")
known = look("warm again")
compat.vllm_version = lambda: "0.33.7"
inspect = lambda function: known  # whether it looks is enough here
look("another vLLM")
print(json.dumps(seen))
"""


def copy_of_both(tree: Path) -> Path:
    """Our package and vLLM's models as copies that can be edited, all else of vLLM as links."""
    shutil.copytree(ROOT / "flashvid_vllm", tree / "flashvid_vllm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels" / "ops", tree / "flashvid_vllm" / "ops")
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source, copy = Path(spec.origin).parent, tree / "vllm"
    for folder in (source, source / "model_executor"):
        target = copy / folder.relative_to(source)
        target.mkdir()
        for entry in folder.iterdir():
            if entry not in (source / "model_executor", source / "model_executor" / "models"):
                (target / entry.name).symlink_to(entry)
    models = Path("model_executor", "models")
    shutil.copytree(source / models, copy / models, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.mark.longer("imports another vLLM")
def test_an_upgrade_of_either_side_is_seen(tmp_path: Path) -> None:
    tree = copy_of_both(tmp_path / "tree")
    env = {**os.environ, "PYTHONPATH": str(tree), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tree)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    was = seen["cold"][1:]
    assert seen["cold"] == [1, *was]
    assert seen["warm"] == [0, *was]
    assert seen["ours edited"] == [1, "ours", was[1]]
    assert seen["vLLM edited"] == [1, "ours", "theirs"]
    assert seen["warm again"] == [0, "ours", "theirs"]
    assert seen["another vLLM"][0] == 1
