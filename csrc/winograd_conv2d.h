// 3x3 convolutions with padding 1 by Winograd's method: 36 products for 16 pixels instead of 144.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace gdd_fast {

struct WinogradConv2d {
  int64_t images, height, width, channels, out_channels;
};

int64_t winograd_conv2d_panel();
// With `transposed`, the weight of the input's gradient, which is a convolution of dy: in and out exchanged, rows and
// columns reversed.
at::Tensor winograd_conv2d_weight(const at::Tensor& weight, bool transposed);
at::Tensor winograd_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
// The same for float32 x and a float32 weight (out, in, 3, 3) that is used only once.
at::Tensor winograd_conv2d_once(const at::Tensor& x, const at::Tensor& weight, bool transposed,
                                const std::optional<at::Tensor>& bias);
// Whether winograd_conv2d_once transforms the whole weight first: for many tiles, or fewer panels than threads.
bool winograd_conv2d_packs(const at::Tensor& x, int64_t out_channels);

namespace cpu {
// The number of tiles of 4x4 pixels that go through all steps together.
int64_t winograd_conv2d_run();
// Output channels that are computed together, 0 if this processor has no such kernel.
int64_t winograd_conv2d_panel();
// `weight` float32 (out, in, 3, 3), of any strides -> `packed` float32 (36, out / panel, in, panel).
void winograd_conv2d_weight(const at::Tensor& weight, bool transposed, at::Tensor& packed);
// x and y are dense channels_last of one dtype.
void winograd_conv2d(const WinogradConv2d& c, const at::Tensor& x, const at::Tensor& weight, const float* bias,
                     at::Tensor& y);
// Each panel of the weight is transformed right before its products, and the whole never is in memory: otherwise 36
// values for every nine are written, read and paged in. With several runs of tiles it is transformed for each.
void winograd_conv2d_once(const WinogradConv2d& c, const at::Tensor& x, const at::Tensor& weight, bool transposed,
                          const float* bias, at::Tensor& y);
}  // namespace cpu

}  // namespace gdd_fast
