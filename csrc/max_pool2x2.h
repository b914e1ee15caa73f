// Max pooling over 2x2 windows with one byte per output for backward.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace gdd_fast {

// An input in channels_last memory.
struct PoolSize {
  int64_t images, height, width, channels;
};

std::tuple<at::Tensor, at::Tensor> max_pool2x2(const at::Tensor& x);
at::Tensor max_pool2x2_backward(const at::Tensor& dy, const at::Tensor& places, int64_t height, int64_t width,
                                bool channels_last);

namespace cpu {
void max_pool2x2(const at::Tensor& x, const PoolSize& size, at::Tensor& y, at::Tensor& places);
void max_pool2x2_backward(const at::Tensor& dy, const at::Tensor& places, const PoolSize& size, at::Tensor& dx);
}  // namespace cpu

}  // namespace gdd_fast
