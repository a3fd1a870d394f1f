// SPDX-License-Identifier: MIT
// Passes over rows: widening, sums, means, and what turns products into choices.
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

void widen(const void* row, Dtype dtype, int64_t n, float* out) {
  as_elements(row, dtype, [=](const auto* x) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = to_float(x[i]);
  });
}

void narrow(const float* row, Dtype dtype, int64_t n, void* out) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(out, row, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == Dtype::kBfloat16) {
    for (int64_t i = 0; i < n; ++i) static_cast<Bfloat*>(out)[i] = to_bfloat(row[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) static_cast<Half*>(out)[i] = to_half(row[i]);
  }
}

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

constexpr float kFlatDistance = 1e-5f;  // cosine distances below are rounding, and count as 0 (Sec. 2)

inline Vec cosine_distance(Vec product, float inverse_norm, Vec inverse_norms) {
  const Vec distance = 1.0f - product * inverse_norm * inverse_norms;
  const Vec not_flat = distance < kFlatDistance ? splat(0.0f) : distance;
  return not_flat <= kLargest ? not_flat : splat(kInfinity);  // NaN too
}

float cosine_distances(float* row, int64_t n, float inverse_norm, const float* inverse_norms, float* nearest) {
  Vec least = splat(kInfinity);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec distance = cosine_distance(load(row + j), inverse_norm, load(inverse_norms + j));
    store(row + j, distance);
    store(nearest + j, minimum(load(nearest + j), distance));
    least = minimum(least, distance);
  }
  float own = kInfinity;
  for (int i = 0; i < kLanes; ++i) own = least[i] < own ? least[i] : own;
  for (; j < n; ++j) {
    const float distance = cosine_distance(splat(row[j]), inverse_norm, splat(inverse_norms[j]))[0];
    row[j] = distance;
    nearest[j] = distance < nearest[j] ? distance : nearest[j];
    own = distance < own ? distance : own;
  }
  return own;
}

float best_match(const float* row, int64_t n, const float* inverse_norms, const int32_t* mask, int32_t* best) {
  Vec value = splat(-kInfinity);
  VecInt index = {}, position = {};
  for (int i = 0; i < kLanes; ++i) position[i] = i;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec cosine = load(row + j) * load(inverse_norms + j);
    const VecInt better = (cosine > value) & (cosine <= kLargest) & (load_as<VecInt>(mask + j) != 0);
    value = better ? cosine : value;
    index = better ? position : index;
    position += kLanes;
  }
  float highest = -kInfinity;
  *best = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (value[i] > highest || (value[i] == highest && index[i] < *best)) highest = value[i], *best = index[i];
  }
  for (; j < n; ++j) {
    const float cosine = row[j] * inverse_norms[j];
    if (mask[j] && cosine > highest && cosine <= kLargest) highest = cosine, *best = static_cast<int32_t>(j);
  }
  return highest;
}

// Vectors run along rows i; what they hold of them is read down the columns.
void smallest_squares(const float* distance, int64_t n, int64_t k, float* mean) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i;
    Vec smallest[kMostSmallest];
    for (int64_t s = 0; s < k; ++s) smallest[s] = splat(kInfinity);
    for (int64_t j = 0; j < n; ++j) {
      const float* from = distance + j * n + i;
      Vec value = count < kLanes ? load_some(from, count) : load(from);
      for (int64_t s = 0; s < k; ++s) {
        const Vec less = minimum(smallest[s], value);
        value = maximum(smallest[s], value);
        smallest[s] = less;
      }
    }
    Vec total = {};
    for (int64_t s = 0; s < k; ++s) total += smallest[s] * smallest[s];
    total /= splat(static_cast<float>(k));
    for (int64_t lane = 0; lane < kLanes && lane < count; ++lane) mean[i + lane] = total[lane];
  }
}

float largest(const float* values, int64_t count) {
  Vec most = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = maximum(load(values + i), most);
  float found = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) found = most[lane] > found ? most[lane] : found;
  for (; i < count; ++i) found = values[i] > found ? values[i] : found;
  return found;
}

float nearest_denser(const float* row, const float* m, int64_t n, int64_t i) {
  Vec least = splat(kInfinity);
  const auto take = [&](int64_t from, int64_t to, auto denser) {
    int64_t j = from;
    for (; j + kLanes <= to; j += kLanes) least = denser(load(m + j)) ? minimum(least, load(row + j)) : least;
    for (; j < to; ++j) least = denser(splat(m[j])) ? minimum(least, splat(row[j])) : least;
  };
  const Vec own = splat(m[i]);
  take(0, i, [own](Vec other) { return other <= own; });
  take(i + 1, n, [own](Vec other) { return other < own; });
  float found = kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) found = least[lane] < found ? least[lane] : found;
  return found;
}

void add_softmax(float* logits, int64_t n, float scale, float* received) {
  float highest = -kInfinity;
  Vec top = splat(-kInfinity);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) top = maximum(load(logits + j), top);
  for (int i = 0; i < kLanes; ++i) highest = top[i] > highest ? top[i] : highest;
  for (; j < n; ++j) highest = logits[j] > highest ? logits[j] : highest;

  Vec total = {};
  for (j = 0; j + kLanes <= n; j += kLanes) {
    const Vec weight = exponential((load(logits + j) - highest) * scale);
    store(logits + j, weight);
    total += weight;
  }
  float rest = 0;
  for (; j < n; ++j) {
    logits[j] = exponential(splat((logits[j] - highest) * scale))[0];
    rest += logits[j];
  }
  const float normalizer = 1.0f / (sum(total) + rest);
  for (j = 0; j + kLanes <= n; j += kLanes) store(received + j, load(received + j) + load(logits + j) * normalizer);
  for (; j < n; ++j) received[j] += logits[j] * normalizer;
}

}  // namespace
}  // namespace flashvid
