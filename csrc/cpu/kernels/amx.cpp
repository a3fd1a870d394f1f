// SPDX-License-Identifier: MIT
// The kernels for AMX with bf16 (setup.py gives this file its flags): products of 16 x 16 tiles, 32 channels an
// instruction, four tiles of sums at a time. A core does 40 times as many multiplications as by AVX-512's
// bf16 dot product (3400 against 83 GFLOP/s measured).
#define FLASHVID_VECTOR_BYTES 64
#include <immintrin.h>

#include "choices.h"
#include "kernels.h"
#include "rowwise.h"
#include "tiles.h"

namespace flashvid {
namespace {

constexpr int64_t kSide = 16;         // rows of a tile
constexpr int64_t kPair = 2 * kSide;  // rows of two, side by side: what one block of the product spans
constexpr int64_t kTileDepth = 32;    // channels of a tile
constexpr int64_t kTileElements = kSide * kTileDepth;
// Times kTileDepth channels at a time: the 32 KiB of a block of left rows then stay in 48 KiB of first-level
// cache while the right ones pass, and loading and storing the sums costs an eighth of the multiplications.
constexpr int64_t kTilesDeep = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Writes 16 rows of 16 pairs of channels as 16 pairs of 16 rows: the layout of a right operand.
inline void transpose_pairs(const Bfloat* from, int64_t rows, int64_t stride, Bfloat* to) {
  __m512i r[16], t[16];
  for (int64_t i = 0; i < kSide; ++i) {
    r[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + c]: column c of each group of four, of rows i .. i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_top = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd_top = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even_low = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_store_si512(to + 32 * c, _mm512_shuffle_i32x4(even_top, even_low, 0x88));
    _mm512_store_si512(to + 32 * (4 + c), _mm512_shuffle_i32x4(odd_top, odd_low, 0x88));
    _mm512_store_si512(to + 32 * (8 + c), _mm512_shuffle_i32x4(even_top, even_low, 0xdd));
    _mm512_store_si512(to + 32 * (12 + c), _mm512_shuffle_i32x4(odd_top, odd_low, 0xdd));
  }
}

// One block of 32 x 32 sums over `tiles` times 32 channels. `right` holds pairs of packed tiles.
inline void multiply_block(const Bfloat* left, int64_t stride, const Bfloat* right, int64_t tiles, bool first,
                           float* out, int64_t out_stride) {
  const int64_t left_bytes = stride * 2, out_bytes = out_stride * 4;
  float* low = out + kSide * out_stride;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + kSide, out_bytes);
    _tile_loadd(2, low, out_bytes);
    _tile_loadd(3, low + kSide, out_bytes);
  }
  for (int64_t k = 0; k < tiles; ++k) {
    const Bfloat* columns = right + k * 2 * kTileElements;
    _tile_loadd(4, left + k * kTileDepth, left_bytes);
    _tile_loadd(6, columns, 64);
    _tile_loadd(7, columns + kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + kSide * stride + k * kTileDepth, left_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + kSide, out_bytes);
  _tile_stored(2, low, out_bytes);
  _tile_stored(3, low + kSide, out_bytes);
}

constexpr int64_t kLastRowsElements = kPair * kTilesDeep * kTileDepth;

int64_t workspace_bytes(int64_t n, int64_t) {
  return 64 + 2 * (round_up(n, kPair) * kTilesDeep * kTileDepth + kLastRowsElements);
}

void inner_bf16(const void* x, int64_t m, const void* y, int64_t n, int64_t stride, int64_t depth, float* out,
                int64_t out_stride, int64_t triangle, void* workspace) {
  const auto* left = static_cast<const Bfloat*>(x);
  const auto* right = static_cast<const Bfloat*>(y);
  auto* packed = reinterpret_cast<Bfloat*>(round_up(reinterpret_cast<intptr_t>(workspace), 64));
  Bfloat* last_rows = packed + round_up(n, kPair) * kTilesDeep * kTileDepth;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t k = 0; k < depth; k += kTilesDeep * kTileDepth) {
    const int64_t length = least(kTilesDeep * kTileDepth, depth - k), tiles = length / kTileDepth;
    for (int64_t j = 0; j < round_up(n, kPair); j += kSide) {
      Bfloat* pairs = packed + j / kPair * kPair * length + j % kPair / kSide * kTileElements;
      for (int64_t c = 0; c < tiles; ++c) {
        transpose_pairs(right + j * stride + k + c * kTileDepth, n - j, stride, pairs + c * 2 * kTileElements);
      }
    }
    for (int64_t i = 0; i < m; i += kPair) {
      const Bfloat* rows = left + i * stride + k;
      int64_t rows_stride = stride;
      if (m - i < kPair) {  // what lies behind the last row may not be read
        for (int64_t r = 0; r < kPair; ++r) {
          Bfloat* copy = last_rows + r * length;
          if (r < m - i) __builtin_memcpy(copy, rows + r * stride, static_cast<size_t>(length) * 2);
          else __builtin_memset(copy, 0, static_cast<size_t>(length) * 2);
        }
        rows = last_rows;
        rows_stride = length;
      }
      for (int64_t j = least(m, i + kPair) <= triangle ? i : 0; j < n; j += kPair) {
        multiply_block(rows, rows_stride, packed + j * length, tiles, k == 0, out + i * out_stride + j, out_stride);
      }
    }
  }
  _tile_release();
}

}  // namespace

extern const Kernels kKernelsAmx;
const Kernels kKernelsAmx = {
    "amx", product<Multiply>, inner_bf16, true, workspace_bytes,
    squared_distances, squared_distance, add_row, sum_squares, dot, dot_rows, widen, narrow, split, mean_rows,
    cosine_distances, best_match, distance_steps, farthest, take_nearer, smallest_squares, largest, nearest_denser,
    add_softmax,
};
}  // namespace flashvid
