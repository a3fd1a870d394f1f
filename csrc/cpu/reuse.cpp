// SPDX-License-Identifier: MIT
// Which rows of a video its encoder computes; kernels/ops/reuse.py defines it and has the same in numpy.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace flashvid {

namespace {

constexpr int64_t kFar = int64_t{1} << 60;
constexpr int64_t kTooFar = int64_t{1} << 32;  // added to a distance beyond `farthest`

// The sum of absolute differences.
int64_t distance(const uint8_t* x, const uint8_t* y, int64_t n) {
  int64_t total = 0;
  constexpr int64_t kSlice = 1 << 16;  // a sum of so many fits into 32 bits
  for (int64_t start = 0; start < n; start += kSlice) {
    const int64_t stop = std::min(n, start + kSlice);
    int32_t sum = 0;
    for (int64_t i = start; i < stop; ++i) sum += std::abs(static_cast<int>(x[i]) - static_cast<int>(y[i]));
    total += sum;
  }
  return total;
}

struct Block {
  int64_t first, length;  // temporal positions
  int64_t reach;          // the most positions of a range, min(longest, length)
  int64_t least, most;    // ranges of a column
  int64_t near;           // where its distances begin: [reach, length, places], of position i and the one k further
  int64_t mean;           // where their means over places begin: [reach, length]
};

// What one column needs while it is cut; a thread's workspace.
class Column {
 public:
  Column(int64_t reach, int64_t length, int64_t most)
      : near_(reach * length), far_(reach * length), total_(reach), pure_(reach), cost_(reach * length),
        sum_(reach * length), middle_(reach * length), best_(2 * (length + 1)), sums_(2 * (length + 1)),
        begin_((most + 1) * (length + 1)) {}

  // Distances of the column, and of each range the position that stands for it.
  void load(const Block& block, const uint32_t* near, const int64_t* mean, int64_t places, int64_t place,
            int64_t farthest) {
    reach_ = block.reach;
    length_ = block.length;
    for (int64_t i = 0; i < reach_ * length_; ++i) {
      const int64_t d = near[block.near + i * places + place];
      near_[i] = d + (d > farthest ? kTooFar : 0);
      far_[i] = near_[i] + mean[block.mean + i];
    }
    for (int64_t a = 0; a < length_; ++a) {
      const int64_t n = std::min(reach_, length_ - a);
      for (int64_t e = 0; e < n; ++e) {  // a range of e + 1 positions
        total_[e] = pure_[e] = 0;
        for (int64_t i = 0; i < e; ++i) {
          const int64_t pair = (e - i) * length_ + a + i;
          total_[e] += far_[pair];
          pure_[e] += near_[pair];
          total_[i] += far_[pair];
          pure_[i] += near_[pair];
        }
        int64_t first = 0;
        for (int64_t i = 1; i <= e; ++i) first = total_[i] < total_[first] ? i : first;
        // by where it ends, then begins: candidates of one end lie side by side
        const int64_t at = (a + e) * reach_ + (reach_ - 1 - e);
        cost_[at] = total_[first];
        sum_[at] = pure_[first];
        middle_[at] = a + first;
      }
    }
  }

  // costs and distances of `least` .. `most` ranges, one after the other.
  void measure(int64_t least, int64_t most, int64_t* costs, int64_t* distances) {
    start();
    for (int64_t k = 1; k <= most; ++k) {
      advance(k, nullptr);
      if (k < least) continue;
      costs[k - least] = best_[now_ + length_];
      distances[k - least] = sums_[now_ + length_];
      if (best_[now_ + length_] == 0 && sums_[now_ + length_] == 0) {  // more ranges leave it so
        std::fill(costs + (k - least), costs + (most - least + 1), 0);
        std::fill(distances + (k - least), distances + (most - least + 1), 0);
        return;
      }
    }
  }

