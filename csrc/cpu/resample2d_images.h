// What the separable resampling on the CPU works on, and what its loops share. An output row is made from a row of
// floats: the weighted sum of the input rows that it takes. Filters have 2 or 4 taps, as EDM's do.
#pragma once
#include <cstdint>

#include "cpu/floats.h"

namespace gdd_fast::cpu::resampling {

// Images of `width` pixels per row, `numbers` per pixel. x may have any strides of batch and channels; y and add are
// dense.
template <typename T>
struct Images {
  const T *x, *add;  // add may be null
  T* y;
  const T* zeros;  // as many as a row has, and as a pixel has
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

  // The `Count` rows of x that are taken; zeros where there is none.
  template <bool Up, int Count>
  GDD_FAST_INLINE void inputs(const T** rows) const {
    const int64_t first = Up ? (u + m.padding) / 2 - (Count - 1) : 2 * u - m.padding;
    const bool inside = first >= 0 && first + Count <= m.height;
    for (int k = 0; k < Count; k++) {
      const int64_t i = first + k;
      rows[Up ? Count - 1 - k : k] = inside || (i >= 0 && i < m.height) ? x + i * m.stride_h : m.zeros;
    }
  }
};

// Weights, each `step` behind the other, in local memory, out of reach of a loop's stores.
template <int Count, typename R>
struct Weights {
  R at[Count];

  GDD_FAST_INLINE Weights(const R* weights, int step) {
    for (int k = 0; k < Count; k++) at[k] = weights[k * step];
  }

  // the sum over k of at[k] term(k)
  template <typename Term>
  GDD_FAST_INLINE R sum(const Term& term) const {
    R total = at[0] * term(0);
    for (int k = 1; k < Count; k++) total += at[k] * term(k);
    return total;
  }
};

// sums[i] = the weighted sum of what the rows have at i.
template <int Count, typename T>
GDD_FAST_INLINE void sum_rows(const T* const* rows, const Weights<Count, Real<T>>& weights, Real<T>* sums, int64_t n) {
  const auto w = weights;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) sums[i] = w.sum([&](int k) { return widen(rows[k][i]); });
}

// Each makes the rows `begin` to `end` - 1 of y, counted over all images: `planes` of contiguous images, one number per
// pixel and pixels side by side; `halved_pixels` of any. `doubled_pixels` goes two rows at a time: `begin` and `end`
// count pairs, of which each image has `row_pairs`. Where the padding is odd, its first pair has only its second row.
#define GDD_FAST_RESAMPLING(T)                                          \
  void planes(const Images<T>& m, bool up, int64_t begin, int64_t end); \
  void halved_pixels(const Images<T>& m, int64_t begin, int64_t end);   \
  void doubled_pixels(const Images<T>& m, int64_t begin, int64_t end);
GDD_FAST_RESAMPLING(float)
GDD_FAST_RESAMPLING(double)
GDD_FAST_RESAMPLING(at::BFloat16)
GDD_FAST_RESAMPLING(at::Half)
#undef GDD_FAST_RESAMPLING

inline int64_t row_pairs(int64_t out_height, int padding) { return (out_height + padding % 2 + 1) / 2; }

}  // namespace gdd_fast::cpu::resampling
