# SPDX-License-Identifier: MIT
"""The ops in C++: on a CPU all of them, on a CUDA device the roots and means of trees.

Signatures and results are those of ``flashvid_vllm.ops``. What reaches the extension is checked here, and is
contiguous unless its strides go along. Threads follow ``torch.get_num_threads()``; results do not depend on them.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from . import DPC_NEIGHBOURS, check_tensor

_native: Any = None
MISSING = ""
try:
    _native = importlib.import_module("flashvid_vllm._native")
except ImportError as error:  # not built, or built for another Python
    MISSING = f"the native extension is not built ({error})"

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def missing_for(device: torch.device) -> str:
    """What keeps this backend from running every op on ``device``; empty if nothing does."""
    if MISSING or device.type == "cpu":
        return MISSING
    message = f"it needs a tensor on cpu, got one on {device}"
    if device.type != "cuda":
        return message
    some = f"{' and '.join(cuda_ops())} alone" if cuda_ops() else "none of its ops"
    return f"{message}, where this build has {some}; torch and triton have every op there"


def has_cuda() -> bool:
    """Whether the extension has its CUDA part."""
    return not MISSING and hasattr(_native, "tree_roots_cuda")


def cuda_ops() -> tuple[str, ...]:
    """The ops that run on a CUDA device; not on ROCm's, which torch calls by the same name."""
    return ("tree_roots", "pool_trees") if has_cuda() and not torch.version.hip else ()


def isas() -> list[str]:
    """The instruction sets that this machine runs, from plainest to best."""
    return _loaded().isas()


def isa() -> str:
    """The one that serves: the best, or what FLASHVID_CPU_ISA named when the process started."""
    return _loaded().isa()


def use_isa(name: str) -> None:
    """Use one of ``isas()``, "" for the best.

    Raises:
        ValueError: this machine cannot run it.
    """
    _loaded().use_isa(name)


def segment_frames(frames: Tensor, threshold: float, min_segments: int) -> Tensor:
    """Sec. 1 (DySeg)."""
    t, d = _sizes("frames", frames, "T D")
    segment_id = _like(frames, t)
    rows = _rows(frames.float())
    _loaded().segment_frames(rows.data_ptr(), t, d, threshold, min_segments, segment_id.data_ptr())
    return segment_id


def event_relevance(features: Tensor, segment_id: Tensor) -> Tensor:
    """Sec. 2, E."""
    t, n, _ = _sizes("features", features, "T N D")
    check_tensor("segment_id", segment_id, "T", (torch.int64,), {"T": t}, features)
    relevance = _like(features, t, n, dtype=torch.float32)
    rows, ids = _rows(features), segment_id.contiguous()
    _loaded().event_relevance(*_video(rows), ids.data_ptr(), relevance.data_ptr(), torch.get_num_threads())
    return relevance


def select_tokens(features: Tensor, weight: Tensor | None, k: int) -> Tensor:
    """Sec. 2 (ADTS): the products of a frame and the choices from them, frame by frame."""
    t, n, _ = _sizes("features", features, "T N D")
    if not 0 <= k <= n:
        raise ValueError(f"k must be between 0 and N={n}, got {k!r}")
    index = _like(features, t, k)
    rows, weights = _rows(features), _weights("weight", weight, features)
    _loaded().select_tokens(*_video(rows), _pointer(weights), k, index.data_ptr(), torch.get_num_threads())
    return index


def match_tokens(
    features: Tensor, candidate: Tensor, segment_id: Tensor, threshold: float, matching: str = "tree"
) -> tuple[Tensor, Tensor]:
    """Sec. 3 (TSTM; "position" is TTM): products and the masked argmax of their rows, frame by frame."""
    t, n, _ = _sizes("features", features, "T N D")
    check_tensor("candidate", candidate, "T N", (torch.bool,), {"T": t, "N": n}, features)
    check_tensor("segment_id", segment_id, "T", (torch.int64,), {"T": t}, features)
    similarity, parent = _like(features, t, n, dtype=torch.float32), _like(features, t, n)
    rows, mask, ids = _rows(features), candidate.contiguous(), segment_id.contiguous()
    _loaded().match_tokens(
        *_video(rows),
        mask.data_ptr(),
        ids.data_ptr(),
        threshold,
        matching == "position",
        similarity.data_ptr(),
        parent.data_ptr(),
        torch.get_num_threads(),
    )
    return similarity, parent


