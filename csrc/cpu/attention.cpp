// SPDX-License-Identifier: MIT
// The attention that every token receives in its frame (section "Received attention").
#include <cmath>
#include <cstring>

#include "kernels/kernels.h"
#include "ops.h"
#include "parallel.h"

namespace flashvid {

namespace {

constexpr int64_t kQueries = 128;  // at a time: the logits of 784 keys are then 400 KiB

struct Workspace {
  Workspace(int64_t n, int64_t depth, int64_t product_bytes)
      : query(n * depth),
        key(n * depth),
        logits(round_up(std::min(n, kQueries), kTile) * round_up(n, kTile)),
        product(product_bytes) {}
  Buffer<float> query, key, logits;
  Buffer<char> product;
};

}  // namespace

void received_attention(const Heads& query, const Heads& key, Dtype dtype, int64_t num_frames, int64_t heads, int64_t n,
                        int64_t d, float* received, int threads) {
  const Kernels& use = kernels();
  const bool bf16 = dtype == Dtype::kBfloat16 && use.inner_bf16 != nullptr;
  const Product product = bf16 ? use.inner_bf16 : use.inner_f32;
  const int64_t depth = round_up(d, kDepthMultiple), element = bf16 ? 2 : 4, stride = round_up(n, kTile);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const int64_t items = num_frames * heads;
  auto all = workspaces<Workspace>(items, threads, n, depth, bf16 ? use.workspace_bytes(n, depth) : 0);
  Buffer<float> by_head(items * n);

  const auto copy = [&](const Heads& from, int64_t t, int64_t h, Buffer<float>& to) {
    const int64_t start = t * from.frame_stride + h * from.head_stride;
    for (int64_t i = 0; i < n; ++i) {
      const char* row =
          static_cast<const char*>(from.data) + (start + i * from.token_stride) * bytes_of(dtype);
      char* out = reinterpret_cast<char*>(to.data()) + i * depth * element;
      if (bf16) {
        std::memcpy(out, row, static_cast<size_t>(d * element));
      } else {
        use.widen(row, dtype, d, reinterpret_cast<float*>(out));
      }
      std::memset(out + d * element, 0, static_cast<size_t>((depth - d) * element));
    }
  };
  parallel_for(items, threads, [&](int64_t item, int thread) {
    Workspace& mine = all[static_cast<size_t>(thread)];
    copy(query, item / heads, item % heads, mine.query);
    copy(key, item / heads, item % heads, mine.key);
    float* total = by_head.data() + item * n;
    std::fill_n(total, n, 0.0f);
    for (int64_t first = 0; first < n; first += kQueries) {
      const int64_t queries = std::min(kQueries, n - first);
      product(reinterpret_cast<const char*>(mine.query.data()) + first * depth * element, queries, mine.key.data(), n,
              depth, depth, mine.logits.data(), stride, 0, mine.product.data());
      for (int64_t i = 0; i < queries; ++i) use.add_softmax(mine.logits.data() + i * stride, n, scale, total);
    }
  });
  parallel_for(num_frames, threads, [&](int64_t t, int) {
    float* out = received + t * n;
    std::fill_n(out, n, 0.0f);
    for (int64_t h = 0; h < heads; ++h) use.add_row(by_head.data() + (t * heads + h) * n, Dtype::kFloat32, n, out);
    for (int64_t i = 0; i < n; ++i) out[i] /= static_cast<float>(heads * n);
  });
}

}  // namespace flashvid
