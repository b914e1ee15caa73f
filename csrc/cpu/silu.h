// The derivative of SiLU in float32, in a form that GCC vectorises.
#pragma once
#include <cstdint>

#include "cpu/floats.h"

namespace gdd_fast::cpu {

constexpr float kLimit = 87.0f;  // for exponents

// exp(x), x clipped to +-limit = 87, where it and 1 + exp(x) are normal numbers, to about a unit in the last place: 2^k
// times a polynomial in the rest of x / ln 2, as in Cephes. Plain arithmetic, which GCC vectorises. The limit is an
// argument: if GCC knows it, it splits the loop in three, which is slower by half.
GDD_FAST_INLINE float exponential(float x, float limit) {
  x = x < -limit ? -limit : x;
  x = x > limit ? limit : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest whole number
  const float k = shifted - 12582912.0f;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}

// The derivative, s (1 + x (1 - s)) with the sigmoid s; 1 - s is exp(-x) s, without cancellation, and 0 above the
// limit: NaN at both infinities, as in PyTorch.
GDD_FAST_INLINE float silu_slope(float x, float limit) {
  const float e = exponential(-x, limit), s = 1.0f / (1.0f + e);
  const float low = x < -limit ? 0.0f : s, rest = x > limit ? 0.0f : e * s;
  return low + low * (x * rest);
}

}  // namespace gdd_fast::cpu
