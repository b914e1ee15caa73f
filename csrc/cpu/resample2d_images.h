// What the separable resampling on the CPU works on, and what its ways share. An output row is made from a row of
// floats: the weighted sum of the input rows that it takes.
#pragma once
#include <cstdint>

#include "cpu/floats.h"

namespace gdd_fast::cpu::resampling {

constexpr int kTaps = 64;  // at most, along one dimension

// Images of `width` pixels a row, `numbers` a pixel. In batch and channels x has any strides; y and add are dense.
template <typename T>
struct Images {
  const T *x, *add;  // add may be null
  T* y;
  const T* zeros;  // as many as a row has numbers, and as a pixel has
  int64_t planes, stride_n, stride_c, stride_h, stride_w;
  int64_t height, width, numbers, out_height, out_width;
  int taps, padding;
  const Real<T>*vertical, *horizontal;  // the filter's factors
  Real<T> scale;

  GDD_FAST_INLINE const T* image(int64_t index) const {
    return x + index / planes * stride_n + index % planes * stride_c;
  }
};

// A row of y, counted over all images: row u of an image, which is made from the image x.
template <typename T>
struct Place {
  const Images<T>& m;
  int64_t image, u;
  const T* x;

  GDD_FAST_INLINE Place(const Images<T>& m, int64_t row)
      : m(m), image(row / m.out_height), u(row % m.out_height), x(m.image(image)) {}

  GDD_FAST_INLINE void next() {
    if (++u == m.out_height) u = 0, x = m.image(++image);
  }

  // The `count` rows of x that are taken; zeros where there is none.
  template <bool Up>
  GDD_FAST_INLINE void inputs(const T** rows, int count) const {
    const int64_t first = Up ? (u + m.padding) / 2 - (count - 1) : 2 * u - m.padding;
    const bool inside = first >= 0 && first + count <= m.height;
    for (int k = 0; k < count; k++) {
      const int64_t i = first + k;
      rows[Up ? count - 1 - k : k] = inside || (i >= 0 && i < m.height) ? x + i * m.stride_h : m.zeros;
    }
  }
};

// Weights, each `step` behind the other: in local memory, out of reach of a loop's stores, and as many as the compiler
// knows of; Count = 0: `count`.
template <int Count, typename R>
struct Weights {
  R at[Count > 0 ? Count : kTaps];
  int count;

  GDD_FAST_INLINE Weights(const R* weights, int step, int count) : count(count) {
    for (int k = 0; k < (Count > 0 ? Count : count); k++) at[k] = weights[k * step];
  }

  // the sum over k of at[k] term(k)
  template <typename Term>
  GDD_FAST_INLINE R sum(const Term& term) const {
    R total = at[0] * term(0);
    for (int k = 1; k < (Count > 0 ? Count : count); k++) total += at[k] * term(k);
    return total;
  }
};

// sums[i] = the weighted sum of what the rows have at i. Where their number is not known to the compiler, one row after
// the other: a loop within the loop it does not vectorise.
template <int Count, typename T>
GDD_FAST_INLINE void sum_rows(const T* const* rows, const Weights<Count, Real<T>>& weights, Real<T>* sums, int64_t n) {
  if constexpr (Count > 0) {
    const auto w = weights;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) sums[i] = w.sum([&](int k) { return widen(rows[k][i]); });
  } else {
    for (int64_t i = 0; i < n; i++) sums[i] = 0;
    for (int k = 0; k < weights.count; k++) {
      const T* const row = rows[k];
      const Real<T> weight = weights.at[k];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++) sums[i] += weight * widen(row[i]);
    }
  }
}

// A sum that is one already.
template <typename R>
GDD_FAST_INLINE Weights<1, R> as_it_is() {
  const R one = 1;
  return Weights<1, R>(&one, 1, 1);
}

// function(Taps): the number of taps as a constant, or 0 where it is none of those compiled.
template <typename Function>
GDD_FAST_INLINE void with_taps(int taps, const Function& function) {
  if (taps == 2) return function(std::integral_constant<int, 2>());
  if (taps == 4) return function(std::integral_constant<int, 4>());
  if (taps == 6) return function(std::integral_constant<int, 6>());
  if (taps == 8) return function(std::integral_constant<int, 8>());
  function(std::integral_constant<int, 0>());
}

}  // namespace gdd_fast::cpu::resampling
