// SPDX-License-Identifier: MIT
// The kernels for AVX-512 with bf16 dot products (setup.py gives this file its flags).
#define FLASHVID_VECTOR_BYTES 64
#include "choices.h"
#include "dot_bf16.h"
#include "kernels.h"
#include "rowwise.h"
#include "tiles.h"

namespace flashvid {
extern const Kernels kKernelsAvx512Bf16;
const Kernels kKernelsAvx512Bf16 = {
    "avx512_bf16", product<Multiply>, product<MultiplyBfloat>, false, no_workspace,
    squared_distances, squared_distance, add_row, sum_squares, dot, dot_rows, widen, narrow, split, mean_rows,
    cosine_distances, best_match, distance_steps, farthest, take_nearer, smallest_squares, largest, nearest_denser,
    add_softmax,
};
}  // namespace flashvid
