// Rows of planes are often short, and to begin with one takes as long as to work on it. So a block of rows is made in
// steps, the first of which is their sums, and a step runs over all of the block as if it were one row where it can.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/resample2d_ways.h"
#include "cpu/simd.h"

namespace gdd_fast::cpu::resampling {
namespace {

constexpr int64_t kBlock = 4096;  // numbers summed in a block: 16 KiB of floats, which stay in the first-level cache

// Of two numbers side by side the one and the other. In one word, each bfloat16 is the upper half of a float.
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
  constexpr int kMost = Taps > 0 ? Taps : kTaps;
  const int taps = Taps > 0 ? Taps : m.taps;
  const int64_t p = m.padding, pairs = m.width / 2, left = (p + 1) / 2, stride = left + (m.width + 1) / 2;
  const int64_t most = std::min(end - begin, std::max<int64_t>(1, kBlock / 2 / stride));
  std::vector<R> evens(most * stride + taps), odds(most * stride + taps), filtered(most * stride);
  std::vector<R> sums(Taps > 0 ? 0 : m.width);
  const Weights<Taps, R> weights(m.vertical, 1, taps), filter(m.horizontal, 1, taps);
  const R* met[kMost];  // by each tap of the first row's outputs
  for (int k = 0; k < taps; k++) met[k] = ((k + p) % 2 ? odds : evens).data() + left + (k + p) / 2 - p;
  for (Place<T> place(m, begin); begin < end; begin += most) {
    const int64_t rows = std::min(most, end - begin);
    for (int64_t row = 0; row < rows; row++, place.next()) {
      const T* in[kMost];
      place.template inputs<false>(in, taps);
      R *const even = evens.data() + row * stride + left, *const odd = odds.data() + row * stride + left;
      if constexpr (Taps > 0) {
#pragma GCC ivdep
        for (int64_t i = 0; i < pairs; i++) {
          even[i] = weights.sum([&](int k) { return widen_of_pair<false>(in[k] + 2 * i); });
          odd[i] = weights.sum([&](int k) { return widen_of_pair<true>(in[k] + 2 * i); });
        }
      } else {
        sum_rows<Taps, T>(in, weights, sums.data(), m.width);
#pragma GCC ivdep
        for (int64_t i = 0; i < pairs; i++) even[i] = sums[2 * i], odd[i] = sums[2 * i + 1];
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
  constexpr int kCount = Taps / 2, kMost = Taps > 0 ? kCount : kTaps / 2;
  const int count = Taps > 0 ? kCount : m.taps / 2;
  const int64_t p = m.padding, left = count - 1, stride = left + m.width + count, pairs = m.out_width / 2;
  const int64_t most = std::min(end - begin, std::max<int64_t>(1, kBlock / stride));
  std::vector<R> sums(most * stride + m.taps), filtered(Taps > 0 ? 0 : 2 * pairs);
  const Weights<kCount, R> weights[] = {{m.vertical, 2, count}, {m.vertical + 1, 2, count}};
  const Weights<kCount, R> even_filter(m.horizontal + p % 2, 2, count),
      odd_filter(m.horizontal + (p + 1) % 2, 2, count);
  for (Place<T> place(m, begin); begin < end; begin += most) {
    const int64_t rows = std::min(most, end - begin);
    for (int64_t row = 0; row < rows; row++, place.next()) {
      const T* in[kMost];
      place.template inputs<true>(in, count);
      sum_rows<kCount, T>(in, weights[(place.u + p) % 2], sums.data() + row * stride + left, m.width);
    }
    for (int64_t row = 0; row < rows; row++) {
      const R *const even = sums.data() + row * stride + left + p / 2, *const odd = even + p % 2;
      const int64_t at = (begin + row) * m.out_width;
      T* const y = m.y + at;
      const auto filter = [&](const R* first, const R* second, const auto& first_filter,
                              const auto& second_filter) __attribute__((always_inline)) {
        m.add ? filter_pairs<true>(first, second, first_filter, second_filter, m.add + at, m.scale, y, pairs)
              : filter_pairs<false>(first, second, first_filter, second_filter, m.add, m.scale, y, pairs);
      };
      if constexpr (Taps > 0) {
        filter(even, odd, even_filter, odd_filter);
      } else {
        const R *met_even[kMost], *met_odd[kMost];  // by each tap
        for (int k = 0; k < count; k++) met_even[k] = even - k, met_odd[k] = odd - k;
        sum_rows<0, R>(met_even, even_filter, filtered.data(), pairs);
        sum_rows<0, R>(met_odd, odd_filter, filtered.data() + pairs, pairs);
        filter(filtered.data(), filtered.data() + pairs, as_it_is<R>(), as_it_is<R>());
      }
      if (m.out_width % 2) {
        const R last = even_filter.sum([&](int k) { return even[pairs - k]; });
        round_row<T>(&last, m.add ? m.add + at + 2 * pairs : nullptr, m.scale, y + 2 * pairs, 1);
      }
    }
  }
}

template <typename T>
GDD_FAST_INLINE void make_rows(const Images<T>& m, bool up, int64_t begin, int64_t end) {
  with_taps(m.taps, [&](auto taps) __attribute__((always_inline)) {
    up ? enlarge<taps()>(m, begin, end) : halve<taps()>(m, begin, end);
  });
}

}  // namespace

// target_clones takes no templates, hence one overload a type
#define GDD_FAST_PLANES(T)                                                                  \
  GDD_FAST_SIMD void make_planes(const Images<T>& m, bool up, int64_t begin, int64_t end) { \
    make_rows(m, up, begin, end);                                                           \
  }

GDD_FAST_PLANES(float)
GDD_FAST_PLANES(double)
GDD_FAST_PLANES(at::BFloat16)
GDD_FAST_PLANES(at::Half)

}  // namespace gdd_fast::cpu::resampling
