// (N, C, H, W) tensors as kernels see them: images of channels of evenly spaced pixels.
#pragma once
#include <ATen/core/Tensor.h>

namespace gdd_fast {

// The memory format of results made from x (N, C, H, W), as in gdd_fast/ops/_memory_format.py: channels_last if its
// channels are innermost, also for slices of channels_last tensors.
inline at::MemoryFormat memory_format(const at::Tensor& x) {
  const bool innermost = x.stride(1) == 1 && !(x.stride(2) == 1 && x.stride(3) == 1);
  return innermost ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

struct ImageStrides {
  int64_t images, channels, pixels;  // sizes N, C, H * W
  int64_t image, channel, pixel;     // steps in elements
};

// Whether an image's pixels, row after row, are equally spaced, as in contiguous and channels_last memory.
inline bool evenly_spaced(const at::Tensor& x) {
  return x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.size(3) * x.stride(3);
}

inline ImageStrides image_strides(const at::Tensor& x) {
  const int64_t pixel = x.size(3) > 1 ? x.stride(3) : x.stride(2);
  return {x.size(0), x.size(1), x.size(2) * x.size(3), x.stride(0), x.stride(1), pixel};
}

}  // namespace gdd_fast
