// SPDX-License-Identifier: MIT
// Products and distances of rows, in tiles of accumulators that stay in registers. The lanes of a vector run
// along the channels, so that rows are read as they lie: nothing is packed.
// Included by the files that are compiled per instruction set: everything here has internal linkage.
#pragma once

#include "vector.h"

namespace flashvid {
namespace {

// 25 accumulators and 6 operands fill the 32 registers of AVX-512, 9 and 4 most of the 16 of the others.
constexpr int kRows = FLASHVID_VECTOR_BYTES == 64 ? 5 : 3;
// Of fp32: two panels of kRows rows are then 40 KiB, in the 48 KiB of a first-level cache (32 KiB: 24 KiB).
constexpr int64_t kDepthBlock = 1024;

struct Multiply {
  using Element = float;
  using Operand = Vec;
  static constexpr int kElements = kLanes;
  static inline Operand load_operand(const float* from) { return load(from); }
  static inline Vec add(Vec total, Operand x, Operand y) { return total + x * y; }
};

struct SquareDifference : Multiply {
  static inline Vec add(Vec total, Operand x, Operand y) {
    const Vec difference = x - y;
    return total + difference * difference;
  }
};

template <class Op, int M, int N>
inline void tile(const typename Op::Element* x, const typename Op::Element* y, int64_t stride, int64_t depth,
                 bool first, float* out, int64_t out_stride) {
  Vec total[M][N] = {};
  for (int64_t k = 0; k < depth; k += Op::kElements) {
    typename Op::Operand right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = Op::load_operand(y + j * stride + k);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const typename Op::Operand left = Op::load_operand(x + i * stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) total[i][j] = Op::add(total[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      float& entry = out[i * out_stride + j];
      entry = sum(total[i][j]) + (first ? 0.0f : entry);
    }
  }
}

template <class Op>
inline void any_tile(int64_t m, int64_t n, const typename Op::Element* x, const typename Op::Element* y, int64_t stride,
                     int64_t depth, bool first, float* out, int64_t out_stride) {
  if (m == kRows && n == kRows) return tile<Op, kRows, kRows>(x, y, stride, depth, first, out, out_stride);
  for (int64_t i = 0; i < m; ++i) {
    if (n == kRows) {
      tile<Op, 1, kRows>(x + i * stride, y, stride, depth, first, out + i * out_stride, out_stride);
    } else {
      for (int64_t j = 0; j < n; ++j) {
        tile<Op, 1, 1>(x + i * stride, y + j * stride, stride, depth, first, out + i * out_stride + j, out_stride);
      }
    }
  }
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows first <= i < last of x against all n of y; a row i < triangle needs only j >= i.
template <class Op>
inline void all_tiles(const typename Op::Element* x, int64_t first, int64_t last, const typename Op::Element* y,
                      int64_t n, int64_t stride, int64_t depth, int64_t triangle, float* out, int64_t out_stride) {
  const int64_t block = kDepthBlock / kLanes * Op::kElements;
  for (int64_t k = 0; k < depth; k += block) {
    const int64_t length = least(block, depth - k);
    for (int64_t i = first; i < last; i += kRows) {
      const int64_t m = least(kRows, last - i);
      const int64_t start = i + m <= triangle ? i : 0;
      for (int64_t j = start; j < n; j += kRows) {
        any_tile<Op>(m, least(kRows, n - j), x + i * stride + k, y + j * stride + k, stride, length, k == 0,
                     out + i * out_stride + j, out_stride);
      }
    }
  }
}

template <class Op>
void product(const void* x, int64_t m, const void* y, int64_t n, int64_t stride, int64_t depth, float* out,
             int64_t out_stride, int64_t triangle, void*) {
  all_tiles<Op>(static_cast<const typename Op::Element*>(x), 0, m, static_cast<const typename Op::Element*>(y), n,
                stride, depth, triangle, out, out_stride);
}

[[maybe_unused]] int64_t no_workspace(int64_t, int64_t) { return 0; }

void squared_distances(const float* x, int64_t n, int64_t depth, int64_t first, int64_t last, float* out,
                       int64_t out_stride) {
  all_tiles<SquareDifference>(x, first, last, x, n, depth, depth, n, out, out_stride);
}

float squared_distance(const float* x, const float* y, int64_t depth) {
  float out = 0;
  all_tiles<SquareDifference>(x, 0, 1, y, 1, depth, depth, 0, &out, 1);
  return out;
}

}  // namespace
}  // namespace flashvid
