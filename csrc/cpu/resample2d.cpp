// resample2d on the CPU, separably: the rows that an output row takes are summed into one row of floats, and that row
// is filtered. Channels_last images are rows of pixels of many numbers; the planes of contiguous ones, of one number.
#include "resample2d.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/floats.h"
#include "cpu/simd.h"
#include "ops.h"

namespace gdd_fast::cpu {
namespace {

constexpr int kTaps = 64;          // at most, along one dimension
constexpr int64_t kGrain = 32768;  // multiply-adds below which a second thread does not pay

// Images of `width` pixels a row, `numbers` a pixel, side by side; y and add are dense.
template <typename T>
struct Images {
  const T *x, *add;  // of one image; add may be null
  T* y;
  int64_t height, width, numbers, stride_h, stride_w, out_height, out_width;
  int taps, padding;
  const Real<T>*vertical, *horizontal;  // the filter's factors
  Real<T> scale;
};

// sum[i] = what the `count` rows, those that are not null, add up to.
template <int Count, typename T>
GDD_FAST_INLINE void sum_rows(const T* const* rows, const Real<T>* weight, int count, Real<T>* sum, int64_t n) {
  if constexpr (Count == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) sum[i] = weight[0] * widen(rows[0][i]);
  } else if constexpr (Count == 2) {
    const T *a = rows[0], *b = rows[1];
    const Real<T> p = weight[0], q = weight[1];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) sum[i] = p * widen(a[i]) + q * widen(b[i]);
  } else if constexpr (Count == 4) {
    const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    const Real<T> p = weight[0], q = weight[1], r = weight[2], s = weight[3];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) sum[i] = (p * widen(a[i]) + q * widen(b[i])) + (r * widen(c[i]) + s * widen(d[i]));
  } else {
    std::fill(sum, sum + n, Real<T>(0));
    for (int k = 0; k < count; k++) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++) sum[i] += weight[k] * widen(rows[k][i]);
    }
  }
}

template <int Most, typename T>
GDD_FAST_INLINE void sum_rows_of_any_count(const T* const* rows, const Real<T>* weight, int count, Real<T>* sum,
                                           int64_t n) {
  if (Most >= 1 && count == 1) return sum_rows<1>(rows, weight, count, sum, n);
  if (Most >= 2 && count == 2) return sum_rows<2>(rows, weight, count, sum, n);
  if (Most >= 4 && count == 4) return sum_rows<4>(rows, weight, count, sum, n);
  sum_rows<0>(rows, weight, count, sum, n);
}

// y = (sum over k of tap[k step] row[k direction] + add) * scale, for each of n outputs `stride` apart in y and add,
// whose first inputs are `from` apart. Count = 0: `count` terms.
template <int Count, typename T>
GDD_FAST_INLINE void filter_row(const Real<T>* row, int64_t from, int64_t direction, const Real<T>* tap, int step,
                                int count, const T* add, Real<T> scale, T* y, int64_t stride, int64_t n) {
  const int terms = Count > 0 ? Count : count;
  if (from == 1 && stride == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
      Real<T> sum = tap[0] * row[i];
      for (int k = 1; k < terms; k++) sum += tap[k * step] * row[i + k * direction];
      y[i] = narrow<T>((add ? sum + widen(add[i]) : sum) * scale);
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    Real<T> sum = tap[0] * row[i * from];
    for (int k = 1; k < terms; k++) sum += tap[k * step] * row[i * from + k * direction];
    y[i * stride] = narrow<T>((add ? sum + widen(add[i * stride]) : sum) * scale);
  }
}

// y = (row + add) * scale, rounded. Apart from the loops that make a row: GCC does not vectorise these two together.
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

