// Images in [-1, 1] to bytes.
#pragma once
#include "devices.h"

namespace gdd_fast {

GDD_FAST_LAUNCHERS(void to_uint8(const at::Tensor& x, at::Tensor& y);)

}  // namespace gdd_fast
