// Storage types and the types of their arithmetic, in forms that GCC vectorises.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define GDD_FAST_INLINE inline __attribute__((always_inline))

namespace gdd_fast::cpu {

// float, but double for double
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

GDD_FAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

GDD_FAST_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// All bits or none.
GDD_FAST_INLINE uint32_t mask(bool condition) { return -static_cast<uint32_t>(condition); }

template <typename T>
GDD_FAST_INLINE Real<T> widen(T x) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    // A subnormal's digits are the last ones of a number from 0.5 to 1. This avoids arithmetic on subnormal floats,
    // which processors may be set to treat as zero.
    const uint32_t magnitude = x.x & 0x7fff, sign = (x.x & 0x8000u) << 16;
    const uint32_t normal = ((magnitude << 13) + (112u << 23)) | (mask(magnitude >= 0x7c00) & 0x7f800000);
    const uint32_t subnormal = bits_of(float_of(magnitude | bits_of(0.5f)) - 0.5f), small = mask(magnitude < 0x400);
    return float_of((small & subnormal) | (~small & normal) | sign);
  } else {
    return static_cast<Real<T>>(x);
  }
}

// Rounded to nearest, ties to even.
template <typename T>
GDD_FAST_INLINE T narrow(Real<T> x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return c10::BFloat16(static_cast<uint16_t>(x == x ? rounded : 0x7fc0), c10::BFloat16::from_bits());
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    // Adding a power of two 2^13 times as large, or as the smallest normal number, rounds x to a half's digits.
    // Values too large for a half are infinite by then. No arithmetic is conditional: GCC would make branches.
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    const uint32_t exponent = bits & 0x7f800000, least = 113u << 23;
    const float power = float_of((exponent > least ? exponent : least) + (15u << 23));
    const uint32_t sum = bits_of(power + float_of(magnitude) * 0x1p112f * 0x1p-110f);
    const uint32_t half = ((sum >> 13) & 0x7c00) + (sum & 0xfff);
    const uint32_t nan = mask(magnitude > 0x7f800000);
    return c10::Half(static_cast<uint16_t>(sign | (half & ~nan) | (0x7e00 & nan)), c10::Half::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace gdd_fast::cpu
