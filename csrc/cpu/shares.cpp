// SPDX-License-Identifier: MIT
#include "shares.h"

#include <algorithm>

#include "segment.h"

namespace flashvid {

// Frame t's share is floor(M (t+1) / T) - floor(M t / T), a segment's the sum over its frames.
std::vector<int64_t> share_merged(const int64_t* segment_id, int64_t num_frames, int64_t merged) {
  std::vector<int64_t> share(static_cast<size_t>(num_frames));
  const auto before = [=](int64_t t) { return merged * t / num_frames; };
  for_each_segment(segment_id, num_frames, [&](int64_t begin, int64_t end) {
    std::fill(share.begin() + begin, share.begin() + end, before(end) - before(begin));
  });
  return share;
}

// Every link makes one root less, so that at most (candidates - M_s) links may stay. Ties: lowest index first.
void keep_strongest(const int64_t* segment_id, int64_t num_frames, int64_t n, const std::vector<int64_t>& share,
                    const uint8_t* candidate, const float* similarity, int64_t* parent) {
  std::vector<int64_t> links;
  for_each_segment(segment_id, num_frames, [&](int64_t begin, int64_t end) {
    links.clear();
    int64_t most = -share[static_cast<size_t>(begin)];
    for (int64_t token = begin * n; token < end * n; ++token) {
      most += candidate[token];
      if (parent[token] >= 0) links.push_back(token);
    }
    if (static_cast<int64_t>(links.size()) <= most) return;
    std::nth_element(links.begin(), links.begin() + most, links.end(), [&](int64_t a, int64_t b) {
      return similarity[a] > similarity[b] || (similarity[a] == similarity[b] && a < b);
    });
    for (size_t i = static_cast<size_t>(most); i < links.size(); ++i) parent[links[i]] = -1;
  });
}

// c_t = floor(M_s C_{t+1} / R_s) - floor(M_s C_t / R_s), C the running count of the R_s roots of the segment.
std::vector<int64_t> share_clusters(const int64_t* segment_id, int64_t num_frames, const std::vector<int64_t>& share,
                                    const std::vector<int64_t>& first_tree) {
  std::vector<int64_t> clusters(static_cast<size_t>(num_frames));
  for_each_segment(segment_id, num_frames, [&](int64_t begin, int64_t end) {
    const int64_t start = first_tree[static_cast<size_t>(begin)];
    const int64_t roots = std::max<int64_t>(1, first_tree[static_cast<size_t>(end)] - start);
    for (size_t t = static_cast<size_t>(begin); t < static_cast<size_t>(end); ++t) {
      const auto before = [&](size_t frame) { return share[t] * (first_tree[frame] - start) / roots; };
      clusters[t] = before(t + 1) - before(t);
    }
  });
  return clusters;
}

}  // namespace flashvid
