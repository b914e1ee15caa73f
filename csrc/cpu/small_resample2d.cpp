// Doubles or halves the resolution of channels_last maps, as gdd_fast/ops/resample2d.py defines it: a pixel of the
// result is a weighted sum of a few pixels, whose channels are contiguous.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/floats.h"
#include "cpu/simd.h"
#include "small_maps.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kChannels = 64;  // their sums stay in registers or the first-level cache
constexpr int64_t kGrain = 1 << 14;

#define GDD_FAST_LOOPS(T)                                                                                             \
  GDD_FAST_SIMD void weighted(const T* const* pixels, const float* weights, int64_t count, const T* add, float scale, \
                              T* y, int64_t channels) {                                                               \
    for (int64_t c = 0; c < channels; c += kChannels) {                                                               \
      const int64_t width = channels - c < kChannels ? channels - c : kChannels;                                      \
      float sum[kChannels] = {};                                                                                      \
      for (int64_t i = 0; i < count; i++) {                                                                           \
        const T* pixel = pixels[i] + c;                                                                               \
        for (int64_t e = 0; e < width; e++) sum[e] += weights[i] * widen(pixel[e]);                                   \
      }                                                                                                               \
      if (add != nullptr) {                                                                                           \
        for (int64_t e = 0; e < width; e++) sum[e] += widen(add[c + e]);                                              \
      }                                                                                                               \
      for (int64_t e = 0; e < width; e++) y[c + e] = narrow<T>(sum[e] * scale);                                       \
    }                                                                                                                 \
  }
GDD_FAST_LOOPS(float)
GDD_FAST_LOOPS(at::BFloat16)
#undef GDD_FAST_LOOPS

template <typename T>
void resample(const SmallResample2d& r, const T* x, const float* kernel, const T* add, T* y) {
  const int64_t lines = r.images * r.out_height;
  const int64_t grain = std::max<int64_t>(1, kGrain / (r.out_width * r.channels));
  at::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    std::vector<const T*> pixels(r.taps * r.taps);
    std::vector<float> weights(r.taps * r.taps);
    for (int64_t line = begin; line < end; line++) {
      const int64_t image = line / r.out_height, u = line % r.out_height;
      for (int64_t v = 0; v < r.out_width; v++) {
        int64_t count = 0;
        for (int64_t a = 0; a < r.taps; a++) {
          const int64_t i = r.up ? (u + r.padding - a) / 2 : 2 * u + a - r.padding;
          if ((r.up && (u + r.padding - a) % 2 != 0) || i < 0 || i >= r.height) continue;
          for (int64_t b = 0; b < r.taps; b++) {
            const int64_t j = r.up ? (v + r.padding - b) / 2 : 2 * v + b - r.padding;
            if ((r.up && (v + r.padding - b) % 2 != 0) || j < 0 || j >= r.width) continue;
            pixels[count] = x + ((image * r.height + i) * r.width + j) * r.channels;
            weights[count++] = r.gain * kernel[a * r.taps + b];
          }
        }
        const int64_t at = (line * r.out_width + v) * r.channels;
        weighted(pixels.data(), weights.data(), count, add == nullptr ? nullptr : add + at, r.scale, y + at,
                 r.channels);
      }
    }
  });
}

}  // namespace

void small_resample2d(const SmallResample2d& r, const at::Tensor& x, const float* kernel,
                      const std::optional<at::Tensor>& add, at::Tensor& y) {
  const auto run = [&]<typename T>(T* to) {
    resample(r, x.const_data_ptr<T>(), kernel, add.has_value() ? add->const_data_ptr<T>() : nullptr, to);
  };
  if (y.scalar_type() == at::kBFloat16) {
    run(y.mutable_data_ptr<at::BFloat16>());
  } else {
    run(y.mutable_data_ptr<float>());
  }
}

}  // namespace gdd_fast::cpu
