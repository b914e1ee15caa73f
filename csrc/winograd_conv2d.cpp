// gdd_fast_C::winograd_conv2d: checks, the output. The definition is winograd_conv2d_ref in
// gdd_fast/ops/winograd_conv2d.py.
#include "winograd_conv2d.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "devices.h"

namespace gdd_fast {

int64_t winograd_conv2d_panel() { return cpu::winograd_conv2d_panel(); }

at::Tensor winograd_conv2d_weight(const at::Tensor& weight, bool transposed) {
  const int64_t panel = winograd_conv2d_panel();
  TORCH_CHECK_NOT_IMPLEMENTED(panel > 0, "winograd_conv2d: this processor has neither AVX2 nor AVX-512");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                    "winograd_conv2d: the weight must be (out, in, 3, 3), not ", weight.sizes());
  const int64_t out = weight.size(transposed ? 1 : 0), in = weight.size(transposed ? 0 : 1);
  TORCH_CHECK_VALUE(out > 0 && out % panel == 0 && in > 0 && in % 16 == 0,
                    "winograd_conv2d: out must be a multiple of ", panel, " and in of 16, not ", out, " and ", in);
  at::Tensor packed = at::empty({36, out / panel, in, panel}, weight.options().dtype(at::kFloat));
  cpu::winograd_conv2d_weight(weight.to(at::kFloat), transposed, packed);
  return packed;
}

at::Tensor winograd_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t panel = winograd_conv2d_panel();
  TORCH_CHECK_VALUE(panel > 0 && weight.dim() == 4 && weight.size(0) == 36 && weight.size(3) == panel &&
                        weight.scalar_type() == at::kFloat && weight.is_contiguous(),
                    "winograd_conv2d: the weight was not made by winograd_conv2d_weight on this processor");
  TORCH_CHECK_VALUE((x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) && x.dim() == 4 &&
                        x.size(1) == weight.size(2),
                    "winograd_conv2d: x must be float32 or bfloat16 (N, ", weight.size(2), ", H, W), not ",
                    x.scalar_type(), " ", x.sizes());
  const WinogradConv2d c{x.size(0), x.size(2), x.size(3), x.size(1), weight.size(1) * panel};
  const auto format = at::MemoryFormat::ChannelsLast;
  at::Tensor y = at::empty({c.images, c.out_channels, c.height, c.width}, x.options().memory_format(format));
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->scalar_type() == at::kFloat && bias->dim() == 1 &&
                                          bias->size(0) == c.out_channels && bias->is_contiguous()),
                    "winograd_conv2d: the bias must be float32 (", c.out_channels, ")");
  if (y.numel() == 0) return y;
  cpu::winograd_conv2d(c, x.contiguous(format), weight, bias.has_value() ? bias->const_data_ptr<float>() : nullptr, y);
  return y;
}

bool winograd_conv2d_packs(const at::Tensor& x, int64_t out) {
  const int64_t tiles = x.size(0) * ((x.size(2) + 3) / 4) * ((x.size(3) + 3) / 4);
  return tiles > cpu::winograd_conv2d_run() || out / winograd_conv2d_panel() < at::get_num_threads();
}

at::Tensor winograd_conv2d_once(const at::Tensor& x, const at::Tensor& weight, bool transposed,
                                const std::optional<at::Tensor>& bias) {
  const WinogradConv2d c{x.size(0), x.size(2), x.size(3), x.size(1), weight.size(transposed ? 1 : 0)};
  if (winograd_conv2d_packs(x, c.out_channels)) {
    return winograd_conv2d(x, winograd_conv2d_weight(weight, transposed), bias);
  }
  const auto format = at::MemoryFormat::ChannelsLast;
  at::Tensor y = at::empty({c.images, c.out_channels, c.height, c.width}, x.options().memory_format(format));
  cpu::winograd_conv2d_once(c, x.contiguous(format), weight, transposed,
                            bias.has_value() ? bias->const_data_ptr<float>() : nullptr, y);
  return y;
}

}  // namespace gdd_fast

TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) { m.def("winograd_conv2d_panel() -> int", &gdd_fast::winograd_conv2d_panel); }
GDD_FAST_CPU_OPERATOR(winograd_conv2d_weight, "(Tensor weight, bool transposed=False) -> Tensor")
GDD_FAST_CPU_OPERATOR(winograd_conv2d, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
