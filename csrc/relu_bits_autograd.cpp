// The autograd of gdd_fast/ops/relu_bits.py around Triton's kernels, in C++, and what frozen_conv2d.cpp needs of it.
#include "relu_bits_autograd.h"

#include <ATen/ops/empty_like.h>

#include <optional>

#include "binders.h"
#include "relu_bits.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Its own derivative.
struct Masked : torch::autograd::Function<Masked> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& bits,
                            at::MemoryFormat format, const BitPacker& packer) {
    ctx->save_for_backward({bits});
    ctx->saved_data["format"] = format;
    packer.keep(ctx);
    return packer.mask(dy.contiguous(format), bits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& ddys) {
    const auto format = ctx->saved_data["format"].toMemoryFormat();
    const at::Tensor ddy = masked(ddys[0], ctx->get_saved_variables()[0], format, BitPacker::kept(ctx));
    return {ddy, Variable(), Variable(), Variable()};
  }
};

struct Relu : torch::autograd::Function<Relu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double ceiling, bool inplace,
                            const BitPacker& packer) {
    at::Tensor y = x;
    if (inplace) {
      ctx->mark_dirty({y});
    } else {
      y = at::empty_like(x).copy_(x);
    }
    ctx->save_for_backward({packer.pack(y, ceiling)});
    ctx->saved_data["format"] = memory_format(x);
    packer.keep(ctx);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto format = ctx->saved_data["format"].toMemoryFormat();
    const at::Tensor dx = masked(dys[0], ctx->get_saved_variables()[0], format, BitPacker::kept(ctx));
    return {dx, Variable(), Variable(), Variable()};
  }
};

// Nothing where the operator is not Triton's, or the call is another's to make. x is dense.
std::optional<at::Tensor> planned(const Plans& plans, const at::Tensor& x, double ceiling, bool inplace,
                                  const std::string& backend) {
  const BitPacker packer{plans, backend};
  if (!unobserved(x) || !packer.ready(x, ceiling)) return std::nullopt;
  return Relu::apply(x, ceiling, inplace, packer);
}

}  // namespace

bool BitPacker::ready(const at::Tensor& y, double ceiling) const {
  return plans->find(Direction::kForward, backend, y, {ceiling}) != nullptr;
}

at::Tensor BitPacker::pack(at::Tensor& y, double ceiling) const {
  if (!plans) return relu_bits_(y, ceiling);
  const Plan plan = plans->find(Direction::kForward, backend, y, {ceiling});
  TORCH_INTERNAL_ASSERT(plan != nullptr);
  return (*plan)(y)[0];
}

at::Tensor BitPacker::mask(const at::Tensor& dy, const at::Tensor& bits) const {
  if (!plans) return mask_bits(dy, bits);
  const at::Tensor inputs[] = {dy, bits};
  const Plan plan = plans->find(Direction::kBackward, backend, inputs, {});
  TORCH_INTERNAL_ASSERT(plan != nullptr);
  return (*plan)(inputs)[0];
}

void BitPacker::keep(AutogradContext* ctx) const {
  if (!plans) return;
  ctx->saved_data["plans"] = c10::IValue::make_capsule(plans);
  ctx->saved_data["backend"] = backend;
}

BitPacker BitPacker::kept(AutogradContext* ctx) {
  const auto plans = ctx->saved_data.find("plans");
  if (plans == ctx->saved_data.end()) return {};
  return {c10::static_intrusive_pointer_cast<LaunchPlans>(plans->second.toCapsule()),
          ctx->saved_data["backend"].toStringRef()};
}

at::Tensor masked(const at::Tensor& dy, const at::Tensor& bits, at::MemoryFormat format, const BitPacker& packer) {
  return at::GradMode::is_enabled() ? Masked::apply(dy, bits, format, packer)
                                    : packer.mask(dy.contiguous(format), bits);
}

static const Bind bind_planned([](pybind11::module_& m) { m.def("planned_relu_bits", &planned); });

}  // namespace gdd_fast
