// Rows of planes are often short, and starting on a row takes as long as computing it. So a block of rows is made in
// steps, the first of which takes their sums, and where it can a step runs over the whole block as if it were one row.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/resample2d_images.h"
#include "cpu/simd.h"

namespace gdd_fast::cpu::resampling {
namespace {

constexpr int64_t kBlock = 4096;  // numbers summed in a block: 16 KiB of floats, which stay in the first-level cache

// The first or the second of two neighbouring numbers, as a float. Two bfloat16 are read as one word, since a bfloat16
// is the upper half of a float.
template <bool Second, typename T>
GDD_FAST_INLINE Real<T> widen_of_pair(const T* x) {
  if constexpr (std::is_same_v<T, at::BFloat16> && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) {
    uint32_t both;
    std::memcpy(&both, x, sizeof both);
    return float_of(Second ? both & 0xffff0000u : both << 16);
  } else {
    return widen(x[Second]);
  }
}

// y = (row + add) * scale, rounded.
template <typename T>
GDD_FAST_INLINE void round_row(const Real<T>* row, const T* add, Real<T> scale, T* y, int64_t n) {
  if (add) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) y[i] = narrow<T>((row[i] + widen(add[i])) * scale);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) y[i] = narrow<T>(row[i] * scale);
  }
}

// Sums of even and of odd columns lie apart, the border's zeros between rows. What a tap meets, every second column,
// then is a run of either.
template <int Taps, typename T>
GDD_FAST_INLINE void halve(const Images<T>& m, int64_t begin, int64_t end) {
  using R = Real<T>;
  const int64_t p = m.padding, pairs = m.width / 2, left = (p + 1) / 2, stride = left + (m.width + 1) / 2;
  const int64_t most = std::min(end - begin, std::max<int64_t>(1, kBlock / 2 / stride));
  std::vector<R> evens(most * stride + Taps), odds(most * stride + Taps), filtered(most * stride);
  const Weights<Taps, R> weights(m.vertical, 1), filter(m.horizontal, 1);
  const R* met[Taps];  // by each tap of the first row's outputs
  for (int k = 0; k < Taps; k++) met[k] = ((k + p) % 2 ? odds : evens).data() + left + (k + p) / 2 - p;
  for (Place<T> place(m, begin); begin < end; begin += most) {
    const int64_t rows = std::min(most, end - begin);
    for (int64_t row = 0; row < rows; row++, place.next()) {
      const T* in[Taps];
      place.template inputs<false, Taps>(in);
      R *const even = evens.data() + row * stride + left, *const odd = odds.data() + row * stride + left;
#pragma GCC ivdep
      for (int64_t i = 0; i < pairs; i++) {
        even[i] = weights.sum([&](int k) { return widen_of_pair<false>(in[k] + 2 * i); });
        odd[i] = weights.sum([&](int k) { return widen_of_pair<true>(in[k] + 2 * i); });
      }
      if (m.width % 2) even[pairs] = weights.sum([&](int k) { return widen(in[k][2 * pairs]); });
    }
    sum_rows<Taps, R>(met, filter, filtered.data(), rows * stride);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = (begin + row) * m.out_width;
      round_row<T>(filtered.data() + row * stride, m.add ? m.add + at : nullptr, m.scale, m.y + at, m.out_width);
    }
  }
}

// Pairs of outputs: the first takes even[i] and what is to its left, by its own filter; the second likewise odd[i].
template <bool Add, int Count, typename T>
GDD_FAST_INLINE void filter_pairs(const Real<T>* even, const Real<T>* odd, const Weights<Count, Real<T>>& even_filter,
                                  const Weights<Count, Real<T>>& odd_filter, const T* add, Real<T> scale, T* y,
                                  int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    Real<T> first = even_filter.sum([&](int k) { return even[i - k]; });
    Real<T> second = odd_filter.sum([&](int k) { return odd[i - k]; });
    if constexpr (Add) first += widen(add[2 * i]), second += widen(add[2 * i + 1]);
    y[2 * i] = narrow<T>(first * scale);
    y[2 * i + 1] = narrow<T>(second * scale);
  }
}

template <int Taps, typename T>
GDD_FAST_INLINE void enlarge(const Images<T>& m, int64_t begin, int64_t end) {
  using R = Real<T>;
  constexpr int kCount = Taps / 2;
  const int64_t p = m.padding, left = kCount - 1, stride = left + m.width + kCount, pairs = m.out_width / 2;
  const int64_t most = std::min(end - begin, std::max<int64_t>(1, kBlock / stride));
  std::vector<R> sums(most * stride + Taps);
  const Weights<kCount, R> weights[] = {{m.vertical, 2}, {m.vertical + 1, 2}};
  const Weights<kCount, R> even_filter(m.horizontal + p % 2, 2), odd_filter(m.horizontal + (p + 1) % 2, 2);
  for (Place<T> place(m, begin); begin < end; begin += most) {
    const int64_t rows = std::min(most, end - begin);
    for (int64_t row = 0; row < rows; row++, place.next()) {
      const T* in[kCount];
      place.template inputs<true, kCount>(in);
      sum_rows<kCount, T>(in, weights[(place.u + p) % 2], sums.data() + row * stride + left, m.width);
    }
    for (int64_t row = 0; row < rows; row++) {
      const R *const even = sums.data() + row * stride + left + p / 2, *const odd = even + p % 2;
      const int64_t at = (begin + row) * m.out_width;
      T* const y = m.y + at;
      m.add ? filter_pairs<true>(even, odd, even_filter, odd_filter, m.add + at, m.scale, y, pairs)
            : filter_pairs<false>(even, odd, even_filter, odd_filter, m.add, m.scale, y, pairs);
      if (m.out_width % 2) {
        const R last = even_filter.sum([&](int k) { return even[pairs - k]; });
        round_row<T>(&last, m.add ? m.add + at + 2 * pairs : nullptr, m.scale, y + 2 * pairs, 1);
      }
    }
  }
}

template <int Taps, typename T>
GDD_FAST_INLINE void resample(const Images<T>& m, bool up, int64_t begin, int64_t end) {
  up ? enlarge<Taps>(m, begin, end) : halve<Taps>(m, begin, end);
}

}  // namespace

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_PLANES(T)                                                             \
  GDD_FAST_SIMD void planes(const Images<T>& m, bool up, int64_t begin, int64_t end) { \
    m.taps == 2 ? resample<2>(m, up, begin, end) : resample<4>(m, up, begin, end);     \
  }

GDD_FAST_PLANES(float)
GDD_FAST_PLANES(double)
GDD_FAST_PLANES(at::BFloat16)
GDD_FAST_PLANES(at::Half)

}  // namespace gdd_fast::cpu::resampling