def tree_roots(parent: Tensor) -> Tensor:
    """Sec. 3, on a CPU or a CUDA device, which is not waited for to check what ``parent`` holds."""
    sizes = check_tensor("parent", parent, "T N", (torch.int64,))
    t, n = sizes["T"], sizes["N"]
    on_cuda = _on_cuda("tree_roots", "parent", parent)
    root, links = _like(parent, t, n), parent.contiguous()
    if on_cuda:
        with torch.cuda.device(parent.device):
            _native.tree_roots_cuda(links.data_ptr(), t, n, root.data_ptr(), _stream(parent))
    else:
        _loaded().tree_roots(links.data_ptr(), t, n, root.data_ptr())
    return root


def pool_trees(features: Tensor, root: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sec. 3, on a CPU or a CUDA device: the members of a tree are counted into place, and summed in order."""
    sizes = check_tensor("features", features, "T N D", tuple(DTYPE_CODES))
    check_tensor("root", root, "T N", (torch.int64,), sizes, features)
    check_tensor("member", member, "T N", (torch.bool,), sizes, features)
    on_cuda, rows = _on_cuda("pool_trees", "features", features), _rows(features)
    if on_cuda:
        return _pool_trees_cuda(rows, root, member)
    roots, mask = root.contiguous(), member.contiguous()
    trees = _loaded().Trees(roots.data_ptr(), mask.data_ptr(), root.numel())
    index, size = _like(features, len(trees)), _like(features, len(trees))
    mean = _like(features, len(trees), sizes["D"], dtype=torch.float32)
    code, pointers = DTYPE_CODES[rows.dtype], [tensor.data_ptr() for tensor in (index, mean, size)]
    trees.write(rows.data_ptr(), code, root.numel(), sizes["D"], *pointers, torch.get_num_threads())
    return index, mean, size


def cluster_tokens(x: Tensor, num_clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """Sec. 4 (DPC-kNN)."""
    n, d = _sizes("x", x, "n D")
    for name, value in (("num_clusters", num_clusters), ("k", k)):
        if not 1 <= value <= n:
            raise ValueError(f"{name} must be between 1 and n={n}, got {value!r}")
    centers, assignment = _like(x, num_clusters), _like(x, n)
    rows = _rows(x)
    _loaded().cluster_tokens(
        rows.data_ptr(),
        DTYPE_CODES[rows.dtype],
        n,
        d,
        num_clusters,
        k,
        centers.data_ptr(),
        assignment.data_ptr(),
        torch.get_num_threads(),
    )
    return centers, assignment


def explain_tokens(features: Tensor, tokens: int, still: float) -> Tensor:
    """Distances frame by frame, once to pick and once to assign."""
    t, n, _ = _sizes("features", features, "T N D")
    if not 1 <= tokens <= t * n:
        raise ValueError(f"tokens must be between 1 and T*N={t * n}, got {tokens!r}")
    source, rows = _like(features, t, n), _rows(features)
    _loaded().explain_tokens(*_video(rows), tokens, still, source.data_ptr(), torch.get_num_threads())
    return source


def received_attention(query: Tensor, key: Tensor) -> Tensor:
    """Section "Received attention", per frame and head in blocks of queries; only d need be contiguous."""
    t, h, n, d = _sizes("query", query, "T H N d")
    check_tensor("key", key, "T H N d", (query.dtype,), {"T": t, "H": h, "N": n, "d": d}, query)
    received = _like(query, t, n, dtype=torch.float32)
    query, key = (x.detach() if x.stride(-1) == 1 else _rows(x) for x in (query, key))
    _loaded().received_attention(
        query.data_ptr(),
        query.stride()[:3],
        key.data_ptr(),
        key.stride()[:3],
        DTYPE_CODES[query.dtype],
        t,
        h,
        n,
        d,
        received.data_ptr(),
        torch.get_num_threads(),
    )
    return received


def choose_rows(
    levels: Tensor,
    ends: list[int],
    longest: int,
    least: list[int],
    most: list[int],
    num_rows: int | None,
    unexplained: int,
    farthest: int,
) -> Tensor:
    """What ``flashvid_vllm.ops.reuse`` defines, from what it has derived."""
    t, places, channels = levels.shape
    position, rows = _like(levels, t, places), _rows(levels)
    _loaded().choose_rows(
        rows.data_ptr(),
        places,
        channels,
        ends,
        least,
        most,
        longest,
        -1 if num_rows is None else num_rows,
        unexplained,
        farthest,
        position.data_ptr(),
        torch.get_num_threads(),
    )
    return position


def compress_on_device(
    features: Tensor,
    attention: Tensor | None,
    selected: int,
    merged: int,
    selection: str,
    matching: str,
    *limits: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All of ``flashvid_vllm.compress`` in one call, for a budget that drops something.

    Args:
        features: [T, N, D] fp32, fp16 or bf16.
        attention: [T, N] of a float dtype; not read, and may be None, where ``selection`` is "diversity" or nothing
            is selected.
        selected: tokens that ADTS selects in each frame [K].
        merged: tokens that TSTM may leave in the whole video [M].
        limits: what ``pipeline.compress_video`` takes behind ``matching``, for C++ as it is.

    Returns:
        tokens [B, D], source_index [B], size [B] and assignment [T, N], B = T*K + M.
    """
    t, n, d = _sizes("features", features, "T N D")
    reads_attention = selected > 0 and selection != "diversity"
    weights = _weights("attention", attention, features) if reads_attention else None
    if weights is None and reads_attention:
        raise ValueError(f"selection={selection!r} needs attention [T, N], got None")
    if not 0 <= selected <= n:
        raise ValueError(f"selected must be between 0 and N={n}, got {selected!r}")
    if not 0 <= merged <= t * (n - selected):
        raise ValueError(f"merged must be between 0 and T*(N-K)={t * (n - selected)}, got {merged!r}")
    kept = t * selected + merged
    tokens, assignment = _like(features, kept, d, dtype=features.dtype), _like(features, t, n)
    source_index, size = _like(features, kept), _like(features, kept)
    rows = _rows(features)
    _loaded().compress(
        *_video(rows),
        _pointer(weights),
        selected,
        merged,
        *limits,
        selection == "attention",
        selection == "attention_diversity_event",
        matching == "position",
        DPC_NEIGHBOURS,
        tokens.data_ptr(),
        source_index.data_ptr(),
        size.data_ptr(),
        assignment.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens, source_index, size, assignment


def _pool_trees_cuda(features: Tensor, root: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index, size, first, members = _groups(root, member)
    d = features.shape[-1]
    mean = _like(features, len(index), d, dtype=torch.float32)
    pointers = [tensor.data_ptr() for tensor in (first, members, mean)]
    code = DTYPE_CODES[features.dtype]
    with torch.cuda.device(features.device):
        _native.mean_of_groups_cuda(features.data_ptr(), code, d, len(index), *pointers, _stream(features))
    return index, mean, size


def _groups(root: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The roots [R] that have members, ascending, and how many; the members of root i are, in the order of their
    position, the last result's from ``first[i]`` to ``first[i + 1]``."""
    token = member.flatten().nonzero().flatten()
    root_of_token, by_root = root.flatten()[token].sort(stable=True)
    index, size = root_of_token.unique_consecutive(return_counts=True)
    first = torch.cat([size.new_zeros(1), size.cumsum(0)])
    return index, size, first, token[by_root]


def _loaded() -> Any:
    if MISSING:
        raise ValueError(f"backend 'native' cannot run: {MISSING}")
    return _native


def _sizes(name: str, tensor: Tensor, axes: str) -> tuple[int, ...]:
    sizes = check_tensor(name, tensor, axes, tuple(DTYPE_CODES))
    _on_cpu(name, tensor)
    return tuple(sizes.values())


def _on_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on cpu for the native backend, got {tensor.device}")


def _on_cuda(op: str, name: str, tensor: Tensor) -> bool:
    """Whether a CUDA device computes; ValueError if neither it nor the CPU can."""
    if tensor.is_cuda and op in cuda_ops():
        return True
    _on_cpu(name, tensor)
    return False


def _rows(x: Tensor) -> Tensor:
    return x.detach().contiguous()


def _video(rows: Tensor) -> tuple[int, ...]:
    return rows.data_ptr(), DTYPE_CODES[rows.dtype], *rows.shape


def _weights(name: str, weight: Tensor | None, features: Tensor) -> Tensor | None:
    if weight is None:
        return None
    sizes = {"T": features.shape[0], "N": features.shape[1]}
    check_tensor(name, weight, "T N", tuple(DTYPE_CODES), sizes, features)
    return _rows(weight.float())


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(beside: Tensor, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=beside.device)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
