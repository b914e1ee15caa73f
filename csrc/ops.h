// The C++ operators: `op` checks its arguments and dispatches on the device to cpu::op or cuda::op.
#pragma once
#include <ATen/core/Tensor.h>

namespace gdd_fast {

at::Tensor to_uint8(const at::Tensor& x);

namespace cpu {
void to_uint8(const at::Tensor& x, at::Tensor& y);
}

#ifdef GDD_FAST_WITH_CUDA
namespace cuda {
void to_uint8(const at::Tensor& x, at::Tensor& y);
}
#endif

}  // namespace gdd_fast
