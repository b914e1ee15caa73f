// Launches resample2d.cuh for a torch tensor, on its device and torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "cuda/resample2d.cuh"
#include "resample2d_launchers.h"

namespace gdd_fast::cuda {

bool resample2d_takes(const at::Tensor&) { return true; }

void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y) {
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(std::max(r.height * r.width, r.out_height * r.out_width) * r.channels < int64_t{1} << 31,
                    "resample2d: images of 2^31 numbers and more are too large: use backend='torch'");
  const at::Tensor filter =
      kernel.to(x.device(), x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  const auto launch = [&]<typename T>() {
    return launch_resample2d(static_cast<const T*>(x.const_data_ptr()), filter.const_data_ptr<Real<T>>(),
                             add.has_value() ? static_cast<const T*>(add->const_data_ptr()) : nullptr,
                             static_cast<T*>(y.mutable_data_ptr()), r, c10::cuda::getCurrentCUDAStream());
  };
  const auto launch_for_dtype = [&] {
    switch (x.scalar_type()) {
      case at::kFloat:
        return launch.operator()<float>();
      case at::kDouble:
        return launch.operator()<double>();
      case at::kHalf:
        return launch.operator()<__half>();
      case at::kBFloat16:
        return launch.operator()<__nv_bfloat16>();
      default:
        TORCH_CHECK_VALUE(false, "resample2d: x must be float32, bfloat16, float16 or float64, not ", x.scalar_type());
    }
  };
  C10_CUDA_CHECK(launch_for_dtype());
}

}  // namespace gdd_fast::cuda
