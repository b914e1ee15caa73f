// Channels_last images have pixels long enough to be worked on one by one.
#include <vector>

#include "cpu/resample2d_images.h"
#include "cpu/simd.h"

namespace gdd_fast::cpu::resampling {
namespace {

template <int Taps, typename T>
GDD_FAST_INLINE void halve(const Images<T>& m, int64_t begin, int64_t end) {
  using R = Real<T>;
  const int64_t c = m.numbers, p = m.padding;
  const Weights<Taps, R> weights(m.vertical, 1), filter(m.horizontal, 1);
  std::vector<R> sums((p + m.width + p) * c);  // zeros on both sides of a row
  const bool dense = m.stride_w == c || m.width == 1;
  const int64_t pieces = dense ? 1 : m.width, n = dense ? m.width * c : c;
  Place<T> place(m, begin);
  for (int64_t row = begin; row < end; row++, place.next()) {
    Place<T> piece = place;
    for (int64_t j = 0; j < pieces; j++, piece.x += m.stride_w) {
      const T* in[Taps];
      piece.template inputs<false, Taps>(in);
      sum_rows<Taps, T>(in, weights, sums.data() + (p + j) * c, n);
    }
    for (int64_t v = 0; v < m.out_width; v++) {
      const int64_t at = (row * m.out_width + v) * c;
      const R* const first = sums.data() + 2 * v * c;
      const T* const add = m.add ? m.add + at : nullptr;
      T* const y = m.y + at;
#pragma GCC ivdep
      for (int64_t i = 0; i < c; i++) {
        const R sum = filter.sum([&](int k) { return first[i + k * c]; });
        y[i] = narrow<T>((add ? sum + widen(add[i]) : sum) * m.scale);
      }
    }
  }
}

// Going up, 2 x 2 output pixels have the same Count x Count inputs, which are read once. `column` and `row` are the
// filter's factors for the first and the second output of the two.
template <int Count, typename T>
struct Block {
  const T *in[Count][Count], *add[4];
  T* out[4];
  Real<T> column[2][Count], row[2][Count], scale;
};

template <int Count, bool Add, typename T>
GDD_FAST_INLINE void make_block(const Block<Count, T>& block, int64_t n) {
  const Block<Count, T> b = block;  // a copy, out of reach of the stores
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    Real<T> sums[2][Count];
    for (int t = 0; t < Count; t++) {
      for (int u = 0; u < 2; u++) sums[u][t] = b.column[u][0] * widen(b.in[0][t][i]);
      for (int s = 1; s < Count; s++) {
        for (int u = 0; u < 2; u++) sums[u][t] += b.column[u][s] * widen(b.in[s][t][i]);
      }
    }
    for (int k = 0; k < 4; k++) {
      Real<T> sum = b.row[k % 2][0] * sums[k / 2][0];
      for (int t = 1; t < Count; t++) sum += b.row[k % 2][t] * sums[k / 2][t];
      if constexpr (Add) sum += widen(b.add[k][i]);
      b.out[k][i] = narrow<T>(sum * b.scale);
    }
  }
}

// Pair u of an image is its rows 2 u - padding % 2 and the next, where they exist.
template <int Count, typename T>
GDD_FAST_INLINE void enlarge(const Images<T>& m, int64_t begin, int64_t end) {
  const int64_t c = m.numbers, odd = m.padding % 2, shift = m.padding / 2;
  const int64_t pairs = row_pairs(m.out_height, m.padding), size = m.out_height * m.out_width * c;
  std::vector<T> spare(c);  // takes what is outside of y
  Block<Count, T> b;
  b.scale = m.scale;
  for (int k = 0; k < 2 * Count; k++) b.column[k % 2][k / 2] = m.vertical[k], b.row[k % 2][k / 2] = m.horizontal[k];
  for (int64_t pair = begin; pair < end; pair++) {
    const int64_t image = pair / pairs, u = pair % pairs;
    const T* const x = m.image(image);
    for (int64_t v = 0; v < (m.out_width + odd + 1) / 2; v++) {
      for (int64_t s = 0; s < Count; s++) {
        for (int64_t t = 0; t < Count; t++) {
          const int64_t i = u + shift - s, j = v + shift - t;
          const bool inside = i >= 0 && i < m.height && j >= 0 && j < m.width;
          b.in[s][t] = inside ? x + i * m.stride_h + j * m.stride_w : m.zeros;
        }
      }
      for (int64_t k = 0; k < 4; k++) {
        const int64_t i = 2 * u - odd + k / 2, j = 2 * v - odd + k % 2;
        const bool inside = i >= 0 && i < m.out_height && j >= 0 && j < m.out_width;
        const int64_t at = image * size + (i * m.out_width + j) * c;
        b.add[k] = inside && m.add ? m.add + at : m.zeros;
        b.out[k] = inside ? m.y + at : spare.data();
      }
      m.add ? make_block<Count, true>(b, c) : make_block<Count, false>(b, c);
    }
  }
}

}  // namespace

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_PIXELS(T)                                                            \
  GDD_FAST_SIMD void halved_pixels(const Images<T>& m, int64_t begin, int64_t end) {  \
    m.taps == 2 ? halve<2>(m, begin, end) : halve<4>(m, begin, end);                  \
  }                                                                                   \
  GDD_FAST_SIMD void doubled_pixels(const Images<T>& m, int64_t begin, int64_t end) { \
    m.taps == 2 ? enlarge<1>(m, begin, end) : enlarge<2>(m, begin, end);              \
  }

GDD_FAST_PIXELS(float)
GDD_FAST_PIXELS(double)
GDD_FAST_PIXELS(at::BFloat16)
GDD_FAST_PIXELS(at::Half)

}  // namespace gdd_fast::cpu::resampling
