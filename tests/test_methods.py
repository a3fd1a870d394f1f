# SPDX-License-Identifier: MIT
"""Every method: exactly B tokens whatever comes, and each against a slow implementation of its definition."""

import importlib
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvid_vllm import CompressedVideo, FlashVidConfig, compress
from flashvid_vllm.budget import plan
from flashvid_vllm.config import ABLATIONS, Method
from flashvid_vllm.methods import PEERS, common, prunevid
from tests.cases import DTYPES, SHAPES, VIDEOS, assert_close, video
from tests.test_compress import assert_sound, same

VLLMS = ("evs", "vidcom2")  # call vLLM's own functions
HAS_VLLM = importlib.util.find_spec("vllm") is not None
METHODS = [name for name in get_args(Method) if HAS_VLLM or name not in VLLMS]
MERGING = [name for name, peer in PEERS.items() if peer.merges]
PRUNING = [name for name in METHODS if name in PEERS and not PEERS[name].merges]
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(method: str, backend: str = "torch", **size: Any) -> FlashVidConfig:
    arguments: Any = {"method": method, "backend": backend, **size}
    return FlashVidConfig(**arguments)


def test_the_table_is_what_is_offered() -> None:
    assert get_args(Method) == ("flashvid", *ABLATIONS, *PEERS)
    for name in PEERS:
        module = importlib.import_module(f"flashvid_vllm.methods.{name}")
        assert name == "uniform" or "arXiv 2" in str(module.__doc__)
        assert "budget: says B" in str(module.compress.__doc__)


# Exactly B tokens, whatever comes

budgets = st.floats(0.01, 1).map(lambda ratio: {"retention_ratio": ratio}) | st.integers(1, 120).map(
    lambda budget: {"token_budget": budget}
)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 11),
    st.integers(1, 20),
    budgets,
    st.sampled_from(DTYPES),
    st.sampled_from(VIDEOS),
    st.sampled_from(["auto", "torch"]),
    st.integers(0, 99),
)
def test_exactly_the_budget(
    method: str, num_frames: int, n: int, size: Any, dtype: torch.dtype, kind: str, backend: str, seed: int
) -> None:
    features, attention = video(kind, num_frames, n, 9, dtype, seed)
    config = config_of(method, backend, **size)
    assert_sound(compress(features, attention, config), features, config)