  // Who stands for each position, `stride` apart, with so many ranges.
  void cut(int64_t ranges, int64_t first, int64_t* position, int64_t stride) {
    start();
    for (int64_t k = 1; k <= ranges; ++k) advance(k, begin_.data() + k * (length_ + 1));
    for (int64_t k = ranges, b = length_; b > 0; --k) {
      const int64_t a = begin_[k * (length_ + 1) + b];
      const int64_t middle = first + middle_[(b - 1) * reach_ + (a - (b - reach_))];
      for (int64_t t = a; t < b; ++t) position[t * stride] = middle;
      b = a;
    }
  }

 private:
  void start() {
    now_ = 0;
    std::fill(best_.data(), best_.data() + length_ + 1, kFar);
    std::fill(sums_.data(), sums_.data() + length_ + 1, 0);
    best_[0] = 0;
  }

  // From k - 1 ranges to k. begin: where the last of them begins, by where it ends; null if nobody asks.
  void advance(int64_t k, int64_t* begin) {
    const int64_t* best = best_.data() + now_;
    const int64_t* sums = sums_.data() + now_;
    now_ = length_ + 1 - now_;
    int64_t* next = best_.data() + now_;
    int64_t* next_sums = sums_.data() + now_;
    std::fill(next, next + std::min(k, length_ + 1), kFar);
    for (int64_t b = k; b <= length_; ++b) {
      const int64_t lowest = std::max(k - 1, b - reach_);
      const int64_t* cost = cost_.data() + (b - 1) * reach_ - (b - reach_);
      int64_t least = kFar, from = lowest;
      for (int64_t a = lowest; a < b; ++a) {
        const int64_t candidate = best[a] + cost[a];
        if (candidate < least) {
          least = candidate;
          from = a;
        }
      }
      next[b] = least;
      next_sums[b] = sums[from] + sum_[(b - 1) * reach_ + from - (b - reach_)];
      if (begin != nullptr) begin[b] = from;
    }
  }

  int64_t reach_ = 0, length_ = 0, now_ = 0;
  Buffer<int64_t> near_, far_, total_, pure_, cost_, sum_, middle_, best_, sums_, begin_;
};

struct Step {
  int64_t gain, rows, to, column;  // gain / rows for each further row
};

bool earlier(const Step& x, const Step& y) {
  const int64_t left = x.gain * y.rows, right = y.gain * x.rows;
  if (left != right) return left > right;
  return x.to != y.to ? x.to < y.to : x.column < y.column;
}

// The steps along the lower convex hull of a column's costs, points on its edges included.
void add_steps(const int64_t* costs, int64_t least, int64_t most, int64_t column, std::vector<int64_t>& hull,
               std::vector<Step>& steps) {
  const auto cost = [&](int64_t k) { return costs[k - least]; };
  hull.assign(1, least);
  for (int64_t k = least + 1; k <= most; ++k) {
    while (hull.size() > 1) {
      const int64_t j = hull.back(), i = hull[hull.size() - 2];
      if ((cost(i) - cost(j)) * (k - j) >= (cost(j) - cost(k)) * (j - i)) break;
      hull.pop_back();
    }
    hull.push_back(k);
  }
  for (size_t i = 1; i < hull.size(); ++i) {
    steps.push_back({cost(hull[i - 1]) - cost(hull[i]), hull[i] - hull[i - 1], hull[i], column});
  }
}

}  // namespace

