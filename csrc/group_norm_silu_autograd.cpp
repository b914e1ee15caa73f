// The checks and the autograd of gdd_fast/ops/group_norm_silu in C++: cpu_group_norm_silu around the CPU's kernels,
// with autograd for channels_last maps, and planned_group_norm_silu around Triton's. In Python autograd costs 0.15 ms
// per layer and step, and checks cost 15 us per call: more than a small map takes.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <vector>

#include "binders.h"
#include "group_norm_silu.h"
#include "launch_plan.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// The differentiable tensors, in this order everywhere; absent ones are undefined.
enum { kX, kSkip, kWeight, kBias, kAdd, kScale, kShift, kInputs };

Optional optional(const at::Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
at::Tensor plain(const Optional& t) { return t.value_or(at::Tensor()); }

// As the CPU's kernels read them: maps of contiguous channels (or pixels) and evenly spaced pixels; float32 rows.
at::Tensor laid_out(const at::Tensor& x, bool channels_last = true) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto fits = [&] { return (channels_last ? x.stride(1) : image_strides(x).pixel) == 1; };
  return !x.defined() || (evenly_spaced(x) && fits()) ? x : x.contiguous(format);
}

at::Tensor row(const at::Tensor& t) {
  if (!t.defined()) return t;
  const at::Tensor wide = t.to(at::kFloat);
  return wide.stride(-1) == 1 ? wide : wide.contiguous();
}

// As Triton kernels read them.
at::Tensor spaced(const at::Tensor& x) { return !x.defined() || evenly_spaced(x) ? x : x.contiguous(memory_format(x)); }
at::Tensor rows_side_by_side(const at::Tensor& t) { return !t.defined() || t.stride(-1) == 1 ? t : t.contiguous(); }

// The arguments of a call besides the differentiable tensors.
struct Call {
  int64_t groups;
  double eps;
  bool silu;
  // for Triton kernels; without them the CPU's run. `forward` is the plan of this call
  Plans plans;
  Plan forward;
  std::string backend;
  at::Tensor x_statistics, skip_statistics;
};

// y, mean and rstd
std::array<at::Tensor, 3> forward_pass(const variable_list& t, const Call& call) {
  if (call.forward) {
    std::vector<at::Tensor> made = (*call.forward)({t[kX], t[kSkip], t[kWeight], t[kBias], t[kAdd], t[kScale],
                                                    t[kShift], call.x_statistics, call.skip_statistics});
    return {made[0], made[1], made[2]};
  }
  const auto [y, mean, rstd] = group_norm_silu(laid_out(t[kX]), optional(laid_out(t[kSkip])), call.groups,
                                               row(t[kWeight]), row(t[kBias]), call.eps, optional(row(t[kAdd])),
                                               optional(row(t[kScale])), optional(row(t[kShift])), call.silu, true);
  return {y, mean, rstd};
}

// The gradients that are needed; those of the parameters per image.
variable_list backward_pass(const at::Tensor& dy, const variable_list& t, const at::Tensor& mean,
                            const at::Tensor& rstd, const std::vector<int>& needed, bool silu, LaunchPlans* plans,
                            const std::string& backend) {
  variable_list gradients(kInputs);
  if (plans != nullptr) {
    int bits = 0;
    for (const int i : needed) bits |= 1 << i;
    const at::Tensor inputs[] = {spaced(dy), t[kX],     t[kSkip],  t[kWeight], t[kBias],
                                 t[kAdd],    t[kScale], t[kShift], mean,       rstd};
    const Plan plan = plans->find(Direction::kBackward, backend, inputs, {double(silu), double(bits)});
    TORCH_INTERNAL_ASSERT(plan != nullptr);
    std::vector<at::Tensor> made = (*plan)(inputs);
    for (size_t i = 0; i < needed.size(); i++) gradients[needed[i]] = std::move(made[i]);
    return gradients;
  }
  auto [dx, dskip, by_image] = group_norm_silu_backward(
      laid_out(dy), laid_out(t[kX]), optional(laid_out(t[kSkip])), row(t[kWeight]), row(t[kBias]),
      optional(row(t[kAdd])), optional(row(t[kScale])), optional(row(t[kShift])), mean, rstd, silu);
  for (const int i : needed) gradients[i] = i == kX ? dx : i == kSkip ? dskip : by_image[i - kWeight];
  return gradients;
}

