// Winograd's F(4x4, 3x3) on the CPU (Lavin and Gray, arXiv 1509.09308). Tiles of 6x6 pixels, which overlap by two, are
// transformed to six points in either direction; there a convolution is 36 matrix products over channels; the results
// are transformed back to 4x4 pixels. A run of tiles goes through all three steps while it is in the cache.
//
// The points are 0, +-3/4, +-3/2 and infinity. With Lavin's points, 0, +-1, +-2 and infinity, a layer's rounding error
// is twice as large; with these a whole NCSN++ is as close to float64 as with oneDNN's direct convolutions.
#include "winograd_conv2d.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/floats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GDD_FAST_WINOGRAD
#include <immintrin.h>
#endif

namespace gdd_fast::cpu {
namespace {

constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr int64_t kTiles = 64;  // per run: its points and products fit a third-level cache
constexpr int64_t kPad = 16;    // between rows, as caches have few places for distances that are powers of two

#ifdef GDD_FAST_WINOGRAD
#define GDD_FAST_KERNELS "cpu/winograd_kernels.h"
#include "cpu/vector_sets.h"
#endif

// The loops for T of one instruction set.
template <typename T>
struct Loops {
  int64_t panel;
  void (*transform_weight)(const float*, int64_t, const int64_t*, float*, int64_t);
  void (*transform_tile)(const T* const*, int64_t, float*, int64_t);
  void (*multiply_panel)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t);
  void (*finish_tile)(const float*, int64_t, const float*, T*, int64_t, int64_t, int64_t, int64_t);
};

// The loops for this processor, as torch sees it (ATEN_CPU_CAPABILITY); a panel of 0 if there are none.
template <typename T>
Loops<T> loops() {
#ifdef GDD_FAST_WINOGRAD
  const std::string processor = at::get_cpu_capability();
  if (processor == "AVX512") {
    return {avx512::kPanel, avx512::transform_weight, avx512::transform_tile<T>, avx512::multiply_panel,
            avx512::finish_tile<T>};
  }
  if (processor == "AVX2")
    return {avx2::kPanel, avx2::transform_weight, avx2::transform_tile<T>, avx2::multiply_panel, avx2::finish_tile<T>};
#endif
  return {};
}

// Transformed tiles, 36 matrices (tiles, channels), and their products; distances in values.
struct Run {
  int64_t tiles, x_row, x_point, y_row, y_point;
  const float* points;
  float* products;
};

// multiply(run) computes the products.
template <typename T, typename Multiply>
void convolve(const WinogradConv2d& c, const T* x, const float* bias, T* y, const Multiply& multiply) {
  static const Loops<T> loops = cpu::loops<T>();
  const int64_t rows = (c.height + 3) / 4, columns = (c.width + 3) / 4, tiles = c.images * rows * columns;
  const int64_t most = std::min(tiles, kTiles);
  const int64_t x_row = c.channels + kPad, y_row = c.out_channels + kPad;
  const int64_t x_point = most * x_row + kPad, y_point = most * y_row + kPad;
  const at::Tensor points = at::empty({36 * x_point}, at::kFloat), products = at::empty({36 * y_point}, at::kFloat);
  float *at_points = points.mutable_data_ptr<float>(), *multiplied = products.mutable_data_ptr<float>();
  const std::vector<T> border(c.channels, T(0.0f));

  for (int64_t first = 0; first < tiles; first += most) {
    const int64_t count = std::min(most, tiles - first);
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      const T* pixels[36];
      for (int64_t t = begin; t < end; t++) {
        const int64_t tile = first + t, image = tile / (rows * columns), row = tile / columns % rows;
        const int64_t top = 4 * row - 1, left = 4 * (tile % columns) - 1;
        for (int64_t i = 0; i < 36; i++) {
          const int64_t h = top + i / 6, w = left + i % 6;
          const bool inside = h >= 0 && h < c.height && w >= 0 && w < c.width;
          pixels[i] = inside ? x + ((image * c.height + h) * c.width + w) * c.channels : border.data();
        }
        loops.transform_tile(pixels, c.channels, at_points + t * x_row, x_point);
      }
    });
    multiply(Run{count, x_row, x_point, y_row, y_point, at_points, multiplied});
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t tile = first + t, image = tile / (rows * columns), row = tile / columns % rows;
        const int64_t top = 4 * row, left = 4 * (tile % columns);
        const int64_t at = ((image * c.height + top) * c.width + left) * c.out_channels;
        loops.finish_tile(multiplied + t * y_row, y_point, bias, y + at, c.width * c.out_channels, c.out_channels,
                          std::min<int64_t>(4, c.height - top), std::min<int64_t>(4, c.width - left));
      }
    });
  }
}

