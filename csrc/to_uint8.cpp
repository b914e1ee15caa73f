// gdd_fast_C::to_uint8: checks, the output, dispatch. The definition is to_uint8_ref in gdd_fast/ops/to_uint8.py.
#include "to_uint8.h"

#include <ATen/ops/empty.h>

#include "strides.h"

namespace gdd_fast {

at::Tensor to_uint8(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "to_uint8: x must be (N, C, H, W), not of shape ", x.sizes());
  TORCH_CHECK_VALUE(x.is_floating_point(), "to_uint8: x must be floating, not ", x.scalar_type());
  TORCH_CHECK_VALUE(evenly_spaced(x), "to_uint8: the pixels of x must be evenly spaced; strides are ", x.strides());
  at::Tensor y = at::empty({x.size(0), x.size(2), x.size(3), x.size(1)}, x.options().dtype(at::kByte));
  if (y.numel() == 0) return y;
  GDD_FAST_LAUNCH(x, to_uint8(x, y));
  return y;
}

}  // namespace gdd_fast

GDD_FAST_OPERATOR(to_uint8, "(Tensor x) -> Tensor")
