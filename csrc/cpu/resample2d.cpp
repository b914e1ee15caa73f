// resample2d of channels_last images on the CPU, separably: a pixel of y is made from the weighted sums of the pixels
// of x in the columns that it takes, which are then filtered along the row. Filters have 2 or 4 taps, as EDM's do.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/floats.h"
#include "cpu/simd.h"
#include "resample2d_launchers.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // multiply-adds below which a second thread does not pay

// The filter as a column times a row, if it is one within the rounding of its own numbers: sums over its rows and
// columns, of which the row's are divided by the total. Signs are those of the row and the column through the largest
// tap, so that nothing cancels; without negative taps these are plain sums, exact for the usual filters.
struct Factors {
  std::vector<double> vertical, horizontal;
  bool exist;

  explicit Factors(const at::Tensor& kernel) : vertical(kernel.size(3)), horizontal(kernel.size(3)) {
    const at::Tensor filter = kernel.to(at::kDouble).contiguous();
    const double* k = filter.const_data_ptr<double>();
    const int64_t taps = kernel.size(3), count = taps * taps;
    const auto smaller = [](double a, double b) { return std::abs(a) < std::abs(b); };
    const int64_t largest = std::max_element(k, k + count, smaller) - k;
    const int64_t row = largest / taps * taps, column = largest % taps;
    double total = 0;
    for (int64_t at = 0; at < count; at++) {
      const double across = std::copysign(1., k[row + at % taps]), down = std::copysign(1., k[at - at % taps + column]);
      vertical[at / taps] += across * k[at];
      horizontal[at % taps] += down * k[at];
      total += across * down * k[at];
    }
    for (double& h : horizontal) h /= total;
    const bool wide = kernel.scalar_type() == at::kDouble;
    const double allowed = 4 * std::abs(k[largest]) *
                           (wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon());
    exist = true;
    for (int64_t at = 0; at < count; at++) {
      exist &= std::abs(vertical[at / taps] * horizontal[at % taps] - k[at]) <= allowed;  // false for NaN
    }
  }
};

template <typename T>
struct Images {
  const Resample& r;
  const T *x, *add;  // add may be null
  T* y;
  const T* zeros;                       // a pixel
  const Real<T>*vertical, *horizontal;  // the filter's factors

  // Pixel (i, j) of an image of x; zeros where there is none.
  GDD_FAST_INLINE const T* pixel(int64_t image, int64_t i, int64_t j) const {
    const bool inside = i >= 0 && i < r.height && j >= 0 && j < r.width;
    return inside ? x + image * r.stride_n + i * r.stride_h + j * r.stride_w : zeros;
  }
};

// Weights in local memory, out of reach of a loop's stores.
template <int Count, typename R>
struct Weights {
  R at[Count];

  GDD_FAST_INLINE explicit Weights(const R* weights) { std::copy_n(weights, Count, at); }

  // the sum over k of at[k] term(k)
  template <typename Term>
  GDD_FAST_INLINE R sum(const Term& term) const {
    R total = at[0] * term(0);
    for (int k = 1; k < Count; k++) total += at[k] * term(k);
    return total;
  }
};

