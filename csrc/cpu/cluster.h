// SPDX-License-Identifier: MIT
// DPC-kNN on the rows of one frame.
#pragma once

#include "kernels/kernels.h"
#include "ops.h"

namespace flashvid {

// A thread's workspace for up to `rows` rows, each the mean of a group of tokens. Most groups have one token, which is
// read where it lies: a copy in fp32 is made where it is needed.
class ClusterWorkspace {
 public:
  ClusterWorkspace(int64_t rows, int64_t channels);

  // Cluster n groups from the `first` on (Sec. 4). Result as flashvid_vllm.ops.cluster_tokens. `center` [channels] is
  // somewhere among the rows.
  void cluster(const Video& video, const Groups& groups, int64_t first, int64_t n, const float* center,
               int64_t num_clusters, int64_t k, int64_t* centers, int64_t* assignment, int threads);

  // total += row i of those clustered last.
  void add_row(int64_t i, float* total) const;

 private:
  struct Row {
    const void* data;
    Dtype dtype;
  };

  int64_t group_size(int64_t i) const { return first_[i + 1] - first_[i]; }
  Row row(int64_t i) const;
  const float* wide_row(int64_t i);
  void measure(int64_t n, const float* center, int threads);
  bool measure_by_products(int64_t n, const float* center, int threads);
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
