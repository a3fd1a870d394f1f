// SPDX-License-Identifier: MIT
// The kernels for any machine: what the compiler makes of 16-byte vectors (SSE2 on x86-64, NEON on ARM).
#define FLASHVID_VECTOR_BYTES 16
#include "choices.h"
#include "kernels.h"
#include "rowwise.h"
#include "tiles.h"

namespace flashvid {
extern const Kernels kKernelsPlain;
const Kernels kKernelsPlain = {
    "plain",  product<Multiply>, nullptr, false, no_workspace,
    squared_distances, squared_distance, add_row,  sum_squares, dot, dot_rows, widen, narrow, split, mean_rows,
    cosine_distances, best_match, distance_steps, farthest, take_nearer, smallest_squares, largest, nearest_denser,
    add_softmax,
};
}  // namespace flashvid
