// Chooses what computes a convolution with a constant weight. On a CPU the library reorders the weight in every call,
// which for small maps takes as long as the products; and 3x3 convolutions have Winograd's method. Nothing made from a
// weight outlives the call: see `converted` in gdd_fast/ops/frozen_conv2d.py. The limits are from the times in
// docs/cpu_operators.md.
#include "constant_convolution.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "launch_plan.h"
#include "strides.h"
#include "winograd_conv2d.h"

namespace gdd_fast {
namespace {

constexpr int64_t kMostPixels = 1024;  // for a 1x1 convolution to be a plain matrix product
constexpr int64_t kLeastPixels = 192;  // for a 3x3 convolution to pay for transforming its weight
constexpr double kLeastSaving = 1.3;   // a 3x3 convolution's products, relative to Winograd's
// From this size on, glibc maps a transformed weight in every call, and page faults take ten times as long as the
// transformation: 512 to 512 channels, transformed as a whole, gain only from 1024 pixels on.
constexpr int64_t kMapped = 32 << 20, kLeastPixelsMapped = 1536;

enum class Method { kLibrary, kProduct, kWinograd };

// Whether Winograd's method, whose tiles reach over the edge, saves enough products per pair of channels over the
// definition, which skips zeros of the padding: they take 36 and 1 for maps of 1x1, 36 and 16 for 2x2.
bool saves_products(int64_t height, int64_t width) {
  const int64_t tiles = ((height + 3) / 4) * ((width + 3) / 4);
  return double((3 * height - 2) * (3 * width - 2)) >= kLeastSaving * double(36 * tiles);
}

// For maps `x` of the input's size and layout, or the output's gradient (`backward`), whose spatial size is the same.
Method method(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, at::MemoryFormat format,
              const Geometry& g, bool backward) {
  const auto float32 = [](const at::Tensor& t) { return t.is_cpu() && t.scalar_type() == at::kFloat; };
  const auto dual = [](const at::Tensor& t) { return t._fw_grad(0).defined(); };  // has a forward-mode derivative
  const bool unit = g[0] == 1 && g[1] == 1 && g[4] == 1 && g[5] == 1 && g[6] == 1;
  if (!unit || x.dim() != 4 || weight.dim() != 4 || !float32(x) || !float32(weight) ||
      (bias.has_value() && (!float32(*bias) || bias->dim() != 1 || bias->size(0) != weight.size(0))) ||
      x.numel() == 0 || weight.numel() == 0 || x.size(1) != weight.size(backward ? 0 : 1) ||
      !unobserved({x, weight, bias.value_or(at::Tensor())}) || dual(x) || dual(weight) ||
      (bias.has_value() && dual(*bias))) {
    return Method::kLibrary;
  }
  const auto window = [&](int64_t size, int64_t border) {
    return weight.size(2) == size && weight.size(3) == size && g[2] == border && g[3] == border;
  };
  if (window(1, 0)) {
    const int64_t map = x.size(2) * x.size(3);  // a map of one pixel is in both formats
    const bool in_rows = format == at::MemoryFormat::ChannelsLast || map == 1;
    return in_rows && x.size(0) * map <= kMostPixels ? Method::kProduct : Method::kLibrary;
  }
  const int64_t panel = winograd_conv2d_panel();
  const int64_t in = weight.size(backward ? 0 : 1), out = weight.size(backward ? 1 : 0);
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  const bool fits =
      window(3, 1) && panel > 0 && in % 16 == 0 && out % panel == 0 && saves_products(x.size(2), x.size(3));
  const bool mapped = fits && 36 * in * out * 4 >= kMapped && winograd_conv2d_packs(x, out);
  const bool pays = pixels >= (mapped ? kLeastPixelsMapped : kLeastPixels);
  return fits && pays ? Method::kWinograd : Method::kLibrary;
}

at::IntArrayRef pair(const Geometry& g, int64_t which) { return at::IntArrayRef(g).slice(2 * which, 2); }

// x (N, C, H, W) as (N * H * W, C), and back.
at::Tensor rows(const at::Tensor& x) {
  return x.contiguous(at::MemoryFormat::ChannelsLast).permute({0, 2, 3, 1}).reshape({-1, x.size(1)});
}
at::Tensor map(const at::Tensor& rows, const at::Tensor& like, at::MemoryFormat format) {
  if (format != at::MemoryFormat::ChannelsLast) return rows.view({like.size(0), rows.size(1), 1, 1});
  return rows.view({like.size(0), like.size(2), like.size(3), rows.size(1)}).permute({0, 3, 1, 2});
}

}  // namespace

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g) {
  const auto format = x.dim() == 4 ? memory_format(x) : at::MemoryFormat::Contiguous;
  switch (method(x, weight, bias, format, g, false)) {
    case Method::kProduct: {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;  // for autograd the result is not a view
      const at::Tensor w = weight.flatten(1).t(), from = rows(x);
      return map(bias.has_value() ? at::addmm(*bias, from, w) : at::mm(from, w), x, format);
    }
    case Method::kWinograd:
      return winograd_conv2d_once(x, weight, false, bias.has_value() ? Bias(bias->contiguous()) : bias)
          .contiguous(format);
    default:
      return at::convolution(x, weight, bias, pair(g, 0), pair(g, 1), pair(g, 2), false, {0, 0}, g[6]);
  }
}

at::Tensor convolve_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                             at::MemoryFormat format, const Geometry& g) {
  switch (method(dy, weight, Bias(), format, g, true)) {
    case Method::kProduct:
      return map(at::mm(rows(dy), weight.flatten(1)), dy, format);
    case Method::kWinograd:
      return winograd_conv2d_once(dy, weight, true, Bias()).contiguous(format);
    default:
      break;
  }
  // Its values are not read; its strides choose the algorithm.
  const at::Tensor x = at::empty(shape, dy.options().memory_format(format));
  return std::get<0>(at::convolution_backward(dy, x, weight, at::OptionalIntArrayRef(), pair(g, 0), pair(g, 1),
                                              pair(g, 2), false, {0, 0}, g[6], {true, false, false}));
}

}  // namespace gdd_fast