// Outputs of single numbers, going down. Halves go through `row`.
template <int Count, typename T>
GDD_FAST_INLINE void filter_halved(const Real<T>* sum, const Real<T>* tap, int count, const T* add, Real<T> scale,
                                   Real<T>* row, T* y, int64_t n) {
  if constexpr (std::is_same_v<T, Real<T>>) {
    return filter_row<Count>(sum, 2, 1, tap, 1, count, add, scale, y, 1, n);
  } else {
    const int terms = Count > 0 ? Count : count;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
      Real<T> a = tap[0] * sum[2 * i];
      for (int k = 1; k < terms; k++) a += tap[k] * sum[2 * i + k];
      row[i] = a;
    }
    round_row<T>(row, add, scale, y, n);
  }
}

// Pairs of outputs of single numbers, going up. All but a plain enlargement of floats goes through `row`.
template <int Count, typename T>
GDD_FAST_INLINE void filter_pairs(const Real<T>* even, const Real<T>* odd, const Real<T>* even_tap,
                                  const Real<T>* odd_tap, int count, const T* add, Real<T> scale, Real<T>* row, T* y,
                                  int64_t n) {
  const int terms = Count > 0 ? Count : count;
  const auto filter = [&](Real<T>* out, Real<T> by) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
      Real<T> a = even_tap[0] * even[i], b = odd_tap[0] * odd[i];
      for (int k = 1; k < terms; k++) a += even_tap[2 * k] * even[i - k], b += odd_tap[2 * k] * odd[i - k];
      out[2 * i] = a * by;
      out[2 * i + 1] = b * by;
    }
  };
  if constexpr (std::is_same_v<T, Real<T>>) {
    if (!add) return filter(y, scale);
  }
  filter(row, 1);
  round_row<T>(row, add, scale, y, 2 * n);
}

// One row of y from the summed row `sum`, whose zeros to the left begin at sum[0]: `before` pixels. `row` has room for
// a row of y.
template <int Taps, bool Up, typename T>
GDD_FAST_INLINE void make_row(const Images<T>& m, const Real<T>* sum, int64_t before, Real<T>* row, const T* add,
                              T* y) {
  constexpr int kCount = Up ? Taps / 2 : Taps;
  const int taps = Taps > 0 ? Taps : m.taps, count = Up ? taps / 2 : taps;
  Real<T> tap[Taps > 0 ? Taps : kTaps];  // a copy, out of reach of the stores to y
  for (int k = 0; k < taps; k++) tap[k] = m.horizontal[k];
  const int64_t c = m.numbers, p = m.padding;
  if constexpr (!Up) {
    if (c == 1) return filter_halved<kCount>(sum, tap, count, add, m.scale, row, y, m.out_width);
    for (int64_t v = 0; v < m.out_width; v++) {
      filter_row<kCount>(sum + 2 * v * c, 1, c, tap, 1, count, add ? add + v * c : nullptr, m.scale, y + v * c, 1, c);
    }
  } else {
    // output v takes the inputs (v + p) / 2 and those left of it, with every second tap from (v + p) % 2 on
    const auto first = [&](int64_t v) { return sum + (before + (v + p) / 2) * c; };
    if (c == 1) {
      filter_pairs<kCount>(first(0), first(1), tap + p % 2, tap + (p + 1) % 2, count, add, m.scale, row, y,
                           m.out_width / 2);
      if (m.out_width % 2 == 0) return;
    }
    for (int64_t v = c == 1 ? m.out_width - 1 : 0; v < m.out_width; v++) {
      filter_row<kCount>(first(v), 1, -c, tap + (v + p) % 2, 2, count, add ? add + v * c : nullptr, m.scale, y + v * c,
                         1, c);
    }
  }
}

