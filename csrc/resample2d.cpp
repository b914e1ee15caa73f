// gdd_fast_C::resample2d: checks, the output, dispatch. The definition is resample2d_ref in gdd_fast/ops/resample2d.py.
#include <ATen/ops/empty.h>

#include "resample2d_launchers.h"

namespace gdd_fast {

namespace {

void check_filter(const at::Tensor& kernel) {
  TORCH_CHECK_VALUE(
      kernel.dim() == 4 && kernel.size(2) == kernel.size(3) && kernel.numel() == kernel.size(2) * kernel.size(3) &&
          kernel.size(2) >= 2 && kernel.size(2) % 2 == 0 && kernel.is_floating_point(),
      "resample2d: the filter must be floating and (1, 1, K, K) with K even, not of shape ", kernel.sizes());
}

}  // namespace

bool resample2d_takes(const at::Tensor& kernel) {
  check_filter(kernel);
  return GDD_FAST_CPU::resample2d_takes(kernel);
}

at::Tensor resample2d(const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add, bool up,
                      int64_t padding, int64_t out_height, int64_t out_width, double gain, double scale,
                      bool channels_last) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_floating_point(), "resample2d: x must be floating (N, C, H, W)");
  check_filter(kernel);
  const int64_t taps = kernel.size(2);
  TORCH_CHECK_VALUE(padding >= 0 && padding < taps, "resample2d: the padding must be less than K");
  for (const auto& [in, out] : {std::pair(x.size(2), out_height), std::pair(x.size(3), out_width)}) {
    const int64_t down = ((in + 2 * padding - taps) >> 1) + 1;  // a division that rounds down, below zero too
    const int64_t expected = up ? 2 * (in - 1) + taps - 2 * padding : down;
    TORCH_CHECK_VALUE(out >= 0 && (out == expected || (up && out == expected + 1)), "resample2d: ", in,
                      " pixels do not become ", out);
  }
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor y = at::empty({x.size(0), x.size(1), out_height, out_width}, x.options().memory_format(format));
  if (add.has_value()) {
    TORCH_CHECK_VALUE(add->sizes() == y.sizes() && add->scalar_type() == x.scalar_type() && add->is_contiguous(format),
                      "resample2d: what is added must be dense, of the shape, type and memory format of the result");
  }
  if (y.numel() == 0) return y;
  const int64_t dense = channels_last ? 1 : 3;
  TORCH_CHECK_VALUE(x.size(dense) == 1 || x.stride(dense) == 1, "resample2d: dimension ", dense,
                    " of x must have stride 1; strides are ", x.strides());
  const Resample r{x.size(0),
                   x.size(1),
                   x.size(2),
                   x.size(3),
                   out_height,
                   out_width,
                   x.stride(0),
                   x.stride(1),
                   x.stride(2),
                   x.stride(3),
                   static_cast<int>(taps),
                   static_cast<int>(padding),
                   up,
                   channels_last,
                   gain,
                   scale};
  GDD_FAST_LAUNCH(x, resample2d(r, x, kernel, add, y));
  return y;
}

}  // namespace gdd_fast

GDD_FAST_OPERATOR(resample2d,
                  "(Tensor x, Tensor kernel, Tensor? add, bool up, int padding, int out_height, int out_width, "
                  "float gain, float scale, bool channels_last) -> Tensor")
GDD_FAST_CPU_OPERATOR(resample2d_takes, "(Tensor kernel) -> bool")  // whether the CPU launcher takes this filter
