// Convolutions of constant weights, and the gradients of their inputs: the library's, or what is faster on a CPU.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace gdd_fast {

// Of a convolution all but the tensors: stride, padding and dilation, two numbers each, and groups.
using Geometry = std::vector<int64_t>;
using Bias = std::optional<at::Tensor>;

// x (N, C, H, W), weight (K, C / groups, R, S) and bias (K) of one dtype -> (N, K, H', W'); strides are the library's.
// Nothing is recorded by autograd where a method of ours computes.
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g);

// The gradient of an input of `shape` and `format`.
at::Tensor convolve_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                             at::MemoryFormat format, const Geometry& g);

}  // namespace gdd_fast
