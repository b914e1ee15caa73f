// The autograd of gdd_fast/ops/residual.py around Triton's kernel, in C++.
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>

#include "binders.h"
#include "launch_plan.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Residual : torch::autograd::Function<Residual> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& skip,
                               const std::optional<at::Tensor>& bias, double scale, const Plan& plan) {
    ctx->saved_data["scale"] = scale;
    if (bias.has_value()) ctx->saved_data["bias"] = bias->scalar_type();
    ctx->set_materialize_grads(false);
    const variable_list made = (*plan)({h, skip, bias.value_or(at::Tensor())});
    ctx->mark_non_differentiable({made[1]});
    return made;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    variable_list gradients(5);
    if (!dys[0].defined()) return gradients;
    const double scale = ctx->saved_data["scale"].toDouble();
    const at::Tensor dx = scale == 1 ? dys[0] : dys[0] * scale;
    for (int i = 0; i < 2; i++) {
      if (ctx->needs_input_grad(i)) gradients[i] = dx;
    }
    if (const auto bias = ctx->saved_data.find("bias"); bias != ctx->saved_data.end() && ctx->needs_input_grad(2)) {
      gradients[2] = dx.sum({0, 2, 3}, false, bias->second.toScalarType());
    }
    return gradients;
  }
};

// y, and its statistics or an empty tensor; nothing if Triton kernels should not run, or the call is not for this.
std::optional<std::pair<at::Tensor, at::Tensor>> planned(const Plans& plans, const at::Tensor& h,
                                                         const at::Tensor& skip, const std::optional<at::Tensor>& bias,
                                                         double scale, bool statistics, const std::string& backend) {
  at::Tensor given[] = {h, skip, bias.value_or(at::Tensor())};
  if (h.dim() != 4 || skip.dim() != 4 || !unobserved(given)) return std::nullopt;
  for (int i = 0; i < 2; i++) {
    if (!evenly_spaced(given[i])) given[i] = given[i].contiguous(memory_format(given[i]));
  }
  if (given[2].defined()) given[2] = given[2].contiguous();
  const Plan plan = plans->find(Direction::kForward, backend, given, {scale, double(statistics)});
  if (!plan) return std::nullopt;
  const auto made =
      wants_gradient(given)
          ? Residual::apply(given[0], given[1], bias.has_value() ? std::optional(given[2]) : std::nullopt, scale, plan)
          : (*plan)(given);
  return std::pair(made[0], made[1]);
}

}  // namespace

static const Bind bind_planned([](pybind11::module_& m) { m.def("planned_residual", &planned); });

}  // namespace gdd_fast
