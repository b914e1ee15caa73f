// One bit per element that says whether a ReLU is flat there.
#pragma once
#include <ATen/core/Tensor.h>

namespace gdd_fast {

at::Tensor relu_bits_(at::Tensor& y, double ceiling);
at::Tensor mask_bits(const at::Tensor& dy, const at::Tensor& bits);

namespace cpu {
void relu_bits_(at::Tensor& y, double ceiling, at::Tensor& bits);
void mask_bits(const at::Tensor& dy, const at::Tensor& bits, at::Tensor& dx);
}  // namespace cpu

}  // namespace gdd_fast
