# SPDX-License-Identifier: MIT
"""What the layers from K on are told of a step: shorter sequences, packed into the first slots of the same blocks.

Keys carry their positions, turned by RoPE before they are cached, so where they lie says nothing, but for the order
that a causal mask goes by, and that stays. A backend of their own, of the same kernels, gives these layers metadata of
their own: vLLM groups layers by the name of their backend.
"""

from typing import Any

import torch

from ..upload import upload
from .plan import Plan

BACKENDS = ("CPU_ATTN", "FLASH_ATTN")  # whose metadata is made of nothing but what `packed` rewrites


def packed(common: Any, plan: Plan, block_size: int) -> Any:
    """vLLM's CommonAttentionMetadata ``common`` of a step, as the layers from K on have it.

    Blocks of ``common``'s table are of ``block_size`` slots. Requests that wait are left out.
    """
    device = common.seq_lens.device
    chosen = [index for index, row in enumerate(plan.rows) if row.queries]
    rows = [plan.rows[index] for index in chosen]
    queries = torch.tensor([row.queries for row in rows], dtype=torch.int32)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = queries.cumsum(0)
    dropped = torch.tensor([row.dropped for row in rows], dtype=torch.int32)
    bound = common.seq_lens_cpu_upper_bound[chosen] - dropped
    which = torch.repeat_interleave(torch.arange(len(rows)), queries)
    inside = torch.arange(int(starts[-1])) - starts[:-1].long()[which] - queries[which]  # from the row's end, below 0

    index, dropped, which, inside = (upload(x, device) for x in (torch.tensor(chosen), dropped, which, inside))
    lengths = common.seq_lens[index] - dropped  # the device's own: a draft may have been rejected meanwhile
    table = common.block_table_tensor[index]
    place = lengths.long()[which] + inside
    slots = table[which, place // block_size].long() * block_size + place % block_size
    return common.replace(
        query_start_loc=upload(starts, device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(common.seq_lens.dtype),
        seq_lens_cpu_upper_bound=bound,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(queries.max()),
        max_seq_len=int(bound.max()),
        block_table_tensor=table,
        slot_mapping=slots.to(common.slot_mapping.dtype),
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[chosen],
        positions=None,
        req_idx=None,
        rswa_prefix_lens=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def backend_of_later_layers(backend: Any, inner: Any) -> Any:
    """A subclass of the attention ``backend`` for the layers from K on; ``inner``: the worker's `Inner`."""
    builder = backend.get_builder_cls()

    class LaterLayersBuilder(builder):  # type: ignore[misc, valid-type]
        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            step = inner.step
            if step is None or not step.plan.drops:
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            if not any(row.queries for row in step.plan.rows):
                return super().build(0, common_attn_metadata, fast_build)  # read by nobody
            common = packed(common_attn_metadata, step.plan, self.kv_cache_spec.block_size)
            step.slots.update(dict.fromkeys(self.layer_names, common.slot_mapping))
            return super().build(0, common, fast_build)

    class LaterLayersBackend(backend):
        @staticmethod
        def get_builder_cls() -> Any:
            return LaterLayersBuilder

    return LaterLayersBackend
