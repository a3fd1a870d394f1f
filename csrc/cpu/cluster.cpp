// SPDX-License-Identifier: MIT
// DPC-kNN in the order of Sec. 4: m, delta, centres, and who joins them. The distances are in distances.cpp.
#include "cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "distances.h"

namespace flashvid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// m: the mean of the k smallest squared distances of each row, its own to itself included.
std::vector<float> measure_sparsity(const Kernels& kernels, const float* distance, int64_t n, int64_t k) {
  std::vector<float> sparsity(static_cast<size_t>(n));
  if (k <= kMostSmallest) {
    kernels.smallest_squares(distance, n, k, sparsity.data());
    return sparsity;
  }
  std::vector<float> smallest(static_cast<size_t>(k));
  for (int64_t i = 0; i < n; ++i) {
    const float* row = distance + i * n;
    std::partial_sort_copy(row, row + n, smallest.begin(), smallest.end());
    float total = 0;
    for (const float value : smallest) total += value * value;
    sparsity[static_cast<size_t>(i)] = total / static_cast<float>(k);
  }
  return sparsity;
}

// log(delta) - m, delta the distance to the nearest denser row: of smaller m, or of the same and a lower index. The
// densest has the largest distance of all.
std::vector<float> measure_score(const Kernels& kernels, const float* distance, int64_t n, const float* m) {
  std::vector<float> score(static_cast<size_t>(n));
  const int64_t densest = std::min_element(m, m + n) - m;
  for (int64_t i = 0; i < n; ++i) {
    const float delta = i == densest ? kernels.largest(distance, n * n)
                                     : kernels.nearest_denser(distance + i * n, m, n, i);
    const float value = std::log(delta) - m[i];
    score[static_cast<size_t>(i)] = std::isnan(value) ? -kInfinity : value;
  }
  return score;
}

// The rows of highest score, by falling score. Ties: lowest index.
void choose_centers(const std::vector<float>& score, int64_t num_clusters, int64_t* centers) {
  std::vector<int64_t> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
  });
  std::copy_n(order.begin(), num_clusters, centers);
}

// Every row joins its nearest centre, of several the one of lowest index; a centre joins itself.
void join_nearest(const float* distance, int64_t n, int64_t num_clusters, const int64_t* centers,
                  int64_t* assignment) {
  std::vector<int64_t> order(static_cast<size_t>(num_clusters));  // clusters by the index of their centre
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return centers[a] < centers[b]; });
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

}  // namespace

void cluster_rows(const Kernels& kernels, const float* distance, int64_t n, int64_t num_clusters, int64_t k,
                  int64_t* centers, int64_t* assignment) {
  const std::vector<float> sparsity = measure_sparsity(kernels, distance, n, k);
  const std::vector<float> score = measure_score(kernels, distance, n, sparsity.data());
  choose_centers(score, num_clusters, centers);
  join_nearest(distance, n, num_clusters, centers, assignment);
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
  RowDistances distances(n, channels);
  cluster_rows(use, distances.measure(rows, groups, 0, n, mean.data(), threads), n, num_clusters, k, centers,
               assignment);
}

}  // namespace flashvid
