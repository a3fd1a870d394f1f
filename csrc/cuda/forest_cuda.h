// SPDX-License-Identifier: MIT
// Launches of forest.cu. Pointers are to device memory; nothing waits for the device.
#pragma once

#include <cstdint>

#include "element.h"

namespace flashvid {

// parent and root [num_frames, n].
void tree_roots_cuda(const int64_t* parent, int64_t num_frames, int64_t n, int64_t* root, void* stream);

// mean [groups, channels] of rows member[first[i]] .. member[first[i + 1] - 1], summed in that order.
void mean_of_groups_cuda(const void* rows, Dtype dtype, int64_t channels, int64_t groups, const int64_t* first,
                         const int64_t* member, float* mean, void* stream);

}  // namespace flashvid
