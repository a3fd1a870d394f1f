// SPDX-License-Identifier: MIT
// The element types of a tensor, read and written as fp32 by host and device alike.
#pragma once

#include <cstdint>
#include <cstring>

// `static`: files compiled for different instruction sets must not share one copy of an inline function,
// or the linker may give an old machine the copy made for a new one.
#if defined(__CUDACC__)
#define FLASHVID_SHARED __host__ __device__ static inline
#else
#define FLASHVID_SHARED static inline
#endif

namespace flashvid {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

FLASHVID_SHARED int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

FLASHVID_SHARED float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FLASHVID_SHARED uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLASHVID_SHARED float to_float(float value) { return value; }
FLASHVID_SHARED float to_float(Bfloat value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
FLASHVID_SHARED float to_float(Half value) {
  // Exponent and fraction moved to their place; the product corrects the bias, also of subnormal numbers.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000));  // 2^112
  return from_bits(sign | ((value.bits & 0x7c00) == 0x7c00 ? 0x7f800000 | magnitude : finite));
}

// Round to nearest, ties to even; NaN stays NaN.
FLASHVID_SHARED Bfloat to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

FLASHVID_SHARED Half to_half(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at the last bit that is left
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace flashvid
