# SPDX-License-Identifier: MIT
"""Another vLLM release in this environment, though there is no build of it: its Python over our compiled parts.

`make` writes a folder that comes before the environment's packages on PYTHONPATH: the Python of the release's wheel,
the compiled parts of the installed vLLM, and metadata that says which release it is. All else is the environment's.
A package that the release requires and the environment lacks is put into the folder, if the release does not start
without it: most that a wheel for GPUs requires is of no use here. What a release changed in its compiled operations is
not seen.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from tests.serving.contract_releases import PIP

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "vllm-overlays"

# What a process with the overlay finds: as vLLM starts, with the plugin where it registers itself.
LOOK = """
import importlib.metadata, json, sys, traceback
import vllm
found = {"version": vllm.__version__, "metadata": importlib.metadata.version("vllm"), "file": vllm.__file__}
try:
    from flashvid_vllm.serving import compat
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    model = ModelRegistry.models["Qwen2_5_VLForConditionalGeneration"]
    found["platform"] = current_platform.device_name
    found["options"] = "--flashvid-retention-ratio" in parser._option_string_actions
    found["model"] = model.module_name
    found["refusal"] = compat.unsupported_vllm()
    sys.argv = ["vllm", "--version"]  # imports what a server does
    from vllm.entrypoints.cli.main import main
    main()
except SystemExit:
    pass
except Exception:
    found["error"] = traceback.format_exc().strip().splitlines()[-1]
print("FOUND", json.dumps(found))
"""


@dataclass(frozen=True)
class Overlay:
    """A release made to run here."""

    folder: Path
    version: str  # as its metadata has it, "0.33.0+cpu"

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a process that is to import this vLLM."""
        path = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        # vLLM keeps what it found in a model's class by the class's file alone: not where the installed one does
        # whoever runs this may have options for pytest that are not for the tests in here
        given = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        return {**given, "PYTHONPATH": os.pathsep.join(path), "VLLM_CACHE_ROOT": str(self.folder / "cache")}

    def look(self) -> dict[str, str | bool | None]:
        """What a process finds (`LOOK`); "error": the last line of what went wrong."""
        supplied: set[str] = set()
        while True:
            found = self._look()
            lacks = re.search(r"No module named '(\w+)", str(found.get("error", "")))
            requirement = self._requirement(lacks[1]) if lacks else None
            if requirement is None or requirement in supplied:
                return found
            supplied.add(requirement)
            print(f"vLLM {self.version} does not start without {requirement}: looking for a wheel ...", flush=True)
            command = [*PIP, "--python", sys.executable, "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--target", str(self.folder), requirement], check=False)

    def _look(self) -> dict[str, str | bool | None]:
        command = [sys.executable, "-c", LOOK]
        done = subprocess.run(command, env=self.variables, cwd=ROOT, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            if line.startswith("FOUND "):
                return dict(json.loads(line.removeprefix("FOUND ")))
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}

    def _requirement(self, module: str) -> str | None:
        """The release's requirement that has the name of a module, "orjson>=3.11.6"."""
        metadata = next(self.folder.glob("vllm-*.dist-info"))
        for line in importlib.metadata.Distribution.at(metadata).requires or []:
            requirement = Requirement(line)
            if re.sub(r"[-.]", "_", requirement.name) == module:
                return f"{requirement.name}{requirement.specifier}"
        return None

    def faults(self, found: Mapping[str, str | bool | None]) -> list[str]:
        """What is not as it has to be in what `look` found; a refusal of ours is none."""
        release, faults = self.version.partition("+")[0], []
        if "error" in found:
            faults.append(str(found["error"]))
        if found.get("version") != release:
            faults.append(f"vllm.__version__ is {found.get('version')}, not {release}")
        if found.get("metadata") != self.version:
            faults.append(f"the metadata's version is {found.get('metadata')}, not {self.version}")
        if not str(found.get("file")).startswith(str(self.folder)):
            faults.append(f"vllm comes from {found.get('file')}")
        if not found.get("options"):
            faults.append("the plugin's options are not there")
        if found.get("refusal") is None and not str(found.get("model")).startswith("flashvid_vllm."):
            faults.append(f"the plugin did not register its models: {found.get('model')}")
        return faults


def make(release: Path, installed: Path, installed_version: str) -> Overlay:
    """The overlay of an unpacked wheel over an installed vLLM, made once for the two versions.

    Args:
        release: the `vllm` folder of the wheel, its .dist-info beside it.
        installed: the `vllm` folder that has the compiled parts.
        installed_version: as its metadata has it; vLLM knows a CPU build by what stands behind the +.
    """
    metadata = next(release.parent.glob("vllm*.dist-info"))
    number = metadata.name.removesuffix(".dist-info").partition("-")[2].partition("+")[0]
    version = "+".join([number, *installed_version.split("+")[1:]])
    folder = CACHE / f"{number}-on-{installed_version}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "made"
            shutil.copytree(release, made / "vllm")
            for compiled in installed.rglob("*.so"):
                target = made / "vllm" / compiled.relative_to(installed)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(compiled, target)
            shutil.copytree(metadata, made / f"vllm-{version}.dist-info")
            text = made / f"vllm-{version}.dist-info" / "METADATA"
            text.write_text(renamed(text.read_text(encoding="utf-8"), version), encoding="utf-8")
            (made / f"vllm-{version}.dist-info" / "RECORD").unlink(missing_ok=True)  # names files that are not here
            shutil.move(made, folder)
    return Overlay(folder, version)


def renamed(metadata: str, version: str) -> str:
    """The METADATA of a wheel of vLLM, whatever it is called, as that of ``vllm`` in ``version``."""
    head, separator, description = metadata.partition("\n\n")
    for name, value in (("Name", "vllm"), ("Version", version)):
        head, count = re.subn(rf"^{name}: .*$", f"{name}: {value}", head, flags=re.MULTILINE)
        assert count == 1, f"{count} lines of {name} in a wheel's METADATA"
    return head + separator + description
