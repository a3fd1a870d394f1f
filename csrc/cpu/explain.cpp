// SPDX-License-Identifier: MIT
// What stands for each token where budgets follow the video: kernels/ops/explain.py, whose numbers are cited.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "select_match.h"

namespace flashvid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLast = -1, kPicked = -2;  // below any distance: tokens that are not finite, and those that are picked
constexpr int64_t kApart = 100000;         // steps, of a token that is not finite to any other

// What a thread needs for one frame.
struct Workspace {
  Workspace(const Video& video, const Kernels& kernels)
      : products(video, kernels), left(video.n), wide(video.channels), nearest(video.n), kept(video.n) {}
  FrameProducts products;
  Buffer<float> left, wide;
  Buffer<int32_t> nearest, kept;
};

class Explanation {
 public:
  Explanation(const Video& video, int64_t tokens, double still, int threads)
      : video_(video),
        tokens_(tokens),
        picks_(std::min(video.n, tokens)),
        still_(still),
        threads_(threads),
        use_(kernels()),
        norms_(measure(video, threads)),
        finite_(video.num_tokens()),
        news_(video.num_tokens()),
        residual_(video.num_frames * picks_),
        order_(video.num_frames * picks_),
        kept_(video.num_frames) {}

  void run(int64_t* source) {
    auto all = workspaces<Workspace>(video_.num_frames, threads_, video_, use_);
    find_finite(all);
    std::vector<uint8_t> any(static_cast<size_t>(video_.num_tokens()), 1);
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int) {
      if (t > 0) match_position(use_, video_, norms_, t - 1, any.data(), news_.data(), source);
    });
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int thread) {
      Workspace& mine = all[static_cast<size_t>(thread)];
      begin(t, measure_distances(t, mine.products), mine);
      pick(t, mine);
    });
    keep();
    std::vector<uint8_t> stayed(static_cast<size_t>(video_.num_tokens()));
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int thread) {
      Workspace& mine = all[static_cast<size_t>(thread)];
      if (kept_[t] > 0) measure_distances(t, mine.products);
      explain(t, mine, source, stayed.data());
    });
    for (int64_t token = video_.n; token < video_.num_tokens(); ++token) {
      if (stayed[static_cast<size_t>(token)]) source[token] = source[token - video_.n];
    }
  }

 private:
  // All tokens of a regular frame are.
  void find_finite(std::vector<Workspace>& all) {
    parallel_for(video_.num_frames, threads_, [&](int64_t t, int thread) {
      std::fill_n(finite_.data() + t * video_.n, video_.n, true);
      float* wide = all[static_cast<size_t>(thread)].wide.data();
      for (int64_t token = t * video_.n; token < (t + 1) * video_.n && !norms_.regular[t]; ++token) {
        use_.widen(video_.row(token), video_.dtype, video_.channels, wide);
        finite_[token] = std::all_of(wide, wide + video_.channels, [](float x) { return std::isfinite(x); });
      }
    });
  }

  // The distances between the tokens of frame t into products.gram(), 0 from each to itself; returns their sum.
  int64_t measure_distances(int64_t t, FrameProducts& products) const {
    const int64_t n = video_.n, stride = products.stride();
    const bool* finite = finite_.data() + t * n;
    const float* inverse = norms_.inverse.data() + t * n;
    products.compute(norms_, t, true, false);
    float* apart = products.gram();
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) {
      float* row = apart + i * stride;
      for (int64_t j = i; j < n && !norms_.regular[t]; ++j) {
        if (!finite[i] || !finite[j]) row[j] = 0;
      }
      row[i] = 0;
      total += 2 * use_.distance_steps(row + i + 1, n - i - 1, inverse[i], inverse + i + 1);
    }
    mirror(apart, n, stride);
    return total;
  }

  // 1. What the tokens of frame t begin with, into mine.left. `total` of its distances; news_ has cosines with the
  // frame before, and then the distances to it.
  void begin(int64_t t, int64_t total, Workspace& mine) {
    const int64_t n = video_.n, stride = mine.products.stride();
    const bool* finite = finite_.data() + t * n;
    float* news = news_.data() + t * n;
    const int64_t count = std::count(finite, finite + n, true);
    total -= kApart * (n * (n - 1) - count * (count - 1));
    const double pairs = static_cast<double>(std::max<int64_t>(1, count * count));
    const float least = static_cast<float>(std::nearbyint(still_ * static_cast<double>(total) / pairs));
    if (t > 0) {
      std::replace_if(news, news + n, [](float cosine) { return !std::isfinite(cosine); }, 0.0f);
      use_.distance_steps(news, n, 1.0f, norms_.ones.data());
    }
    for (int64_t i = 0; i < n; ++i) {
      if (t == 0) {
        const float* row = mine.products.gram() + i * stride;
        const double away = std::accumulate(row, row + n, 0.0) / static_cast<double>(n);
        news[i] = static_cast<float>(std::max(0.0, std::nearbyint(2 * kApart - away)));
      }
      mine.left[i] = finite[i] ? std::max(least, news[i]) : kLast;
    }
  }

  // 2. Farthest first: the order of the tokens of frame t, and the residual at which each is picked.
  void pick(int64_t t, Workspace& mine) {
    const int64_t stride = mine.products.stride();
    float* left = mine.left.data();
    int64_t choice = std::max_element(left, left + video_.n) - left;
    for (int64_t step = 0; step < picks_; ++step) {
      residual_[t * picks_ + step] = left[choice];
      order_[t * picks_ + step] = static_cast<int32_t>(choice);
      left[choice] = kPicked;
      choice = use_.farthest(mine.products.gram() + choice * stride, video_.n, left);
    }
  }

  // 3. How many of each frame's first picks are among the largest residuals of the video.
  void keep() {
    const int64_t all = video_.num_frames * picks_;
    float* residual = residual_.data();
    if (residual[0] >= 0) residual[0] = kInfinity;  // so that every token goes somewhere
    std::vector<float> sorted(residual, residual + all);
    std::nth_element(sorted.begin(), sorted.begin() + (tokens_ - 1), sorted.end(), std::greater<float>());
    const float least = sorted[static_cast<size_t>(tokens_ - 1)];
    int64_t ties = tokens_ - std::count_if(residual, residual + all, [=](float x) { return x > least; });
    for (int64_t t = 0; t < video_.num_frames; ++t) {
      kept_[t] = 0;
      for (int64_t step = 0; step < picks_; ++step) {
        const float own = residual[t * picks_ + step];
        kept_[t] += own > least || (own == least && ties-- > 0);
      }
    }
  }

  // 4. What stands for each token of frame t, and whether it stayed: then what stands for its place before does.
  void explain(int64_t t, Workspace& mine, int64_t* source, uint8_t* stayed) const {
    const int64_t n = video_.n, stride = mine.products.stride();
    const bool* finite = finite_.data() + t * n;
    float* least = mine.left.data();
    int32_t* nearest = mine.nearest.data();
    std::fill_n(least, n, kInfinity);
    std::fill_n(nearest, n, -1);
    int32_t* const kept = mine.kept.data();
    int32_t* const end = std::copy_n(order_.data() + t * picks_, kept_[t], kept);
    std::sort(kept, end);  // ties go to the lowest index
    for (const int32_t* i = kept; i < end; ++i) {
      if (finite[*i]) use_.take_nearer(mine.products.gram() + *i * stride, n, *i, least, nearest);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = t * n + i;
      source[token] = nearest[i] < 0 ? -1 : t * n + nearest[i];
      stayed[token] = t > 0 && news_[token] <= least[i];
    }
    for (const int32_t* i = kept; i < end; ++i) {
      source[t * n + *i] = t * n + *i;
      stayed[t * n + *i] = 0;
    }
  }

  const Video video_;
  const int64_t tokens_, picks_;
  const double still_;
  const int threads_;
  const Kernels& use_;
  Norms norms_;
  Buffer<bool> finite_;
  Buffer<float> news_;      // distances through time
  Buffer<float> residual_;  // of each frame, in the order of its picks
  Buffer<int32_t> order_;
  Buffer<int64_t> kept_;  // of each frame: its first picks
};

}  // namespace

void explain_tokens(const Video& video, int64_t tokens, double still, int64_t* source, int threads) {
  Explanation(video, tokens, still, threads).run(source);
}

}  // namespace flashvid