@pytest.mark.parametrize("method", METHODS)
def test_awkward_budgets(method: str) -> None:
    for num_frames, n, d in SHAPES:
        features, attention = video("scene", num_frames, n, d)
        total = num_frames * n
        for tokens in {1, num_frames - 1 or 1, num_frames, n, total // 2 or 1, total - 1 or 1}:
            config = config_of(method, "auto", token_budget=tokens)
            out = compress(features, attention, config)
            assert_sound(out, features, config)
            assert len(out.tokens) == min(tokens, total)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_all_returns_the_features(method: str, dtype: torch.dtype) -> None:
    features, attention = video("nan", 3, 7, 8, dtype)
    out = compress(features, attention, config_of(method, retention_ratio=1))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.tokens.view(bits), features.flatten(0, 1).view(bits))
    assert torch.equal(out.assignment, torch.arange(21).view(3, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_on_every_run_thread_count_and_layout(method: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for kind, backend in itertools.product(("scene", "letterbox", "static"), ("auto", "torch")):
            features, attention = video(kind, 4, 25, 200, dtype)
            config = config_of(method, backend, retention_ratio=0.2)
            torch.set_num_threads(1)
            first = compress(features, attention, config)
            torch.set_num_threads(2)
            assert same(compress(features, attention, config), first)
            strided = torch.stack([features, features], dim=-1)[..., 1]
            assert same(compress(strided, attention.T.contiguous().T, config), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone(method: str) -> None:
    for kind in ("scene", "nan"):
        features, attention = video(kind, 4, 16, 8)
        kept = features.clone(), attention.clone()
        compress(features.requires_grad_(), attention, config_of(method))
        assert torch.equal(features.detach().nan_to_num(), kept[0].nan_to_num())
        assert torch.equal(attention, kept[1])


# What a kept token is


def members(out: CompressedVideo, features: Tensor, row: int) -> Tensor:
    return features.flatten(0, 1)[(out.assignment.flatten() == row)].double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*PRUNING, "adts"])
def test_pruning_copies_tokens_and_drops_the_others(method: str, dtype: torch.dtype) -> None:
    features, attention = video("scene", 4, 20, 33, dtype)
    out = compress(features, attention, config_of(method, retention_ratio=0.25))
    assert torch.equal(out.tokens, features.flatten(0, 1)[out.source_index])
    assert (out.size == 1).all()
    assert int((out.assignment >= 0).sum()) == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [name for name in MERGING if name != "fastvid"])  # which has a test of its own
def test_merged_tokens_are_means_of_what_they_stand_for(method: str, dtype: torch.dtype) -> None:
    features, attention = video("scene", 8, 40, 33, dtype)
    out = compress(features, attention, config_of(method, retention_ratio=0.3))
    expected = torch.stack([members(out, features, row).mean(0) for row in range(len(out.tokens))])
    rounded = 2 * torch.finfo(dtype).eps  # once, a sum in fp32
    torch.testing.assert_close(out.tokens.double(), expected, rtol=rounded, atol=1e-5)
    assert int(out.size.max()) > 1
    alone = out.size == 1
    assert torch.equal(out.tokens[alone], features.flatten(0, 1)[out.source_index[alone]])


@pytest.mark.parametrize("method", [name for name in PEERS if name in METHODS and name not in ("uniform", "evs")])
def test_what_is_not_finite_comes_last(method: str) -> None:
    # EVS keeps the first frame as it is, by rule, and uniform does not look.
    features, attention = video("scene", 6, 30, 16)
    features[:, 7, 3], features[2:4, 0], attention[1, 4] = torch.nan, torch.inf, torch.nan
    attention[:, 7] = 1
    config = config_of(method, retention_ratio=0.4)
    out = compress(features, attention, config)
    assert_sound(out, features, config)
    assert out.tokens.isfinite().all()


# Each against its definition, in doubles and plain loops


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    lengths = math.sqrt((u @ u) * (v @ v))
    return float(u @ v) / lengths if lengths else 0.0


def dpc_knn(x: list[np.ndarray], num_clusters: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Centers by falling score, and the center of each token."""
    n = len(x)
    apart = [[float(np.linalg.norm(u - v)) / math.sqrt(len(u)) for v in x] for u in x]
    mean = [sum(sorted(d * d for d in row)[:neighbours]) / neighbours for row in apart]
    score = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if (mean[j], j) < (mean[i], i)]
        delta = min(denser) if denser else max(map(max, apart))
        score.append((math.log(delta) if delta else -math.inf) - mean[i])
    centers = sorted(range(n), key=lambda i: (-score[i], i))[:num_clusters]
    return centers, [i if i in centers else min(centers, key=lambda c: (apart[i][c], c)) for i in range(n)]


def shares(num_frames: int, tokens: int) -> list[int]:
    return [tokens * (t + 1) // num_frames - tokens * t // num_frames for t in range(num_frames)]


def slow_evs(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, _ = x.shape
    changed = dict.fromkeys(range(n), math.inf)
    for t in range(1, num_frames):
        changed |= {t * n + j: 1 - cosine(x[t, j], x[t - 1, j]) for j in range(n)}
    return {i: i for i in sorted(changed, key=lambda i: (-changed[i], i))[:tokens]}


def slow_vidcom2(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, d = x.shape
    low = sorted(range(d), key=lambda c: (x[..., c].var(), c))[: d // 2]
    unit = x[..., low] / np.linalg.norm(x[..., low], axis=-1, keepdims=True)

    def alike(u: np.ndarray, center: np.ndarray) -> float:
        return sum(math.exp(-((u - center) ** 2).sum() / (2 * 2.0**k)) for k in range(-3, 2))

    to_video = [[alike(u, unit.mean((0, 1))) for u in frame] for frame in unit]
    score = {
        t * n + j: to_video[t][j] + alike(unit[t, j], unit[t].mean(0)) for t in range(num_frames) for j in range(n)
    }
    weight = [math.exp((min(np.mean(row) for row in to_video) - np.mean(row)) / 0.01) for row in to_video]
    kept: list[int] = []
    for t in range(num_frames):
        scale = tokens / (num_frames * n) * (1 + weight[t] / sum(weight) - 1 / num_frames)
        count = min(n, max(1, round(min(1.0, scale) * n)))
        kept += sorted(range(t * n, t * n + n), key=lambda i: (score[i], i))[:count]
    kept = sorted(kept, key=lambda i: (score[i], i))[:tokens]
    rest = sorted(set(score) - set(kept), key=lambda i: (score[i], i))
    return {i: i for i in kept + rest[: tokens - len(kept)]}


def slow_visionzip(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, _ = x.shape
    went: dict[int, int] = {}
    for t, budget in enumerate(shares(num_frames, tokens)):
        contextual = budget * 10 // 64
        dominant = sorted(range(n), key=lambda j: (-a[t, j], j))[: budget - contextual]
        others = [j for j in range(n) if j not in dominant]
        went |= {t * n + j: t * n + j for j in dominant}
        if contextual:
            targets = others[:: max(1, len(others) // contextual)][:contextual]
            for j in others:
                best = j if j in targets else max(targets, key=lambda i: (cosine(x[t, j], x[t, i]), -i))
                went[t * n + j] = t * n + best
    return went


def slow_fastvid(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    return slow_fastvid_tokens(x, a, tokens)[0]


def slow_fastvid_tokens(x: np.ndarray, a: np.ndarray, tokens: int) -> tuple[dict[int, int], dict[int, np.ndarray]]:
    num_frames, n, d = x.shape
    made: dict[int, np.ndarray] = {}
    frames = x.mean(1)
    near = [cosine(frames[t], frames[t + 1]) for t in range(num_frames - 1)]
    num_cuts = max(sum(s < 0.9 for s in near), min(8, num_frames) - 1)
    cuts = sorted(sorted(range(num_frames - 1), key=lambda t: (near[t], t))[:num_cuts])
    budgets = shares(num_frames, tokens)
    went: dict[int, int] = {}
    for start, stop in itertools.pairwise([0, *(cut + 1 for cut in cuts), num_frames]):
        left, num_context = {}, 0
        for t in range(start, stop):
            context = int(0.4 * budgets[t])
            salient = sorted(range(n), key=lambda j: (-a[t, j], j))[: budgets[t] - context]
            went |= {t * n + j: t * n + j for j in salient}
            left[t] = [t * n + j for j in range(n) if j not in salient]
            num_context += context
        anchor_frames = [t for t in range(start, stop) if (stop - 1 - t) % 4 == 0]
        flat = x.reshape(-1, d)
        every = list(itertools.chain(*left.values()))
        anchors: list[int] = []
        for some in (anchor_frames, [t for t in range(start, stop) if t not in anchor_frames]):
            room = [len(left[t]) for t in some]
            counts = common.spread(min(num_context, sum(room)), room)
            num_context -= sum(counts)
            for t, count in zip(some, counts, strict=True):
                if count:
                    peaks, _ = dpc_knn([flat[i] for i in left[t]], count, min(4, len(left[t])))
                    here = [left[t][peak] for peak in peaks]
                    anchors += here
                    goes = {i: max(here, key=lambda k: (cosine(flat[i], flat[k]), -k)) for i in every}
                    goes |= {k: k for k in here}
                    for k in here:
                        mean = np.mean([flat[i] for i in every if goes[i] == k], axis=0)
                        made[k] = 0.6 * flat[k] + 0.4 * mean
        for i in every:
            if anchors:
                went[i] = i if i in anchors else max(anchors, key=lambda k: (cosine(flat[i], flat[k]), -k))
    return went, made


def slow_prunevid(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, _ = x.shape
    _, cluster = dpc_knn(list(x.mean(1)), max(1, num_frames // 4), min(7, num_frames))
    stop, alike = 0, {}
    bounds = []
    for length in prunevid.segments(cluster):
        start, stop = stop, stop + length
        bounds.append((start, stop))
        for j in range(n):
            pairs = [cosine(x[s, j], x[t, j]) for s in range(start, stop) for t in range(start, s)]
            if pairs and np.mean(pairs) > 0.8:
                alike[start, j] = float(np.mean(pairs))
    length_of = {start: stop - start for start, stop in bounds}
    while num_frames * n - sum(length_of[start] - 1 for start, _ in alike) < tokens:
        del alike[min(alike, key=lambda key: (alike[key], key))]
    groups: list[tuple[int, int, list[int]]] = []
    for start, stop in bounds:
        still = [j for j in range(n) if (start, j) in alike]
        moving = [j for j in range(n) if j not in still]
        groups += [(start, stop, still)] * bool(still)
        groups += [(t, t + 1, moving) for t in range(start, stop) if moving]
    entries, before = sum(len(group[2]) for group in groups), 0
    went: dict[int, int] = {}
    for start, stop, place in groups:
        after = before + len(place)
        count = tokens * after // entries - tokens * before // entries
        before = after
        if count:
            means = [x[start:stop, j].mean(0) for j in place]
            home = list(range(len(place))) if count == len(place) else dpc_knn(means, count, min(7, len(place)))[1]
            for t, i in itertools.product(range(start, stop), range(len(place))):
                went[t * n + place[i]] = start * n + place[home[i]]
    return went


def slow_tome(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    flat = x.reshape(-1, x.shape[-1])
    group = {i: [i] for i in range(len(flat))}
    most = math.ceil((len(flat) - tokens) / 12)
    while len(group) > tokens:
        mean = {i: flat[some].mean(0) for i, some in group.items()}
        unit = {i: u / math.sqrt(u @ u) for i, u in mean.items()}
        left = sorted(group)
        links = []
        for i in left[::2]:
            negative, best = min((-float(unit[i] @ unit[j]), j) for j in left[1::2])
            links.append((negative, i, best))
        for _, i, best in sorted(links)[: min(most, len(group) - tokens, len(left) // 2)]:
            group[best] += group.pop(i)
    return {i: kept for kept, some in group.items() for i in some}


def slow_divprune(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    flat = x.reshape(-1, x.shape[-1])
    every = range(len(flat))
    apart = [[1 - cosine(flat[i], flat[j]) for j in every] for i in every]
    picked: list[int] = []
    while len(picked) < tokens:
        nearest = {
            i: min((apart[i][j] for j in picked or every if j != i), default=0.0) for i in every if i not in picked
        }
        picked.append(max(nearest, key=lambda i: (nearest[i], -i)))
    return {i: i for i in picked}


def slow_uniform(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    stretch = x.shape[0] * x.shape[1] / tokens
    return {i: i for i in (math.floor((k + 0.5) * stretch) for k in range(tokens))}


SLOW: dict[str, Callable[[np.ndarray, np.ndarray, int], dict[int, int]]] = {
    "evs": slow_evs,
    "vidcom2": slow_vidcom2,
    "visionzip": slow_visionzip,
    "fastvid": slow_fastvid,
    "prunevid": slow_prunevid,
    "tome": slow_tome,
    "divprune": slow_divprune,
    "uniform": slow_uniform,
}


def places(out: CompressedVideo) -> list[int]:
    """The source index of the token that each original token went to, or -1."""
    return torch.where(out.assignment >= 0, out.source_index[out.assignment], -1).flatten().tolist()


@pytest.mark.parametrize("kind", ["noise", "slow", "alike"])
@pytest.mark.parametrize("method", [name for name in SLOW if name in METHODS])
def test_against_a_slow_implementation(method: str, kind: str) -> None:
    shapes = [(1, 12, 8), (4, 9, 8), (9, 7, 8), (12, 12, 16), (3, 40, 8), (24, 4, 8)]
    for seed, (num_frames, n, d) in enumerate(shapes):
        features, attention = video("scene" if kind == "slow" else "noise", num_frames, n, d, seed=seed)
        if kind == "slow":  # half of the positions stand still
            features[:, : n // 2] = features[0, : n // 2] + 0.1 * features[:, : n // 2]
        elif kind == "alike":  # all have much in common
            features += 1.5 * features[0, 0]
        total = num_frames * n
        for tokens in {max(1, total * percent // 100) for percent in (5, 25, 45, 80)}:
            config = config_of(method, token_budget=tokens)
            out = compress(features, attention, config)
            assert_sound(out, features, config)
            went = SLOW[method](features.double().numpy(), attention.double().numpy(), tokens)
            assert places(out) == [went.get(i, -1) for i in range(total)], (num_frames, n, tokens)


@pytest.mark.parametrize("method", [name for name in SLOW if name in METHODS and name not in ("tome", "vidcom2")])
def test_ties_go_to_the_lowest_index(method: str) -> None:
    # Four orthogonal vectors: what ties in doubles ties in fp32. Means of ToMe's three and VidCom2's exp() do not.
    for seed, (num_frames, n) in enumerate([(1, 16), (2, 8), (4, 8), (8, 16), (16, 4)]):
        likes = torch.randint(4, (num_frames, n), generator=torch.Generator().manual_seed(seed))
        features, attention = torch.eye(4)[likes], torch.ones(num_frames, n)
        for tokens in {max(1, num_frames * n * percent // 100) for percent in (10, 25, 50, 80)}:
            out = compress(features, attention, config_of(method, token_budget=tokens))
            went = SLOW[method](features.double().numpy(), attention.double().numpy(), tokens)
            assert places(out) == [went.get(i, -1) for i in range(num_frames * n)], (num_frames, n, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [60, 150])
def test_fastvid_merges_into_every_anchor_frame(tokens: int, dtype: torch.dtype) -> None:
    features, attention = video("noise", 16, 20, 16, dtype)
    features = (features + 3 * features[0, 0]).contiguous()  # long segments
    out = compress(features, attention, config_of("fastvid", token_budget=tokens))
    _, made = slow_fastvid_tokens(features.double().numpy(), attention.double().numpy(), tokens)
    assert made
    for row, index in enumerate(out.source_index.tolist()):
        expected = torch.from_numpy(made.get(index, features.flatten(0, 1)[index].double().numpy()))
        rounded = torch.finfo(dtype).eps
        torch.testing.assert_close(out.tokens[row].double(), expected, rtol=rounded, atol=1e-5)


@pytest.mark.parametrize("method", ABLATIONS)
def test_an_ablation_is_flashvid_with_its_setting(method: str) -> None:
    features, attention = video("noise", 12, 20, 16)
    features = torch.stack([features[0].roll(t, 0) + 0.1 * frame for t, frame in enumerate(features)])  # it moves
    by_setting: Any = {"retention_ratio": 0.3, "backend": "torch", **ABLATIONS[method]}
    out = compress(features, attention, config_of(method, retention_ratio=0.3))
    assert same(out, compress(features, attention, FlashVidConfig(**by_setting)))
    assert not same(out, compress(features, attention, config_of("flashvid", retention_ratio=0.3)))


# Against vLLM's own masks


@needs_vllm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.25, 0.5, 0.9])
def test_evs_is_vllms_at_the_same_count(ratio: float, dtype: torch.dtype) -> None:
    from vllm.multimodal.video_prune import evs

    for seed in range(4):
        features, attention = video("scene", 12, 36, 64, dtype, seed)
        out = compress(features, attention, config_of("evs", retention_ratio=ratio))
        mask = evs.compute_retention_mask(features.flatten(0, 1), (12, 12, 12), 2, 1 - ratio)
        assert abs(int(mask.sum()) - len(out.tokens)) <= 1  # vLLM's int() of a product of doubles
        if mask.sum() == len(out.tokens):
            assert torch.equal(out.source_index, mask.nonzero().flatten())
    # fewer than a frame: vLLM keeps the first frame whole, its first of equals are ours
    out = compress(features, attention, config_of("evs", token_budget=20))
    assert out.source_index.tolist() == list(range(20))
    assert evs.compute_retention_mask(features.flatten(0, 1), (12, 12, 12), 2, 1 - 20 / 432)[:36].all()


@needs_vllm
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.25, 0.5, 0.9])
def test_vidcom2_is_vllms_at_the_same_count(ratio: float) -> None:
    # In fp32: 16-bit scores are full of ties, which vLLM's topk leaves open. At the rate of that count: vLLM's
    # frames share by its rate, ours by B, and floor(R*T*N) is not quite R*T*N.
    from vllm.multimodal.video_prune import vidcom2

    from flashvid_vllm.methods.evs import pruning_rate

    for kind, n, seed in itertools.product(("scene", "noise"), (36, 41), range(3)):
        features, attention = video(kind, 12, n, 64, seed=seed)
        out = compress(features, attention, config_of("vidcom2", retention_ratio=ratio))
        rate = pruning_rate(len(out.tokens), 12 * n)
        mask = vidcom2.compute_retention_mask(features.flatten(0, 1), (12, 1, n), 1, rate)
        assert torch.equal(out.source_index, mask.nonzero().flatten())
    features, attention = video("scene", 10, 40, 64)
    out = compress(features, attention, config_of("vidcom2", retention_ratio=ratio))
    mask = vidcom2.compute_retention_mask(features.flatten(0, 1), (10, 10, 16), 2, 1 - ratio)
    if mask.sum() == len(out.tokens):
        assert torch.equal(out.source_index, mask.nonzero().flatten())


@needs_vllm
@given(st.integers(1, 10**6), st.integers(2, 10**6))
def test_the_rate_at_which_vllm_keeps_so_many(kept: int, total: int) -> None:
    from flashvid_vllm.methods.evs import pruning_rate

    kept = min(kept, total - 1)
    rate = pruning_rate(kept, total)
    assert int(total * (1 - rate)) == kept
    assert rate == pytest.approx(1 - kept / total)


@pytest.mark.parametrize("method", VLLMS)
def test_without_vllm_its_methods_say_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vllm", "vllm.multimodal", "vllm.multimodal.video_prune"):
        monkeypatch.setitem(sys.modules, module, None)
    features, attention = video("scene", 3, 9, 8)
    with pytest.raises(ValueError, match=f"method='{method}' calls vLLM's own functions; install vllm"):
        compress(features, attention, config_of(method, retention_ratio=0.5))


# Pieces


@pytest.mark.parametrize(
    ("label", "lengths"),
    [
        ([0], [1]),
        ([0, 1, 2], [3]),  # nothing longer than a frame: all one
        ([0, 0, 1, 1, 1], [2, 3]),
        ([0, 0, 1, 0, 0], [5]),  # what lies between two runs of a cluster joins them
        ([0, 0, 1, 2, 2, 2], [2, 4]),  # the longer neighbour
        ([0, 0, 1, 2, 2], [3, 2]),  # the earlier of equals
        ([1, 0, 0, 0, 2], [5]),
        ([0, 0, 0, 1, 1, 0, 0, 2, 2, 2], [3, 2, 5]),  # a shorter run of a cluster is up for grabs
    ],
)
def test_segments_of_frame_clusters(label: list[int], lengths: list[int]) -> None:
    assert prunevid.segments(label) == lengths


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_spread(room: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(room)))
    out = common.spread(total, room)
    assert sum(out) == total
    assert all(0 <= got <= most for got, most in zip(out, room, strict=True))
    below = [got for got, most in zip(out, room, strict=True) if got < most]
    assert max(out) - min(below, default=max(out)) <= 1  # equal but for what is full


@pytest.mark.parametrize("method", ["tome", "divprune"])
def test_long_videos_are_taken_in_stretches(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, attention = video("scene", 10, 8, 16)
    config = config_of(method, token_budget=20)
    monkeypatch.setattr(f"flashvid_vllm.methods.{method}.MOST_TOKENS", 45)
    out = compress(features, attention, config)
    halves = [compress(half, None, config_of(method, token_budget=10)) for half in features.split(5)]
    assert_close(out.tokens, torch.cat([half.tokens for half in halves]))
    assert out.source_index.tolist() == [40 * i + j for i in (0, 1) for j in halves[i].source_index.tolist()]
    monkeypatch.setattr(f"flashvid_vllm.methods.{method}.MOST_TOKENS", 1)  # never less than a frame
    assert_sound(compress(features, attention, config), features, config)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 400), st.integers(1, 2000))
def test_windows_cover_the_video(num_frames: int, n: int, most: int, tokens: int) -> None:
    budget = plan(num_frames, n, FlashVidConfig(token_budget=tokens))
    found = common.windows(budget, most)
    assert [start for start, _, _ in found] + [num_frames] == [0] + [stop for _, stop, _ in found]
    assert sum(kept for _, _, kept in found) == budget.tokens
    for start, stop, kept in found:
        assert kept <= (stop - start) * n <= max(most, n)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_most_similar_takes_more_targets_than_tokens(backend: str) -> None:
    features, _ = video("noise", 2, 30, 16)
    targets = features[1, :, :].clone()
    similarity, index = common.most_similar(features[:, :7], targets, backend)
    expected = torch.nn.functional.cosine_similarity(features[:, :7, None], targets, dim=-1).max(-1)
    assert torch.equal(index, expected.indices)
    assert_close(similarity, expected.values)
    tied = torch.ones(1, 2, 4)
    assert common.most_similar(tied, torch.ones(5, 4), backend)[1].tolist() == [[0, 0]]
    lost = torch.full((1, 1, 4), torch.nan)
    assert [x.tolist() for x in common.most_similar(lost, torch.ones(2, 4), backend)] == [[[-1.0]], [[-1]]]


# Attention, settings


@pytest.mark.parametrize("method", METHODS)
def test_attention_may_be_missing_where_it_is_not_read(method: str) -> None:
    features, attention = video("scene", 4, 20, 8)
    config = config_of(method, retention_ratio=0.4)
    assert config.needs_attention == (method in ("flashvid", "ttm", "adts", "visionzip", "fastvid"))
    if config.needs_attention:
        name = "method" if method in PEERS else "selection"
        with pytest.raises(ValueError, match=rf"{name}='\w+' needs attention \[T, N\], got None"):
            compress(features, None, config)
    else:
        for backend in ("auto", "torch"):
            config = config_of(method, backend, retention_ratio=0.4)
            assert same(compress(features, None, config), compress(features, attention, config))


@pytest.mark.parametrize("method", get_args(Method))
def test_the_settings_of_every_method_fit_the_row_that_carries_them(method: str) -> None:
    extremes: Any = {"retention_ratio": 0.1 + 0.2, "method": method, "backend": "native"}
    if method not in PEERS:
        extremes |= {"merge_threshold": -0.1 - 0.2, "segment_threshold": -0.1 - 0.2, "min_segments": 2**31 - 1}
        if "alpha" not in ABLATIONS.get(method, {}):
            extremes["alpha"] = 0.1 + 0.2
    config = FlashVidConfig(**extremes)
    assert len(json.dumps(config.to_dict())) <= 512
    assert FlashVidConfig(**json.loads(json.dumps(config.to_dict()))) == config