void choose_rows(const uint8_t* levels, int64_t places, int64_t channels, const Blocks& video, int64_t num_rows,
                 int64_t unexplained, int64_t farthest, int64_t* position, int threads) {
  std::vector<Block> blocks;
  int64_t near_size = 0, mean_size = 0, reach = 1, length = 1, most = 1, first = 0;
  std::vector<int64_t> values{0};  // where the costs of each column begin
  for (size_t i = 0; i < video.ends.size(); ++i) {
    Block block{first, video.ends[i] - first, 0, video.least[i], video.most[i], near_size, mean_size};
    block.reach = std::min(video.longest, block.length);
    near_size += block.reach * block.length * places;
    mean_size += block.reach * block.length;
    for (int64_t place = 0; place < places; ++place) values.push_back(values.back() + block.most - block.least + 1);
    reach = std::max(reach, block.reach);
    length = std::max(length, block.length);
    most = std::max(most, block.most);
    first = video.ends[i];
    blocks.push_back(block);
  }

  Buffer<uint32_t> near(near_size);
  Buffer<int64_t> mean(mean_size);
  std::fill(near.data(), near.data() + near_size, 0);
  std::fill(mean.data(), mean.data() + mean_size, 0);
  std::vector<std::pair<size_t, int64_t>> frames;  // block, position in it
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (int64_t t = 0; t < blocks[i].length; ++t) frames.emplace_back(i, t);
  }
  parallel_for(static_cast<int64_t>(frames.size()), threads, [&](int64_t item, int) {
    const auto [index, t] = frames[static_cast<size_t>(item)];
    const Block& block = blocks[index];
    for (int64_t k = 1; k < std::min(block.reach, block.length - t); ++k) {
      const uint8_t* x = levels + (block.first + t) * places * channels;
      const uint8_t* y = x + k * places * channels;
      uint32_t* out = near.data() + block.near + (k * block.length + t) * places;
      int64_t total = 0;
      for (int64_t p = 0; p < places; ++p) {
        const int64_t d = distance(x + p * channels, y + p * channels, channels);
        out[p] = static_cast<uint32_t>(d);
        total += d;
      }
      mean[block.mean + k * block.length + t] = total / places;
    }
  });

  const int64_t columns = static_cast<int64_t>(blocks.size()) * places;
  auto workspace = workspaces<Column>(columns, threads, reach, length, most);
  std::vector<int64_t> costs(static_cast<size_t>(values.back())), distances(costs.size());
  parallel_for(columns, threads, [&](int64_t column, int thread) {
    const Block& block = blocks[static_cast<size_t>(column / places)];
    Column& work = workspace[static_cast<size_t>(thread)];
    const size_t at = static_cast<size_t>(values[static_cast<size_t>(column)]);
    work.load(block, near.data(), mean.data(), places, column % places, farthest);
    work.measure(block.least, block.most, costs.data() + at, distances.data() + at);
  });

  std::vector<int64_t> rows(static_cast<size_t>(columns));
  std::vector<Step> steps;
  std::vector<int64_t> hull;
  int64_t left = num_rows, distance = 0;
  for (int64_t column = 0; column < columns; ++column) {
    const Block& block = blocks[static_cast<size_t>(column / places)];
    const size_t at = static_cast<size_t>(values[static_cast<size_t>(column)]);
    rows[static_cast<size_t>(column)] = block.least;
    left -= block.least;
    distance += distances[at];
    add_steps(costs.data() + at, block.least, block.most, column, hull, steps);
  }
  std::sort(steps.begin(), steps.end(), earlier);
  for (const Step& step : steps) {
    if (num_rows < 0 ? distance <= unexplained : left == 0) break;
    const Block& block = blocks[static_cast<size_t>(step.column / places)];
    const size_t column = static_cast<size_t>(step.column);
    const int64_t given = num_rows < 0 ? step.rows : std::min(step.rows, left);
    const int64_t at = values[column] + rows[column] - block.least;
    distance += distances[static_cast<size_t>(at + given)] - distances[static_cast<size_t>(at)];
    rows[column] += given;
    left -= given;
  }

  parallel_for(columns, threads, [&](int64_t column, int thread) {
    const Block& block = blocks[static_cast<size_t>(column / places)];
    Column& work = workspace[static_cast<size_t>(thread)];
    work.load(block, near.data(), mean.data(), places, column % places, farthest);
    work.cut(rows[static_cast<size_t>(column)], block.first, position + block.first * places + column % places, places);
  });
}

}  // namespace flashvid
