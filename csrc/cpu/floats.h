// Storage types and the types their arithmetic is done in, in forms that GCC vectorises.
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

template <typename T>
GDD_FAST_INLINE Real<T> widen(T x) {
  return static_cast<Real<T>>(x);
}

// Rounded to nearest, ties to even.
template <typename T>
GDD_FAST_INLINE T narrow(Real<T> x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return c10::BFloat16(static_cast<uint16_t>(x == x ? rounded : 0x7fc0), c10::BFloat16::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace gdd_fast::cpu
