# SPDX-License-Identifier: MIT
"""What docs/architecture.md and CONTRIBUTING.md say of the code: files, patches of vLLM, what a new setting takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .patches import patches
from .test_docs import DOCS, ROOT, TWO_SCREENS, WIDTH, table

INSIDE = (ROOT / "CONTRIBUTING.md", DOCS / "architecture.md")  # that name our files
PACKAGE = ROOT / "flashvid_vllm"
NEW = "NAME"  # in the name of a file that is still to be written
OURS = {
    "mm_processor_kwargs": "vLLM's own option; our settings are in it under our key",
    "make_counter": "a place in our models for our metrics",
    "time_choice": "another",
    "plan_on_v1": "a place in our models for what has the runner plan its steps",
    "dest": "argparse's namespace",
    "environ": "this process's own",
}


def named_files(text: str) -> set[str]:
    """Paths with a folder or an ending of ours, in code or in a drawing."""
    ending = r"\.(?:py|md|cpp|cu|h|json|toml)"
    return set(re.findall(rf"(?<![\w/.-])(?:[\w.*-]+/)+(?:[\w.*-]+{ending})?|(?<![\w/.*-])[\w*-]+{ending}\b", text))


def missing_files(text: str) -> list[str]:
    """Those of `named_files` that are not there, from the top or from the package."""
    return sorted(
        name
        for name in named_files(re.sub(r"\]\([^)]*\)", "]", text))  # links are looked at by themselves
        if not any(list(top.glob((name.rpartition("/")[0] or ".") if NEW in name else name)) for top in (ROOT, PACKAGE))
    )


@pytest.mark.parametrize("page", INSIDE, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text()
    assert len(named_files(text)) >= 20
    assert len(text.splitlines()) <= TWO_SCREENS + 15
    assert max(map(len, text.splitlines())) <= WIDTH
    assert not missing_files(text)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see `core/gone.py` and `core/compress.py`", ["core/gone.py"]),
        ("-> models/families/*.py (video_grid), models/familiar/*.py", ["models/familiar/*.py"]),
        ("`kernel/ops/`, over `csrc/cpu/`", ["kernel/ops/"]),
        ("`setup.py`, `setups.py`", ["setups.py"]),
        ("`core/methods/NAME.py`, `core/method/NAME.py`", ["core/method/NAME.py"]),
        ("csrc/cpu/compress.cpp|csrc/cpu/compres.cpp", ["csrc/cpu/compres.cpp"]),
    ],
)
def test_a_missing_file_is_seen(text: str, missing: list[str]) -> None:
    assert missing_files(text) == missing


def names_in_the_table() -> set[str]:
    """Of what is patched or set in vLLM, each by its last name."""
    quoted = [re.findall(r"`([^`]+)`", row[0]) for row in table("architecture.md", "patched or set")]
    return {name.rpartition(".")[2] for names in quoted for name in names if "/" not in name}


def reached_into() -> set[str]:
    """What our server's room sets in vLLM, and `OURS`."""
    return {name for file in (PACKAGE / "serving").glob("*.py") for name in patches(file.read_text())}


def test_every_patch_has_its_row() -> None:
    assert not reached_into() - names_in_the_table() - set(OURS)
    for row in table("architecture.md", "patched or set"):
        assert len(row) == 3
        assert all(row)


def test_every_row_is_a_patch() -> None:
    """What models/ sets is found by hand; here it is at least to be there."""
    models = "\n".join(file.read_text() for file in (PACKAGE / "models").rglob("*.py"))
    stale = names_in_the_table() - reached_into()
    assert stale == {"do_not_compile", "mrope_section"}
    assert all(name in models for name in stale)
    assert set(OURS) <= reached_into()


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("def _quieter():\n    from vllm import envs\n\n    envs.VLLM_LOGGING_LEVEL = 'ERROR'\n", "VLLM_LOGGING_LEVEL"),
        ("def _more(self):\n    self.max_num_seqs = 1\n", "max_num_seqs"),
        ("from vllm.a import b as c\nclass Ours(c):\n    pass\n", "b"),
        ("from vllm.a import b\nclass Ours(b.Theirs):\n    pass\n", "Theirs"),
        ("from vllm.a import TABLE\nTABLE['x'] = 1\n", "TABLE"),
        ("import vllm\nvllm.a.b, vllm.a.d = 1, 2\n", "d"),
        ("setattr(config, 'seed', 0)\n", "seed"),
    ],
)
def test_a_planted_patch_is_caught(planted: str, name: str) -> None:
    """Beside all that is in compat.py."""
    found = patches((PACKAGE / "serving" / "compat.py").read_text() + "\n\n" + planted)
    assert found - set(OURS) - names_in_the_table() == {name} | ({"b"} if name == "d" else set())


