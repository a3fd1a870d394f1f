// SPDX-License-Identifier: MIT
#include "cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace flashvid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsAtATime = 15;      // of direct distances: whole tiles of 3 and of 5 rows
constexpr int64_t kRowsOfProducts = 512;  // each block of them packs all columns once more

// m of each row: the mean of its k smallest squared distances.
void measure_sparsity(const Kernels& kernels, const float* distance, int64_t n, int64_t k, float* sparsity) {
  if (k <= kMostSmallest) return kernels.smallest_squares(distance, n, k, sparsity);
  std::vector<float> smallest(static_cast<size_t>(k));
  for (int64_t i = 0; i < n; ++i) {
    const float* row = distance + i * n;
    std::partial_sort_copy(row, row + n, smallest.begin(), smallest.end());
    float total = 0;
    for (const float value : smallest) total += value * value;
    sparsity[i] = total / static_cast<float>(k);
  }
}

bool is_finite(const Kernels& kernels, const float* row, int64_t channels) {
  if (std::isfinite(kernels.sum_squares(row, Dtype::kFloat32, channels))) return true;
  return std::all_of(row, row + channels, [](float value) { return std::isfinite(value); });
}

}  // namespace

ClusterWorkspace::ClusterWorkspace(int64_t rows, int64_t channels)
    : kernels_(kernels()),
      channels_(channels),
      depth_(round_up(channels, kDepthMultiple)),
      wide_rows_(rows * depth_),
      distance_(rows * rows),
      products_(kernels_.splits_f32 ? round_up(2 * rows, kTile) * round_up(rows, kTile) : 0),
      parts_(kernels_.splits_f32 ? 2 * rows * depth_ : 0),
      is_wide_(rows),
      finite_(rows) {}

ClusterWorkspace::Row ClusterWorkspace::row(int64_t i) const {
  if (group_size(i) == 1) return {video_->row(member_[first_[i]]), video_->dtype};
  return {wide_rows_.data() + i * depth_, Dtype::kFloat32};
}

const float* ClusterWorkspace::wide_row(int64_t i) {
  float* out = wide_rows_.data() + i * depth_;
  if (!is_wide_[i]) {
    kernels_.mean_rows(video_->features, video_->dtype, channels_, member_ + first_[i], group_size(i), channels_, out);
    std::fill(out + channels_, out + depth_, 0.0f);
    is_wide_[i] = true;
  }
  return out;
}

void ClusterWorkspace::add_row(int64_t i, float* total) const {
  const Row from = row(i);
  kernels_.add_row(from.data, from.dtype, channels_, total);
}

void ClusterWorkspace::measure(int64_t n, const float* center, int threads) {
  parallel_for(n, threads, [&](int64_t i, int) {
    is_wide_[i] = false;
    if (group_size(i) > 1) wide_row(i);
  });
  if (kernels_.splits_f32 && measure_by_products(n, center, threads)) return;
  parallel_for(n, threads, [&](int64_t i, int) {
    const float* wide = wide_row(i);
    finite_[i] = is_finite(kernels_, wide, channels_);
  });
  parallel_for((n + kRowsAtATime - 1) / kRowsAtATime, threads, [&](int64_t block, int) {
    const int64_t from = block * kRowsAtATime;
    kernels_.squared_distances(wide_rows_.data(), n, depth_, from, std::min(n, from + kRowsAtATime), distance_.data(),
                               n);
  });
}

// |u - v|^2 = |u|^2 + |v|^2 - 2<u, v> from a center, which distances do not see but rounding does.
// Rows are split into two bf16 parts that hold 16 bits of each value; the product of the low ones is left
// out. That is within 3e-6 of a distance that is not small beside the norms; the others are measured directly.
// False if those are too many for this to be faster, or if values do not fit.
bool ClusterWorkspace::measure_by_products(int64_t n, const float* center, int threads) {
  constexpr float kSmallest = 1e-20f, kLargest = 1e30f, kSmall = 0.25f;
  parallel_for(n, threads, [&](int64_t i, int) {
    const Row from = row(i);
    Bfloat* high = parts_.data() + i * depth_;
    Bfloat* low = high + n * depth_;
    finite_[i] = std::isfinite(kernels_.split(from.data, from.dtype, center, channels_, depth_, high, low));
  });
  if (!std::all_of(finite_.data(), finite_.data() + n, [](bool finite) { return finite; })) return false;
  // Both parts with the high ones, of which those among themselves are needed once.
  const int64_t stride = round_up(n, kTile);
  parallel_for((2 * n + kRowsOfProducts - 1) / kRowsOfProducts, threads, [&](int64_t block, int) {
    const int64_t first = block * kRowsOfProducts, count = std::min(kRowsOfProducts, 2 * n - first);
    const int64_t triangle = std::clamp<int64_t>(n - first, 0, count);
    Buffer<char> workspace(kernels_.workspace_bytes(n, depth_));
    kernels_.inner_bf16(parts_.data() + first * depth_, count, parts_.data(), n, depth_, depth_,
                        products_.data() + first * stride, stride, triangle, workspace.data());
  });
  const float* high = products_.data();
  const float* low = high + n * stride;
  const auto product = [=](int64_t i, int64_t j) {
    return high[i * stride + j] + (low[i * stride + j] + low[j * stride + i]);
  };
  std::vector<float> squares(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const float square = squares[static_cast<size_t>(i)] = product(i, i);
    if (!(square > kSmallest && square < kLargest)) return false;
  }
  int64_t small = 0;
  for (int64_t i = 0; i < n; ++i) {
    float* out = distance_.data() + i * n;
    for (int64_t j = i + 1; j < n; ++j) {
      const float norms = squares[static_cast<size_t>(i)] + squares[static_cast<size_t>(j)];
      out[j] = norms - 2 * product(i, j);
      small += out[j] < kSmall * norms;
    }
  }
  if (small > n * (n - 1) / 16) return false;
  if (small == 0) return true;
  for (int64_t i = 0; i < n; ++i) {
    float* out = distance_.data() + i * n;
    for (int64_t j = i + 1; j < n; ++j) {
      const float norms = squares[static_cast<size_t>(i)] + squares[static_cast<size_t>(j)];
      if (out[j] < kSmall * norms) out[j] = kernels_.squared_distance(wide_row(i), wide_row(j), depth_);
    }
  }
  return true;
}