// The 3x3 kernels of a weight (out, in, 3, 3) of any strides; if `transposed`, those of the gradient.
struct Kernels {
  Kernels(const at::Tensor& weight, bool transposed)
      : first(weight.const_data_ptr<float>()),
        out_step(weight.stride(transposed ? 1 : 0)),
        in_step(weight.stride(transposed ? 0 : 1)) {
    for (int64_t i = 0; i < 9; i++) {
      const int64_t tap = transposed ? 8 - i : i;
      taps[i] = tap / 3 * weight.stride(2) + tap % 3 * weight.stride(3);
    }
  }
  // The kernels of a panel and an input channel, at their 36 points, `point` apart.
  void transform(const Loops<float>& loops, int64_t panel, int64_t in, float* to, int64_t point) const {
    loops.transform_weight(first + panel * loops.panel * out_step + in * in_step, out_step, taps, to, point);
  }
  const float* first;
  int64_t out_step, in_step, taps[9];
};

}  // namespace

int64_t winograd_conv2d_panel() {
  static const int64_t panel = loops<float>().panel;
  return panel;
}

int64_t winograd_conv2d_run() { return kTiles; }

void winograd_conv2d_weight(const at::Tensor& weight, bool transposed, at::Tensor& packed) {
  static const Loops<float> loops = cpu::loops<float>();
  const int64_t panels = packed.size(1), in = packed.size(2), panel = packed.size(3);
  const Kernels kernels(weight, transposed);
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, panels * in, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      kernels.transform(loops, i / in, i % in, to + i * panel, panels * in * panel);
    }
  });
}

void winograd_conv2d(const WinogradConv2d& c, const at::Tensor& x, const at::Tensor& weight, const float* bias,
                     at::Tensor& y) {
  static const Loops<float> loops = cpu::loops<float>();
  const int64_t panels = c.out_channels / loops.panel;
  const float* packed = weight.const_data_ptr<float>();
  const auto multiply = [&](const Run& run) {
    at::parallel_for(0, 36 * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t point = i / panels, at = i % panels * loops.panel;
        loops.multiply_panel(run.tiles, run.points + point * run.x_point, run.x_row,
                             packed + i * c.channels * loops.panel, c.channels, run.products + point * run.y_point + at,
                             run.y_row);
      }
    });
  };
  if (y.scalar_type() == at::kBFloat16) {
    convolve(c, x.const_data_ptr<at::BFloat16>(), bias, y.mutable_data_ptr<at::BFloat16>(), multiply);
  } else {
    convolve(c, x.const_data_ptr<float>(), bias, y.mutable_data_ptr<float>(), multiply);
  }
}

void winograd_conv2d_once(const WinogradConv2d& c, const at::Tensor& x, const at::Tensor& weight, bool transposed,
                          const float* bias, at::Tensor& y) {
  static const Loops<float> loops = cpu::loops<float>();
  const Kernels kernels(weight, transposed);
  const int64_t stride = c.channels * loops.panel + kPad;
  convolve(c, x.const_data_ptr<float>(), bias, y.mutable_data_ptr<float>(), [&](const Run& run) {
    at::parallel_for(0, c.out_channels / loops.panel, 1, [&](int64_t begin, int64_t end) {
      const at::Tensor panel = at::empty({36 * stride}, at::kFloat);
      float* values = panel.mutable_data_ptr<float>();
      for (int64_t i = begin; i < end; i++) {
        for (int64_t in = 0; in < c.channels; in++) {
          kernels.transform(loops, i, in, values + in * loops.panel, stride);
        }
        for (int64_t point = 0; point < 36; point++) {
          loops.multiply_panel(run.tiles, run.points + point * run.x_point, run.x_row, values + point * stride,
                               c.channels, run.products + point * run.y_point + i * loops.panel, run.y_row);
        }
      }
    });
  });
}

}  // namespace gdd_fast::cpu