// Rows `begin` to `end` - 1 of an image's output. `sum` has room for a row with its borders and is zero there; `row` is
// make_row's.
template <int Taps, bool Up, typename T>
GDD_FAST_INLINE void make_rows(const Images<T>& m, int64_t begin, int64_t end, int64_t before, Real<T>* sum,
                               Real<T>* row) {
  constexpr int kRows = Taps == 0 ? kTaps : Up ? Taps / 2 : Taps;
  const int taps = Taps > 0 ? Taps : m.taps, count = Up ? taps / 2 : taps;
  const bool dense = m.stride_w == m.numbers || m.width == 1;
  const int64_t pieces = dense ? 1 : m.width, n = dense ? m.width * m.numbers : m.numbers;
  Real<T>* const inside = sum + before * m.numbers;
  for (int64_t u = begin; u < end; u++) {
    const T* rows[kRows]{};
    Real<T> weight[kRows]{};
    int found = 0;  // rows inside the image
    for (int k = 0; k < count; k++) {
      const int64_t i = Up ? (u + m.padding) / 2 - k : 2 * u + k - m.padding;
      if (i < 0 || i >= m.height) continue;
      rows[found] = m.x + i * m.stride_h;
      weight[found++] = m.vertical[Up ? (u + m.padding) % 2 + 2 * k : k];
    }
    for (int64_t piece = 0; piece < pieces; piece++) {
      sum_rows_of_any_count<kRows>(rows, weight, found, inside + piece * n, n);
      for (int k = 0; k < found; k++) rows[k] += m.stride_w;  // unused if dense
    }
    const int64_t out = u * m.out_width * m.numbers;
    make_row<Taps, Up>(m, sum, before, row, m.add ? m.add + out : nullptr, m.y + out);
  }
}

template <typename T>
GDD_FAST_INLINE void make_rows_of_any_size(const Images<T>& m, bool up, int64_t begin, int64_t end, int64_t before,
                                           Real<T>* sum, Real<T>* row) {
  if (m.taps == 2) {
    up ? make_rows<2, true>(m, begin, end, before, sum, row) : make_rows<2, false>(m, begin, end, before, sum, row);
  } else if (m.taps == 4) {
    up ? make_rows<4, true>(m, begin, end, before, sum, row) : make_rows<4, false>(m, begin, end, before, sum, row);
  } else {
    up ? make_rows<0, true>(m, begin, end, before, sum, row) : make_rows<0, false>(m, begin, end, before, sum, row);
  }
}

// Going up in channels_last memory: 2 x 2 output pixels have the same Count x Count inputs, which are read once.
// `column` and `row` are the filter's factors for the first and the second output of the two.
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

// Blocks of rows `begin` to `end` - 1: block u makes the rows 2 u - padding % 2 and the next. `spare` has room for two
// pixels: zeros, which stand for what is outside of x and add, and what is outside of y.
template <int Count, typename T>
GDD_FAST_INLINE void make_blocks(const Images<T>& m, int64_t begin, int64_t end, T* spare) {
  const int64_t c = m.numbers, odd = m.padding % 2, shift = m.padding / 2;
  const T* const zeros = spare;
  Block<Count, T> b;
  b.scale = m.scale;
  for (int k = 0; k < 2 * Count; k++) b.column[k % 2][k / 2] = m.vertical[k], b.row[k % 2][k / 2] = m.horizontal[k];
  for (int64_t u = begin; u < end; u++) {
    for (int64_t v = 0; v < (m.out_width + odd + 1) / 2; v++) {
      for (int64_t s = 0; s < Count; s++) {
        for (int64_t t = 0; t < Count; t++) {
          const int64_t i = u + shift - s, j = v + shift - t;
          const bool inside = i >= 0 && i < m.height && j >= 0 && j < m.width;
          b.in[s][t] = inside ? m.x + i * m.stride_h + j * m.stride_w : zeros;
        }
      }
      for (int64_t k = 0; k < 4; k++) {
        const int64_t i = 2 * u - odd + k / 2, j = 2 * v - odd + k % 2;
        const bool inside = i >= 0 && i < m.out_height && j >= 0 && j < m.out_width;
        b.add[k] = inside && m.add ? m.add + (i * m.out_width + j) * c : zeros;
        b.out[k] = inside ? m.y + (i * m.out_width + j) * c : spare + c;
      }
      m.add ? make_block<Count, true>(b, c) : make_block<Count, false>(b, c);
    }
  }
}