// From squares of one half of the matrix to all distances.
void ClusterWorkspace::complete(int64_t n) {
  float* distance = distance_.data();
  const float scale = std::sqrt(static_cast<float>(channels_));
  for (int64_t i = 0; i < n; ++i) {
    distance[i * n + i] = finite_[i] ? 0.0f : kInfinity;
    for (int64_t j = i + 1; j < n; ++j) {
      const float value = std::sqrt(distance[i * n + j]) / scale;
      distance[i * n + j] = value < kInfinity ? value : kInfinity;  // NaN too
    }
  }
  constexpr int64_t kBlock = 16;  // so that the lines read stay in the cache until all of them is
  for (int64_t from = 0; from < n; from += kBlock) {
    for (int64_t i = from; i < n; ++i) {
      for (int64_t j = from; j < std::min(from + kBlock, i); ++j) distance[i * n + j] = distance[j * n + i];
    }
  }
}

void ClusterWorkspace::cluster(const Video& video, const Groups& groups, int64_t first, int64_t n, const float* center,
                               int64_t num_clusters, int64_t k, int64_t* centers, int64_t* assignment, int threads) {
  video_ = &video;
  first_ = groups.first.data() + first;
  member_ = groups.member.data();
  measure(n, center, threads);
  complete(n);
  const float* distance = distance_.data();
  std::vector<float> sparsity(static_cast<size_t>(n)), score(static_cast<size_t>(n));
  measure_sparsity(kernels_, distance, n, k, sparsity.data());
  const float* m = sparsity.data();

  const int64_t densest = std::min_element(m, m + n) - m;
  for (int64_t i = 0; i < n; ++i) {
    const float delta = i == densest ? kernels_.largest(distance, n * n)
                                     : kernels_.nearest_denser(distance + i * n, m, n, i);
    const float value = std::log(delta) - m[i];
    score[static_cast<size_t>(i)] = std::isnan(value) ? -kInfinity : value;
  }

  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
  });
  std::copy_n(order.begin(), num_clusters, centers);

  std::iota(order.begin(), order.begin() + num_clusters, 0);  // clusters by the index of their centre
  std::sort(order.begin(), order.begin() + num_clusters, [&](int64_t a, int64_t b) { return centers[a] < centers[b]; });
  for (int64_t i = 0; i < n; ++i) {
    int64_t nearest = order[0];
    for (int64_t c = 1; c < num_clusters; ++c) {
      const int64_t candidate = order[static_cast<size_t>(c)];
      if (distance[i * n + centers[candidate]] < distance[i * n + centers[nearest]]) nearest = candidate;
    }
    assignment[i] = nearest;
  }
  for (int64_t c = 0; c < num_clusters; ++c) assignment[centers[c]] = c;  // even if another is a duplicate
}

void cluster_tokens(const void* x, Dtype dtype, int64_t n, int64_t channels, int64_t num_clusters, int64_t k,
                    int64_t* centers, int64_t* assignment, int threads) {
  const Kernels& use = kernels();
  const Video rows{x, dtype, 1, n, channels};
  Groups groups;  // each row is one
  groups.first.resize(static_cast<size_t>(n) + 1);
  std::iota(groups.first.begin(), groups.first.end(), 0);
  groups.member.assign(groups.first.begin(), groups.first.end() - 1);
  Buffer<float> mean(channels);
  std::fill_n(mean.data(), channels, 0.0f);
  for (int64_t i = 0; i < n; ++i) use.add_row(rows.row(i), dtype, channels, mean.data());
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<float>(n);
  ClusterWorkspace(n, channels).cluster(rows, groups, 0, n, mean.data(), num_clusters, k, centers, assignment, threads);
}

}  // namespace flashvid
