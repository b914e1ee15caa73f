// Packs and reads the bits of relu_bits.h, and has the gradient that uses them.
#pragma once
#include <ATen/core/Tensor.h>

#include "launch_plan.h"

namespace gdd_fast {

// Clamps dense y to [0, ceiling] in place -> its bits. By Triton kernels if there are plans; these also add a bias
// (channels) if it is defined. Otherwise by the CPU's, which take no bias.
at::Tensor pack_bits(const Plans& plans, at::Tensor& y, double ceiling, const at::Tensor& bias);

// The same without bits; Triton kernels only.
void clamp_(const Plans& plans, at::Tensor& y, double ceiling, const at::Tensor& bias);

// dy in `format`, zero where its bit is 1; differentiable any number of times.
at::Tensor masked(const Plans& plans, const at::Tensor& dy, const at::Tensor& bits, at::MemoryFormat format);

}  // namespace gdd_fast
