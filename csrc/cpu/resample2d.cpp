// resample2d on the CPU: channels_last is vectorised over channels, contiguous memory over the pixels of a row.
#include "resample2d.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/floats.h"
#include "cpu/simd.h"
#include "ops.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // multiply-adds below which a second thread does not pay

// The inputs of each output along one dimension: `count` a position, source < 0 for one outside the image.
struct Inputs {
  int count;
  std::vector<int64_t> source;
  std::vector<int> tap;

  Inputs(const Resample& r, int64_t in, int64_t out) : count(r.up ? r.taps / 2 : r.taps) {
    for (int64_t u = 0; u < out; u++) {
      const int first = r.up ? static_cast<int>((u + r.padding) % 2) : 0;
      for (int t = 0; t < count; t++) {
        const int64_t i = r.up ? (u + r.padding - first) / 2 - t : 2 * u + t - r.padding;
        source.push_back(i < in ? i : -1);
        tap.push_back(r.up ? first + 2 * t : t);
      }
    }
  }
};

// out = (sum of weight * from + add) * scale over n neighbouring channels; add may be null.
template <int Count, typename T>
GDD_FAST_INLINE void weigh_loop(const T* const* from, const Real<T>* weight, int count, const T* add, Real<T> scale,
                                T* out, int64_t n) {
  if constexpr (Count > 0) {  // in locals, out of reach of the stores to `out`
    const T* p[Count];
    Real<T> w[Count];
    for (int k = 0; k < Count; k++) p[k] = from[k], w[k] = weight[k];
#pragma GCC ivdep
    for (int64_t c = 0; c < n; c++) {
      Real<T> sum = w[0] * widen(p[0][c]);
#pragma GCC unroll 16
      for (int k = 1; k < Count; k++) sum += w[k] * widen(p[k][c]);
      if (add) sum += widen(add[c]);
      out[c] = narrow<T>(sum * scale);
    }
    return;
  }
  for (int64_t c = 0; c < n; c++) {
    Real<T> sum = 0;
    for (int k = 0; k < count; k++) sum += weight[k] * widen(from[k][c]);
    if (add) sum += widen(add[c]);
    out[c] = narrow<T>(sum * scale);
  }
}

template <typename T>
GDD_FAST_INLINE void weigh_switch(const T* const* from, const Real<T>* weight, int count, const T* add, Real<T> scale,
                                  T* out, int64_t n) {
  if (count == 1) return weigh_loop<1>(from, weight, count, add, scale, out, n);
  if (count == 4) return weigh_loop<4>(from, weight, count, add, scale, out, n);
  if (count == 16) return weigh_loop<16>(from, weight, count, add, scale, out, n);
  weigh_loop<0>(from, weight, count, add, scale, out, n);
}

// One plane in floats with a border of zeros -> one output row. `rows`: the plane's first row that the output reads
// (up: the last one, read upwards), at the column of the first output's first input; `stride` apart.
template <int Taps, typename R>
GDD_FAST_INLINE void down_row(const R* rows, int64_t stride, int taps, const R* kernel, R* out, int64_t n) {
  const int k = Taps > 0 ? Taps : taps;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; j++) {
    R sum = 0;
    for (int a = 0; a < k; a++) {
      for (int b = 0; b < k; b++) sum += kernel[a * k + b] * rows[a * stride + 2 * j + b];
    }
    out[j] = sum;
  }
}

// Every second output of a row: they share their taps, `kernel` being that of (first row tap, first column tap).
template <int Taps, typename R>
GDD_FAST_INLINE void up_row(const R* rows, int64_t stride, int taps, const R* kernel, R* out, int64_t n) {
  const int k = Taps > 0 ? Taps : taps;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; j++) {
    R sum = 0;
    for (int s = 0; s < k / 2; s++) {
      for (int t = 0; t < k / 2; t++) sum += kernel[2 * s * k + 2 * t] * rows[j - s * stride - t];
    }
    out[j] = sum;
  }
}

template <typename R>
GDD_FAST_INLINE void filter_switch(bool up, const R* rows, int64_t stride, int taps, const R* kernel, R* out,
                                   int64_t n) {
  if (up) {
    if (taps == 2) return up_row<2>(rows, stride, taps, kernel, out, n);
    if (taps == 4) return up_row<4>(rows, stride, taps, kernel, out, n);
    return up_row<0>(rows, stride, taps, kernel, out, n);
  }
  if (taps == 2) return down_row<2>(rows, stride, taps, kernel, out, n);
  if (taps == 4) return down_row<4>(rows, stride, taps, kernel, out, n);
  down_row<0>(rows, stride, taps, kernel, out, n);
}

template <typename T>
GDD_FAST_INLINE void finish_loop(const Real<T>* even, const Real<T>* odd, const T* add, Real<T> scale, T* out,
                                 int64_t n) {
  if (!odd) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; j++) out[j] = narrow<T>((even[j] + (add ? widen(add[j]) : 0)) * scale);
    return;
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < n / 2; j++) {
    out[2 * j] = narrow<T>((even[j] + (add ? widen(add[2 * j]) : 0)) * scale);
    out[2 * j + 1] = narrow<T>((odd[j] + (add ? widen(add[2 * j + 1]) : 0)) * scale);
  }
  if (n % 2) out[n - 1] = narrow<T>((even[n / 2] + (add ? widen(add[n - 1]) : 0)) * scale);
}

template <typename T>
GDD_FAST_INLINE void widen_loop(const T* in, Real<T>* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) out[i] = widen(in[i]);
}

