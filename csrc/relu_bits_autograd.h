// Who packs and reads the bits of relu_bits.h, and the gradient that reads them.
#pragma once
#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "launch_plan.h"

namespace gdd_fast {

// Triton's kernels by `plans`, or the CPU's where there are none.
struct BitPacker {
  Plans plans;
  std::string backend;

  // Clamps dense y to [0, ceiling] in place -> its bits. False from `ready`: not by these plans.
  bool ready(const at::Tensor& y, double ceiling) const;
  at::Tensor pack(at::Tensor& y, double ceiling) const;
  at::Tensor mask(const at::Tensor& dy, const at::Tensor& bits) const;

  void keep(torch::autograd::AutogradContext* ctx) const;
  static BitPacker kept(torch::autograd::AutogradContext* ctx);
};

// dy in `format`, zero where the bits say so; differentiable any number of times.
at::Tensor masked(const at::Tensor& dy, const at::Tensor& bits, at::MemoryFormat format, const BitPacker& packer);

}  // namespace gdd_fast
