// SPDX-License-Identifier: MIT
// Inner products of the tokens of one frame with each other and with those of the next.
#pragma once

#include "kernels/kernels.h"
#include "ops.h"
#include "parallel.h"

namespace flashvid {

// 1 / |x| of every token, 0 for a zero vector, of regular frames: those whose squared norms fp32 holds.
// The tokens of other frames (NaN, infinity, lengths beyond 1e15 or below 1e-15) are divided by their norms
// before they are multiplied, as the reference does with all; their entries here are 1.
struct Norms {
  explicit Norms(const Video& video)
      : inverse(video.num_tokens()), regular(video.num_frames), ones(static_cast<size_t>(video.n), 1.0f) {}

  // Enter frame t by the sums of squares that `inverse` holds of its tokens.
  void enter(const Video& video, int64_t t);
  bool regular_pair(int64_t t) const { return regular[t] && regular[t + 1]; }

  Buffer<float> inverse;
  Buffer<bool> regular;
  std::vector<float> ones;
};

Norms measure(const Video& video, int threads);

// The entries below the diagonal of a [n, stride] matrix become those above it.
void mirror(float* matrix, int64_t n, int64_t stride);

// x / |x|, as the reference has it.
void make_unit(const Kernels& kernels, float* row, int64_t channels);

// A thread's workspace.
class FrameProducts {
 public:
  FrameProducts(const Video& video, const Kernels& kernels);

  // Rows i of gram() then hold products of token i of frame t with those j > i, and rows of cross() those of
  // frame t+1 with all of frame t.
  void compute(const Norms& norms, int64_t t, bool own, bool next);
  float* gram() { return out_.data(); }
  const float* cross() const { return out_.data() + video_.n * stride_; }
  int64_t stride() const { return stride_; }

 private:
  const void* load(int64_t t, int64_t num_frames, bool unit);

  const Video video_;
  const Kernels& kernels_;
  const bool bf16_;    // the products take bf16 rows
  const bool direct_;  // they take them where they lie
  const int64_t depth_, stride_;
  Buffer<float> out_, rows_;
  Buffer<char> workspace_;
};

}  // namespace flashvid
