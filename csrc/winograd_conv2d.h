// 3x3 convolutions with a border of one pixel by Winograd's method: 36 products for 16 pixels in place of 144.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace gdd_fast {

struct WinogradConv2d {
  int64_t images, height, width, channels, out_channels;
};

int64_t winograd_conv2d_panel();
// With `transposed` that of the input's gradient, which is a convolution of dy: in and out exchanged, rows and columns
// reversed.
at::Tensor winograd_conv2d_weight(const at::Tensor& weight, bool transposed);
at::Tensor winograd_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

namespace cpu {
// Output channels that are computed together, 0 where this processor has no such kernel.
int64_t winograd_conv2d_panel();
// `weight` float32 (out, in, 3, 3), of any strides -> `packed` float32 (36, out / panel, in, panel).
void winograd_conv2d_weight(const at::Tensor& weight, bool transposed, at::Tensor& packed);
// x and y dense channels_last of one type.
void winograd_conv2d(const WinogradConv2d& c, const at::Tensor& x, const at::Tensor& weight, const float* bias,
                     at::Tensor& y);
}  // namespace cpu

}  // namespace gdd_fast
