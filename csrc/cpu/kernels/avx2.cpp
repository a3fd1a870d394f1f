// SPDX-License-Identifier: MIT
// The kernels for AVX2 with FMA (setup.py gives this file its flags).
#define FLASHVID_VECTOR_BYTES 32
#include "choices.h"
#include "kernels.h"
#include "rowwise.h"
#include "tiles.h"

namespace flashvid {
extern const Kernels kKernelsAvx2;
const Kernels kKernelsAvx2 = {
    "avx2",  product<Multiply>, nullptr, false, no_workspace,
    squared_distances, squared_distance, add_row,  sum_squares, dot, dot_rows, widen, narrow, split, mean_rows,
    cosine_distances, best_match, distance_steps, farthest, take_nearer, smallest_squares, largest, nearest_denser,
    add_softmax,
};
}  // namespace flashvid
