// SPDX-License-Identifier: MIT
// The operations on a CPU. Memory is the caller's; tensors are contiguous unless strides are given. What each
// computes is documented in flashvid_vllm.ops, and how in ALGORITHM, whose sections are cited.
#pragma once

#include <cstdint>
#include <vector>

#include "element.h"

namespace flashvid {

struct Video {
  const void* features;  // [num_frames, n, channels]
  Dtype dtype;
  int64_t num_frames, n, channels;

  int64_t num_tokens() const { return num_frames * n; }
  const void* row(int64_t token) const {
    return static_cast<const char*>(features) + token * channels * bytes_of(dtype);
  }
};

struct Settings {
  int64_t selected_per_frame;  // K
  int64_t merged;              // M
  float merge_threshold, segment_threshold;
  int64_t min_segments;
  bool attention_alone, weigh_by_event, match_by_position;
  int64_t neighbours;  // of DPC-kNN
};

// Segments (Sec. 1) and relevance (Sec. 2, E).
void segment_frames(const float* frames, int64_t num_frames, int64_t channels, float threshold, int64_t min_segments,
                    int64_t* segment_id);
void event_relevance(const Video& video, const int64_t* segment_id, float* relevance, int threads);

// ADTS and TSTM (Sec. 2, 3). weight may be null.
void select_tokens(const Video& video, const float* weight, int64_t k, int64_t* index, int threads);
void match_tokens(const Video& video, const uint8_t* candidate, const int64_t* segment_id, float threshold,
                  bool by_position, float* similarity, int64_t* parent, int threads);

// Trees (Sec. 3). Groups: the members of root i are member[first[i]] .. member[first[i + 1] - 1], ascending.
struct Groups {
  std::vector<int64_t> root, first, member;
  int64_t size() const { return static_cast<int64_t>(root.size()); }
};
void tree_roots(const int64_t* parent, int64_t num_frames, int64_t n, int64_t* root);
Groups group_members(const int64_t* root, const uint8_t* member, int64_t num_tokens);
void mean_of_groups(const Video& video, const Groups& groups, float* mean, int threads);

// DPC-kNN (Sec. 4).
void cluster_tokens(const void* x, Dtype dtype, int64_t n, int64_t channels, int64_t num_clusters, int64_t k,
                    int64_t* centers, int64_t* assignment, int threads);

// What stands for each token where budgets follow the video, the flat index of a token or -1.
void explain_tokens(const Video& video, int64_t tokens, double still, int64_t* source, int threads);

// query and key [T, H, N, d]: strides in elements of the first three axes, d contiguous.
struct Heads {
  const void* data;
  int64_t frame_stride, head_stride, token_stride;
};
void received_attention(const Heads& query, const Heads& key, Dtype dtype, int64_t num_frames, int64_t heads, int64_t n,
                        int64_t d, float* received, int threads);

// The whole algorithm. attention may be null if the settings do not read it.
void compress(const Video& video, const float* attention, const Settings& settings, void* tokens,
              int64_t* source_index, int64_t* size, int64_t* assignment, int threads);

// Blocks of temporal positions of a video, as kernels/ops/reuse.py has them: the first behind each, and of a column of
// each the least and the most rows.
struct Blocks {
  std::vector<int64_t> ends, least, most;
  int64_t longest;
};
// levels [T, places, channels]; num_rows below 0: as many as leave at most `unexplained`.
void choose_rows(const uint8_t* levels, int64_t places, int64_t channels, const Blocks& video, int64_t num_rows,
                 int64_t unexplained, int64_t farthest, int64_t* position, int threads);

}  // namespace flashvid
