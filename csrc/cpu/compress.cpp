// SPDX-License-Identifier: MIT
// The whole algorithm in one call, in the order of the sections of ALGORITHM: `run` says which step follows which, and
// the steps stand below it in that order. A frame's tokens are in cache once for Sec. 2 and 3, once for Sec. 4 and 5.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cluster.h"
#include "distances.h"
#include "segment.h"
#include "select_match.h"
#include "shares.h"

namespace flashvid {

namespace {

// What a thread needs for one frame of Sec. 2 and 3.
struct SelectWorkspace {
  SelectWorkspace(const Video& video, const Kernels& kernels)
      : products(video, kernels), weight(video.n), nearest(video.n), mask(video.n) {}
  FrameProducts products;
  Buffer<float> weight, nearest;
  Buffer<int32_t> mask;
};

// And of Sec. 4 and 5: r trees begin in a frame.
struct MergeWorkspace {
  MergeWorkspace(int64_t r, int64_t channels) : distances(r, channels), merged(channels) {}
  RowDistances distances;
  Buffer<float> merged;
};

class Compression {
 public:
  Compression(const Video& video, const float* attention, const Settings& settings, int threads)
      : video_(video),
        attention_(attention),
        settings_(settings),
        threads_(threads),
        use_(kernels()),
        norms_(video),
        frames_(video.num_frames * video.channels),
        segment_id_(video.num_frames),
        candidate_(video.num_tokens()),
        similarity_(video.num_tokens()),
        parent_(video.num_tokens()),
        root_(video.num_tokens()) {}

  void run(void* tokens, int64_t* source_index, int64_t* size, int64_t* assignment) {
    embed_frames();  // Sec. 1
    segment_frames(frames_.data(), video_.num_frames, video_.channels, settings_.segment_threshold,
                   settings_.min_segments, segment_id_.data());
    share_ = share_merged(segment_id_.data(), video_.num_frames, settings_.merged);  // Sec. 0, by segments
    select_and_match();                                                              // Sec. 2, and 3
    grow_trees();                                                                    // Sec. 3
    lay_out();                                                                       // Sec. 4
    cluster_and_write(tokens, source_index);                                         // Sec. 4 and 5
    assign(source_index, size, assignment);                                          // Sec. 5
  }

 private:
  // Sec. 1. The mean of every frame, and in the same pass the norms of its tokens.
  void embed_frames() {
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int) {
      float* mean = frames_.data() + t * video_.channels;
      std::fill_n(mean, video_.channels, 0.0f);
      for (int64_t token = t * video_.n; token < (t + 1) * video_.n; ++token) {
        norms_.inverse[token] = use_.add_row(video_.row(token), video_.dtype, video_.channels, mean);
      }
      for (int64_t c = 0; c < video_.channels; ++c) mean[c] /= static_cast<float>(video_.n);
      norms_.enter(video_, t);
    });
  }

  // Sec. 2: w_j = A_j, or A_j E_j with E_j = <x_j, mean of the segment's frames>, clamped at 0.
  void weigh(int64_t t, const float* event, float* weight) const {
    if (attention_ == nullptr) return;
    for (int64_t i = 0; i < video_.n; ++i) {
      const int64_t token = t * video_.n + i;
      float relevance = 1;
      if (settings_.weigh_by_event) {
        relevance = use_.dot(video_.row(token), video_.dtype, video_.channels, event);
        if (relevance < 0) relevance = 0;
      }
      weight[i] = attention_[token] * relevance;
    }
  }

