// SPDX-License-Identifier: MIT
// The whole algorithm in one call; the numbered steps are the sections of ALGORITHM.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cluster.h"
#include "forest.h"
#include "select_match.h"

namespace flashvid {

namespace {

// What a thread needs for one frame of steps 2 and 3.
struct SelectWorkspace {
  SelectWorkspace(const Video& video, const Kernels& kernels)
      : products(video, kernels), weight(video.n), nearest(video.n), mask(video.n) {}
  FrameProducts products;
  Buffer<float> weight, nearest;
  Buffer<int32_t> mask;
};

// And of step 4: r trees begin in a frame.
struct MergeWorkspace {
  MergeWorkspace(int64_t r, int64_t channels) : trees(r, channels), merged(channels) {}
  ClusterWorkspace trees;
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
        root_(video.num_tokens()),
        center_(video.num_tokens(), -1),
        quota_(static_cast<size_t>(video.num_frames)) {}

  void run(void* tokens, int64_t* source_index, int64_t* size, int64_t* assignment) {
    measure_frames();
    segment_frames(frames_.data(), video_.num_frames, video_.channels, settings_.segment_threshold,
                   settings_.min_segments, segment_id_.data());
    select_and_match();
    share_quota();
    keep_strongest();
    tree_roots(parent_.data(), video_.num_frames, video_.n, root_.data());
    trees_ = group_members(root_.data(), candidate_.data(), video_.num_tokens());
    share_clusters();
    cluster_and_write(tokens, source_index);
    assign(source_index, size, assignment);
  }

 private:
  // Norms of the tokens and means of the frames, in one pass.
  void measure_frames() {
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

  // 2. and 3.: a frame's tokens are multiplied with each other and with the next frame's while they are in cache.
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
        select_highest(t, candidate);
      }
      for (int64_t i = 0; i < n; ++i) candidate[i] = !candidate[i];

