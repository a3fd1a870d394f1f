# SPDX-License-Identifier: MIT
"""The peers' methods by their definitions, in doubles and plain loops: features [T, N, D], attention [T, N] and a
budget -> the token that each token which is kept, or merged into a kept one, went to."""

import itertools
import math
from collections.abc import Callable

import numpy as np

from flashvid_vllm.core.methods import common, prunevid  # two pieces with tests of their own: spread, segments


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


def largest_remainders(wanted: list[float], tokens: int, most: int) -> list[int]:
    """One token after the other: the frame with the largest rest first, and of those that are full the next."""
    out = [min(most, math.floor(share + 1e-6)) for share in wanted]
    rest = [round((share - math.floor(share + 1e-6)) / 1e-6) for share in wanted]
    while sum(out) < tokens:
        for t in sorted(range(len(out)), key=lambda t: (-rest[t], t)):
            if out[t] < most and sum(out) < tokens:
                out[t] += 1
    return out


def slow_vcast(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, _ = x.shape
    path = [u / math.sqrt(u @ u) for u in x.mean(1)]
    curvature = [1.0] * num_frames
    for t in range(1, num_frames - 1):
        curvature[t] = 1 - cosine(path[t] - path[t - 1], path[t + 1] - path[t])
    weight = [math.exp(c / 0.7) for c in curvature]
    base = int(tokens >= num_frames)
    wanted = [base + w / sum(weight) * (tokens - base * num_frames) for w in weight]
    went: dict[int, int] = {}
    for t, count in enumerate(largest_remainders(wanted, tokens, n)):
        length = [math.sqrt(u @ u) for u in x[t]]
        spread = max(length) - min(length) + 1e-6
        score = [1 - cosine(x[t, j], path[t]) + (length[j] - min(length)) / spread for j in range(n)]
        best = sorted(range(n), key=lambda j: (-round(score[j] / 1e-6), j))[:count]
        went |= {t * n + j: t * n + j for j in best}
    return went


def slow_gleanvid(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, d = x.shape
    side = math.isqrt(n)
    square = side * side == n
    place = [(j // side // 2, j % side // 2) if square else (j // 4, 0) for j in range(n)]
    cell = {c: [j for j in range(n) if place[j] == c] for c in place}
    mean = x.mean((0, 1))
    shared = np.linalg.svd((x - mean).reshape(-1, d), full_matrices=False)[2][0]
    plain = x - ((x - mean) @ shared)[..., None] * shared

    novelty = []
    for t in range(num_frames):
        of_cell = {}
        for c, members in cell.items():
            z = plain[t, members].mean(0)
            left = z @ z
            if t:
                history = np.stack([plain[s, members].mean(0) for s in range(max(0, t - 64), t)])
                gram = history @ history.T
                gram = gram + np.eye(len(gram)) * 1e-4 * np.trace(gram) / len(gram)
                left -= (history @ z) @ np.linalg.inv(gram) @ (history @ z)
            of_cell[c] = math.sqrt(left) if left > 1e-12 * (z @ z) else 0.0
        novelty.append(sum(of_cell[place[j]] for j in range(n)))
    apart = sum(abs(r - s) for r in novelty for s in novelty)
    gini = apart / (2 * num_frames * sum(novelty))  # half of the relative mean absolute difference
    alike = 0.6 - 0.4 * gini
    wanted = [tokens * (alike / num_frames + (1 - alike) * r / sum(novelty)) for r in novelty]

    def scaled(values: list[float]) -> list[float]:
        least, most = min(values), max(values)
        return [(v - least) / (most - least) if most - least > 1e-6 * most else 0.0 for v in values]

    went: dict[int, int] = {}
    kept: list[np.ndarray] = []
    for t, count in enumerate(largest_remainders(wanted, tokens, n)):
        local, beside = [], []
        for j in range(n):
            nearer = cosine(x[t, j], x[t, cell[place[j]]].mean(0)) - cosine(x[t, j], x[t].mean(0))
            local.append(math.log1p(math.exp(4 * nearer)) / 4)
            u = plain[t, j]
            left = u
            if kept:
                span = np.stack(kept, 1)
                left = u - span @ np.linalg.lstsq(span, u, rcond=1e-8)[0]
            length = math.sqrt(left @ left)
            beside.append(length if length > 1e-6 * math.sqrt(u @ u) else 0.0)
        score = [u + v for u, v in zip(scaled(local), scaled(beside), strict=True)]
        best = sorted(range(n), key=lambda j: (-round(score[j] / 1e-6), j))[:count]
        went |= {t * n + j: t * n + j for j in best}
        kept += [plain[t, j] for j in best]
    return went


def slow_adaptive(x: np.ndarray, a: np.ndarray, tokens: int) -> dict[int, int]:
    num_frames, n, _ = x.shape

    def steps(similarity: float) -> int:
        return round((1 - similarity) / 1e-5)

    picks: list[tuple[float, int, int, int]] = []  # residual, its negative first; frame, how many before it, token
    changed: dict[int, int] = {}
    for t in range(num_frames):
        left = {j: steps(cosine(x[t, j], x[t - 1, j])) for j in range(n)}
        if not t:
            left = {j: steps(-float(np.mean([cosine(x[0, j], x[0, i]) for i in range(n)]))) for j in range(n)}
        changed |= {t * n + j: left[j] for j in left}
        apart = [1 - cosine(x[t, i], x[t, j]) for i in range(n) for j in range(n)]
        left = {j: max(most, round(0.7 * float(np.mean(apart)) / 1e-5)) for j, most in left.items()}
        for k in range(n):
            best = min(left, key=lambda j: (-left[j], j))
            residual = left.pop(best)
            picks.append((-residual if t or k else -math.inf, t, k, best))
            left = {j: min(most, steps(cosine(x[t, j], x[t, best]))) for j, most in left.items()}
    kept = {(t, j) for _, t, _, j in sorted(picks)[:tokens]}
    went: dict[int, int] = {}
    for t, j in itertools.product(range(num_frames), range(n)):
        near = sorted((steps(cosine(x[t, j], x[t, i])), i) for s, i in kept if s == t)
        before = went.get((t - 1) * n + j) if t else None
        if (t, j) in kept:
            went[t * n + j] = t * n + j
        elif before is not None and (not near or changed[t * n + j] <= near[0][0]):
            went[t * n + j] = before
        elif near:
            went[t * n + j] = t * n + near[0][1]
    return went


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
    "vcast": slow_vcast,
    "gleanvid": slow_gleanvid,
    "adaptive": slow_adaptive,
    "uniform": slow_uniform,
}
