// SPDX-License-Identifier: MIT
// The distances between the trees of one frame (Sec. 4).
#pragma once

#include "kernels/kernels.h"
#include "ops.h"
#include "parallel.h"

namespace flashvid {

// A thread's workspace for up to `rows` rows, each the mean of a group of tokens. Most groups have one token, which is
// read where it lies: a copy in fp32 is made where it is needed.
class RowDistances {
 public:
  RowDistances(int64_t rows, int64_t channels);

  // d = |u - v| / sqrt(channels) among n groups from the `first` on: symmetric [n, n], infinity where a row is not
  // finite. `center` [channels] is somewhere among the rows.
  const float* measure(const Video& video, const Groups& groups, int64_t first, int64_t n, const float* center,
                       int threads);

  // total += row i of those measured last.
  void add_row(int64_t i, float* total) const;

 private:
  struct Row {
    const void* data;
    Dtype dtype;
  };

  int64_t group_size(int64_t i) const { return first_[i + 1] - first_[i]; }
  Row row(int64_t i) const;
  const float* wide_row(int64_t i);
  bool square_by_products(int64_t n, const float* center, int threads);
  void square_directly(int64_t n, int threads);
  void complete(int64_t n);

  const Kernels& kernels_;
  const int64_t channels_, depth_;
  const Video* video_ = nullptr;
  const int64_t *first_ = nullptr, *member_ = nullptr;  // of the groups
  Buffer<float> wide_rows_, distance_, products_;
  Buffer<Bfloat> parts_;  // high ones of all rows, then low ones
  Buffer<bool> is_wide_, finite_;
};

}  // namespace flashvid
