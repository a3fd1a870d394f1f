# SPDX-License-Identifier: MIT
"""Everything that a machine with an NVIDIA GPU has to answer, in 25 minutes at most; the same command goes on.

    make gpu                                           all parts, into benchmarks/results/gpu-NAME.md and .json
    make gpu MODEL=Qwen/Qwen2.5-VL-7B-Instruct         serving and frames with this model
    make gpu AGAIN=tests,ops                           run these parts although they have finished

A part that has finished on this code and this GPU is not run again (.cache/gpu). One that fails, breaks off or runs out
of time costs the others nothing. Exit status: 0 where all went well, 1 where a part did not, 2 without a GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.record import RESULTS, fingerprint
from ..ops.__main__ import commit
from . import parts as parts_module
from .device import Device, NoDeviceError, find
from .report import about, write
from .session import ROOT, WELL, Part, Session

MINUTES = 25.0
SOURCES = ("flashvid_vllm", "kernels", "csrc", "benchmarks", "tests")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".npz", ".json")


def code_key() -> str:
    """The commit, and the contents of the sources: what is not committed counts."""
    files = [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES]
    own = fingerprint(path for path in files if RESULTS not in path.parents)
    return f"{commit().removesuffix('+')}-{own}"


def device_with_torch() -> Device:
    """The GPU, which this environment's torch sees too.

    Raises:
        NoDeviceError: there is none, or torch was built without CUDA or for another driver.
    """
    device = find()
    import torch

    if not torch.cuda.is_available():
        raise NoDeviceError(
            f"there is a {device.name} with driver {device.driver}, but torch {torch.__version__} does not see it: "
            "rm -rf .venv && make gpu DEVICE=cuda"
        )
    return device


def chosen(text: str, there: Sequence[Part]) -> set[str]:
    """The names in a list with commas; "all" are all.

    Raises:
        ValueError: one that is no part.
    """
    wanted = {name for name in text.replace(" ", "").split(",") if name}
    known = {part.name for part in there}
    if unknown := wanted - known - {"all"}:
        raise ValueError(f"parts are {parts_module.names(there)}, got {', '.join(sorted(unknown))}")
    return known if "all" in wanted else wanted


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", help="for serving and frames; default: what the Hugging Face cache has and fits")
    found.add_argument("--minutes", type=float, default=MINUTES, help="for all parts (default: %(default)g)")
    found.add_argument("--only", default="all", help="parts, with commas between them (default: all)")
    found.add_argument("--again", default="", help="parts to run although they have finished, or all")
    found.add_argument("--output", type=Path, default=RESULTS, help="folder of the report (default: %(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(arguments)
    try:
        device = device_with_torch()
        from huggingface_hub.constants import HF_HUB_CACHE

        hub, memory = Path(HF_HUB_CACHE), device.memory_mib * 2**20
        model, why = parts_module.choose_model(options.model, hub, memory)
        folder = ROOT / ".cache" / "gpu" / f"{device.slug}-{code_key()}"
        everything = parts_module.parts(folder, model, why)
        only, again = chosen(options.only, everything), chosen(options.again, everything)
    except (NoDeviceError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    session = Session(folder, 60 * options.minutes)
    where = about(device)
    results = session.run_all(everything, only, again, lambda some: write(options.output, device, where, some))
    for result in results:
        print(f"{result.name:<14} {result.verdict:<12} {result.seconds:5.0f} s  {result.why}")
    print(f"{options.output / f'gpu-{device.slug}.md'} has it all")
    return 0 if all(result.verdict in WELL for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
