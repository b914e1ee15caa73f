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

// What backward needs beside tensors; in one piece, as every entry of a context's map costs as much as a small
// operator.
struct Held : torch::CustomClassHolder {
  std::vector<int64_t> shape;  // of the input
  at::MemoryFormat format = at::MemoryFormat::Contiguous, out_format = at::MemoryFormat::Contiguous;
  Geometry geometry;
  bool has_bias = false;
  Plans plans;  // of the kernels that pack bits, if they are Triton's

  Held(const at::Tensor& x, const Bias& bias, Geometry g, Plans plans = {})
      : shape(x.sizes().vec()),
        format(memory_format(x)),
        geometry(std::move(g)),
        has_bias(bias.has_value()),
        plans(std::move(plans)) {}
};
using Holder = c10::intrusive_ptr<Held>;

void keep(AutogradContext* ctx, const Holder& held) { ctx->saved_data["held"] = c10::IValue::make_capsule(held); }
Holder kept(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Held>(ctx->saved_data["held"].toCapsule());
}

at::Tensor bias_gradient(AutogradContext* ctx, const Held& held, const at::Tensor& dy) {
  return held.has_bias && ctx->needs_input_grad(2) ? dy.sum({0, 2, 3}) : at::Tensor();
}

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, const Holder& held);

struct Convolution : torch::autograd::Function<Convolution> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                            const Holder& held) {
    ctx->save_for_backward({weight});
    keep(ctx, held);
    return convolve(x, weight, bias, held->geometry);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto weight = ctx->get_saved_variables()[0];
    const Holder held = kept(ctx);
    at::Tensor dx;
    if (ctx->needs_input_grad(0)) dx = input_gradient(dys[0], weight, held);
    return {dx, Variable(), bias_gradient(ctx, *held, dys[0]), Variable()};
  }
};

// Linear in dy; its derivative is the convolution again.
struct InputGradient : torch::autograd::Function<InputGradient> {
  static at::Tensor compute(const at::Tensor& dy, const at::Tensor& weight, const Held& held) {
    const Geometry& g = held.geometry;
    // Its values are not read, its strides choose the algorithm.
    const at::Tensor x = at::empty(held.shape, dy.options().memory_format(held.format));
    return std::get<0>(at::convolution_backward(dy, x, weight, at::OptionalIntArrayRef(), pair(g, 0), pair(g, 1),
                                                pair(g, 2), false, {0, 0}, g[6], {true, false, false}));
  }

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& weight, const Holder& held) {
    ctx->save_for_backward({weight});
    keep(ctx, held);
    return compute(dy, weight, *held);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& ddxs) {
    const Holder held = c10::make_intrusive<Held>(ddxs[0], Bias(), kept(ctx)->geometry);
    const at::Tensor ddy = Convolution::apply(ddxs[0], ctx->get_saved_variables()[0], Bias(), held);
    return {ddy, Variable(), Variable()};
  }
};

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, const Holder& held) {
  return at::GradMode::is_enabled() ? InputGradient::apply(dy, weight, held)
                                    : InputGradient::compute(dy, weight, *held);
}

struct ConvolutionRelu : torch::autograd::Function<ConvolutionRelu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                            const Holder& held, double ceiling) {
    at::Tensor y = convolve(x, weight, bias, held->geometry);
    held->out_format = memory_format(y);
    y = y.contiguous(held->out_format);
    ctx->save_for_backward({weight, pack_bits(held->plans, y, ceiling)});
    keep(ctx, held);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list saved = ctx->get_saved_variables();
    const Holder held = kept(ctx);
    const at::Tensor dy = masked(held->plans, dys[0], saved[1], held->out_format);
    at::Tensor dx;
    if (ctx->needs_input_grad(0)) dx = input_gradient(dy, saved[0], held);
    return {dx, Variable(), bias_gradient(ctx, *held, dy), Variable(), Variable()};
  }
};

bool differentiated(const at::Tensor& x, const Bias& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || (bias.has_value() && bias->requires_grad()));
}

at::Tensor frozen_conv2d(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Geometry g = geometry(stride, padding, dilation, groups);
  return differentiated(x, bias) ? Convolution::apply(x, weight, bias, c10::make_intrusive<Held>(x, bias, g))
                                 : convolve(x, weight, bias, g);
}

at::Tensor frozen_conv2d_relu(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double ceiling) {
  const Geometry g = geometry(stride, padding, dilation, groups);
  if (differentiated(x, bias)) {
    return ConvolutionRelu::apply(x, weight, bias, c10::make_intrusive<Held>(x, bias, g), ceiling);
  }
  at::Tensor y = convolve(x, weight, bias, g);
  return std::isinf(ceiling) ? y.relu_() : y.clamp_(0, ceiling);
}

// A convolution that is differentiated, as frozen_conv2d_relu takes it.
at::Tensor planned(const Plans& plans, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups, double ceiling) {
  const Geometry g = geometry(stride, padding, dilation, groups);
  return ConvolutionRelu::apply(x, weight, bias, c10::make_intrusive<Held>(x, bias, g, plans), ceiling);
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
