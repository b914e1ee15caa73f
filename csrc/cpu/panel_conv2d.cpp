// Convolutions as products of panels: each of a weight's panels of output channels stays in the cache while runs of
// pixels are multiplied by it; for every tap of the window, rows of the product are read in place in the map. So no map
// is unrolled or padded, and further 1x1 convolutions, summed at the end of a block, are more taps of the same product.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/floats.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#include "small_maps.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kProducts = 1 << 18;  // below which a second thread does not pay off

GDD_FAST_SIMD void widen_all(const at::BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);
}

#define GDD_FAST_LOOPS(T)                                                                              \
  GDD_FAST_SIMD void finish_row(const float* sums, const float* bias, const T* add, float scale, T* y, \
                                int64_t count) {                                                       \
    if (add == nullptr) {                                                                              \
      for (int64_t i = 0; i < count; i++) y[i] = narrow<T>(sums[i] + bias[i]);                         \
    } else {                                                                                           \
      for (int64_t i = 0; i < count; i++) y[i] = narrow<T>(sums[i] + bias[i] + scale * widen(add[i])); \
    }                                                                                                  \
  }
GDD_FAST_LOOPS(float)
GDD_FAST_LOOPS(at::BFloat16)
#undef GDD_FAST_LOOPS

// The taps of `rows` pixels from `first` on, without those that are outside the map for all pixels.
class Window {
 public:
  Window(const PanelConv2d& c, const std::vector<const float*>& maps)
      : c_(c), maps_(maps), zeros_(c.channels[0], 0.0f), taps_(c.size * c.size + c.channels.size() - 1) {}

  void place(int64_t first, int64_t rows) {
    const int64_t width = c_.width + 2 * c_.padding - c_.size + 1, height = c_.height + 2 * c_.padding - c_.size + 1;
    const int64_t channels = c_.channels[0];
    int64_t top[kMostRows], left[kMostRows], image[kMostRows];
    for (int64_t r = 0; r < rows; r++) {
      const int64_t line = (first + r) / width;
      left[r] = (first + r) % width - c_.padding;
      top[r] = line % height - c_.padding;
      image[r] = line / height * c_.height;
    }
    count_ = 0;
    int64_t depth = 0;
    for (int64_t i = 0; i < c_.size * c_.size; i++, depth += channels) {
      Tap& tap = taps_[count_];
      bool any = false;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t row = top[r] + i / c_.size, column = left[r] + i % c_.size;
        const bool inside = row >= 0 && row < c_.height && column >= 0 && column < c_.width;
        tap.rows[r] = inside ? maps_[0] + ((image[r] + row) * c_.width + column) * channels : zeros_.data();
        any |= inside;
      }
      if (any) add(tap, channels, depth);
    }
    for (size_t part = 1; part < maps_.size(); part++) {
      Tap& tap = taps_[count_];
      for (int64_t r = 0; r < rows; r++) tap.rows[r] = maps_[part] + (first + r) * c_.channels[part];
      add(tap, c_.channels[part], depth);
      depth += c_.channels[part];
    }
  }

  // The placed taps with the weights of one panel.
  int64_t weigh(const float* panel) {
    for (int64_t i = 0; i < count_; i++) taps_[i].weight = panel + taps_[i].at * c_.panel;
    return count_;
  }
  const Tap* taps() const { return taps_.data(); }

 private:
  void add(Tap& tap, int64_t depth, int64_t at) {
    tap.depth = depth;
    tap.at = at;
    count_++;
  }
  const PanelConv2d& c_;
  const std::vector<const float*>& maps_;
  const std::vector<float> zeros_;
  std::vector<Tap> taps_;
  int64_t count_ = 0;
};

template <typename T>
void convolve(const PanelConv2d& c, const std::vector<const float*>& maps, const float* weight, int64_t depth,
              const float* bias, const T* add, float scale, T* y) {
  const Panels& kernels = panels();
  const auto multiply = c.panel == kernels.width ? kernels.multiply : kernels.multiply_narrow;
  const int64_t pixels = c.images * (c.height + 2 * c.padding - c.size + 1) * (c.width + 2 * c.padding - c.size + 1);
  const int64_t runs = (pixels + kernels.rows - 1) / kernels.rows;
  const int64_t count = (c.out_channels + c.panel - 1) / c.panel;
  const int64_t grain = std::max<int64_t>(1, kProducts / (kernels.rows * depth * c.panel));
  at::parallel_for(0, count * runs, grain, [&](int64_t begin, int64_t end) {
    Window window(c, maps);
    float sums[kMostRows * kWidestPanel];
    for (int64_t i = begin; i < end; i++) {
      const int64_t panel = i / runs, run = i % runs, from = pixels * run / runs, to = pixels * (run + 1) / runs;
      window.place(from, to - from);
      const int64_t taps = window.weigh(weight + panel * depth * c.panel);
      multiply(to - from, window.taps(), taps, sums);
      const int64_t at = panel * c.panel, width = std::min(c.panel, c.out_channels - at);
      for (int64_t r = 0; r < to - from; r++) {
        const int64_t offset = (from + r) * c.out_channels + at;
        finish_row(sums + r * c.panel, bias + at, add == nullptr ? nullptr : add + offset, scale, y + offset, width);
      }
    }
  });
}

}  // namespace

int64_t panel_width(bool narrow) { return narrow ? panels().narrow : panels().width; }

void panel_conv2d(const PanelConv2d& c, const std::vector<at::Tensor>& maps, const at::Tensor& weight,
                  const float* bias, const std::optional<at::Tensor>& add, float scale, at::Tensor& y) {
  const int64_t depth = weight.size(1);
  std::vector<const float*> wide;
  if (y.scalar_type() == at::kFloat) {
    for (const auto& map : maps) wide.push_back(map.const_data_ptr<float>());
    convolve(c, wide, weight.const_data_ptr<float>(), depth, bias,
             add.has_value() ? add->const_data_ptr<float>() : nullptr, scale, y.mutable_data_ptr<float>());
    return;
  }
  std::vector<at::Tensor> kept;  // widened once, as every value is read for each tap and panel
  for (const auto& map : maps) {
    kept.push_back(at::empty({map.numel()}, at::kFloat));
    float* to = kept.back().mutable_data_ptr<float>();
    const auto* from = map.const_data_ptr<at::BFloat16>();
    at::parallel_for(0, map.numel(), 1 << 15,
                     [&](int64_t begin, int64_t end) { widen_all(from + begin, to + begin, end - begin); });
    wide.push_back(to);
  }
  convolve(c, wide, weight.const_data_ptr<float>(), depth, bias,
           add.has_value() ? add->const_data_ptr<at::BFloat16>() : nullptr, scale, y.mutable_data_ptr<at::BFloat16>());
}

}  // namespace gdd_fast::cpu