  // Sec. 2 of frame t, then Sec. 3 from frame t + 1 to it, while the products of both are in cache.
  void select_and_match() {
    const bool diversity = settings_.selected_per_frame > 0 && !settings_.attention_alone;
    std::vector<int64_t> segment;
    const Buffer<float> events =
        segment_means(frames_.data(), video_.num_frames, video_.channels, segment_id_.data(), segment);
    auto all = workspaces<SelectWorkspace>(video_.num_frames, threads_, video_, use_);
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int thread) {
      SelectWorkspace& mine = all[static_cast<size_t>(thread)];
      const int64_t n = video_.n, here = t * n;
      uint8_t* candidate = candidate_.data() + here;
      const bool next = settings_.merged > 0 && t + 1 < video_.num_frames && segment_id_[t + 1] == segment_id_[t];
      const bool multiply_next = next && !settings_.match_by_position;
      if (diversity) weigh(t, events.data() + segment[static_cast<size_t>(t)] * video_.channels, mine.weight.data());
      if (diversity || multiply_next) mine.products.compute(norms_, t, diversity, multiply_next);

      if (diversity) {
        select_frame(use_, mine.products.gram(), mine.products.stride(), n, norms_.inverse.data() + here,
                     attention_ == nullptr ? nullptr : mine.weight.data(), settings_.selected_per_frame, candidate,
                     mine.nearest.data());
      } else {
        select_highest(attention_ == nullptr ? nullptr : attention_ + here, n, settings_.selected_per_frame, candidate);
      }
      for (int64_t i = 0; i < n; ++i) candidate[i] = !candidate[i];  // what is not selected may be merged

      if (multiply_next) {
        match_frame(use_, video_, norms_, mine.products.cross(), mine.products.stride(), t, candidate_.data(),
                    similarity_.data(), parent_.data(), mine.mask.data());
      } else if (next) {
        match_position(use_, video_, norms_, t, candidate_.data(), similarity_.data(), parent_.data());
      }
    });
  }

  // Sec. 3. Links above the threshold, of those the strongest, and the trees that they make.
  void grow_trees() {
    for (int64_t t = 0; t < video_.num_frames; ++t) {
      if (settings_.merged == 0) {
        std::fill_n(parent_.data() + t * video_.n, video_.n, -1);
      } else {
        keep_links(video_.n, t, candidate_.data(), segment_id_.data(), settings_.merge_threshold, similarity_.data(),
                   parent_.data());
      }
    }
    keep_strongest(segment_id_.data(), video_.num_frames, video_.n, share_, candidate_.data(), similarity_.data(),
                   parent_.data());
    tree_roots(parent_.data(), video_.num_frames, video_.n, root_.data());
    trees_ = group_members(root_.data(), candidate_.data(), video_.num_tokens());
  }

  // Sec. 4. The trees and the clusters of every frame, and with them its rows of the result.
  void lay_out() {
    const size_t num_frames = static_cast<size_t>(video_.num_frames);
    first_tree_.assign(num_frames + 1, 0);
    for (const int64_t root : trees_.root) ++first_tree_[static_cast<size_t>(root / video_.n) + 1];
    std::partial_sum(first_tree_.begin(), first_tree_.end(), first_tree_.begin());
    clusters_ = share_clusters(segment_id_.data(), video_.num_frames, share_, first_tree_);
    first_row_.assign(num_frames + 1, 0);
    for (size_t t = 0; t < num_frames; ++t) {
      first_row_[t + 1] = first_row_[t] + settings_.selected_per_frame + clusters_[t];
    }
    center_.assign(static_cast<size_t>(trees_.size()), -1);
  }

  int64_t num_trees(int64_t t) const {
    return first_tree_[static_cast<size_t>(t) + 1] - first_tree_[static_cast<size_t>(t)];
  }

  // If there are as many clusters as trees, nothing is merged; without a cluster, a frame's trees are dropped.
  bool merges(int64_t t) const {
    const int64_t clusters = clusters_[static_cast<size_t>(t)];
    return clusters > 0 && clusters < num_trees(t);
  }

  void cluster_and_write(void* tokens, int64_t* source_index) {
    int64_t most_trees = 0;
    for (int64_t t = 0; t < video_.num_frames; ++t) {
      if (merges(t)) most_trees = std::max(most_trees, num_trees(t));
    }
    auto all = workspaces<MergeWorkspace>(video_.num_frames, threads_, most_trees, video_.channels);
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int thread) {
      MergeWorkspace& mine = all[static_cast<size_t>(thread)];
      join_trees(t, mine.distances);
      write_frame(t, mine, tokens, source_index);
    });
  }

  // Sec. 4. The tree that each tree of frame t joins.
  void join_trees(int64_t t, RowDistances& distances) {
    const int64_t first = first_tree_[static_cast<size_t>(t)], trees = num_trees(t);
    const int64_t clusters = clusters_[static_cast<size_t>(t)];
    int64_t* center = center_.data() + first;
    if (merges(t)) {
      std::vector<int64_t> centers(static_cast<size_t>(clusters)), cluster_of(static_cast<size_t>(trees));
      const float* distance = distances.measure(video_, trees_, first, trees, frames_.data() + t * video_.channels, 1);
      cluster_rows(use_, distance, trees, clusters, std::min(settings_.neighbours, trees), centers.data(),
                   cluster_of.data());
      for (int64_t i = 0; i < trees; ++i) {
        center[i] = first + centers[static_cast<size_t>(cluster_of[static_cast<size_t>(i)])];
      }
    } else if (clusters > 0) {
      std::iota(center, center + trees, first);
    }
  }

  // Sec. 3: the mean of all tokens of a tree.
  void tree_mean(int64_t tree, float* mean) const {
    const int64_t first = trees_.first[static_cast<size_t>(tree)];
    use_.mean_rows(video_.features, video_.dtype, video_.channels, trees_.member.data() + first,
                   trees_.first[static_cast<size_t>(tree) + 1] - first, video_.channels, mean);
  }

  // Sec. 4: the mean of all trees of frame t that join one.
  void cluster_mean(int64_t t, int64_t joined, const RowDistances& distances, float* mean) const {
    const int64_t first = first_tree_[static_cast<size_t>(t)], trees = num_trees(t);
    std::fill_n(mean, video_.channels, 0.0f);
    int64_t size = 0;
    for (int64_t i = 0; i < trees; ++i) {
      if (center_[static_cast<size_t>(first + i)] != joined) continue;
      distances.add_row(i, mean);
      ++size;
    }
    for (int64_t c = 0; size > 1 && c < video_.channels; ++c) mean[c] /= static_cast<float>(size);
  }

  // Sec. 5. The kept tokens of frame t in the order of their position; means are fp32 until here.
  void write_frame(int64_t t, MergeWorkspace& mine, void* tokens, int64_t* source_index) const {
    const int64_t row_bytes = video_.channels * bytes_of(video_.dtype);
    const int64_t last_tree = first_tree_[static_cast<size_t>(t) + 1];
    int64_t row = first_row_[static_cast<size_t>(t)], tree = first_tree_[static_cast<size_t>(t)];
    for (int64_t token = t * video_.n; token < (t + 1) * video_.n; ++token) {
      char* out = static_cast<char*>(tokens) + row * row_bytes;
      if (!candidate_[token]) {
        std::memcpy(out, video_.row(token), static_cast<size_t>(row_bytes));
      } else if (tree < last_tree && trees_.root[static_cast<size_t>(tree)] == token) {
        const int64_t here = tree++;
        if (center_[static_cast<size_t>(here)] != here) continue;
        if (merges(t)) {
          cluster_mean(t, here, mine.distances, mine.merged.data());
        } else {
          tree_mean(here, mine.merged.data());
        }
        use_.narrow(mine.merged.data(), video_.dtype, video_.channels, out);
      } else {
        continue;
      }
      source_index[row++] = token;
    }
  }

  // Sec. 5. Where every token went, and how many did.
  void assign(const int64_t* source_index, int64_t* size, int64_t* assignment) const {
    const int64_t kept = first_row_.back();
    std::fill_n(size, kept, 0);
    std::fill_n(assignment, video_.num_tokens(), -1);
    for (int64_t row = 0; row < kept; ++row) {
      assignment[source_index[row]] = row;
      size[row] = !candidate_[source_index[row]];
    }
    for (int64_t tree = 0; tree < trees_.size(); ++tree) {
      const int64_t center = center_[static_cast<size_t>(tree)];
      const int64_t row = center < 0 ? -1 : assignment[trees_.root[static_cast<size_t>(center)]];
      const int64_t first = trees_.first[static_cast<size_t>(tree)], last = trees_.first[static_cast<size_t>(tree) + 1];
      for (int64_t m = first; m < last; ++m) assignment[trees_.member[static_cast<size_t>(m)]] = row;
      if (row >= 0) size[row] += last - first;
    }
  }

  const Video video_;
  const float* const attention_;
  const Settings settings_;
  const int threads_;
  const Kernels& use_;
  Norms norms_;
  Buffer<float> frames_;  // their embeddings
  Buffer<int64_t> segment_id_;
  Buffer<uint8_t> candidate_;  // not selected
  Buffer<float> similarity_;
  Buffer<int64_t> parent_, root_;
  std::vector<int64_t> share_;  // of each frame: M_s of its segment
  Groups trees_;
  std::vector<int64_t> first_tree_, clusters_, first_row_;  // of each frame
  std::vector<int64_t> center_;  // of each tree: the tree at the centre of its cluster, or -1
};

}  // namespace

void compress(const Video& video, const float* attention, const Settings& settings, void* tokens,
              int64_t* source_index, int64_t* size, int64_t* assignment, int threads) {
  Compression(video, attention, settings, threads).run(tokens, source_index, size, assignment);
}

}  // namespace flashvid
