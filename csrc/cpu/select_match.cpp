// SPDX-License-Identifier: MIT
#include "select_match.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace flashvid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowestScore = std::numeric_limits<float>::lowest();  // of a score that is not finite

}  // namespace

void select_frame(const Kernels& kernels, float* products, int64_t stride, int64_t n, const float* inverse_norms,
                  const float* weight, int64_t k, uint8_t* picked, float* nearest) {
  std::fill_n(nearest, n, kInfinity);
  std::fill_n(picked, n, uint8_t{0});
  for (int64_t i = 0; i < n; ++i) {
    const float own = kernels.cosine_distances(products + i * stride + i + 1, n - i - 1, inverse_norms[i],
                                               inverse_norms + i + 1, nearest + i + 1);
    nearest[i] = std::min(nearest[i], own);
  }
  for (int64_t step = 0; step < k; ++step) {
    int64_t choice = -1;
    float best = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (picked[j]) continue;
      float score = weight == nullptr ? nearest[j] : weight[j] * nearest[j];
      if (!std::isfinite(score)) score = kLowestScore;
      if (choice < 0 || score > best) choice = j, best = score;
    }
    picked[choice] = 1;
    // To any other token at first, to any picked one from then on.
    if (step == 0) std::fill_n(nearest, n, kInfinity);
    for (int64_t j = 0; j < choice; ++j) nearest[j] = std::min(nearest[j], products[j * stride + choice]);
    for (int64_t j = choice + 1; j < n; ++j) nearest[j] = std::min(nearest[j], products[choice * stride + j]);
  }
}

void select_highest(const float* attention, int64_t n, int64_t k, uint8_t* picked) {
  std::fill_n(picked, n, uint8_t{0});
  if (k == 0) return;
  const auto score = [=](int64_t i) { return std::isfinite(attention[i]) ? attention[i] : -kInfinity; };
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score(a) > score(b); });
  for (int64_t i = 0; i < k; ++i) picked[order[static_cast<size_t>(i)]] = 1;
}

void select_tokens(const Video& video, const float* weight, int64_t k, int64_t* index, int threads) {
  if (k == 0) return;
  struct Workspace {
    Workspace(const Video& video, const Kernels& kernels)
        : products(video, kernels), nearest(video.n), picked(video.n) {}
    FrameProducts products;
    Buffer<float> nearest;
    Buffer<uint8_t> picked;
  };
  const Kernels& use = kernels();
  const Norms norms = measure(video, threads);
  auto all = workspaces<Workspace>(video.num_frames, threads, video, use);
  parallel_for(video.num_frames, threads, [&](int64_t t, int thread) {
    Workspace& mine = all[static_cast<size_t>(thread)];
    mine.products.compute(norms, t, true, false);
    select_frame(use, mine.products.gram(), mine.products.stride(), video.n, norms.inverse.data() + t * video.n,
                 weight == nullptr ? nullptr : weight + t * video.n, k, mine.picked.data(), mine.nearest.data());
    int64_t* out = index + t * k;
    for (int64_t j = 0; j < video.n; ++j) {
      if (mine.picked[j]) *out++ = j;
    }
  });
}

void match_frame(const Kernels& kernels, const Video& video, const Norms& norms, const float* products, int64_t stride,
                 int64_t t, const uint8_t* candidate, float* similarity, int64_t* best, int32_t* mask) {
  const int64_t n = video.n, here = t * n, next = here + n;
  const bool regular = norms.regular_pair(t);
  const float* columns = regular ? norms.inverse.data() + here : norms.ones.data();
  const float* rows = regular ? norms.inverse.data() + next : norms.ones.data();
  for (int64_t j = 0; j < n; ++j) mask[j] = candidate[here + j];
  for (int64_t i = 0; i < n; ++i) {
    int32_t position;
    const float highest = kernels.best_match(products + i * stride, n, columns, mask, &position);
    similarity[next + i] = highest == -kInfinity ? highest : highest * rows[i];
    best[next + i] = position;
  }
}

void match_position(const Kernels& kernels, const Video& video, const Norms& norms, int64_t t,
                    const uint8_t* candidate, float* similarity, int64_t* best) {
  const int64_t n = video.n, here = t * n, next = here + n;
  const bool regular = norms.regular_pair(t);
  std::vector<float> pair(static_cast<size_t>(regular ? 0 : 2 * video.channels));
  for (int64_t i = 0; i < n; ++i) {
    const void* rows[2] = {video.row(here + i), video.row(next + i)};
    float cosine;
    if (regular) {
      cosine = kernels.dot_rows(rows[1], rows[0], video.dtype, video.channels) * norms.inverse[here + i] *
               norms.inverse[next + i];
    } else {
      for (int64_t r = 0; r < 2; ++r) {
        kernels.widen(rows[r], video.dtype, video.channels, pair.data() + r * video.channels);
        make_unit(kernels, pair.data() + r * video.channels, video.channels);
      }
      cosine = kernels.dot(pair.data(), Dtype::kFloat32, video.channels, pair.data() + video.channels);
    }
    similarity[next + i] = candidate[here + i] && std::isfinite(cosine) ? cosine : -kInfinity;
    best[next + i] = i;
  }
}

void keep_links(int64_t n, int64_t t, const uint8_t* candidate, const int64_t* segment_id, float threshold,
                float* similarity, int64_t* best) {
  const bool same_segment = t > 0 && segment_id[t] == segment_id[t - 1];
  for (int64_t token = t * n; token < (t + 1) * n; ++token) {
    const bool linkable = same_segment && candidate[token] && similarity[token] > -kInfinity;
    if (!linkable) similarity[token] = -1;
    if (!linkable || !(similarity[token] > threshold)) best[token] = -1;
  }
}

void match_tokens(const Video& video, const uint8_t* candidate, const int64_t* segment_id, float threshold,
                  bool by_position, float* similarity, int64_t* parent, int threads) {
  struct Workspace {
    Workspace(const Video& video, const Kernels& kernels) : products(video, kernels), mask(video.n) {}
    FrameProducts products;
    Buffer<int32_t> mask;
  };
  const Kernels& use = kernels();
  const Norms norms = measure(video, threads);
  auto all = workspaces<Workspace>(by_position ? 1 : video.num_frames, threads, video, use);
  parallel_for(video.num_frames, threads, [&](int64_t t, int thread) {
    const bool same_segment = t > 0 && segment_id[t] == segment_id[t - 1];
    if (same_segment && by_position) {
      match_position(use, video, norms, t - 1, candidate, similarity, parent);
    } else if (same_segment) {
      Workspace& mine = all[static_cast<size_t>(thread)];
      mine.products.compute(norms, t - 1, false, true);
      match_frame(use, video, norms, mine.products.cross(), mine.products.stride(), t - 1, candidate, similarity,
                  parent, mine.mask.data());
    }
    keep_links(video.n, t, candidate, segment_id, threshold, similarity, parent);
  });
}

}  // namespace flashvid
