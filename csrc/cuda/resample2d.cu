// gdd_fast_C::resample2d: checks, the output, and the launch of resample2d.cuh on the current stream of its device.
// The definition is resample2d_ref in gdd_fast/ops/resample2d.py.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "cuda/resample2d.cuh"

namespace gdd_fast::cuda {
namespace {

void run(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
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

at::Tensor resample2d(const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add, bool up,
                      int64_t padding, int64_t out_height, int64_t out_width, double gain, double scale,
                      bool channels_last) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_floating_point(), "resample2d: x must be floating (N, C, H, W)");
  TORCH_CHECK_VALUE(
      kernel.dim() == 4 && kernel.size(2) == kernel.size(3) && kernel.numel() == kernel.size(2) * kernel.size(3) &&
          kernel.size(2) >= 2 && kernel.size(2) % 2 == 0 && kernel.is_floating_point(),
      "resample2d: the filter must be floating and (1, 1, K, K) with K even, not of shape ", kernel.sizes());
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
  run(r, x, kernel, add, y);
  return y;
}

}  // namespace
}  // namespace gdd_fast::cuda

TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) {
  m.def(
      "resample2d(Tensor x, Tensor kernel, Tensor? add, bool up, int padding, int out_height, int out_width, "
      "float gain, float scale, bool channels_last) -> Tensor",
      torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, &gdd_fast::cuda::resample2d));
}
