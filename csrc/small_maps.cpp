// gdd_fast_C::panel_conv2d, small_resample2d and small_attention: checks, the output. Their definitions are in
// gdd_fast/ops/small_maps.py.
#include "small_maps.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "devices.h"

namespace gdd_fast {
namespace {

using Maybe = std::optional<at::Tensor>;

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

void check_map(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
                    "maps must be float32 or bfloat16 (N, C, H, W), not ", x.scalar_type(), " ", x.sizes());
}

at::Tensor made(const at::Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return at::empty({like.size(0), channels, height, width}, like.options().memory_format(kFormat));
}

// `add`, checked against the result and made dense.
Maybe added(const Maybe& add, const at::Tensor& y) {
  if (!add.has_value()) return add;
  TORCH_CHECK_VALUE(add->sizes() == y.sizes() && add->scalar_type() == y.scalar_type(), "what is added must be ",
                    y.scalar_type(), " ", y.sizes(), " like the result, not ", add->scalar_type(), " ", add->sizes());
  return add->contiguous(kFormat);
}

}  // namespace

at::Tensor panel_conv2d(const at::Tensor& x, const Maybe& first, const Maybe& second, const at::Tensor& weight,
                        const at::Tensor& bias, int64_t size, int64_t padding, const Maybe& add, double scale) {
  check_map(x);
  TORCH_CHECK_VALUE(bias.dim() == 1 && (size == 1 || size == 3) && padding >= 0 && padding < 3,
                    "panel_conv2d: the window is 1 or 3 wide, with a border of less than 3, and the bias (out,)");
  PanelConv2d c{x.size(0), x.size(2), x.size(3), size, padding, {}, bias.size(0), weight.size(-1)};
  const int64_t height = c.height + 2 * padding - size + 1, width = c.width + 2 * padding - size + 1;
  TORCH_CHECK_VALUE(height > 0 && width > 0, "panel_conv2d: ", x.sizes(), " is smaller than the window");
  std::vector<at::Tensor> maps;
  int64_t depth = x.size(1) * (size * size - 1);
  for (const Maybe& map : {Maybe(x), first, second}) {
    if (!map.has_value()) continue;
    const at::Tensor& m = *map;
    check_map(m);
    TORCH_CHECK_VALUE(m.scalar_type() == x.scalar_type() && m.size(0) == c.images &&
                          (maps.empty() || (m.size(2) == height && m.size(3) == width)),
                      "panel_conv2d: maps must match in all but channels");
    maps.push_back(m.contiguous(kFormat));
    c.channels.push_back(m.size(1));
    depth += m.size(1);
  }
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.scalar_type() == at::kFloat && weight.is_contiguous() &&
                        weight.size(1) == depth && c.panel > 0 &&
                        (c.panel == cpu::panel_width(false) || c.panel == cpu::panel_width(true)) &&
                        weight.size(0) == (c.out_channels + c.panel - 1) / c.panel &&
                        bias.scalar_type() == at::kFloat && bias.is_contiguous(),
                    "panel_conv2d: the weight or bias is not from panel_weight for these maps on this processor");
  at::Tensor y = made(x, c.out_channels, height, width);
  if (y.numel() == 0) return y;
  cpu::panel_conv2d(c, maps, weight, bias.const_data_ptr<float>(), added(add, y), float(scale), y);
  return y;
}

at::Tensor small_resample2d(const at::Tensor& x, const at::Tensor& kernel, const Maybe& add, bool up, int64_t padding,
                            double scale) {
  check_map(x);
  const int64_t taps = kernel.size(-1);
  TORCH_CHECK_VALUE(kernel.numel() == taps * taps && taps >= 2 && taps % 2 == 0 && padding >= 0 && padding < taps &&
                        kernel.scalar_type() == at::kFloat && kernel.is_contiguous(),
                    "small_resample2d: the filter must be float32 (1, 1, K, K), K even, with a padding below K");
  const auto size = [&](int64_t in) {
    return up ? 2 * (in - 1) + taps - 2 * padding : (in + 2 * padding - taps) / 2 + 1;
  };
  const int64_t height = size(x.size(2)), width = size(x.size(3));
  const int64_t least = up ? 1 : taps - 2 * padding;
  TORCH_CHECK_VALUE(x.size(2) >= least && x.size(3) >= least && height > 0 && width > 0,
                    "small_resample2d: ", x.sizes(), " is smaller than the filter");
  at::Tensor y = made(x, x.size(1), height, width);
  if (y.numel() == 0) return y;
  const SmallResample2d r{x.size(0), x.size(1), x.size(2), x.size(3),      height,      width,
                          taps,      padding,   up,        up ? 4.f : 1.f, float(scale)};
  cpu::small_resample2d(r, x.contiguous(kFormat), kernel.const_data_ptr<float>(), added(add, y), y);
  return y;
}

at::Tensor small_attention(const at::Tensor& qkv, int64_t heads) {
  check_map(qkv);
  TORCH_CHECK_VALUE(heads > 0 && qkv.size(1) > 0 && qkv.size(1) % (3 * heads) == 0 && cpu::panel_width(false) > 0,
                    "small_attention: ", qkv.size(1), " channels are not queries, keys and values of ", heads,
                    " heads");
  at::Tensor y = made(qkv, qkv.size(1) / 3, qkv.size(2), qkv.size(3));
  if (y.numel() == 0) return y;
  const SmallAttention a{qkv.size(0), qkv.size(2) * qkv.size(3), heads, qkv.size(1) / (3 * heads)};
  cpu::small_attention(a, qkv.contiguous(kFormat), y);
  return y;
}

int64_t panel_width(bool narrow) { return cpu::panel_width(narrow); }

}  // namespace gdd_fast

TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) { m.def("panel_width(bool narrow) -> int", &gdd_fast::panel_width); }
GDD_FAST_CPU_OPERATOR(panel_conv2d,
                      "(Tensor x, Tensor? first, Tensor? second, Tensor weight, Tensor bias, int size, "
                      "int padding, Tensor? add, float scale) -> Tensor")
GDD_FAST_CPU_OPERATOR(small_resample2d,
                      "(Tensor x, Tensor kernel, Tensor? add, bool up, int padding, float scale) -> Tensor")
GDD_FAST_CPU_OPERATOR(small_attention, "(Tensor qkv, int heads) -> Tensor")
