// Launches discriminator_input.cuh for torch tensors, on their device and torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/discriminator_input.cuh"
#include "discriminator_input_launchers.h"

namespace gdd_fast::cuda {
namespace {

// function(a value of the type); ops check that there is no other.
template <typename Function>
cudaError_t dispatch(at::ScalarType dtype, Function&& function) {
  switch (dtype) {
    case at::kBFloat16:
      return function(__nv_bfloat16());
    case at::kHalf:
      return function(__half());
    default:
      return function(float());
  }
}

}  // namespace

void discriminator_input(const DiscriminatorInput& d, const at::Tensor& x, std::vector<at::Tensor>& ys) {
  const c10::cuda::CUDAGuard guard(x.device());
  C10_CUDA_CHECK(dispatch(x.scalar_type(), [&]<typename X>(X) {
    return dispatch(ys[0].scalar_type(), [&]<typename Y>(Y) {
      Pointers<Y> out{};
      for (int b = 0; b < d.backbones; b++) out.at[b] = static_cast<Y*>(ys[b].mutable_data_ptr());
      return launch_discriminator_input(static_cast<const X*>(x.const_data_ptr()), out, d,
                                        c10::cuda::getCurrentCUDAStream());
    });
  }));
}

void discriminator_input_backward(const DiscriminatorInput& d, at::TensorList dys, at::Tensor& dx) {
  const c10::cuda::CUDAGuard guard(dx.device());
  C10_CUDA_CHECK(dispatch(dys[0].scalar_type(), [&]<typename Y>(Y) {
    return dispatch(dx.scalar_type(), [&]<typename X>(X) {
      Pointers<const Y> in{};
      for (int b = 0; b < d.backbones; b++) in.at[b] = static_cast<const Y*>(dys[b].const_data_ptr());
      return launch_discriminator_input_backward(in, static_cast<X*>(dx.mutable_data_ptr()), d,
                                                 c10::cuda::getCurrentCUDAStream());
    });
  }));
}

}  // namespace gdd_fast::cuda