// Rows `begin` to `end` - 1 of y, counted over all images.
template <int Taps, typename T>
GDD_FAST_INLINE void halve(const Images<T>& m, int64_t begin, int64_t end) {
  using R = Real<T>;
  const Resample& r = m.r;
  const int64_t c = r.channels, p = r.padding;
  const Weights<Taps, R> weights(m.vertical), filter(m.horizontal);
  const R scale = static_cast<R>(r.scale);
  std::vector<R> sums((p + r.width + p) * c);  // zeros on both sides of a row
  const bool dense = r.stride_w == c || r.width == 1;
  const int64_t pieces = dense ? 1 : r.width, n = dense ? r.width * c : c;
  const std::vector<T> zeros(n);
  for (int64_t row = begin; row < end; row++) {
    const int64_t image = row / r.out_height, top = 2 * (row % r.out_height) - p;
    for (int64_t j = 0; j < pieces; j++) {
      const T* in[Taps];
      for (int k = 0; k < Taps; k++) {
        in[k] = top + k >= 0 && top + k < r.height ? m.pixel(image, top + k, j) : zeros.data();
      }
      R* const sum = sums.data() + (p + j) * c;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++) sum[i] = weights.sum([&](int k) { return widen(in[k][i]); });
    }
    for (int64_t v = 0; v < r.out_width; v++) {
      const int64_t at = (row * r.out_width + v) * c;
      const R* const first = sums.data() + 2 * v * c;
      const T* const add = m.add ? m.add + at : nullptr;
      T* const y = m.y + at;
#pragma GCC ivdep
      for (int64_t i = 0; i < c; i++) {
        const R sum = filter.sum([&](int k) { return first[i + k * c]; });
        y[i] = narrow<T>((add ? sum + widen(add[i]) : sum) * scale);
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

inline int64_t row_pairs(const Resample& r) { return (r.out_height + r.padding % 2 + 1) / 2; }

// Two rows at a time: pair u of an image is its rows 2 u - padding % 2 and the next, where they exist.
template <int Count, typename T>
GDD_FAST_INLINE void enlarge(const Images<T>& m, int64_t begin, int64_t end) {
  const Resample& r = m.r;
  const int64_t c = r.channels, odd = r.padding % 2, shift = r.padding / 2;
  const int64_t pairs = row_pairs(r), size = r.out_height * r.out_width * c;
  std::vector<T> spare(c);  // takes what is outside of y
  Block<Count, T> b;
  b.scale = static_cast<Real<T>>(r.scale);
  for (int k = 0; k < 2 * Count; k++) b.column[k % 2][k / 2] = m.vertical[k], b.row[k % 2][k / 2] = m.horizontal[k];
  for (int64_t pair = begin; pair < end; pair++) {
    const int64_t image = pair / pairs, u = pair % pairs;
    for (int64_t v = 0; v < (r.out_width + odd + 1) / 2; v++) {
      for (int64_t s = 0; s < Count; s++) {
        for (int64_t t = 0; t < Count; t++) b.in[s][t] = m.pixel(image, u + shift - s, v + shift - t);
      }
      for (int64_t k = 0; k < 4; k++) {
        const int64_t i = 2 * u - odd + k / 2, j = 2 * v - odd + k % 2;
        const bool inside = i >= 0 && i < r.out_height && j >= 0 && j < r.out_width;
        const int64_t at = image * size + (i * r.out_width + j) * c;
        b.add[k] = inside && m.add ? m.add + at : m.zeros;
        b.out[k] = inside ? m.y + at : spare.data();
      }
      m.add ? make_block<Count, true>(b, c) : make_block<Count, false>(b, c);
    }
  }
}

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_RESAMPLING(T)                                               \
  GDD_FAST_SIMD void rows(const Images<T>& m, int64_t begin, int64_t end) {  \
    if (m.r.up) {                                                            \
      m.r.taps == 2 ? enlarge<1>(m, begin, end) : enlarge<2>(m, begin, end); \
    } else {                                                                 \
      m.r.taps == 2 ? halve<2>(m, begin, end) : halve<4>(m, begin, end);     \
    }                                                                        \
  }
GDD_FAST_RESAMPLING(float)
GDD_FAST_RESAMPLING(double)
GDD_FAST_RESAMPLING(at::BFloat16)
GDD_FAST_RESAMPLING(at::Half)

template <typename T>
void resample(const Resample& r, const T* x, const Factors& factors, const T* add, T* y) {
  using R = Real<T>;
  std::vector<R> vertical(factors.vertical.begin(), factors.vertical.end());
  const std::vector<R> horizontal(factors.horizontal.begin(), factors.horizontal.end());
  for (R& v : vertical) v *= static_cast<R>(r.gain);
  const std::vector<T> zeros(r.channels);
  const Images<T> m{r, x, add, y, zeros.data(), vertical.data(), horizontal.data()};
  const int64_t count = r.images * (r.up ? row_pairs(r) : r.out_height);
  const int64_t work = r.out_width * r.channels * r.taps * (r.up ? 2 : 1);  // multiply-adds each
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / work),
                   [&](int64_t begin, int64_t end) { rows(m, begin, end); });
}

}  // namespace

bool resample2d_takes(const at::Tensor& kernel) { return kernel.size(3) <= 4 && Factors(kernel).exist; }

void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y) {
  const Factors factors(kernel);
  TORCH_CHECK_VALUE(r.taps <= 4 && factors.exist,
                    "resample2d: on the CPU the filter must have 2 or 4 taps and be a column times a row");
  if (!r.channels_last) {  // converted, and back
    constexpr auto kLast = at::MemoryFormat::ChannelsLast;
    const at::Tensor from = x.contiguous(kLast);
    at::Tensor to = at::empty(y.sizes(), y.options().memory_format(kLast));
    Resample last = r;
    last.channels_last = true;
    last.stride_n = from.stride(0), last.stride_h = from.stride(2), last.stride_w = from.stride(3);
    resample2d(last, from, kernel, add.has_value() ? std::optional(add->contiguous(kLast)) : std::nullopt, to);
    y.copy_(to);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "resample2d", [&] {
    resample<scalar_t>(r, x.const_data_ptr<scalar_t>(), factors,
                       add.has_value() ? add->const_data_ptr<scalar_t>() : nullptr, y.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace gdd_fast::cpu
