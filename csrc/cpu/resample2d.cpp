// resample2d on the CPU, separably: the filter's two factors, and which loop takes what. An output is made from
// the sum of the input rows that it takes, which is then filtered along the row.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/floats.h"
#include "cpu/resample2d_images.h"
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
void resample(const Resample& r, const T* x, const Factors& factors, const T* add, T* y) {
  using R = Real<T>;
  std::vector<R> vertical(factors.vertical.begin(), factors.vertical.end());
  std::vector<R> horizontal(factors.horizontal.begin(), factors.horizontal.end());
  for (R& v : vertical) v *= static_cast<R>(r.gain);
  const int64_t numbers = r.channels_last ? r.channels : 1, planes = r.channels_last ? 1 : r.channels;
  const std::vector<T> zeros(std::max<int64_t>(r.width, 1) * numbers);  // a pixel at least, also where x has none
  const resampling::Images<T> m{x,
                                add,
                                y,
                                zeros.data(),
                                planes,
                                r.stride_n,
                                r.stride_c,
                                r.stride_h,
                                r.stride_w,
                                r.height,
                                r.width,
                                numbers,
                                r.out_height,
                                r.out_width,
                                r.taps,
                                r.padding,
                                vertical.data(),
                                horizontal.data(),
                                static_cast<R>(r.scale)};
  const bool plane = numbers == 1 && (r.stride_w == 1 || r.width == 1), in_pairs = !plane && r.up;
  const int64_t rows = r.images * planes * (in_pairs ? resampling::row_pairs(r.out_height, r.padding) : r.out_height);
  const int64_t work = r.out_width * numbers * r.taps * (in_pairs ? 2 : 1);  // multiply-adds per row
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    if (plane) return resampling::planes(m, r.up, begin, end);
    r.up ? resampling::doubled_pixels(m, begin, end) : resampling::halved_pixels(m, begin, end);
  });
}

}  // namespace

bool resample2d_takes(const at::Tensor& kernel) { return kernel.size(3) <= 4 && Factors(kernel).exist; }

void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y) {
  const Factors factors(kernel);
  TORCH_CHECK_VALUE(r.taps <= 4 && factors.exist,
                    "resample2d: on the CPU the filter must have 2 or 4 taps and be a column times a row");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "resample2d", [&] {
    resample<scalar_t>(r, x.const_data_ptr<scalar_t>(), factors,
                       add.has_value() ? add->const_data_ptr<scalar_t>() : nullptr, y.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace gdd_fast::cpu
