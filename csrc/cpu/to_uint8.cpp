// to_uint8 on the CPU, parallel over tiles of pixels.
#include "to_uint8.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/simd.h"
#include "strides.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kTile = 1024;    // pixels; a tile of one channel stays in the first-level cache
constexpr int64_t kGrain = 32768;  // elements below which a second thread does not pay

template <typename T>
inline uint8_t to_byte(T x) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Real y = static_cast<Real>(x) * Real(127.5) + Real(128);  // rounded twice: built with -ffp-contract=off
  const Real floored = y > 0 ? y : Real(0);                       // NaN compares false: 0
  return static_cast<uint8_t>(static_cast<int32_t>(floored < 255 ? floored : Real(255)));
}

template <typename T>
inline void convert_loop(const T* x, uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = to_byte(x[i]);
}

// target_clones takes no templates, hence one overload per type
GDD_FAST_SIMD void convert(const float* x, uint8_t* y, int64_t n) { convert_loop(x, y, n); }
GDD_FAST_SIMD void convert(const double* x, uint8_t* y, int64_t n) { convert_loop(x, y, n); }
GDD_FAST_SIMD void convert(const at::BFloat16* x, uint8_t* y, int64_t n) { convert_loop(x, y, n); }
GDD_FAST_SIMD void convert(const at::Half* x, uint8_t* y, int64_t n) { convert_loop(x, y, n); }

// x is in memory what y is to be: channels innermost, no gaps.
template <typename T>
void convert_in_order(const T* x, uint8_t* y, int64_t n) {
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) { convert(x + begin, y + begin, end - begin); });
}

// Any strides: each channel of a tile is converted in a row of its own, then spread over the pixels.
template <typename T>
void convert_interleaved(const T* x, uint8_t* y, const ImageStrides& s) {
  const int64_t tiles = (s.pixels + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, kGrain / (s.channels * std::min(kTile, s.pixels)));
  at::parallel_for(0, s.images * tiles, grain, [&](int64_t begin, int64_t end) {
    std::array<uint8_t, kTile> row;
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / tiles, first = task % tiles * kTile;
      const int64_t count = std::min(kTile, s.pixels - first);
      uint8_t* out = y + (image * s.pixels + first) * s.channels;
      for (int64_t c = 0; c < s.channels; c++) {
        const T* in = x + image * s.image + c * s.channel + first * s.pixel;
        if (s.pixel == 1) {
          convert(in, row.data(), count);
        } else {
          for (int64_t p = 0; p < count; p++) row[p] = to_byte(in[p * s.pixel]);
        }
        for (int64_t p = 0; p < count; p++) out[p * s.channels + c] = row[p];
      }
    }
  });
}

}  // namespace

void to_uint8(const at::Tensor& x, at::Tensor& y) {
  const ImageStrides s = image_strides(x);
  const bool in_order = (s.channels == 1 || s.channel == 1) && (s.pixels == 1 || s.pixel == s.channels) &&
                        (s.images == 1 || s.image == s.channels * s.pixels);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "to_uint8", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    uint8_t* out = y.mutable_data_ptr<uint8_t>();
    if (in_order) {
      convert_in_order(in, out, x.numel());
    } else {
      convert_interleaved(in, out, s);
    }
  });
}

}  // namespace gdd_fast::cpu
