// Convolutions with constant weights, and their input gradients: the library's, or whatever is faster on a CPU.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace gdd_fast {

// A convolution's arguments except tensors: stride, padding and dilation, two numbers each, and groups.
using Geometry = std::vector<int64_t>;
using Bias = std::optional<at::Tensor>;

// x (N, C, H, W), weight (K, C / groups, R, S) and bias (K) of one dtype -> (N, K, H', W'); strides are the library's.
// Autograd records nothing if one of our methods computes.
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g);

// The gradient of an input of `shape` and `format`.
at::Tensor convolve_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                             at::MemoryFormat format, const Geometry& g);

}  // namespace gdd_fast
