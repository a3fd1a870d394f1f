// SPDX-License-Identifier: MIT
// Segments of frames, and the relevance of tokens to theirs (Sec. 1 and 2).
#include "segment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "products.h"

namespace flashvid {

void segment_frames(const float* frames, int64_t num_frames, int64_t channels, float threshold, int64_t min_segments,
                    int64_t* segment_id) {
  const Kernels& use = kernels();
  const int64_t transitions = num_frames - 1;
  Buffer<float> pair(2 * channels);
  std::vector<float> similarity(static_cast<size_t>(transitions));
  const auto unit = [&](int64_t t) {
    float* row = pair.data() + t % 2 * channels;
    std::copy_n(frames + t * channels, channels, row);
    make_unit(use, row, channels);
  };
  unit(0);
  for (int64_t t = 0; t < transitions; ++t) {
    unit(t + 1);
    const float cosine = use.dot(pair.data(), Dtype::kFloat32, channels, pair.data() + channels);
    similarity[static_cast<size_t>(t)] = std::isfinite(cosine) ? cosine : -std::numeric_limits<float>::infinity();
  }
  const int64_t low = std::count_if(similarity.begin(), similarity.end(), [=](float s) { return s < threshold; });
  const int64_t num_cuts = std::max(low, std::min(min_segments - 1, transitions));

  std::vector<int64_t> lowest_first(similarity.size());
  std::iota(lowest_first.begin(), lowest_first.end(), 0);
  std::stable_sort(lowest_first.begin(), lowest_first.end(), [&](int64_t a, int64_t b) {
    return similarity[static_cast<size_t>(a)] < similarity[static_cast<size_t>(b)];
  });
  std::fill_n(segment_id, num_frames, 0);
  for (int64_t i = 0; i < num_cuts; ++i) segment_id[lowest_first[static_cast<size_t>(i)] + 1] = 1;
  std::partial_sum(segment_id, segment_id + num_frames, segment_id);
}

Buffer<float> segment_means(const float* frames, int64_t num_frames, int64_t channels, const int64_t* segment_id,
                            std::vector<int64_t>& segment) {
  segment.assign(static_cast<size_t>(num_frames), 0);
  for (int64_t t = 1; t < num_frames; ++t) {
    segment[static_cast<size_t>(t)] = segment[static_cast<size_t>(t - 1)] + (segment_id[t] != segment_id[t - 1]);
  }
  Buffer<float> means((segment.back() + 1) * channels);
  for_each_segment(segment_id, num_frames, [&](int64_t begin, int64_t end) {
    float* mean = means.data() + segment[static_cast<size_t>(begin)] * channels;
    std::fill_n(mean, channels, 0.0f);
    for (int64_t t = begin; t < end; ++t) kernels().add_row(frames + t * channels, Dtype::kFloat32, channels, mean);
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<float>(end - begin);
  });
  return means;
}

void event_relevance(const Video& video, const int64_t* segment_id, float* relevance, int threads) {
  const Kernels& use = kernels();
  Buffer<float> frames(video.num_frames * video.channels);
  parallel_for(video.num_frames, threads, [&](int64_t t, int) {
    float* mean = frames.data() + t * video.channels;
    std::fill_n(mean, video.channels, 0.0f);
    for (int64_t i = 0; i < video.n; ++i) use.add_row(video.row(t * video.n + i), video.dtype, video.channels, mean);
    for (int64_t c = 0; c < video.channels; ++c) mean[c] /= static_cast<float>(video.n);
  });
  std::vector<int64_t> segment;
  const Buffer<float> means = segment_means(frames.data(), video.num_frames, video.channels, segment_id, segment);
  parallel_for(video.num_frames, threads, [&](int64_t t, int) {
    const float* mean = means.data() + segment[static_cast<size_t>(t)] * video.channels;
    for (int64_t token = t * video.n; token < (t + 1) * video.n; ++token) {
      const float product = use.dot(video.row(token), video.dtype, video.channels, mean);
      relevance[token] = product < 0 ? 0 : product;  // NaN stays
    }
  });
}

}  // namespace flashvid