// target_clones takes no templates, hence one overload a type
#define GDD_FAST_RESAMPLE(T)                                                                                           \
  GDD_FAST_SIMD void weigh(const T* const* from, const Real<T>* weight, int count, const T* add, Real<T> scale,        \
                           T* out, int64_t n) {                                                                        \
    weigh_switch<T>(from, weight, count, add, scale, out, n);                                                          \
  }                                                                                                                    \
  GDD_FAST_SIMD void finish(const Real<T>* even, const Real<T>* odd, const T* add, Real<T> scale, T* out, int64_t n) { \
    finish_loop<T>(even, odd, add, scale, out, n);                                                                     \
  }                                                                                                                    \
  GDD_FAST_SIMD void widen_row(const T* in, Real<T>* out, int64_t n) { widen_loop<T>(in, out, n); }

GDD_FAST_RESAMPLE(float)
GDD_FAST_RESAMPLE(double)
GDD_FAST_RESAMPLE(at::BFloat16)
GDD_FAST_RESAMPLE(at::Half)

GDD_FAST_SIMD void filter(bool up, const float* rows, int64_t stride, int taps, const float* kernel, float* out,
                          int64_t n) {
  filter_switch<float>(up, rows, stride, taps, kernel, out, n);
}
GDD_FAST_SIMD void filter(bool up, const double* rows, int64_t stride, int taps, const double* kernel, double* out,
                          int64_t n) {
  filter_switch<double>(up, rows, stride, taps, kernel, out, n);
}

template <typename T>
void resample_channels_last(const Resample& r, const T* x, const Real<T>* kernel, const T* add, T* y) {
  const Inputs rows(r, r.height, r.out_height), columns(r, r.width, r.out_width);
  const int terms = rows.count * columns.count;
  const int64_t row_size = r.out_width * r.channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / (row_size * terms));
  at::parallel_for(0, r.images * r.out_height, grain, [&](int64_t begin, int64_t end) {
    const std::vector<T> zeros(r.channels);  // stands in for pixels outside the image
    std::vector<const T*> from(terms);
    std::vector<Real<T>> weight(terms);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / r.out_height, u = task % r.out_height;
      for (int64_t v = 0; v < r.out_width; v++) {
        int k = 0;
        for (int s = 0; s < rows.count; s++) {
          const int64_t i = rows.source[u * rows.count + s];
          const T* row = x + n * r.stride_n + i * r.stride_h;
          const Real<T>* row_kernel = kernel + rows.tap[u * rows.count + s] * r.taps;
          for (int t = 0; t < columns.count; t++, k++) {
            const int64_t j = columns.source[v * columns.count + t];
            from[k] = i < 0 || j < 0 ? zeros.data() : row + j * r.stride_w;
            weight[k] = row_kernel[columns.tap[v * columns.count + t]];
          }
        }
        const int64_t out = task * row_size + v * r.channels;
        weigh(from.data(), weight.data(), terms, add ? add + out : nullptr, static_cast<Real<T>>(r.scale), y + out,
              r.channels);
      }
    }
  });
}

template <typename T>
void resample_contiguous(const Resample& r, const T* x, const Real<T>* kernel, const T* add, T* y) {
  using R = Real<T>;
  const int64_t before = r.up ? r.taps / 2 - 1 : r.padding, after = r.up ? r.taps / 2 : r.padding;
  const int64_t stride = r.width + before + after, size = (r.height + before + after) * stride;
  const int64_t grain = std::max<int64_t>(1, kGrain / (r.out_height * r.out_width * r.taps));
  at::parallel_for(0, r.images * r.channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<R> plane(size), even(r.out_width), odd(r.out_width);
    R* const inside = plane.data() + before * stride + before;
    for (int64_t task = begin; task < end; task++) {
      const T* in = x + task / r.channels * r.stride_n + task % r.channels * r.stride_c;
      for (int64_t i = 0; i < r.height; i++) widen_row(in + i * r.stride_h, inside + i * stride, r.width);
      for (int64_t u = 0; u < r.out_height; u++) {
        const int64_t out = (task * r.out_height + u) * r.out_width;
        if (r.up) {
          const int64_t p = r.padding, first = (u + p) % 2;
          const R* row = inside + (u + p) / 2 * stride;
          const R* row_kernel = kernel + first * r.taps;
          filter(true, row + p / 2, stride, r.taps, row_kernel + p % 2, even.data(), (r.out_width + 1) / 2);
          filter(true, row + (p + 1) / 2, stride, r.taps, row_kernel + (p + 1) % 2, odd.data(), r.out_width / 2);
        } else {
          filter(false, plane.data() + 2 * u * stride, stride, r.taps, kernel, even.data(), r.out_width);
        }
        finish(even.data(), r.up ? odd.data() : nullptr, add ? add + out : nullptr, static_cast<R>(r.scale), y + out,
               r.out_width);
      }
    }
  });
}

}  // namespace

void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y) {
  const at::Tensor filter = kernel.to(at::kDouble).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "resample2d", [&] {
    std::vector<Real<scalar_t>> weights(filter.numel());
    for (size_t i = 0; i < weights.size(); i++) {
      weights[i] = static_cast<Real<scalar_t>>(filter.const_data_ptr<double>()[i] * r.gain);
    }
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* added = add.has_value() ? add->const_data_ptr<scalar_t>() : nullptr;
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    if (r.channels_last) {
      resample_channels_last<scalar_t>(r, in, weights.data(), added, out);
    } else {
      resample_contiguous<scalar_t>(r, in, weights.data(), added, out);
    }
  });
}

}  // namespace gdd_fast::cpu
