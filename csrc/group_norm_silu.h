// Group normalisation with an offset before it, scale and shift after it, and SiLU, of one map or two concatenated.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace gdd_fast {

// All strides in elements. Channels are innermost (channel == 1), or pixels are (pixel == 1).
struct NormMap {
  at::Tensor map;
  int64_t channels, image, channel, pixel;
};

// Rows (N, C) or (1, C) of float32; `stride` is 0 for one row, `data` null for none.
struct NormRows {
  const float* data = nullptr;
  int64_t stride = 0;
};

struct GroupNormSilu {
  int64_t images, channels, pixels, groups;
  double eps;
  bool silu, channels_last;
  const float *weight, *bias;
  NormRows add, scale, shift;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu(
    const at::Tensor& x, const std::optional<at::Tensor>& skip, int64_t groups, const at::Tensor& weight,
    const at::Tensor& bias, double eps, const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, bool silu, bool channels_last);

// Only y, without gradients; the statistics are (N, groups), or null if not wanted.
at::Tensor group_norm_silu_inference(const at::Tensor& x, const std::optional<at::Tensor>& skip, int64_t groups,
                                     const at::Tensor& weight, const at::Tensor& bias, double eps,
                                     const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
                                     const std::optional<at::Tensor>& shift, bool silu, bool channels_last,
                                     float* mean = nullptr, float* rstd = nullptr);

// The gradients of x and of skip (with no channels if there is none), and five float32 (N, C): those of weight, bias,
// add, scale and shift, each per image. Only for channels_last maps; dy may be a slice.
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> group_norm_silu_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& skip, const at::Tensor& weight,
    const at::Tensor& bias, const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, const at::Tensor& mean, const at::Tensor& rstd, bool silu);

namespace cpu {
// skip.channels is 0 if there is none. y is dense; mean and rstd are (N, groups), or null if not wanted.
void group_norm_silu(const GroupNormSilu& g, const NormMap& x, const NormMap& skip, at::Tensor& y, float* mean,
                     float* rstd);
void group_norm_silu_backward(const GroupNormSilu& g, const NormMap& dy, const NormMap& x, const NormMap& skip,
                              const at::Tensor& mean, const at::Tensor& rstd, at::Tensor& dx, at::Tensor& dskip,
                              const std::vector<at::Tensor>& rows);
}  // namespace cpu

}  // namespace gdd_fast
