// SPDX-License-Identifier: MIT
#include "products.h"

#include <cmath>
#include <cstring>

namespace flashvid {

namespace {

constexpr float kSmallest = 1e-30f, kLargest = 1e30f;  // of a squared norm that is used as it is

bool is_zero(const char* row, int64_t bytes, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    for (int64_t i = 0; i < bytes; i += 4) {
      float value;
      std::memcpy(&value, row + i, 4);
      if (value != 0) return false;
    }
    return true;
  }
  for (int64_t i = 0; i < bytes; i += 2) {
    uint16_t bits;
    std::memcpy(&bits, row + i, 2);
    if (bits & 0x7fff) return false;
  }
  return true;
}

}  // namespace

void Norms::enter(const Video& video, int64_t t) {
  bool in_range = true;
  for (int64_t token = t * video.n; token < (t + 1) * video.n; ++token) {
    const float squared = inverse[token];
    if (squared > kSmallest && squared < kLargest) {
      inverse[token] = 1.0f / std::sqrt(squared);
    } else if (squared == 0 && is_zero(static_cast<const char*>(video.row(token)),
                                       video.channels * bytes_of(video.dtype), video.dtype)) {
      inverse[token] = 0;
    } else {
      in_range = false;
    }
  }
  regular[t] = in_range;
  if (!in_range) std::fill_n(inverse.data() + t * video.n, video.n, 1.0f);
}

Norms measure(const Video& video, int threads) {
  const Kernels& use = kernels();
  Norms norms(video);
  parallel_for(video.num_frames, threads, [&](int64_t t, int) {
    for (int64_t token = t * video.n; token < (t + 1) * video.n; ++token) {
      norms.inverse[token] = use.sum_squares(video.row(token), video.dtype, video.channels);
    }
    norms.enter(video, t);
  });
  return norms;
}

void mirror(float* matrix, int64_t n, int64_t stride) {
  constexpr int64_t kBlock = 16;  // so that the lines read stay in the cache until all of them is
  for (int64_t from = 0; from < n; from += kBlock) {
    for (int64_t i = from; i < n; ++i) {
      for (int64_t j = from; j < std::min(from + kBlock, i); ++j) matrix[i * stride + j] = matrix[j * stride + i];
    }
  }
}

void make_unit(const Kernels& kernels, float* row, int64_t channels) {
  const float norm = std::sqrt(kernels.sum_squares(row, Dtype::kFloat32, channels));
  if (norm == 0) return;
  for (int64_t c = 0; c < channels; ++c) row[c] /= norm;
}

FrameProducts::FrameProducts(const Video& video, const Kernels& kernels)
    : video_(video),
      kernels_(kernels),
      bf16_(video.dtype == Dtype::kBfloat16 && kernels.inner_bf16 != nullptr),
      direct_(video.channels % kDepthMultiple == 0 && (bf16_ || video.dtype == Dtype::kFloat32)),
      depth_(round_up(video.channels, kDepthMultiple)),
      stride_(round_up(video.n, kTile)),
      out_((video.n + stride_ + kTile) * stride_),
      rows_(2 * video.n * depth_),
      workspace_(bf16_ ? kernels.workspace_bytes(video.n, depth_) : 0) {}

const void* FrameProducts::load(int64_t t, int64_t num_frames, bool unit) {
  const int64_t first = t * video_.n, count = num_frames * video_.n;
  if (direct_ && !unit) return video_.row(first);
  const bool copy = bf16_ && !unit;
  char* to = reinterpret_cast<char*>(rows_.data());
  const int64_t bytes = depth_ * (copy ? 2 : 4), used = video_.channels * (copy ? 2 : 4);
  for (int64_t i = 0; i < count; ++i, to += bytes) {
    std::memset(to + used, 0, static_cast<size_t>(bytes - used));
    if (copy) {
      std::memcpy(to, video_.row(first + i), static_cast<size_t>(used));
    } else {
      kernels_.widen(video_.row(first + i), video_.dtype, video_.channels, reinterpret_cast<float*>(to));
      if (unit) make_unit(kernels_, reinterpret_cast<float*>(to), video_.channels);
    }
  }
  return rows_.data();
}

void FrameProducts::compute(const Norms& norms, int64_t t, bool own, bool next) {
  const int64_t n = video_.n;
  const bool unit = !norms.regular[t], unit_pair = next && !norms.regular_pair(t);
  const auto multiply = [&](const void* x, int64_t m, const void* y, bool units, float* out, int64_t triangle) {
    const Product product = bf16_ && !units ? kernels_.inner_bf16 : kernels_.inner_f32;
    product(x, m, y, n, depth_, depth_, out, stride_, triangle, workspace_.data());
  };
  if (own && next && !unit_pair) {  // in one go: the frame is packed once
    const void* rows = load(t, 2, false);
    return multiply(rows, 2 * n, rows, false, gram(), n);
  }
  if (own) {
    const void* rows = load(t, 1, unit);
    multiply(rows, n, rows, unit, gram(), n);
  }
  if (next) {
    const void* rows = load(t, 2, unit_pair);
    const int64_t row_bytes = depth_ * (bf16_ && !unit_pair ? 2 : 4);
    multiply(static_cast<const char*>(rows) + n * row_bytes, n, rows, unit_pair, gram() + n * stride_, 0);
  }
}

}  // namespace flashvid
