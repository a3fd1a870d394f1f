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
constexpr int64_t kRowsOfProducts = 256;  // each block of them packs all columns once more

// m of each row: the mean of its k smallest squared distances.
void measure_sparsity(const float* distance, int64_t n, int64_t k, float* sparsity) {
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
      rows_(rows * depth_),
      distance_(rows * rows),
      mean_(depth_),
      products_(kernels_.splits_f32 ? round_up(rows, kTile) * round_up(2 * rows, kTile) : 0),
      parts_(kernels_.splits_f32 ? 2 * rows * depth_ : 0),
      finite_(rows) {}

void ClusterWorkspace::measure(int64_t n, int threads) {
  parallel_for(n, threads, [&](int64_t i, int) {
    std::fill(row(i) + channels_, row(i) + depth_, 0.0f);
    finite_[i] = is_finite(kernels_, row(i), channels_);
  });
  if (kernels_.splits_f32 && measure_by_products(n, threads)) return;
  parallel_for((n + kRowsAtATime - 1) / kRowsAtATime, threads, [&](int64_t block, int) {
    const int64_t first = block * kRowsAtATime;
    kernels_.squared_distances(rows(), n, depth_, first, std::min(n, first + kRowsAtATime), distance_.data(), n);
  });
}

// |u - v|^2 = |u|^2 + |v|^2 - 2<u, v> from the frame's mean, which distances do not see but rounding does.
// Rows are split into two bf16 parts that hold 16 bits of each value; the product of the low ones is left
// out. That is within 3e-6 of a distance that is not small beside the norms; the others are measured directly.
// False if those are too many for this to be faster, or if values do not fit.
bool ClusterWorkspace::measure_by_products(int64_t n, int threads) {
  constexpr float kSmallest = 1e-20f, kLargest = 1e30f, kSmall = 0.25f;
  if (!std::all_of(finite_.data(), finite_.data() + n, [](bool finite) { return finite; })) return false;
  std::fill_n(mean_.data(), depth_, 0.0f);
  for (int64_t i = 0; i < n; ++i) kernels_.add_row(row(i), Dtype::kFloat32, depth_, mean_.data());
  for (int64_t c = 0; c < depth_; ++c) mean_[c] /= static_cast<float>(n);
  parallel_for(n, threads, [&](int64_t i, int) {
    kernels_.split(row(i), mean_.data(), depth_, parts_.data() + i * depth_, parts_.data() + (n + i) * depth_);
  });
  const int64_t stride = round_up(2 * n, kTile);
  parallel_for((n + kRowsOfProducts - 1) / kRowsOfProducts, threads, [&](int64_t block, int) {
    const int64_t first = block * kRowsOfProducts, count = std::min(kRowsOfProducts, n - first);
    Buffer<char> workspace(kernels_.workspace_bytes(2 * n, depth_));
    kernels_.inner_bf16(parts_.data() + first * depth_, count, parts_.data(), 2 * n, depth_, depth_,
                        products_.data() + first * stride, stride, 0, workspace.data());
  });
  const float* all = products_.data();
  const auto product = [=](int64_t i, int64_t j) {
    return all[i * stride + j] + (all[i * stride + n + j] + all[j * stride + n + i]);
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
      if (out[j] < kSmall * norms) out[j] = kernels_.squared_distance(row(i), row(j), depth_);
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

void ClusterWorkspace::cluster(int64_t n, int64_t num_clusters, int64_t k, int64_t* centers, int64_t* assignment,
                               int threads) {
  measure(n, threads);
  complete(n);
  const float* distance = distance_.data();
  std::vector<float> sparsity(static_cast<size_t>(n)), score(static_cast<size_t>(n));
  measure_sparsity(distance, n, k, sparsity.data());
  const float* m = sparsity.data();

  float largest = 0;
  for (int64_t i = 0; i < n * n; ++i) largest = distance[i] > largest ? distance[i] : largest;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = distance + i * n;
    bool any = false;
    float delta = kInfinity;
    for (int64_t j = 0; j < n; ++j) {
      const bool denser = m[j] < m[i] || (m[j] == m[i] && j < i);
      any |= denser;
      delta = denser && row[j] < delta ? row[j] : delta;
    }
    const float value = std::log(any ? delta : largest) - m[i];
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
  ClusterWorkspace workspace(n, channels);
  parallel_for(n, threads, [&](int64_t i, int) {
    const char* row = static_cast<const char*>(x) + i * channels * bytes_of(dtype);
    kernels().widen(row, dtype, channels, workspace.row(i));
  });
  workspace.cluster(n, num_clusters, k, centers, assignment, threads);
}

}  // namespace flashvid
