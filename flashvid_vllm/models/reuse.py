# SPDX-License-Identifier: MIT
"""A vision tower on some of a video's rows, where others stand for the rest (`core.reuse`).

Everything in a tower's layers but attention knows one row at a time, so it runs on the M computed rows as it is, once
the tower's inputs are theirs. Around attention keys and values are gathered to all R rows: each frame, or window, sees
all of its places. Whoever is copied has no query of its own; whose attention is received counts it all the same
(`gather`). Where whole temporal positions are computed the tower runs on them as on a shorter video (`whole_frames`).

A unit is what a row of `Reuse` is: ``per_unit`` rows of the tower, 2 x 2 patches where a merger joins them, else 1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..core.config import FlashVidConfig
from ..core.reuse import Reuse
from .encode_less import ROWS, SOURCE
from .upload import upload


def take_reuses(kwargs: dict[str, Any]) -> list[Reuse]:
    """The fields of each video, taken out of the arguments of `embed_multimodal`; empty where there are none."""
    rows, source = kwargs.pop(ROWS, None), kwargs.pop(SOURCE, None)
    return [] if rows is None else [Reuse(*tables) for tables in zip(rows, source, strict=True)]


def part(reuse: Reuse, per_frame: int, start: int, stop: int) -> tuple[slice, Reuse]:
    """The temporal positions start to stop of a video with ``per_frame`` rows each: which of the computed rows are
    theirs, and their reuse, counted from ``start``.

    Raises:
        ValueError: a row of theirs is a copy of one outside.
    """
    first, end = torch.searchsorted(reuse.rows, torch.tensor([start * per_frame, stop * per_frame])).tolist()
    source = reuse.source[start * per_frame : stop * per_frame] - first
    if int(source.min()) < 0 or int(source.max()) >= end - first:
        raise ValueError(
            f"temporal positions {start} to {stop} go through the encoder by themselves, and copy rows of others"
        )
    return slice(first, end), Reuse(reuse.rows[first:end] - start * per_frame, source)


def whole_frames(reuse: Reuse, per_frame: int) -> Tensor | None:
    """For each temporal position which of the computed ones it is a copy of, [T] int64; None if rows are computed of
    which not all of their temporal position are, or positions are made up of several."""
    if len(reuse.rows) % per_frame:
        return None
    rows, source = reuse.rows.unflatten(0, (-1, per_frame)), reuse.source.unflatten(0, (-1, per_frame))
    inside = torch.arange(per_frame)
    whole = bool((rows[:, 0] % per_frame == 0).all()) and torch.equal(rows, rows[:, :1] + inside)
    return source[:, 0] // per_frame if whole and torch.equal(source, source[:, :1] + inside) else None


def copied(tensors: tuple[Tensor, ...], frames: Tensor) -> tuple[Tensor, ...]:
    """From tensors of the computed temporal positions [F, ...] those of all T, as `whole_frames` has it."""
    if torch.equal(frames, torch.arange(len(tensors[0]))):
        return tensors
    return tuple(x.index_select(0, upload(frames, x.device)) for x in tensors)


def gather(x: Tensor, units: Tensor, per_unit: int = 1) -> Tensor:
    """The rows of the ``units`` of ``x`` [units * per_unit, ...]."""
    return x.unflatten(0, (-1, per_unit)).index_select(0, units).flatten(0, 1)


def why_not(attentions: Iterable[Any], compiled: bool) -> str | None:
    """Why a tower with these attention modules cannot compute single rows, or None if it can.

    Args:
        compiled: whether torch.compile has traced what is around them.
    """
    for attention in attentions:
        if not isinstance(attention, MMEncoderAttention):
            return f"its attention is vLLM's {type(attention).__name__}, of which nobody knows where its keys come from"
        if (reason := _why_not(compiled, attention.fp8_enabled, attention.attn_backend)) is not None:
            return reason
    return None


def why_not_served(config: VllmConfig) -> str | None:
    """The same by the options of a server, before there is a tower."""
    multimodal = config.model_config.multimodal_config
    quantised = multimodal.mm_encoder_attn_dtype == "fp8"
    return _why_not(config.compilation_config.compile_mm_encoder, quantised, multimodal.mm_encoder_attn_backend)


def _why_not(compiled: bool, quantised: bool, backend: AttentionBackendEnum | None) -> str | None:
    if compiled:
        return "its blocks are compiled, and attend to what they were traced with: leave compile_mm_encoder out"
    if quantised:
        return "its attention is quantised to what all rows hold: leave mm_encoder_attn_dtype='fp8' out"
    if backend == AttentionBackendEnum.FLASHINFER:
        return "FlashInfer wants keys and values in one table: choose another --mm-encoder-attn-backend"
    return None


def refuse_rows(reason: str | None, config: FlashVidConfig | None) -> None:
    """ValueError if ``config`` asks for single rows of a tower that cannot compute them for ``reason``."""
    if reason is not None and config is not None and config.encodes_less and config.encoder_reuse == "tokens":
        raise ValueError(
            f"encoder_ratio={config.encoder_ratio!r}: this server's vision encoder cannot compute some of a video's "
            f'tokens alone: {reason}; or set encoder_reuse to "frames"'
        )


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` be the module's, hooks around it as they are."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def attending_to_all(
    attentions: Iterable[Any], reuse: Reuse, tables: Mapping[str, Tensor], per_unit: int, num_frames: int | None
) -> Iterator[None]:
    """Let the attention modules of a tower that runs on ``reuse.rows`` see the keys and values of all rows.

    Args:
        reuse: in the order in which the tower has its units.
        tables: on the device (`uploaded`).
        num_frames: into so many equal sequences the rows are cut, where no ``cu_seqlens`` says it.
    """
    before = computed_before(reuse).tolist()
    with ExitStack() as stack:
        for attention in attentions:
            if attention.attn_backend == AttentionBackendEnum.TORCH_SDPA:
                forward = _computed_queries(attention, tables["source"], before, per_unit, num_frames)
            elif takes_query_lengths(attention):
                forward = _query_lengths(attention, tables, per_unit, num_frames)
            else:
                forward = _all_queries(attention.forward, tables, per_unit, num_frames)
            stack.enter_context(standing_in(attention, forward))
        yield


def uploaded(reuse: Reuse, device: torch.device) -> dict[str, Tensor]:
    """``rows``, ``source``, and ``before`` [units + 1], the computed ones in front of each unit, on the device."""
    tables = {"rows": reuse.rows, "source": reuse.source, "before": computed_before(reuse)}
    return {name: upload(table, device) for name, table in tables.items()}


def computed_before(reuse: Reuse) -> Tensor:
    """Computed units in front of each unit, and of all: [units + 1] int32."""
    counts = torch.zeros(len(reuse.source) + 1, dtype=torch.int32)
    counts[reuse.rows + 1] = 1
    return counts.cumsum(0, dtype=torch.int32)


def takes_query_lengths(attention: Any) -> bool:
    """Whether the kernel of this attention lets sequences have fewer queries than keys: FlashAttention 2 and 3 do."""
    flash = attention.attn_backend == AttentionBackendEnum.FLASH_ATTN
    return bool(flash and current_platform.is_cuda() and attention._fa_version in (2, 3))


def _all_queries(
    attend: Callable[..., Tensor], tables: Mapping[str, Tensor], per_unit: int, num_frames: int | None
) -> Callable[..., Tensor]:
    """Any kernel, which gets all rows' queries too."""

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        full = (
            gather(x.flatten(0, 1), tables["source"], per_unit).unflatten(0, (num_frames or 1, -1))
            for x in (query, key, value)
        )
        return gather(attend(*full, *args, **kwargs).flatten(0, 1), tables["rows"], per_unit).view(query.shape)

    return forward


