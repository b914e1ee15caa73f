// gdd_fast_C::max_pool2x2 and its backward: checks, the outputs, the schemas. Their definitions are in
// gdd_fast/ops/max_pool2x2.py.
#include "max_pool2x2.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "devices.h"
#include "strides.h"

namespace gdd_fast {
namespace {

// A contiguous tensor counts as a channels_last one with one channel and N * C images.
PoolSize pool_size(const at::Tensor& x, at::MemoryFormat format, int64_t height, int64_t width) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  return {last ? x.size(0) : x.size(0) * x.size(1), height, width, last ? x.size(1) : 1};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> max_pool2x2(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_floating_point(), "max_pool2x2: x must be floating (N, C, H, W)");
  const at::MemoryFormat format = memory_format(x);
  TORCH_CHECK_VALUE(x.is_contiguous(format), "max_pool2x2: x must be dense; strides are ", x.strides());
  at::Tensor y = at::empty({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x.options().memory_format(format));
  at::Tensor places = at::empty_like(y, y.options().dtype(at::kByte));
  if (y.numel() != 0) cpu::max_pool2x2(x, pool_size(x, format, x.size(2), x.size(3)), y, places);
  return {y, places};
}

at::Tensor max_pool2x2_backward(const at::Tensor& dy, const at::Tensor& places, int64_t height, int64_t width,
                                bool channels_last) {
  TORCH_CHECK_VALUE(dy.dim() == 4 && dy.sizes() == places.sizes() && places.scalar_type() == at::kByte,
                    "max_pool2x2_backward: dy and places must be (N, C, H / 2, W / 2), places of bytes");
  TORCH_CHECK_VALUE(height / 2 == dy.size(2) && width / 2 == dy.size(3), "max_pool2x2_backward: ", height, "x", width,
                    " does not pool to ", dy.sizes());
  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  TORCH_CHECK_VALUE(places.is_contiguous(format) && dy.is_contiguous(format),
                    "max_pool2x2_backward: dy and places must be dense and alike");
  at::Tensor dx = at::empty({dy.size(0), dy.size(1), height, width}, dy.options().memory_format(format));
  if (height % 2 != 0 || width % 2 != 0) dx.zero_();  // the row and column outside all windows
  if (dy.numel() != 0) cpu::max_pool2x2_backward(dy, places, pool_size(dx, format, height, width), dx);
  return dx;
}

}  // namespace gdd_fast

GDD_FAST_CPU_OPERATOR(max_pool2x2, "(Tensor x) -> (Tensor, Tensor)")
GDD_FAST_CPU_OPERATOR(max_pool2x2_backward,
                      "(Tensor dy, Tensor places, int height, int width, bool channels_last) -> Tensor")
