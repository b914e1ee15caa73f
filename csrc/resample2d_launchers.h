// resample2d and its launchers; resample2d.h is what the CUDA kernel sees of them.
#pragma once
#include <optional>

#include "devices.h"
#include "resample2d.h"

namespace gdd_fast {

at::Tensor resample2d(const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add, bool up,
                      int64_t padding, int64_t out_height, int64_t out_width, double gain, double scale,
                      bool channels_last);

GDD_FAST_LAUNCHERS(bool resample2d_takes(const at::Tensor& kernel);
                   void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel,
                                   const std::optional<at::Tensor>& add, at::Tensor& y);)

}  // namespace gdd_fast