// group_norm_silu_ref, for second derivatives.
at::Tensor definition(const variable_list& inputs, int64_t groups, double eps, bool silu) {
  const auto wide = [&](int which) { return inputs[which].to(at::kFloat); };
  const auto spread = [&](int which) { return wide(which).unsqueeze(2).unsqueeze(3); };
  at::Tensor y = inputs[kSkip].defined() ? at::cat({inputs[kX], inputs[kSkip]}, 1) : inputs[kX];
  y = y.to(at::kFloat);
  if (inputs[kAdd].defined()) y = y + spread(kAdd);
  y = at::group_norm(y, groups, wide(kWeight), wide(kBias), eps);
  if (inputs[kScale].defined()) y = y * (spread(kScale) + 1);
  if (inputs[kShift].defined()) y = y + spread(kShift);
  if (silu) y = at::silu(y);
  return y.to(inputs[kX].scalar_type());
}

struct GroupNormSiluFunction : torch::autograd::Function<GroupNormSiluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Optional& skip, const at::Tensor& weight,
                            const at::Tensor& bias, const Optional& add, const Optional& scale, const Optional& shift,
                            const Call& call) {
    const variable_list inputs = {x, plain(skip), weight, bias, plain(add), plain(scale), plain(shift)};
    const auto [y, mean, rstd] = forward_pass(inputs, call);
    ctx->save_for_backward({x, plain(skip), weight, bias, plain(add), plain(scale), plain(shift), mean, rstd});
    ctx->saved_data["groups"] = call.groups;
    ctx->saved_data["eps"] = call.eps;
    ctx->saved_data["silu"] = call.silu;
    if (call.plans) {
      ctx->saved_data["plans"] = c10::IValue::make_capsule(call.plans);
      ctx->saved_data["backend"] = call.backend;
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients(kInputs + 1);
    std::vector<int> needed;
    for (int i = 0, edge = 0; i < kInputs; i++) {  // absent tensors have no edge
      if (saved[i].defined() && ctx->needs_input_grad(edge++)) needed.push_back(i);
    }
    if (needed.empty() || !dys[0].defined()) return gradients;
    const bool silu = ctx->saved_data["silu"].toBool();
    if (at::GradMode::is_enabled()) {
      // Gradients that will be differentiated again: by the definition. Fresh views make gradients stop here even if
      // one input was computed from another.
      variable_list inputs(kInputs), wanted;
      for (int i = 0; i < kInputs; i++) {
        if (saved[i].defined()) inputs[i] = saved[i].view_as(saved[i]);
      }
      for (const int i : needed) wanted.push_back(inputs[i]);
      const at::Tensor y =
          definition(inputs, ctx->saved_data["groups"].toInt(), ctx->saved_data["eps"].toDouble(), silu);
      const variable_list found = torch::autograd::grad({y}, wanted, {dys[0]}, std::nullopt, true);
      for (size_t i = 0; i < needed.size(); i++) gradients[needed[i]] = found[i];
      return gradients;
    }
    Plans plans;
    std::string backend;
    if (const auto kept = ctx->saved_data.find("plans"); kept != ctx->saved_data.end()) {
      plans = c10::static_intrusive_pointer_cast<LaunchPlans>(kept->second.toCapsule());
      backend = ctx->saved_data["backend"].toStringRef();
    }
    const variable_list given(saved.begin(), saved.begin() + kInputs);
    const variable_list made =
        backward_pass(dys[0], given, saved[kInputs], saved[kInputs + 1], needed, silu, plans.get(), backend);
    for (const int i : needed) {
      at::Tensor gradient = made[i];
      if (i > kSkip) {
        if (gradient.sizes() != saved[i].sizes()) gradient = gradient.sum({0}, saved[i].dim() == 2);
        gradient = gradient.to(saved[i].scalar_type());
      }
      gradients[i] = gradient;
    }
    return gradients;
  }
};

