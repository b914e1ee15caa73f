// Who packs and reads the bits of relu_bits.h, and the gradient that reads them.
#pragma once
#include <ATen/core/Tensor.h>

#include "launch_plan.h"

namespace gdd_fast {

// Clamps dense y to [0, ceiling] in place -> its bits; and dy, zero where its bit is 1. By Triton's kernels if there
// are plans of them, else by the CPU's.
at::Tensor pack_bits(const Plans& plans, at::Tensor& y, double ceiling);

// dy in `format`, zero where the bits say so; differentiable any number of times.
at::Tensor masked(const Plans& plans, const at::Tensor& dy, const at::Tensor& bits, at::MemoryFormat format);

}  // namespace gdd_fast
