// SPDX-License-Identifier: MIT
// Products of bf16 rows by AVX-512's bf16 dot product: 32 channels an instruction, fp32 sums.
#pragma once

#include <immintrin.h>

#include "tiles.h"

namespace flashvid {
namespace {

struct MultiplyBfloat {
  using Element = Bfloat;
  using Operand = __m512bh;
  static constexpr int kElements = 2 * kLanes;
  static inline Operand load_operand(const Bfloat* from) { return load_as<__m512bh>(from); }
  static inline Vec add(Vec total, Operand x, Operand y) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total), x, y));
  }
};

}  // namespace
}  // namespace flashvid
