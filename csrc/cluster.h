// SPDX-License-Identifier: MIT
// DPC-kNN on the rows of one frame.
#pragma once

#include "kernels.h"
#include "ops.h"

namespace flashvid {

// Rows of one frame and what their distances take; a thread's workspace.
class ClusterWorkspace {
 public:
  ClusterWorkspace(int64_t rows, int64_t channels);

  float* row(int64_t i) { return rows_.data() + i * depth_; }
  const float* rows() const { return rows_.data(); }
  int64_t stride() const { return depth_; }

  // Cluster the first n rows (Sec. 4). Result as flashvid_vllm.ops.cluster_tokens.
  void cluster(int64_t n, int64_t num_clusters, int64_t k, int64_t* centers, int64_t* assignment, int threads);

 private:
  void measure(int64_t n, int threads);
  bool measure_by_products(int64_t n, int threads);
  void complete(int64_t n);

  const Kernels& kernels_;
  const int64_t channels_, depth_;
  Buffer<float> rows_, distance_, mean_, products_;
  Buffer<Bfloat> parts_;  // high ones of all rows, then low ones
  Buffer<bool> finite_;
};

}  // namespace flashvid
