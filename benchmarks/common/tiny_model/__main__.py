# SPDX-License-Identifier: MIT
"""The command line: python -m benchmarks.common.tiny_model KIND DIRECTORY."""

import argparse
import sys
from pathlib import Path

import torch

from . import KINDS, __doc__, make_tiny_model


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.common.tiny_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    directory = make_tiny_model(options.kind, options.directory, dtype=dtype, seed=options.seed)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory}: {options.kind}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
