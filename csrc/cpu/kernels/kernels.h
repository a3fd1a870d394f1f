// SPDX-License-Identifier: MIT
// The inner loops, compiled once for every instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>

#include "element.h"

namespace flashvid {

constexpr int64_t kDepthMultiple = 32;  // the channels of a product's rows: two AVX-512 vectors of fp32, one of bf16
constexpr float kDistanceStep = 1e-5f;  // of cosine distances, which are counted in steps: what is less is rounding
constexpr int64_t kMostSmallest = 16;   // values of a row that are kept in order at a time
constexpr int64_t kTile = 32;           // `out` of a product has room for this multiple of rows and columns

// out[i, j] = <x_i, y_j> in fp32. Rows of x and y are `stride` elements apart, and `depth` of them count, a
// multiple of kDepthMultiple. Rows of `out` are `out_stride` apart, n rounded up to kTile at least. Of the
// first `triangle` rows only j >= i is needed. Every entry is summed in one order, wherever in a tile it lies.
using Product = void (*)(const void* x, int64_t m, const void* y, int64_t n, int64_t stride, int64_t depth, float* out,
                         int64_t out_stride, int64_t triangle, void* workspace);

struct Kernels {
  const char* name;
  Product inner_f32;
  Product inner_bf16;  // null: widen the rows and use inner_f32
  bool splits_f32;     // bf16 products of both halves take less time than squared_distances
  int64_t (*workspace_bytes)(int64_t n, int64_t depth);

  // out[i, j] = |x_i - x_j|^2 for rows first <= i < last and j > i; subtracts before it squares, so that
  // duplicates are at exactly 0.
  void (*squared_distances)(const float* x, int64_t n, int64_t depth, int64_t first, int64_t last, float* out,
                            int64_t out_stride);

  float (*squared_distance)(const float* x, const float* y, int64_t depth);  // of one pair, the same

  // Rows of any dtype.
  float (*add_row)(const void* row, Dtype dtype, int64_t n, float* total);  // returns sum_squares
  float (*sum_squares)(const void* row, Dtype dtype, int64_t n);
  float (*dot)(const void* row, Dtype dtype, int64_t n, const float* vector);
  float (*dot_rows)(const void* x, const void* y, Dtype dtype, int64_t n);
  void (*widen)(const void* row, Dtype dtype, int64_t n, float* out);
  void (*narrow)(const float* row, Dtype dtype, int64_t n, void* out);
  // row - center as the sum of two bf16 numbers each, with zeros from n to depth; returns its sum of squares.
  float (*split)(const void* row, Dtype dtype, const float* center, int64_t n, int64_t depth, Bfloat* high,
                 Bfloat* low);
  void (*mean_rows)(const void* rows, Dtype dtype, int64_t stride, const int64_t* member, int64_t count, int64_t n,
                    float* out);

  // In place: inner products of row i with j = 0 .. n-1 become cosine distances (Sec. 2). `nearest[j]` takes
  // the minimum with each; returns the row's own.
  float (*cosine_distances)(float* row, int64_t n, float inverse_norm, const float* inverse_norms, float* nearest);
  // The first j of largest row[j] * inverse_norms[j] among those with mask[j] != 0; returns the value, -inf if none.
  float (*best_match)(const float* row, int64_t n, const float* inverse_norms, const int32_t* mask, int32_t* best);
  // In place: inner products of row i with n others become cosine distances, in whole steps of kDistanceStep. Returns
  // their sum.
  int64_t (*distance_steps)(float* row, int64_t n, float inverse_norm, const float* inverse_norms);
  // left[j] becomes the minimum of itself and row[j]; returns the first j where it is largest.
  int64_t (*farthest)(const float* row, int64_t n, float* left);
  // Where row[j] is below least[j], this becomes it, and nearest[j] becomes i.
  void (*take_nearer)(const float* row, int64_t n, int32_t i, float* least, int32_t* nearest);
  // DPC-kNN, from the symmetric [n, n] distances: the mean square of the k smallest of each row, k <= kMostSmallest;
  // the largest of `count` values; the least row[j] of j before i in the order of (m, index), +inf if none.
  void (*smallest_squares)(const float* distance, int64_t n, int64_t k, float* mean);
  float (*largest)(const float* values, int64_t count);
  float (*nearest_denser)(const float* row, const float* m, int64_t n, int64_t i);
  // received += softmax(scale * logits); uses `logits` as its workspace.
  void (*add_softmax)(float* logits, int64_t n, float scale, float* received);
};

// The best that this machine runs, or the one that FLASHVID_CPU_ISA names.
const Kernels& kernels();
// Use the one named, "" for the best. Throws std::invalid_argument if this machine or build has it not.
void use_kernels(const char* name);
// How many there are to choose from here, and the i-th, from plainest to best.
int num_kernels();
const Kernels& kernels_at(int i);

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace flashvid
