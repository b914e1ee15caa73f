// The autograd of gdd_fast/ops/max_pool2x2.py in C++, around Triton's kernels and the CPU's.
#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>

#include "binders.h"
#include "launch_plan.h"
#include "max_pool2x2.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using at::indexing::None;
using at::indexing::Slice;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// The input's size and format, and the plans for the gradient; without plans the extension's CPU kernels run.
struct Pooled : torch::CustomClassHolder {
  int64_t height, width;
  at::MemoryFormat format;
  Plans plans;
  Pooled(const at::Tensor& x, at::MemoryFormat format, Plans plans)
      : height(x.size(2)), width(x.size(3)), format(format), plans(std::move(plans)) {}
};
using Holder = c10::intrusive_ptr<Pooled>;

at::Tensor spread(const at::Tensor& gradient, const at::Tensor& places, const Pooled& of) {
  const at::Tensor dy = gradient.contiguous(of.format);
  if (!of.plans) {
    return max_pool2x2_backward(dy, places, of.height, of.width, of.format == at::MemoryFormat::ChannelsLast);
  }
  const auto options = dy.options().memory_format(of.format);
  const std::vector<int64_t> size = {dy.size(0), dy.size(1), of.height, of.width};
  // an odd last row or column is outside all windows
  const bool odd = of.height % 2 != 0 || of.width % 2 != 0;
  const at::Tensor inputs[] = {dy, places,
                               odd ? at::zeros(size, dy.options()).contiguous(of.format) : at::empty(size, options)};
  const Plan plan =
      of.plans->find(Direction::kBackward, "triton", inputs, {double(of.format == at::MemoryFormat::ChannelsLast)});
  TORCH_INTERNAL_ASSERT(plan != nullptr);
  (*plan)(inputs);
  return inputs[2];
}

// The value of every window at its place; PyTorch differentiates it.
at::Tensor collect(const at::Tensor& x, const at::Tensor& places) {
  const auto window = [&](int64_t place) {
    return x.index(
        {Slice(), Slice(), Slice(place / 2, places.size(2) * 2, 2), Slice(place % 2, places.size(3) * 2, 2)});
  };
  at::Tensor y = window(0);
  for (int64_t place = 1; place < 4; place++) y = at::where(places == place, window(place), y);
  return y;
}

// Linear in dy: its derivative takes every window's value at the place of the maximum.
struct Spread : torch::autograd::Function<Spread> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& places, const Holder& of) {
    ctx->save_for_backward({places});
    return spread(dy, places, *of);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& ddxs) {
    return {collect(ddxs[0], ctx->get_saved_variables()[0]), Variable(), Variable()};
  }
};

std::vector<at::Tensor> pooled(const at::Tensor& x, const Plan& plan) {
  if (plan) return (*plan)(x);
  auto [y, places] = max_pool2x2(x);
  return {std::move(y), std::move(places)};
}

struct MaxPool : torch::autograd::Function<MaxPool> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Plan& plan, const Holder& of) {
    const std::vector<at::Tensor> made = pooled(x, plan);
    ctx->save_for_backward({made[1]});
    ctx->saved_data["of"] = c10::IValue::make_capsule(of);
    return made[0];
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const at::Tensor places = ctx->get_saved_variables()[0];
    const auto of = c10::static_intrusive_pointer_cast<Pooled>(ctx->saved_data["of"].toCapsule());
    const at::Tensor dx = at::GradMode::is_enabled() ? Spread::apply(dys[0], places, of) : spread(dys[0], places, *of);
    return {dx, Variable(), Variable()};
  }
};

// Nothing if there are plans but Triton kernels should not run, or if the call is not for this function.
std::optional<at::Tensor> planned(const Plans& plans, const at::Tensor& map, const std::string& backend) {
  if (map.dim() != 4 || !unobserved(map)) return std::nullopt;
  const at::MemoryFormat format = memory_format(map);
  const at::Tensor x = map.contiguous(format);
  const Plan plan = plans ? plans->find(Direction::kForward, backend, x, {}) : Plan();
  if (plans && !plan) return std::nullopt;
  if (!wants_gradient(x)) return pooled(x, plan)[0];
  return MaxPool::apply(x, plan, c10::make_intrusive<Pooled>(x, format, plans));
}

}  // namespace

static const Bind bind_planned([](pybind11::module_& m) {
  m.def("planned_max_pool2x2", &planned, pybind11::call_guard<pybind11::gil_scoped_release>());
});

}  // namespace gdd_fast
