# SPDX-License-Identifier: MIT
"""`make setup` (tests/env): pip's settings for uv, and what is done with an environment that is there already."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.env import install
from tests.env.install import STAMP, Environment, SetupError, Steps
from tests.env.pip_settings import pip_settings, uv_variables


def test_pip_settings_are_those_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(
        "[global]\nfind-links = /a\nno-index = true\ntimeout = 7\n[install]\ntimeout = 8\n[freeze]\ntimeout = 9\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", "/b /c")
    settings = pip_settings(sys.executable)
    assert (settings["find-links"], settings["no-index"], settings["timeout"]) == ("/b /c", "true", "8")
    assert pip_settings("/usr/bin/false")["find-links"] == "/b /c"  # where there is no pip


def test_settings_for_uv(tmp_path: Path) -> None:
    house = tmp_path / "wheel house"
    house.mkdir()
    link = tmp_path / "wheels"
    link.mkdir()
    settings = {
        "find-links": f"{link} {tmp_path}/absent file://{tmp_path}/absent",
        "extra-index-url": f"{house.as_uri()} {tmp_path.as_uri()}/absent",
        "no-index": "false",
        "cert": "/ca.crt",
    }
    assert uv_variables(settings) == {
        "UV_FIND_LINKS": str(link),
        "UV_INDEX": house.as_uri(),
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/ca.crt",
    }
    assert uv_variables({"find-links": "/absent", "extra-index-url": "file:///absent", "no-index": "on"}) == {
        "UV_NO_INDEX": "1"
    }
    assert uv_variables({}) == {}


def test_environment_is_kept_updated_or_made_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "venv"
    new = Environment(path, None)
    assert (new.ready(), new.foreign, new.clear_if_useless()) == (False, False, False)
    new.write_stamp("unfinished")
    (path / "lib").mkdir()
    assert Environment(path, None).clear_if_useless()  # interrupted
    assert [entry.name for entry in path.iterdir()] == [STAMP]

    new.write_stamp("ready")
    assert Environment(path, None).ready()
    assert not Environment(path, None).clear_if_useless()
    assert Environment(path, "cpu").clear_if_useless()  # another device was asked for

    monkeypatch.setattr(install, "recipe_hash", lambda: "another")
    changed = Environment(path, None)
    assert (changed.ready(), changed.clear_if_useless()) == (False, False)  # updated in place


def test_environment_of_someone_else_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    foreign = Environment(tmp_path, None)
    assert (foreign.foreign, foreign.ready(), foreign.clear_if_useless()) == (True, False, False)
    with pytest.raises(SetupError, match="is not a virtual environment"):
        install.check_machine(foreign, "cpu")
    foreign.write_stamp("unfinished")
    again = Environment(tmp_path, None)
    assert (again.foreign, again.clear_if_useless()) == (True, False)
    assert (tmp_path / "thesis.tex").exists()


def test_what_would_fail_late_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment(tmp_path, None)
    monkeypatch.setattr(install, "DISK_GB", {"cpu": 1e9})
    with pytest.raises(SetupError, match="GB free on the disk"):
        install.check_disk(environment, "cpu")
    with pytest.raises(SetupError, match="AMD GPU"):
        install.check_machine(environment, "rocm")
    monkeypatch.setattr(install, "OLDEST_PYTHON", {"cpu": (99, 0)})
    with pytest.raises(SetupError, match=r"needs Python >= 99\.0 .*PYTHON=python3"):
        install.check_machine(environment, "cpu")


def test_step_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    steps = Steps(tmp_path / "log")
    steps.check("good", [sys.executable, "-c", "print(1)"])
    with pytest.raises(SetupError, match=r"bad: failed\n(.*\n)*no space left"):
        steps.check("bad", [sys.executable, "-c", "import sys; sys.exit('no space left')"])


def test_second_set_up_waits_for_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = f"from tests.env.install import *\nwith only_one(Path({str(lock)!r})): print(time.time())"
    with install.only_one(lock):
        second = subprocess.Popen([sys.executable, "-c", code], cwd=install.ROOT, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert "waiting" in second.stdout.readline()
        released = time.time()
    assert float(second.communicate(timeout=300)[0]) >= released
