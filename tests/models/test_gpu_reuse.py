# SPDX-License-Identifier: MIT
"""On a GPU: FlashAttention with fewer queries than keys gives what torch gives, sequence by sequence."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flashvid_vllm.models import reuse

from ..support.reuse import random_reuse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("per_unit", [1, 4])
@pytest.mark.parametrize("head_size", [64, 72, 80])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_sequences_with_fewer_queries_than_keys(per_unit: int, head_size: int, share: float) -> None:
    """With share 0 most sequences have hardly any, or none."""
    frames, units, heads = 6, 50, 4
    attention = SimpleNamespace(
        num_heads=heads, head_size=head_size, scale=head_size**-0.5,
        attn_backend=AttentionBackendEnum.FLASH_ATTN, _fa_version=get_flash_attn_version(head_size=head_size),
    )  # fmt: skip
    if not reuse.takes_query_lengths(attention):
        pytest.skip(f"FlashAttention {attention._fa_version} is not asked for it")
    chosen = random_reuse(frames, units, share)
    tables = reuse.uploaded(chosen, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    size = (1, len(chosen.rows) * per_unit, heads, head_size)
    q, k, v = (torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in range(3))
    bounds = torch.arange(frames + 1, dtype=torch.int32, device="cuda") * units * per_unit
    longest = torch.tensor(units * per_unit, dtype=torch.int32)
    found = reuse._query_lengths(attention, tables, per_unit, None)(q, k, v, bounds, longest)
    before = reuse.computed_before(chosen).tolist()
    torch_loop = reuse._computed_queries(attention, tables["source"], before, per_unit, None)
    torch.testing.assert_close(found.float(), torch_loop(q, k, v, bounds).float(), rtol=2e-2, atol=2e-2)
    assert torch.equal(reuse._query_lengths(attention, tables, per_unit, frames)(q, k, v), found)
