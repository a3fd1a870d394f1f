# SPDX-License-Identifier: MIT
"""The operations of FlashVID: what each takes and returns, and the one place that chooses who computes it.

Every op takes ``backend``: "auto", or a name that is then used or raises. Ops never modify their inputs,
accept any strides, compute in fp32, and break ties by the lowest index. Every op raises ValueError for a
tensor of the wrong shape, dtype or device, and for a backend that this build has not. "Sec." is a section of
the algorithm (arXiv 2602.08024, made exact in ALGORITHM.md).

Shapes: T frames of N tokens of D channels. Features are fp32, fp16 or bf16; indices are int64.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "DPC_NEIGHBOURS",
    "FLOATS",
    "check_tensor",
    "choose_backend",
    "cluster_tokens",
    "device_pipeline",
    "event_relevance",
    "explain_tokens",
    "match_tokens",
    "pool_trees",
    "received_attention",
    "segment_frames",
    "select_tokens",
    "tree_roots",
]

# name: module of this package, imported on first use
_BACKENDS = {"torch": "reference", "native": "native", "triton": "triton_backend"}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


_HAS_TRITON = _installed("triton")  # looked up, not imported
_used: list[str] = []  # backends that have run, the last one last
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # features, weights, attention
DPC_NEIGHBOURS = 7  # that make the density of DPC-kNN, in every backend (ALGORITHM, Sec. 4, k)
_INDEX = (torch.int64,)
_MASK = (torch.bool,)


def choose_backend(requested: str, device: torch.device) -> str:
    """Name the backend that serves ``requested`` on ``device``: for "auto" triton on a GPU and native on
    a CPU, where they can run, else torch.

    Raises:
        ValueError: ``requested`` is neither "auto" nor a backend of this build, or it cannot run every op there.
    """
    if requested == "auto":
        best = {"cuda": "triton", "cpu": "native"}.get(device.type, "torch")
        return "torch" if missing_for(best, device) else best
    if requested not in _BACKENDS:
        raise ValueError(f"this build has no backend {requested!r}; available: {', '.join(_BACKENDS)} (or auto)")
    if missing := missing_for(requested, device):
        raise ValueError(f"backend {requested!r} cannot run: {missing}")
    return requested


def missing_for(backend: str, device: torch.device) -> str:
    """What keeps a backend of this build from running on ``device``; empty if nothing does."""
    if backend == "torch":
        return ""
    if backend == "native":
        return str(_module("native").missing_for(device))
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if device.type != "cuda" and not interpreted:
        return f"it needs a tensor on a CUDA or ROCm device, or TRITON_INTERPRET=1; got one on {device}"
    return ""


def device_pipeline(requested: str, tensor: Tensor) -> Callable[..., tuple[Tensor, ...]] | None:
    """The whole compression as one function that never waits for the device, where the backend has one."""
    return getattr(_backend(requested, tensor), "compress_on_device", None)


def check_tensor(
    name: str,
    tensor: Tensor,
    axes: str,
    dtypes: tuple[torch.dtype, ...],
    sizes: dict[str, int] | None = None,
    beside: Tensor | None = None,
) -> dict[str, int]:
    """Check a tensor against named axes ("T N D"), the sizes known so far and the device of ``beside``.

    Returns:
        The size of each axis by name.

    Raises:
        ValueError: with the value and what was expected.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor [{axes}], got {type(tensor).__name__}")
    known, names = sizes or {}, axes.split()
    if tensor.dim() != len(names) or any(
        got < 1 or got != known.get(axis, got) for axis, got in zip(names, tensor.shape, strict=True)
    ):
        wanted = ", ".join(f"{axis}={known[axis]}" if axis in known else axis for axis in names)
        raise ValueError(f"{name} must have shape [{wanted}], none of them 0; got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if beside is not None and tensor.device != beside.device:
        raise ValueError(f"{name} must be on {beside.device}, got {tensor.device}")
    return dict(zip(names, tensor.shape, strict=True))


def segment_frames(frames: Tensor, threshold: float, min_segments: int, backend: str = "auto") -> Tensor:
    """Cut a video into segments where neighbouring frames differ (DySeg, Sec. 1).

    Args:
        frames: [T, D], one embedding per frame.
        threshold: cosine similarity below which a cut falls [S_tau].
        min_segments: least number of segments, >= 1; never more than T.

    Returns:
        segment_id [T] int64, from 0, non-decreasing.
    """
    check_tensor("frames", frames, "T D", FLOATS)
    if min_segments < 1:
        raise ValueError(f"min_segments must be >= 1, got {min_segments!r}")
    return _backend(backend, frames).segment_frames(frames, threshold, min_segments)


def event_relevance(features: Tensor, segment_id: Tensor, backend: str = "auto") -> Tensor:
    """Relevance of each token to its segment: mean inner product with its frame embeddings (Sec. 2, E).

    Args:
        features: [T, N, D].
        segment_id: [T] int64, from 0, non-decreasing.

    Returns:
        relevance [T, N] float32, >= 0.
    """
    sizes = check_tensor("features", features, "T N D", FLOATS)
    check_tensor("segment_id", segment_id, "T", _INDEX, sizes, features)
    return _backend(backend, features).event_relevance(features, segment_id)


def select_tokens(features: Tensor, weight: Tensor | None, k: int, backend: str = "auto") -> Tensor:
    """Select k diverse tokens of every frame: calibrated Max-Min Diversity on cosine distance (ADTS, Sec. 2).

    Args:
        features: [T, N, D].
        weight: [T, N] fp32, fp16 or bf16, what a token's distance is multiplied by; None for 1.
        k: tokens per frame, 0 to N.

    Returns:
        index [T, k] int64 within the frame, ascending and unique.
    """
    sizes = check_tensor("features", features, "T N D", FLOATS)
    if weight is not None:
        check_tensor("weight", weight, "T N", FLOATS, sizes, features)
    if not 0 <= k <= sizes["N"]:
        raise ValueError(f"k must be between 0 and N={sizes['N']}, got {k!r}")
    return _backend(backend, features).select_tokens(features, weight, k)


def match_tokens(
    features: Tensor,
    candidate: Tensor,
    segment_id: Tensor,
    threshold: float,
    matching: str = "tree",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Link tokens to the most similar one of the previous frame of their segment (TSTM, Sec. 3).

    Args:
        features: [T, N, D].
        candidate: [T, N] bool, the tokens that may link and be linked to.
        segment_id: [T] int64, from 0, non-decreasing.
        threshold: cosine similarity above which a link is made [T_tau].
        matching: "tree", or "position" to consider only the same position in the previous frame (TTM).

    Returns:
        similarity [T, N] float32, to the best candidate whether linked or not; -1 where there is none.
        parent [T, N] int64, its index within the previous frame; -1 where there is no link.
    """
    sizes = check_tensor("features", features, "T N D", FLOATS)
    check_tensor("candidate", candidate, "T N", _MASK, sizes, features)
    check_tensor("segment_id", segment_id, "T", _INDEX, sizes, features)
    if matching not in ("tree", "position"):
        raise ValueError(f"matching must be tree or position, got {matching!r}")
    return _backend(backend, features).match_tokens(features, candidate, segment_id, threshold, matching)


def tree_roots(parent: Tensor, backend: str = "auto") -> Tensor:
    """Find the root of every token's tree (Sec. 3).

    Args:
        parent: [T, N] int64, index within the previous frame or -1; -1 in the first frame.

    Returns:
        root [T, N] int64, flat index (t*N + n) of the root; a token without parent is its own.
    """
    check_tensor("parent", parent, "T N", _INDEX)
    return _backend(backend, parent, "tree_roots").tree_roots(parent)


def pool_trees(features: Tensor, root: Tensor, member: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Average the members of every tree (Sec. 3). May wait for the device: R depends on the data.

    Args:
        features: [T, N, D].
        root: [T, N] int64, flat index of the root.
        member: [T, N] bool, the tokens that count.

    Returns:
        index [R] int64, flat index of the roots that have members, ascending.
        mean [R, D] float32, of all members.
        size [R] int64, number of members.
    """
    sizes = check_tensor("features", features, "T N D", FLOATS)
    check_tensor("root", root, "T N", _INDEX, sizes, features)
    check_tensor("member", member, "T N", _MASK, sizes, features)
    return _backend(backend, features, "pool_trees").pool_trees(features, root, member)


def cluster_tokens(x: Tensor, num_clusters: int, k: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Cluster tokens by density peaks with k nearest neighbours (DPC-kNN, Sec. 4).

    Args:
        x: [n, D].
        num_clusters: 1 to n.
        k: neighbours that make the density, the token itself included; 1 to n.

    Returns:
        centers [num_clusters] int64, index in x, by falling score.
        assignment [n] int64, position in ``centers`` of each token's nearest centre.
    """
    sizes = check_tensor("x", x, "n D", FLOATS)
    for name, value in (("num_clusters", num_clusters), ("k", k)):
        if not 1 <= value <= sizes["n"]:
            raise ValueError(f"{name} must be between 1 and n={sizes['n']}, got {value!r}")
    return _backend(backend, x).cluster_tokens(x, num_clusters, k)


def explain_tokens(features: Tensor, tokens: int, still: float, backend: str = "auto") -> Tensor:
    """Which token stands for each, where a video's budget goes to what is explained worst (`adaptive`).

    1. A token's residual is its cosine distance to its place one frame before; in the first frame, which has nothing
       before it, 2 minus its mean distance to all of the frame. It is at least ``still`` of its frame's spread, the
       mean distance between the frame's tokens.
    2. In every frame the token of the largest residual is picked. It explains the others as well as they are like it,
       their residuals fall to their distance from it, and the next is picked: farthest first. So a frame's residuals
       fall from pick to pick.
    3. The picks of the largest residuals of the whole video stay, and the first of the first frame.
    4. For every other token stands the nearest that stays in its frame, or, where that is farther than its place one
       frame before, whatever stands for this.

    Distances are whole steps of 1e-5; ties go to the earlier frame, then to the earlier pick, then to the lowest
    index; a token that is not finite is picked last, and stands for no other. Time grows with T * N * N * D, and memory
    with T * N and with N * N: of a frame of each thread (native), or of so many frames as 64 MiB hold in fp32.

    Args:
        features: [T, N, D].
        tokens: how many stay, 1 to T*N.
        still: 0 or more.

    Returns:
        source [T, N] int64, flat index (t*N + n) of the token that stands for each, its own where it stays; -1 if none
        does, as may be beside or behind tokens that are not finite.
    """
    sizes = check_tensor("features", features, "T N D", FLOATS)
    if not 1 <= tokens <= sizes["T"] * sizes["N"]:
        raise ValueError(f"tokens must be between 1 and T*N={sizes['T'] * sizes['N']}, got {tokens!r}")
    return _backend(backend, features).explain_tokens(features, tokens, still)


def received_attention(query: Tensor, key: Tensor, backend: str = "auto") -> Tensor:
    """Average attention that each token receives within its frame, over heads and queries.

    Args:
        query: [T, H, N, d].
        key: [T, H, N, d], the dtype of ``query``.

    Returns:
        received [T, N] float32; the tokens of a frame sum to 1.
    """
    sizes = check_tensor("query", query, "T H N d", FLOATS)
    check_tensor("key", key, "T H N d", (query.dtype,), sizes, query)
    return _backend(backend, query).received_attention(query, key)


def _backend(requested: str, tensor: Tensor, op: str = "") -> ModuleType:
    """The module that computes ``op``, which a backend may have on a device where it has not all the others."""
    alone = requested == "native" and tensor.is_cuda and op in _module("native").cuda_ops()
    name = requested if alone else choose_backend(requested, tensor.device)
    if not torch.compiler.is_compiling():
        _note_use(name, tensor.device)
    return _module(name)


def _module(backend: str) -> ModuleType:
    name = f"{__name__}.{_BACKENDS[backend]}"
    return sys.modules.get(name) or importlib.import_module(name)


def _note_use(name: str, device: torch.device) -> None:
    if name not in _used:  # once, and where a server's log shows it
        logger = logging.getLogger("vllm.plugins.flashvid" if "vllm" in sys.modules else "flashvid_vllm")
        logger.info("FlashVID compresses with its %s backend on %s", name, device)
    elif _used[-1] != name:
        _used.remove(name)
    if not _used or _used[-1] != name:
        _used.append(name)
