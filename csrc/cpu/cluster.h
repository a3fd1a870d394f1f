// SPDX-License-Identifier: MIT
// DPC-kNN on the rows of one frame (Sec. 4).
#pragma once

#include "kernels/kernels.h"

namespace flashvid {

// distance [n, n]: symmetric. centers [num_clusters] by falling score; assignment [n]: which of them each row joins.
void cluster_rows(const Kernels& kernels, const float* distance, int64_t n, int64_t num_clusters, int64_t k,
                  int64_t* centers, int64_t* assignment);

}  // namespace flashvid
