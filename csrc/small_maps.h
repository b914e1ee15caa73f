// Operators for small maps of a folded network, for CPUs: at 16x16 pixels or fewer a call of the library's convolution,
// attention or resampling takes several times as long as its arithmetic. All maps are dense channels_last, float32 or
// bfloat16, and sums are in float32.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace gdd_fast {

// The sizes of a panel convolution: the first map's pixels, its window (1 or 3) and zero padding, and the channels of
// each map; the other maps have the result's pixels.
struct PanelConv2d {
  int64_t images, height, width, size, padding;
  std::vector<int64_t> channels;
  int64_t out_channels, panel;
};

struct SmallResample2d {
  int64_t images, channels, height, width, out_height, out_width, taps, padding;
  bool up;
  float gain, scale;
};

struct SmallAttention {
  int64_t images, tokens, heads, head_dim;
};

namespace cpu {
// Output channels that are computed together, 0 if this processor has no such kernel; `narrow`: for few channels.
int64_t panel_width(bool narrow);
// y = bias + scale * add + the convolution of the first map + the 1x1 convolutions of the others. The weight is
// (panels, depth, panel), its depth the first map's window in order, channels innermost, then the other maps' channels.
void panel_conv2d(const PanelConv2d& c, const std::vector<at::Tensor>& maps, const at::Tensor& weight,
                  const float* bias, const std::optional<at::Tensor>& add, float scale, at::Tensor& y);
void small_resample2d(const SmallResample2d& r, const at::Tensor& x, const float* kernel,
                      const std::optional<at::Tensor>& add, at::Tensor& y);
// For queries, keys and values in blocks.
void small_attention(const SmallAttention& a, const at::Tensor& qkv, at::Tensor& y);
}  // namespace cpu

}  // namespace gdd_fast
