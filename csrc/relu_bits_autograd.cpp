// The autograd of gdd_fast/ops/relu_bits.py in C++, around Triton's kernels or the extension's, and what
// frozen_conv2d.cpp needs of it.
#include "relu_bits_autograd.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binders.h"
#include "relu_bits.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

const std::string kTriton = "triton";

// The plans and memory format of the gradient.
struct Flat : torch::CustomClassHolder {
  Plans plans;
  at::MemoryFormat format;
  Flat(Plans plans, at::MemoryFormat format) : plans(std::move(plans)), format(format) {}
};

c10::intrusive_ptr<Flat> kept(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Flat>(ctx->saved_data["of"].toCapsule());
}

at::Tensor mask(const Plans& plans, const at::Tensor& dy, const at::Tensor& bits) {
  if (!plans) return mask_bits(dy, bits);
  const at::Tensor inputs[] = {dy, bits};
  const Plan plan = plans->find(Direction::kBackward, kTriton, inputs, {});
  TORCH_INTERNAL_ASSERT(plan != nullptr);
  return (*plan)(inputs)[0];
}

// Clamps y in place and returns what the kernel does: its bits, if they are kept.
std::vector<at::Tensor> clamped(const Plans& plans, const at::Tensor& y, double ceiling, const at::Tensor& bias,
                                bool bits) {
  const at::Tensor inputs[] = {y, bias.defined() ? bias.contiguous() : bias};
  const Plan plan = plans->find(Direction::kForward, kTriton, inputs, {ceiling, bits ? 1.0 : 0.0});
  TORCH_INTERNAL_ASSERT(plan != nullptr);
  return (*plan)(inputs);
}

// Linear in dy and its own derivative.
struct Masked : torch::autograd::Function<Masked> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& bits,
                            const c10::intrusive_ptr<Flat>& of) {
    ctx->save_for_backward({bits});
    ctx->saved_data["of"] = c10::IValue::make_capsule(of);
    return mask(of->plans, dy.contiguous(of->format), bits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& ddys) {
    const auto of = kept(ctx);
    return {masked(of->plans, ddys[0], ctx->get_saved_variables()[0], of->format), Variable(), Variable()};
  }
};

struct Relu : torch::autograd::Function<Relu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double ceiling, bool inplace,
                            const c10::intrusive_ptr<Flat>& of) {
    at::Tensor y = x;
    if (inplace) {
      ctx->mark_dirty({y});
    } else {
      y = at::empty_like(x).copy_(x);
    }
    ctx->save_for_backward({pack_bits(of->plans, y, ceiling, at::Tensor())});
    ctx->saved_data["of"] = c10::IValue::make_capsule(of);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto of = kept(ctx);
    const at::Tensor dx = masked(of->plans, dys[0], ctx->get_saved_variables()[0], of->format);
    return {dx, Variable(), Variable(), Variable()};
  }
};

// Nothing if the call is not for this function. x is dense; without plans the extension's CPU kernels run.
std::optional<at::Tensor> planned(const Plans& plans, const at::Tensor& x, double ceiling, bool inplace) {
  if (!unobserved(x)) return std::nullopt;
  return Relu::apply(x, ceiling, inplace, c10::make_intrusive<Flat>(plans, memory_format(x)));
}

}  // namespace

at::Tensor pack_bits(const Plans& plans, at::Tensor& y, double ceiling, const at::Tensor& bias) {
  if (plans) return clamped(plans, y, ceiling, bias, true)[0];
  TORCH_INTERNAL_ASSERT(!bias.defined());
  return relu_bits_(y, ceiling);
}

void clamp_(const Plans& plans, at::Tensor& y, double ceiling, const at::Tensor& bias) {
  clamped(plans, y, ceiling, bias, false);
}

at::Tensor masked(const Plans& plans, const at::Tensor& dy, const at::Tensor& bits, at::MemoryFormat format) {
  return at::GradMode::is_enabled() ? Masked::apply(dy, bits, c10::make_intrusive<Flat>(plans, format))
                                    : mask(plans, dy.contiguous(format), bits);
}

static const Bind bind_planned([](pybind11::module_& m) {
  m.def("planned_relu_bits", &planned, pybind11::call_guard<pybind11::gil_scoped_release>());
});

}  // namespace gdd_fast