def _query_lengths(
    attention: Any, tables: Mapping[str, Tensor], per_unit: int, num_frames: int | None
) -> Callable[..., Tensor]:
    """FlashAttention, with the lengths of queries and keys apart; a sequence may have no query at all."""
    heads, units = (attention.num_heads, attention.head_size), len(tables["source"])

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        rows, keys, values = (x.reshape(-1, *heads) for x in (query, key, value))
        if cu_seqlens is None or max_seqlen is None:
            assert num_frames is not None
            longest = units * per_unit // num_frames
            cu_seqlens = torch.arange(num_frames + 1, dtype=torch.int32, device=query.device) * longest
        else:
            with gpu_sync_allowed():  # vLLM has it on the host, and reads it there
                longest = int(max_seqlen)
        out = fa_utils.flash_attn_varlen_func(
            rows,
            gather(keys, tables["source"], per_unit),
            gather(values, tables["source"], per_unit),
            cu_seqlens_q=tables["before"][cu_seqlens // per_unit] * per_unit,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=attention.scale,
            causal=False,
            fa_version=attention._fa_version,
        )
        return out.reshape(query.shape)

    return forward


def _computed_queries(
    attention: Any, source: Tensor, before: Sequence[int], per_unit: int, num_frames: int | None
) -> Callable[..., Tensor]:
    """vLLM's loop over sequences in torch, with fewer queries than keys."""
    heads, scale = (attention.num_heads, attention.head_size), attention.scale

    def bounds(cu_seqlens: Tensor | None) -> Sequence[int]:
        """Of the sequences, in units."""
        if cu_seqlens is None:
            assert num_frames is not None
            return range(0, len(source) + 1, len(source) // num_frames)
        with gpu_sync_allowed():  # vLLM waits for them here, too
            return [bound // per_unit for bound in cu_seqlens.tolist()]

    def forward(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        rows, keys, values = (x.reshape(-1, *heads) for x in (query, key, value))
        out = []
        for start, stop in pairwise(bounds(cu_seqlens)):
            own = rows[before[start] * per_unit : before[stop] * per_unit]
            if len(own):
                seen = (gather(x, source[start:stop], per_unit) for x in (keys, values))
                q, k, v = (x.transpose(0, 1)[None] for x in (own, *seen))
                out.append(nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1))
        return torch.cat(out).reshape(query.shape)

    return forward