@pytest.mark.parametrize(
    "free",
    ["class Ours:\n    def f(self):\n        self.x = 1", "table = {}\ntable['x'] = 1", "class Ours(dict):\n  pass"],
)
def test_what_is_ours_is_no_patch(free: str) -> None:
    assert not patches(free)


def spelled_in(setting: str) -> set[str]:
    """Our sources that have a setting's name, those of C++ apart."""
    files = [file for end in ("py", "js", "html") for file in PACKAGE.rglob(f"*.{end}")]
    files += (ROOT / "kernels" / "ops").glob("*.py")
    return {str(file.relative_to(ROOT)) for file in files if re.search(rf"\b{setting}\b", file.read_text())}


def test_a_setting_is_spelled_in_three_files() -> None:
    """Where it is defined, where it is read, and where all steps are one call: adding another takes no more."""
    read, fused = "flashvid_vllm/core/compress.py", "kernels/ops/pipeline.py"
    for setting in ("merge_threshold", "segment_threshold"):
        assert spelled_in(setting) == {"flashvid_vllm/core/config.py", read, fused}


PLANT = """
import argparse, dataclasses, importlib.util, json, sys

class Planted:
    def find_spec(self, name, path=None, target=None):
        if name == "flashvid_vllm.core.config":
            return importlib.util.spec_from_file_location(name, sys.argv[1])

sys.meta_path.insert(0, Planted())
import flashvid_vllm
from flashvid_vllm.core.settings import KEY, check_request, describe, resolve
from flashvid_vllm.serving.cli import add_options

def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)

parser = argparse.ArgumentParser()
add_options(parser, None)
words = ["--plugin", "flashvid", "--flashvid-config", json.dumps({"planted": 0.75})]
server = parser.parse_args(words).mm_processor_kwargs[KEY]
config = resolve(server, check_request({"planted": 0.5}, server), {"planted": 0.25})
print(json.dumps({
    "option": server,
    "engine_args": flashvid_vllm.engine_args(planted=0.75)["mm_processor_kwargs"][KEY],
    "in force": [resolve({}, None, {"planted": 0.25}).planted, resolve(server, None, {}).planted, config.planted],
    "sent to the worker": flashvid_vllm.FlashVidConfig(**json.loads(json.dumps(config.to_dict()))) == config,
    "the log": "planted=0.75" in describe(server, {}),
    "refused": [
        refused(lambda: check_request({"planted": 7}, {})),
        refused(lambda: check_request({"plantd": 0.5}, {})),
        refused(lambda: check_request({"planted": 0.5, "method": "evs"}, {})),
    ],
}))
"""


def test_a_planted_setting_reaches_everything(tmp_path: Path) -> None:
    """One more field, in config.py alone."""
    source = (PACKAGE / "core" / "config.py").read_text()
    for after, line in (
        ('    matching: Matching = "tree"\n', "    planted: float = 0.1\n"),
        (
            '        self._set("alpha", _real("alpha", self.alpha, 0.0, 1.0))\n',
            '        self._set("planted", _real("planted", self.planted, 0.0, 1.0))\n',
        ),
        ('FLASHVID_SETTINGS = ("alpha", ', '"planted", '),
    ):
        assert source.count(after) == 1
        source = source.replace(after, after + line)
    (tmp_path / "config.py").write_text(source)
    ran = subprocess.run(
        [sys.executable, "-c", PLANT, tmp_path / "config.py"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode == 0, ran.stderr
    refused = (said := json.loads(ran.stdout)).pop("refused")
    assert said == {
        "option": {"planted": 0.75},
        "engine_args": {"planted": 0.75},
        "in force": [0.25, 0.75, 0.5],
        "sent to the worker": True,
        "the log": True,
    }
    assert refused == [
        "planted must be a number in [0, 1], got 7",
        "unknown FlashVID setting 'plantd'; did you mean 'planted'?",
        "planted=0.5 is a setting of FlashVID, which method='evs' does not read; leave it out",
    ]