// target_clones takes no templates, hence one overload a type
#define GDD_FAST_RESAMPLE(T)                                                                                    \
  GDD_FAST_SIMD void run(const Images<T>& m, bool up, int64_t begin, int64_t end, int64_t before, Real<T>* sum, \
                         Real<T>* row) {                                                                        \
    make_rows_of_any_size<T>(m, up, begin, end, before, sum, row);                                              \
  }                                                                                                             \
  GDD_FAST_SIMD void run_blocks(const Images<T>& m, int64_t begin, int64_t end, T* spare) {                     \
    m.taps == 2 ? make_blocks<1>(m, begin, end, spare) : make_blocks<2>(m, begin, end, spare);                  \
  }

GDD_FAST_RESAMPLE(float)
GDD_FAST_RESAMPLE(double)
GDD_FAST_RESAMPLE(at::BFloat16)
GDD_FAST_RESAMPLE(at::Half)

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
      exist &= std::abs(vertical[at / taps] * horizontal[at % taps] - k[at]) <= allowed;  // NaN: not
    }
  }
};

template <typename T>
void resample(const Resample& r, const T* x, const Factors& factors, const T* add, T* y) {
  using R = Real<T>;
  std::vector<R> vertical(factors.vertical.begin(), factors.vertical.end());
  std::vector<R> horizontal(factors.horizontal.begin(), factors.horizontal.end());
  for (R& v : vertical) v *= static_cast<R>(r.gain);
  const int64_t numbers = r.channels_last ? r.channels : 1, planes = r.channels_last ? 1 : r.channels;
  const int64_t size = r.out_height * r.out_width * numbers;
  const auto image_at = [&](int64_t image) {
    return Images<T>{x + image / planes * r.stride_n + image % planes * r.stride_c,
                     add ? add + image * size : nullptr,
                     y + image * size,
                     r.height,
                     r.width,
                     numbers,
                     r.stride_h,
                     r.stride_w,
                     r.out_height,
                     r.out_width,
                     r.taps,
                     r.padding,
                     vertical.data(),
                     horizontal.data(),
                     static_cast<R>(r.scale)};
  };
  // function(image, first row, last row) for `rows` rows an image of `work` multiply-adds each
  const auto for_rows = [&](int64_t rows, int64_t work, const auto& make) {
    at::parallel_for(0, r.images * planes * rows, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
      auto run_rows = make();
      while (begin < end) {
        const int64_t first = begin % rows, last = std::min(rows, first + end - begin);
        run_rows(image_at(begin / rows), first, last);
        begin += last - first;
      }
    });
  };
  const int64_t work = r.out_width * numbers * r.taps;
  if (r.up && numbers > 1 && r.taps <= 4) {
    return for_rows((r.out_height + r.padding % 2 + 1) / 2, 2 * work, [&] {
      return [spare = std::vector<T>(2 * numbers)](const Images<T>& m, int64_t first, int64_t last) mutable {
        run_blocks(m, first, last, spare.data());
      };
    });
  }
  // zeros on both sides of a row, as many pixels as the filter can reach over
  const int64_t before = r.up ? r.taps / 2 - 1 : r.padding, after = r.up ? r.taps / 2 : r.padding;
  for_rows(r.out_height, work, [&] {
    return
        [&, sum = std::vector<R>((before + r.width + after) * numbers),
         row = std::vector<R>(numbers > 1 ? 0 : r.out_width)](const Images<T>& m, int64_t first, int64_t last) mutable {
          run(m, r.up, first, last, before, sum.data(), row.data());
        };
  });
}

}  // namespace

bool resample2d_takes(const at::Tensor& kernel) { return kernel.size(3) <= kTaps && Factors(kernel).exist; }

void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y) {
  const Factors factors(kernel);
  TORCH_CHECK_VALUE(r.taps <= kTaps && factors.exist, "resample2d: on the CPU the filter must be a column times a row");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "resample2d", [&] {
    resample<scalar_t>(r, x.const_data_ptr<scalar_t>(), factors,
                       add.has_value() ? add->const_data_ptr<scalar_t>() : nullptr, y.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace gdd_fast::cpu
