// SPDX-License-Identifier: MIT
#include "distances.h"

#include "products.h"

#include <cmath>
#include <limits>

namespace flashvid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsAtATime = 15;      // of direct distances: whole tiles of 3 and of 5 rows
constexpr int64_t kRowsOfProducts = 512;  // each block of them packs all columns once more

bool is_finite(const Kernels& kernels, const float* row, int64_t channels) {
  if (std::isfinite(kernels.sum_squares(row, Dtype::kFloat32, channels))) return true;
  return std::all_of(row, row + channels, [](float value) { return std::isfinite(value); });
}

}  // namespace

RowDistances::RowDistances(int64_t rows, int64_t channels)
    : kernels_(kernels()),
      channels_(channels),
      depth_(round_up(channels, kDepthMultiple)),
      wide_rows_(rows * depth_),
      distance_(rows * rows),
      products_(kernels_.splits_f32 ? round_up(2 * rows, kTile) * round_up(rows, kTile) : 0),
      parts_(kernels_.splits_f32 ? 2 * rows * depth_ : 0),
      is_wide_(rows),
      finite_(rows) {}

RowDistances::Row RowDistances::row(int64_t i) const {
  if (group_size(i) == 1) return {video_->row(member_[first_[i]]), video_->dtype};
  return {wide_rows_.data() + i * depth_, Dtype::kFloat32};
}

const float* RowDistances::wide_row(int64_t i) {
  float* out = wide_rows_.data() + i * depth_;
  if (!is_wide_[i]) {
    kernels_.mean_rows(video_->features, video_->dtype, channels_, member_ + first_[i], group_size(i), channels_, out);
    std::fill(out + channels_, out + depth_, 0.0f);
    is_wide_[i] = true;
  }
  return out;
}

void RowDistances::add_row(int64_t i, float* total) const {
  const Row from = row(i);
  kernels_.add_row(from.data, from.dtype, channels_, total);
}

// |u - v|^2 = |u|^2 + |v|^2 - 2<u, v> from a center, which distances do not see but rounding does.
// Rows are split into two bf16 parts that hold 16 bits of each value; the product of the low ones is left
// out. That is within 3e-6 of a distance that is not small beside the norms; the others are measured directly.
// False if those are too many for this to be faster, or if values do not fit.
bool RowDistances::square_by_products(int64_t n, const float* center, int threads) {
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

// By subtracting before squaring, so that duplicates are at exactly 0.
void RowDistances::square_directly(int64_t n, int threads) {
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

// From squares of one half of the matrix to all distances.
void RowDistances::complete(int64_t n) {
  float* distance = distance_.data();
  const float scale = std::sqrt(static_cast<float>(channels_));
  for (int64_t i = 0; i < n; ++i) {
    distance[i * n + i] = finite_[i] ? 0.0f : kInfinity;
    for (int64_t j = i + 1; j < n; ++j) {
      const float value = std::sqrt(distance[i * n + j]) / scale;
      distance[i * n + j] = value < kInfinity ? value : kInfinity;  // NaN too
    }
  }
  mirror(distance, n, n);
}

const float* RowDistances::measure(const Video& video, const Groups& groups, int64_t first, int64_t n,
                                   const float* center, int threads) {
  video_ = &video;
  first_ = groups.first.data() + first;
  member_ = groups.member.data();
  parallel_for(n, threads, [&](int64_t i, int) {
    is_wide_[i] = false;
    if (group_size(i) > 1) wide_row(i);
  });
  const bool squared = kernels_.splits_f32 && square_by_products(n, center, threads);
  if (!squared) square_directly(n, threads);
  complete(n);
  return distance_.data();
}

}  // namespace flashvid
