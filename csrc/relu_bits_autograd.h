// Who packs and reads the bits of relu_bits.h, and the gradient that reads them.
#pragma once
#include <ATen/core/Tensor.h>

#include "launch_plan.h"

namespace gdd_fast {

// Clamps dense y to [0, ceiling] in place -> its bits. By Triton's kernels if there are plans of them, which add a bias
// (channels) on the way if it is defined, else by the CPU's, without one.
at::Tensor pack_bits(const Plans& plans, at::Tensor& y, double ceiling, const at::Tensor& bias);

// The same without bits, by Triton's kernels alone.
void clamp_(const Plans& plans, at::Tensor& y, double ceiling, const at::Tensor& bias);

// dy in `format`, zero where the bits say so; differentiable any number of times.
at::Tensor masked(const Plans& plans, const at::Tensor& dy, const at::Tensor& bits, at::MemoryFormat format);

}  // namespace gdd_fast
