# SPDX-License-Identifier: MIT
"""Every kernel of ours once or more on small videos, for a tool that watches memory: nothing is compared here.

    python -m benchmarks.gpu.kernels

The Triton kernels in every setting that chooses another one, through the whole compression and op by op, then what
the extension has on a GPU. It fails where a kernel that is known was not launched. With TRITON_INTERPRET=1 it runs on
a CPU.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from flashvid_vllm import FlashVidConfig, compress, ops
from flashvid_vllm.core.config import Matching, Selection
from flashvid_vllm.ops import native, triton_backend
from flashvid_vllm.ops.launch import interpreted, record
from tests.support.cases import video

DONE = "every kernel ran"  # the last line
SHAPES = ((1, 7, 40), (5, 65, 130), (9, 196, 128))  # one frame; beside powers of 2; several tiles
DTYPES = ("bfloat16", "float32")


def run_compression(features: torch.Tensor, attention: torch.Tensor) -> None:
    """The whole pipeline, in every selection and matching."""
    for selection, matching in itertools.product(get_args(Selection), get_args(Matching)):
        config = FlashVidConfig(retention_ratio=0.3, selection=selection, matching=matching, backend="triton")
        compress(features, attention, config)


def run_ops(features: torch.Tensor, attention: torch.Tensor) -> None:
    """Each public op by Triton, on what the one before it gave."""
    (t, n, _), device = features.shape, features.device
    segment_id = ops.segment_frames(features.float().mean(1), 0.5, 3, backend="triton")
    ops.event_relevance(features, segment_id, backend="triton")
    candidate = torch.ones(t, n, dtype=torch.bool, device=device)
    candidate.scatter_(1, ops.select_tokens(features, attention, max(1, n // 6), backend="triton"), False)
    for matching in get_args(Matching):
        parent = ops.match_tokens(features, candidate, segment_id, 0.5, matching, backend="triton")[1]
    root = ops.tree_roots(parent, backend="triton")
    ops.pool_trees(features, root, candidate, backend="triton")
    ops.pool_trees(features, root.flatten().flip(0).view(t, n), candidate, backend="triton")  # no forest
    ops.cluster_tokens(features[0], max(1, n // 4), min(7, n), backend="triton")
    ops.explain_tokens(features, max(1, t * n // 4), 0.7, backend="triton")
    query, key = torch.randn(2, t, 2, n, 72, device=device).to(features.dtype)
    ops.received_attention(query, key, backend="triton")
    if native.has_cuda() and features.is_cuda:
        root = ops.tree_roots(parent, backend="native")
        ops.pool_trees(features, root, candidate, backend="native")


def known() -> set[str]:
    """The names of all Triton kernels that a video can make the wrappers launch."""
    plan = triton_backend.launch_plan(8, 64, 128, torch.bfloat16, selected=10, merged=40)
    return {launch.name for launch in plan}


def shape_of(text: str) -> tuple[int, int, int]:
    """An argparse type: T,N,D."""
    sizes = tuple(int(part) for part in text.split(",")) if text.replace(",", "").isdigit() else ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected T,N,D such as 5,65,130, got {text!r}")
    return sizes[0], sizes[1], sizes[2]


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape_of, action="append", help=f"T,N,D of a video; default: {SHAPES}")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help=f"of the features; default: {', '.join(DTYPES)}"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = make_parser().parse_args(arguments)
    device = torch.device("cpu" if interpreted() else "cuda")
    shapes: Sequence[tuple[int, int, int]] = options.shape or SHAPES
    with record() as launches:
        for shape, dtype in itertools.product(shapes, options.dtype or DTYPES):
            features, attention = (x.to(device) for x in video("scene", *shape, getattr(torch, dtype)))
            run_compression(features, attention)
            run_ops(features, attention)
    if device.type == "cuda":
        torch.cuda.synchronize()
    names = {launch.name for launch in launches}
    if missing := known() - names:
        print(f"not launched: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    extension = "with the extension's" if native.has_cuda() and device.type == "cuda" else "Triton's alone"
    print(f"{DONE}: {len(names)} in {len(launches)} launches, {extension}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