// The operator by a plan; nothing if Triton kernels should not run, or the call is not for this function.
Optional planned(const Plans& plans, const at::Tensor& x, const Optional& skip, int64_t groups,
                 const at::Tensor& weight, const at::Tensor& bias, double eps, const Optional& add,
                 const Optional& scale, const Optional& shift, bool silu, const Optional& x_statistics,
                 const Optional& skip_statistics, const std::string& backend) {
  at::Tensor given[] = {x,
                        plain(skip),
                        weight,
                        bias,
                        plain(add),
                        plain(scale),
                        plain(shift),
                        plain(x_statistics),
                        plain(skip_statistics)};
  if (x.dim() != 4 || (given[kSkip].defined() && given[kSkip].dim() != 4) || !unobserved(given)) return std::nullopt;
  for (int i = kX; i <= kSkip; i++) given[i] = spaced(given[i]);
  for (int i = kWeight; i <= kShift; i++) {
    if (given[i].defined() && given[i].dim() == 0) return std::nullopt;
    given[i] = rows_side_by_side(given[i]);
  }
  for (int i = kInputs; i < kInputs + 2; i++) {
    if (given[i].defined()) given[i] = given[i].contiguous();
  }
  Plan plan = plans->find(Direction::kForward, backend, given, {double(groups), eps, double(silu)});
  if (!plan) return std::nullopt;
  Call call{groups, eps, silu, plans, std::move(plan), backend, given[kInputs], given[kInputs + 1]};
  if (!wants_gradient({given, given + kInputs})) {
    return forward_pass({given, given + kInputs}, call)[0];
  }
  return GroupNormSiluFunction::apply(given[kX], optional(given[kSkip]), given[kWeight], given[kBias],
                                      optional(given[kAdd]), optional(given[kScale]), optional(given[kShift]), call);
}

// The operator on a CPU in one call from Python; nothing if the checks there might fail, or for what the kernels do not
// support: the gradient of contiguous maps, forward-mode derivatives, tensor subclasses.
Optional on_cpu(const at::Tensor& x, const Optional& skip, int64_t groups, const at::Tensor& weight,
                const at::Tensor& bias, double eps, const Optional& add, const Optional& scale, const Optional& shift,
                bool silu) {
  const at::Tensor given[] = {x, plain(skip), weight, bias, plain(add), plain(scale), plain(shift)};
  if (x.dim() != 4 || x.numel() == 0 || x.scalar_type() == at::kDouble || !unobserved(given)) return std::nullopt;
  int64_t channels = x.size(1);
  bool recorded = false;
  if (skip.has_value()) {
    const auto same = [&](int64_t d) { return skip->size(d) == x.size(d); };
    if (skip->dim() != 4 || !same(0) || !same(2) || !same(3) || skip->scalar_type() != x.scalar_type()) {
      return std::nullopt;
    }
    channels += skip->size(1);
  }
  if (groups < 1 || channels % groups != 0) return std::nullopt;
  for (int i = 0; i < kInputs; i++) {
    const at::Tensor& t = given[i];
    if (!t.defined()) continue;
    const auto type = t.scalar_type();
    const bool floating = type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
    if (!t.is_cpu() || !floating || t._fw_grad(0).defined()) return std::nullopt;
    if (i == kWeight || i == kBias) {
      if (t.dim() != 1 || t.size(0) != channels) return std::nullopt;
    } else if (i >= kAdd) {
      if (t.dim() != 2 || t.size(1) != channels || (t.size(0) != 1 && t.size(0) != x.size(0))) return std::nullopt;
    }
    recorded = recorded || t.requires_grad();
  }
  const bool channels_last = memory_format(x) == at::MemoryFormat::ChannelsLast;
  if (recorded && at::GradMode::is_enabled()) {
    if (!channels_last) return std::nullopt;
    const Call call{.groups = groups, .eps = eps, .silu = silu};
    return GroupNormSiluFunction::apply(x, skip, weight, bias, add, scale, shift, call);
  }
  return group_norm_silu_inference(laid_out(x, channels_last), optional(laid_out(given[kSkip], channels_last)), groups,
                                   row(weight), row(bias), eps, optional(row(given[kAdd])),
                                   optional(row(given[kScale])), optional(row(given[kShift])), silu, channels_last);
}

}  // namespace

static const Bind bind_calls([](pybind11::module_& m) {
  m.def("planned_group_norm_silu", &planned);
  m.def("cpu_group_norm_silu", &on_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
});

}  // namespace gdd_fast