      if (multiply_next) {
        match_frame(use_, video_, norms_, mine.products.cross(), mine.products.stride(), t, candidate_.data(),
                    similarity_.data(), parent_.data(), mine.mask.data());
      } else if (next) {
        match_position(use_, video_, norms_, t, candidate_.data(), similarity_.data(), parent_.data());
      }
    });
    for (int64_t t = 0; t < video_.num_frames; ++t) {
      if (settings_.merged == 0) {
        std::fill_n(parent_.data() + t * video_.n, video_.n, -1);
      } else {
        keep_links(video_.n, t, candidate_.data(), segment_id_.data(), settings_.merge_threshold, similarity_.data(),
                   parent_.data());
      }
    }
  }

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

  // "attention": the K highest, others than finite last.
  void select_highest(int64_t t, uint8_t* picked) const {
    std::fill_n(picked, video_.n, uint8_t{0});
    if (settings_.selected_per_frame == 0) return;
    const float* attention = attention_ + t * video_.n;
    const auto score = [=](int64_t i) {
      return std::isfinite(attention[i]) ? attention[i] : -std::numeric_limits<float>::infinity();
    };
    std::vector<int64_t> order(static_cast<size_t>(video_.n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score(a) > score(b); });
    for (int64_t i = 0; i < settings_.selected_per_frame; ++i) picked[order[static_cast<size_t>(i)]] = 1;
  }

  // Calls visit(first frame, last frame + 1) of every segment.
  template <class Visit>
  void for_each_segment(Visit visit) const {
    for (int64_t begin = 0, end; begin < video_.num_frames; begin = end) {
      for (end = begin + 1; end < video_.num_frames && segment_id_[end] == segment_id_[begin];) ++end;
      visit(begin, end);
    }
  }

  // M_s, entered at every frame of the segment.
  void share_quota() {
    const auto before = [&](int64_t t) { return settings_.merged * t / video_.num_frames; };
    for_each_segment([&](int64_t begin, int64_t end) {
      std::fill(quota_.begin() + begin, quota_.begin() + end, before(end) - before(begin));
    });
  }

  // Remove the weakest edges of a segment that would be left with fewer roots than its quota.
  void keep_strongest() {
    std::vector<int64_t> edges;
    for_each_segment([&](int64_t begin, int64_t end) {
      edges.clear();
      int64_t most = -quota_[static_cast<size_t>(begin)];
      for (int64_t token = begin * video_.n; token < end * video_.n; ++token) {
        most += candidate_[token];
        if (parent_[token] >= 0) edges.push_back(token);
      }
      if (static_cast<int64_t>(edges.size()) <= most) return;
      std::nth_element(edges.begin(), edges.begin() + most, edges.end(), [&](int64_t a, int64_t b) {
        return similarity_[a] > similarity_[b] || (similarity_[a] == similarity_[b] && a < b);
      });
      for (size_t i = static_cast<size_t>(most); i < edges.size(); ++i) parent_[edges[i]] = -1;
    });
  }

  // 4.: roots and clusters of every frame, and the first output row of each.
  void share_clusters() {
    const size_t num_frames = static_cast<size_t>(video_.num_frames);
    first_tree_.assign(num_frames + 1, 0);
    for (const int64_t root : trees_.root) ++first_tree_[static_cast<size_t>(root / video_.n) + 1];
    std::partial_sum(first_tree_.begin(), first_tree_.end(), first_tree_.begin());
    first_row_.assign(num_frames + 1, 0);
    for_each_segment([&](int64_t begin, int64_t end) {
      const int64_t start = first_tree_[static_cast<size_t>(begin)];
      const int64_t trees = std::max<int64_t>(1, first_tree_[static_cast<size_t>(end)] - start);
      for (size_t t = static_cast<size_t>(begin); t < static_cast<size_t>(end); ++t) {
        const int64_t quota = quota_[t];
        const auto before = [&](size_t frame) { return quota * (first_tree_[frame] - start) / trees; };
        const int64_t clusters = before(t + 1) - before(t);
        first_row_[t + 1] = first_row_[t] + settings_.selected_per_frame + clusters;
      }
    });
  }

  int64_t num_trees(int64_t t) const {
    return first_tree_[static_cast<size_t>(t) + 1] - first_tree_[static_cast<size_t>(t)];
  }
  int64_t num_clusters(int64_t t) const {
    return first_row_[static_cast<size_t>(t) + 1] - first_row_[static_cast<size_t>(t)] - settings_.selected_per_frame;
  }

  void cluster_and_write(void* tokens, int64_t* source_index) {
    int64_t most_trees = 0;
    for (int64_t t = 0; t < video_.num_frames; ++t) {
      if (num_clusters(t) > 0 && num_clusters(t) < num_trees(t)) most_trees = std::max(most_trees, num_trees(t));
    }
    auto all = workspaces<MergeWorkspace>(video_.num_frames, threads_, most_trees, video_.channels);
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int thread) {
      const int64_t first = first_tree_[static_cast<size_t>(t)], trees = num_trees(t), clusters = num_clusters(t);
      int64_t* center = center_.data() + first;  // the tree that each tree joins
      MergeWorkspace& mine = all[static_cast<size_t>(thread)];
      const bool merge = clusters > 0 && clusters < trees;
      if (merge) {
        merge_trees(t, clusters, center, mine.trees);
      } else if (clusters > 0) {
        std::iota(center, center + trees, first);
      }
      write_frame(t, tokens, source_index, merge, mine);
    });
  }

  void tree_mean(int64_t tree, float* mean) const {
    const int64_t first = trees_.first[static_cast<size_t>(tree)];
    use_.mean_rows(video_.features, video_.dtype, video_.channels, trees_.member.data() + first,
                   trees_.first[static_cast<size_t>(tree) + 1] - first, video_.channels, mean);
  }

  void merge_trees(int64_t t, int64_t clusters, int64_t* center, ClusterWorkspace& mine) const {
    const int64_t first = first_tree_[static_cast<size_t>(t)], trees = num_trees(t);
    std::vector<int64_t> centers(static_cast<size_t>(clusters)), cluster_of(static_cast<size_t>(trees));
    mine.cluster(video_, trees_, first, trees, frames_.data() + t * video_.channels, clusters,
                 std::min(settings_.neighbours, trees), centers.data(), cluster_of.data(), 1);
    for (int64_t i = 0; i < trees; ++i) {
      center[i] = first + centers[static_cast<size_t>(cluster_of[static_cast<size_t>(i)])];
    }
  }

  // 5.: the kept tokens of frame t in the order of their position.
  void write_frame(int64_t t, void* tokens, int64_t* source_index, bool merge, MergeWorkspace& mine) const {
    const int64_t first = first_tree_[static_cast<size_t>(t)], trees = num_trees(t);
    const int64_t row_bytes = video_.channels * bytes_of(video_.dtype);
    int64_t row = first_row_[static_cast<size_t>(t)], tree = first;
    for (int64_t token = t * video_.n; token < (t + 1) * video_.n; ++token) {
      char* out = static_cast<char*>(tokens) + row * row_bytes;
      if (!candidate_[token]) {
        std::memcpy(out, video_.row(token), static_cast<size_t>(row_bytes));
      } else if (tree < first + trees && trees_.root[static_cast<size_t>(tree)] == token) {
        const int64_t here = tree++;
        if (center_[here] != here) continue;
        if (merge) {
          std::fill_n(mine.merged.data(), video_.channels, 0.0f);
          int64_t size = 0;
          for (int64_t i = 0; i < trees; ++i) {
            if (center_[static_cast<size_t>(first + i)] != here) continue;
            mine.trees.add_row(i, mine.merged.data());
            ++size;
          }
          for (int64_t c = 0; size > 1 && c < video_.channels; ++c) mine.merged[c] /= static_cast<float>(size);
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

  // Where every token went, and how many did.
  void assign(const int64_t* source_index, int64_t* size, int64_t* assignment) const {
    const int64_t kept = first_row_.back();
    std::fill_n(size, kept, 0);
    std::fill_n(assignment, video_.num_tokens(), -1);
    for (int64_t row = 0; row < kept; ++row) {
      assignment[source_index[row]] = row;
      size[row] = !candidate_[source_index[row]];
    }
    for (int64_t tree = 0; tree < trees_.size(); ++tree) {
      const int64_t center = center_[tree];
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
  Buffer<float> frames_;
  Buffer<int64_t> segment_id_;
  Buffer<uint8_t> candidate_;
  Buffer<float> similarity_;
  Buffer<int64_t> parent_, root_;
  std::vector<int64_t> center_;  // of each tree: the tree at the centre of its cluster, or -1
  std::vector<int64_t> quota_, first_tree_, first_row_;
  Groups trees_;
};

}  // namespace

void compress(const Video& video, const float* attention, const Settings& settings, void* tokens,
              int64_t* source_index, int64_t* size, int64_t* assignment, int threads) {
  Compression(video, attention, settings, threads).run(tokens, source_index, size, assignment);
}

}  // namespace flashvid
