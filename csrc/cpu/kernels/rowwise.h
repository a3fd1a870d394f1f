// SPDX-License-Identifier: MIT
// Passes over rows of any dtype, in the order in which the algorithm makes them.
// Included by the files that are compiled per instruction set: everything here has internal linkage.
#pragma once

#include "forest.h"
#include "vector.h"

namespace flashvid {
namespace {

// Calls `use` with the row as a pointer to its elements.
template <class Use>
inline auto as_elements(const void* row, Dtype dtype, Use use) {
  if (dtype == Dtype::kBfloat16) return use(static_cast<const Bfloat*>(row));
  if (dtype == Dtype::kFloat16) return use(static_cast<const Half*>(row));
  return use(static_cast<const float*>(row));
}

// Sum of products over whole vectors and the tail, in four chains so that additions overlap.
template <class X, class Y>
inline float inner(const X* x, const Y* y, int64_t n) {
  Vec total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) total[c] += load(x + i + c * kLanes) * load(y + i + c * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) total[0] += load(x + i) * load(y + i);
  if (i < n) total[0] += load_some(x + i, n - i) * load_some(y + i, n - i);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Sec. 1 and 2: norms, means of frames, relevance; dot_rows is the similarity at one position of Sec. 3.
float sum_squares(const void* row, Dtype dtype, int64_t n) {
  return as_elements(row, dtype, [n](const auto* x) { return inner(x, x, n); });
}

// Reads the row once; squares are summed as `inner` does.
float add_row(const void* row, Dtype dtype, int64_t n, float* total) {
  return as_elements(row, dtype, [n, total](const auto* x) {
    Vec squares[4] = {};
    int64_t i = 0;
    const auto add = [&](Vec& sum, int64_t at) {
      const Vec values = load(x + at);
      store(total + at, load(total + at) + values);
      sum += values * values;
    };
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add(squares[c], i + c * kLanes);
    }
    for (; i + kLanes <= n; i += kLanes) add(squares[0], i);
    if (i < n) {
      const Vec values = load_some(x + i, n - i);
      squares[0] += values * values;
      for (; i < n; ++i) total[i] += to_float(x[i]);
    }
    return sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  });
}

float dot(const void* row, Dtype dtype, int64_t n, const float* vector) {
  return as_elements(row, dtype, [=](const auto* x) { return inner(x, vector, n); });
}

float dot_rows(const void* x, const void* y, Dtype dtype, int64_t n) {
  return as_elements(x, dtype, [=](const auto* u) {
    return inner(u, static_cast<decltype(u)>(y), n);
  });
}

// What the products of Sec. 2 and 3 take: rows in fp32.
void widen(const void* row, Dtype dtype, int64_t n, float* out) {
  as_elements(row, dtype, [=](const auto* x) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = to_float(x[i]);
  });
}

// Sec. 3: the mean of a tree.
void mean_rows(const void* rows, Dtype dtype, int64_t stride, const int64_t* member, int64_t count, int64_t n,
               float* out) {
  as_elements(rows, dtype, [=](const auto* x) {
    // 512: long enough runs for the prefetcher, and sums that stay in the first-level cache.
    constexpr int kWide = 512, kNarrow = 4 * kLanes;
    int64_t c = 0;
    for (; c + kWide <= n; c += kWide) mean_of_rows<kWide>(x + c, stride, member, count, out + c);
    for (; c + kNarrow <= n; c += kNarrow) mean_of_rows<kNarrow>(x + c, stride, member, count, out + c);
    for (; c < n; ++c) mean_of_rows<1>(x + c, stride, member, count, out + c);
  });
}

// Sec. 4: rows as two bf16 parts, for distances by products.
// The nearest bf16 of finite values, as the upper half of fp32; away from zero where two are as near.
inline VecBits round_to_bfloat(Vec values) { return (reinterpret_cast<VecBits>(values) + 0x8000) & 0xffff0000; }

inline void store_bfloat(Bfloat* to, VecBits upper) {
  const VecHalf bits = narrow_bits(upper >> 16);
  __builtin_memcpy(to, &bits, sizeof bits);
}

float split(const void* row, Dtype dtype, const float* center, int64_t n, int64_t depth, Bfloat* high, Bfloat* low) {
  return as_elements(row, dtype, [=](const auto* x) {
    Vec squares = {};
    const auto put = [&](int64_t i, Vec values) {
      const VecBits upper = round_to_bfloat(values);
      store_bfloat(high + i, upper);
      store_bfloat(low + i, round_to_bfloat(values - reinterpret_cast<Vec>(upper)));
      squares += values * values;
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) put(i, load(x + i) - load(center + i));
    if (i < n) put(i, load_some(x + i, n - i) - load_some(center + i, n - i)), i += kLanes;
    for (; i < depth; i += kLanes) put(i, Vec{});
    return sum(squares);
  });
}

// Sec. 5: a token of the result.
void narrow(const float* row, Dtype dtype, int64_t n, void* out) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(out, row, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == Dtype::kBfloat16) {
    for (int64_t i = 0; i < n; ++i) static_cast<Bfloat*>(out)[i] = to_bfloat(row[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) static_cast<Half*>(out)[i] = to_half(row[i]);
  }
}

}  // namespace
}  // namespace flashvid
