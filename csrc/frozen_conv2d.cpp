// gdd_fast_C::frozen_conv2d and frozen_conv2d_relu: the autograd of gdd_fast/ops/frozen_conv2d.py and
// frozen_conv2d_relu.py in C++. The numbers are the library's convolution and its backward, in both alike. What is
// gained is what surrounds them: autograd through Python costs 0.1 ms a layer and step, as much as a small depthwise
// convolution. planned_frozen_conv2d_relu is the same with the bits packed by Triton's kernels.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "binders.h"
#include "relu_bits_autograd.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Of a convolution all but the tensors: stride, padding and dilation, two numbers each, and groups.
using Geometry = std::vector<int64_t>;
using Bias = std::optional<at::Tensor>;

at::IntArrayRef pair(const Geometry& g, int64_t which) { return at::IntArrayRef(g).slice(2 * which, 2); }

Geometry geometry(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return {stride.front(), stride.back(), padding.front(), padding.back(), dilation.front(), dilation.back(), groups};
}

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g) {
  return at::convolution(x, weight, bias, pair(g, 0), pair(g, 1), pair(g, 2), false, {0, 0}, g[6]);
}

at::Tensor bias_gradient(AutogradContext* ctx, const at::Tensor& dy) {
  return ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2) ? dy.sum({0, 2, 3}) : at::Tensor();
}

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                          at::MemoryFormat format, const Geometry& g);

struct Convolution : torch::autograd::Function<Convolution> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                            const Geometry& g) {
    ctx->save_for_backward({weight});
    ctx->saved_data["shape"] = x.sizes();
    ctx->saved_data["format"] = memory_format(x);
    ctx->saved_data["geometry"] = g;
    ctx->saved_data["has_bias"] = bias.has_value();
    return convolve(x, weight, bias, g);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto weight = ctx->get_saved_variables()[0];
    at::Tensor dx;
    if (ctx->needs_input_grad(0)) {
      dx = input_gradient(dys[0], weight, ctx->saved_data["shape"].toIntVector(),
                          ctx->saved_data["format"].toMemoryFormat(), ctx->saved_data["geometry"].toIntVector());
    }
    return {dx, Variable(), bias_gradient(ctx, dys[0]), Variable()};
  }
};

// Linear in dy; its derivative is the convolution again.
struct InputGradient : torch::autograd::Function<InputGradient> {
  static at::Tensor compute(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                            at::MemoryFormat format, const Geometry& g) {
    // Its values are not read, its strides choose the algorithm.
    const at::Tensor x = at::empty(shape, dy.options().memory_format(format));
    return std::get<0>(at::convolution_backward(dy, x, weight, at::OptionalIntArrayRef(), pair(g, 0), pair(g, 1),
                                                pair(g, 2), false, {0, 0}, g[6], {true, false, false}));
  }

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                            at::MemoryFormat format, const Geometry& g) {
    ctx->save_for_backward({weight});
    ctx->saved_data["geometry"] = g;
    return compute(dy, weight, shape, format, g);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& ddxs) {
    const Geometry g = ctx->saved_data["geometry"].toIntVector();
    const at::Tensor ddy = Convolution::apply(ddxs[0], ctx->get_saved_variables()[0], Bias(), g);
    return {ddy, Variable(), Variable(), Variable(), Variable()};
  }
};

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef shape,
                          at::MemoryFormat format, const Geometry& g) {
  return at::GradMode::is_enabled() ? InputGradient::apply(dy, weight, shape, format, g)
                                    : InputGradient::compute(dy, weight, shape, format, g);
}

struct ConvolutionRelu : torch::autograd::Function<ConvolutionRelu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                            const Geometry& g, double ceiling, const BitPacker& packer) {
    at::Tensor y = convolve(x, weight, bias, g);
    const at::MemoryFormat out_format = memory_format(y);
    y = y.contiguous(out_format);
    ctx->save_for_backward({weight, packer.pack(y, ceiling)});
    packer.keep(ctx);
    ctx->saved_data["shape"] = x.sizes();
    ctx->saved_data["format"] = memory_format(x);
    ctx->saved_data["out_format"] = out_format;
    ctx->saved_data["geometry"] = g;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list saved = ctx->get_saved_variables();
    const auto out_format = ctx->saved_data["out_format"].toMemoryFormat();
    const at::Tensor dy = masked(dys[0], saved[1], out_format, BitPacker::kept(ctx));
    at::Tensor dx;
    if (ctx->needs_input_grad(0)) {
      dx = input_gradient(dy, saved[0], ctx->saved_data["shape"].toIntVector(),
                          ctx->saved_data["format"].toMemoryFormat(), ctx->saved_data["geometry"].toIntVector());
    }
    return {dx, Variable(), bias_gradient(ctx, dy), Variable(), Variable(), Variable()};
  }
};

bool differentiated(const at::Tensor& x, const Bias& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || (bias.has_value() && bias->requires_grad()));
}

at::Tensor frozen_conv2d(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Geometry g = geometry(stride, padding, dilation, groups);
  return differentiated(x, bias) ? Convolution::apply(x, weight, bias, g) : convolve(x, weight, bias, g);
}

at::Tensor frozen_conv2d_relu(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double ceiling) {
  const Geometry g = geometry(stride, padding, dilation, groups);
  if (differentiated(x, bias)) return ConvolutionRelu::apply(x, weight, bias, g, ceiling, BitPacker());
  at::Tensor y = convolve(x, weight, bias, g);
  return std::isinf(ceiling) ? y.relu_() : y.clamp_(0, ceiling);
}

// A convolution that is differentiated, as frozen_conv2d_relu takes it.
at::Tensor planned(const Plans& plans, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups, double ceiling, const std::string& backend) {
  const Geometry g = geometry(stride, padding, dilation, groups);
  return ConvolutionRelu::apply(x, weight, bias, g, ceiling, BitPacker{plans, backend});
}

}  // namespace

static const Bind bind_planned([](pybind11::module_& m) { m.def("planned_frozen_conv2d_relu", &planned); });

}  // namespace gdd_fast

TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) {
  m.def(
      "frozen_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups) -> Tensor",
      &gdd_fast::frozen_conv2d);
  m.def(
      "frozen_conv2d_relu(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, float ceiling) -> Tensor",
      &gdd_fast::frozen_conv2d_relu);
}
