// SPDX-License-Identifier: MIT
// Choices from the products of one frame: what ADTS selects in it, and what the next one links to.
#pragma once

#include "products.h"

namespace flashvid {

// Sec. 2. products: [n, stride], those of tokens i with j > i; overwritten. weight [n] may be null.
// picked [n] becomes 1 where a token is selected, 0 elsewhere. nearest [n] is a workspace.
void select_frame(const Kernels& kernels, float* products, int64_t stride, int64_t n, const float* inverse_norms,
                  const float* weight, int64_t k, uint8_t* picked, float* nearest);
// The same by attention [n] alone: the k highest, others than finite last. attention may be null if k is 0.
void select_highest(const float* attention, int64_t n, int64_t k, uint8_t* picked);

// Sec. 3. For every token of frame t+1 the most similar one of frame t that `candidate` has, into the rows of
// frame t+1 of similarity (-inf: none) and best. mask [n] is a workspace.
void match_frame(const Kernels& kernels, const Video& video, const Norms& norms, const float* products, int64_t stride,
                 int64_t t, const uint8_t* candidate, float* similarity, int64_t* best, int32_t* mask);
// The same with the token at the same position.
void match_position(const Kernels& kernels, const Video& video, const Norms& norms, int64_t t,
                    const uint8_t* candidate, float* similarity, int64_t* best);

// Keep similarity and best of the tokens of frame t that may link; the others get -1.
void keep_links(int64_t n, int64_t t, const uint8_t* candidate, const int64_t* segment_id, float threshold,
                float* similarity, int64_t* best);

}  // namespace flashvid
