// SPDX-License-Identifier: MIT
// Trees of tokens: their roots, members and means (Sec. 3).
#include <stdexcept>
#include <string>

#include "forest.h"
#include "kernels/kernels.h"
#include "ops.h"
#include "parallel.h"

namespace flashvid {

void tree_roots(const int64_t* parent, int64_t num_frames, int64_t n, int64_t* root) {
  const int64_t num_tokens = num_frames * n;
  for (int64_t token = n; token < num_tokens; ++token) {
    if (parent[token] >= n) {
      throw std::invalid_argument("parent must be below N=" + std::to_string(n) + ", got " +
                                  std::to_string(parent[token]));
    }
  }
  // `root` holds the links; a token's are final once it is asked for, as its parent came before it.
  for (int64_t token = 0; token < num_tokens; ++token) root[token] = link_of(parent, n, token);
  for (int64_t token = 0; token < num_tokens; ++token) root[token] = find_root(root, token);
}

Groups group_members(const int64_t* root, const uint8_t* member, int64_t num_tokens) {
  std::vector<int64_t> next(static_cast<size_t>(num_tokens), 0);  // counts, then where the next member goes
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (!member[token]) continue;
    if (root[token] < 0 || root[token] >= num_tokens) {
      throw std::invalid_argument("root must be from 0 to T*N-1=" + std::to_string(num_tokens - 1) + ", got " +
                                  std::to_string(root[token]));
    }
    ++next[static_cast<size_t>(root[token])];
  }
  Groups groups;
  groups.first.push_back(0);
  for (int64_t token = 0; token < num_tokens; ++token) {
    int64_t& count = next[static_cast<size_t>(token)];
    if (count == 0) continue;
    groups.root.push_back(token);
    groups.first.push_back(groups.first.back() + count);
    count = groups.first[groups.first.size() - 2];
  }
  groups.member.resize(static_cast<size_t>(groups.first.back()));
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (member[token]) groups.member[static_cast<size_t>(next[static_cast<size_t>(root[token])]++)] = token;
  }
  return groups;
}

void mean_of_groups(const Video& video, const Groups& groups, float* mean, int threads) {
  const Kernels& use = kernels();
  parallel_for(groups.size(), threads, [&](int64_t i, int) {
    const int64_t first = groups.first[static_cast<size_t>(i)], last = groups.first[static_cast<size_t>(i) + 1];
    use.mean_rows(video.features, video.dtype, video.channels, groups.member.data() + first, last - first,
                  video.channels, mean + i * video.channels);
  });
}

}  // namespace flashvid
