// SPDX-License-Identifier: MIT
// Segments of frames, as the other steps use them (Sec. 1).
#pragma once

#include <vector>

#include "ops.h"
#include "parallel.h"

namespace flashvid {

// Calls visit(first frame, last frame + 1) of every segment.
template <class Visit>
void for_each_segment(const int64_t* segment_id, int64_t num_frames, Visit visit) {
  for (int64_t begin = 0, end; begin < num_frames; begin = end) {
    for (end = begin + 1; end < num_frames && segment_id[end] == segment_id[begin];) ++end;
    visit(begin, end);
  }
}

// means [num_segments, channels] of the frame embeddings; segment [num_frames] is each frame's row of them.
Buffer<float> segment_means(const float* frames, int64_t num_frames, int64_t channels, const int64_t* segment_id,
                            std::vector<int64_t>& segment);

}  // namespace flashvid
