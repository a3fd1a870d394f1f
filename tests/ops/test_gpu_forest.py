# SPDX-License-Identifier: MIT
"""The CUDA part of the native extension on a GPU, by the public ops: the CPU's roots, counts and bits."""

import pytest
import torch
from torch import Tensor

from flashvid_vllm import ops
from flashvid_vllm.ops import native
from tests.support.cases import DTYPES, SHAPES, video

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not native.has_cuda(), reason=native.MISSING or "the extension has no CUDA part"),
]


def forest_on_gpu(features: Tensor, parent: Tensor, member: Tensor) -> tuple[Tensor, ...]:
    root = ops.tree_roots(parent, backend="native")
    found = (root, *ops.pool_trees(features, root, member, backend="native"))
    assert all(x.is_cuda for x in found)
    return tuple(x.cpu() for x in found)


def random_forest(num_frames: int, n: int, links: float) -> tuple[Tensor, Tensor]:
    """Parents [T, N] of which a share of ``links`` is set, many of them the same, and members [T, N]."""
    generator = torch.Generator().manual_seed(0)
    parent = torch.randint(n, (num_frames, n), generator=generator).div_(2, rounding_mode="floor")
    parent[torch.rand(num_frames, n, generator=generator) >= links] = -1
    parent[0] = -1
    return parent, torch.rand(num_frames, n, generator=generator) < 0.7


@pytest.mark.parametrize("links", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 197, 515)], ids=str)
def test_forest(shape: tuple[int, int, int], dtype: torch.dtype, links: float) -> None:
    features = video("scene", *shape, dtype)[0]
    parent, member = random_forest(*shape[:2], links)
    root = ops.tree_roots(parent, backend="torch")
    got = forest_on_gpu(features.cuda(), parent.cuda(), member.cuda())
    assert torch.equal(got[0], root)
    index, mean, size = ops.pool_trees(features, root, member, backend="torch")
    assert torch.equal(got[1], index)
    assert torch.equal(got[3], size)
    torch.testing.assert_close(got[2], mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], native.pool_trees(features, root, member)[1])  # the same lines, the same bits


@pytest.mark.parametrize("n", [1, 3])
def test_forest_of_the_deepest_trees(n: int) -> None:
    """Chains through 4000 frames, shortened by all threads at once; n = 3: everyone's parent is the first."""
    parent = torch.zeros(4000, n, dtype=torch.int64).cuda()
    root = ops.tree_roots(parent, backend="native")
    assert root[1:].eq(0).all()  # parents of the first frame do not count
    assert root[0].tolist() == list(range(n))


def test_forest_of_any_strides_and_stream() -> None:
    features = video("scene", 5, 65, 130, torch.bfloat16)[0].cuda()
    parent, member = (x.cuda() for x in random_forest(5, 65, 0.8))
    expected = forest_on_gpu(features, parent, member)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for layout in (
        lambda x: torch.stack([x, x], dim=-1)[..., 1],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # a kernel on another stream would read what is not yet there
            found = forest_on_gpu(*(layout(x) for x in (features, parent, member)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_forest_without_members() -> None:
    features, root = torch.ones(2, 3, 4).cuda(), torch.zeros(2, 3, dtype=torch.int64).cuda()
    found = ops.pool_trees(features, root, torch.zeros(2, 3, dtype=torch.bool).cuda(), backend="native")
    assert [tuple(x.shape) for x in found] == [(0,), (0, 4), (0,)]
