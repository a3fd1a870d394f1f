# SPDX-License-Identifier: MIT
"""Sink suppression: what a place draws in every frame is taken off, and nothing else is."""

import pytest
import torch

from flashvid_vllm import FlashVidConfig, compress
from flashvid_vllm.core.compress import without_sinks
from tests.core.test_compress import same
from tests.support.cases import DTYPES, video

pytestmark = pytest.mark.usefixtures("one_thread")


def test_by_hand() -> None:
    attention = torch.tensor([[8.0, 2, 2, 0, 4], [3.0, 12, 0, 3, 3]])  # medians 2 and 3
    assert torch.equal(without_sinks(attention), attention)  # no place is above both; 0, 1 and 4 are above one
    attention[1, 0] = 6  # now place 0 has 4 and 2 medians, so 2 are taken off
    assert without_sinks(attention).tolist() == [[4, 2, 2, 0, 4], [3, 12, 0, 3, 3]]
    assert torch.equal(without_sinks(3 * attention[:1]), 3 * attention[:1])  # one frame tells nothing


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_says_nothing(dtype: torch.dtype) -> None:
    attention = torch.ones(3, 4, dtype=dtype)
    attention[:, 2] = 4
    attention[1, 2], attention[2, 3] = torch.nan, torch.inf
    out = without_sinks(attention)
    assert out.dtype == torch.float32
    assert out[[0, 2], 2].tolist() == [1, 1]  # 4 medians in both
    assert out[1, 2].isnan()
    assert out[2, 3].isinf()
    assert without_sinks(torch.zeros(2, 3)).tolist() == [[0] * 3] * 2
    assert without_sinks(torch.full((2, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_sink_takes_no_place_of_another(backend: str) -> None:
    features, attention = video("noise", 6, 20, 16)
    attention[:, 3] = 9.0
    plain = FlashVidConfig(retention_ratio=0.2, alpha=1, selection="attention", backend=backend)  # type: ignore[arg-type]
    sinks = FlashVidConfig(**{**plain.to_dict(), "suppress_sinks": True})
    kept, without = compress(features, attention, plain), compress(features, attention, sinks)
    assert int((kept.source_index % 20 == 3).sum()) == 6
    assert int((without.source_index % 20 == 3).sum()) < 6
    assert same(without, compress(features, without_sinks(attention), plain))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_it_is_read_by_nothing_that_reads_no_attention(backend: str) -> None:
    features, _ = video("scene", 4, 12, 8)
    config = FlashVidConfig(selection="diversity", backend=backend, suppress_sinks=True)  # type: ignore[arg-type]
    assert same(compress(features, None, config), compress(features, None, FlashVidConfig(selection="diversity")))
