// SPDX-License-Identifier: MIT
// How many tokens every segment and every frame keeps: integers only.
#pragma once

#include <cstdint>
#include <vector>

namespace flashvid {

// Sec. 0. M_s of every segment, entered at each of its frames.
std::vector<int64_t> share_merged(const int64_t* segment_id, int64_t num_frames, int64_t merged);

// Sec. 3. Cut the weakest links of a segment that would be left with fewer roots than its share.
void keep_strongest(const int64_t* segment_id, int64_t num_frames, int64_t n, const std::vector<int64_t>& share,
                    const uint8_t* candidate, const float* similarity, int64_t* parent);

// Sec. 4. c_t, the clusters of every frame. The trees that begin in frame t are first_tree[t] .. first_tree[t + 1] - 1.
std::vector<int64_t> share_clusters(const int64_t* segment_id, int64_t num_frames, const std::vector<int64_t>& share,
                                    const std::vector<int64_t>& first_tree);

}  // namespace flashvid
