# SPDX-License-Identifier: MIT
"""The commands of `flashvid`: their help, and what a bug report gets."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm.models import FAMILIES
from flashvid_vllm.tools import env
from flashvid_vllm.tools.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_with_two_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """24 lines of 80 characters, however wide the terminal is said to be."""
    try:
        code = main([*command.split(), "--help"])
    except SystemExit as exit:
        code = int(exit.code or 0)
    text = capsys.readouterr().out
    assert code == 0
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80
    examples = re.findall(r"^ +(flashvid \w+.*)", text[text.index("examples:") :], re.M)
    assert len(examples) >= 2
    assert all(example.startswith(f"flashvid {command}") for example in examples)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_written_by_hand_has_every_option(command: str) -> None:
    """An option that is added and not told; one that is told and gone."""
    module = importlib.import_module(COMMANDS[command][0])
    parser = module._make_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    own = re.split(r"\nexamples:", parser.format_help())[0]
    assert {option for option in known if option.startswith("--")} <= set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own))
    told = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own))
    assert told - known <= {"--plugin"}  # vllm serve's


def test_an_unknown_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tnue"]) == 2
    assert "no command 'tnue'; there are" in capsys.readouterr().err


@pytest.fixture
def found() -> dict[str, Any]:
    return env.environment()


def test_env_tells_what_will_run(found: dict[str, Any]) -> None:
    """The backend is the one that compress() takes, every model is there, and the text says each fact."""
    import torch

    import flashvid_vllm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    flashvid_vllm.compress(
        torch.rand(2, 4, 8, device=device), torch.rand(2, 4, device=device), flashvid_vllm.FlashVidConfig()
    )
    assert found["backend"] == flashvid_vllm.env_info()["backend"]
    assert set(found["models"]) == set(FAMILIES)
    text = env.as_text(found)
    assert all(name in text for name in FAMILIES)
    assert str(found["torch"]) in text
    assert found["vllm_supported"] in text


def test_env_says_if_this_vllm_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "unsupported_vllm", lambda: "found 0.31")
    monkeypatch.setattr(env, "vllm_version", lambda: "0.31")
    assert "this one is not" in env.as_text(env.environment())


def test_env_works_without_vllm() -> None:
    """Nothing in it imports vLLM, transformers or triton: each may be missing, or broken, in what is reported."""
    code = (
        "import sys\n"
        "for name in ('vllm', 'transformers', 'triton'): sys.modules[name] = None\n"
        "from flashvid_vllm.tools.__main__ import main\n"
        "sys.exit(main(['env', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["torch"]


def test_env_has_no_path_and_nothing_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    """A backend's own message may name the file that did not load."""
    import getpass
    import platform

    why = f"the native extension is not built ({tmp_path}/private/lib/_native.so: undefined symbol: x)"
    monkeypatch.setattr(env, "missing_for", lambda name, device: why)
    text = env.as_text(env.environment()) + json.dumps(env.environment())
    assert str(tmp_path) not in text
    assert tmp_path.name not in text
    assert "private" not in text
    assert "(_native.so: undefined symbol: x)" in text
    for text in (env.as_text(found), json.dumps(found)):
        assert not re.search(r"(?<![\w*])/\w+/", re.sub(r"[\w.-]+/[\w*.-]+", "", text))
        assert os.getcwd() not in text
        assert platform.node() not in text
        assert getpass.getuser() not in re.findall(r"\w+", text)
