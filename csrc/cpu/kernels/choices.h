// SPDX-License-Identifier: MIT
// What turns products and distances into choices, in the order of the algorithm; and the softmax of attention.
// Included by the files that are compiled per instruction set: everything here has internal linkage.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace flashvid {
namespace {

// Sec. 2: D = 1 - cos(x_i, x_j), and the least of them for every token.
constexpr float kFlatDistance = 1e-5f;  // cosine distances below are rounding, and count as 0

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

// Sec. 3: the parent of a token.
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

// Distances whose order is the same however their products were summed.
inline Vec steps_apart(Vec product, float inverse_norm, Vec inverse_norms) {
  const Vec distance = (1.0f - product * inverse_norm * inverse_norms) / kDistanceStep;
  const Vec whole = (distance + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  return maximum(whole, splat(0.0f));
}

int64_t distance_steps(float* row, int64_t n, float inverse_norm, const float* inverse_norms) {
  VecInt total = {};
  int64_t j = 0, rest = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec distance = steps_apart(load(row + j), inverse_norm, load(inverse_norms + j));
    store(row + j, distance);
    total += __builtin_convertvector(distance, VecInt);
  }
  for (; j < n; ++j) {
    row[j] = steps_apart(splat(row[j]), inverse_norm, splat(inverse_norms[j]))[0];
    rest += static_cast<int64_t>(row[j]);
  }
  for (int i = 0; i < kLanes; ++i) rest += total[i];
  return rest;
}

int64_t farthest(const float* row, int64_t n, float* left) {
  Vec most = splat(-kInfinity);
  VecInt index = {}, position = {};
  for (int i = 0; i < kLanes; ++i) position[i] = i;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec value = minimum(load(row + j), load(left + j));
    store(left + j, value);
    const VecInt better = value > most;
    most = better ? value : most;
    index = better ? position : index;
    position += kLanes;
  }
  float found = -kInfinity;
  int64_t at = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (most[i] > found || (most[i] == found && index[i] < at)) found = most[i], at = index[i];
  }
  for (; j < n; ++j) {
    left[j] = row[j] < left[j] ? row[j] : left[j];
    if (left[j] > found) found = left[j], at = j;
  }
  return at;
}

void take_nearer(const float* row, int64_t n, int32_t i, float* least, int32_t* nearest) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec distance = load(row + j), before = load(least + j);
    const VecInt nearer = distance < before;
    store(least + j, nearer ? distance : before);
    const VecInt index = nearer ? VecInt{} + i : load_as<VecInt>(nearest + j);
    __builtin_memcpy(nearest + j, &index, sizeof index);
  }
  for (; j < n; ++j) {
    if (row[j] < least[j]) least[j] = row[j], nearest[j] = i;
  }
}

// Sec. 4: m, the mean square of the k smallest distances of each row. Vectors run along rows i; what they hold of
// them is read down the columns.
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

// Sec. 4: delta of the densest row.
float largest(const float* values, int64_t count) {
  Vec most = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = maximum(load(values + i), most);
  float found = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) found = most[lane] > found ? most[lane] : found;
  for (; i < count; ++i) found = values[i] > found ? values[i] : found;
  return found;
}

// Sec. 4: delta of every other row i.
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

// Section "Received attention".
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
