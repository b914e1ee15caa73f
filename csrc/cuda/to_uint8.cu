// Launches to_uint8.cuh for a torch tensor, on its device and torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/to_uint8.cuh"
#include "strides.h"
#include "to_uint8.h"

namespace gdd_fast::cuda {
namespace {

template <typename T>
cudaError_t launch(const at::Tensor& x, at::Tensor& y) {
  const ImageStrides s = image_strides(x);
  return launch_to_uint8(static_cast<const T*>(x.const_data_ptr()), static_cast<uint8_t*>(y.mutable_data_ptr()),
                         s.images, s.channels, s.pixels, s.image, s.channel, s.pixel,
                         c10::cuda::getCurrentCUDAStream());
}

}  // namespace

void to_uint8(const at::Tensor& x, at::Tensor& y) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto launch_for_dtype = [&] {
    switch (x.scalar_type()) {
      case at::kFloat:
        return launch<float>(x, y);
      case at::kDouble:
        return launch<double>(x, y);
      case at::kHalf:
        return launch<__half>(x, y);
      case at::kBFloat16:
        return launch<__nv_bfloat16>(x, y);
      default:
        TORCH_CHECK_VALUE(false, "to_uint8: x must be float32, bfloat16, float16 or float64, not ", x.scalar_type());
    }
  };
  C10_CUDA_CHECK(launch_for_dtype());
}

}  // namespace gdd_fast::cuda
