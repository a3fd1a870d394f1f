// SPDX-License-Identifier: MIT
// The trees of TSTM: roots and means, one source for host and device (ALGORITHM, Sec. 3).
#pragma once

#include "element.h"

namespace flashvid {

// What a token links to: the flat index of its parent, or itself.
FLASHVID_SHARED int64_t link_of(const int64_t* parent, int64_t n, int64_t token) {
  return token < n || parent[token] < 0 ? token : (token / n - 1) * n + parent[token];
}

// Follow the links to the root, and let every token on the way skip one. Callers may race on the device: a
// link is only ever replaced by one to a higher ancestor, so any order of theirs ends at the same root.
// On the host, which asks for the tokens in order, every answer takes two steps.
FLASHVID_SHARED int64_t find_root(volatile int64_t* link, int64_t token) {
  int64_t above = link[token];
  while (above != token) {
    const int64_t next = link[above];
    if (next != above) link[token] = next;
    token = above;
    above = next;
  }
  return token;
}

// Mean over `count` rows of `Channels` neighbouring channels, summed in the order of the members.
template <int Channels, class Element>
FLASHVID_SHARED void mean_of_rows(const Element* rows, int64_t stride, const int64_t* member, int64_t count,
                                  float* mean) {
  float sum[Channels] = {};
  for (int64_t m = 0; m < count; ++m) {
    const Element* row = rows + member[m] * stride;
    for (int c = 0; c < Channels; ++c) sum[c] += to_float(row[c]);
  }
  // Most trees have one token: dividing by 1 would take as long as reading it.
  const float size = static_cast<float>(count);
  for (int c = 0; c < Channels; ++c) mean[c] = count == 1 ? sum[c] : sum[c] / size;
}

}  // namespace flashvid
