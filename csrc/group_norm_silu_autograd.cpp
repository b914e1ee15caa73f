// gdd_fast_C::group_norm_silu_differentiable: the autograd of gdd_fast/ops/group_norm_silu.py in C++, for channels_last
// maps. In Python it costs 0.15 ms a layer and step, more than a small map takes.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "group_norm_silu.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// Of the tensors that gradients are taken of, in this order everywhere; absent ones are undefined.
enum { kX, kSkip, kWeight, kBias, kAdd, kScale, kShift, kInputs };

Optional optional(const at::Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
at::Tensor plain(const Optional& t) { return t.value_or(at::Tensor()); }

// As the kernels take it: channels side by side and pixels evenly spaced; float32.
at::Tensor laid_out(const at::Tensor& x) {
  return !x.defined() || (evenly_spaced(x) && x.stride(1) == 1) ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor row(const at::Tensor& t) {
  if (!t.defined()) return t;
  const at::Tensor wide = t.to(at::kFloat);
  return wide.stride(-1) == 1 ? wide : wide.contiguous();
}

// group_norm_silu_ref, to be differentiated.
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
                            int64_t groups, double eps, bool silu) {
    const auto [y, mean, rstd] = group_norm_silu(laid_out(x), optional(laid_out(plain(skip))), groups, row(weight),
                                                 row(bias), eps, optional(row(plain(add))), optional(row(plain(scale))),
                                                 optional(row(plain(shift))), silu, true);
    ctx->save_for_backward({x, plain(skip), weight, bias, plain(add), plain(scale), plain(shift), mean, rstd});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["silu"] = silu;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients(kInputs + 3);
    std::vector<int> needed;
    for (int i = 0, edge = 0; i < kInputs; i++) {  // absent tensors have no edge
      if (saved[i].defined() && ctx->needs_input_grad(edge++)) needed.push_back(i);
    }
    if (needed.empty()) return gradients;
    const bool silu = ctx->saved_data["silu"].toBool();
    if (at::GradMode::is_enabled()) {
      // Differentiable themselves: through the definition, of fresh views, so that a gradient stops here even where one
      // input was computed from another.
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
    auto [dx, dskip, by_image] = group_norm_silu_backward(
        laid_out(dys[0]), laid_out(saved[kX]), optional(laid_out(saved[kSkip])), row(saved[kWeight]), row(saved[kBias]),
        optional(row(saved[kAdd])), optional(row(saved[kScale])), optional(row(saved[kShift])), saved[kInputs],
        saved[kInputs + 1], silu);
    for (const int i : needed) {
      if (i <= kSkip) {
        gradients[i] = i == kX ? dx : dskip;
        continue;
      }
      at::Tensor gradient = by_image[i - kWeight];
      if (gradient.sizes() != saved[i].sizes()) gradient = gradient.sum({0}, saved[i].dim() == 2);
      gradients[i] = gradient.to(saved[i].scalar_type());
    }
    return gradients;
  }
};

at::Tensor differentiable(const at::Tensor& x, const Optional& skip, int64_t groups, const at::Tensor& weight,
                          const at::Tensor& bias, double eps, const Optional& add, const Optional& scale,
                          const Optional& shift, bool silu) {
  return GroupNormSiluFunction::apply(x, skip, weight, bias, add, scale, shift, groups, eps, silu);
}

}  // namespace
}  // namespace gdd_fast

TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) {
  m.def(
      "group_norm_silu_differentiable(Tensor x, Tensor? skip, int groups, Tensor weight, Tensor bias, float eps, "
      "Tensor? add, Tensor? scale, Tensor? shift, bool silu) -> Tensor",
      &gdd_fast::differentiable);
}
