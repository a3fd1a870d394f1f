// SPDX-License-Identifier: MIT
// Vectors of FLASHVID_VECTOR_BYTES in the notation that GCC and Clang share; any machine compiles them.
// Included by the files that are compiled per instruction set: everything here has internal linkage.
#pragma once

#include "element.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashvid {
namespace {

constexpr int kLanes = FLASHVID_VECTOR_BYTES / 4;
typedef float Vec __attribute__((vector_size(FLASHVID_VECTOR_BYTES)));
typedef int32_t VecInt __attribute__((vector_size(FLASHVID_VECTOR_BYTES)));
typedef uint32_t VecBits __attribute__((vector_size(FLASHVID_VECTOR_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(FLASHVID_VECTOR_BYTES / 2)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.402823466e38f;

template <class Vector, class Pointer>
inline Vector load_as(const Pointer* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(float* to, Vec vector) { __builtin_memcpy(to, &vector, sizeof vector); }
inline Vec splat(float value) { return Vec{} + value; }

// Conversions in one instruction: what GCC 12 makes of __builtin_convertvector takes three times as long.
inline VecBits widen_bits(VecHalf bits) {
#if FLASHVID_VECTOR_BYTES == 64
  return reinterpret_cast<VecBits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(bits)));
#elif FLASHVID_VECTOR_BYTES == 32
  return reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, VecBits);
#endif
}

inline VecHalf narrow_bits(VecBits bits) {
#if FLASHVID_VECTOR_BYTES == 64
  return reinterpret_cast<VecHalf>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, VecHalf);
#endif
}

inline Vec load(const float* from) { return load_as<Vec>(from); }
inline Vec load(const Bfloat* from) {
  return reinterpret_cast<Vec>(widen_bits(load_as<VecHalf>(from)) << 16);
}
inline Vec load(const Half* from) {
  const VecBits bits = widen_bits(load_as<VecHalf>(from));
  const VecBits magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const VecBits finite = reinterpret_cast<VecBits>(reinterpret_cast<Vec>(magnitude) * from_bits(0x77800000));
  const VecBits special = reinterpret_cast<VecBits>((bits & 0x7c00) == 0x7c00);
  return reinterpret_cast<Vec>(sign | (special & (magnitude | 0x7f800000)) | (~special & finite));
}

// Sums the lanes pairwise: always in the same order.
inline float sum(Vec v) {
#if FLASHVID_VECTOR_BYTES == 64
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif FLASHVID_VECTOR_BYTES == 32
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
  return v[0] + v[1];
}

inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Lane by lane, for tails: the same arithmetic as of whole vectors, on `count` elements and zeros.
template <class Element>
inline Vec load_some(const Element* from, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(from[i]);
  return load(lanes);
}

// exp(x) for x <= 0, relative error below 2e-7; NaN stays NaN.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  const Vec whole = shifted - 12582912.0f;
  const Vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec series = splat(1.0f / 5040);
  for (const float factor : kFactors) series = series * rest + factor;
  const VecInt exponent = reinterpret_cast<VecInt>(shifted) - reinterpret_cast<VecInt>(splat(12582912.0f));
  return series * reinterpret_cast<Vec>((exponent + 127) << 23);
}

}  // namespace
}  // namespace flashvid
